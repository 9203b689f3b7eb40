"""Random search: uniform over genomes; the baseline that every other strategy must beat."""

from __future__ import annotations

import numpy as np

from nas.space import Genomes
from nas.strategies.base import Outcomes, Strategy, strategies


@strategies.register("random")
class RandomSearch(Strategy):
    """Draws every gene uniformly and learns nothing."""

    def propose(self, rng: np.random.Generator) -> Genomes:
        return rng.integers(0, self.domain.cardinalities)

    def tell(self, outcomes: Outcomes) -> None:
        pass
