"""The whole job: from an experiment to a measured student. Reads as the flow that docs/architecture.md draws.

task, space, device ─► table ─► teacher ─► budget ─► search (and its baselines)
                                                         │
        student ◄─ pack ◄─ test, once ◄─ measure ◄─ finalists: distil long, compress, export
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import yaml

from nas import content
from nas.arms import close_loop, entrants, measure_finalists, search_arm
from nas.controller import Counts
from nas.earlier import earlier_trials
from nas.errors import BudgetError, ExperimentError, StudyError, TableError
from nas.evaluators import Distil
from nas.evaluators.distillation import Guide
from nas.evaluators.train import Lessons, Recipe
from nas.executors import Executor, Processes, Serial, cores
from nas.experiment import Experiment, LookupExperiment, begun
from nas.files import digest, write_atomic, write_json
from nas.latency import (
    AdditiveEstimator,
    CostEstimator,
    Device,
    FastestRuntime,
    LatencyTable,
    SeveralDevices,
    on_device,
)
from nas.latency.estimator import LATENCIES
from nas.latency.fit import FitError
from nas.latency.measure import Timing
from nas.latency.profile import Effort, describe
from nas.latency.refine import Refinement
from nas.locks import cache_dir, cache_lock, run_lock
from nas.masks import Masks, find_masks, note
from nas.progress import Progress, Silent
from nas.reward import Limit, Reward, rewards, violation
from nas.settings import construct
from nas.space import SearchSpace
from nas.strategies import Domain, Objective, Strategy, strategies
from nas.student.finalists import Entrant, Finalist, Session, measure_models
from nas.student.tables import build_table, cached_path, find_table, partial_of
from nas.student.teacher import Teacher, family_teacher, further_teacher, own_teacher
from nas.study import Trial
from nas.tasks import Task, tasks

DISK_NEEDED = 200e6
COSTS = (*LATENCIES, "size_bytes")
TEACHER_SECONDS = 3.0


@dataclass
class Outcome:
    """All that a finished job knows; what manifest, summary and report are written from."""

    trials: dict[str, list[Trial]]
    counts: Counts
    entrants: list[Entrant]
    masks: Masks
    finalists: list[Finalist]
    session: Session
    refinement: Refinement
    winner: Finalist
    seconds: float
    warnings: list[str]


@dataclass
class Job:
    """One experiment in one run folder.

    Args:
        experiment: validated.
        run: folder of this run.
        progress: hears what happens.
    """

    experiment: Experiment
    run: Path
    progress: Progress = field(default_factory=Silent)
    warnings: list[str] = field(default_factory=list)

    # ---- what the experiment names ------------------------------------------------------------

    @cached_property
    def task(self) -> Task:
        """Data and metric."""
        section = self.experiment.task
        settings = {"seed": self.experiment.seed, **section.settings}
        return construct(tasks.get(section.kind), settings, section.data, where="task")

    @cached_property
    def space(self) -> SearchSpace:
        """The search space for that task."""
        section = self.experiment.space
        return content.load_space(section.name, self.task.info, section.settings)

    @cached_property
    def device(self) -> Device:
        """This machine in the experiment's scenario."""
        return Device.local(**self.experiment.device.scenario)

    @cached_property
    def alternatives(self) -> dict[str, Device]:
        """This machine with the other runtimes that a student may run in, by the experiment's names for them.

        Raises:
            ExperimentError: one is the device's own runtime, or there twice.
        """
        section, found = self.experiment.device, {}
        for name in section.alternatives:
            runtime, _, provider = name.partition("/")
            found[name] = Device.local(**{**section.scenario, "name": "", "runtime": runtime, "provider": provider})
        fingerprints = [self.device.fingerprint, *(device.fingerprint for device in found.values())]
        if len(set(fingerprints)) < 1 + len(section.alternatives):
            raise ExperimentError(
                f"device.alternatives {list(section.alternatives)} names a runtime twice, or the device's own.",
                expected=f"runtimes other than {section.runtime!r}, each once",
            )
        return found

    @cached_property
    def recipe(self) -> Recipe:
        """The short training."""
        t = self.experiment.training
        return Recipe(t.epochs, t.compressed_epochs, t.batch_size, t.lr, t.weight_decay, t.seconds)

    @cached_property
    def long_recipe(self) -> Recipe:
        """The finalists' training."""
        t, f = self.experiment.training, self.experiment.finalists
        return Recipe(f.epochs, f.compressed_epochs, t.batch_size, t.lr, t.weight_decay, 20 * t.seconds)

    @cached_property
    def untaught(self) -> Distil:
        """Trains without a teacher: for teachers themselves, and for exports whose weights do not matter."""
        lessons = Lessons.prepare(self.task, None, self.experiment.training.views, self.experiment.seed)
        return Distil(self.space, self.task, lessons, self.recipe, self.experiment.seed)

    def student(self, teacher: Teacher) -> Distil:
        """Trains candidates that learn from the teacher."""
        e = self.experiment
        lessons = Lessons.prepare(self.task, [teacher.guide, *self.further], e.training.views, e.seed)
        return Distil(self.space, self.task, lessons, self.recipe, e.seed)

    @cached_property
    def earlier(self) -> list[Trial]:
        """What the runs in ``search.earlier`` found."""
        return earlier_trials(self.experiment, self.space, self.run, self.warn)

    @property
    def workers(self) -> int:
        """Worker processes on this machine."""
        asked = self.experiment.search.workers
        return min(cores(), self.experiment.search.batch) if asked == "auto" else asked

    @contextmanager
    def executor(self, shared: Any) -> Iterator[Executor]:
        """Workers that share one object; one worker is a process too, so that results do not depend on how many."""
        executor: Executor = Processes(shared, self.workers) if self.workers > 0 else Serial(shared)
        with executor:
            yield executor

    # ---- the flow ----------------------------------------------------------------------------------

    def table(self, executor: Executor) -> LatencyTable:
        """The latency table: the run's own copy on a resume, else found, else built and cached."""
        return self._table(executor, self.device, self.run / "table.json", self.experiment.table.path)

    def alternative_tables(self, executor: Executor) -> dict[str, LatencyTable]:
        """Tables of the other runtimes on this machine, found or built in the same way."""
        return {
            name: self._table(executor, device, self.run / f"table-{device.name}.json", "auto")
            for name, device in self.alternatives.items()
        }

    def _table(self, executor: Executor, device: Device, kept: Path, path: str) -> LatencyTable:
        self.progress.stage("latency table")
        if kept.exists():
            table = LatencyTable.load(kept)
        else:
            found = find_table(path, self.space, device, self.warn)
            table = found if found is not None else self._built_table(executor, device)
            table.save(kept)
        self.progress.note(f"table {describe(table)}")
        return table

    def _built_table(self, executor: Executor, device: Device) -> LatencyTable:
        path, section = cached_path(self.space, device), self.experiment.table
        with cache_lock(path):
            found = find_table("auto", self.space, device, lambda _: None)  # another run's, finished meanwhile
            if found is None:
                self.progress.note(f"no table for {device.name} yet: measuring up to {len(self.space.keys())} parts")
                # What Ctrl-C ends is gone on with by the next run that wants this table.
                found = build_table(
                    self.space, self.task.info, device, executor, Effort(section.seconds, section.noise),
                    nets=section.nets, progress=self.progress.update, note=self.progress.note,
                    partial=partial_of(path), resume=True,
                )  # fmt: skip
                found.save(path)
        return found

    @cached_property
    def others(self) -> dict[str, LatencyTable]:
        """Tables of other devices by the experiment's names for them: the run's own copies on a resume.

        Raises:
            ContentError: there is no such table.
            TableError: one is damaged or does not fit the space.
        """
        found = {}
        for name, path in self.experiment.table.others.items():
            kept = self.run / f"table-{name}.json"
            table = LatencyTable.load(kept if kept.exists() else content.find("latency_tables", path))
            keys = list(self.space.keys())
            if missing := table.missing(keys):
                raise TableError(
                    f"table.others.{name}: {table.lacks(missing, len(keys)).found}",
                    remedy="build it again with `nas profile` for this space, on that device",
                )
            found[name] = table
        return found

    def estimator(
        self, table: LatencyTable, alternatives: Mapping[str, LatencyTable] = MappingProxyType({})
    ) -> CostEstimator:
        """Prices for this device, in whichever runtime is fastest, and behind them the latencies on the others."""
        own: CostEstimator = AdditiveEstimator(self.space, table, COSTS)
        if alternatives:
            runtimes = {name: AdditiveEstimator(self.space, t, LATENCIES) for name, t in alternatives.items()}
            own = FastestRuntime(own, runtimes)
        others = {name: AdditiveEstimator(self.space, other, LATENCIES) for name, other in self.others.items()}
        return SeveralDevices(own, others) if others else own

    def errors(
        self, table: LatencyTable, alternatives: Mapping[str, LatencyTable] = MappingProxyType({})
    ) -> dict[str, FitError]:
        """Errors of the tables by the cost that they price; of several runtimes, the largest."""
        elsewhere = {
            on_device(cost, name): other.error(cost) for name, other in self.others.items() for cost in LATENCIES
        }
        worst = {
            cost: max((t.error(cost) for t in alternatives.values()), key=lambda e: e.mape)
            for cost in LATENCIES if alternatives
        }  # fmt: skip
        own = {cost: max(e, worst.get(cost, e), key=lambda e: e.mape) for cost, e in table.errors.items()}
        return {**own, **elsewhere}

    def trained_teacher(self, executor: Executor, own: Path) -> Teacher:
        """The teacher alone; the run folder stays as it is.

        Args:
            own: folder that the user's own teacher is exported to.
        """
        section = self.experiment.teacher
        if section.model is not None and section.weights is not None:
            return own_teacher(section.model, section.weights, self.task, own)
        recipe = Recipe(section.epochs, 0, self.recipe.batch_size, self.recipe.lr, self.recipe.weight_decay, math.inf)
        folder = self._teacher_cache()
        with cache_lock(folder):
            return family_teacher(self.space, self.task, self.untaught, recipe, section.tolerance, folder, executor)

    def teacher(self, executor: Executor) -> Teacher:
        """The teacher, from the machine's cache where it was trained before."""
        self.progress.stage("teacher")
        teacher = self.trained_teacher(executor, self.run / "teacher")
        write_atomic(self.run / "teacher.onnx", teacher.onnx.read_bytes())
        self.progress.note(
            f"teacher {self.task.metric} {teacher.quality:.4f} (validation), ladder "
            + ", ".join(f"{q:.4f}" for q in teacher.ladder)
        )
        return teacher

    @cached_property
    def further(self) -> list[Guide]:
        """The teachers beside the first, as candidates learn from them."""
        found = []
        for section in self.experiment.teacher.also:
            guide, quality = further_teacher(section.model, section.weights, section.influence, self.task)
            self.progress.note(f"further teacher {section.model}: {self.task.metric} {quality:.4f} (validation)")
            found.append(guide)
        return found

    def _teacher_cache(self) -> Path:
        plain = self.experiment.plain()
        del plain["teacher"]["also"]  # they have no part in the training of the first
        facts = {key: plain[key] for key in ("seed", "task", "space", "teacher")}
        facts["training"] = {key: plain["training"][key] for key in ("batch_size", "lr", "weight_decay", "views")}
        facts["data"] = self.task.fingerprint
        return cache_dir() / "teachers" / digest(facts)[:16]

    def time_teacher(self, teacher: Teacher) -> None:
        """Measure the teacher, unless it was: its latency is kept in the run folder and beside the teacher.

        So a resumed or repeated search has the same budgets.
        """
        kept = self.run / "teacher_latency.json"
        cached = teacher.onnx.with_name(f"latency-{self.device.fingerprint}.json")
        if not kept.exists():
            with cache_lock(cached):
                if not cached.exists():
                    self.progress.stage("timing the teacher")
                    models = {"teacher": teacher.onnx}
                    session = measure_models(models, self.device, TEACHER_SECONDS, self.progress.update)
                    write_json(cached, session.timings["teacher"].__dict__)
            write_atomic(kept, cached.read_bytes())

    @property
    def latency(self) -> str:
        """The latency that budget and reward mean."""
        return "latency_p95_ms" if self.experiment.budget.percentile == "p95" else "latency_ms"

    def limits(self, whole: Mapping[str, float]) -> tuple[Limit, ...]:
        """Budgets in milliseconds and bytes; ``whole`` are the teacher's costs, which shares refer to."""
        budget = self.experiment.budget
        wanted = {
            self.latency: budget.latency,
            "size_bytes": budget.size,
            **{on_device(self.latency, name): ms for name, ms in budget.others.items()},
        }
        return tuple(
            Limit(cost, float(value[:-1]) / 100 * whole[cost] if isinstance(value, str) else value)
            for cost, value in wanted.items() if value is not None
        )  # fmt: skip

    def reward(self, limits: Sequence[Limit], whole: Mapping[str, float]) -> Reward:
        """R(α); it aims at the budgets, or at half of the teacher's costs ``whole`` where there are none.

        Raises:
            RewardError: it reads a cost that this experiment does not price, or has no target for one.
        """
        section = self.experiment.reward
        targets = {cost: value / 2 for cost, value in whole.items()} | {limit.cost: limit.limit for limit in limits}
        if section.target is not None:
            targets[self.latency] = section.target
        first = {self.latency: targets.pop(self.latency)}  # what a reward of one cost reads
        reward = construct(rewards.get(section.kind), section.settings, first | targets, where="reward")
        reward.columns(self.costs)
        return reward

    def check_keys(self) -> None:
        """Construct reward, strategy and further teachers: what is wrong is said before a teacher is trained."""
        whole = dict.fromkeys(COSTS, 1.0)
        self.reward(self.limits(whole), whole)
        _ = self._minimised, self.further

    @property
    def costs(self) -> tuple[str, ...]:
        """Names of all costs: this device's, then the others'."""
        return (*COSTS, *(on_device(cost, name) for name in self.experiment.table.others for cost in LATENCIES))

    @property
    def _minimised(self) -> tuple[str, ...]:
        """Costs that the strategy minimises, whatever the reward reads."""
        section, n = self.experiment.strategy, len(self.costs)
        anything = Objective(
            self.costs, lambda genomes: np.ones((len(genomes), n)), lambda costs: np.zeros(len(costs)), lambda q, _: q
        )
        return self.strategy(section.kind, section.settings, self.experiment.seed, anything).minimises

    def masks(self, estimator: CostEstimator, limits: Sequence[Limit], reward: Reward) -> Masks:
        """What no cost in the objective prefers to its plain form: those with a limit, or that reward or strategy read.

        A function of the table, the space and what the run's identity holds, so that a resume has the same.
        """
        if not self.experiment.search.mask:
            return Masks(self.space)
        read = {*(limit.cost for limit in limits), *reward.costs, *self._minimised}
        return find_masks(self.space, estimator, [cost for cost in estimator.costs if cost in read])

    def check_budget(self, estimator: CostEstimator, limits: tuple[Limit, ...]) -> float:
        """Share of the space that meets the budget by prediction.

        Raises:
            BudgetError: nothing does; says what the lowest costs are.
        """
        genomes = self.space.sample(np.random.default_rng(0), 100_000)
        corners = [self.space.encode(c) for c in (*self.space.uniform(), *self.space.ladder())]
        costs = estimator.price(np.concatenate([genomes, np.array(corners)]))
        share = float((violation(costs, estimator.costs, limits) == 0).mean())
        if share == 0:
            lowest = dict(zip(estimator.costs, costs.min(axis=0), strict=True))
            found = "; ".join(
                f"{limit.cost} ≤ {limit.limit:.4g} asked, the lowest is {lowest[limit.cost]:.4g}" for limit in limits
            )
            raise BudgetError(
                f"Nothing in space {self.space.name!r} meets the budget: {found}.",
                expected="a budget that at least one candidate meets",
                remedy="raise budget.latency or budget.size, or offer smaller values in the space",
            )
        return share

    def check_search(self) -> None:
        """Refuse candidates and earlier runs of another space now, not after the teacher's training.

        Raises:
            SpaceError: an enqueued candidate is not of the space.
            StudyError: an earlier run is not.
        """
        for candidate in self.experiment.search.enqueue:
            self.space.encode_partly(candidate)
        _ = self.earlier

    def strategy(
        self, kind: str, settings: dict[str, Any], seed: int, objective: Objective | None = None,
        masks: Masks | None = None,
    ) -> Strategy:  # fmt: skip
        """A strategy over this space's genes."""
        ordered = np.array([choice.ordered for choice in self.space.choices])
        domain = Domain(self.space.cardinalities, ordered, self.space.active, self.space.kinds, objective)
        if masks is not None and masks.moves:
            domain = replace(domain, repair=masks.repair)
        return construct(strategies.get(kind), settings, domain, seed, where="strategy")

    def warn(self, text: str) -> None:
        """Say it now and at the top of the result."""
        self.warnings.append(text)
        self.progress.note(text)


def open_run(experiment: Experiment | LookupExperiment, run: Path, resume: bool) -> None:
    """Make the run folder, or check that the one there may be gone on with.

    Raises:
        StudyError: it holds a run and ``resume`` was not asked for, or another experiment's run.
        ExperimentError: too little disk.
    """
    run.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(run).free
    if free < DISK_NEEDED:
        raise ExperimentError(
            f"{free / 1e6:.0f} MB are free at {run}.", expected=f"{DISK_NEEDED / 1e6:.0f} MB", remedy="another --out"
        )
    kept = run / "experiment.yaml"
    if kept.exists() and not resume:
        raise StudyError(
            f"{run} holds a run already.", remedy="--resume to go on with it, or another folder with --out"
        )
    if kept.exists():
        # Before anything is overwritten: table, teacher and budget in the folder belong to what was begun there.
        before = begun(type(experiment), yaml.safe_load(kept.read_text())).identity
        now = experiment.identity
        if changed := sorted(key for key in {*before, *now} if before.get(key) != now.get(key)):
            raise StudyError(
                f"The run in {run} belongs to another experiment: {', '.join(changed)} changed.",
                remedy="undo the change, or start afresh with another --out",
            )
    write_atomic(kept, yaml.safe_dump(experiment.plain(), sort_keys=False))


def execute(experiment: Experiment, run: Path, *, resume: bool = False, progress: Progress | None = None) -> Path:
    """Do the whole job; returns the student folder. Raises subclasses of NasError for what a user can mend."""
    import time

    from nas.result import deliver

    start = time.monotonic()
    torch.set_num_threads(1)
    run.mkdir(parents=True, exist_ok=True)
    with run_lock(run):
        open_run(experiment, run, resume)
        job = Job(experiment, run, progress or Silent())
        job.check_search()
        job.check_keys()
        for remark in job.space.remarks():
            job.progress.note(remark)
        for name, other in job.others.items():
            other.save(run / f"table-{name}.json")
        with job.executor(job.untaught) as workers:
            table = job.table(workers)
            alternatives = job.alternative_tables(workers)
            teacher = job.teacher(workers)
        job.time_teacher(teacher)
        whole = teacher_costs(run)
        limits = job.limits(whole)
        estimator = job.estimator(table, alternatives)
        screen = screening(limits, job.errors(table, alternatives))
        share = job.check_budget(estimator, screen)
        job.progress.note(_budget_text(limits, share))
        reward = job.reward(limits, whole)
        masks = job.masks(estimator, screen, reward)
        if masks.forms:
            job.progress.note(note(masks))
        student = job.student(teacher)
        with job.executor(student) as workers:
            arms = ["search", *(["random"] if "random" in experiment.baselines else [])]
            found = {arm: search_arm(job, arm, workers, estimator, screen, reward, masks) for arm in arms}
            trials = {arm: trials for arm, (trials, _) in found.items()}
            chosen = entrants(job, trials, estimator, screen)
            finalists, session = measure_finalists(job, chosen, workers, reward, limits, table)
        winner = choose(finalists, job.warn)
        refinement = close_loop(job, table, finalists, session)
        outcome = Outcome(
            trials, found["search"][1], chosen, masks, finalists, session, refinement, winner,
            time.monotonic() - start, job.warnings,
        )  # fmt: skip
        return deliver(job, student, teacher, table, limits, reward, outcome)


def teacher_costs(run: Path) -> dict[str, float]:
    """The teacher's measured latencies and file size, from the run folder that keeps them.

    Raises:
        StudyError: it does not.
    """
    try:
        timing = Timing(**json.loads((run / "teacher_latency.json").read_text()))
        size = float((run / "teacher.onnx").stat().st_size)
    except (OSError, ValueError, TypeError) as error:
        raise StudyError(f"{run} does not hold its teacher and the teacher's timing: {error}.") from error
    return dict(zip(COSTS, (timing.p50, timing.p95, size), strict=True))


def screening(limits: tuple[Limit, ...], errors: Mapping[str, FitError]) -> tuple[Limit, ...]:
    """The budgets for predictions: tighter by the tables' own errors, so that measurements meet the real ones."""
    return tuple(Limit(limit.cost, limit.limit * (1 - _margin(errors, limit.cost))) for limit in limits)


def _margin(errors: Mapping[str, FitError], cost: str) -> float:
    """An imported table claims no error."""
    return min(0.2, errors[cost].mape) if cost in errors else 0.0


def choose(finalists: list[Finalist], warn: Any) -> Finalist:
    """The search's finalist of highest measured reward among those that meet the budget as measured.

    Raises:
        StudyError: no finalist of the search could be trained.
    """
    own = [f for f in finalists if f.entrant.arm == "search"]
    if not own:
        raise StudyError(
            "Every finalist failed in its long training.", remedy="see finalists/*/facts.json, then --resume"
        )
    if not own[0].feasible:
        warn(f"no finalist meets the budget as measured; the closest misses it by {100 * own[0].violation:.1f} %")
    return own[0]


def _budget_text(limits: tuple[Limit, ...], share: float) -> str:
    wanted = ", ".join(f"{limit.cost} ≤ {limit.limit:.4g}" for limit in limits) or "none"
    return f"budget {wanted}; {100 * share:.1f} % of the space meets it by prediction"
