"""Aging evolution: tournament, one mutation, the oldest dies."""

from __future__ import annotations

from collections import deque

import numpy as np

from nas.errors import ExperimentError
from nas.space import Genomes
from nas.strategies.base import Domain, Outcomes, Strategy, strategies


@strategies.register("evolution")
class AgingEvolution(Strategy):
    """Regularised evolution (Real et al. 2019, "Regularized Evolution for Image Classifier Architecture Search").

    Algorithm 1 of the paper: random genomes until the population is full; then the best of ``sample`` random
    members is mutated, the child enters, and the oldest member dies, whatever its reward. A mutation changes one
    gene that is not dormant; an ordered choice moves to a neighbouring value half of the time.

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
        self.population_size, self.sample = population, sample
        self.population: deque[tuple[Genomes, float]] = deque(maxlen=population)
        if not (domain.cardinalities > 1).any():
            raise ExperimentError("Every choice of the space has one value.", expected="something to mutate")

    def propose(self, rng: np.random.Generator) -> Genomes:
        if len(self.population) < self.population_size:
            return rng.integers(0, self.domain.cardinalities)
        rivals = rng.choice(len(self.population), self.sample, replace=False)
        parent, _ = max((self.population[int(i)] for i in rivals), key=lambda member: member[1])
        return self._mutate(parent, rng)

    def tell(self, outcomes: Outcomes) -> None:
        for genome, reward, scored in zip(outcomes.genomes, outcomes.reward, outcomes.scored, strict=True):
            if scored:
                self.population.append((genome.copy(), float(reward)))

    def _mutate(self, parent: Genomes, rng: np.random.Generator) -> Genomes:
        child = parent.copy()
        sizes = self.domain.cardinalities
        open_genes = np.flatnonzero(self.domain.active(parent[None])[0] & (sizes > 1))
        if not len(open_genes):
            open_genes = np.flatnonzero(sizes > 1)
        gene = int(rng.choice(open_genes))
        if self.domain.ordered[gene] and rng.random() < 0.5:
            near = [v for v in (child[gene] - 1, child[gene] + 1) if 0 <= v < sizes[gene]]
            child[gene] = near[int(rng.integers(len(near)))]
        else:
            child[gene] = (child[gene] + rng.integers(1, sizes[gene])) % sizes[gene]
        return child
