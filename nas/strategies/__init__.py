"""Strategies: they ask for candidates and are told outcomes; numpy only, state a function of seed and outcomes."""

from nas.strategies.base import Domain, Outcomes, Proposals, Strategy, strategies
from nas.strategies.evolution import AgingEvolution
from nas.strategies.random_search import RandomSearch
from nas.strategies.reinforce import Reinforce

__all__ = [
    "AgingEvolution", "Domain", "Outcomes", "Proposals", "RandomSearch", "Reinforce", "Strategy", "strategies",
]  # fmt: skip
