"""A published table as a search problem: genomes, scores, prices, and what a search is judged by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nas.errors import ContentError
from nas.reward import hypervolume
from nas.strategies.base import Domain, Objective
from nas.tabular import Columns, Index, Table, encode

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Setting:
    """What the command line names; columns are ``FILE:COLUMN``."""

    quality: str
    genome: str
    cost: str | None = None
    quantile: float = 0.4
    scale: float = 100.0
    tests: tuple[str, ...] = ()
    fidelity: str | None = None
    fidelity_cost: str | None = None


@dataclass
class Problem:
    """A table as a search problem, one row per genome.

    Attributes:
        index: finds genomes among the rows.
        cardinalities, ordered, kinds: as in :class:`~nas.strategies.base.Domain`.
        quality: what searches are shown (the fidelity column where there is one), ``[rows]``; NaN where unknown.
        final: what regret is counted in: the score of the quality column, ``[rows]``.
        signal: the score of what searches are shown, ``[rows]``: 0 where infeasible.
        cost, seconds: of each row; infinite and 0 where there is none.
        within: rows that are feasible and meet the budget.
        budget: largest cost; None for none.
        tests: columns to report of the winner.
    """

    index: Index
    cardinalities: Ints
    ordered: npt.NDArray[np.bool_]
    kinds: Ints
    quality: Array
    final: Array
    signal: Array
    cost: Array
    seconds: Array
    within: npt.NDArray[np.bool_]
    budget: float | None
    scale: float
    tests: list[Array]
    timed: bool

    # ---- what is known of a genome ------------------------------------------------------------

    def rows(self, genomes: Ints) -> Ints:
        """Row of the table for each of ``genomes [n, choices]``, −1 where it has none."""
        return self.index.rows(genomes)

    def price(self, genomes: Ints) -> Array:
        """Cost ``[n, 1]``; infinite where infeasible."""
        rows = self.rows(genomes)
        return np.where(rows >= 0, self.cost[rows], np.inf)[:, None]

    def violation(self, costs: Array) -> Array:
        """By how much of the budget it is exceeded, ``[n]``."""
        if self.budget is None:
            return np.where(np.isfinite(costs[:, 0]), 0.0, np.inf)
        return np.maximum(0.0, costs[:, 0] / self.budget - 1)

    def reward(self, quality: Array, costs: Array) -> Array:
        """The score, ``[n]``."""
        return score(quality, costs[:, 0], self.budget, self.scale)

    def domain(self, knows_costs: bool) -> Domain:
        """What a strategy is told of the space, the prices among it or not."""
        objective = Objective(("cost",), self.price, self.violation, self.reward) if knows_costs else None
        return Domain(self.cardinalities, self.ordered, kinds=self.kinds, objective=objective)

    # ---- what a search is judged by --------------------------------------------------------------

    def regret(self, row: int) -> float:
        """100 × (best possible − this row's score); that of nothing found is that of a score of 0."""
        return 100 * (float(self.final.max()) - (float(self.final[row]) if row >= 0 else 0.0))

    def hypervolume(self, rows: list[int]) -> float:
        """Area that the rows' (quality, cost) dominate over (median quality within the budget, budget), where 1 is
        the best quality within the budget at no cost; 0 without a budget."""
        if self.budget is None:
            return 0.0
        low, best = float(np.median(self.quality[self.within])), float(self.quality[self.within].max())
        area = hypervolume(self.quality[rows], self.cost[rows], (low, self.budget))
        return area / (max(best - low, 1e-12) * self.budget)


def score(quality: Array, cost: Array, budget: float | None, scale: float) -> Array:
    """Quality / scale; over the budget × (budget / cost); 0 where the cost is infinite or the quality unknown."""
    share = np.isfinite(cost).astype(float) if budget is None else np.minimum(1.0, budget / cost)
    return np.nan_to_num(quality / scale * share)


def load(setting: Setting) -> Problem:
    """Read and join the tables.

    Raises:
        ContentError: a file or a column is missing, or nothing is feasible.
    """
    table, names = Table.of(setting.quality), setting.genome.split(",")
    first = table.distinct(names)
    read = Columns(table, names, first)
    genomes, choices, kinds = encode(table, names, first)
    sizes = np.array([len(choice.values) for choice in choices], dtype=np.int64)
    quality = read(setting.quality)
    seen = read(setting.fidelity) if setting.fidelity else quality
    seconds = read(setting.fidelity_cost) if setting.fidelity_cost else np.zeros(len(first))
    cost = read(setting.cost) if setting.cost else np.ones(len(first))
    usable = np.isfinite(cost) & (cost > 0)
    if not usable.any():
        raise ContentError(f"{setting.cost} has no finite, positive cost.")
    budget = float(np.quantile(cost[usable], setting.quantile)) if setting.cost else None
    feasible = usable & np.isfinite(quality) & np.isfinite(seen) & np.isfinite(seconds) & (seconds >= 0)
    if not feasible.any():
        raise ContentError("No row of the table has a quality and a finite, positive cost.")
    cost = np.where(feasible, cost, np.inf)
    return Problem(
        Index(genomes, sizes), sizes, np.array([choice.ordered for choice in choices]),
        kinds, seen,
        final=score(quality, cost, budget, setting.scale), signal=score(seen, cost, budget, setting.scale),
        cost=cost, seconds=np.where(feasible, seconds, 0.0),
        within=feasible if budget is None else feasible & (cost <= budget), budget=budget, scale=setting.scale,
        tests=[read(where) for where in setting.tests], timed=setting.fidelity is not None,
    )  # fmt: skip
