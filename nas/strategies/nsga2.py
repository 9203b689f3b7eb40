"""NSGA-II: fronts of several objectives, kept apart by crowding, with budgets by constraint domination."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from nas.errors import ExperimentError
from nas.space import Genomes
from nas.strategies.base import SCREENED, Domain, Outcomes, Strategy, strategies
from nas.strategies.draws import Draws
from nas.strategies.evolution import check_variation
from nas.strategies.variation import affordable, uniform, vary

Array = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
PATIENCE = 10


@strategies.register("nsga2")
class NSGA2(Strategy):
    """Deb et al. 2002, "A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II".

    The population is the best ``population`` of everything told, by front and crowding distance (section III-C), under
    constraint domination (section VI). It is renewed with every ``tell``, whatever its size, so that a batch of
    ``population`` gives the paper's generations. Parents win binary tournaments; their children are crossed over and
    mutated (:func:`~nas.strategies.variation.vary`). Genomes that differ in dormant genes only are one member.

    What its costs rule out was never trained but has a violation: it is a member until something better is found,
    so that a search whose budget almost nothing meets is led towards it.

    Args:
        population: members kept.
        crossover: probability of a second parent.
        objectives: what to maximise or, costs, to minimise: ``reward``, ``quality``, and names of costs. By default
            the reward alone, which finds one candidate within a budget sooner than a front does; for a front
            ``[quality, latency_ms]``. Where prices are not known beforehand, by default the quality and every cost.
    """

    multi_objective = True

    def __init__(
        self,
        domain: Domain,
        seed: int = 0,
        *,
        population: int = 20,
        crossover: float = 0.9,
        objectives: Sequence[str] | None = None,
    ) -> None:
        super().__init__(domain, seed)
        if population < 2:
            raise ExperimentError(f"strategy: population {population}.", expected="at least 2")
        check_variation(domain, crossover)
        self.size, self.crossover = population, crossover
        self.objectives = _objectives(domain, objectives)
        self.minimises = tuple(name for name in self.objectives or () if name not in ("reward", "quality"))
        self._told = 0
        self._keep(np.zeros((0, len(domain.cardinalities)), dtype=np.int64), np.zeros((0, 0)), np.zeros(0))

    def propose(self, draws: Draws) -> Genomes:
        filling = (self.violation == 0).sum() < self.size and self._told < PATIENCE * self.size
        draw = uniform(self.domain) if filling else self._children
        return affordable(draw, draws, self.domain)

    def learn(self, outcomes: Outcomes) -> None:
        self._told += len(outcomes)
        ruled_out = (outcomes.status == SCREENED) & (outcomes.violation > 0) & np.isfinite(outcomes.violation)
        useful = outcomes.scored | ruled_out
        if not useful.any():
            return
        new = outcomes.rows(useful)
        genomes = np.concatenate([self.genomes, new.genomes])
        found = self._values(new)
        values = np.concatenate([self.values.reshape(-1, found.shape[1]), found])
        violation = np.concatenate([self.violation, new.violation])
        # A duplicate of a member, or of another newcomer, is told again and again: it stays one member.
        keys = [row.tobytes() for row in self.domain.canonical(genomes)]
        once = np.array(list({key: i for i, key in reversed(list(enumerate(keys)))}.values()))[::-1]
        self._keep(genomes[once], values[once], violation[once])

    def _values(self, outcomes: Outcomes) -> Array:
        """Objectives ``[n, objectives]``, all to be maximised; 0 where there was no training: there, only the violation
        counts."""
        if self.objectives is None:
            values = np.column_stack([outcomes.quality, -outcomes.costs])
        else:
            names = self.domain.objective.costs if self.domain.objective is not None else ()
            known = {"reward": outcomes.reward, "quality": outcomes.quality}
            known |= {name: -outcomes.costs[:, i] for i, name in enumerate(names)}
            values = np.stack([known[name] for name in self.objectives], axis=1)
        return np.where(outcomes.scored[:, None], values, 0.0)

    def _keep(self, genomes: Genomes, values: Array, violation: Array) -> None:
        """The best become the population."""
        rank = fronts(values, violation)
        distance = crowding(values, rank)
        best = np.lexsort((-distance, rank))[: self.size]
        self.genomes, self.values, self.violation = genomes[best], values[best], violation[best]
        self.rank, self.distance = rank[best], distance[best]

    def _children(self, draws: Draws) -> Genomes:
        return vary(self._winners(draws), self._winners(draws), draws, self.domain, self.crossover)

    def _winners(self, draws: Draws) -> Genomes:
        """Binary tournaments by the crowded-comparison operator (section III-B)."""
        a, b = draws.integers([len(self.rank)] * 2).T
        closer = (self.rank[b] == self.rank[a]) & (self.distance[b] > self.distance[a])
        return self.genomes[np.where((self.rank[b] < self.rank[a]) | closer, b, a)]


def _objectives(domain: Domain, wanted: Sequence[str] | None) -> tuple[str, ...] | None:
    """Names that are known; None for the quality and every cost, whatever their names."""
    if wanted is None:
        return None if domain.objective is None else ("reward",)
    names = ("reward", "quality", *(domain.objective.costs if domain.objective is not None else ()))
    if not wanted or not set(wanted) <= set(names):
        raise ExperimentError(f"strategy: objectives {list(wanted)}.", expected=f"some of {', '.join(names)}")
    return tuple(wanted)


def dominates(values: Array, violation: Array) -> Bools:
    """``[n, n]``: whether row i constraint-dominates row j (Deb et al. 2002, definition 1).

    Of two, the one that breaks the budgets less; of two that keep them, the one that is no worse in any of
    ``values [n, objectives]``, all to be maximised, and better in one.
    """
    a, b = values[:, None], values[None]
    pareto = (a >= b).all(axis=2) & (a > b).any(axis=2)
    kept = violation <= 0
    return np.where(kept[:, None] & kept[None], pareto, violation[:, None] < violation[None])


def fronts(values: Array, violation: Array) -> npt.NDArray[np.int64]:
    """Front of each row, 0 the best: what only better fronts dominate (section III-A)."""
    above = dominates(values, violation)
    dominators = above.sum(axis=0)
    rank = np.full(len(values), -1)
    front = 0
    while (current := (dominators == 0) & (rank < 0)).any():
        rank[current] = front
        dominators -= above[current].sum(axis=0)
        front += 1
    return rank


def crowding(values: Array, rank: npt.NDArray[np.int64]) -> Array:
    """Crowding distance of each row within its front (section III-B): ∞ at the ends, the larger the lonelier."""
    distance = np.zeros(len(values))
    if not len(values):
        return distance
    for column in values.T:
        order = np.lexsort((column, rank))
        sorted_rank, sorted_value = rank[order], column[order]
        starts = np.flatnonzero(np.diff(sorted_rank, prepend=-1))
        ends = np.append(starts[1:], len(order)) - 1
        front = np.repeat(np.arange(len(starts)), ends - starts + 1)
        span = (sorted_value[ends] - sorted_value[starts])[front]
        gap = np.full(len(order), np.inf)
        gap[1:-1] = sorted_value[2:] - sorted_value[:-2]
        gap = np.divide(gap, span, out=np.zeros(len(order)), where=span > 0)
        gap[starts] = gap[ends] = np.inf
        distance[order] += gap
    return distance
