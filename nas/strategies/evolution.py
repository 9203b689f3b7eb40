"""Aging evolution: tournament, one mutation, the oldest dies."""

from __future__ import annotations

import numpy as np

from nas.errors import ExperimentError
from nas.space import Genomes
from nas.strategies.base import Domain, Outcomes, Strategy, strategies
from nas.strategies.draws import Draws
from nas.strategies.variation import mutate


@strategies.register("evolution")
class AgingEvolution(Strategy):
    """Regularised evolution (Real et al. 2019, "Regularized Evolution for Image Classifier Architecture Search").

    Algorithm 1 of the paper: random genomes until the population is full; then the best of ``sample`` random
    members (drawn with replacement, as there) is mutated, the child enters, and the oldest member dies, whatever
    its reward. A mutation changes one gene that is not dormant; an ordered choice moves to a neighbouring value half
    of the time.

    Args:
        population: members kept (the paper's P; 100 there, less for small budgets).
        sample: size of a tournament (the paper's S; 25 there).
    """

    def __init__(self, domain: Domain, seed: int = 0, *, population: int = 50, sample: int = 12) -> None:
        super().__init__(domain, seed)
        if not 1 <= sample <= population:
            raise ExperimentError(
                f"strategy: sample {sample}, population {population}.", expected="1 ≤ sample ≤ population"
            )
        if not (domain.cardinalities > 1).any():
            raise ExperimentError("Every choice of the space has one value.", expected="something to mutate")
        self.sample = sample
        self.genomes = np.zeros((population, len(domain.cardinalities)), dtype=np.int64)
        self.rewards = np.full(population, -np.inf)
        self.born = 0  # a ring: the next one born takes the place of the oldest

    def propose(self, draws: Draws) -> Genomes:
        population = len(self.rewards)
        if self.born < population:
            return draws.integers(self.domain.cardinalities)
        rivals = draws.integers(np.full(self.sample, population))
        winners = rivals[np.arange(len(rivals)), self.rewards[rivals].argmax(axis=1)]
        return mutate(self.genomes[winners], draws, self.domain)

    def learn(self, outcomes: Outcomes) -> None:
        rows = np.flatnonzero(outcomes.scored)
        rows = rows[-len(self.rewards) :] if len(rows) > len(self.rewards) else rows
        places = (self.born + np.arange(len(rows))) % len(self.rewards)
        self.genomes[places], self.rewards[places] = outcomes.genomes[rows], outcomes.reward[rows]
        self.born += len(rows)
