"""All that is wrong with a table is found at once; what is only odd does not refuse it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import TinySpace

from nas.errors import TableError
from nas.files import digest
from nas.latency import LatencyTable
from nas.latency.check import problems, read, rebuild, remedy
from nas.testing import synthetic_table


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "table.json"
    synthetic_table(TinySpace()).save(path)
    return dict(read(path))


def signed(raw: dict[str, Any]) -> dict[str, Any]:
    return {**raw, "sha256": digest({key: value for key, value in raw.items() if key != "sha256"})}


def texts(raw: Any, fatal: bool = True) -> list[str]:
    return [problem.text for problem in problems(raw) if problem.fatal == fatal]


def test_a_good_table_has_none(raw: dict[str, Any]) -> None:
    assert problems(raw) == []


def test_all_of_them_are_listed(raw: dict[str, Any]) -> None:
    first, second, third = list(raw["entries"].values())[:3]
    first["p50"], second["value"], third["n"] = -1.0, "fast", -3
    raw["unit"] = "us"
    found = texts(raw)
    assert found[0] == "is in 'us', where every time has to be in milliseconds (unit 'ms')"
    assert len(found) == 4
    del raw["device"]
    assert len(texts(raw)) == 5


def test_one_entry_in_another_unit(raw: dict[str, Any]) -> None:
    """Seconds or microseconds among milliseconds: its own figures, or those of the networks, give it away."""
    entry = next(iter(raw["entries"].values()))
    entry["value"] /= 1000
    found = texts(signed(raw))
    assert len(found) == 1
    assert "is 0.001 times its own p50" in found[0]


def test_a_whole_table_in_another_unit(raw: dict[str, Any]) -> None:
    key, entry = next(iter(raw["entries"].items()))
    for name in ("p50", "p95", "mean", "value"):
        entry[name] *= 1e6
    raw["nets"][0]["parts"] = {key: 2}
    assert any("the sum of its parts is" in text for text in texts(signed(raw)))


def test_what_is_odd_is_a_warning(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["nets"][0]["parts"] = {"a part of another space": 1}
    next(iter(raw["entries"].values()))["measured"] = False
    del raw["errors"]["latency_ms"]
    raw = signed(raw)
    assert texts(raw) == []
    warned = texts(raw, fatal=False)
    assert [any(said in text for text in warned) for said in ("without an entry", "was not measured", "errors lacks")]
    assert len(warned) == 3
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(raw))
    LatencyTable.load(path)


def test_origin_says_whose_figures_they_are(raw: dict[str, Any]) -> None:
    raw.update(origin={"source": "somewhere"}, device={"name": "phone"})
    assert texts(signed(raw)) == []
    assert texts(signed(raw), fatal=False) == ["origin lacks 'licence': whose are the figures, and who may have them?"]


def test_what_is_no_table() -> None:
    assert texts([1]) == ["is no table but list in JSON"]
    assert texts({"a": 1}) == ["is no table: it has neither schema_version nor entries"]


@pytest.mark.parametrize("space", [None, 3, "rm -rf; x", "", "my space"])
def test_the_remedy_quotes_names_only(space: Any) -> None:
    assert rebuild(space) == "build it again with `nas profile --space NAME --device local`"
    assert remedy({"space": "tiny"}) == rebuild("tiny")
    assert "nas tables import" in remedy({"origin": {"source": "x"}})


def test_a_folder_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="Cannot read"):
        read(tmp_path)


def test_calls_that_waited_for_the_processor_do_not_make_a_table_suspicious() -> None:
    """Two threads on a busy machine: a part of 5 µs whose mean is 3 ms, because a few calls were put aside."""
    table = synthetic_table(TinySpace())
    key = next(iter(table.entries))
    slow = replace(table.entries[key].timing, mean=700 * table.entries[key].value, p95=90 * table.entries[key].value)
    disturbed = replace(table, entries={**table.entries, key: replace(table.entries[key], timing=slow)})
    raw = {**disturbed._content(), "sha256": disturbed.sha256}
    assert not [problem for problem in problems(json.loads(json.dumps(raw))) if problem.fatal]
