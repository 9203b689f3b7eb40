"""Evolutionary strategies: tournaments, ageing, fronts, climbing; and that they beat luck."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
from test_strategies import outcomes, search, separable, simple_domain

from nas.errors import ExperimentError
from nas.reward import hypervolume
from nas.space import Genomes
from nas.strategies import NSGA2, AgingEvolution, Domain, Draws, LocalSearch, Objective, RandomSearch, Strategy
from nas.strategies.base import COMPLETE, DUPLICATE, EARLIER, FAILED, SCREENED
from nas.strategies.nsga2 import crowding, fronts


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
    changed = children(strategy, 600) != np.array([5, 0, 0])
    # One gene, and three times in ten another one (or the same one again, which may undo it).
    count = np.bincount(changed.sum(axis=1), minlength=3) / 600
    assert count[1] == pytest.approx(0.79, abs=0.05)
    assert count[2] == pytest.approx(0.2, abs=0.05)
    assert (changed.mean(axis=0) > 0.25).all()


def test_the_oldest_dies_whatever_its_reward() -> None:
    strategy = grown()
    strategy.tell(outcomes(np.array([[0, 1, 0]] * 6), -1.0))
    # The best member, [5, 0, 0] with reward 5, was among the six oldest.
    assert ((children(strategy, 50) != np.array([0, 1, 0])).sum(axis=1) <= 2).all()


def test_a_small_tournament_is_milder() -> None:
    def parents(sample: int) -> Any:
        return np.mean(grown(sample=sample)._winners(Draws(0, np.arange(2000)))[:, 0])

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
    domain = Domain(np.array([5, 5, 5]), np.zeros(3, dtype=bool), lambda g: np.tile([True, False, True], (len(g), 1)))
    strategy = AgingEvolution(domain, 0, population=1, sample=1)
    strategy.tell(outcomes(np.array([[2, 2, 2]]), 1.0))
    born = children(strategy, 100)
    assert (born[:, 1] == 2).all()
    assert (born != 2).any(axis=1).mean() > 0.8


def test_evolution_settings() -> None:
    for settings in ({"population": 3, "sample": 4}, {"sample": 0}):
        with pytest.raises(ExperimentError, match="1 ≤ sample ≤ population"):
            AgingEvolution(simple_domain([2, 2]), 0, **settings)
    with pytest.raises(ExperimentError, match="one value"):
        AgingEvolution(simple_domain([1, 1]), 0)


def test_a_second_parent_lends_genes() -> None:
    strategy = AgingEvolution(simple_domain([9] * 8), 0, population=2, sample=1, crossover=1.0)
    strategy.tell(outcomes(np.array([[0] * 8, [8] * 8]), [1.0, 2.0]))
    born = children(strategy, 400)
    both = ((born == 0).sum(axis=1) >= 3) & ((born == 8).sum(axis=1) >= 3)
    assert 0.2 < both.mean() < 0.6  # half of the couples are two of one kind


def priced(limit: float, sizes: tuple[int, ...] = (9, 9, 9), ordered: bool = False) -> Domain:
    """The cost of a genome is the sum of its genes."""
    objective = Objective(
        costs=("sum", "first"),
        price=lambda genomes: np.stack([genomes.sum(axis=1), genomes[:, 0]], axis=1).astype(np.float64),
        violation=lambda costs: np.maximum(costs[:, 0] / limit - 1.0, 0.0),
        reward=lambda quality, costs: quality,
    )
    return Domain(np.array(sizes), np.full(len(sizes), ordered), objective=objective)


@pytest.mark.parametrize("kind", [AgingEvolution, NSGA2, LocalSearch])
def test_known_budgets_are_kept(kind: type[Strategy]) -> None:
    """A quarter of the genomes is affordable; nearly all that are proposed are, and are screened if they are not."""
    domain = priced(limit=8.0)
    strategy = kind(domain, 0)
    violation: list[float] = []
    for _ in range(40):
        proposals = strategy.ask(5)
        assert domain.objective is not None
        costs = domain.objective.price(proposals.genomes)
        broken = domain.objective.violation(costs)
        violation += broken.tolist()
        status = np.where(broken > 0, SCREENED, COMPLETE)
        reward = np.where(broken > 0, np.nan, proposals.genomes[:, 1] / 8)
        strategy.tell(
            dataclasses.replace(
                outcomes(proposals.genomes, reward, first=int(proposals.index[0])),
                costs=costs, violation=broken, status=status,
            )
        )  # fmt: skip
    assert np.mean(np.array(violation) > 0) < 0.15


@pytest.mark.parametrize("crossover", [-0.1, 1.1])
@pytest.mark.parametrize("kind", [AgingEvolution, NSGA2])
def test_crossover_is_a_probability(kind: type[Strategy], crossover: float) -> None:
    with pytest.raises(ExperimentError, match="0 to 1"):
        kind(simple_domain([2, 2]), 0, crossover=crossover)


# ---- NSGA-II -----------------------------------------------------------------------------------------


def slow_fronts(values: np.ndarray, violation: np.ndarray) -> list[int]:
    """The definition, one pair at a time."""

    def better(i: int, j: int) -> bool:
        if violation[i] > 0 or violation[j] > 0:
            return bool(violation[i] < violation[j])
        return bool((values[i] >= values[j]).all() and (values[i] > values[j]).any())

    rank, left, front = [-1] * len(values), set(range(len(values))), 0
    while left:
        current = {j for j in left if not any(better(i, j) for i in left)}
        for j in current:
            rank[j] = front
        left, front = left - current, front + 1
    return rank


def test_fronts_are_what_only_better_fronts_dominate() -> None:
    rng = np.random.default_rng(0)
    for objectives in (1, 2, 3):
        values = rng.integers(0, 6, (60, objectives)).astype(float)  # with ties
        violation = np.maximum(rng.normal(size=60), 0.0)
        assert fronts(values, violation).tolist() == slow_fronts(values, violation)
    assert fronts(np.zeros((0, 2)), np.zeros(0)).tolist() == []


def test_feasible_dominates_infeasible_and_less_violation_dominates_more() -> None:
    values = np.array([[0.0, 0.0], [9.0, 9.0], [5.0, 5.0], [1.0, 0.0]])
    assert fronts(values, np.array([0.0, 0.2, 0.1, 0.0])).tolist() == [1, 3, 2, 0]


def test_crowding_is_the_paper_s() -> None:
    values = np.array([[0.0, 10.0], [1.0, 6.0], [4.0, 4.0], [10.0, 0.0], [3.0, 3.0]])
    rank = fronts(values, np.zeros(5))
    assert rank.tolist() == [0, 0, 0, 0, 1]
    wanted = [np.inf, 4 / 10 + 6 / 10, 9 / 10 + 6 / 10, np.inf, np.inf]
    np.testing.assert_allclose(crowding(values, rank), wanted)
    # Where all are equal there is no span to divide by.
    np.testing.assert_array_equal(crowding(np.ones((4, 1)), np.zeros(4, dtype=np.int64)), [np.inf, 0, 0, np.inf])


def test_the_population_is_the_best_of_everything_told() -> None:
    strategy = NSGA2(simple_domain([50, 2]), 0, population=4)
    for value in np.random.default_rng(1).permutation(50):
        strategy.tell(outcomes(np.array([[value, 0]]), float(value)))
    assert sorted(strategy.genomes[:, 0].tolist()) == [46, 47, 48, 49]


def test_duplicates_are_one_member() -> None:
    domain = Domain(np.array([9, 9]), np.zeros(2, dtype=bool), lambda g: np.tile([True, False], (len(g), 1)))
    strategy = NSGA2(domain, 0, population=3)
    strategy.tell(outcomes(np.array([[1, 0], [1, 5], [2, 0], [1, 0]]), [1.0, 1.0, 2.0, 1.0]))
    strategy.tell(outcomes(np.array([[2, 7], [3, 0], [4, 0]]), [2.0, 0.5, 3.0], DUPLICATE))
    assert strategy.genomes.tolist() == [[4, 0], [2, 0], [1, 0]]


def told(strategy: NSGA2, genomes: Genomes, quality: np.ndarray) -> None:
    assert strategy.domain.objective is not None
    costs = strategy.domain.objective.price(genomes)
    violation = strategy.domain.objective.violation(costs)
    strategy.tell(dataclasses.replace(outcomes(genomes, quality), costs=costs, violation=violation))


def test_objectives_by_name() -> None:
    """Quality against the second cost: the front of a population, and nothing behind it."""
    strategy = NSGA2(priced(100.0), 0, population=3, objectives=["quality", "first"])
    genomes = np.array([[0, 8, 0], [4, 0, 0], [8, 0, 0], [5, 0, 0], [8, 8, 8]])
    told(strategy, genomes, np.array([0.1, 0.5, 0.9, 0.4, 0.2]))
    assert sorted(strategy.genomes.tolist()) == [[0, 8, 0], [4, 0, 0], [8, 0, 0]]
    with pytest.raises(ExperimentError, match="latency"):
        NSGA2(priced(100.0), 0, objectives=["quality", "latency"])
    with pytest.raises(ExperimentError, match="some of reward, quality"):
        NSGA2(simple_domain([3, 3]), 0, objectives=[])


def test_costs_that_nobody_knows_beforehand_are_objectives() -> None:
    strategy = NSGA2(simple_domain([9, 9]), 0, population=3)
    genomes = np.array([[0, 0], [1, 0], [2, 0], [3, 0]])
    costs = np.array([[5.0], [1.0], [3.0], [4.0]])
    strategy.tell(dataclasses.replace(outcomes(genomes, [0.9, 0.1, 0.5, 0.4]), costs=costs))
    assert sorted(strategy.genomes[:, 0].tolist()) == [0, 1, 2]


def test_a_front_spreads_wider_than_a_single_objective() -> None:
    """Quality and cost both rise with the genes: for the front every cost is worth having."""

    def hypervolume_of(objectives: list[str]) -> float:
        domain = priced(limit=1e9, sizes=(6,) * 8)
        assert domain.objective is not None
        strategy = NSGA2(domain, 0, objectives=objectives)
        qualities, costs = [], []
        for _ in range(40):
            genomes = strategy.ask(8).genomes
            strategy_costs = domain.objective.price(genomes)
            quality = 1 - 0.8 ** (genomes @ np.arange(8))
            told(strategy, genomes, quality)
            qualities += quality.tolist()
            costs += strategy_costs[:, 0].tolist()
        return hypervolume(qualities, costs, (0.0, 40.0))

    assert hypervolume_of(["quality", "sum"]) > hypervolume_of(["reward"])


def test_screened_candidates_lead_to_a_budget_that_almost_nothing_meets() -> None:
    """One genome in 60,000 meets the budget, and no price is known beforehand."""
    strategy = NSGA2(simple_domain([4] * 12, ordered=True), 0)
    for _ in range(150):
        proposals = strategy.ask(8)
        violation = np.maximum(proposals.genomes.sum(axis=1) / 5 - 1.0, 0.0)
        status = np.where(violation > 0, SCREENED, COMPLETE)
        reward = np.where(violation > 0, np.nan, 1.0)
        made = outcomes(proposals.genomes, reward, first=int(proposals.index[0]))
        strategy.tell(dataclasses.replace(made, violation=violation, status=status))
    assert (strategy.violation == 0).all()


def test_nsga2_settings() -> None:
    with pytest.raises(ExperimentError, match="at least 2"):
        NSGA2(simple_domain([2, 2]), 0, population=1)
    with pytest.raises(ExperimentError, match="one value"):
        NSGA2(simple_domain([1, 1]), 0)


# ---- local search ------------------------------------------------------------------------------------


def climb(strategy: LocalSearch, reward: Callable[[Genomes], Any], asks: int, batch: int = 1) -> list[list[int]]:
    """Everything asked, in order."""
    asked: list[list[int]] = []
    for _ in range(asks):
        proposals = strategy.ask(batch)
        asked += proposals.genomes.tolist()
        strategy.tell(outcomes(proposals.genomes, reward(proposals.genomes), first=int(proposals.index[0])))
    return asked


def one_hill(genomes: Genomes) -> Any:
    return -np.abs(genomes - 2).sum(axis=1).astype(float)


@pytest.mark.parametrize("improvement", ["first", "best"])
def test_a_hill_is_climbed_and_its_neighbours_are_tried_once(improvement: Literal["first", "best"]) -> None:
    strategy = LocalSearch(simple_domain([4, 4, 4]), 0, starts=1, improvement=improvement)
    asked = climb(strategy, one_hill, 12 if improvement == "first" else 60)
    climbed = asked[: asked.index([2, 2, 2]) + 1]
    assert len(climbed) <= 1 + 3 * 9
    # From the top, all nine neighbours that are left are tried before anything else.
    strategy = LocalSearch(simple_domain([4, 4, 4]), 0, starts=1, improvement=improvement)
    strategy.tell(outcomes(np.array([[2, 2, 2]]), 0.0, source=EARLIER))
    tried = climb(strategy, one_hill, 9)
    assert (np.abs(np.array(tried) - 2) > 0).sum(axis=1).tolist() == [1] * 9
    assert len({tuple(row) for row in tried}) == 9


def test_first_improvement_goes_on_at_once_and_best_waits() -> None:
    for improvement, distance in (("first", 2), ("best", 1)):
        strategy = LocalSearch(simple_domain([9, 9, 9]), 0, starts=1, improvement=improvement)  # type: ignore[arg-type]
        strategy.tell(outcomes(np.array([[0, 0, 0]]), 0.0, source=EARLIER))
        better = strategy.ask(1)
        strategy.tell(outcomes(better.genomes, 1.0))
        changed = (strategy.ask(20).genomes != 0).sum(axis=1)
        assert changed.max() == distance


def test_batches_are_neighbours_without_repeats_and_then_starts() -> None:
    strategy = LocalSearch(simple_domain([3, 3, 3]), 0, starts=1)
    strategy.tell(outcomes(np.array([[1, 1, 1]]), 1.0, source=EARLIER))
    first, second = strategy.ask(4).genomes, strategy.ask(4).genomes
    changed = (np.concatenate([first, second]) != 1).sum(axis=1)
    assert (changed == 1).sum() == 6  # three genes, two other values each
    assert len(np.unique(np.concatenate([first, second]), axis=0)) == 8


def test_an_optimum_is_left_for_another_climb() -> None:
    """Two hills; the lower one's top is no end."""

    def two_hills(genomes: Genomes) -> Any:
        low, high = np.abs(genomes - 1).sum(axis=1), np.abs(genomes - 7).sum(axis=1)
        return np.maximum(5.0 - low, 20.0 - 4 * high)

    strategy = LocalSearch(simple_domain([9, 9, 9], ordered=True), 0, starts=3)
    strategy.tell(outcomes(np.array([[1, 1, 1]] * 3), 5.0, source=EARLIER))
    climb(strategy, two_hills, 100, batch=4)
    assert strategy.best is not None
    assert strategy.best.tolist() == [7, 7, 7]


def test_late_outcomes_of_the_last_climb_do_not_begin_the_next() -> None:
    strategy = LocalSearch(simple_domain([2, 2]), 0, starts=2)
    strategy.tell(outcomes(np.array([[0, 0]] * 2), 9.0, source=EARLIER))
    around = strategy.ask(2)
    late = strategy.ask(1)
    strategy.tell(outcomes(around.genomes, 1.0))  # an optimum: what is told now belongs to the climb before
    strategy.tell(outcomes(late.genomes, 8.0, first=2))
    started = strategy.ask(2)
    strategy.tell(outcomes(started.genomes[:1], 0.5, first=3))
    assert strategy._scored == 1


def test_dormant_genes_are_no_neighbours() -> None:
    domain = Domain(np.array([5, 5, 5]), np.zeros(3, dtype=bool), lambda g: np.tile([True, False, True], (len(g), 1)))
    strategy = LocalSearch(domain, 0, starts=1)
    strategy.tell(outcomes(np.array([[2, 2, 2]]), 1.0, source=EARLIER))
    asked = strategy.ask(8).genomes
    assert (asked[:, 1] == 2).all()
    assert ((asked != 2).sum(axis=1) == 1).all()


@pytest.mark.parametrize("settings", [{"starts": 0}, {"perturbation": 0}, {"restart": 1.5}])
def test_local_search_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ExperimentError, match=next(iter(settings))):
        LocalSearch(simple_domain([2, 2]), 0, **settings)


# ---- all of them -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AgingEvolution, NSGA2, LocalSearch])
def test_better_than_luck(kind: type[Strategy]) -> None:
    """A separable function of 12 genes with 5 values each, 200 evaluations, mean over 8 seeds; its best value is 1."""
    best = {
        one: np.mean([max(search(one(simple_domain([5] * 12), seed), separable, rounds=50)) for seed in range(8)])
        for one in (kind, RandomSearch)
    }
    assert best[kind] > best[RandomSearch] + 0.1


@pytest.mark.parametrize("kind", [AgingEvolution, NSGA2, LocalSearch])
def test_memory_is_flat_whatever_is_scored(kind: type[Strategy]) -> None:
    """A hundred members are told over and over; what is kept stays as large as it was."""

    def size(rounds: int) -> int:
        strategy = kind(Domain(np.full(4, 30), np.zeros(4, dtype=bool)), 0)
        for _ in range(rounds):
            proposals = strategy.ask(100)
            reward = np.sin(proposals.genomes).sum(axis=1)
            strategy.tell(outcomes(proposals.genomes, reward, first=int(proposals.index[0])))
        return len(pickle.dumps(strategy))

    assert size(60) < 1.5 * size(6) + 2000
