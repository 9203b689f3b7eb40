"""The search controller: ask, price, screen, evaluate, reward, tell, record. The file to read first.

    strategy.ask ─► estimator.price ─► evaluator ─► reward ─► strategy.tell
      genomes        all of them, free   only those    R(α)      ▲
                                         that can win             └─ study.add

Every step but the evaluation is a deterministic function of the seed and of the outcomes so far. So resuming is
not a special case: the loop runs again from the start, and an evaluation that the study already holds is read
from it instead of being repeated. A candidate that a crash left unfinished is simply evaluated, under its number.

A quality is known at a fidelity, the share of the full training that it was reached with. It answers every proposal
of that candidate at this fidelity or a lower one, and is told with its own; at a higher one the candidate is trained
again. So a short training's quality never stands in for a longer one's.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from nas.errors import BudgetError, RewardError, StudyError
from nas.evaluators.base import Evaluation, Evaluator, guarded
from nas.executors import Executor
from nas.latency import CostEstimator
from nas.locks import training_lock
from nas.reward import Limit, Reward, pareto_front, violation, where_defined
from nas.space import Genomes, SearchSpace, Value
from nas.strategies.base import (
    ASKED,
    COMPLETE,
    DUPLICATE,
    EARLIER,
    ENQUEUED,
    FAILED,
    SCREENED,
    Objective,
    Outcomes,
    Proposals,
    Strategy,
)
from nas.study import Study, Trial, trainings

Array = npt.NDArray[np.float64]
T = TypeVar("T")
MAX_FREE_ASKS = 20_000
COMPLETIONS = 1_000
ROUNDING = 1e-9  # of a training: sums of fidelities such as 1/9 are not exact


@dataclass(frozen=True)
class Budget:
    """When a search ends: at whichever of these comes first.

    Args:
        trials: full trainings that the evaluations are worth.
        seconds: of the clock.
        training: seconds that the evaluations took, added up over all workers. So that the last batch does not run
            over, no more are asked for than the rest buys at what they took so far; a study that is resumed holds what
            they took, and ends where it would have ended.
    """

    trials: int
    seconds: float = math.inf
    training: float = math.inf


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
        enqueue: candidates that are evaluated before the strategy is asked, in full, as they are asked for; what one
            leaves open is drawn uniformly until it meets the limits, and repaired as proposals are. The strategy is
            told of them as "enqueued". Those that cannot meet the limits are not evaluated, but listed in
            ``ruled_out``.
        earlier: another search's trials over the same space, told as "earlier" before anything else. Their
            qualities are believed, their costs and rewards are those of this search. They are no trials of it, and
            their candidates may be evaluated again.
        retries: how often a failed evaluation is repeated before the failure is recorded.
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
    enqueue: Sequence[Mapping[str, Value]] = ()
    earlier: Sequence[Trial] = ()
    retries: int = 0
    counts: Counts = field(default_factory=Counts)
    ruled_out: list[Mapping[str, Value]] = field(default_factory=list)

    def run(self) -> list[Trial]:
        """Search until the budget is spent or the space is exhausted; returns all trials by index."""
        self.reward.columns(self.estimator.costs)  # said now, and not once for every candidate
        self._recorded = {trial.index: trial for trial in self.study}
        self._numbers = sorted(self._recorded)
        self._known: dict[str, tuple[float, float]] = {}  # canonical id → highest fidelity evaluated, its quality
        self._told = 0
        self._start = time.monotonic() - max((trial.elapsed for trial in self._recorded.values()), default=0.0)
        self._tell_earlier()
        self._queue = [self._complete(i, candidate) for i, candidate in enumerate(self.enqueue)]
        trials: list[Trial] = []
        left = float(self.budget.trials)
        for source in (self._dequeue, self._propose):
            while left > ROUNDING and self._has_time(trials):
                width = self._width(trials, left)
                proposed, twins = source(width)
                if not len(proposed):
                    break
                done = self._round(proposed, twins, width)
                left -= trainings(done)
                trials += done
        return trials

    def _round(self, proposed: _Priced, twins: _Priced, width: int) -> list[Trial]:
        """Evaluate what was proposed and tell it, with its twins, in the order of the numbers."""
        done = self._evaluate(proposed, width)
        sorted_out = self._sort_out(twins, {})
        quality = [*(t.quality for t in done), *sorted_out.quality]
        status = [*(t.status for t in done), *sorted_out.status]
        together = proposed.plus(twins.at(sorted_out.fidelity))
        order = np.argsort(together.proposals.index, kind="stable").tolist()
        self._tell(together.rows(order), [quality[i] for i in order], [status[i] for i in order])
        return done

    def _width(self, trials: list[Trial], left: float) -> int:
        """How many to ask for: a batch, fewer where no more full trainings than that are left.

        A batch that the study holds is asked for as wide as it was, whatever the budget was then.
        """
        done = bisect_right(self._numbers, trials[-1].index) if trials else 0
        recorded = self._recorded[self._numbers[done]].batch if done < len(self._numbers) else 0
        return min(recorded or min(self.batch, self._affordable(trials)), math.ceil(left - ROUNDING))

    def _affordable(self, trials: list[Trial]) -> int:
        """How many evaluations the rest of the training seconds buys, to the nearest whole one."""
        left = self.budget.training - math.fsum(trial.seconds for trial in trials)
        if math.isinf(left) or left <= 0:
            return self.batch if left > 0 else 0
        paid = [trial.seconds for trial in trials if trial.seconds > 0]
        return round(left * len(paid) / math.fsum(paid)) if paid else self.batch

    def _has_time(self, trials: list[Trial]) -> bool:
        """Whether to go on: what is recorded is always gone through, whatever the clock says."""
        if len(trials) < len(self._recorded):
            return True
        return time.monotonic() - self._start < self.budget.seconds and self._affordable(trials) > 0

    # ---- what comes from elsewhere ----------------------------------------------------------------

    def _tell_earlier(self) -> None:
        """Tell another search's qualities, with the costs and the reward that they have in this one."""
        if not self.earlier:
            return
        genomes = np.array([trial.genome for trial in self.earlier], dtype=np.int64)
        fidelity = np.array([trial.fidelity for trial in self.earlier])
        told = self._price(Proposals(np.arange(len(genomes)), genomes, fidelity), EARLIER)
        judged = [
            self._judge(Evaluation(trial.quality), costs)[0]
            for trial, costs in zip(self.earlier, told.costs, strict=True)
        ]
        self._tell(told, [one.quality for one in judged], [FAILED if one.failed else COMPLETE for one in judged])

    def _complete(self, number: int, candidate: Mapping[str, Value]) -> _Priced:
        """An enqueued candidate with the choices that it leaves open drawn; numbered below the strategy's own."""
        genomes = self.space.sample(np.random.default_rng((self.strategy.seed, number)), COMPLETIONS)
        fixed = self.space.encode_partly(candidate)
        genomes[:, list(fixed)] = list(fixed.values())
        genomes = self.strategy.domain.repair(genomes)
        genomes[:, list(fixed)] = list(fixed.values())
        index = np.full(COMPLETIONS, number - len(self.enqueue))
        drawn = self._price(Proposals(index, genomes, np.ones(COMPLETIONS)), ENQUEUED)
        if (drawn.violation > 0).all():
            self.ruled_out.append(candidate)
        return drawn.rows([int(np.argmax(drawn.violation == 0))])

    def _dequeue(self, n: int) -> tuple[_Priced, _Priced]:
        """The next ``n`` enqueued candidates that are to be evaluated, and their twins."""
        kept, twins = self._nothing(ENQUEUED), self._nothing(ENQUEUED)
        waiting: dict[str, float] = {}
        while len(kept) < n and self._queue:
            kept, twins = self._sift(self._queue.pop(0), kept, twins, waiting)
        return kept, twins

    # ---- the fast loop: nothing here is trained -------------------------------------------------

    def _propose(self, n: int) -> tuple[_Priced, _Priced]:
        """Ask until ``n`` feasible candidates of unknown quality are found; what is ruled out costs nothing.

        Also returns the twins, which are to be told with the others: proposals of a candidate that is among them.
        """
        kept, twins = self._nothing(ASKED), self._nothing(ASKED)
        waiting: dict[str, float] = {}
        last = self.counts.asked + MAX_FREE_ASKS
        while len(kept) < n and self.counts.asked < last:
            asked = self._price(self.strategy.ask(n - len(kept)))
            kept, twins = self._sift(asked, kept, twins, waiting)
        if not len(kept) and not self._known:
            raise BudgetError(
                f"None of {self.counts.asked} candidates meets the budget.",
                expected=self._fastest(),
                remedy="a larger budget, or a space with smaller members",
            )
        return kept, twins

    def _sift(
        self, asked: _Priced, kept: _Priced, twins: _Priced, waiting: dict[str, float]
    ) -> tuple[_Priced, _Priced]:
        """Tell what costs nothing, and add the rest to what is kept for evaluation or to the twins."""
        self.counts.asked += len(asked)
        found = self._sort_out(asked, waiting)
        if free := [i for i in range(len(asked)) if found.status[i]]:
            told = asked.at(found.fidelity).rows(free)
            self._tell(told, [found.quality[i] for i in free], [found.status[i] for i in free])
        return kept.plus(asked.rows(found.new)), twins.plus(asked.rows(found.twins))

    def _sort_out(self, asked: _Priced, waiting: dict[str, float]) -> _Sorted:
        """Rows to evaluate, twins of those that wait for it, and for the rest what is known of them."""
        n = len(asked)
        found = _Sorted([], [], [math.nan] * n, [""] * n, asked.proposals.fidelity.copy())
        for i, identity in enumerate(self.space.canonical_ids(asked.proposals.genomes)):
            if asked.violation[i] > 0:
                found.status[i] = SCREENED
                self.counts.infeasible += 1
                continue
            fidelity, quality = self._known.get(identity, (0.0, math.nan))
            if fidelity >= found.fidelity[i]:
                found.fidelity[i], found.quality[i] = fidelity, quality
                found.status[i] = FAILED if math.isnan(quality) else DUPLICATE
                self.counts.duplicates += 1
            elif waiting.get(identity, 0.0) >= found.fidelity[i]:
                found.twins.append(i)
            else:
                waiting[identity] = float(found.fidelity[i])
                found.new.append(i)
        return found

    def _nothing(self, source: str) -> _Priced:
        genomes = np.empty((0, len(self.space.choices)), dtype=np.int64)
        return self._price(Proposals(np.empty(0, dtype=np.int64), genomes, np.empty(0)), source)

    def _price(self, proposals: Proposals, source: str = ASKED) -> _Priced:
        costs = self.estimator.price(proposals.genomes)
        return _Priced(proposals, costs, violation(costs, self.estimator.costs, self.limits), source)

    def _fastest(self) -> str:
        genomes = self.space.sample(np.random.default_rng(0), 20_000)
        lowest = self.estimator.price(genomes).min(axis=0)
        found = {limit.cost: lowest[self.estimator.costs.index(limit.cost)] for limit in self.limits}
        return "; ".join(
            f"{limit.cost} {limit.limit:.4g} asked, lowest in the space {found[limit.cost]:.4g}"
            for limit in self.limits
        )

    # ---- the slow loop: what is trained is recorded ------------------------------------------------

    def _evaluate(self, proposed: _Priced, width: int) -> list[Trial]:
        trials: dict[int, Trial] = {}
        todo: list[int] = []
        proposals = proposed.proposals
        for i, index in enumerate(proposals.index):
            recorded = self._recorded.get(int(index))
            if recorded is None:
                todo.append(i)
                continue
            wanted = (tuple(int(g) for g in proposals.genomes[i]), float(proposals.fidelity[i]))
            if (recorded.genome, recorded.fidelity) != wanted:
                raise StudyError(
                    f"Trial {index} of the study is another candidate than this experiment asks for.",
                    remedy="resume with the versions and the table it was begun with, or start afresh with --out",
                )
            trials[i] = recorded
            self._report(recorded)
        for attempt in range(1 + self.retries):
            items = [(proposals.genomes[i], float(proposals.fidelity[i])) for i in todo]
            again: list[int] = []
            for position, evaluation in self.executor.run(evaluate_one, items):
                i = todo[position]
                if attempt < self.retries and (isinstance(evaluation, Exception) or evaluation.failed):
                    again.append(i)
                else:
                    trials[i] = self._record(proposed, i, evaluation, width)
            todo = sorted(again)
        for i, trial in trials.items():
            identity = self.space.canonical_id(proposals.genomes[i])
            if trial.fidelity >= self._known.get(identity, (0.0, math.nan))[0]:
                self._known[identity] = trial.fidelity, trial.quality
        return [trials[i] for i in range(len(proposed))]

    def _record(self, proposed: _Priced, i: int, evaluation: Evaluation | Exception, width: int) -> Trial:
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
            fidelity=float(proposed.proposals.fidelity[i]),
            source=proposed.source,
            batch=width,
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
                source=np.full(len(values), proposed.source),
            )
        )
        self._told += len(values)


@dataclass(frozen=True)
class _Priced:
    """Proposals of one source with their costs ``[n, k]`` and violations ``[n]``: priced once, used throughout."""

    proposals: Proposals
    costs: Array
    violation: Array
    source: str

    def __len__(self) -> int:
        return len(self.proposals.index)

    def rows(self, which: list[int]) -> _Priced:
        p = self.proposals
        chosen = Proposals(p.index[which], p.genomes[which], p.fidelity[which])
        return replace(self, proposals=chosen, costs=self.costs[which], violation=self.violation[which])

    def at(self, fidelity: Array) -> _Priced:
        """The same with the fidelities at which they are known instead of those proposed."""
        return replace(self, proposals=replace(self.proposals, fidelity=fidelity))

    def plus(self, other: _Priced) -> _Priced:
        p, q = self.proposals, other.proposals
        joined = Proposals(
            np.concatenate([p.index, q.index]),
            np.concatenate([p.genomes, q.genomes]),
            np.concatenate([p.fidelity, q.fidelity]),
        )
        costs = np.concatenate([self.costs, other.costs])
        return _Priced(joined, costs, np.concatenate([self.violation, other.violation]), self.source)


@dataclass
class _Sorted:
    """Rows to evaluate and rows that wait for another's evaluation; of the others status, quality and its fidelity."""

    new: list[int]
    twins: list[int]
    quality: list[float]
    status: list[str]
    fidelity: Array


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
    scored = comparable([trial for trial in trials if trial.violation == 0])
    return sorted(scored, key=lambda trial: (-trial.reward, trial.costs.get("latency_ms", 0.0), trial.index))[:count]


def comparable(trials: Iterable[Trial]) -> list[Trial]:
    """Trials with a quality, of the highest fidelity that any has: what less training gave is another measure."""
    known = [trial for trial in trials if trial.status == COMPLETE]
    highest = max((trial.fidelity for trial in known), default=1.0)
    return [trial for trial in known if trial.fidelity == highest]


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
