"""Strategies: they ask for candidates and are told outcomes; numbers only, state a function of seed and outcomes."""

from nas.strategies.base import Domain, Objective, Outcomes, Proposals, Strategy, strategies
from nas.strategies.draws import Draws
from nas.strategies.evolution import AgingEvolution
from nas.strategies.halving import Halving
from nas.strategies.local_search import LocalSearch
from nas.strategies.nsga2 import NSGA2
from nas.strategies.ppo import PPO
from nas.strategies.random_search import RandomSearch
from nas.strategies.reinforce import Reinforce
from nas.strategies.reinforce_lstm import ReinforceLstm
from nas.strategies.surrogate import Surrogate

__all__ = [
    "NSGA2", "PPO", "AgingEvolution", "Domain", "Draws", "Halving", "LocalSearch", "Objective", "Outcomes",
    "Proposals", "RandomSearch", "Reinforce", "ReinforceLstm", "Strategy", "Surrogate", "strategies",
]  # fmt: skip
