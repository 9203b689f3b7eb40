"""Whole searches over several seeds: students and baselines re-measured on test data, fronts and hypervolumes.

    python benchmarks/students.py --experiment digits --seeds 0,1,2
    python benchmarks/students.py --experiment mnist --seeds 0,1,2 --set task.data=PATH/mnist.npz

Runs ``nas search`` once per seed (into --out; finished runs are not repeated), then reads each run folder:
every finalist's ``model.onnx`` is judged on ``test.npz``. Prints one JSON line per seed and one summary line.

Hypervolume: the area between a front and the reference point (--floor × teacher's test quality, latency budget),
in units of (1 − floor) × teacher quality × budget, so 1 is a perfect model of no latency.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from nas.reward import hypervolume
from nas.student.teacher import onnx_logits

ARMS = ("search", "random", "uniform")


def run(experiment: str, seed: int, folder: Path, overrides: list[str]) -> float | None:
    """Search; returns wall seconds, or nothing where the run was there already."""
    if (folder / "summary.json").exists():
        return None
    start = time.perf_counter()
    sets = [item for override in [f"seed={seed}", *overrides] for item in ("--set", override)]
    command = [sys.executable, "-m", "nas", "search", experiment, "--out", str(folder), "--resume", *sets]
    subprocess.run(command, check=True, env=os.environ, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def judge(folder: Path, floor: float) -> dict[str, Any]:
    """Figures of one run folder, from its files."""
    import torch

    summary = json.loads((folder / "summary.json").read_text())
    manifest = json.loads((folder / "student" / "manifest.json").read_text())
    with np.load(folder / "test.npz", allow_pickle=False) as data:
        x, y = torch.from_numpy(data["x"]), data["y"]

    def accuracy(path: Path) -> float:
        return float((onnx_logits(path, x).argmax(1) == y).mean())

    teacher = accuracy(folder / "teacher.onnx")
    budget = next(limit["limit"] for limit in summary["limits"] if limit["cost"].startswith("latency"))
    points: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
    for finalist in summary["finalists"]:
        name = f"{finalist['arm']}-{finalist['index']}"
        points[finalist["arm"]].append((accuracy(folder / "finalists" / name / "model.onnx"), finalist["p50_ms"]))
    unit = (1 - floor) * teacher * budget
    latency, size = manifest["latency"][0], manifest["size_bytes"]
    rows = {row["name"]: row for row in summary["rows"]}
    return {
        "seed": manifest["seed"],
        "teacher": teacher,
        "student": accuracy(folder / "student" / "model.onnx"),
        "points_lost": 100 * (teacher - accuracy(folder / "student" / "model.onnx")),
        "speedup": latency["teacher_p50_ms"] / latency["p50_ms"],
        "smaller": size["teacher_onnx"] / size["onnx"],
        "predicted_over_measured": latency["predicted_ms"] / latency["p50_ms"],
        "baseline_quality": {arm: rows[arm]["quality"] for arm in ("random", "uniform") if arm in rows},
        "best_validation_reward": {
            "search": max(t["reward"] or 0 for t in summary["trials"]),
            **{arm: max(t["reward"] or 0 for t in ts) for arm, ts in summary["baseline_trials"].items()},
        },
        "hypervolume": {
            arm: hypervolume([q for q, _ in p], [c for _, c in p], (floor * teacher, budget)) / unit
            for arm, p in points.items()
            if p
        },
        "points": points,
        "rank_correlation": manifest["search"]["rank_correlation"],
        "table_mape": manifest["table"]["error"]["mape"],
        "noise": manifest["table"]["noise"],
        "search_seconds": manifest["search"]["seconds"],
    }


def interval(values: list[float]) -> list[float]:
    """Mean and half-width of the 95 % confidence interval (Student's t)."""
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return [float(np.mean(values)), float(half)]


def main() -> None:
    """Run, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="digits")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    parser.add_argument(
        "--floor", type=float, default=0.9, help="lowest quality that counts, as a share of the teacher's"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    results = []
    for seed in map(int, options.seeds.split(",")):
        folder = options.out / f"{Path(options.experiment).stem}-{seed}"
        wall = run(options.experiment, seed, folder, options.set)
        result = {**judge(folder, options.floor), "wall_seconds": wall}
        results.append(result)
        print(json.dumps(result), flush=True)
    differences = {
        arm: interval([r["hypervolume"]["search"] - r["hypervolume"].get(arm, 0.0) for r in results])
        for arm in ("random", "uniform")
    }
    summary = {
        "seeds": len(results),
        "points_lost": interval([r["points_lost"] for r in results]),
        "speedup": interval([r["speedup"] for r in results]),
        "smaller": interval([r["smaller"] for r in results]),
        "hypervolume": {arm: interval([r["hypervolume"].get(arm, 0.0) for r in results]) for arm in ARMS},
        "hypervolume_gain_over": differences,
        "validation_reward_gain_over_random": interval(
            [r["best_validation_reward"]["search"] - r["best_validation_reward"].get("random", np.nan) for r in results]
        ),
        "peak_worker_or_parent_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
