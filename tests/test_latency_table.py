"""Table files come back as they were, and whatever was done to one is noticed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import TinySpace

from nas.errors import TableError
from nas.files import digest
from nas.latency import AdditiveEstimator, LatencyTable
from nas.latency.profile import describe
from nas.testing import synthetic_table


@pytest.fixture
def table() -> LatencyTable:
    return synthetic_table(TinySpace())


@pytest.fixture
def path(table: LatencyTable, tmp_path: Path) -> Path:
    path = tmp_path / "table.json"
    table.save(path)
    return path


def test_save_and_load(table: LatencyTable, path: Path) -> None:
    loaded = LatencyTable.load(path)
    assert loaded == table
    assert loaded.sha256 == table.sha256 == json.loads(path.read_text())["sha256"]
    loaded.save(path.with_name("again.json"))
    assert path.with_name("again.json").read_bytes() == path.read_bytes()
    assert table.name == "tiny-synthetic"


def rewritten(path: Path, change: Callable[[dict[str, Any]], Any], *, sign: bool) -> Path:
    """Edit the file; with ``sign`` the digest is made to fit, so that only the values can give it away."""
    raw = json.loads(path.read_text())
    change(raw)
    if sign:
        body = json.dumps({key: value for key, value in raw.items() if key != "sha256"})
        raw["sha256"] = "0" * 64 if "NaN" in body or "Infinity" in body else digest(json.loads(body))
    path.write_text(json.dumps(raw))
    return path


def first_entry(raw: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = next(iter(raw["entries"].values()))
    return entry


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("a time", lambda raw: first_entry(raw).update(value=first_entry(raw)["value"] * 0.99)),
        ("a fit", lambda raw: raw["fits"]["latency_ms"].update(per_net=0.0)),
        ("the device", lambda raw: raw["device"].update(threads=4)),
        ("a part", lambda raw: raw["entries"].pop(next(iter(raw["entries"])))),
        ("the date", lambda raw: raw.update(date="2001-01-01")),
        ("the digest", lambda raw: raw.update(sha256="0" * 64)),
    ],
)
def test_edited_files_are_refused(path: Path, what: str, change: Callable[[dict[str, Any]], Any]) -> None:
    with pytest.raises(TableError, match="does not match its own sha256: it was edited or cut") as caught:
        LatencyTable.load(rewritten(path, change, sign=False))
    assert "nas profile --space tiny --device local" in caught.value.remedy


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 0.0])
@pytest.mark.parametrize("field", ["p50", "p95", "mean", "value"])
def test_times_that_are_no_times_are_refused(path: Path, field: str, value: float) -> None:
    with pytest.raises(TableError, match=rf"entries\[.*\].{field} is {value}, not (finite|above 0)"):
        LatencyTable.load(rewritten(path, lambda raw: first_entry(raw).update({field: value}), sign=True))


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("is in 's', where every time has to be in milliseconds", lambda raw: raw.update(unit="s")),
        ("is in None, where", lambda raw: raw.pop("unit")),
        ("is a table of schema version 3, where this program reads 2", lambda raw: raw.update(schema_version=3)),
        ("is a table of schema version None", lambda raw: raw.pop("schema_version")),
        ("the table lacks 'device'", lambda raw: raw.pop("device")),
        ("lacks 'p95'", lambda raw: first_entry(raw).pop("p95")),
        ("value is 'fast', not a number", lambda raw: first_entry(raw).update(value="fast")),
        ("has the unknown field 'extra'", lambda raw: raw["errors"]["latency_ms"].update(extra=1)),
        ("entries is .*, not an object", lambda raw: raw.update(entries=list(raw["entries"]))),
        ("per_net is nan, not finite", lambda raw: raw["fits"]["latency_ms"].update(per_net=math.nan)),
        ("noise is nan", lambda raw: raw.update(noise=math.nan)),
        ("scale has 2 numbers", lambda raw: raw["fits"]["latency_ms"].update(scale=[1.0, 1.0])),
        ("errors has 'latency_ms', for which", lambda raw: raw["fits"].pop("latency_ms")),
        ("device lacks threads, and origin", lambda raw: raw["device"].pop("threads")),
        ("above its 95th percentile", lambda raw: first_entry(raw).update(p95=first_entry(raw)["p50"] / 2)),
        (
            r"value \S+ is 1000 times its own p50 of \S+ ms, so the units are mixed",
            lambda raw: first_entry(raw).update(value=1000 * first_entry(raw)["p50"]),
        ),
        (
            r"nets\[0\] takes 0.1 ms, the sum of its parts is \S+ ms, so the units are mixed",
            lambda raw: raw["nets"][0].update(parts={next(iter(raw["entries"])): 100_000}),
        ),
    ],
)
def test_wrong_units_schemas_and_fields_are_refused(
    path: Path, message: str, change: Callable[[dict[str, Any]], Any]
) -> None:
    with pytest.raises(TableError, match=message):
        LatencyTable.load(rewritten(path, change, sign=True))


def test_truncated_files_are_refused(path: Path) -> None:
    data = path.read_bytes()
    for length in (0, 1, 100, len(data) // 2, len(data) - 3):
        path.write_bytes(data[:length])
        with pytest.raises(TableError, match="is damaged"):
            LatencyTable.load(path)


@pytest.mark.parametrize("data", [b"[1, 2]", b"null", b'"table"', b"\xff\xfe\x00garbage", b"part,ms\nconv,1\n"])
def test_what_is_no_table_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "other.json"
    path.write_bytes(data)
    with pytest.raises(TableError, match=r"is damaged|is no table"):
        LatencyTable.load(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="There is no table"):
        LatencyTable.load(tmp_path / "absent.json")


def test_a_table_of_version_1_says_how_to_rebuild_it(path: Path) -> None:
    """What the first release wrote: no origin, no interpolation, nets without parts, entries without uncertainty."""

    def older(raw: dict[str, Any]) -> None:
        raw["schema_version"] = 1
        for name in ("interpolation", "energy", "origin"):
            del raw[name]
        for entry in raw["entries"].values():
            del entry["measured"], entry["uncertainty"], entry["energy_mj"]

    with pytest.raises(TableError, match="is a table of schema version 1, where this program reads 2") as caught:
        LatencyTable.load(rewritten(path, older, sign=True))
    assert "nas profile --space tiny --device local" in caught.value.remedy


def test_keys_that_stand_twice_are_refused(path: Path) -> None:
    text = path.read_text()
    key = next(iter(json.loads(text)["entries"]))
    path.write_text(text.replace(f'"{key}": {{', f'"{key}": {{}}, "{key}": {{', 1))
    with pytest.raises(TableError, match="has 1 key twice in one object, the first") as caught:
        LatencyTable.load(path)
    assert repr(key) in caught.value.found


def test_the_number_of_further_problems_is_said(path: Path) -> None:
    def spoil(raw: dict[str, Any]) -> None:
        first_entry(raw).update(p50=-1.0, value=0.0)

    with pytest.raises(TableError, match=r"\(and 1 more: `nas tables validate` lists them\)"):
        LatencyTable.load(rewritten(path, spoil, sign=True))


def test_a_table_for_another_space_says_so(table: LatencyTable) -> None:
    other = replace(table, space="other")
    with pytest.raises(TableError, match="It was built for space 'other', not 'tiny'") as caught:
        AdditiveEstimator(TinySpace(), replace(other, entries={}))
    assert "nas profile --space tiny" in caught.value.remedy


def test_imported_tables_need_not_know_their_device(table: LatencyTable, tmp_path: Path) -> None:
    imported = replace(table, device={"name": "phone"}, origin={"source": "x", "licence": "MIT"}, errors={}, nets=[])
    imported.save(tmp_path / "phone.json")
    assert LatencyTable.load(tmp_path / "phone.json") == imported
    assert "not compared with whole nets" in describe(imported)
    with pytest.raises(TableError, match="has no error for latency_ms: its sums were never compared"):
        imported.error("latency_ms")
    assert table.error("latency_ms") == table.errors["latency_ms"]


def test_a_missing_part_names_the_nearest(table: LatencyTable) -> None:
    known = next(key for key in table.entries if key.startswith("fp32 8x8x8 conv"))
    wanted = known.replace("8x8x8", "8x8x9")
    with pytest.raises(TableError, match=r"lacks 1 of 1 parts") as caught:
        table.entry(wanted)
    assert repr(wanted) in caught.value.found
    assert f"the nearest that it has is {known!r}" in caught.value.found
    assert table.missing([known, wanted]) == [wanted]
    assert table.entry(known) is table.entries[known]
    empty = LatencyTable(**{**vars(table), "entries": {}})
    with pytest.raises(TableError, match=r"'x'\."):
        empty.entry("x")
