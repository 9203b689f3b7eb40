"""Successive halving over training budget: many candidates a little, the best more, the best of those in full."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from nas.errors import ExperimentError
from nas.settings import construct
from nas.space import Genomes
from nas.strategies.base import ASKED, EARLIER, ENQUEUED, FAILED, SCREENED, Domain, Outcomes, Strategy, strategies
from nas.strategies.draws import Draws

Array = npt.NDArray[np.float64]
TOLERANCE = 1e-9  # of fidelities
PATIENCE = 4  # attempts in which the wrapped strategy may find a genome that was not evaluated yet


class Halving(Strategy):
    """Asynchronous successive halving around another strategy, which proposes the new genomes.

    Successive halving (Jamieson & Talwalkar 2016, algorithm 1) in its asynchronous form (ASHA, Li et al. 2020,
    algorithm 2): new genomes get the smallest share of the full training, η^−(rungs−1); of every rung the best 1/η of
    all that it has seen are trained again at the next one, η times longer, up to the full training. A proposal is a
    promotion where there is one, from the highest rung down, and else a new genome, so nothing waits for a rung to
    fill. Nothing that was evaluated is proposed again at the same fidelity or a lower one: where the wrapped strategy
    proposes only that, genomes are drawn uniformly, and told as "enqueued".

    Within a rung candidates are ranked by constraint domination (Deb et al. 2002): the feasible before those that
    break a budget, these by how far. The feasible rank by reward, or by non-dominated front over quality and all
    costs and by reward within a front. What breaks a budget is never promoted: no training mends a cost.

    A lower rung's qualities are not a full training's, so the wrapped strategy is never shown them as such:

    - ``teach: ranks``: every outcome is told with its overall rank instead of quality and reward, one scale for all
      rungs. Rung *r* holds the best η^−r of what was tried, so place *p* of *n* in it is worth 1 − (p + ½)/n · η^−r.
      Outcomes of a promotion are told as "enqueued": the promotion was not the wrapped strategy's choice. Outcomes
      from elsewhere are ranked among themselves, those of less than the full training left out.
    - ``teach: full``: outcomes of the full training are told as they are, and nothing else but failures and what was
      ruled out. For strategies that model the quality itself.

    Memory grows with what was evaluated.

    Args:
        eta: η, how many candidates compete for a promotion, and how much longer the next rung trains.
        rungs: fidelities in all, a geometric series up to 1.
        shortest: the lowest of them; η^−(rungs−1) by default. Published tables know certain lengths only.
        by: rank by reward, or by front.
        teach: what the wrapped strategy is told.
        wrapped: its settings.
    """

    name: ClassVar[str] = "random"

    def __init__(
        self,
        domain: Domain,
        seed: int = 0,
        *,
        eta: int = 3,
        rungs: int = 3,
        shortest: float | None = None,
        by: Literal["reward", "front"] = "reward",
        teach: Literal["ranks", "full"] = "ranks",
        wrapped: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(domain, seed)
        if eta < 2 or rungs < 2:
            raise ExperimentError(f"strategy: eta {eta}, rungs {rungs}.", expected="both at least 2")
        lowest = float(eta) ** (1 - rungs) if shortest is None else shortest
        if not 0 < lowest < 1:
            raise ExperimentError(
                f"strategy: shortest {shortest}.", expected="a share of the training, 0 < shortest < 1"
            )
        self.wrapped = construct(strategies.get(self.name), wrapped or {}, domain, seed, where="strategy.wrapped")
        if isinstance(self.wrapped, Halving):
            raise ExperimentError(
                "strategy: halving wraps halving.", expected="a strategy that asks for full trainings"
            )
        whole_front = domain.objective.costs if by == "front" and domain.objective is not None else ()
        self.minimises = tuple(dict.fromkeys((*whole_front, *self.wrapped.minimises)))
        self.eta, self.teach = eta, teach
        self.rungs = [_Rung(lowest ** (1 - r / (rungs - 1)), by) for r in range(rungs)]
        self._elsewhere = _Rung(1.0, by)
        self._reached: dict[bytes, int] = {}  # canonical genome → highest rung at which it was evaluated
        self._numbers: dict[int, int] = {}  # ours → the wrapped strategy's, of new genomes under way
        self._origin: dict[bytes, int] = {}  # canonical genome → the wrapped strategy's number of it

    @classmethod
    def of(cls, name: str) -> type[Halving]:
        """Halving around the strategy of that name."""
        strategies.get(name)  # an unknown one is an error now
        return type(f"Halving_{name.replace(':', '_')}", (cls,), {"name": name})

    def propose(self, draws: Draws) -> Genomes:
        """New genomes of the wrapped strategy."""
        asked = self.wrapped.ask(len(draws))
        self._numbers.update(zip(draws.index.tolist(), asked.index.tolist(), strict=True))
        return asked.genomes

    def propose_at(self, draws: Draws) -> tuple[Genomes, Array]:
        """Promotions first, then new genomes on the lowest rung."""
        # A number that comes again had a genome that was evaluated before.
        again = [self._numbers.pop(number) for number in draws.index.tolist() if number in self._numbers]
        self.wrapped.release(np.array(again, dtype=np.int64))
        promoted = self._promotions(len(draws))
        rest = Draws(draws.seed, draws.index[len(promoted) :], draws.attempt)
        # A strategy that has converged may know nothing new: chance does.
        fresh = self.propose(rest) if draws.attempt < PATIENCE else rest.integers(self.domain.cardinalities)
        genomes = [genome for genome, _ in promoted] + list(fresh)
        fidelity = [share for _, share in promoted] + [self.rungs[0].fidelity] * len(rest)
        shape = (len(draws), len(self.domain.cardinalities))
        return np.array(genomes, dtype=np.int64).reshape(shape), np.array(fidelity)

    def learn(self, outcomes: Outcomes) -> None:
        keys = [row.tobytes() for row in np.ascontiguousarray(self.domain.canonical(outcomes.genomes), dtype=np.int64)]
        numbers = [
            self._numbers.pop(number, None) if source == ASKED else None
            for number, source in zip(outcomes.index.tolist(), outcomes.source.tolist(), strict=True)
        ]
        self.wrapped.release(np.array([number for number in numbers if number is not None], dtype=np.int64))
        for i, key in enumerate(keys):
            if outcomes.status[i] != SCREENED:
                self._enter(outcomes, i, key, numbers[i])
        self._teach(outcomes, keys, numbers)

    def _promotions(self, most: int) -> list[tuple[Genomes, float]]:
        """Up to ``most`` genomes that are due for the next rung, and its fidelity; from the highest rung down."""
        found: list[tuple[Genomes, float]] = []
        for level in reversed(range(len(self.rungs) - 1)):
            rung = self.rungs[level]
            for key in rung.best(len(rung) // self.eta):
                if len(found) == most:
                    return found
                # What another way has taken further than this rung needs no promotion.
                if key not in rung.promoted and self._reached[key] == level:
                    rung.promoted.add(key)
                    found.append((rung.genomes[key], self.rungs[level + 1].fidelity))
        return found

    def _level(self, fidelity: float) -> int:
        """The highest rung that asks for no more than this fidelity; −1 below all."""
        return sum(rung.fidelity <= fidelity + TOLERANCE for rung in self.rungs) - 1

    def _enter(self, outcomes: Outcomes, i: int, key: bytes, number: int | None) -> None:
        """Enter what was evaluated into the rung of its fidelity, once; it is not proposed again there or below."""
        source, level = outcomes.source[i], self._level(float(outcomes.fidelity[i]))
        if number is not None:
            self._origin.setdefault(key, number)
        if source != ASKED and level == len(self.rungs) - 1:
            self._elsewhere.add(key, outcomes, i)
        before = self._reached.get(key, -1)
        if source == EARLIER or level <= before:  # another search's quality is a hint and no evaluation of this one
            return
        self._reached[key] = level
        for rung in self.rungs[before + 1 : level + 1]:
            self._retire(outcomes.genomes[i : i + 1], rung.fidelity)
        if source == ASKED:
            self.rungs[level].add(key, outcomes, i)

    def _teach(self, outcomes: Outcomes, keys: list[bytes], numbers: list[int | None]) -> None:
        """Tell the wrapped strategy what it can use, under its own numbers."""
        rows, index, source, rank = list[int](), list[int](), list[str](), list[float]()
        scored = outcomes.scored
        for i, key in enumerate(keys):
            ranked = self._rank(key, outcomes, i) if scored[i] else math.nan
            if ranked is None:
                continue
            number, told_as = numbers[i], str(outcomes.source[i])
            if number is None and told_as == ASKED:  # a promotion, or a genome that chance found
                number = self._origin.get(key)
                told_as = ENQUEUED if number is None or self.teach == "ranks" else ASKED
            rows.append(i)
            index.append(-1 if number is None else number)
            source.append(told_as)
            rank.append(ranked)
        if not rows:
            return
        told = replace(outcomes.rows(rows), index=np.array(index), source=np.array(source))
        if self.teach == "ranks":
            told = replace(told, quality=np.array(rank), reward=np.array(rank))
        self.wrapped.tell(told)

    def _rank(self, key: bytes, outcomes: Outcomes, i: int) -> float | None:
        """Overall rank of an outcome, 1 the best; nothing where the wrapped strategy is not told of it."""
        level = self._level(float(outcomes.fidelity[i]))
        whole = level == len(self.rungs) - 1
        if self.teach == "full":
            return math.nan if whole else None
        if outcomes.source[i] == ASKED and key in self.rungs[level].genomes:
            return 1 - (1 - self.rungs[level].rank(key)) * float(self.eta) ** -level
        return self._elsewhere.rank(key) if whole and key in self._elsewhere.genomes else None


@dataclass
class _Rung:
    """What was evaluated at one fidelity, by canonical genome, the best first where it is asked for."""

    fidelity: float
    by: str
    genomes: dict[bytes, Genomes] = field(default_factory=dict)
    promoted: set[bytes] = field(default_factory=set)
    _facts: list[tuple[float, ...]] = field(default_factory=list)  # failed, violation, reward, quality, costs …
    _places: dict[bytes, int] = field(default_factory=dict)  # of all, as they are ranked now; empty: not known

    def __len__(self) -> int:
        return len(self.genomes)

    def add(self, key: bytes, outcomes: Outcomes, i: int) -> None:
        """Enter an outcome; a second one of the same genome changes nothing."""
        if key in self.genomes:
            return
        failed = float(outcomes.status[i] == FAILED)
        self.genomes[key] = outcomes.genomes[i].copy()
        facts = (failed, outcomes.violation[i], outcomes.reward[i], outcomes.quality[i], *outcomes.costs[i])
        self._facts.append(tuple(float(fact) for fact in facts))
        self._places.clear()

    def best(self, count: int) -> list[bytes]:
        """The first ``count`` in rank, without those that failed or break a budget."""
        if not count:
            return []
        fit = {key: not (failed or over) for key, (failed, over, *_) in zip(self.genomes, self._facts, strict=True)}
        return [key for key in list(self._ranked())[:count] if fit[key]]

    def rank(self, key: bytes) -> float:
        """1 − (place + ½) / how many there are."""
        return 1 - (self._ranked()[key] + 0.5) / len(self)

    def _ranked(self) -> dict[bytes, int]:
        """Place of every genome, from the best."""
        if not self._places:
            facts = np.array(self._facts)
            failed, violation, reward, quality = facts[:, :4].T
            layer = np.zeros(len(facts))
            if self.by == "front":
                fit = (failed == 0) & (violation == 0)
                layer[fit] = layers(np.column_stack([-quality, facts[:, 4:]])[fit])
            keys = list(self.genomes)
            order = np.lexsort((-np.where(failed, 0.0, reward), layer, violation, failed))
            self._places = {keys[i]: place for place, i in enumerate(order.tolist())}
        return self._places


def layers(values: Array) -> npt.NDArray[np.int64]:
    """Non-dominated front of each row of ``values [n, k]``, smaller being better: 0 for the first (Deb et al. 2002)."""
    no_worse = np.all(values[:, None] <= values[None], axis=2)
    dominates = no_worse & ~no_worse.T
    layer, left, depth = np.zeros(len(values), dtype=np.int64), np.ones(len(values), dtype=bool), 0
    while left.any():
        front = left & ~np.any(dominates[left], axis=0)
        layer[front] = depth
        left &= ~front
        depth += 1
    return layer


strategies.family("halving", Halving.of)
