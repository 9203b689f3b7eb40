"""What a sweep found: ``sweep.json``, from which report and terminal are drawn."""

from __future__ import annotations

import datetime
import json
import math
from pathlib import Path
from typing import Any

from nas.files import write_json
from nas.sweep.record import Entry, Ledger, Record
from nas.versioned import read_versioned

SCHEMA_VERSION = 1
RESULT = "sweep.json"


def write_result(record: Record, ledger: Ledger, seconds: float) -> dict[str, Any]:
    """Write ``sweep.json``; returns its content."""
    sweep, entries = record.sweep, ledger.entries()
    importances, why_not = ledger.importances()
    ordered = sorted(entries, key=lambda entry: _rank(entry, sweep.goal))
    found = {
        "schema_version": SCHEMA_VERSION, "name": sweep.name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "seconds": seconds,
        "experiment": sweep.experiment, "function": sweep.function, "command": sweep.command,
        "metric": sweep.metric, "direction": sweep.goal, "sampler": sweep.sampler, "pruner": sweep.pruner,
        "seed": sweep.seed, "parameters": [p.plain() for p in record.parameters],
        "trials": [_trial(entry) for entry in ordered], "best": _best(record, ordered),
        "importances": importances, "importances_note": why_not,
    }  # fmt: skip
    plain: dict[str, Any] = json.loads(json.dumps(found))
    write_json(record.folder / RESULT, plain)
    return plain


def read_result(folder: Path) -> dict[str, Any]:
    """The content of a sweep's ``sweep.json``. Raises StudyError where it is none."""
    return read_versioned(folder / RESULT, SCHEMA_VERSION, "sweep", "nas sweep")


def _rank(entry: Entry, goal: str) -> tuple[int, float, float, int]:
    """Complete ones within budget by value, then those that break it, by how much; then the rest by number."""
    if entry.value is None:
        return (2, 0.0, 0.0, entry.index)
    value = -entry.value if goal == "maximize" else entry.value
    return (int(entry.violation > 0), entry.violation, value, entry.index)


def _trial(entry: Entry) -> dict[str, Any]:
    return {
        "index": entry.index, "status": entry.status, "value": entry.value, "values": entry.values,
        "drawn": entry.drawn, "figures": entry.figures, "intermediate": _intermediate(entry),
        "violation": entry.violation, "reason": entry.reason,
        "deaths": entry.deaths, "seconds": entry.seconds, "elapsed": entry.elapsed,
        "folder": _folder(entry),
    }  # fmt: skip


def _intermediate(entry: Entry) -> list[list[float | None]]:
    """Step and value, which JSON has no NaN for."""
    return [[step, value if math.isfinite(value) else None] for step, value in entry.intermediate.items()]


def _best(record: Record, ordered: list[Entry]) -> dict[str, Any] | None:
    best = next((entry for entry in ordered if entry.value is not None), None)
    if best is None:
        return None
    command = record.runner.command(best.values, record.folder / _folder(best))
    return {"index": best.index, "value": best.value, "values": best.values, "command": command}


def _folder(entry: Entry) -> str:
    return f"trials/{entry.index:04d}"
