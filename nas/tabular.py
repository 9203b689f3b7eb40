"""Published qualities and costs as search spaces: nothing is built or trained, everything is looked up."""

from __future__ import annotations

import abc
import csv
import gzip
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import IO, NoReturn

import numpy as np
import numpy.typing as npt

from nas.errors import ContentError, SpaceError
from nas.space import Candidate, Choice, Genomes, SearchSpace, Site, TaskInfo, Training, Value

Array = npt.NDArray[np.float64]
FOLDER = "NAS_TABLES"
ORIGIN = "its publisher's page"
SAMPLE = 0.05  # a table with a smaller share of all combinations is read as a sample of them
CODE = 5  # characters: from here on a column among several is a string of digits and no number
CHUNK = 512  # rows compared with the whole table at a time
REFERENCES = 100_000


class PublishedSpace(SearchSpace):
    """A space whose qualities and costs are published: its own evaluator's table and its own cost estimator.

    A subclass sets ``choices`` and ``costs`` and implements :meth:`quality` and :meth:`price`; where choices can be
    dormant, :meth:`active` too. Its constructor takes the task (of which there is none: ``None``) and, among its
    settings, the ``folder`` of its files. It has neither models nor sites.

    Attributes:
        costs: names of the costs, as in :class:`~nas.latency.CostEstimator`.
        fidelities: shares of the full training at which qualities are published.
    """

    costs: tuple[str, ...]
    fidelities: tuple[float, ...] = (1.0,)
    sites: Mapping[str, Site] = MappingProxyType({})

    @abc.abstractmethod
    def quality(self, genomes: Genomes, fidelity: float = 1.0) -> Array:
        """Quality 0..1 of ``genomes [n, choices]`` at a share of the training, ``[n]``; NaN where it is not known."""

    @abc.abstractmethod
    def price(self, genomes: Genomes) -> Array:
        """Costs of ``genomes [n, choices]`` → ``[n, len(costs)]``; infinite where a candidate cannot be had."""

    def tests(self, genomes: Genomes) -> dict[str, Array]:
        """Further published columns by name, ``[n]`` each, which a search does not see: they judge its winner."""
        return {}

    def reference(self) -> Genomes:
        """Genomes whose costs the quantiles of a budget are taken of: here, uniform ones."""
        return self.sample(np.random.default_rng(0), REFERENCES)

    def active(self, genomes: Genomes) -> npt.NDArray[np.bool_]:
        """Nothing is known to be dormant."""
        return np.ones(np.atleast_2d(genomes).shape, dtype=bool)

    def build(self, candidate: Candidate) -> NoReturn:
        """There is no model.

        Raises:
            SpaceError: always.
        """
        raise SpaceError(f"Space {self.name!r} has no models: its qualities are published.")

    def training(self, candidate: Candidate) -> Training:
        """Nothing is trained."""
        return Training()


class TabularSpace(PublishedSpace):
    """A space from CSV files: genome columns become choices, the others qualities and costs.

    Columns are written ``FILE:COLUMN`` (.csv or .csv.gz). A genome column holds strings of digits (0-9, a-z), one
    choice each, all of one kind; of several columns, one whose values are short and no codes with leading zeros is a
    choice of its own, ordered where it is numeric. Files are joined on ``key``; without it on ``idx`` where both have
    it, else on the genome, else on their first column.

    A genome without quality, or without a finite positive value of every cost, cannot be had: its costs are infinite.
    So are those of a genome that the table lacks, unless the table holds less than a twentieth of the combinations:
    it is then read as a sample, and stands for the whole space by the nearest row (fewest genes that differ).

    Args:
        task: not used.
        quality: the quality, of the file that has the genome.
        genome: one or several column names.
        costs: name → column.
        fidelities: share of the full training, below 1 → column of the quality after it.
        report: name → column that judges the winner.
        scale: what qualities are divided by, to be shares of 1.
        key: column that all files are joined on.
        origin: where the files can be had, for the error where one is missing.
        folder: where the files lie, if neither here nor in ``$NAS_TABLES``.

    Raises:
        ContentError: a file or column is missing, or does not fit.
    """

    name = "tabular"

    def __init__(
        self,
        task: TaskInfo | None = None,
        *,
        quality: str,
        genome: str | list[str],
        costs: dict[str, str],
        fidelities: dict[float, str] | None = None,
        report: dict[str, str] | None = None,
        scale: float = 100.0,
        key: str | None = None,
        origin: str = ORIGIN,
        folder: str | None = None,
    ) -> None:
        names = [genome] if isinstance(genome, str) else list(genome)
        if not costs or not names:
            raise ContentError("A tabular space needs a genome column and a cost column.")
        table = Table.of(quality, folder, origin)
        rows = table.distinct(names)
        read = Columns(table, names, rows, key, folder, origin)
        genomes, self.choices, self._kinds = encode(table, names, rows)
        self.index = Index(genomes, np.array([len(choice.values) for choice in self.choices]))
        self._quality = {1.0: read(quality) / scale}
        self._quality |= {share: read(where) / scale for share, where in (fidelities or {}).items()}
        self._tests = {name: read(where) for name, where in (report or {}).items()}
        self.fidelities = tuple(sorted(self._quality))
        self.costs = tuple(costs)
        priced = np.column_stack([read(where) for where in costs.values()])
        known = np.isfinite(priced).all(axis=1) & (priced > 0).all(axis=1) & np.isfinite(self._quality[1.0])
        if not known.any():
            raise ContentError(f"{table.file}: no genome has a quality and finite, positive costs.")
        self._costs = np.where(known[:, None], priced, np.inf)

    @cached_property
    def kinds(self) -> npt.NDArray[np.int64]:
        """The digits of one column are of one kind."""
        return self._kinds

    def quality(self, genomes: Genomes, fidelity: float = 1.0) -> Array:
        """The published quality, over ``scale``."""
        near = [share for share in self.fidelities if abs(share - fidelity) < 1e-9]
        rows = self.index.rows(np.atleast_2d(genomes))
        return np.where(rows >= 0, self._quality[near[0]][rows], np.nan) if near else np.full(len(rows), np.nan)

    def price(self, genomes: Genomes) -> Array:
        """The published costs."""
        rows = self.index.rows(np.atleast_2d(genomes))
        return np.where(rows[:, None] >= 0, self._costs[rows], np.inf)

    def tests(self, genomes: Genomes) -> dict[str, Array]:
        """The columns of ``report``."""
        rows = self.index.rows(np.atleast_2d(genomes))
        return {name: np.where(rows >= 0, values[rows], np.nan) for name, values in self._tests.items()}

    def reference(self) -> Genomes:
        """The table's own genomes."""
        return self.index.genomes

    def canonical(self, genomes: Genomes) -> Genomes:
        """In a sample, the genome of the row that stands for it: equal rows have equal quality."""
        genomes = np.atleast_2d(genomes)
        return self.index.genomes[self.index.rows(genomes)] if self.index.sample else genomes


# ---- reading tables -------------------------------------------------------------------------------


class Index:
    """Finds genomes among those of a table.

    Args:
        genomes: ``[rows, choices]``, all different.
        cardinalities: ``[choices]``.

    Attributes:
        sample: whether a genome that the table lacks is answered with its nearest row.
    """

    def __init__(self, genomes: Genomes, cardinalities: Genomes) -> None:
        self.genomes, self.cardinalities = genomes, cardinalities
        self.sample = len(genomes) < SAMPLE * float(np.prod(cardinalities.astype(float)))
        # A linear hash modulo 2^64, sorted; a hit is compared with the genome itself.
        self._factors = np.random.default_rng(0).integers(1, 2**63 - 1, len(cardinalities), dtype=np.int64) | 1
        hashes = self._hash(genomes)
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]

    def rows(self, genomes: Genomes) -> Genomes:
        """Row for each of ``genomes [n, choices]``; −1 where it has none."""
        place = np.searchsorted(self._hashes, self._hash(genomes))
        found = self._order[np.minimum(place, len(self._hashes) - 1)]
        missing = (self.genomes[found] != genomes).any(axis=1)
        if not self.sample:
            return np.where(missing, -1, found)
        lost = np.flatnonzero(missing)
        for part in (lost[i : i + CHUNK] for i in range(0, len(lost), CHUNK)):
            found[part] = (self._one_hot(genomes[part]) @ self._known.T).argmax(axis=1)  # genes in common, counted
        return found

    @cached_property
    def _known(self) -> npt.NDArray[np.float32]:
        return self._one_hot(self.genomes)

    def _one_hot(self, genomes: Genomes) -> npt.NDArray[np.float32]:
        """``[n, Σ cardinalities]``."""
        ends = np.cumsum(self.cardinalities)
        found = np.zeros((len(genomes), int(ends[-1])), dtype=np.float32)
        np.put_along_axis(found, genomes + (ends - self.cardinalities), 1.0, axis=1)
        return found

    def _hash(self, genomes: Genomes) -> Genomes:
        return np.asarray((genomes * self._factors).sum(axis=1))


@dataclass(frozen=True)
class Table:
    """Columns of a file as text."""

    file: Path
    columns: dict[str, list[str]]

    @classmethod
    def of(cls, where: str, folder: str | None = None, origin: str = ORIGIN) -> Table:
        """The file of ``FILE:COLUMN``.

        Raises:
            ContentError: it is missing, empty, or no table.
        """
        name, colon, column = where.rpartition(":")
        if not colon or not column:
            raise ContentError(f"{where!r} names no column.", expected="FILE:COLUMN")
        file = find_table(name, origin, folder)
        with _open(file) as handle:
            rows = list(csv.reader(handle))
        if len(rows) < 2 or any(len(row) != len(rows[0]) for row in rows):
            raise ContentError(f"{file} is no table.", expected="a header and rows of one length, separated by commas")
        return cls(file, dict(zip(rows[0], map(list, zip(*rows[1:], strict=True)), strict=True)))

    def column(self, name: str) -> list[str]:
        """A column; raises ContentError."""
        if name not in self.columns:
            raise ContentError(f"{self.file} has no column {name!r}.", expected=f"one of {', '.join(self.columns)}")
        return self.columns[name]

    def keys(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        """The rows of some columns."""
        return list(zip(*(self.column(name) for name in names), strict=True))

    def distinct(self, names: Sequence[str]) -> list[int]:
        """Positions of the first row of every genome."""
        first: dict[tuple[str, ...], int] = {}
        for row, key in enumerate(self.keys(names)):
            first.setdefault(key, row)
        return list(first.values())


@dataclass(frozen=True)
class Columns:
    """Reads number columns, of the genome's own file or of others, in the order of its rows."""

    table: Table
    genome: Sequence[str]
    rows: Sequence[int]
    key: str | None = None
    folder: str | None = None
    origin: str = ORIGIN

    def __call__(self, where: str) -> Array:
        """``FILE:COLUMN`` → ``[rows]``; NaN where there is no number.

        Raises:
            ContentError: the file or column is missing, or shares no row.
        """
        other = Table.of(where, self.folder, self.origin)
        values = other.column(where.rpartition(":")[2])
        if other.file == self.table.file:
            return np.array([_number(values[row]) for row in self.rows])
        mine, theirs = self._joined_on(other)
        by_key = dict(zip(reversed(other.keys(theirs)), reversed(values), strict=True))
        own = self.table.keys(mine)
        found = [by_key.get(own[row]) for row in self.rows]
        if all(value is None for value in found):
            raise ContentError(f"{where} shares no row with {self.table.file}, joined on {', '.join(theirs)}.")
        return np.array([_number(value or "") for value in found])

    def _joined_on(self, other: Table) -> tuple[Sequence[str], Sequence[str]]:
        """The columns of either file that tell which rows belong together."""
        if self.key is not None:
            return [self.key], [self.key]
        if "idx" in self.table.columns and "idx" in other.columns:
            return ["idx"], ["idx"]
        if all(name in other.columns for name in self.genome):
            return self.genome, self.genome
        return [next(iter(self.table.columns))], [next(iter(other.columns))]


def encode(table: Table, names: Sequence[str], rows: Sequence[int]) -> tuple[Genomes, tuple[Choice, ...], Genomes]:
    """Genomes ``[rows, choices]``, choices (``gene3.COLUMN`` is the third digit of a column of digits), and kinds.

    Raises:
        ContentError: the codes in a column have different lengths.
    """
    genomes: list[list[int]] = []
    choices: list[Choice] = []
    kinds: list[int] = []
    for kind, name in enumerate(names):
        cells = [table.column(name)[row] for row in rows]
        digits = len(names) == 1 or _is_code(cells)
        if digits and len({len(cell) for cell in cells}) > 1:
            raise ContentError(f"{table.file}: the codes in {name!r} have different lengths.")
        genes = list(zip(*cells, strict=True)) if digits else [tuple(cells)]
        numeric = not digits and all(np.isfinite(_number(cell)) for cell in cells)
        seen = sorted({cell for gene in genes for cell in gene}, key=_number if numeric else str)
        place = {cell: i for i, cell in enumerate(seen)}
        values: list[Value] = [int(c) if c.isdecimal() else float(c) for c in seen] if numeric else list(seen)
        genomes += [[place[cell] for cell in gene] for gene in genes]
        choices += [
            Choice(f"gene{i}.{name}" if digits else name, values, ordered=numeric) for i in range(1, len(genes) + 1)
        ]
        kinds += [kind] * len(genes)
    return np.array(genomes, dtype=np.int64).T.copy(), tuple(choices), np.array(kinds, dtype=np.int64)


def _is_code(cells: list[str]) -> bool:
    """Whether a column among several holds strings of digits: of one length, and long or with leading zeros."""
    lengths = {len(cell) for cell in cells}
    if len(lengths) > 1 or not all(re.fullmatch("[0-9a-z]+", cell) for cell in cells):
        return False
    return max(lengths) >= CODE or (max(lengths) > 1 and any(cell.startswith("0") for cell in cells))


def _number(text: str) -> float:
    """A cell; NaN where it is empty or no number."""
    try:
        return float(text)
    except ValueError:
        return np.nan


def _open(file: Path) -> IO[str]:
    if file.suffix == ".gz":
        return gzip.open(file, "rt", newline="", encoding="utf-8")
    return file.open(newline="", encoding="utf-8")


def find_table(name: str | Path, origin: str, folder: str | Path | None = None) -> Path:
    """The file of a published table: a path, else a name in ``folder`` or in the folder ``$NAS_TABLES``.

    Args:
        origin: where it can be had, for the error.

    Raises:
        ContentError: it is nowhere; says which table to download and where to put it.
    """
    places = [
        Path(),
        *([Path(folder)] if folder else []),
        *([Path(os.environ[FOLDER])] if FOLDER in os.environ else []),
    ]
    for place in places:
        path = (place / name).expanduser()
        if path.is_file():
            return path
    raise ContentError(
        f"The published table {str(name)!r} is missing.",
        expected=f"the file itself, or one of this name in the folder that {FOLDER} names",
        remedy=f"download it ({origin}), put it into a folder, and set {FOLDER} to that folder",
    )
