"""A published table as a search problem: genomes, scores, prices, and what a search is judged by."""

from __future__ import annotations

import csv
import gzip
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nas.errors import ContentError
from nas.strategies.base import Domain, Objective

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
SAMPLE = 0.05  # a table with a smaller share of all combinations is read as a sample of them
CODE = 5  # characters: from here on a column among several is a string of digits and no number
CHUNK = 512


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
        genomes: ``[rows, choices]``.
        cardinalities, ordered, kinds: as in :class:`~nas.strategies.base.Domain`.
        sample: whether genomes that the table lacks are answered with their nearest row.
        quality: what searches are shown (the fidelity column where there is one), ``[rows]``; NaN where unknown.
        final: what regret is counted in: the score of the quality column, ``[rows]``.
        signal: the score of what searches are shown, ``[rows]``: 0 where infeasible.
        cost, seconds: of each row; infinite and 0 where there is none.
        within: rows that are feasible and meet the budget.
        budget: largest cost; None for none.
        tests: columns to report of the winner.
    """

    genomes: Ints
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
    sample: bool = field(init=False)

    def __post_init__(self) -> None:
        combinations = float(np.prod(self.cardinalities.astype(float)))
        self.sample = len(self.genomes) < SAMPLE * combinations
        # Rows are found by a linear hash modulo 2^64, sorted; a hit is compared with the genome itself.
        rng = np.random.default_rng(0)
        self._factors = rng.integers(1, 2**63 - 1, len(self.cardinalities), dtype=np.int64) | 1
        hashes = self._hash(self.genomes)
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]
        if len(np.unique(hashes)) < len(hashes):
            raise ContentError("The table has two rows of one genome.", expected="one row each")

    # ---- what is known of a genome ------------------------------------------------------------

    def rows(self, genomes: Ints) -> Ints:
        """Row of the table for each of ``genomes [n, choices]``, −1 where it has none."""
        hashes = self._hash(genomes)
        found = self._order[np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)]
        missing = (self.genomes[found] != genomes).any(axis=1)
        if not self.sample:
            return np.where(missing, -1, found)
        found = found.copy()
        lost = np.flatnonzero(missing)
        for part in (lost[i : i + CHUNK] for i in range(0, len(lost), CHUNK)):
            distance = np.zeros((len(part), len(self.genomes)), dtype=np.int16)
            for column, values in zip(genomes[part].T, self.genomes.T, strict=True):
                distance += column[:, None] != values[None, :]
            found[part] = distance.argmin(axis=1)
        return found

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
        reference, best = np.median(self.quality[self.within]), self.quality[self.within].max()
        quality = (self.quality[rows] - reference) / max(best - reference, 1e-12)
        cost = self.cost[rows] / self.budget
        area, height = 0.0, 0.0
        for i in np.lexsort((-quality, cost)):  # from the cheapest: each rise in quality counts up to the budget
            if cost[i] < 1 and quality[i] > height:
                area += (quality[i] - height) * (1 - cost[i])
                height = quality[i]
        return float(area)

    def _hash(self, genomes: Ints) -> Ints:
        return np.asarray((genomes * self._factors).sum(axis=1))


def score(quality: Array, cost: Array, budget: float | None, scale: float) -> Array:
    """Quality / scale; over the budget × (budget / cost); 0 where the cost is infinite or the quality unknown."""
    share = np.isfinite(cost).astype(float) if budget is None else np.minimum(1.0, budget / cost)
    return np.nan_to_num(quality / scale * share)


def load(setting: Setting) -> Problem:
    """Read and join the tables.

    Raises:
        ContentError: a file or a column is missing, or nothing is feasible.
    """
    table = Table.of(setting.quality)
    columns = setting.genome.split(",")
    first = table.distinct(columns)
    genomes, sizes, ordered, kinds = encode(table, columns, first)
    read = Reader(table, columns, first)
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
        genomes, sizes, ordered, kinds, seen,
        final=score(quality, cost, budget, setting.scale), signal=score(seen, cost, budget, setting.scale),
        cost=cost, seconds=np.where(feasible, seconds, 0.0),
        within=feasible if budget is None else feasible & (cost <= budget), budget=budget, scale=setting.scale,
        tests=[read(where) for where in setting.tests], timed=setting.fidelity is not None,
    )  # fmt: skip


@dataclass
class Table:
    """Columns of a file as text."""

    file: str
    columns: dict[str, list[str]]

    @classmethod
    def of(cls, where: str) -> Table:
        """The file of ``FILE:COLUMN``."""
        file = where.rpartition(":")[0]
        if not Path(file).is_file():
            raise ContentError(
                f"There is no file {file!r} (from {where!r}).",
                expected="FILE:COLUMN",
                remedy="download the published table, or name one that is there",
            )
        opener: Callable[..., object] = gzip.open if file.endswith(".gz") else open
        with opener(file, "rt", newline="") as handle:  # type: ignore[attr-defined]
            rows = list(csv.reader(handle))
        if len(rows) < 2:
            raise ContentError(f"{file} has no rows.")
        return cls(file, dict(zip(rows[0], map(list, zip(*rows[1:], strict=True)), strict=True)))

    def column(self, name: str) -> list[str]:
        """A column; raises ContentError."""
        if name not in self.columns:
            raise ContentError(f"{self.file} has no column {name!r}.", expected=f"one of {', '.join(self.columns)}")
        return self.columns[name]

    def keys(self, columns: list[str]) -> list[tuple[str, ...]]:
        """The rows of some columns."""
        return list(zip(*(self.column(name) for name in columns), strict=True))

    def distinct(self, columns: list[str]) -> list[int]:
        """Positions of the first row of every genome."""
        return list({key: i for i, key in reversed(list(enumerate(self.keys(columns))))}.values())[::-1]


@dataclass
class Reader:
    """Reads number columns, of the table's own file or of others, in the order of its rows."""

    table: Table
    genome: list[str]
    rows: list[int]

    def __call__(self, where: str) -> Array:
        name = where.rpartition(":")[2]
        other = Table.of(where)
        values = other.column(name)
        if other.file == self.table.file:
            return np.array([number(values[row]) for row in self.rows])
        key, other_key = self.join(other)
        by_key = dict(zip(reversed(other.keys(other_key)), reversed(values), strict=True))
        mine = self.table.keys(key)
        found = [by_key.get(mine[row], "") for row in self.rows]
        if not any(found):
            raise ContentError(f"{where} shares no row with {self.table.file}, joined on {','.join(other_key)}.")
        return np.array([number(value) for value in found])

    def join(self, other: Table) -> tuple[list[str], list[str]]:
        """Columns that both files are joined on."""
        if "idx" in self.table.columns and "idx" in other.columns:
            return ["idx"], ["idx"]
        if all(name in other.columns for name in self.genome):
            return self.genome, self.genome
        return [next(iter(self.table.columns))], [next(iter(other.columns))]


def number(text: str) -> float:
    """A cell; NaN where it is empty or no number."""
    try:
        return float(text)
    except ValueError:
        return np.nan


def encode(table: Table, columns: list[str], rows: list[int]) -> tuple[Ints, Ints, npt.NDArray[np.bool_], Ints]:
    """Genomes, cardinalities, which choices are ordered, and kinds: the digits of one column are of one kind."""
    genomes: list[list[int]] = []
    sizes: list[int] = []
    ordered: list[bool] = []
    kinds: list[int] = []
    for kind, name in enumerate(columns):
        cells = [table.column(name)[row] for row in rows]
        digits = len(columns) == 1 or is_code(cells)
        if digits and len({len(cell) for cell in cells}) > 1:
            raise ContentError(f"{table.file}: the codes in {name!r} have different lengths.")
        genes = list(zip(*cells, strict=True)) if digits else [tuple(cells)]
        numeric = not digits and all(np.isfinite(number(cell)) for cell in cells)
        values = sorted({value for gene in genes for value in gene}, key=number if numeric else str)
        place = {value: i for i, value in enumerate(values)}
        genomes += [[place[value] for value in gene] for gene in genes]
        sizes += [len(values)] * len(genes)
        ordered += [numeric] * len(genes)
        kinds += [kind] * len(genes)
    return (
        np.array(genomes, dtype=np.int64).T.copy(), np.array(sizes, dtype=np.int64), np.array(ordered), np.array(kinds)
    )  # fmt: skip


def is_code(cells: list[str]) -> bool:
    """Whether a column among several holds strings of digits: of one length, and long or with leading zeros."""
    lengths = {len(cell) for cell in cells}
    if len(lengths) > 1 or not all(re.fullmatch("[0-9a-z]+", cell) for cell in cells):
        return False
    return max(lengths) >= CODE or (max(lengths) > 1 and any(cell.startswith("0") for cell in cells))
