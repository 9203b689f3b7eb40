"""The contract of a strategy: ``ask(n)`` numbers and proposes genomes, ``tell`` takes what became of them."""

from __future__ import annotations

import abc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from nas.registry import Registry
from nas.space import Genomes
from nas.strategies.draws import Draws

Array = npt.NDArray[np.float64]
COMPLETE, FAILED, SCREENED, DUPLICATE = "complete", "failed", "screened", "duplicate"
ASKED, ENQUEUED, EARLIER = "asked", "enqueued", "earlier"
REDRAWS = 8
FIDELITY_BYTES = np.dtype(np.float64).itemsize


@dataclass(frozen=True)
class Objective:
    """What is known of the objective without training anything: costs are looked up, only quality is dear.

    Attributes:
        costs: names of the costs.
        price: genomes ``[n, choices]`` → costs ``[n, k]``.
        violation: costs ``[n, k]`` → how far hard budgets are broken ``[n]``; 0 = feasible. May be infinite.
        reward: quality ``[n]`` and costs ``[n, k]`` → R(α) ``[n]``, for any finite quality (NaN where the reward is
            not defined for it).
    """

    costs: tuple[str, ...]
    price: Callable[[Genomes], Array]
    violation: Callable[[Array], Array]
    reward: Callable[[Array, Array], Array]


def _everything(genomes: Genomes) -> npt.NDArray[np.bool_]:
    return np.ones(np.atleast_2d(genomes).shape, dtype=bool)


def _unchanged(genomes: Genomes) -> Genomes:
    return genomes


@dataclass(frozen=True)
class Domain:
    """What a strategy knows of a space.

    Attributes:
        cardinalities: values per choice, ``[choices]``.
        ordered: whether neighbouring values are alike, ``[choices]``.
        active: genomes ``[n, choices]`` → bool mask of the genes that are not dormant.
        kinds: choices of one kind take the same values in the same role (the kernel size of every block): equal
            numbers, ``[choices]``. None: nothing is known, every choice is of its own kind.
        objective: what is known of the objective beforehand; None where costs are part of the unknown.
        repair: genomes ``[n, choices]`` → those that are proposed in their place, which are their own repair: values
            that cannot pay on this device give way to plain ones (:mod:`nas.masks`). No cost that counts rises by it.
            :meth:`Strategy.ask` repairs whatever is proposed; a strategy that prices or compares what it draws repairs
            it first.
    """

    cardinalities: npt.NDArray[np.int64]
    ordered: npt.NDArray[np.bool_]
    active: Callable[[Genomes], npt.NDArray[np.bool_]] = _everything
    kinds: npt.NDArray[np.int64] | None = None
    objective: Objective | None = None
    repair: Callable[[Genomes], Genomes] = _unchanged

    @property
    def repairs(self) -> bool:
        """Whether anything is repaired."""
        return self.repair is not _unchanged

    def canonical(self, genomes: Genomes) -> Genomes:
        """The genomes with every dormant gene at 0: equal rows have equal quality."""
        if self.active is _everything:
            return genomes
        return np.where(self.active(genomes), genomes, 0)


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
        index, genomes: as proposed; numbers mean something for "asked" ones only.
        quality: NaN unless known.
        costs: ``[n, k]``, always known.
        violation: how far hard budgets are broken, 0 = feasible.
        reward: NaN unless the quality is known.
        fidelity: share of the full training that the quality was reached with: as proposed, but for a duplicate that
            is known at a higher one. Qualities of different fidelities are not alike.
        status: complete, failed, screened (ruled out by its costs, never trained) or duplicate
            (its quality was known already, at the proposed fidelity or a higher one).
        source: asked; enqueued, which somebody else chose and this search evaluated; or earlier, which another
            search found. Only "asked" ones are samples of this strategy.
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

    def __len__(self) -> int:
        return len(self.index)

    @property
    def scored(self) -> npt.NDArray[np.bool_]:
        """Rows that have a reward."""
        return (self.status == COMPLETE) | (self.status == DUPLICATE)

    def rows(self, which: npt.NDArray[np.bool_] | npt.NDArray[np.intp] | list[int]) -> Outcomes:
        """Some of the rows, by mask or by position."""
        return Outcomes(
            self.index[which], self.genomes[which], self.quality[which], self.costs[which], self.violation[which],
            self.reward[which], self.fidelity[which], self.status[which], self.source[which],
        )  # fmt: skip


class Strategy(abc.ABC):
    """Proposes candidates; maximises the reward.

    Contract: the proposals are a function of the seed and of the calls before; what proposal *n* draws is a
    function of (seed, *n*) (:class:`~nas.strategies.draws.Draws`). Proposals that are under way (asked for and not
    yet told) are not proposed again at the same fidelity while anything else can be drawn. What is proposed is repaired
    (:attr:`Domain.repair`), and its outcome is that of the repaired genome. Outcomes that were not "asked" may be told
    at any time, repaired or not. Memory does not grow with what is asked. ``nas.testing.check_strategy`` tests it for
    any implementation.

    A subclass implements :meth:`propose` and :meth:`learn`; one that asks for less than the full training overrides
    :meth:`propose_at` too.

    Args:
        domain: the genes.
        seed: any non-negative integer.
    """

    #: Whether it searches for a front of quality and costs; the others follow the reward alone.
    multi_objective: ClassVar[bool] = False

    def __init__(self, domain: Domain, seed: int = 0) -> None:
        self.domain, self.seed = domain, seed
        #: Costs that it minimises for their own sake, whatever the reward reads.
        self.minimises: tuple[str, ...] = ()
        self._asked = 0
        self._waiting: dict[int, bytes] = {}  # number → key (genome, fidelity) of what is asked for and not yet told
        self._taken: Counter[bytes] = Counter()  # keys under way, and those retired

    @property
    def pending(self) -> Genomes:
        """Canonical genomes under way: asked for, not yet told; ``[waiting, choices]``."""
        rows = [np.frombuffer(key[:-FIDELITY_BYTES], dtype=np.int64) for key in self._waiting.values()]
        return np.array(rows, dtype=np.int64).reshape(len(rows), len(self.domain.cardinalities))

    def ask(self, n: int = 1) -> Proposals:
        """``n`` proposals under the next ``n`` numbers, different from each other and from all under way."""
        index = np.arange(self._asked, self._asked + n, dtype=np.int64)
        self._asked += n
        genomes, fidelity = np.empty((n, len(self.domain.cardinalities)), dtype=np.int64), np.ones(n)
        left = np.arange(n)
        for attempt in range(REDRAWS):
            if not len(left):
                break
            drawn, fidelity[left] = self.propose_at(Draws(self.seed, index[left], attempt))
            genomes[left] = self.domain.repair(drawn)
            left = self._reserve(Proposals(index, genomes, fidelity), left, last=attempt == REDRAWS - 1)
        return Proposals(index, genomes, fidelity)

    def tell(self, outcomes: Outcomes) -> None:
        """Learn from outcomes; rows without a reward are tolerated."""
        self.release(outcomes.index[outcomes.source == ASKED])
        self.learn(outcomes)

    def release(self, index: npt.NDArray[np.int64]) -> None:
        """Proposals by number that are no longer under way: told, or taken back by whoever asked and learnt nothing."""
        for number in index.tolist():
            if (key := self._waiting.pop(number, None)) is not None:
                self._taken[key] -= 1
                if not self._taken[key]:
                    del self._taken[key]

    def take_up(self, number: int, waiting: Proposals) -> None:
        """Go on where other instances are: the next proposal gets ``number``, and what is under way is ``waiting``."""
        self._asked = number
        self._waiting, self._taken = {}, Counter()
        self._reserve(waiting, np.arange(len(waiting.index)), last=True)

    @abc.abstractmethod
    def propose(self, draws: Draws) -> Genomes:
        """A genome for each number in ``draws``, ``[len(draws), choices]``, from the present state, left unchanged."""

    def propose_at(self, draws: Draws) -> tuple[Genomes, Array]:
        """Genomes, and the share of the full training that each is to get, ``[len(draws)]``; the whole by default.

        A number whose proposal repeated another comes again, in ``draws`` of the next attempt.
        """
        return self.propose(draws), np.ones(len(draws))

    @abc.abstractmethod
    def learn(self, outcomes: Outcomes) -> None:
        """Take outcomes into the state."""

    def _retire(self, genomes: Genomes, fidelity: float) -> None:
        """Never propose these again at this fidelity: for strategies that keep everything that was evaluated."""
        for key in self._keys(genomes, np.full(len(genomes), fidelity)):
            self._taken[key] += 1

    def _reserve(self, proposals: Proposals, rows: npt.NDArray[np.int64], last: bool) -> npt.NDArray[np.int64]:
        """Mark proposals as under way; returns the rows that repeat another (none of them, on the last try)."""
        repeated = []
        keys = self._keys(proposals.genomes[rows], proposals.fidelity[rows])
        for row, number, key in zip(rows.tolist(), proposals.index[rows].tolist(), keys, strict=True):
            if not last and key in self._taken:
                repeated.append(row)
                continue
            self._waiting[number] = key
            self._taken[key] += 1
        return np.array(repeated, dtype=np.int64)

    def _keys(self, genomes: Genomes, fidelity: Array) -> list[bytes]:
        """What tells proposals apart: the canonical genome, and the fidelity in its last bytes."""
        shares = fidelity.view(np.int64)[:, None]
        rows = np.hstack([self.domain.canonical(genomes).astype(np.int64, copy=False), shares])
        data, width = rows.tobytes(), rows.shape[1] * rows.itemsize
        return [data[start : start + width] for start in range(0, len(data), width)]


strategies: Registry[type[Strategy]] = Registry("strategy")
strategies.family("optuna", "nas.optuna.strategy:named")
