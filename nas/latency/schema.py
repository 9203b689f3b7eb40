"""The part of JSON Schema (draft 2020-12) that ``table.schema.json`` uses, checked without a further dependency.

Unlike the usual validators it does not stop at the first violation and counts NaN and infinity as violations, which
Python's JSON reader lets through.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

Schema = Mapping[str, Any]
FILE = Path(__file__).with_name("table.schema.json")
_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool,
    "null": type(None),
}  # fmt: skip
#: Keywords that say something of a value; all others of the file are notes to the reader.
CHECKED = (
    "$ref", "type", "const", "required", "properties", "additionalProperties", "items", "minItems", "minProperties",
    "minLength", "pattern", "minimum", "maximum", "exclusiveMinimum",
)  # fmt: skip
NOTES = ("$schema", "$id", "$defs", "title", "description")


@cache
def table_schema() -> dict[str, Any]:
    """The published schema of table files."""
    schema: dict[str, Any] = json.loads(FILE.read_text())
    return schema


def violations(value: Any, schema: Schema | None = None, where: str = "") -> Iterator[str]:
    """Every way in which ``value`` breaks a schema (that of tables), each a sentence that starts with its place."""
    root = table_schema() if schema is None else schema
    yield from _violations(value, root, root, where)


def _violations(value: Any, schema: Schema, root: Schema, where: str) -> Iterator[str]:
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].removeprefix("#/$defs/")]
    place = where or "the table"
    if "const" in schema and value != schema["const"]:
        yield f"{place} is {_short(value)}, not {schema['const']!r}"
    kinds = schema.get("type", ())
    kinds = (kinds,) if isinstance(kinds, str) else kinds
    if kinds and not any(_is(value, kind) for kind in kinds):
        yield f"{place} is {_short(value)}, not {_article(' or '.join(kinds))}"
    elif isinstance(value, str):
        yield from _of_string(value, schema, place)
    elif isinstance(value, dict):
        yield from _of_object(value, schema, root, where)
    elif isinstance(value, list):
        if len(value) < schema.get("minItems", 0):
            yield f"{place} has {len(value)} items, not {schema['minItems']} or more"
        for i, item in enumerate(value):
            yield from _violations(item, schema.get("items", {}), root, f"{where}[{i}]")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield from _of_number(value, schema, place)


def _of_string(value: str, schema: Schema, place: str) -> Iterator[str]:
    if len(value) < schema.get("minLength", 0):
        yield f"{place} is empty"
    if "pattern" in schema and not re.search(schema["pattern"], value):
        yield f"{place} is {_short(value)}, which is not of the form {schema['pattern']}"


def _of_number(value: float, schema: Schema, place: str) -> Iterator[str]:
    if not math.isfinite(value):
        yield f"{place} is {value}, not finite"
    elif "exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"]:
        yield f"{place} is {value}, not above {schema['exclusiveMinimum']}"
    elif "minimum" in schema and value < schema["minimum"]:
        yield f"{place} is {value}, less than {schema['minimum']}"
    elif "maximum" in schema and value > schema["maximum"]:
        yield f"{place} is {value}, more than {schema['maximum']}"


def _of_object(value: dict[str, Any], schema: Schema, root: Schema, where: str) -> Iterator[str]:
    place = where or "the table"
    if len(value) < schema.get("minProperties", 0):
        yield f"{place} is empty"
    for name in schema.get("required", ()):
        if name not in value:
            yield f"{place} lacks {name!r}"
    known, others = schema.get("properties", {}), schema.get("additionalProperties", {})
    for name, item in value.items():
        inner = known.get(name, others)
        # Part keys have spaces and dots of their own: quoted, so that the place can be read.
        at = f"{where}.{name}" if where and name.isidentifier() else f"{where}[{name!r}]" if where else name
        if inner is False:
            yield f"{place} has the unknown field {name!r}"
        else:
            yield from _violations(item, inner, root, at)


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES[kind])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeio' else 'a'} {words}"
