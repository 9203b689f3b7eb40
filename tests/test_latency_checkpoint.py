"""A measurement that was interrupted comes back as it was, and what is none is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nas.errors import TableError
from nas.latency import checkpoint
from nas.latency.measure import Measurement, Samples


def seen(rounds: int = 7) -> Measurement:
    rng = np.random.default_rng(0)
    samples = {
        name: Samples(rng.uniform(0.1, 1, (rounds, 5)).tolist(), rng.uniform(0.1, 1, rounds).tolist())
        for name in ("fp32 8x4x4 conv8k1", "net 0")
    }
    return Measurement(samples, 0.05, 12.5, rounds)


def test_there_and_back(tmp_path: Path) -> None:
    path = tmp_path / "table.partial.npz"
    checkpoint.save(path, seen(), "this space on this device")
    back, identity = checkpoint.load(path)
    assert identity == "this space on this device"
    assert (back.rounds, back.seconds, back.reference, list(back.samples)) == (7, 12.5, 0.05, list(seen().samples))
    for name, samples in seen().samples.items():
        np.testing.assert_allclose(back.samples[name].calls, samples.calls, rtol=1e-6)
        np.testing.assert_allclose(back.samples[name].yardstick, samples.yardstick, rtol=1e-6)


@pytest.mark.parametrize("kept", [slice(0, -500), slice(0, 0), slice(0, 4), slice(100, None)])
def test_damaged_files_are_refused(tmp_path: Path, kept: slice) -> None:
    path = tmp_path / "table.partial.npz"
    checkpoint.save(path, seen(), "x")
    path.write_bytes(path.read_bytes()[kept])
    with pytest.raises(TableError, match="no measurement that can be gone on with") as caught:
        checkpoint.load(path)
    assert "--resume" in caught.value.remedy


def test_times_that_are_no_times_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.partial.npz"
    spoiled = seen()
    spoiled.samples["net 0"].calls[3][1] = -1.0
    checkpoint.save(path, spoiled, "x")
    with pytest.raises(TableError, match="no times"):
        checkpoint.load(path)
