"""The closed loop: finalists show how far a table is off, and correct it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from helpers import TinySpace

from nas.latency import LatencyTable
from nas.latency.measure import Timing
from nas.latency.refine import Measured, refined
from nas.latency.table import Entry, Net
from nas.latency.whole import counts, fitted, identity
from nas.parts import Part
from nas.testing import synthetic_table

SPACE = TinySpace()
PARTS = SPACE.keys()


def made(truth: LatencyTable, n: int, seed: int, slow: float = 1.0) -> list[tuple[tuple[Part, ...], float]]:
    """Networks of different parts, and what they really take; the machine may be slower than it was."""
    pool = np.random.default_rng(seed).permutation(SPACE.canonical(SPACE.sample(np.random.default_rng(seed), 400)))
    found: dict[object, tuple[tuple[Part, ...], float]] = {}
    for row in pool:
        parts = tuple(SPACE.parts(SPACE.decode(row)))
        ms = truth.fits["latency_ms"].net([(part, truth.entries[part.key].value) for part in parts])
        found.setdefault(identity(counts(parts)), (parts, slow * ms))
    return list(found.values())[:n]


def finalists(nets: Sequence[tuple[tuple[Part, ...], float]]) -> list[Measured]:
    return [
        Measured(f"search-{i}", parts, Timing(ms, 1.1 * ms, ms, 100, 0.002), 5e3) for i, (parts, ms) in enumerate(nets)
    ]


def calibrated(truth: LatencyTable, n: int = 12) -> LatencyTable:
    """A table whose fit comes from networks of the truth."""
    nets = [Net(counts(parts), ms, 1.2 * ms, 4e3, 0.0, 0.0) for parts, ms in made(truth, n, seed=1)]
    return fitted(replace(truth, nets=nets, protocol={"yardstick_ms": 0.05}), PARTS)


def test_a_right_table_is_not_found_wrong() -> None:
    table = calibrated(synthetic_table(SPACE))
    result = refined(table, PARTS, finalists(made(synthetic_table(SPACE), 20, seed=2)[-6:]), {}, 0.05)
    assert result.before.mape < 0.01
    assert not result.exceeded
    assert [row["name"] for row in result.rows] == [f"search-{i}" for i in range(6)]


def test_a_wrong_part_is_measured_and_the_error_goes() -> None:
    truth = synthetic_table(SPACE)
    wrong_key = next(key for key in PARTS if key.startswith("fp32 1x8x8 conv16"))
    good = calibrated(truth)
    guessed = replace(good.entries[wrong_key], value=3 * good.entries[wrong_key].value, measured=False)
    table = replace(good, entries={**good.entries, wrong_key: guessed})
    with_it = [net for net in made(truth, 40, seed=3) if any(part.key == wrong_key for part in net[0])][:5]
    right = {wrong_key: Entry(Timing(1.0, 1.0, 1.0, 9, 0.0), truth.entries[wrong_key].value)}
    result = refined(table, PARTS, finalists(with_it), right, 0.05)
    assert result.before.mape > 0.05
    assert result.exceeded
    assert result.after.mape < 0.2 * result.before.mape
    assert result.newly_measured == 1
    assert result.table.entries[wrong_key].measured
    assert table.entries[wrong_key] is guessed  # the table that the search was priced by stays as it is


def test_a_session_at_another_speed_does_not_spoil_the_table() -> None:
    """Everything takes twice as long, the yardstick too: what was measured is told as it was, the fit stays."""
    truth = synthetic_table(SPACE)
    table = calibrated(truth)
    result = refined(table, PARTS, finalists(made(truth, 20, seed=2, slow=2.0)[-6:]), {}, 0.10)
    assert result.before.mape == pytest.approx(0.5, abs=0.02)
    assert result.exceeded
    assert result.after.mape < 0.02
    genomes = SPACE.sample(np.random.default_rng(0), 20)
    for genome in genomes:
        parts = SPACE.parts(SPACE.decode(genome))
        now, then = (
            t.fits["latency_ms"].net([(part, t.entries[part.key].value) for part in parts])
            for t in (result.table, table)
        )
        assert now == pytest.approx(then, rel=0.02)


def test_finalists_of_many_searches_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.latency.refine.KEPT", 8)
    truth = synthetic_table(SPACE)
    table = calibrated(truth)
    some = finalists(made(truth, 24, seed=4))
    for start in range(0, 18, 6):
        table = refined(table, PARTS, some[start : start + 6], {}, 0.05).table
    again = refined(table, PARTS, some[12:18], {}, 0.05).table
    for t in (table, again):
        found = [net for net in t.nets if net.source == "finalist"]
        assert len(found) <= 8
        assert len({identity(net.parts) for net in t.nets}) == len(t.nets)
    assert {identity(counts(f.parts)) for f in some[12:18]} <= {identity(net.parts) for net in again.nets}
