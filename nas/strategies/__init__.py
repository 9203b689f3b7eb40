"""Strategies: they ask for candidates and are told outcomes; numpy only, state a function of seed and outcomes."""

from nas.strategies.base import Domain, Objective, Outcomes, Proposals, Strategy, strategies
from nas.strategies.draws import Draws
from nas.strategies.evolution import AgingEvolution
from nas.strategies.halving import Halving
from nas.strategies.random_search import RandomSearch
from nas.strategies.reinforce import Reinforce
from nas.strategies.surrogate import Surrogate

__all__ = [
    "AgingEvolution", "Domain", "Draws", "Halving", "Objective", "Outcomes", "Proposals", "RandomSearch", "Reinforce",
    "Strategy", "Surrogate", "strategies",
]  # fmt: skip
