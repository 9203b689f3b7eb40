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
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nas.errors import BudgetError, StudyError
from nas.evaluators.base import Evaluation, Evaluator, guarded
from nas.executors import Executor
from nas.latency import CostEstimator
from nas.locks import training_lock
from nas.reward import Limit, Reward, violation
from nas.space import Genomes, SearchSpace
from nas.strategies.base import ASKED, COMPLETE, DUPLICATE, FAILED, SCREENED, Outcomes, Proposals, Strategy
from nas.study import Study, Trial

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
        estimator: prices every genome before anything is trained; its costs include ``reward_cost``.
        executor: runs evaluations; its shared object is the :class:`~nas.evaluators.Evaluator`.
        reward: R(α) of quality and ``reward_cost``.
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
    reward_cost: str = "latency_ms"
    on_trial: Callable[[Trial], None] | None = None
    counts: Counts = field(default_factory=Counts)

    def run(self) -> list[Trial]:
        """Search until the budget is spent or the space is exhausted; returns all trials by index."""
        self._recorded = {trial.index: trial for trial in self.study}
        self._quality: dict[str, float] = {}
        self._told = 0
        trials: list[Trial] = []
        self._start = time.monotonic() - max((trial.elapsed for trial in self._recorded.values()), default=0.0)
        while len(trials) < self.budget.trials and time.monotonic() - self._start < self.budget.seconds:
            proposals = self._propose(min(self.batch, self.budget.trials - len(trials)))
            if not len(proposals.index):
                break
            done = self._evaluate(proposals)
            self._tell(proposals, np.array([t.quality for t in done]), np.array([t.status for t in done]))
            trials += done
        return trials

    # ---- the fast loop: nothing here is trained -------------------------------------------------

    def _propose(self, n: int) -> Proposals:
        """Ask until ``n`` feasible candidates of unknown quality are found; what is ruled out costs nothing."""
        kept: list[Proposals] = []
        waiting: set[str] = set()
        last = self.counts.asked + MAX_FREE_ASKS
        while len(kept) < n and self.counts.asked < last:
            asked = self.strategy.ask(n - len(kept))
            self.counts.asked += len(asked.index)
            ids = [self.space.canonical_id(genome) for genome in asked.genomes]
            feasible = self._violation(asked.genomes) == 0
            for i, identity in enumerate(ids):
                one = _row(asked, i)
                if not feasible[i]:
                    self.counts.infeasible += 1
                    self._tell(one, np.array([math.nan]), np.array([SCREENED]))
                elif identity in self._quality:
                    self.counts.duplicates += 1
                    known = self._quality[identity]
                    status = FAILED if math.isnan(known) else DUPLICATE
                    self._tell(one, np.array([known]), np.array([status]))
                elif identity in waiting:
                    self.counts.duplicates += 1
                else:
                    waiting.add(identity)
                    kept.append(one)
        if not kept and not self._quality:
            raise BudgetError(
                f"None of {self.counts.asked} candidates meets the budget.",
                expected=self._fastest(),
                remedy="a larger budget, or a space with smaller members",
            )
        return _stack(kept, len(self.space.choices))

    def _fastest(self) -> str:
        genomes = self.space.sample(np.random.default_rng(0), 20_000)
        lowest = self.estimator.price(genomes).min(axis=0)
        found = {limit.cost: lowest[self.estimator.costs.index(limit.cost)] for limit in self.limits}
        return "; ".join(
            f"{limit.cost} {limit.limit:.4g} asked, lowest in the space {found[limit.cost]:.4g}"
            for limit in self.limits
        )

    def _violation(self, genomes: Genomes) -> Any:
        return violation(self.estimator.price(genomes), self.estimator.costs, self.limits)

    # ---- the slow loop: what is trained is recorded ------------------------------------------------

    def _evaluate(self, proposals: Proposals) -> list[Trial]:
        trials: dict[int, Trial] = {}
        todo: list[int] = []
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
        genomes = [(proposals.genomes[i], float(proposals.fidelity[i])) for i in todo]
        for position, evaluation in self.executor.run(evaluate_one, genomes):
            i = todo[position]
            trials[i] = self._record(proposals, i, evaluation)
        for i, trial in trials.items():
            self._quality[self.space.canonical_id(proposals.genomes[i])] = trial.quality
        return [trials[i] for i in range(len(proposals.index))]

    def _record(self, proposals: Proposals, i: int, evaluation: Evaluation | Exception) -> Trial:
        if isinstance(evaluation, Exception):
            evaluation = Evaluation(math.nan, reason=str(evaluation))
        genome = proposals.genomes[i]
        costs = self.estimator.price(genome)
        named = dict(zip(self.estimator.costs, costs[0].tolist(), strict=True))
        reward, reason = math.nan, evaluation.reason
        if not evaluation.failed:
            reward = float(self.reward(evaluation.quality, named[self.reward_cost]))
        trial = Trial(
            index=int(proposals.index[i]),
            genome=tuple(int(g) for g in genome),
            seen=self._told,
            status=FAILED if evaluation.failed else COMPLETE,
            costs=named,
            violation=float(violation(costs, self.estimator.costs, self.limits)[0]),
            quality=evaluation.quality,
            reward=reward,
            reason=reason,
            seconds=evaluation.seconds,
            elapsed=time.monotonic() - self._start,
        )
        self.study.add(trial)
        self._report(trial)
        return trial

    def _report(self, trial: Trial) -> None:
        if self.on_trial is not None:
            self.on_trial(trial)

    def _tell(self, proposals: Proposals, quality: Any, status: Any) -> None:
        costs = self.estimator.price(proposals.genomes)
        reward = np.full(len(quality), math.nan)
        known = np.isfinite(quality)
        if known.any():
            column = self.estimator.costs.index(self.reward_cost)
            reward[known] = self.reward(quality[known], costs[known, column])
        self.strategy.tell(
            Outcomes(
                index=proposals.index,
                genomes=proposals.genomes,
                quality=quality,
                costs=costs,
                violation=violation(costs, self.estimator.costs, self.limits),
                reward=reward,
                fidelity=proposals.fidelity,
                status=status,
                source=np.full(len(quality), ASKED),
            )
        )
        self._told += len(quality)


def evaluate_one(evaluator: Evaluator, item: tuple[Genomes, float]) -> Evaluation:
    """Evaluate in a worker, never while something is being timed on this machine."""
    genome, fidelity = item
    with training_lock():
        return guarded(evaluator, genome, fidelity)


def best(trials: list[Trial], count: int) -> list[Trial]:
    """The ``count`` feasible trials of highest reward."""
    scored = [trial for trial in trials if trial.status == COMPLETE and trial.violation == 0]
    return sorted(scored, key=lambda trial: (-trial.reward, trial.index))[:count]


def _row(proposals: Proposals, i: int) -> Proposals:
    rows = slice(i, i + 1)
    return Proposals(proposals.index[rows], proposals.genomes[rows], proposals.fidelity[rows])


def _stack(rows: list[Proposals], choices: int) -> Proposals:
    if not rows:
        return Proposals(np.empty(0, np.int64), np.empty((0, choices), np.int64), np.empty(0))
    return Proposals(
        np.concatenate([r.index for r in rows]),
        np.concatenate([r.genomes for r in rows]),
        np.concatenate([r.fidelity for r in rows]),
    )
