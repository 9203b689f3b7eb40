"""Search spaces: named choices, candidates, and the two projections (what is trained, what it costs).

A *genome* is a row of small integers, one index per choice; a *candidate* is the mapping of names to
values that people read. A space describes what a candidate costs by *sites*: functions from a candidate
to the parts that the runtime will execute. Sites read genes through a recording candidate, and from those
reads come the dormant genes, the canonical form of a genome, and the compiled estimator.
"""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from nas.errors import SpaceError
from nas.parts import Part

if TYPE_CHECKING:
    from torch import nn

Value = int | float | str | bool
Genomes = npt.NDArray[np.int64]
MAX_TABLE_ENTRIES = 2_000_000


@dataclass(frozen=True)
class Choice:
    """One named decision and the values that it may take.

    Args:
        name: unique name, dotted by convention (``stage1.depth``).
        values: the values, at least one, all different.
        ordered: whether neighbours in ``values`` are alike (numbers in rising order are, by default).
    """

    name: str
    values: tuple[Value, ...]
    ordered: bool = field(default=False)

    def __init__(self, name: str, values: Iterable[Value], ordered: bool | None = None) -> None:
        values = tuple(values)
        if not values:
            raise SpaceError(f"Choice {name!r} has no values.", expected="at least one value")
        if len(set(values)) != len(values):
            raise SpaceError(f"Choice {name!r} repeats a value: {list(values)}.", expected="distinct values")
        if ordered is None:
            numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
            ordered = numeric and list(values) in (sorted(values), sorted(values, reverse=True))
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "ordered", ordered)

    def index(self, value: Value) -> int:
        """Position of ``value``; raises SpaceError where it is not one of the values."""
        try:
            return self.values.index(value)
        except ValueError:
            raise SpaceError(
                f"{value!r} is no value of choice {self.name!r}.", expected=f"one of {list(self.values)}"
            ) from None


class _Unfixed(Exception):
    """A site asked for a gene that the partial candidate does not fix yet."""

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


Site = Callable[[Candidate], "Part | Iterable[Part] | None"]


@dataclass(frozen=True)
class CompiledSite:
    """A site enumerated over the genes that it reads.

    Attributes:
        genes: columns of the genome that the site reads, on any path.
        strides: entry of a genome row = ``genome[genes] @ strides``.
        parts: the parts of every entry.
        reads: ``[entries, genes]`` bool, which of ``genes`` the site really read to reach that entry.
    """

    name: str
    genes: npt.NDArray[np.intp]
    strides: npt.NDArray[np.int64]
    parts: tuple[tuple[Part, ...], ...]
    reads: npt.NDArray[np.bool_]

    def entries(self, genomes: Genomes) -> npt.NDArray[np.int64]:
        """Entry index of every row of ``genomes [n, choices]``."""
        index = np.zeros(len(genomes), dtype=np.int64)
        for gene, stride in zip(self.genes, self.strides, strict=True):
            index += genomes[:, gene] * stride
        return index


@dataclass(frozen=True)
class TaskInfo:
    """What a space must know of the data: shapes and preprocessing, never the data themselves.

    Attributes:
        input_shape: shape of one raw sample, ``(channels, height, width)`` for images.
        classes: number of classes.
        mean, std: per-channel statistics of the training split, in raw units.
        value_range: smallest and largest raw value.
    """

    input_shape: tuple[int, ...]
    classes: int
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    value_range: tuple[float, float] = (0.0, 1.0)


@dataclass(frozen=True)
class Training:
    """How a candidate is trained and compressed; the part of the genome that the weights feel.

    Attributes:
        kd_weight: weight of the teacher's soft targets, 0..1 (the rest is cross-entropy).
        temperature: softmax temperature of the distillation.
        compression: pass name → its settings for this candidate, applied in this order before the last epochs.
    """

    kd_weight: float = 0.0
    temperature: float = 1.0
    compression: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class SearchSpace(abc.ABC):
    """A family of models and the compression choices that go with them.

    A subclass sets ``choices`` and ``sites`` in its constructor and implements :meth:`build` and
    :meth:`training`. Both read every gene that they depend on through the candidate. The contract, which
    ``nas.testing.check_space`` tests: what ``build`` and ``training`` read is read by a site or by
    ``training``; the parts' MACs and parameters equal those of the exported, compressed model.
    """

    name: ClassVar[str] = "space"
    choices: tuple[Choice, ...]
    sites: Mapping[str, Site]
    #: How to make this space again in another process: a function and its arguments; set by whoever loads it.
    recipe: tuple[Callable[..., SearchSpace], tuple[Any, ...]] | None = None

    def __reduce__(self) -> Any:
        # Sites are closures, and classes of content files are known to no other process.
        return super().__reduce__() if self.recipe is None else self.recipe

    @abc.abstractmethod
    def build(self, candidate: Candidate) -> nn.Module:
        """The module to train: raw input ``[n, *input_shape]`` → logits ``[n, classes]``, not yet compressed."""

    @abc.abstractmethod
    def training(self, candidate: Candidate) -> Training:
        """Distillation settings and the compression passes of ``candidate``."""

    def ladder(self) -> list[Candidate]:
        """Uniform, uncompressed members from smallest to largest: the teachers on offer.

        The default sets every ordered choice to the same relative level; spaces override it where some
        choices (bits, pruning) mean compression.
        """
        raise SpaceError(f"Space {self.name!r} offers no ladder of teachers.", remedy="set teacher.model")

    def uniform(self) -> list[Candidate]:
        """Uniformly compressed members: the cheap baseline that a search must beat."""
        return self.ladder()

    # ---- genomes and candidates -------------------------------------------------------------

    @cached_property
    def cardinalities(self) -> npt.NDArray[np.int64]:
        """Number of values of each choice, ``[choices]``."""
        return np.array([len(choice.values) for choice in self.choices], dtype=np.int64)

    @cached_property
    def kinds(self) -> npt.NDArray[np.int64]:
        """Choices of one kind take the same values in the same role, told by the last part of the name: equal
        numbers, ``[choices]``."""
        roles = [(choice.name.rpartition(".")[2], choice.values) for choice in self.choices]
        return np.array([roles.index(role) for role in roles], dtype=np.int64)

    @cached_property
    def position(self) -> dict[str, int]:
        """Column of each choice in a genome."""
        return {choice.name: i for i, choice in enumerate(self.choices)}

    @property
    def size(self) -> int:
        """Number of genomes, dormant genes counted."""
        return int(np.prod([int(c) for c in self.cardinalities], dtype=object))

    def decode(self, genome: Sequence[int] | npt.NDArray[np.integer[Any]]) -> Candidate:
        """Candidate of one genome row; raises SpaceError where it is not one of this space."""
        genome = np.asarray(genome)
        if genome.shape != (len(self.choices),):
            raise SpaceError(f"Genome of shape {genome.shape}.", expected=f"{len(self.choices)} genes")
        if (genome < 0).any() or (genome >= self.cardinalities).any():
            bad = int(np.flatnonzero((genome < 0) | (genome >= self.cardinalities))[0])
            raise SpaceError(
                f"Gene {self.choices[bad].name!r} is {int(genome[bad])}.",
                expected=f"0..{int(self.cardinalities[bad]) - 1}",
            )
        return Candidate({c.name: c.values[int(g)] for c, g in zip(self.choices, genome, strict=True)})

    def encode(self, candidate: Mapping[str, Value]) -> Genomes:
        """Genome row ``[choices]`` of a candidate; raises SpaceError for unknown or missing choices."""
        values = candidate.as_dict() if isinstance(candidate, Candidate) else dict(candidate)
        unknown = sorted(set(values) - set(self.position))
        missing = [c.name for c in self.choices if c.name not in values]
        if unknown or missing:
            raise SpaceError(
                f"The candidate does not fit space {self.name!r}: unknown {unknown}, missing {missing}.",
                expected=f"a value for each of {[c.name for c in self.choices]}",
            )
        return np.array([c.index(values[c.name]) for c in self.choices], dtype=np.int64)

    def encode_partly(self, candidate: Mapping[str, Value]) -> dict[int, int]:
        """Gene → value index of the choices that are named; raises SpaceError for unknown choices and values."""
        if unknown := sorted(set(candidate) - set(self.position)):
            raise SpaceError(
                f"Space {self.name!r} has no choice {unknown[0]!r}.", expected=f"some of {list(self.position)}"
            )
        return {self.position[name]: self.choices[self.position[name]].index(v) for name, v in candidate.items()}

    def sample(self, rng: np.random.Generator, n: int) -> Genomes:
        """``n`` uniform genomes, ``[n, choices]``."""
        return rng.integers(0, self.cardinalities, size=(n, len(self.choices)), dtype=np.int64)

    # ---- the cost projection ------------------------------------------------------------------

    def parts(self, candidate: Candidate) -> list[Part]:
        """All parts that the runtime executes for ``candidate``, site by site."""
        return [part for site in self.sites.values() for part in _as_parts(site(candidate))]

    @cached_property
    def compiled(self) -> tuple[CompiledSite, ...]:
        """Every site enumerated over the genes it reads."""
        return tuple(self._compile(name, site) for name, site in self.sites.items())

    def keys(self) -> dict[str, Part]:
        """Every distinct latency-table key of the space and a part that has it."""
        found: dict[str, Part] = {}
        for site in self.compiled:
            for parts in site.parts:
                for part in parts:
                    found.setdefault(part.key, part)
        return found

    def _compile(self, name: str, site: Site) -> CompiledSite:
        leaves: list[tuple[dict[str, int], tuple[Part, ...], tuple[str, ...]]] = []

        def visit(fixed: dict[str, int]) -> None:
            values = {n: self.choices[self.position[n]].values[i] for n, i in fixed.items()}
            candidate = Candidate(values, partial=True)
            try:
                parts = tuple(_as_parts(site(candidate)))
            except _Unfixed as unfixed:
                if unfixed.name not in self.position:
                    raise SpaceError(
                        f"Site {name!r} reads {unfixed.name!r}, which is no choice of space {self.name!r}.",
                        expected=f"one of {list(self.position)}",
                    ) from None
                for i in range(len(self.choices[self.position[unfixed.name]].values)):
                    visit({**fixed, unfixed.name: i})
                return
            leaves.append((fixed, parts, tuple(candidate.reads)))

        visit({})
        genes = sorted({self.position[g] for fixed, _, _ in leaves for g in fixed})
        shape = [int(self.cardinalities[g]) for g in genes]
        size = int(np.prod(shape, dtype=object)) if shape else 1
        if size > MAX_TABLE_ENTRIES:
            raise SpaceError(
                f"Site {name!r} reads {len(genes)} choices, {size} combinations.",
                expected=f"at most {MAX_TABLE_ENTRIES}",
                remedy="split the site into several that each read fewer choices",
            )
        strides = [int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape))]
        grid = np.arange(size).reshape(shape) if shape else np.arange(1).reshape(())
        parts_of: list[tuple[Part, ...]] = [()] * size
        reads = np.zeros((size, len(genes)), dtype=bool)
        for fixed, parts, read in leaves:
            where = tuple(fixed.get(self.choices[g].name, slice(None)) for g in genes)
            read_mask = [self.choices[g].name in read for g in genes]
            for entry in np.atleast_1d(grid[where]).ravel():
                parts_of[int(entry)] = parts
                reads[int(entry)] = read_mask
        return CompiledSite(
            name, np.array(genes, dtype=np.intp), np.array(strides, dtype=np.int64), tuple(parts_of), reads
        )

    # ---- dormancy and identity ------------------------------------------------------------------

    def active(self, genomes: Genomes) -> npt.NDArray[np.bool_]:
        """Which genes are read by a site or by the training, ``[n, choices]``; the others are dormant."""
        genomes = np.atleast_2d(genomes)
        mask = np.zeros(genomes.shape, dtype=bool)
        for site in self.compiled:
            if len(site.genes):
                mask[:, site.genes] |= site.reads[site.entries(genomes)]
        # Training reads most genes at once, so it cannot be enumerated as sites are: it is run and watched.
        for row, genome in zip(mask, genomes, strict=True):
            candidate = self.decode(genome)
            self.training(candidate)
            row[[self.position[name] for name in candidate.reads]] = True
        return mask

    def canonical(self, genomes: Genomes) -> Genomes:
        """The genomes with every dormant gene at its first value: equal rows mean equal models."""
        genomes = np.atleast_2d(genomes)
        return np.where(self.active(genomes), genomes, 0)

    def canonical_id(self, genome: Genomes) -> str:
        """Short hash that two genomes share exactly where they have the same quality."""
        row = self.canonical(genome)[0].astype(np.uint16)
        return hashlib.sha256(row.tobytes()).hexdigest()[:12]


def _as_parts(result: Part | Iterable[Part] | None) -> list[Part]:
    if result is None:
        return []
    return [result] if isinstance(result, Part) else list(result)
