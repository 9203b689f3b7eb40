"""Search spaces: named choices and a candidate's two projections, what is trained and what it costs.

A *genome* is a row of small integers, one index per choice; a *candidate* is the mapping of names to
values that people read. A space describes what a candidate costs by *sites*, functions from a candidate
to the parts that the runtime will execute, and how it is taught and compressed by *treatments*. Both read
genes through a recording candidate, and from those reads come the dormant genes, the canonical form of a
genome, and the compiled estimator.
"""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from nas.errors import SpaceError
from nas.genes import Candidate, Choice, Compiled, Dormancy, Genomes, Value, enumerated
from nas.parts import Part

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Candidate", "Choice", "Genomes", "SearchSpace", "Site", "TaskInfo", "Training", "Treatment", "Value"]


@dataclass(frozen=True)
class TaskInfo:
    """What a space must know of the data: shapes and preprocessing, never the data themselves.

    Attributes:
        input_shape: shape of one raw sample, ``(channels, height, width)`` for images.
        classes: number of classes.
        mean, std: per-channel statistics of the training split, in raw units.
        value_range: smallest and largest raw value.
        dtype: of a raw sample: ``float32``, or ``int64`` for the numbers of tokens.
    """

    input_shape: tuple[int, ...]
    classes: int
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    value_range: tuple[float, float] = (0.0, 1.0)
    dtype: str = "float32"

    def random(self, n: int, seed: int = 0) -> torch.Tensor:
        """``n`` raw samples ``[n, *input_shape]`` by chance, evenly over the range of values."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        low, high = self.value_range
        if self.dtype == "int64":
            return torch.randint(int(low), int(high) + 1, (n, *self.input_shape), generator=generator)
        return low + (high - low) * torch.rand((n, *self.input_shape), generator=generator)


@dataclass(frozen=True)
class Training:
    """How a candidate is trained and compressed; the part of the genome that the weights feel.

    Attributes:
        kd_weight: weight of the teacher's soft targets, 0..1 (the rest is cross-entropy).
        temperature: softmax temperature of the distillation.
        compression: pass name → its settings for this candidate, applied in this order before the last epochs.
        feature_weight: weight of the distance to the teacher's intermediate features, 0 or more.
        attention_weight: weight of the distance to the teacher's attention maps, 0 or more.
    """

    kd_weight: float = 0.0
    temperature: float = 1.0
    compression: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    feature_weight: float = 0.0
    attention_weight: float = 0.0


Site = Callable[[Candidate], "Part | Iterable[Part] | None"]
Treatment = Callable[[Candidate], "Training | None"]


class SearchSpace(abc.ABC):
    """A family of models and the compression choices that go with them.

    A subclass sets ``choices``, ``sites`` and ``treatments`` in its constructor and implements :meth:`build`. All of
    them read every gene that they depend on through the candidate. The contract, which ``nas.testing.check_space``
    tests: what ``build`` reads is read by a site or by ``training``; the parts' MACs and parameters equal those of
    the exported, compressed model.

    Attributes:
        sites: name → function from a candidate to the parts that the runtime executes.
        treatments: name → function from a candidate to a partial :class:`Training`, or to None. Each should read few
            genes, because it is enumerated over them as a site is. Their order is that of :meth:`training`.
    """

    name: ClassVar[str] = "space"
    choices: tuple[Choice, ...]
    sites: Mapping[str, Site]
    treatments: Mapping[str, Treatment] = MappingProxyType({})
    #: How to make this space again in another process: a function and its arguments; set by whoever loads it.
    recipe: tuple[Callable[..., SearchSpace], tuple[Any, ...]] | None = None

    def __reduce__(self) -> Any:
        # Sites are closures, and classes of content files are known to no other process.
        return super().__reduce__() if self.recipe is None else self.recipe

    @abc.abstractmethod
    def build(self, candidate: Candidate) -> nn.Module:
        """The module to train: raw input ``[n, *input_shape]`` → logits ``[n, classes]``, not yet compressed."""

    def training(self, candidate: Candidate) -> Training:
        """Distillation settings and the compression passes of ``candidate``: its treatments, merged.

        Passes, and what each is asked for, come in the order in which the treatments first name them. A space may
        override this method instead of giving treatments; then it is run for every genome that is looked at, which
        costs the search some hundred microseconds a candidate.

        Raises:
            SpaceError: two treatments set one thing to different values.
        """
        results = {name: treatment(candidate) for name, treatment in self.treatments.items()}
        return _merged({name: training for name, training in results.items() if training is not None})

    def ladder(self) -> list[Candidate]:
        """Uniform, uncompressed members from smallest to largest: the teachers on offer.

        The default sets every ordered choice to the same relative level; spaces override it where some
        choices (bits, pruning) mean compression.
        """
        raise SpaceError(f"Space {self.name!r} offers no ladder of teachers.", remedy="set teacher.model")

    def uniform(self) -> list[Candidate]:
        """Uniformly compressed members: the cheap baseline that a search must beat."""
        return self.ladder()

    def remarks(self) -> list[str]:
        """What a user should know of this space before it is searched, a line each (default: nothing)."""
        return []

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
        return [part for site in self.sites.values() for part in _parts(site, candidate)]

    @cached_property
    def compiled(self) -> tuple[Compiled[tuple[Part, ...]], ...]:
        """Every site enumerated over the genes it reads."""
        return tuple(
            enumerated(f"Site {name!r} of space {self.name!r}", partial(_parts, site), self.choices)
            for name, site in self.sites.items()
        )

    def keys(self) -> dict[str, Part]:
        """Every distinct latency-table key of the space and a part that has it."""
        found: dict[str, Part] = {}
        for site in self.compiled:
            for parts in site.values:
                for part in parts:
                    found.setdefault(part.key, part)
        return found

    # ---- dormancy and identity ------------------------------------------------------------------

    @cached_property
    def _dormancy(self) -> Dormancy:
        treatments = () if self._traced else self.treatments.items()
        compiled = [
            enumerated(f"Treatment {name!r} of space {self.name!r}", treatment, self.choices)
            for name, treatment in treatments
        ]
        return Dormancy([*self.compiled, *compiled], self.cardinalities)

    @property
    def _traced(self) -> bool:
        """Whether ``training`` is the space's own, of which nothing is known but what it reads when it is run."""
        return getattr(self.training, "__func__", None) is not SearchSpace.training

    def active(self, genomes: Genomes) -> npt.NDArray[np.bool_]:
        """Which genes are read by a site or by the training, ``[n, choices]``; the others are dormant.

        Raises:
            SpaceError: a row is no genome of this space.
        """
        genomes = np.atleast_2d(genomes)
        outside = (genomes < 0) | (genomes >= self.cardinalities)
        if outside.any():
            self.decode(genomes[outside.any(axis=1).argmax()])
        mask = self._dormancy.active(genomes)
        if self._traced:
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
        return self.canonical_ids(genome)[0]

    def canonical_ids(self, genomes: Genomes) -> list[str]:
        """:meth:`canonical_id` of every row of ``genomes [n, choices]``."""
        return [hashlib.sha256(row.tobytes()).hexdigest()[:12] for row in self.canonical(genomes).astype(np.uint16)]


def _parts(site: Site, candidate: Candidate) -> tuple[Part, ...]:
    result = site(candidate)
    if result is None:
        return ()
    return (result,) if isinstance(result, Part) else tuple(result)


def _merged(trainings: Mapping[str, Training]) -> Training:
    """One training of the partial ones that treatments gave, by name; a default value sets nothing."""
    distillation: dict[str, float] = {}
    compression: dict[str, dict[str, Any]] = {}
    for name, training in trainings.items():
        for what in ("kd_weight", "temperature", "feature_weight", "attention_weight"):
            value = getattr(training, what)
            if value != getattr(Training, what):
                _set(distillation, what, value, name)
        for technique, settings in training.compression.items():
            merged = compression.setdefault(technique, {})
            for layer, setting in settings.items():
                _set(merged, layer, setting, name)
    return Training(**distillation, compression=compression)


def _set(settings: dict[str, Any], what: str, value: Any, treatment: str) -> None:
    if settings.setdefault(what, value) != value:
        raise SpaceError(
            f"Treatment {treatment!r} sets {what} to {value!r}, an earlier one to {settings[what]!r}.",
            remedy="let one treatment decide it",
        )
