"""A real, small profile of a tiny space: every part measured, nets fitted, provenance kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TinySpace

from nas.compression import apply_passes
from nas.latency import AdditiveEstimator, Device, LatencyTable
from nas.latency.check import problems, read
from nas.latency.plan import YARDSTICK, CalibrationNet, calibration_genomes
from nas.latency.profile import Effort, describe, profile
from nas.latency.schema import violations
from nas.student.export import to_onnx

NETS = 10


@pytest.fixture(scope="module")
def nets() -> list[CalibrationNet]:
    space = TinySpace()
    x = torch.rand(8, 1, 8, 8)
    found = []
    for genome in calibration_genomes(space, NETS):
        candidate = space.decode(genome)
        plan = space.training(candidate).compression
        model = apply_passes(space.build(candidate).eval(), plan, x).eval()
        found.append(CalibrationNet(tuple(space.parts(candidate)), to_onnx(model, plan, x, x.numpy())))
    return found


@pytest.fixture(scope="module")
def table(nets: list[CalibrationNet]) -> LatencyTable:
    return profile(TinySpace(), nets, Device.local(), Effort(1.0, seed=3))


def test_calibration_genomes_spread_over_the_macs() -> None:
    space = TinySpace()
    genomes = calibration_genomes(space, 12, seed=1)
    np.testing.assert_array_equal(genomes, calibration_genomes(space, 12, seed=1))
    np.testing.assert_array_equal(genomes, space.canonical(genomes))
    macs = [sum(p.macs for p in space.parts(space.decode(g))) for g in genomes]
    assert macs == sorted(macs)
    everything = [
        sum(p.macs for p in space.parts(space.decode(g))) for g in space.sample(np.random.default_rng(0), 500)
    ]
    assert (macs[0], macs[-1]) == (min(everything), max(everything))


def test_every_part_is_measured(table: LatencyTable) -> None:
    space = TinySpace()
    assert set(table.entries) == set(space.keys())
    for key, entry in table.entries.items():
        assert 0 < entry.value < 1000
        assert 0 < entry.timing.p50 <= entry.timing.p95
        assert entry.timing.n > 0
        assert entry.fused, key
        if key.startswith("int8"):
            assert "QLinearConv" in entry.fused
    prices = AdditiveEstimator(space, table).price(space.sample(np.random.default_rng(0), 20))
    assert np.isfinite(prices).all()


def test_provenance(table: LatencyTable, tmp_path: Path) -> None:
    assert table.space == "tiny"
    assert table.device == Device.local().as_dict()
    assert table.protocol["yardstick"] == YARDSTICK.key
    assert table.protocol["calibration_nets"] == NETS == len(table.nets) == table.errors["latency_ms"].nets
    assert table.protocol["rounds"] >= 6
    assert set(table.fits) == set(table.errors) == {"latency_ms", "latency_p95_ms", "size_bytes"}
    assert table.noise >= 0
    for net in table.nets:
        assert min(net.measured_ms, net.plain_sum_ms, net.p95_ms, net.size_bytes) > 0
    text = describe(table)
    assert table.name in text
    assert f"{len(table.entries)} parts" in text
    assert "noise floor" in text
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table
    raw = read(tmp_path / "table.json")
    assert list(violations(raw)) == []
    assert problems(raw) == []


def test_sizes_are_predicted_exactly_enough(table: LatencyTable, nets: list[CalibrationNet]) -> None:
    """Bytes are no matter of luck: the fitted sum is within a few per cent of the files."""
    assert table.errors["size_bytes"].mape < 0.05
    assert table.errors["size_bytes"].spearman > 0.95
