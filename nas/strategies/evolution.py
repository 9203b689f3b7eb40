"""Aging evolution: tournament, crossover, mutation, the oldest dies."""

from __future__ import annotations

import numpy as np

from nas.errors import ExperimentError
from nas.space import Genomes
from nas.strategies.base import Domain, Outcomes, Strategy, strategies
from nas.strategies.draws import Draws
from nas.strategies.variation import affordable, uniform, vary


@strategies.register("evolution")
class AgingEvolution(Strategy):
    """Regularised evolution (Real et al. 2019, "Regularized Evolution for Image Classifier Architecture Search").

    Algorithm 1 of the paper: random genomes until the population is full; then the best of ``sample`` random
    members (drawn with replacement, as there) has a child, the child enters, and the oldest member dies, whatever
    its reward. A child may have a second parent, the winner of another tournament, and is always mutated
    (:func:`~nas.strategies.variation.vary`). Where the prices are known, children that break a budget are redrawn
    (:func:`~nas.strategies.variation.affordable`).

    The defaults are for a hundred trainings or so; the paper's, for twenty thousand, are 100, 25 and no crossover.

    Args:
        population: members kept, P.
        sample: size of a tournament, S.
        crossover: probability of a second parent.
    """

    def __init__(
        self, domain: Domain, seed: int = 0, *, population: int = 20, sample: int = 10, crossover: float = 0.5
    ) -> None:
        super().__init__(domain, seed)
        if not 1 <= sample <= population:
            raise ExperimentError(
                f"strategy: sample {sample}, population {population}.", expected="1 ≤ sample ≤ population"
            )
        check_variation(domain, crossover)
        self.sample, self.crossover = sample, crossover
        self.genomes = np.zeros((population, len(domain.cardinalities)), dtype=np.int64)
        self.rewards = np.full(population, -np.inf)
        self.born = 0  # a ring: the next one born takes the place of the oldest

    def propose(self, draws: Draws) -> Genomes:
        draw = uniform(self.domain) if self.born < len(self.rewards) else self._children
        return affordable(draw, draws, self.domain)

    def learn(self, outcomes: Outcomes) -> None:
        rows = np.flatnonzero(outcomes.scored)[-len(self.rewards) :]
        places = (self.born + np.arange(len(rows))) % len(self.rewards)
        self.genomes[places], self.rewards[places] = outcomes.genomes[rows], outcomes.reward[rows]
        self.born += len(rows)

    def _children(self, draws: Draws) -> Genomes:
        first = self._winners(draws)
        second = self._winners(draws) if self.crossover else first
        return vary(first, second, draws, self.domain, self.crossover)

    def _winners(self, draws: Draws) -> Genomes:
        """The winner of a tournament for each number in ``draws``."""
        rivals = draws.integers(np.full(self.sample, len(self.rewards)))
        best = self.rewards[rivals].argmax(axis=1)
        return self.genomes[rivals[np.arange(len(rivals)), best]]


def check_variation(domain: Domain, crossover: float) -> None:
    """Refuse what no evolution can work with.

    Raises:
        ExperimentError: nothing can vary, or ``crossover`` is no probability.
    """
    if not (domain.cardinalities > 1).any():
        raise ExperimentError("Every choice of the space has one value.", expected="something to mutate")
    if not 0 <= crossover <= 1:
        raise ExperimentError(f"strategy: crossover {crossover}.", expected="a probability, 0 to 1")
