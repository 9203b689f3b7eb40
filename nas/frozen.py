"""A space in which some choices are fixed: searched is the rest, trained and priced are whole candidates.

For searches one after the other (architecture first, then bits), and wherever a part of a space is to be searched by
itself. Identities are those of the whole space, so what was trained in one view of it is known in every other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import numpy as np
from torch import nn

from nas.errors import SpaceError
from nas.genes import Candidate, Genomes, Value
from nas.space import SearchSpace, Training

T = TypeVar("T")


class Frozen(SearchSpace):
    """The members of ``space`` whose ``fixed`` choices have these values; its choices are the others.

    Args:
        space: the whole space.
        fixed: choice → its value.

    Attributes:
        free: columns of the whole space's genome that are choices here, ``[choices]``.

    Raises:
        SpaceError: an unknown choice or value is fixed, or nothing is left to choose.
    """

    def __init__(self, space: SearchSpace, fixed: Mapping[str, Value]) -> None:
        columns = space.encode_partly(fixed)
        self.space, self.fixed = space, dict(fixed)
        self.name = space.name  # type: ignore[misc]
        self.free = np.array([i for i in range(len(space.choices)) if i not in columns], dtype=np.intp)
        if not len(self.free):
            raise SpaceError(
                f"Every choice of space {space.name!r} is fixed.", expected="at least one that is left to a search"
            )
        self._whole = np.zeros(len(space.choices), dtype=np.int64)
        self._whole[list(columns)] = list(columns.values())
        self.choices = tuple(space.choices[i] for i in self.free)
        self.sites = {name: partial(_of_whole, site, self.fixed) for name, site in space.sites.items()}
        self.treatments = {name: partial(_of_whole, t, self.fixed) for name, t in space.treatments.items()}
        self.recipe = (Frozen, (space, self.fixed))

    # ---- between this view and the whole space -------------------------------------------------

    def widen(self, genomes: Genomes) -> Genomes:
        """Genomes ``[n, choices]`` of this view as genomes of the whole space; a single row stays one."""
        genomes = np.asarray(genomes, dtype=np.int64)
        whole = np.broadcast_to(self._whole, (*genomes.shape[:-1], len(self._whole))).copy()
        whole[..., self.free] = genomes
        return whole

    def narrow(self, genomes: Genomes) -> Genomes:
        """The free genes of genomes of the whole space, whatever their other genes are."""
        return np.asarray(genomes, dtype=np.int64)[..., self.free]

    def complete(self, candidate: Mapping[str, Value]) -> Candidate:
        """The whole candidate; what is read of it through this view counts as read there, what is fixed does not."""
        return _Completed(candidate, self.fixed)

    # ---- the projections, those of the whole candidate -------------------------------------------

    def build(self, candidate: Candidate) -> nn.Module:
        return self.space.build(self.complete(candidate))

    def training(self, candidate: Candidate) -> Training:
        return self.space.training(self.complete(candidate))

    @property
    def _traced(self) -> bool:
        return self.space._traced

    def ladder(self) -> list[Candidate]:
        """The whole space's ladder with the fixed values in the place of its own."""
        return self._members(self.space.ladder())

    def uniform(self) -> list[Candidate]:
        """The whole space's uniform members with the fixed values in the place of their own."""
        return self._members(self.space.uniform())

    def _members(self, members: list[Candidate]) -> list[Candidate]:
        rows = {tuple(self.narrow(self.space.encode(member)).tolist()): None for member in members}
        return [self.decode(row) for row in rows]

    def canonical_ids(self, genomes: Genomes) -> list[str]:
        """Those of the whole candidates: equal here and in every other view exactly where the quality is."""
        return self.space.canonical_ids(self.widen(np.atleast_2d(genomes)))


class _Completed(Candidate):
    """A candidate of a view with the fixed values beside it; may be partial, as enumerations need it."""

    def __init__(self, free: Mapping[str, Value], fixed: Mapping[str, Value]) -> None:
        super().__init__(fixed)
        self._free = free

    def __getitem__(self, name: str) -> Value:
        return self._values[name] if name in self._values else self._free[name]

    def __contains__(self, name: object) -> bool:
        return name in self._values or name in self._free

    def __iter__(self) -> Iterator[str]:
        return iter([*self._free, *self._values])

    def __len__(self) -> int:
        return len(self._free) + len(self._values)

    def __repr__(self) -> str:
        return f"Candidate({self.as_dict()})"

    def as_dict(self) -> dict[str, Value]:
        free = self._free.as_dict() if isinstance(self._free, Candidate) else dict(self._free)
        return {**free, **self._values}

    def replace(self, **values: Value) -> Candidate:
        return Candidate(self.as_dict()).replace(**values)


def _of_whole(function: Callable[[Candidate], T], fixed: Mapping[str, Any], candidate: Candidate) -> T:
    """A site or treatment of the whole space on a candidate of the view."""
    return function(_Completed(candidate, fixed))
