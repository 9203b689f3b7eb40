"""Writing the result down: manifest, student folder, test data, summary and report. The only reader of test data."""

from __future__ import annotations

import datetime
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch

from nas.controller import comparable
from nas.evaluators import Distil
from nas.evaluators.train import predict
from nas.files import write_json
from nas.latency import LatencyTable, elsewhere, on_device
from nas.latency.energy import source
from nas.latency.fit import spearman
from nas.parts import Part
from nas.reward import Limit, Reward, hypervolume, reference_point
from nas.space import SearchSpace
from nas.student.export import onnx_macs_params
from nas.student.finalists import Finalist, Session
from nas.student.package import load_model, model_facts, pack_finalist, write_samples
from nas.student.teacher import Teacher, onnx_logits
from nas.study import Trial, trainings

if TYPE_CHECKING:
    from nas.job import Job, Outcome

SCHEMA_VERSION = 1


def deliver(
    job: Job,
    student: Distil,
    teacher: Teacher,
    table: LatencyTable,
    limits: tuple[Limit, ...],
    reward: Reward,
    outcome: Outcome,
) -> Path:
    """Read the test split, once, and write everything a user gets; returns the student folder."""
    from nas.report import write_report

    job.progress.stage("student")
    x, y = job.task.split("test")
    write_samples(job.run / "test.npz", x, y)
    quality = _test_qualities(job, outcome, x, y.numpy())
    model = load_model(student, outcome.winner)
    quality["student_torch"] = job.task.quality(predict(model, x), y.numpy())
    rows = _rows(job, teacher, outcome, quality)
    manifest = _manifest(job, teacher, table, outcome, quality, rows, len(y))
    folder = job.run / "student"
    pack_finalist(folder, student, outcome.winner, manifest)
    write_json(job.run / "summary.json", _summary(job, table, limits, reward, outcome, rows))
    write_report(job.run)
    return folder


def _champions(outcome: Outcome) -> dict[str, Finalist]:
    """The best measured finalist of every arm; the search's is the student."""
    champions: dict[str, Finalist] = {}
    for finalist in outcome.finalists:
        champions.setdefault(finalist.entrant.arm, finalist)
    champions["search"] = outcome.winner
    return champions


def _test_qualities(job: Job, outcome: Outcome, x: torch.Tensor, y: Any) -> dict[str, float]:
    found = {"teacher": job.task.quality(onnx_logits(job.run / "teacher.onnx", x), y)}
    for arm, finalist in _champions(outcome).items():
        found[arm] = job.task.quality(onnx_logits(finalist.folder / "model.onnx", x), y)
    return found


LABELS = {
    "random": "random search, equal budget",
    "uniform": "teacher uniformly compressed",
    "search": "student",
}


def _rows(job: Job, teacher: Teacher, outcome: Outcome, quality: dict[str, float]) -> list[dict[str, Any]]:
    exported = onnx.load(job.run / "teacher.onnx")
    macs, params = onnx_macs_params(exported)
    timing = outcome.session.timings["teacher"]
    rows = [
        {
            "name": "teacher", "label": "teacher (fp32)", "quality": quality["teacher"],
            "quality_valid": teacher.quality, "predicted_ms": None, "p50_ms": timing.p50, "p95_ms": timing.p95,
            "size_bytes": (job.run / "teacher.onnx").stat().st_size, "macs": macs, "params": params,
        }
    ]  # fmt: skip
    champions = _champions(outcome)
    for arm in ("random", "uniform", "search"):
        if arm not in champions:
            continue
        f = champions[arm]
        rows.append(
            {
                "name": "student" if arm == "search" else arm, "label": LABELS[arm], "quality": quality[arm],
                "quality_valid": f.quality_onnx, "predicted_ms": f.entrant.costs["latency_ms"],
                "predicted_elsewhere": elsewhere(f.entrant.costs), "p50_ms": f.timing.p50, "p95_ms": f.timing.p95,
                "size_bytes": f.size_bytes, "macs": f.macs, "params": f.params, "reward": f.reward,
                "violation": f.violation,
            }
        )  # fmt: skip
    return rows


def rank_correlation(outcome: Outcome) -> float | None:
    """Spearman of the quality that the search saw with the finalists' ONNX quality; unknown below three."""
    pairs = [
        (f.entrant.quality_search, f.quality_onnx) for f in outcome.finalists if f.entrant.quality_search is not None
    ]
    if len(pairs) < 3:
        return None
    return spearman([a for a, _ in pairs if a is not None], [b for _, b in pairs])


def _manifest(
    job: Job,
    teacher: Teacher,
    table: LatencyTable,
    outcome: Outcome,
    quality: dict[str, float],
    rows: list[dict[str, Any]],
    n: int,
) -> dict[str, Any]:
    by_name = {row["name"]: row for row in rows}
    return {
        "schema_version": SCHEMA_VERSION,
        "name": job.experiment.name,
        "task": {
            "kind": job.experiment.task.kind, "data": job.experiment.task.data, "fingerprint": job.task.fingerprint,
            "classes": list(job.task.classes),
        },
        "seed": job.experiment.seed,
        "quality": {
            "metric": job.task.metric, "teacher": quality["teacher"], "student_torch": quality["student_torch"],
            "student_onnx": quality["search"], "split": "test", "n": n,
        },
        **candidate_facts(job, outcome.winner, outcome.session),
        "search": {
            "strategy": job.experiment.strategy.kind, "evaluated": len(outcome.trials["search"]),
            "trainings": trainings(outcome.trials["search"]),
            "failed": sum(t.status != "complete" for t in outcome.trials["search"]), "seconds": outcome.seconds,
            "rank_correlation": rank_correlation(outcome),
        },
        "table": {
            "name": table.name, "sha256": table.sha256, "error": asdict(table.errors["latency_ms"]),
            "noise": table.noise,
        },
        "baselines": {
            name: {key: by_name[name][key] for key in ("quality", "p50_ms", "size_bytes", "reward")}
            for name in ("random", "uniform") if name in by_name
        },
    }  # fmt: skip


def candidate_facts(job: Job, finalist: Finalist, session: Session) -> dict[str, Any]:
    """What a manifest says of one measured candidate, whichever it is: all but its quality on test data."""
    ran_on = job.alternatives.get(finalist.runtime, job.device)
    return {
        "candidate": job.space.decode(finalist.entrant.genome).as_dict(),
        "latency": [
            {
                "device": ran_on.name, "fingerprint": ran_on.fingerprint, "runtime": ran_on.runtime,
                "predicted_ms": finalist.entrant.costs["latency_ms"], "p50_ms": finalist.timing.p50,
                "p95_ms": finalist.timing.p95, "noise": finalist.timing.noise,
                "teacher_p50_ms": session.timings["teacher"].p50, "threads": job.device.threads,
                "batch": job.device.batch, "measured": True,
            },
            *_other_runtimes(job, finalist, session),
            *_elsewhere(job, finalist),
        ],
        "size_bytes": {"onnx": finalist.size_bytes, "teacher_onnx": (job.run / "teacher.onnx").stat().st_size},
        "macs": finalist.macs,
        "params": finalist.params,
        "peak_activation_bytes": max(p.peak_bytes(job.device.batch) for p in _parts(job, finalist)),
        "energy": _energy(finalist, session),
        "parity": {"max_abs_diff": finalist.max_abs_diff, "agreement": finalist.agreement},
        **model_facts(finalist.folder / "model.onnx", job.task.info),
    }  # fmt: skip


def _parts(job: Job, winner: Finalist) -> list[Part]:
    return job.space.parts(job.space.decode(winner.entrant.genome))


def _energy(finalist: Finalist, session: Session) -> dict[str, Any]:
    """Millijoules of a call of student and teacher, and what counted them; None, and why, where nothing can."""
    energy = session.energy
    used = energy.get("millijoules", {})
    return {
        "student_mj": used.get(finalist.entrant.name), "teacher_mj": used.get("teacher"),
        "source": source(energy),
    }  # fmt: skip


def _other_runtimes(job: Job, winner: Finalist, session: Session) -> list[dict[str, Any]]:
    """The student in the runtimes that it is not fastest in, measured in the same session."""
    timings = {"": session.timings, **session.alternatives}
    return [
        {
            "device": device.name, "fingerprint": device.fingerprint, "runtime": device.runtime,
            "p50_ms": timings[name][winner.entrant.name].p50, "p95_ms": timings[name][winner.entrant.name].p95,
            "noise": timings[name][winner.entrant.name].noise, "teacher_p50_ms": timings[name]["teacher"].p50,
            "threads": device.threads, "batch": device.batch, "measured": True,
        }
        for name, device in {"": job.device, **job.alternatives}.items() if name != winner.runtime
    ]  # fmt: skip


def _elsewhere(job: Job, winner: Finalist) -> list[dict[str, Any]]:
    """The student on the other devices, where nothing is measured: what their tables predict."""
    return [
        {
            "name": name, "device": table.device["name"], "fingerprint": table.device.get("fingerprint"),
            "predicted_ms": winner.entrant.costs[on_device("latency_ms", name)],
            "predicted_p95_ms": winner.entrant.costs[on_device("latency_p95_ms", name)],
            "threads": table.device.get("threads"), "batch": table.device.get("batch"), "measured": False,
            "table_sha256": table.sha256, "error": asdict(table.errors["latency_ms"]),
        }
        for name, table in job.others.items()
    ]  # fmt: skip


def _summary(
    job: Job,
    table: LatencyTable,
    limits: tuple[Limit, ...],
    reward: Reward,
    outcome: Outcome,
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "name": job.experiment.name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": job.experiment.seed,
        "seconds": outcome.seconds,
        "warnings": outcome.warnings,
        "quality_metric": job.task.metric,
        "rows": rows,
        "trials": [_trial(job.space, t) for t in outcome.trials["search"]],
        "baseline_trials": {
            arm: [_trial(job.space, t) for t in trials] for arm, trials in outcome.trials.items() if arm != "search"
        },
        "finalists": [_finalist(job.space, f, outcome) for f in outcome.finalists],
        "limits": [{"cost": limit.cost, "limit": limit.limit} for limit in limits],
        "reward": {
            "kind": job.experiment.reward.kind, "target": reward.targets.get(job.latency), "targets": reward.targets,
        },
        "hypervolume": _hypervolume(outcome, job.latency, limits),
        "elsewhere": _elsewhere(job, outcome.winner),
        "table": {
            "name": table.name, "device": table.device["name"], "entries": len(table.entries), "sha256": table.sha256,
            "noise": table.noise, "error": asdict(table.errors["latency_ms"]),
            "nets": [
                {key: getattr(n, key) for key in ("predicted_ms", "measured_ms", "plain_sum_ms")} for n in table.nets
            ],
            "finalists": outcome.refinement.as_dict(),
        },
        "rank_correlation": rank_correlation(outcome),
        "screened": {
            "asked": outcome.counts.asked, "infeasible": outcome.counts.infeasible,
            "duplicates": outcome.counts.duplicates,
        },
        "masks": {
            "on": job.experiment.search.mask, "costs": list(outcome.masks.costs),
            "forms": [form.plain_form() for form in outcome.masks.forms],
        },
        "student_dir": str(job.run / "student"),
    }  # fmt: skip


def _hypervolume(outcome: Outcome, cost: str, limits: tuple[Limit, ...]) -> dict[str, Any]:
    """What each arm's trials dominate of quality and predicted latency, within one reference point for all of them."""
    points = {
        arm: np.array([(t.quality, t.costs[cost]) for t in comparable(trials)]).reshape(-1, 2)
        for arm, trials in outcome.trials.items()
    }
    everything = np.concatenate(list(points.values()))
    low, high = reference_point(everything[:, 0], everything[:, 1:], (cost,), limits)
    return {
        "cost": cost, "reference": {"quality": low, "cost": high},
        "arms": {arm: hypervolume(found[:, 0], found[:, 1], (low, high)) for arm, found in points.items()},
    }  # fmt: skip


def _trial(space: SearchSpace, trial: Trial) -> dict[str, Any]:
    return {
        "index": trial.index, "source": trial.source, "status": trial.status, "fidelity": trial.fidelity,
        "candidate": space.decode(trial.genome).as_dict(),
        "quality": _known(trial.quality), "reward": _known(trial.reward), "latency_ms": trial.costs["latency_ms"],
        "size_bytes": trial.costs["size_bytes"], "predicted_elsewhere": elsewhere(trial.costs),
        "violation": trial.violation, "reason": trial.reason, "seconds": trial.seconds,
    }  # fmt: skip


def _finalist(space: SearchSpace, f: Finalist, outcome: Outcome) -> dict[str, Any]:
    return {
        "index": f.entrant.index, "arm": f.entrant.arm, "candidate": space.decode(f.entrant.genome).as_dict(),
        "quality_search": f.entrant.quality_search, "quality_valid": f.quality_onnx,
        "predicted_ms": f.entrant.costs["latency_ms"], "predicted_elsewhere": elsewhere(f.entrant.costs),
        "p50_ms": f.timing.p50, "p95_ms": f.timing.p95, "noise": f.timing.noise, "size_bytes": f.size_bytes,
        "reward": f.reward, "violation": f.violation,
        "winner": f is outcome.winner,
    }  # fmt: skip


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
