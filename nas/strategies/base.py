"""The contract of a strategy: ``ask(n)`` numbers and proposes genomes, ``tell`` takes what became of them."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nas.registry import Registry
from nas.space import Genomes

Array = npt.NDArray[np.float64]
COMPLETE, FAILED, SCREENED, DUPLICATE = "complete", "failed", "screened", "duplicate"
ASKED, ENQUEUED, EARLIER = "asked", "enqueued", "earlier"


@dataclass(frozen=True)
class Domain:
    """What a strategy knows of a space.

    Attributes:
        cardinalities: values per choice, ``[choices]``.
        ordered: whether neighbouring values are alike, ``[choices]``.
        active: genomes ``[n, choices]`` → bool mask of the genes that are not dormant.
    """

    cardinalities: npt.NDArray[np.int64]
    ordered: npt.NDArray[np.bool_]
    active: Callable[[Genomes], npt.NDArray[np.bool_]]


@dataclass(frozen=True)
class Proposals:
    """Numbered genomes to evaluate: ``index [n]``, ``genomes [n, choices]``, ``fidelity [n]`` in (0, 1]."""

    index: npt.NDArray[np.int64]
    genomes: Genomes
    fidelity: Array


@dataclass(frozen=True)
class Outcomes:
    """What became of proposals, one row each.

    Attributes:
        index, genomes, fidelity: as proposed.
        quality: NaN unless known.
        costs: ``[n, k]``, always known.
        violation: how far hard budgets are broken, 0 = feasible.
        reward: NaN unless the quality is known.
        status: complete, failed, screened (ruled out by its costs, never trained) or duplicate
            (its quality was known already).
        source: asked, enqueued, or from an earlier search: only "asked" ones are samples of this strategy.
    """

    index: npt.NDArray[np.int64]
    genomes: Genomes
    quality: Array
    costs: Array
    violation: Array
    reward: Array
    fidelity: Array
    status: npt.NDArray[np.str_]
    source: npt.NDArray[np.str_]

    @property
    def scored(self) -> npt.NDArray[np.bool_]:
        """Rows that have a reward."""
        return np.isin(self.status, (COMPLETE, DUPLICATE))


class Strategy(abc.ABC):
    """Proposes candidates; maximises the reward.

    Contract: the proposals are a function of the seed and of the outcomes told before each ``ask``; candidate
    number *n* draws from ``default_rng((seed, n))`` and from nothing else. Outcomes that were not "asked" may be
    told at any time. ``nas.testing.check_strategy`` tests it for any implementation.

    Args:
        domain: the genes.
        seed: any non-negative integer.
    """

    def __init__(self, domain: Domain, seed: int = 0) -> None:
        self.domain, self.seed = domain, seed
        self._asked = 0

    def ask(self, n: int = 1) -> Proposals:
        """``n`` proposals under the next ``n`` numbers."""
        index = np.arange(self._asked, self._asked + n, dtype=np.int64)
        self._asked += n
        rows = [self.propose(np.random.default_rng((self.seed, int(i)))) for i in index]
        return Proposals(index, np.array(rows, dtype=np.int64).reshape(n, len(self.domain.cardinalities)), np.ones(n))

    @abc.abstractmethod
    def propose(self, rng: np.random.Generator) -> Genomes:
        """One genome ``[choices]`` drawn with ``rng`` from the present state, which it must not change."""

    @abc.abstractmethod
    def tell(self, outcomes: Outcomes) -> None:
        """Learn from outcomes; rows without a reward must be tolerated."""


strategies: Registry[type[Strategy]] = Registry("strategy")
