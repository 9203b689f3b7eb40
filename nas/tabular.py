"""Published qualities and costs as search spaces: nothing is built or trained, everything is looked up."""

from __future__ import annotations

import abc
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from nas.errors import ContentError, SpaceError
from nas.space import Candidate, Genomes, SearchSpace, Site, Training

Array = npt.NDArray[np.float64]
FOLDER = "NAS_TABLES"


class PublishedSpace(SearchSpace):
    """A space whose qualities and costs are published: its own evaluator's table and its own cost estimator.

    A subclass sets ``choices`` and ``costs`` and implements :meth:`quality` and :meth:`price`; where choices can be
    dormant, :meth:`active` too. It has neither models nor sites.

    Attributes:
        costs: names of the costs, as in :class:`~nas.latency.CostEstimator`.
    """

    costs: tuple[str, ...]
    sites: Mapping[str, Site] = MappingProxyType({})

    @abc.abstractmethod
    def quality(self, genomes: Genomes, fidelity: float = 1.0) -> Array:
        """Quality of ``genomes [n, choices]`` at a share of the full training, ``[n]``; NaN where it is not known."""

    @abc.abstractmethod
    def price(self, genomes: Genomes) -> Array:
        """Costs of ``genomes [n, choices]`` → ``[n, len(costs)]``; infinite where a candidate cannot be had."""

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
