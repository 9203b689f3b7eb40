"""Tables of a new device from other devices' tables."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nas.errors import TableError
from nas.latency.adapt import adapt_networks, adapt_parts, suggest, values


@pytest.fixture
def world() -> tuple[list[dict[str, float]], dict[str, float]]:
    """Three known devices' tables of 60 parts, and a new device that is a mix of two of them."""
    rng = np.random.default_rng(0)
    base = rng.lognormal(-2, 1.0, 60)
    columns = [base * rng.lognormal(0, 0.4, 60) for _ in range(3)]
    new = 3 * (0.5 * columns[0] + 0.5 * columns[2]) * rng.lognormal(0, 0.02, 60)
    keys = [f"part {i}" for i in range(60)]
    return [dict(zip(keys, column.tolist(), strict=True)) for column in columns], dict(
        zip(keys, new.tolist(), strict=True)
    )


def error(found: dict[str, tuple[float, float]], new: dict[str, float]) -> float:
    return float(np.median([abs(found[key][0] / new[key] - 1) for key in found]))


def test_ten_parts_tell_the_others(world: Any) -> None:
    known, new = world
    picked = suggest(known, 10, seed=1)
    assert len(set(picked)) == 10
    assert picked == suggest(known, 10, seed=1)
    found = adapt_parts(known, {key: new[key] for key in picked})
    assert set(found) == set(new)
    assert error(found, new) < 0.08
    inside = [abs(value - new[key]) <= 2 * share * value for key, (value, share) in found.items()]
    assert np.mean(inside) > 0.8


def test_only_shared_parts_count(world: Any) -> None:
    known, new = world
    known[0]["only here"] = 1.0
    found = adapt_parts(known, {key: new[key] for key in suggest(known, 10)})
    assert "only here" not in found
    with pytest.raises(TableError, match=r"'only here'; the nearest that they share is 'part"):
        adapt_parts(known, {"only here": 1.0, "part 1": 2.0})


def test_one_known_device_is_enough(world: Any) -> None:
    known, _ = world
    new = {key: 2 * value for key, value in known[1].items()}
    found = adapt_parts(known[1:2], {key: new[key] for key in suggest(known[1:2], 5)})
    assert error(found, new) < 0.05


def test_networks_tell_their_parts(world: Any) -> None:
    known, new = world
    rng = np.random.default_rng(2)
    measured = []
    for _ in range(12):
        parts = {f"part {i}": int(rng.integers(1, 4)) for i in rng.choice(60, 15, replace=False)}
        measured.append((parts, sum(new[key] * count for key, count in parts.items()) * rng.lognormal(0, 0.01)))
    found = adapt_networks(known, measured)
    assert set(found) == set(new)
    assert error(found, new) < 0.2
    sums = [sum(found[key][0] * count for key, count in parts.items()) / cost for parts, cost in measured]
    assert np.abs(np.array(sums) - 1).mean() < 0.1


def test_what_is_wrong_is_said(world: Any) -> None:
    known, new = world
    with pytest.raises(TableError, match="There is no known device"):
        suggest([], 5)
    with pytest.raises(TableError, match="share 0 parts"):
        suggest([known[0], {"other": 1.0}], 5)
    with pytest.raises(TableError, match="1 samples of 60 rows"):
        adapt_parts(known, {"part 1": 1.0})
    with pytest.raises(TableError, match="A measured cost is nan"):
        adapt_parts(known, {"part 1": 1.0, "part 2": float("nan")})
    with pytest.raises(TableError, match="samples of"):
        adapt_networks(known, [({"part 1": 1}, new["part 1"])])
    with pytest.raises(TableError, match="Network 1 of the measured ones has no parts"):
        adapt_networks(known, [({"part 1": 1}, 1.0), ({}, 1.0)])
    with pytest.raises(TableError, match="'port 1'"):
        adapt_networks(known, [({"part 1": 1}, 1.0), ({"port 1": 1}, 1.0)])


def test_values_of_a_table() -> None:
    table: Any = SimpleNamespace(entries={"a": SimpleNamespace(value=1.5), "b": SimpleNamespace(value=2.0)})
    assert values(table) == {"a": 1.5, "b": 2.0}
