"""Random search: uniform over genomes; the baseline that every other strategy must beat."""

from __future__ import annotations

from nas.space import Genomes
from nas.strategies.base import Outcomes, Strategy, strategies
from nas.strategies.draws import Draws


@strategies.register("random")
class RandomSearch(Strategy):
    """Draws every gene uniformly and learns nothing."""

    multi_objective = True

    def propose(self, draws: Draws) -> Genomes:
        return draws.integers(self.domain.cardinalities)

    def learn(self, outcomes: Outcomes) -> None:
        pass
