"""``ablation.json``: the points of every arm, and the differences between the joint search and the others."""

from __future__ import annotations

import datetime
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nas.ablation.spec import CONTEST, TEST, Ablation, contest_folder, label, seed_folder
from nas.ablation.stats import paired
from nas.files import write_json
from nas.versioned import read_versioned

SCHEMA_VERSION = 1
RESULT = "ablation.json"
Record = dict[str, Any]


def write_result(
    ablation: Ablation, folder: Path, seeds: Sequence[int], metric: str, equal: Record
) -> Record:
    """Write ``ablation.json`` from what the seeds' folders hold; returns its content.

    Args:
        seeds: those that are finished.
        equal: what all arms had in common, for the page.
    """
    teachers, arms = list[Record](), {arm: list[Record]() for arm in ablation.arms}
    warnings = list[str]()
    for seed in seeds:
        place = seed_folder(folder, seed)
        latency = _read(place / "teacher_latency.json")
        teachers.append(
            {
                "seed": seed, "latency_ms": latency["p50"], "latency_p95_ms": latency["p95"],
                "quality": _read(place / TEST)["teacher"],
                "quality_valid": _read(place / "teacher.json")["quality_valid"],
                "size_bytes": (place / "teacher.onnx").stat().st_size,
            }
        )  # fmt: skip
        rows: dict[str, Record] = {
            arm: {"seed": seed, "evaluations": 0, "train_seconds": 0.0, "points": []} for arm in ablation.arms
        }
        for target in ablation.targets:
            run = contest_folder(folder, seed, target)
            contest, test = _read(run / CONTEST), _read(run / TEST)
            warnings += contest["warnings"]
            for arm, row in rows.items():
                known = contest["arms"][arm]
                row["evaluations"] += known["evaluations"]
                row["train_seconds"] += known["train_seconds"]
                if known["finalists"]:
                    row["points"].append(_point(contest, known, test[arm]))
        for arm, row in rows.items():
            arms[arm].append(row)
    found: Record = {
        "schema_version": SCHEMA_VERSION, "name": ablation.experiment.name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "metric": metric,
        "targets": [label(target) for target in ablation.targets], "seeds": list(seeds),
        "seeds_asked": list(ablation.seeds), "seconds": ablation.seconds, "equal": equal, "warnings": warnings,
        "teacher": {**_mean(teachers), "seeds": len(teachers)}, "teachers": teachers, "arms": arms,
    }  # fmt: skip
    plain: Record = json.loads(json.dumps({**found, "comparison": compare(found)}))
    write_json(folder / RESULT, plain)
    return plain


def read_result(folder: Path) -> Record:
    """The content of ``ablation.json``. Raises StudyError where it is none."""
    return read_versioned(folder / RESULT, SCHEMA_VERSION, "ablation", "nas ablate")


def _read(path: Path) -> Record:
    found: Record = json.loads(path.read_text())
    return found


def _mean(rows: Sequence[Record]) -> Record:
    keys = ("latency_ms", "latency_p95_ms", "quality", "quality_valid", "size_bytes")
    return {key: statistics.fmean(row[key] for row in rows) for key in keys}


def _point(contest: Record, known: Record, quality: float) -> Record:
    """An arm's best measured finalist at one target; the split that its quality is of was read last."""
    best = known["finalists"][0]
    return {
        "target": contest["target"], "target_ms": contest["target_ms"], "latency_ms": best["latency_ms"],
        "quality": quality, "size_bytes": best["size_bytes"], "feasible": best["feasible"],
        "violation": best["violation"], "teacher_ms": contest["teacher_ms"], "evaluations": known["evaluations"],
        "train_seconds": known["train_seconds"], "phases": known["phases"],
        **{key: best[key] for key in ("name", "p95_ms", "noise", "predicted_ms", "quality_search", "quality_valid",
                                      "macs", "params", "reward", "candidate")},
    }  # fmt: skip


def compare(result: Record) -> list[Record]:
    """One row a target and arm: means over the seeds, and joint − arm in points, paired by seed.

    A pair counts where both arms have a point; ``pairs`` says how many.
    """
    rows = []
    for target in result["targets"]:
        of = {arm: _points(result, arm, target) for arm in result["arms"]}
        for arm, points in of.items():
            both = [seed for seed in points if seed in of.get("joint", {})]
            pair = None
            if arm != "joint":
                mine, other = ([of[a][seed]["quality"] for seed in both] for a in ("joint", arm)) if both else ([], [])
                pair = paired(mine, other)
            rows.append(
                {
                    "target": target, "arm": arm, "seeds": len(points),
                    "feasible": sum(point["feasible"] for point in points.values()),
                    **{key: _average(points, key) for key in ("quality", "latency_ms", "target_ms", "size_bytes",
                                                              "train_seconds", "evaluations")},
                    "difference": None if pair is None else 100 * pair.mean,
                    "half": None if pair is None or pair.half is None else 100 * pair.half,
                    "pairs": 0 if pair is None else pair.n, "clear": pair is not None and pair.clear,
                }
            )  # fmt: skip
    return rows


def _points(result: Record, arm: str, target: str) -> dict[int, Record]:
    """Seed → the arm's point at a target."""
    return {row["seed"]: point for row in result["arms"][arm] for point in row["points"] if point["target"] == target}


def _average(points: dict[int, Record], key: str) -> float | None:
    return statistics.fmean(point[key] for point in points.values()) if points else None
