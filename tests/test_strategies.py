"""Strategies: the contract for every one, and what each is known for: tournaments, gradients, better than luck."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import TinySpace, domain_of

from nas.space import Genomes
from nas.strategies import AgingEvolution, Domain, Outcomes, RandomSearch, Reinforce, Strategy, strategies
from nas.strategies.base import ASKED, COMPLETE
from nas.testing import check_strategy


def simple_domain(sizes: list[int], ordered: bool = False) -> Domain:
    return Domain(np.array(sizes), np.full(len(sizes), ordered), lambda g: np.ones(np.atleast_2d(g).shape, dtype=bool))


def outcomes(genomes: Genomes, reward: Any, status: str = COMPLETE, source: str = ASKED, first: int = 0) -> Outcomes:
    n = len(genomes)
    reward = np.broadcast_to(np.asarray(reward, dtype=np.float64), n)
    return Outcomes(
        index=np.arange(first, first + n), genomes=genomes, quality=reward, costs=np.ones((n, 1)),
        violation=np.zeros(n), reward=reward, fidelity=np.ones(n), status=np.full(n, status), source=np.full(n, source),
    )  # fmt: skip


def search(strategy: Strategy, reward: Callable[[Genomes], Any], rounds: int, batch: int = 4) -> list[float]:
    seen: list[float] = []
    for _ in range(rounds):
        proposals = strategy.ask(batch)
        values = reward(proposals.genomes)
        seen += values.tolist()
        strategy.tell(outcomes(proposals.genomes, values, first=int(proposals.index[0])))
    return seen


@pytest.mark.parametrize("kind", list(strategies))
def test_every_registered_strategy(kind: str) -> None:
    check_strategy(strategies.get(kind))


@pytest.mark.parametrize("kind", list(strategies))
def test_every_registered_strategy_on_a_real_space(kind: str) -> None:
    space = TinySpace()
    strategy = strategies.get(kind)(domain_of(space), 0)
    for _ in range(30):
        proposals = strategy.ask(4)
        for genome in proposals.genomes:
            space.decode(genome)
        strategy.tell(outcomes(proposals.genomes, proposals.genomes.sum(1) / 8))


# ---- better than luck --------------------------------------------------------------------------------

WEIGHTS = np.random.default_rng(7).normal(size=(12, 5))
BEST = float(WEIGHTS.max(axis=1).sum())


def separable(genomes: Genomes) -> Any:
    return WEIGHTS[np.arange(12), genomes].sum(axis=1) / BEST


@pytest.mark.parametrize(("kind", "late_margin", "best_margin"), [(AgingEvolution, 0.4, 0.1), (Reinforce, 0.4, 0.15)])
def test_learning_beats_random(kind: type[Strategy], late_margin: float, best_margin: float) -> None:
    """A separable function of 12 genes with 5 values each, 200 evaluations, mean over 8 seeds; its best value is 1."""
    late, best = {}, {}
    for one in (kind, RandomSearch):
        runs = [search(one(simple_domain([5] * 12), seed), separable, rounds=50) for seed in range(8)]
        late[one] = np.mean([np.mean(run[-40:]) for run in runs])
        best[one] = np.mean([max(run) for run in runs])
    assert abs(late[RandomSearch] - WEIGHTS.mean(axis=1).sum() / BEST) < 0.05
    assert late[kind] > late[RandomSearch] + late_margin
    assert best[kind] > best[RandomSearch] + best_margin


# ---- random ------------------------------------------------------------------------------------------


def test_random_is_uniform() -> None:
    genomes = RandomSearch(simple_domain([2, 3, 1]), 0).ask(3000).genomes
    for gene, size in enumerate((2, 3, 1)):
        np.testing.assert_allclose(np.bincount(genomes[:, gene], minlength=size) / 3000, 1 / size, atol=0.03)
