"""The record: what each step did to quality, file, multiplications, parameters and measured latency."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nas.errors import StudyError
from nas.files import write_json
from nas.student.finalists import Session

SCHEMA_VERSION = 1


def write_record(
    path: Path, manifest: Mapping[str, Any], stages: Sequence[Mapping[str, Any]], session: Session
) -> None:
    """Write ``record.json``.

    Args:
        manifest: the student's.
        stages: facts of every stage, the original first.
        session: of the measurement of all of them.
    """
    rows = []
    for facts in stages:
        timing = session.timings[facts["name"]]
        rows.append({**facts, "p50_ms": timing.p50, "p95_ms": timing.p95, "noise": timing.noise})
    record = {
        "schema_version": SCHEMA_VERSION, "model": manifest["name"], "seed": manifest["seed"],
        "task": manifest["task"], "device": {k: manifest["latency"][0][k] for k in ("device", "runtime", "threads")},
        "rows": rows, "test": manifest["quality"], "versions": manifest["versions"],
    }  # fmt: skip
    write_json(path, record)


def read_record(folder: Path) -> dict[str, Any]:
    """The record in the folder of a pipeline.

    Raises:
        StudyError: there is none.
    """
    try:
        record: dict[str, Any] = json.loads((folder / "record.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise StudyError(
            f"{folder} has no record of a compression: {error}.", expected="a folder that `nas compress` finished",
            remedy="nas compress … --resume",
        ) from error  # fmt: skip
    return record


HEAD = ("stage", "after pass", "quality", "ONNX", "bytes", "MACs", "params", "p50 ms", "p95 ms", "speed", "seconds")


def table(record: Mapping[str, Any]) -> list[list[str]]:
    """The record as a table for people, header first; qualities are of the validation split."""
    first = record["rows"][0]
    return [
        list(HEAD),
        *(
            [
                row["name"], f"{row['quality_applied']:.4f}" if "quality_applied" in row else "–",
                f"{row['quality']:.4f}", f"{row['quality_onnx']:.4f}", f"{row['size_bytes']:,}", f"{row['macs']:,}",
                f"{row['params']:,}", f"{row['p50_ms']:.4f}", f"{row['p95_ms']:.4f}",
                f"{first['p50_ms'] / row['p50_ms']:.2f} ×", f"{row['seconds']:.1f}",
            ]
            for row in record["rows"]
        ),
    ]  # fmt: skip


def sentences(record: Mapping[str, Any]) -> list[str]:
    """What else there is to say about it."""
    first, last, test = record["rows"][0], record["rows"][-1], record["test"]
    speed, size = first["p50_ms"] / last["p50_ms"], first["size_bytes"] / last["size_bytes"]
    return [
        f"test {test['metric']} (n = {test['n']}): original {test['teacher']:.4f}, student {test['student_onnx']:.4f} "
        f"in onnxruntime, {test['student_torch']:.4f} in torch",
        f"{speed:.2f} × the original's speed and 1/{size:.2f} of its bytes, on {record['device']['device']}",
        f"torch and onnxruntime agree on {100 * last['agreement']:.1f} % of the validation data, their logits within "
        f"{last['max_abs_diff']:.2g}",
    ]
