"""Genes: named choices, candidates, and functions of a candidate enumerated over the genes that they read.

A function that reads genes only through the candidate can be tabulated: it is called with a partial candidate, the
first gene that it asks for and that is not fixed raises, and the enumeration branches over that gene's values. The
table gives its result for every genome, and says which genes were read to reach it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from nas.errors import SpaceError

Value = int | float | str | bool
Genomes = npt.NDArray[np.int64]
T = TypeVar("T")
MAX_TABLE_ENTRIES = 2_000_000
#: What a choice may belong to: searches one after the other, and reports, tell them apart.
TECHNIQUES = ("architecture", "pruning", "low_rank", "quantization", "clustering", "distillation")


@dataclass(frozen=True)
class Choice:
    """One named decision and the values that it may take.

    Args:
        name: unique name, dotted by convention (``stage1.depth``).
        values: the values, at least one, all different.
        ordered: whether neighbours in ``values`` are alike (numbers in rising order are, by default).
        plain: for a choice of compression, the value that means "not compressed"; None for any other choice.
        technique: what the choice belongs to, one of :data:`TECHNIQUES`.
    """

    name: str
    values: tuple[Value, ...]
    ordered: bool = field(default=False)
    plain: Value | None = field(default=None, kw_only=True)
    technique: str = field(default="architecture", kw_only=True)

    def __init__(
        self, name: str, values: Iterable[Value], ordered: bool | None = None, *, plain: Value | None = None,
        technique: str = "architecture",
    ) -> None:  # fmt: skip
        values = tuple(values)
        if not values:
            raise SpaceError(f"Choice {name!r} has no values.", expected="at least one value")
        if len(set(values)) != len(values):
            raise SpaceError(f"Choice {name!r} repeats a value: {list(values)}.", expected="distinct values")
        if plain is not None and plain not in values:
            raise SpaceError(
                f"Choice {name!r} has the plain value {plain!r}, which is none of {list(values)}.",
                expected="one of the values, or none",
            )
        if ordered is None:
            numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
            ordered = numeric and list(values) in (sorted(values), sorted(values, reverse=True))
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "ordered", ordered)
        if technique not in TECHNIQUES:
            raise SpaceError(
                f"Choice {name!r} belongs to {technique!r}.", expected=f"one of {', '.join(TECHNIQUES)}"
            )
        object.__setattr__(self, "plain", plain)
        object.__setattr__(self, "technique", technique)

    def index(self, value: Value) -> int:
        """Position of ``value``; raises SpaceError where it is not one of the values."""
        try:
            return self.values.index(value)
        except ValueError:
            raise SpaceError(
                f"{value!r} is no value of choice {self.name!r}.", expected=f"one of {list(self.values)}"
            ) from None


class _Unfixed(Exception):
    """A function asked for a gene that the partial candidate does not fix yet."""

    def __init__(self, name: str) -> None:
        self.name = name


class Candidate(Mapping[str, Value]):
    """One value per choice; remembers, in ``reads``, which choices were looked at."""

    def __init__(self, values: Mapping[str, Value], *, partial: bool = False) -> None:
        self._values = dict(values)
        self._partial = partial
        self.reads: dict[str, None] = {}

    def __getitem__(self, name: str) -> Value:
        if name not in self._values:
            if self._partial:
                raise _Unfixed(name)
            raise SpaceError(f"The candidate has no choice {name!r}.", expected=f"one of {list(self._values)}")
        self.reads[name] = None
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Candidate({self._values})"

    def as_dict(self) -> dict[str, Value]:
        """A plain copy; does not count as reading."""
        return dict(self._values)

    def replace(self, **values: Value) -> Candidate:
        """A copy with some values changed; dots in names are written as double underscores."""
        changed = {name.replace("__", "."): value for name, value in values.items()}
        return Candidate({**self._values, **changed})


@dataclass(frozen=True)
class Compiled(Generic[T]):
    """A function of the candidate as a table over the genes that it reads.

    Attributes:
        genes: columns of the genome that the function reads, on any path.
        strides: entry of a genome row = ``genome[genes] @ strides``.
        values: what the function returns, for every entry.
        reads: ``[entries, genes]`` bool, which of ``genes`` the function really read to reach that entry.
    """

    genes: npt.NDArray[np.intp]
    strides: npt.NDArray[np.int64]
    values: tuple[T, ...]
    reads: npt.NDArray[np.bool_]

    def entries(self, genomes: Genomes) -> npt.NDArray[np.int64]:
        """Entry index of every row of ``genomes [n, choices]``."""
        return np.asarray(genomes[:, self.genes] @ self.strides)


def enumerated(name: str, function: Callable[[Candidate], T], choices: Sequence[Choice]) -> Compiled[T]:
    """``function`` as a table over the genes that it reads; ``name`` is for messages.

    Raises:
        SpaceError: it reads what is no choice, or more combinations than :data:`MAX_TABLE_ENTRIES`.
    """
    position = {choice.name: column for column, choice in enumerate(choices)}
    found: set[int] = set()  # columns read on any path so far
    leaves: list[tuple[dict[int, int], T, frozenset[int]]] = []

    def visit(fixed: dict[int, int]) -> None:
        candidate = Candidate({choices[g].name: choices[g].values[i] for g, i in fixed.items()}, partial=True)
        try:
            result = function(candidate)
        except _Unfixed as unfixed:
            gene = position.get(unfixed.name)
            if gene is None:
                raise SpaceError(
                    f"{name} reads {unfixed.name!r}, which is no choice.",
                    expected=f"one of {list(position)}",
                ) from None
            found.add(gene)
            _require_small(name, [len(choices[g].values) for g in found])
            for i in range(len(choices[gene].values)):
                visit({**fixed, gene: i})
            return
        leaves.append((fixed, result, frozenset(position[read] for read in candidate.reads)))

    visit({})
    genes = sorted(found)
    shape = [len(choices[g].values) for g in genes]
    leaf = np.zeros(shape, dtype=np.intp)
    for i, (fixed, _, _) in enumerate(leaves):
        leaf[tuple(fixed.get(g, slice(None)) for g in genes)] = i
    reads = np.array([[g in read for g in genes] for _, _, read in leaves], dtype=bool)
    return Compiled(
        np.array(genes, dtype=np.intp),
        strides_of(shape),
        tuple(leaves[i][1] for i in leaf.ravel()),
        reads[leaf.ravel()],
    )


def _require_small(name: str, shape: list[int]) -> None:
    if math.prod(shape) > MAX_TABLE_ENTRIES:
        raise SpaceError(
            f"{name} reads {len(shape)} choices or more, {math.prod(shape)} combinations.",
            expected=f"at most {MAX_TABLE_ENTRIES}",
            remedy="split it into several that each read fewer choices",
        )


def strides_of(shape: Sequence[int]) -> npt.NDArray[np.int64]:
    """Of a table in row-major order."""
    return np.array([math.prod(shape[i + 1 :]) for i in range(len(shape))], dtype=np.int64)


class Dormancy:
    """Which genes of a genome are read by any of some compiled functions; the others are dormant.

    Most genes are read whatever the rest is. For every other gene the tables are boiled down to its *conditions*:
    small boolean tables over the few genes that decide whether it is read. All conditions of a batch are looked up
    in one flat array at once, so that their number costs little.

    Args:
        compiled: the functions.
        cardinalities: values per choice, ``[choices]``.

    Attributes:
        always: mask of the genes that are read whatever the others are, ``[choices]``.
    """

    def __init__(self, compiled: Iterable[Compiled[Any]], cardinalities: npt.NDArray[np.int64]) -> None:
        self.always, conditions = _conditions(compiled, cardinalities)
        decided_by = max((len(deciding) for _, deciding in conditions), default=0)
        self._deciding = np.zeros((decided_by, len(conditions)), dtype=np.intp)  # padded with stride 0
        self._strides = np.zeros((decided_by, len(conditions), 1), dtype=np.int64)
        for row, (_, deciding) in enumerate(conditions):
            self._deciding[: len(deciding), row] = deciding
            self._strides[: len(deciding), row, 0] = strides_of(cardinalities[list(deciding)].tolist())
        tables = [table.ravel() for table in conditions.values()]
        self._holds = np.concatenate([np.zeros(0, dtype=bool), *tables])
        sizes = np.array([0, *(len(table) for table in tables)], dtype=np.int64)
        self._offsets = np.cumsum(sizes)[:-1, None]
        # A gene may have several conditions, which lie side by side: it is read where any of them holds.
        self._genes, self._first = np.unique(np.array([gene for gene, _ in conditions], np.intp), return_index=True)

    def active(self, genomes: Genomes) -> npt.NDArray[np.bool_]:
        """Mask of the genes that are read, ``[n, choices]`` for ``genomes [n, choices]``."""
        mask = np.repeat(self.always[None], len(genomes), axis=0)
        if len(self._genes):
            columns, entries = genomes.T, self._offsets
            for deciding, strides in zip(self._deciding, self._strides, strict=True):
                entries = entries + columns[deciding] * strides
            mask[:, self._genes] = np.logical_or.reduceat(self._holds[entries], self._first, axis=0).T
        return mask


Conditions = dict[tuple[int, tuple[int, ...]], npt.NDArray[np.bool_]]


def _conditions(
    compiled: Iterable[Compiled[Any]], cardinalities: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.bool_], Conditions]:
    """Mask of the genes that are always read, and for the others (gene, genes that decide) → table, by gene."""
    always = np.zeros(len(cardinalities), dtype=bool)
    found: Conditions = {}
    for function in compiled:
        shape = cardinalities[function.genes]
        for column, gene in enumerate(function.genes.tolist()):
            if always[gene]:
                continue
            deciding, table = deciding_genes(function.genes.tolist(), function.reads[:, column].reshape(shape))
            table = found[gene, deciding] = found.get((gene, deciding), np.False_) | table
            always[gene] = table.all()
    return always, {key: found[key] for key in sorted(found) if not always[key[0]]}


def deciding_genes(genes: list[int], table: npt.NDArray[np.bool_]) -> tuple[tuple[int, ...], npt.NDArray[np.bool_]]:
    """The genes that make a difference to ``table``, which has one axis per gene, and the table over those alone."""
    kept: list[int] = []
    for gene in genes:
        axis = len(kept)
        first = table.take([0], axis=axis)
        if (table == first).all():
            table = first.squeeze(axis)
        else:
            kept.append(gene)
    return tuple(kept), table
