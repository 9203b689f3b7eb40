"""Local search: climb to the best neighbour, start again where nothing near is better."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from nas.errors import ExperimentError
from nas.space import Genomes
from nas.strategies.base import ASKED, Domain, Outcomes, Strategy, strategies
from nas.strategies.draws import Draws
from nas.strategies.evolution import check_variation
from nas.strategies.variation import affordable, mutate, uniform


@strategies.register("local-search")
class LocalSearch(Strategy):
    """Hill climbing with restarts (White et al. 2021, "Exploring the Loss Landscape in Neural Architecture Search").

    A climb begins at the best of ``starts`` candidates. Its neighbours, which differ in one gene that is not dormant,
    are proposed in random order; those that are known to break a budget are passed over. With ``improvement: first``
    the climb goes on from any neighbour that is better (of a batch, the best), with ``best`` from the best of all.
    Where no neighbour is better, the next climb begins: at random candidates, or at the best one ever with a few
    genes changed (iterated local search, Lourenço et al. 2003), each half of the time. A batch larger than the
    neighbours that are left is filled with candidates for starts.

    Args:
        starts: candidates before each climb.
        improvement: ``first`` (few evaluations a step) or ``best`` (the paper's Algorithm 1).
        perturbation: genes changed in the best candidate for a new start.
        restart: probability that a start is random instead; the first climb's all are.
    """

    def __init__(
        self,
        domain: Domain,
        seed: int = 0,
        *,
        starts: int = 10,
        improvement: Literal["first", "best"] = "first",
        perturbation: int = 2,
        restart: float = 0.5,
    ) -> None:
        super().__init__(domain, seed)
        if starts < 1 or perturbation < 1 or not 0 <= restart <= 1:
            raise ExperimentError(
                f"strategy: starts {starts}, perturbation {perturbation}, restart {restart}.",
                expected="starts ≥ 1, perturbation ≥ 1, 0 ≤ restart ≤ 1",
            )
        check_variation(domain, 0.0)
        self.starts, self.improvement, self.perturbation, self.restart = starts, improvement, perturbation, restart
        self.best: Genomes | None = None
        self.best_reward = -np.inf
        self._begin()

    def propose(self, draws: Draws) -> Genomes:
        # A proposal that is drawn again repeated something under way: no neighbour is free for it.
        free = self._free() if draws.attempt == 0 else []
        order = draws.generator().permutation(len(free))[: len(draws)] if free else np.arange(0)
        climbing = np.array([free[i] for i in order], dtype=np.int64).reshape(
            len(order), len(self.domain.cardinalities)
        )
        rest = draws.rows(np.arange(len(order), len(draws)))
        return np.concatenate([climbing, affordable(self._starts, rest, self.domain)])

    def learn(self, outcomes: Outcomes) -> None:
        # What was asked before this climb began belongs to the last one, whose optimum is known.
        fresh = (outcomes.source != ASKED) | (outcomes.index >= self._since)
        for position in np.flatnonzero(fresh & outcomes.scored):
            self._found(outcomes.genomes[position].copy(), float(outcomes.reward[position]))
        for row in self.domain.canonical(outcomes.genomes):
            self._left.pop(row.tobytes(), None)
        if self._scored < self.starts:
            return
        if self._climbing is None or (self.improvement == "first" or not self._left):
            self._step()

    def _begin(self) -> None:
        """A new climb: at first candidates for its start, and no neighbours."""
        self._since = self._asked
        self._scored = 0
        self._climbing: Genomes | None = None  # where the climb stands
        self._height = -np.inf
        self._next: Genomes | None = None  # the best found since, which is higher
        self._left: dict[bytes, Genomes] = {}  # canonical → genome, neighbours that were not told yet

    def _found(self, genome: Genomes, reward: float) -> None:
        self._scored += 1
        if reward > self._height:
            self._next, self._height = genome, reward
        if reward > self.best_reward:
            self.best, self.best_reward = genome, reward

    def _step(self) -> None:
        """Up, if something higher was found; else on to the next climb, once every neighbour was told."""
        if self._next is not None:
            self._climbing, self._next = self._next, None
            self._left = self._neighbours(self._climbing)
        if not self._left:
            self._begin()

    def _neighbours(self, genome: Genomes) -> dict[bytes, Genomes]:
        """Affordable genomes that differ from ``genome`` in one gene that is not dormant, by canonical form.

        They are repaired; what a repair turns back into ``genome`` is none of them.
        """
        sizes = np.where(self.domain.active(genome[None])[0], self.domain.cardinalities, 1)
        genes = np.repeat(np.arange(len(sizes)), sizes - 1)
        jumps = np.concatenate([np.arange(1, size) for size in sizes]).astype(np.int64)
        rows = np.tile(genome, (len(genes), 1))
        rows[np.arange(len(genes)), genes] = (genome[genes] + jumps) % sizes[genes]
        if self.domain.repairs:
            rows = self.domain.repair(rows)
            rows = rows[(self.domain.canonical(rows) != self.domain.canonical(genome[None])).any(axis=1)]
        if self.domain.objective is not None:
            rows = rows[self.domain.objective.violation(self.domain.objective.price(rows)) <= 0]
        return {key.tobytes(): row for key, row in zip(self.domain.canonical(rows), rows, strict=True)}

    def _free(self) -> list[Genomes]:
        """Neighbours that are left and not under way."""
        if not self._left:
            return []
        taken = {row.tobytes() for row in self.pending}
        return [row for key, row in self._left.items() if key not in taken]

    def _starts(self, draws: Draws) -> Genomes:
        genomes = uniform(self.domain)(draws)
        if self.best is None:
            return genomes
        near: npt.NDArray[np.int64] = np.tile(self.best, (len(draws), 1))
        for _ in range(self.perturbation):
            near = mutate(near, draws, self.domain)
        return np.where(draws.uniform(1) < self.restart, genomes, near)
