"""Strategies: they ask for candidates and are told outcomes; numbers only, state a function of seed and outcomes."""

from nas.strategies.base import Domain, Objective, Outcomes, Proposals, Strategy, strategies
from nas.strategies.draws import Draws
from nas.strategies.evolution import AgingEvolution
from nas.strategies.ppo import PPO
from nas.strategies.random_search import RandomSearch
from nas.strategies.reinforce import Reinforce
from nas.strategies.reinforce_lstm import ReinforceLstm

__all__ = [
    "PPO", "AgingEvolution", "Domain", "Draws", "Objective", "Outcomes", "Proposals", "RandomSearch", "Reinforce",
    "ReinforceLstm", "Strategy", "strategies",
]  # fmt: skip
