"""The searches of the arms: one controller, estimator, reward and screening for all, and equal training seconds."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from nas.ablation.phases import Phase, budgets, can_go_on, phases_of, plain_genome, share, teaching_columns
from nas.arms import RANDOM_SEED, recorded_in, uniform_within, warm_starts
from nas.controller import Budget, SearchController, best, objective
from nas.errors import BudgetError, SpaceError
from nas.evaluators.base import Evaluation
from nas.executors import Executor
from nas.frozen import Frozen
from nas.job import Job, screening
from nas.latency import CostEstimator, LatencyTable
from nas.masks import Masks
from nas.reward import Limit, Reward, violation
from nas.space import Genomes, Value
from nas.study import Study, Trial

COUNTABLE = 20_000  # genomes of a space that is looked through for how many candidates there are
SOME = 1e-9  # seconds: where phases before took everything, a phase still trains one candidate


@dataclass
class Found:
    """What an arm's search came to.

    Attributes:
        trials: of the whole space, within the target's budget by prediction: the finalists are chosen from them.
        evaluations: candidates that were trained; ``train_seconds``: what they took, added up over all workers.
        reason: why there are no trials, for people.
        phases: of searches in a row: name, limits, free choices, evaluations, seconds, and the best that went on.
    """

    trials: list[Trial] = field(default_factory=list)
    evaluations: int = 0
    train_seconds: float = 0.0
    reason: str = ""
    phases: list[dict[str, Any]] = field(default_factory=list)

    def spend(self, trials: Sequence[Trial]) -> None:
        """Count what was trained."""
        self.evaluations += sum(trial.seconds > 0 for trial in trials)
        self.train_seconds += math.fsum(trial.seconds for trial in trials)


@dataclass
class Contest:
    """One seed and one target latency, at which all arms meet.

    Args:
        job: whose experiment has the target for its budget; its folder holds the record.
        table, alternatives: latency tables, one for all seeds.
        workers: their shared object trains candidates of the whole space.
        whole: the teacher's measured costs.
    """

    job: Job
    table: LatencyTable
    alternatives: Mapping[str, LatencyTable]
    workers: Executor
    whole: Mapping[str, float]

    @cached_property
    def limits(self) -> tuple[Limit, ...]:
        """The budgets as they are to be measured."""
        return self.job.limits(self.whole)

    @cached_property
    def estimator(self) -> CostEstimator:
        """Prices of the whole space."""
        return self.job.estimator(self.table, self.alternatives)

    @cached_property
    def reward(self) -> Reward:
        """What every arm's finalists are judged by."""
        return self.job.reward(self.limits, self.whole)

    def screened(self, limits: Sequence[Limit]) -> tuple[Limit, ...]:
        """Limits for predictions, tighter by the table's error."""
        return screening(tuple(limits), self.job.errors(self.table, self.alternatives))

    @cached_property
    def screen(self) -> tuple[Limit, ...]:
        """The budgets as predictions have to meet them."""
        return self.screened(self.limits)

    def search(self, arm: str, seconds: float | None, price: float | None) -> Found:
        """The search of one arm.

        Args:
            seconds: training seconds; None: whatever ``search.trials`` trainings take.
            price: mean seconds of a training, where it is known.
        """
        return SEARCHES[arm](self, seconds, price)

    def _different(
        self, job: Job, masks: Masks, estimator: CostEstimator, screen: tuple[Limit, ...],
        enqueue: Sequence[Mapping[str, Value]],
    ) -> int:  # fmt: skip
        """How many candidates there are to try, where they can be counted: a strategy would look for more in vain.

        Raises:
            BudgetError: there are none.
        """
        space = job.space
        if space.size > COUNTABLE:
            return sys.maxsize
        sizes = tuple(space.cardinalities.tolist())
        genomes = masks.repair(np.indices(sizes).reshape(len(sizes), -1).T.astype(np.int64))
        genomes = np.concatenate([genomes, *(space.encode(one)[None] for one in enqueue)])
        feasible = violation(estimator.price(genomes), estimator.costs, screen) == 0
        if not feasible.any():
            raise BudgetError(f"None of its {space.size} candidates meets the budget by prediction.")
        return len(set(space.canonical_ids(genomes[feasible])))

    def run(
        self, name: str, budget: Budget, *, random: bool = False, limits: Sequence[Limit] | None = None,
        space: Frozen | None = None, known: Mapping[str, Trial] | None = None,
        enqueue: Sequence[Mapping[str, Value]] = (), masked: bool = True, price: float | None = None,
    ) -> list[Trial]:  # fmt: skip
        """One search, recorded under its name; its trials are those of ``space`` or of the whole one.

        Raises:
            BudgetError: nothing meets the limits.
        """
        job = self.job if space is None else narrowed(self.job, space)
        e, limits = job.experiment, tuple(self.limits if limits is None else limits)
        screen, reward = self.screened(limits), job.reward(limits, self.whole)
        estimator = self.estimator if space is None else job.estimator(self.table, self.alternatives)
        masks = job.masks(estimator, screen, reward) if masked else Masks(job.space)
        kind, settings = ("random", {}) if random else (e.strategy.kind, e.strategy.settings)
        seed = e.seed + RANDOM_SEED * random
        identity = {**e.identity, "arm": name, "limits": [vars(limit) for limit in limits]}
        if space is not None:
            identity["fixed"] = space.fixed
        storage, study_name = recorded_in(e, job.run, name)
        study = Study(storage, study_name, job.space, identity)
        if study.repaired:
            job.warn(study.repaired)
        told = _Told(job, budget)
        controller = SearchController(
            space=job.space,
            strategy=job.strategy(kind, settings, seed, objective(estimator, screen, reward), masks),
            estimator=estimator,
            executor=self.workers if space is None else Widened(self.workers, space, known or {}),
            reward=reward,
            limits=screen,
            study=study,
            budget=replace(budget, trials=min(budget.trials, self._different(job, masks, estimator, screen, enqueue))),
            batch=_batch(e.search.batch, budget.training, price),
            on_trial=told,
            enqueue=enqueue,
            retries=e.search.retries,
        )
        return controller.run()


def _batch(asked: int, seconds: float, price: float | None) -> int:
    """No more at a time than the seconds buy, where it is known what they buy."""
    return asked if price is None or math.isinf(seconds) else max(1, min(asked, round(seconds / price)))


def narrowed(job: Job, space: Frozen) -> Job:
    """The same job over a part of its space."""
    view = copy.copy(job)
    view.space = space
    return view


class Widened(Executor):
    """Evaluates genomes of a view as genomes of the whole space, whose evaluator the workers have.

    Args:
        workers: run what is evaluated.
        space: the view.
        known: canonical id → trial of this arm: what it trained in an earlier phase is not trained again.
    """

    def __init__(self, workers: Executor, space: Frozen, known: Mapping[str, Trial]) -> None:
        self.workers, self.space, self.known = workers, space, known

    def run(self, function: Callable[[Any, Any], Any], items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        todo = []
        for i, (genome, fidelity) in enumerate(items):
            before = self.known.get(self.space.canonical_id(genome))
            if before is not None and before.fidelity >= fidelity:
                yield i, Evaluation(before.quality)
            else:
                todo.append((i, (self.space.widen(genome), fidelity)))
        for position, result in self.workers.run(function, [item for _, item in todo]):
            yield todo[position][0], result


# ---- the arms ---------------------------------------------------------------------------------------------


def _joint(contest: Contest, seconds: float | None, price: float | None) -> Found:
    """Every choice at once, by the experiment's own strategy."""
    trials = contest.job.experiment.search.trials
    budget = Budget(trials) if seconds is None else Budget(sys.maxsize, training=seconds)
    first = warm_starts(contest.job, contest.estimator, contest.screen)
    return _single(contest, "joint", budget, price=price, enqueue=first)


def _random(contest: Contest, seconds: float | None, price: float | None) -> Found:
    """Every choice at once, drawn uniformly."""
    return _single(contest, "random", Budget(sys.maxsize, training=_given(seconds)), random=True, price=price)


def _uniform(contest: Contest, seconds: float | None, price: float | None) -> Found:
    """The family's uniformly compressed members within the budget, the slowest first; nothing of them is masked."""
    space = contest.job.space
    try:
        members = uniform_within(contest.job, contest.estimator, contest.screen)
    except SpaceError as error:
        return Found(reason=error.found)
    queue = [space.decode(np.array(member.genome)).as_dict() for member in members]
    if not queue:
        return Found(reason="no uniformly compressed member of the family meets the budget by prediction")
    budget = Budget(len(queue), training=_given(seconds))
    return _single(contest, "uniform", budget, random=True, enqueue=queue, masked=False, price=price)


def _single(contest: Contest, name: str, budget: Budget, **options: Any) -> Found:
    found = Found()
    try:
        found.trials = contest.run(name, budget, **options)
    except BudgetError as error:
        found.reason = error.found
    found.spend(found.trials)
    if found.trials and not best(found.trials, 1):
        found.trials, found.reason = [], _failures(found.trials)
    return found


def _sequential(contest: Contest, seconds: float | None, price: float | None) -> Found:
    """Architecture, then pruning and ranks, then bits and codebooks: the best of each phase goes on to the next."""
    space, estimator, budget = contest.job.space, contest.estimator, _given(seconds)
    margins = {limit.cost: 1 - s.limit / limit.limit for limit, s in zip(contest.limits, contest.screen, strict=True)}
    masks = contest.job.masks(estimator, contest.screen, contest.reward)
    masked = {(form.choices[0], form.value) for form in masks.forms if form.everywhere and form.value is not None}
    found, left = Found(), phases_of(space, masked)
    teaching = math.log2(math.prod(len(space.choices[i].values) for i in teaching_columns(space)))
    genome, start = plain_genome(space), dict(contest.whole)
    known: dict[str, Trial] = {}
    incumbent: list[dict[str, Value]] = []
    for number, phase in enumerate(list(left), start=1):
        limits = budgets(contest.limits, margins, start, estimator, space, genome, left)
        view = _view(contest, phase, genome)
        seconds = share(budget - found.train_seconds, left, price, teaching)
        enqueue = [{c.name: one[c.name] for c in view.choices} for one in incumbent]
        name = f"sequential-{number}-{phase.name}"
        entry: dict[str, Any] = {
            "name": phase.name, "limits": {limit.cost: limit.limit for limit in limits},
            "free": [choice.name for choice in view.choices], "seconds": seconds, "evaluations": 0,
            "train_seconds": 0.0, "best": None,
        }  # fmt: skip
        found.phases.append(entry)
        try:
            trials = contest.run(
                name, Budget(sys.maxsize, training=max(seconds, SOME)), limits=limits, space=view, known=known,
                enqueue=enqueue, price=price,
            )  # fmt: skip
        except BudgetError as error:
            found.reason = f"phase {phase.name}: {error.found}"
            return found
        before = found.evaluations, found.train_seconds
        found.spend(trials)
        entry["evaluations"], entry["train_seconds"] = found.evaluations - before[0], found.train_seconds - before[1]
        price = found.train_seconds / found.evaluations if found.evaluations else price
        whole = [replace(t, genome=tuple(view.widen(np.array(t.genome)).tolist())) for t in trials]
        known |= _by_identity(contest, whole)
        left = left[1:]
        ranked = best(whole, len(whole))
        chosen = next(
            (t for t in ranked if not left or can_go_on(contest.screen, estimator, space, np.array(t.genome), left)),
            None,
        )
        if chosen is None:
            nowhere = "none of its candidates can be brought below the target by what is left to decide"
            found.reason = f"phase {phase.name}: {nowhere if ranked else _failures(whole)}"
            return found
        genome = np.array(chosen.genome)
        start = {cost: value / (1 - margins.get(cost, 0.0)) for cost, value in chosen.costs.items()}
        incumbent = [space.decode(genome).as_dict()]
        entry["best"] = incumbent[0]
        found.trials = whole
    return found


def _view(contest: Contest, phase: Phase, genome: Genomes) -> Frozen:
    """What a phase may choose: its own choices and those of the distillation; the others are as in ``genome``."""
    space = contest.job.space
    free = {*phase.columns, *teaching_columns(space)}
    values = space.decode(genome).as_dict()
    return Frozen(space, {c.name: values[c.name] for i, c in enumerate(space.choices) if i not in free})


def _by_identity(contest: Contest, trials: Sequence[Trial]) -> dict[str, Trial]:
    """What was trained, by canonical id."""
    done = [trial for trial in trials if math.isfinite(trial.quality)]
    if not done:
        return {}
    return dict(zip(contest.job.space.canonical_ids(np.array([t.genome for t in done])), done, strict=True))


def _given(seconds: float | None) -> float:
    assert seconds is not None  # the joint search comes first and says how many there are
    return seconds


def _failures(trials: Sequence[Trial]) -> str:
    reasons = sorted({trial.reason for trial in trials if trial.reason})
    return f"all {len(trials)} candidates failed: {'; '.join(reasons[:3])}"


SEARCHES: dict[str, Callable[[Contest, float | None, float | None], Found]] = {
    "joint": _joint, "sequential": _sequential, "uniform": _uniform, "random": _random,
}  # fmt: skip


class _Told:
    """Turns trials into progress."""

    def __init__(self, job: Job, budget: Budget) -> None:
        self.job, self.budget = job, budget
        self.done: list[Trial] = []

    def __call__(self, trial: Trial) -> None:
        self.done.append(trial)
        spent = math.fsum(t.seconds for t in self.done)
        share = max(len(self.done) / self.budget.trials, min(1.0, spent / self.budget.training))
        leader = best(self.done, 1)
        so_far = f"best reward {leader[0].reward:.4f}" if leader else "nothing yet"
        self.job.progress.update(min(1.0, share), f"{len(self.done)} candidates, {spent:.0f} s of training, {so_far}")
