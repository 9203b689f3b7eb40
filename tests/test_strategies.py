"""Strategies: the contract for every one, and what each is known for: tournaments, gradients, better than luck."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import TinySpace, domain_of

from nas.errors import ExperimentError
from nas.space import Genomes
from nas.strategies import AgingEvolution, Domain, Outcomes, RandomSearch, Reinforce, Strategy, strategies
from nas.strategies.base import ASKED, COMPLETE, FAILED, SCREENED
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


# ---- aging evolution ---------------------------------------------------------------------------------


def grown(
    population: int = 6, sample: int = 6, sizes: tuple[int, ...] = (9, 9, 9), ordered: bool = False
) -> AgingEvolution:
    """A full population; member i is [i, 0, 0] with reward i, so that the last is the best."""
    strategy = AgingEvolution(simple_domain(list(sizes), ordered), 0, population=population, sample=sample)
    genomes = np.zeros((population, len(sizes)), dtype=np.int64)
    genomes[:, 0] = np.arange(population)
    strategy.tell(outcomes(genomes, np.arange(population)))
    return strategy


def test_evolution_mutates_one_gene_of_the_tournament_winner() -> None:
    children = grown().ask(300).genomes
    changed = children != np.array([5, 0, 0])
    assert (changed.sum(axis=1) == 1).all()
    assert (changed.mean(axis=0) > 0.25).all()


def test_the_oldest_dies_whatever_its_reward() -> None:
    strategy = grown()
    strategy.tell(outcomes(np.array([[0, 1, 0]] * 6), -1.0))
    # The best member, [5, 0, 0] with reward 5, was among the six oldest.
    assert [member.tolist() for member, _ in strategy.population] == [[0, 1, 0]] * 6
    children = strategy.ask(50).genomes
    assert ((children != np.array([0, 1, 0])).sum(axis=1) == 1).all()


def test_a_small_tournament_is_milder() -> None:
    def parents(sample: int) -> Any:
        children = grown(sample=sample).ask(400).genomes
        return np.mean(children[(children[:, 1:] != 0).any(axis=1), 0])

    assert parents(1) < parents(2) < parents(6) == 5
    assert parents(1) == pytest.approx(2.5, abs=0.4)


def test_random_until_the_population_is_full() -> None:
    domain = simple_domain([9, 9, 9])
    strategy = AgingEvolution(domain, 4, population=6, sample=3)
    wanted = RandomSearch(domain, 4).ask(12).genomes
    genomes = strategy.ask(6).genomes
    np.testing.assert_array_equal(genomes, wanted[:6])
    strategy.tell(outcomes(genomes[:5], 1.0))
    strategy.tell(outcomes(genomes[5:], np.nan, FAILED))
    strategy.tell(outcomes(genomes[5:], np.nan, SCREENED))
    np.testing.assert_array_equal(strategy.ask(6).genomes, wanted[6:])


def test_ordered_genes_prefer_neighbours() -> None:
    def share_of_neighbours(ordered: bool) -> float:
        strategy = AgingEvolution(simple_domain([9], ordered), 0, population=1, sample=1)
        strategy.tell(outcomes(np.array([[4]]), 1.0))
        return float(np.mean(np.abs(strategy.ask(600).genomes - 4) == 1))

    assert share_of_neighbours(False) == pytest.approx(2 / 8, abs=0.06)
    assert share_of_neighbours(True) == pytest.approx(0.5 + 0.5 * 2 / 8, abs=0.06)


def test_dormant_genes_are_not_mutated() -> None:
    domain = Domain(
        np.array([5, 5, 5]), np.zeros(3, dtype=bool), lambda g: np.array([[True, False, True]] * len(np.atleast_2d(g)))
    )
    strategy = AgingEvolution(domain, 0, population=1, sample=1)
    strategy.tell(outcomes(np.array([[2, 2, 2]]), 1.0))
    children = strategy.ask(100).genomes
    assert (children[:, 1] == 2).all()
    assert (children != 2).any(axis=1).all()


def test_evolution_settings() -> None:
    for settings in ({"population": 3, "sample": 4}, {"sample": 0}):
        with pytest.raises(ExperimentError, match="1 ≤ sample ≤ population"):
            AgingEvolution(simple_domain([2, 2]), 0, **settings)
    with pytest.raises(ExperimentError, match="one value"):
        AgingEvolution(simple_domain([1, 1]), 0)
