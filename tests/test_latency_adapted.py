"""nas tables adapt: a new device's table from others' and ten measurements, by the commands that a user types."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import TinySpace

from nas.cli import main
from nas.latency import AdditiveEstimator, LatencyTable
from nas.latency.fit import spearman
from nas.testing import synthetic_table

SPACE = TinySpace()
KEYS = list(SPACE.keys())


def device(seed: int, mix: float, base: LatencyTable) -> LatencyTable:
    """A device half of whose behaviour is that of ``base``: what devices have in common is what few shots live of."""
    other = synthetic_table(SPACE, seed)
    entries = {
        key: replace(entry, value=float(3.0 * base.entries[key].value ** mix * entry.value ** (1 - mix)))
        for key, entry in other.entries.items()
    }
    return replace(other, entries=entries, device={**other.device, "name": f"board-{seed}"})


@pytest.fixture
def known(tmp_path: Path) -> list[str]:
    base = synthetic_table(SPACE, 1)
    paths = []
    for seed in (2, 3, 4):
        device(seed, 0.9, base).save(tmp_path / f"known{seed}.json")
        paths.append(str(tmp_path / f"known{seed}.json"))
    return paths


@pytest.fixture
def truth() -> LatencyTable:
    return device(5, 0.9, synthetic_table(SPACE, 1))


def test_ten_parts_make_a_table(
    known: list[str], truth: LatencyTable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tables", "adapt", *known, "--suggest", "8"]) == 0
    keys = capsys.readouterr().out.splitlines()
    assert len(set(keys)) == 8
    assert set(keys) <= set(KEYS)
    few = tmp_path / "few.json"
    few.write_text(json.dumps({"parts": {key: truth.entries[key].value for key in keys}}))
    out = tmp_path / "new.json"
    assert main(["tables", "adapt", *known, "--measured", str(few), "--name", "board", "--out", str(out)]) == 0
    table = LatencyTable.load(out)
    assert table.name == "tiny-board"
    assert {key for key, entry in table.entries.items() if entry.measured} == set(keys)
    guessed = [key for key in KEYS if key not in keys]
    predicted = np.array([table.entries[key].value for key in guessed])
    wanted = np.array([truth.entries[key].value for key in guessed])
    assert spearman(predicted, wanted) > 0.8
    assert np.median(np.abs(predicted / wanted - 1)) < 0.25
    assert all(table.entries[key].uncertainty > 0 for key in guessed)
    prices = AdditiveEstimator(SPACE, table).price(SPACE.sample(np.random.default_rng(0), 50))
    assert np.isfinite(prices).all()


def test_ten_networks_make_a_table(known: list[str], truth: LatencyTable, tmp_path: Path) -> None:
    """Their sums are what is predicted, so networks that were not measured are ranked as the device ranks them."""
    rng = np.random.default_rng(0)
    nets = [SPACE.parts(SPACE.decode(row)) for row in SPACE.sample(rng, 60)]
    sums = [sum(truth.entries[part.key].value * part.count for part in net) for net in nets]
    few = tmp_path / "few.json"
    measured = [
        {"parts": {part.key: part.count for part in net}, "ms": ms}
        for net, ms in zip(nets[:10], sums[:10], strict=True)
    ]
    few.write_text(json.dumps({"networks": measured}))
    out = tmp_path / "new.json"
    assert main(["tables", "adapt", *known, "--measured", str(few), "--out", str(out)]) == 0
    table = LatencyTable.load(out)
    predicted = [sum(table.entries[part.key].value * part.count for part in net) for net in nets[10:]]
    assert spearman(predicted, sums[10:]) > 0.9
    assert np.mean(np.abs(np.array(predicted) / sums[10:] - 1)) < 0.15


@pytest.mark.parametrize(
    ("few", "complaint"),
    [
        ({"parts": {"no such part": 1.0, "nor this": 2.0}}, "no such part"),
        ({"parts": {KEYS[0]: -1.0, KEYS[1]: 1.0}}, "finite, positive"),
        ({"parts": {KEYS[0]: "fast"}}, "garbles a field"),
        ({"networks": [{"parts": {}, "ms": 1.0}, {"parts": {KEYS[0]: 1}, "ms": 1.0}]}, "has no parts"),
        ({}, "2 samples"),
        ([], "garbles a field"),
        (None, "cannot be read"),
    ],
)
def test_measurements_that_are_none(
    few: object, complaint: str, known: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "few.json"
    path.write_text("{" if few is None else json.dumps(few))
    assert main(["tables", "adapt", *known, "--measured", str(path), "--out", str(tmp_path / "x.json")]) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "either --suggest or --measured"),
        (["--suggest", "8", "--measured", "few.json"], "either --suggest or --measured"),
        (["--measured", "few.json"], "--out"),
        (["--suggest", "1"], "at least 2 samples"),
    ],
)
def test_wrong_options(
    arguments: list[str], complaint: str, known: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tables", "adapt", *known, *arguments]) == 2
    assert complaint in capsys.readouterr().err.replace("\n", " ")


def test_tables_of_different_spaces_share_nothing(
    known: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = LatencyTable.load(Path(known[0]))
    foreign = replace(other, entries={f"other {key}": entry for key, entry in other.entries.items()})
    foreign.save(tmp_path / "foreign.json")
    assert main(["tables", "adapt", *known, str(tmp_path / "foreign.json"), "--suggest", "8"]) == 2
    assert "share 0 parts" in capsys.readouterr().err
