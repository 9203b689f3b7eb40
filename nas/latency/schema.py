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
Place = tuple[str | int, ...]
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


def violations(value: Any, schema: Schema | None = None) -> list[str]:
    """Every way in which ``value`` breaks a schema (that of tables), each a sentence that starts with its place."""
    root = table_schema() if schema is None else schema
    return [f"{_place(path)} {text}" for path, text in _violations(value, root, root, ())]


def _violations(value: Any, schema: Schema, root: Schema, path: Place) -> Iterator[tuple[Place, str]]:
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].removeprefix("#/$defs/")]
    if "const" in schema and value != schema["const"]:
        yield path, f"is {_short(value)}, not {schema['const']!r}"
    kinds = schema.get("type", ())
    kinds = (kinds,) if isinstance(kinds, str) else kinds
    if kinds and not any(_is(value, kind) for kind in kinds):
        yield path, f"is {_short(value)}, not {_article(' or '.join(kinds))}"
    elif isinstance(value, dict):
        yield from _of_object(value, schema, root, path)
    elif isinstance(value, list):
        if len(value) < schema.get("minItems", 0):
            yield path, f"has {len(value)} items, not {schema['minItems']} or more"
        for i, item in enumerate(value):
            yield from _violations(item, schema.get("items", {}), root, (*path, i))
    elif text := _of_string(value, schema) if isinstance(value, str) else _of_number(value, schema):
        yield path, text


def _of_string(value: str, schema: Schema) -> str:
    if len(value) < schema.get("minLength", 0):
        return "is empty"
    if "pattern" in schema and not re.search(schema["pattern"], value):
        return f"is {_short(value)}, which is not of the form {schema['pattern']}"
    return ""


def _of_number(value: Any, schema: Schema) -> str:
    if value is None or isinstance(value, bool):
        return ""
    if not math.isfinite(value):
        return f"is {value}, not finite"
    if "exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"]:
        return f"is {value}, not above {schema['exclusiveMinimum']}"
    if "minimum" in schema and value < schema["minimum"]:
        return f"is {value}, less than {schema['minimum']}"
    if "maximum" in schema and value > schema["maximum"]:
        return f"is {value}, more than {schema['maximum']}"
    return ""


def _of_object(value: dict[str, Any], schema: Schema, root: Schema, path: Place) -> Iterator[tuple[Place, str]]:
    if len(value) < schema.get("minProperties", 0):
        yield path, "is empty"
    for name in schema.get("required", ()):
        if name not in value:
            yield path, f"lacks {name!r}"
    known, others = schema.get("properties", {}), schema.get("additionalProperties", {})
    for name, item in value.items():
        inner = known.get(name, others)
        if inner is False:
            yield path, f"has the unknown field {name!r}"
        else:
            yield from _violations(item, inner, root, (*path, name))


def _place(path: Place) -> str:
    """A path as people write it; part keys have spaces and dots of their own and are quoted."""
    text = ""
    for step in path:
        plain = isinstance(step, str) and (step.isidentifier() or not text)
        text += f"{'.' if text else ''}{step}" if plain else f"[{step!r}]"
    return text or "the table"


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
