"""The published schema is what tables are: ours follow it, and what breaks it is named, all of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from helpers import TinySpace

from nas.latency.schema import CHECKED, NOTES, table_schema, violations
from nas.latency.table import LatencyTable
from nas.testing import synthetic_table


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "table.json"
    synthetic_table(TinySpace()).save(path)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def subschemas(schema: dict[str, Any]) -> list[dict[str, Any]]:
    inner = [*schema.get("properties", {}).values(), *schema.get("$defs", {}).values()]
    inner += [schema[name] for name in ("items", "additionalProperties") if isinstance(schema.get(name), dict)]
    return [schema, *(found for one in inner for found in subschemas(one))]


def test_the_schema_uses_what_is_checked() -> None:
    used = {keyword for schema in subschemas(table_schema()) for keyword in schema}
    assert used <= {*CHECKED, *NOTES}
    assert {s["$ref"].removeprefix("#/$defs/") for s in subschemas(table_schema()) if "$ref" in s} == set(
        table_schema()["$defs"]
    )


def test_our_tables_follow_it(content: dict[str, Any]) -> None:
    assert list(violations(content)) == []


def test_a_usual_validator_agrees(content: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(table_schema())
    jsonschema.Draft202012Validator.check_schema(table_schema())
    assert list(validator.iter_errors(content)) == []
    entry = next(iter(content["entries"].values()))
    changes = {"p50": -1.0, "n": 1.5, "measured": 1, "fused": {"Conv": -1}, "energy_mj": "none", "x": 1}
    for change in ({name: value} for name, value in changes.items()):
        spoilt = {**content, "entries": {"part": {**entry, **change}}}
        assert len(list(validator.iter_errors(spoilt))) == len(list(violations(spoilt))) == 1, change


def test_every_field_is_required_and_no_other_allowed(content: dict[str, Any]) -> None:
    for name in content:
        assert f"the table lacks {name!r}" in list(violations({k: v for k, v in content.items() if k != name}))
    assert list(violations({**content, "extra": 1})) == ["the table has the unknown field 'extra'"]
    assert set(table_schema()["properties"]) == set(content)
    fields = {"schema_version", "unit", "sha256", *LatencyTable.__dataclass_fields__}
    assert set(content) == fields


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"p50": math.nan}, "entries['a part'].p50 is nan, not finite"),
        ({"p50": math.inf}, "entries['a part'].p50 is inf, not finite"),
        ({"value": 0}, "entries['a part'].value is 0, not above 0"),
        ({"value": True}, "entries['a part'].value is True, not a number"),
        ({"n": 1.5}, "entries['a part'].n is 1.5, not an integer"),
        ({"n": -1}, "entries['a part'].n is -1, less than 0"),
        ({"measured": 1}, "entries['a part'].measured is 1, not a boolean"),
        ({"energy_mj": "none"}, "entries['a part'].energy_mj is 'none', not a number or null"),
        ({"fused": {"Conv": "one"}}, "entries['a part'].fused.Conv is 'one', not an integer"),
        ({"unit": "us"}, "entries['a part'] has the unknown field 'unit'"),
    ],
)
def test_what_breaks_it_is_named_with_its_place(content: dict[str, Any], change: dict[str, Any], said: str) -> None:
    entry = next(iter(content["entries"].values()))
    assert list(violations({**content, "entries": {"a part": {**entry, **change}}})) == [said]


def test_all_violations_are_found(content: dict[str, Any]) -> None:
    content.update(entries={}, date="", sha256="short", nets=[{"parts": {"x": 0}}], noise=-1)
    content["errors"]["latency_ms"]["within_5"] = 2
    content["fits"]["latency_ms"]["scale"] = []
    found = "; ".join(violations(content))
    for said in (
        "entries is empty", "date is empty", "sha256 is 'short', which is not of the form",
        "nets[0] lacks 'measured_ms'", "nets[0].parts.x is 0, less than 1", "noise is -1, less than 0",
        "errors.latency_ms.within_5 is 2, more than 1",
        "fits.latency_ms.scale has 0 items, not 1 or more",
    ):  # fmt: skip
        assert said in found
    assert list(violations([])) == ["the table is [], not an object"]
