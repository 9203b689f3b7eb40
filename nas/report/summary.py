"""Reads ``summary.json``: strict about its skeleton, forgiving about every value that may be unknown."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nas.errors import StudentError

SCHEMA_VERSION = 1
_LISTS = ("rows", "trials", "finalists", "limits")

Record = Mapping[str, Any]


def read_summary(run: Path) -> dict[str, Any]:
    """The summary of a run folder. Raises StudentError if it is missing or is not one."""
    path = run / "summary.json"
    remedy = "run `nas search` first; the report is drawn from what it leaves in the run folder"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError covers broken JSON and broken UTF-8
        raise StudentError(
            f"No readable summary at {path}: {error}.", expected="the summary.json of a finished search", remedy=remedy
        ) from error
    fault = _fault(summary)
    if fault:
        raise StudentError(f"{path}: {fault}.", expected=f"a summary of schema version {SCHEMA_VERSION}", remedy=remedy)
    return dict(summary)


def _fault(summary: object) -> str:
    """What keeps this from being a summary, or an empty string."""
    if not isinstance(summary, dict):
        return f"holds a {type(summary).__name__}, not an object"
    if summary.get("schema_version") != SCHEMA_VERSION:
        return f"schema_version is {summary.get('schema_version')!r}"
    for key in _LISTS:
        value = summary.get(key)
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            return f"{key!r} is not a list of objects"
    if not all(isinstance(row.get("name"), str) for row in summary["rows"]):
        return "a row has no name"
    return ""


def number(record: Record, key: str) -> float | None:
    """A finite number, or None where it is absent, null, not finite or not a number."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def part(summary: Record, key: str) -> dict[str, Any]:
    """An object inside the summary; empty where it is absent or null."""
    value = summary.get(key)
    return value if isinstance(value, dict) else {}


def records(summary: Record, key: str) -> list[dict[str, Any]]:
    """A list of objects inside the summary; empty where it is absent or null."""
    value = summary.get(key)
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def row(summary: Record, name: str) -> dict[str, Any]:
    """The row of that name (teacher, random, uniform, student); empty where there is none."""
    return next((item for item in records(summary, "rows") if item.get("name") == name), {})


def rows_in_order(summary: Record) -> list[dict[str, Any]]:
    """Rows as they are read: teacher, then baselines, then the student."""
    place = {"teacher": 0, "student": 2}
    return sorted(records(summary, "rows"), key=lambda item: place.get(str(item.get("name")), 1))


def winner(summary: Record) -> dict[str, Any]:
    """The finalist that became the student; empty where no finalist was marked."""
    return next((item for item in records(summary, "finalists") if item.get("winner")), {})


def meets(record: Record) -> bool:
    """Whether a trial or finalist is known to break no budget."""
    return number(record, "violation") == 0.0


def whole(record: Record) -> bool:
    """Whether a trial had the full training; nothing else is comparable with it."""
    fidelity = number(record, "fidelity")
    return fidelity is None or fidelity >= 1


def ranked(finalists: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Finalists by falling measured reward; those never measured come last."""

    def place(item: Record) -> float:
        reward = number(item, "reward")
        return math.inf if reward is None else -reward

    return sorted(finalists, key=place)


def ratio(of: Record, to: Record, key: str) -> float | None:
    """How many times smaller ``to`` is than ``of`` on a cost; None where either is unknown or 0."""
    top, bottom = number(of, key), number(to, key)
    return top / bottom if top and bottom else None
