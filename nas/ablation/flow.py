"""The ablation from experiment to ``ablation.json``: reads as the flow below. What is finished is never done again.

table, once ─► per seed: teacher ─► its p50 fixes the targets
                  per target: joint ─► sequential, uniform, random, until each has trained as long
                              best of all arms ─► trained long ─► measured in one session, with the teacher
                  test data, once, for the points
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from nas.ablation.phases import phases_of
from nas.ablation.result import write_result
from nas.ablation.search import Contest, Found
from nas.ablation.spec import CONTEST, TEST, Ablation, contest_folder, label, seed_folder
from nas.controller import best
from nas.errors import BudgetError, StudyError
from nas.executors import Executor
from nas.files import write_atomic, write_json
from nas.forecast import forecast
from nas.job import Job, open_run, teacher_costs
from nas.latency import LatencyTable
from nas.locks import run_lock
from nas.progress import Progress, Silent
from nas.student.finalists import Entrant, Finalist, Session, judge, measure_models, train_finalists
from nas.student.teacher import onnx_logits

KEPT = "ablation.yaml"


def run_ablation(
    ablation: Ablation, folder: Path, *, resume: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Do all of it in a folder; returns what ``ablation.json`` says, which is written anew after every seed.

    Raises:
        NasError: something is wrong with the experiment, the folder or the targets.
    """
    from nas.ablation.page import write_page

    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    with run_lock(folder):
        _open(ablation, folder, resume)
        run = _Run(ablation, folder, progress or Silent())
        run.check()
        run.measure_table()
        result: dict[str, Any] = {}
        for number, seed in enumerate(ablation.seeds):
            run.seed(seed, strict=number == 0)
            result = write_result(ablation, folder, ablation.seeds[: number + 1], run.root.task.metric, run.facts())
            write_page(folder)
        return result


def forecast_ablation(ablation: Ablation) -> list[str]:
    """Lines for people about what an ablation would do. Writes nothing; raises what it would refuse at once."""
    first = ablation.at(ablation.seeds[0], ablation.targets[0])
    job = Job(first, Path())
    arms, searches = len(ablation.arms), len(ablation.seeds) * len(ablation.targets)
    lines = [
        f"{arms} arms ({', '.join(ablation.arms)}) × {len(ablation.seeds)} seeds × {len(ablation.targets)} latencies "
        f"({', '.join(label(t) for t in ablation.targets)}): {arms * searches} searches"
    ]
    if "sequential" in ablation.arms:
        found = phases_of(job.space)
        lines.append("sequential: " + ", then ".join(f"{p.name} ({len(p.columns)} choices)" for p in found))
    spent = f"{ablation.seconds:g} s" if ablation.seconds else f"the seconds of {first.search.trials} trainings"
    lines.append(f"every search gets {spent}, and sends {first.finalists.count} to the long training; a joint one is:")
    return [*lines, *(f"  {line}" for line in forecast(first))]


def _open(ablation: Ablation, folder: Path, resume: bool) -> None:
    """Make the folder, or check that what is there may be gone on with: seeds and targets may be added or left out.

    Raises:
        StudyError: it holds something and ``resume`` was not asked for, or something else.
    """
    kept = folder / KEPT
    for other, what in (("experiment.yaml", "the run of a search"), ("sweep.yaml", "a sweep")):
        if (folder / other).exists():
            raise StudyError(f"{folder} holds {what}.", remedy="another folder with --out")
    if kept.exists():
        if not resume:
            raise StudyError(
                f"{folder} holds an ablation already.", remedy="--resume to go on with it, or another --out"
            )
        before, now = _comparable(yaml.safe_load(kept.read_text())), _comparable(ablation.plain())
        changed = [key for key in ("experiment", "arms", "seconds") if before.get(key) != now.get(key)]
        if changed:
            raise StudyError(
                f"The ablation in {folder} is another one: {', '.join(changed)} changed.",
                remedy="undo the change, or start afresh with another --out",
            )
    write_atomic(kept, yaml.safe_dump(ablation.plain(), sort_keys=False))


def _comparable(plain: dict[str, Any]) -> dict[str, Any]:
    """As JSON has it, without the number of workers, which belongs to the machine."""
    known: dict[str, Any] = json.loads(json.dumps(plain))
    known["experiment"].get("search", {}).pop("workers", None)
    return known


@dataclass
class _Run:
    """What all seeds share."""

    ablation: Ablation
    folder: Path
    progress: Progress
    alternatives: dict[str, LatencyTable] = field(default_factory=dict)

    def __post_init__(self) -> None:
        first = self.ablation.at(self.ablation.seeds[0], self.ablation.targets[0])
        self.root = Job(first, self.folder, self.progress)

    def check(self) -> None:
        """Refuse at once what no seed could do."""
        self.root.check_keys()
        if "sequential" in self.ablation.arms:
            phases_of(self.root.space)
        for name, other in self.root.others.items():
            other.save(self.folder / f"table-{name}.json")

    def measure_table(self) -> None:
        """One latency table for all seeds."""
        with self.root.executor(self.root.untaught) as workers:
            self.table = self.root.table(workers)
            self.alternatives = self.root.alternative_tables(workers)

    def facts(self) -> dict[str, Any]:
        """What was equal for all arms."""
        e, error = self.root.experiment, self.table.errors.get("latency_ms")
        return {
            "device": self.root.device.name, "table": self.table.name,
            "table_error": None if error is None else error.mape, "finalists": e.finalists.count,
            "trials": e.search.trials, "strategy": e.strategy.kind, "reward": e.reward.kind,
            "epochs": e.training.epochs, "final_epochs": e.finalists.epochs, "space": self.root.space.name,
        }  # fmt: skip

    # ---- one seed -----------------------------------------------------------------------------------------

    def seed(self, seed: int, strict: bool) -> None:
        """Teacher, every target, and the test data; ``strict`` refuses targets that nothing meets."""
        folders = {target: contest_folder(self.folder, seed, target) for target in self.ablation.targets}
        todo = [target for target, folder in folders.items() if not (folder / CONTEST).exists()]
        place = seed_folder(self.folder, seed)
        if todo:
            job = self._job(self.ablation.at(seed, todo[0]), place)
            with job.executor(job.untaught) as workers:
                teacher = job.teacher(workers)
            job.time_teacher(teacher)
            write_json(place / "teacher.json", {"quality_valid": teacher.quality})
            with job.executor(job.student(teacher)) as workers:
                contests = {target: self._contest(job, target, folders[target], workers) for target in todo}
                if strict:
                    for target, contest in contests.items():
                        _check_target(target, contest)
                for target, contest in contests.items():
                    write_json(folders[target] / CONTEST, self._held(contest, f"seed {seed}, {label(target)}"))
        self._test(seed, place, folders)

    def _job(self, experiment: Any, place: Path) -> Job:
        place.mkdir(parents=True, exist_ok=True)
        job = Job(experiment, place, self.progress)
        job.others = self.root.others
        return job

    def _contest(self, job: Job, target: float | str, place: Path, workers: Executor) -> Contest:
        """The seed's job with one target, in a run folder of its own."""
        own = copy.copy(job)  # with its data, space and device
        own.experiment, own.run, own.warnings = self.ablation.at(job.experiment.seed, target), place, []
        open_run(own.experiment, place, resume=True)
        for name in ("teacher.onnx", "teacher_latency.json"):
            write_atomic(place / name, (job.run / name).read_bytes())
        return Contest(own, self.table, self.alternatives, workers, teacher_costs(place))

    def _held(self, contest: Contest, where: str) -> dict[str, Any]:
        """Search with every arm, train and measure the finalists of all of them side by side."""
        job, arms = contest.job, self.ablation.arms
        found: dict[str, Found] = {}
        seconds, price = self.ablation.seconds, None
        for arm in sorted(arms, key=lambda arm: arm != "joint"):  # first: it says how long the others may train
            self.progress.stage(f"{where}: {arm}")
            if seconds is None and arm != "joint":
                found[arm] = Found(reason="the joint search trained nothing, so there are no seconds to match")
            else:
                found[arm] = contest.search(arm, seconds, price)
            if arm == "joint" and found[arm].evaluations:
                seconds = found[arm].train_seconds if seconds is None else seconds
                price = found[arm].train_seconds / found[arm].evaluations
            if found[arm].reason:
                job.warn(f"{where}: {arm} has no point: {found[arm].reason}")
        entrants = [
            Entrant(arm, rank, trial.genome, trial.quality, trial.costs)
            for arm in arms
            for rank, trial in enumerate(best(found[arm].trials, job.experiment.finalists.count))
            if not found[arm].reason
        ]
        finalists, session = self._finals(contest, entrants, where)
        return {
            "target": label(job.experiment.budget.latency or ""), "target_ms": contest.limits[0].limit,
            "teacher_ms": session.timings["teacher"].p50, "warnings": job.warnings,
            "arms": {arm: _arm(job, found[arm], [f for f in finalists if f.entrant.arm == arm]) for arm in arms},
        }  # fmt: skip

    def _finals(self, contest: Contest, entrants: list[Entrant], where: str) -> tuple[list[Finalist], Session]:
        """The long training of all arms' best, and one interleaved session with all of them and the teacher."""
        job, done = contest.job, list[str]()
        folder = job.run / "finalists"
        self.progress.stage(f"{where}: finalists")

        def on_done(name: str) -> None:
            done.append(name)
            self.progress.update(len(done) / len(entrants), f"{name} trained")

        facts = train_finalists(entrants, job.long_recipe, folder, contest.workers, on_done)
        for name, known in facts.items():
            if "reason" in known:
                job.warn(f"{where}: finalist {name} failed: {known['reason']}")
        self.progress.stage(f"{where}: measuring")
        models = {name: folder / name / "model.onnx" for name, known in facts.items() if "reason" not in known}
        models["teacher"] = job.run / "teacher.onnx"
        seconds = job.experiment.finalists.seconds
        session = measure_models(models, job.device, seconds, self.progress.update, None, job.alternatives)
        return judge(entrants, facts, session, folder, contest.reward, contest.limits), session

    def _test(self, seed: int, place: Path, folders: Mapping[float | str, Path]) -> None:
        """Read the test split, once all searches of the seed are over, and for the points alone."""
        todo = [folder for folder in folders.values() if not (folder / TEST).exists()]
        if not todo and (place / TEST).exists():
            return
        job = self._job(self.ablation.at(seed, self.ablation.targets[0]), place)
        x, y = job.task.split("test")

        def quality(model: Path) -> float:
            return job.task.quality(onnx_logits(model, x), y.numpy())

        write_json(place / TEST, {"teacher": quality(place / "teacher.onnx"), "n": len(y)})
        for folder in todo:
            arms = json.loads((folder / CONTEST).read_text())["arms"]
            named = {arm: known["finalists"][0]["name"] for arm, known in arms.items() if known["finalists"]}
            write_json(
                folder / TEST,
                {arm: quality(folder / "finalists" / name / "model.onnx") for arm, name in named.items()},
            )


def _check_target(target: float | str, contest: Contest) -> None:
    """Raises BudgetError where nothing in the space meets the target."""
    try:
        contest.job.check_budget(contest.estimator, contest.screen)
    except BudgetError as error:
        raise BudgetError(
            f"Target {label(target)}: {error.found}",
            expected="targets that at least one candidate meets by prediction",
            remedy="larger ones in --targets, or smaller values in the space",
        ) from None


def _arm(job: Job, found: Found, finalists: list[Finalist]) -> dict[str, Any]:
    """An arm at one target: what it spent, and its finalists, the point first."""
    return {
        "evaluations": found.evaluations, "train_seconds": found.train_seconds, "reason": found.reason,
        "phases": found.phases, "finalists": [_finalist(job, f) for f in finalists],
    }  # fmt: skip


def _finalist(job: Job, f: Finalist) -> dict[str, Any]:
    return {
        "name": f.entrant.name, "latency_ms": f.timing.p50, "p95_ms": f.timing.p95, "noise": f.timing.noise,
        "predicted_ms": f.entrant.costs["latency_ms"], "quality_search": f.entrant.quality_search,
        "quality_valid": f.quality_onnx, "size_bytes": f.size_bytes, "macs": f.macs, "params": f.params,
        "reward": f.reward, "violation": f.violation, "feasible": f.feasible,
        "candidate": job.space.decode(f.entrant.genome).as_dict(),
    }  # fmt: skip
