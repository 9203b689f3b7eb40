"""The search controller: ask, price, screen, evaluate, reward, tell, record. The file to read first.

    strategy.ask ─► estimator.price ─► evaluator ─► reward ─► strategy.tell
      genomes        all of them, free   only those    R(α)      ▲
                                         that can win             └─ study.add

Every step but the evaluation is a deterministic function of the seed and of the outcomes so far. So resuming is
not a special case: the loop runs again from the start, and an evaluation that the study already holds is read
from it instead of being repeated. A candidate that a crash left unfinished is simply evaluated, under its number.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from nas.errors import BudgetError, RewardError, StudyError
from nas.evaluators.base import Evaluation, Evaluator, guarded
from nas.executors import Executor
from nas.latency import CostEstimator
from nas.locks import training_lock
from nas.reward import Limit, Reward, pareto_front, violation, where_defined
from nas.space import Genomes, SearchSpace
from nas.strategies.base import ASKED, COMPLETE, DUPLICATE, FAILED, SCREENED, Objective, Outcomes, Proposals, Strategy
from nas.study import Study, Trial

Array = npt.NDArray[np.float64]
T = TypeVar("T")
MAX_FREE_ASKS = 20_000


@dataclass(frozen=True)
class Budget:
    """When a search ends: after ``trials`` evaluations or ``seconds``, whichever comes first."""

    trials: int
    seconds: float = math.inf


@dataclass
class Counts:
    """What the fast loop did for free."""

    asked: int = 0
    infeasible: int = 0
    duplicates: int = 0


@dataclass
class SearchController:
    """Searches one space with one strategy.

    Args:
        space: for decoding and canonical forms.
        strategy: asks and is told.
        estimator: prices every genome before anything is trained; its costs include those that the reward reads.
        executor: runs evaluations; its shared object is the :class:`~nas.evaluators.Evaluator`.
        reward: R(α) of quality and costs.
        limits: hard budgets; what breaks them by prediction is never trained.
        study: the record.
        budget: when to stop.
        batch: candidates asked at a time. It fixes the order of telling, so it is part of the experiment and
            not of the machine: any number of workers gives the same search.
        on_trial: called after each evaluation with the trial.
    """

    space: SearchSpace
    strategy: Strategy
    estimator: CostEstimator
    executor: Executor
    reward: Reward
    limits: tuple[Limit, ...]
    study: Study
    budget: Budget
    batch: int = 4
    on_trial: Callable[[Trial], None] | None = None
    counts: Counts = field(default_factory=Counts)

    def run(self) -> list[Trial]:
        """Search until the budget is spent or the space is exhausted; returns all trials by index."""
        self.reward.columns(self.estimator.costs)  # said now, and not once for every candidate
        self._recorded = {trial.index: trial for trial in self.study}
        self._quality: dict[str, float] = {}
        self._told = 0
        trials: list[Trial] = []
        self._start = time.monotonic() - max((trial.elapsed for trial in self._recorded.values()), default=0.0)
        while len(trials) < self.budget.trials and self._has_time(trials):
            proposed = self._propose(min(self.batch, self.budget.trials - len(trials)))
            if not len(proposed):
                break
            done = self._evaluate(proposed)
            self._tell(proposed, [t.quality for t in done], [t.status for t in done])
            trials += done
        return trials

    def _has_time(self, trials: list[Trial]) -> bool:
        """Whether to go on: what is recorded is always gone through, whatever the clock says."""
        return len(trials) < len(self._recorded) or time.monotonic() - self._start < self.budget.seconds

    # ---- the fast loop: nothing here is trained -------------------------------------------------

    def _propose(self, n: int) -> _Priced:
        """Ask until ``n`` feasible candidates of unknown quality are found; what is ruled out costs nothing."""
        kept = self._price(self.strategy.ask(0))
        waiting: set[str] = set()
        last = self.counts.asked + MAX_FREE_ASKS
        while len(kept) < n and self.counts.asked < last:
            asked = self._price(self.strategy.ask(n - len(kept)))
            self.counts.asked += len(asked)
            new, quality, status = self._sort_out(asked, waiting)
            free = [i for i in range(len(asked)) if status[i]]
            if free:
                self._tell(asked.rows(free), [quality[i] for i in free], [status[i] for i in free])
            kept = kept.plus(asked.rows(new))
        if not len(kept) and not self._quality:
            raise BudgetError(
                f"None of {self.counts.asked} candidates meets the budget.",
                expected=self._fastest(),
                remedy="a larger budget, or a space with smaller members",
            )
        return kept

    def _sort_out(self, asked: _Priced, waiting: set[str]) -> tuple[list[int], list[float], list[str]]:
        """Rows to evaluate, and for the rest quality and status: screened, or a duplicate of what is known."""
        new: list[int] = []
        quality, status = [math.nan] * len(asked), [""] * len(asked)
        for i, genome in enumerate(asked.proposals.genomes):
            if asked.violation[i] > 0:
                status[i] = SCREENED
                self.counts.infeasible += 1
                continue
            identity = self.space.canonical_id(genome)
            if identity in self._quality:
                quality[i] = self._quality[identity]
                status[i] = FAILED if math.isnan(quality[i]) else DUPLICATE
                self.counts.duplicates += 1
            elif identity in waiting:
                self.counts.duplicates += 1
            else:
                waiting.add(identity)
                new.append(i)
        return new, quality, status

    def _price(self, proposals: Proposals) -> _Priced:
        costs = self.estimator.price(proposals.genomes)
        return _Priced(proposals, costs, violation(costs, self.estimator.costs, self.limits))

    def _fastest(self) -> str:
        genomes = self.space.sample(np.random.default_rng(0), 20_000)
        lowest = self.estimator.price(genomes).min(axis=0)
        found = {limit.cost: lowest[self.estimator.costs.index(limit.cost)] for limit in self.limits}
        return "; ".join(
            f"{limit.cost} {limit.limit:.4g} asked, lowest in the space {found[limit.cost]:.4g}"
            for limit in self.limits
        )

    # ---- the slow loop: what is trained is recorded ------------------------------------------------

    def _evaluate(self, proposed: _Priced) -> list[Trial]:
        trials: dict[int, Trial] = {}
        todo: list[int] = []
        proposals = proposed.proposals
        for i, index in enumerate(proposals.index):
            recorded = self._recorded.get(int(index))
            if recorded is None:
                todo.append(i)
                continue
            if recorded.genome != tuple(int(g) for g in proposals.genomes[i]):
                raise StudyError(
                    f"Trial {index} of the study is another candidate than this experiment asks for.",
                    remedy="resume with the versions and the table it was begun with, or start afresh with --out",
                )
            trials[i] = recorded
            self._report(recorded)
        items = [(proposals.genomes[i], float(proposals.fidelity[i])) for i in todo]
        for position, evaluation in self.executor.run(evaluate_one, items):
            i = todo[position]
            trials[i] = self._record(proposed, i, evaluation)
        for i, trial in trials.items():
            self._quality[self.space.canonical_id(proposals.genomes[i])] = trial.quality
        return [trials[i] for i in range(len(proposed))]

    def _record(self, proposed: _Priced, i: int, evaluation: Evaluation | Exception) -> Trial:
        named = dict(zip(self.estimator.costs, proposed.costs[i].tolist(), strict=True))
        evaluation, reward = self._judge(evaluation, proposed.costs[i])
        trial = Trial(
            index=int(proposed.proposals.index[i]),
            genome=tuple(int(g) for g in proposed.proposals.genomes[i]),
            seen=self._told,
            status=FAILED if evaluation.failed else COMPLETE,
            costs=named,
            violation=float(proposed.violation[i]),
            quality=evaluation.quality,
            reward=reward,
            reason=evaluation.reason,
            seconds=evaluation.seconds,
            elapsed=time.monotonic() - self._start,
        )
        self.study.add(trial)
        self._report(trial)
        return trial

    def _judge(self, evaluation: Evaluation | Exception, costs: Array) -> tuple[Evaluation, float]:
        """The reward; a quality that it is not defined for costs the search this candidate and nothing else."""
        if isinstance(evaluation, Exception):
            return Evaluation(math.nan, reason=str(evaluation)), math.nan
        if evaluation.failed:
            return evaluation, math.nan
        try:
            return evaluation, float(self.reward.score([evaluation.quality], costs[None], self.estimator.costs)[0])
        except RewardError as error:
            return Evaluation(math.nan, reason=error.found, seconds=evaluation.seconds), math.nan

    def _report(self, trial: Trial) -> None:
        if self.on_trial is not None:
            self.on_trial(trial)

    def _tell(self, proposed: _Priced, quality: Sequence[float], status: Sequence[str]) -> None:
        values = np.array(quality, dtype=np.float64)
        known = np.isfinite(values)
        reward = np.full(len(values), math.nan)
        if known.any():
            reward[known] = self.reward.score(values[known], proposed.costs[known], self.estimator.costs)
        self.strategy.tell(
            Outcomes(
                index=proposed.proposals.index,
                genomes=proposed.proposals.genomes,
                quality=values,
                costs=proposed.costs,
                violation=proposed.violation,
                reward=reward,
                fidelity=proposed.proposals.fidelity,
                status=np.array(status),
                source=np.full(len(values), ASKED),
            )
        )
        self._told += len(values)


@dataclass(frozen=True)
class _Priced:
    """Proposals with their costs ``[n, k]`` and violations ``[n]``: priced once, used throughout."""

    proposals: Proposals
    costs: Array
    violation: Array

    def __len__(self) -> int:
        return len(self.proposals.index)

    def rows(self, which: list[int]) -> _Priced:
        p = self.proposals
        return _Priced(
            Proposals(p.index[which], p.genomes[which], p.fidelity[which]), self.costs[which], self.violation[which]
        )

    def plus(self, other: _Priced) -> _Priced:
        p, q = self.proposals, other.proposals
        joined = Proposals(
            np.concatenate([p.index, q.index]),
            np.concatenate([p.genomes, q.genomes]),
            np.concatenate([p.fidelity, q.fidelity]),
        )
        return _Priced(
            joined, np.concatenate([self.costs, other.costs]), np.concatenate([self.violation, other.violation])
        )


def objective(estimator: CostEstimator, limits: tuple[Limit, ...], reward: Reward) -> Objective:
    """What strategies may know beforehand: the prices, the budgets and the reward, and nothing of any quality."""
    names = estimator.costs
    return Objective(
        names,
        estimator.price,
        lambda costs: violation(costs, names, limits),
        lambda quality, costs: where_defined(reward, quality, costs, names),
    )


def evaluate_one(evaluator: Evaluator, item: tuple[Genomes, float]) -> Evaluation:
    """Evaluate in a worker, never while something is being timed on this machine."""
    genome, fidelity = item
    with training_lock():
        return guarded(evaluator, genome, fidelity)


def best(trials: list[Trial], count: int) -> list[Trial]:
    """The ``count`` feasible trials of highest reward, the faster first where rewards are equal."""
    scored = [trial for trial in trials if trial.status == COMPLETE and trial.violation == 0]
    return sorted(scored, key=lambda trial: (-trial.reward, trial.costs.get("latency_ms", 0.0), trial.index))[:count]


def front(trials: list[Trial], count: int, cost: str = "latency_ms") -> list[Trial]:
    """``count`` feasible trials along the front of quality and ``cost``; beyond its length, of the fronts below."""
    left, chosen = best(trials, len(trials)), list[Trial]()
    while left and len(chosen) < count:
        layer = [left[i] for i in pareto_front([t.quality for t in left], [t.costs[cost] for t in left])]
        chosen += spread(layer, count - len(chosen))
        left = [trial for trial in left if trial not in layer]
    return chosen


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most ``count`` of the items, evenly spaced, the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round((i + 1) * len(items) / count) - 1] for i in range(count)]
