"""Evolutionary strategies: tournaments, ageing, fronts, climbing; and that they beat luck."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_strategies import outcomes, simple_domain

from nas.errors import ExperimentError
from nas.space import Genomes
from nas.strategies import AgingEvolution, Domain, Draws, RandomSearch, Strategy
from nas.strategies.base import FAILED, SCREENED


def children(strategy: Strategy, n: int) -> Genomes:
    """What a strategy draws, repeats included."""
    return strategy.propose(Draws(0, np.arange(n)))


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


def test_evolution_changes_one_gene_of_a_member() -> None:
    strategy = AgingEvolution(simple_domain([9, 9, 9]), 0, population=1, sample=1)
    strategy.tell(outcomes(np.array([[5, 0, 0]]), 1.0))
    changed = children(strategy, 300) != np.array([5, 0, 0])
    assert (changed.sum(axis=1) == 1).all()
    assert (changed.mean(axis=0) > 0.25).all()


def test_the_oldest_dies_whatever_its_reward() -> None:
    strategy = grown()
    strategy.tell(outcomes(np.array([[0, 1, 0]] * 6), -1.0))
    # The best member, [5, 0, 0] with reward 5, was among the six oldest.
    assert ((children(strategy, 50) != np.array([0, 1, 0])).sum(axis=1) == 1).all()


def test_a_small_tournament_is_milder() -> None:
    def parents(sample: int) -> Any:
        born = children(grown(sample=sample), 2000)
        return np.mean(born[(born[:, 1:] != 0).any(axis=1), 0])

    # The mean of the best of k drawn with replacement from 0..5.
    for sample in (1, 2, 6):
        expected = sum(1 - (value / 6) ** sample for value in range(1, 6))
        assert parents(sample) == pytest.approx(expected, abs=0.15)


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


def test_dormant_genes_are_not_mutated() -> None:
    domain = Domain(
        np.array([5, 5, 5]), np.zeros(3, dtype=bool), lambda g: np.array([[True, False, True]] * len(np.atleast_2d(g)))
    )
    strategy = AgingEvolution(domain, 0, population=1, sample=1)
    strategy.tell(outcomes(np.array([[2, 2, 2]]), 1.0))
    born = children(strategy, 100)
    assert (born[:, 1] == 2).all()
    assert (born != 2).any(axis=1).all()


def test_evolution_settings() -> None:
    for settings in ({"population": 3, "sample": 4}, {"sample": 0}):
        with pytest.raises(ExperimentError, match="1 ≤ sample ≤ population"):
            AgingEvolution(simple_domain([2, 2]), 0, **settings)
    with pytest.raises(ExperimentError, match="one value"):
        AgingEvolution(simple_domain([1, 1]), 0)
