"""The default strategy: its Gaussian process, the scale it works on, what it knows beforehand, and what it finds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from nas.errors import ContentError, ExperimentError
from nas.space import Genomes
from nas.strategies import Domain, Objective, Outcomes, Proposals, Strategy, Surrogate, strategies
from nas.strategies.base import ASKED, COMPLETE, DUPLICATE, EARLIER, FAILED, SCREENED
from nas.strategies.gaussian_process import GaussianProcess, Posterior
from nas.strategies.quality_model import Archive, Foresight, QualityModel, log_expected_improvement
from nas.strategies.warp import Warp

SMALL = np.array([4, 4, 4, 4, 3, 3])
KINDS = np.array([0, 0, 0, 0, 4, 4])
LARGE = np.array([5] * 8 + [3] * 8)  # 2.6 thousand million genomes


def quality(genomes: Genomes) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Additive with neighbours that help each other: no strategy gets it from one gene at a time."""
    g = np.asarray(genomes)
    return np.asarray(0.5 + 0.02 * g.sum(axis=1) + 0.05 * (g[:, :-1] == g[:, 1:]).sum(axis=1) / g.shape[1])


def cost(genomes: Genomes) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.asarray(1.0 + genomes.sum(axis=1, keepdims=True))


def objective(limit: float = math.inf, slope: float = 0.0) -> Objective:
    return Objective(
        ("latency_ms",),
        cost,
        lambda costs: np.maximum(costs[:, 0] / limit - 1, 0.0),
        lambda values, costs: values - slope * costs[:, 0],
    )


def domain(sizes: Any = SMALL, kinds: Any = KINDS, **known: Any) -> Domain:
    return Domain(np.asarray(sizes), np.arange(len(sizes)) % 2 == 1, kinds=kinds, **known)


def told(strategy: Strategy, asked: Proposals, source: str = ASKED, seen: set[bytes] | None = None) -> Outcomes:
    known = strategy.domain.objective
    costs = cost(asked.genomes)
    violation = np.zeros(len(costs)) if known is None else known.violation(costs)
    values = np.where(violation > 0, np.nan, quality(asked.genomes))
    status = np.where(violation > 0, SCREENED, COMPLETE).astype("<U9")
    for i, genome in enumerate(asked.genomes):
        if seen is not None and violation[i] <= 0:
            status[i] = DUPLICATE if genome.tobytes() in seen else COMPLETE
            seen.add(genome.tobytes())
    reward = values if known is None else known.reward(values, costs)
    return Outcomes(
        asked.index, asked.genomes, values, costs, violation, reward, asked.fidelity, status,
        np.full(len(costs), source),
    )  # fmt: skip


def run(strategy: Strategy, queries: int, batch: int = 1) -> tuple[float, list[Genomes]]:
    """Best reward after so many distinct evaluations, and all that was proposed."""
    seen: set[bytes] = set()
    best, proposed = -math.inf, []
    while len(seen) < queries:
        asked = strategy.ask(batch)
        outcomes = told(strategy, asked, seen=seen)
        strategy.tell(outcomes)
        proposed.append(asked.genomes)
        best = max([best, *outcomes.reward[outcomes.scored].tolist()])
    return best, proposed


# ---- the process -------------------------------------------------------------------------------------


def process_with_data() -> tuple[GaussianProcess, Any, Any, Any]:
    rng = np.random.default_rng(0)
    model = GaussianProcess(domain(), features=2)
    for name, value in model.parameters.items():
        model.parameters[name] = value + 0.1 * rng.normal(size=value.shape)
    return model, rng.integers(0, SMALL, (30, 6)), rng.normal(size=(30, 2)), rng.normal(size=30)


def test_the_gradient_is_the_derivative_of_the_loss() -> None:
    model, genomes, known, y = process_with_data()
    before = {name: value.copy() for name, value in model.parameters.items()}
    onehots = [(model._values(genomes, k)[:, :, None] == np.arange(k.values + 1)).astype(float) for k in model._kinds]
    gradient = model._gradient(genomes, known, y, onehots, model._counts(genomes))
    assert gradient is not None
    assert set(gradient) == set(before)
    for name, value in before.items():
        numeric = np.zeros_like(value)
        for place in np.ndindex(value.shape):
            losses = []
            for step in (1e-5, -1e-5):
                model.parameters[name] = value.copy()
                model.parameters[name][place] += step
                losses.append(model.loss(genomes, known, y))
            numeric[place] = (losses[0] - losses[1]) / 2e-5
        model.parameters[name] = value
        np.testing.assert_allclose(gradient[name], numeric, atol=1e-6, err_msg=name)


def test_fitting_lowers_the_loss() -> None:
    model, genomes, known, _ = process_with_data()
    y = quality(genomes)
    y = (y - y.mean()) / y.std()
    before = model.loss(genomes, known, y)
    model.fit(genomes, known, y, steps=40)
    assert model.loss(genomes, known, y) < before - 5


def test_data_added_one_by_one_are_data_given_at_once() -> None:
    model, genomes, known, y = process_with_data()
    everything = model.embed(genomes, known)
    at_once = Posterior(model, everything)
    pool = model.embed(genomes[::-1], known[::-1])
    grown = Posterior(model, model.embed(genomes[:20], known[:20]), pool)
    for i in range(20, 30):
        grown.add(model.embed(genomes[i : i + 1], known[i : i + 1]))
    for found, wanted in zip(grown.predict(pool, y), at_once.predict(pool, y), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-8)
    for found, wanted in zip(grown.predict_pool(y), at_once.predict(pool, y), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-8)


def test_a_dormant_gene_has_a_value_of_its_own() -> None:
    def active(genomes: Genomes) -> Any:
        mask = np.ones(np.atleast_2d(genomes).shape, dtype=bool)
        mask[:, 1:] = np.atleast_2d(genomes)[:, :1] > 0
        return mask

    model = GaussianProcess(Domain(SMALL, np.zeros(6, dtype=bool), active, KINDS))
    encoded = model.encode(np.array([[0, 1, 2, 3, 1, 2], [1, 1, 2, 3, 1, 2]]))
    assert encoded.tolist() == [[0, 4, 4, 4, 3, 3], [1, 1, 2, 3, 1, 2]]
    empty = np.zeros((2, 0))
    place, count, _ = model.embed(encoded, empty)
    assert place.shape[0] == count.shape[0] == 2


# ---- the scale, and the improvement -------------------------------------------------------------------


@pytest.mark.parametrize("values", [[0.1, 0.9, 0.91, 0.92], [5.0, 5.0, 5.0], [-3.0, -2.0, 0.0], [0.3]])
def test_the_warp_can_be_undone_and_never_falls(values: list[float]) -> None:
    warp = Warp(np.array(values))
    q = np.linspace(min(values) - 1, max(values) + 1, 101)
    z = warp(q)
    assert (np.diff(z) > 0).all()
    np.testing.assert_allclose(warp.inverse(z), q, atol=1e-9)


def test_the_warp_stretches_what_is_good() -> None:
    values = np.array([10.0, 70.0, 88.0, 90.0, 91.0, 91.5])
    z = Warp(values)(values)
    slope = np.diff(z) / np.diff(values)
    assert (np.diff(slope) > 0).all()  # the better, the more a point counts
    assert z.mean() == pytest.approx(0, abs=1e-12)
    assert z.std() == pytest.approx(1)


def test_expected_improvement() -> None:
    u = np.array([-5.0, -1.0, -0.99, 0.0, 2.0])
    np.testing.assert_allclose(log_expected_improvement(u), np.log(norm.pdf(u) + u * norm.cdf(u)), rtol=1e-8)
    far = log_expected_improvement(-np.geomspace(1.0, 1e6, 200))
    assert np.isfinite(far).all()
    assert (np.diff(far) < 0).all()


# ---- what it knows -----------------------------------------------------------------------------------


def test_failures_count_as_the_worst_and_memory_keeps_the_best() -> None:
    archive = Archive(2)
    genomes = np.array([[i, 0] for i in range(40)])
    archive.add(genomes, np.where(np.arange(40) == 3, np.nan, np.arange(40.0)))
    assert archive.values[3] == 0.0
    assert archive.succeeded == 39
    assert archive.best(2).tolist() == [[39, 0], [38, 0]]
    kept = archive.best_and_latest(10)
    assert kept == sorted(kept)
    assert {35, 36, 37, 38, 39} <= set(kept)
    assert len(kept) == 10
    archive.add(genomes[:1], np.array([99.0]))
    assert len(archive) == 40
    assert archive.best(1).tolist() == [[0, 0]]


def test_costs_are_features_unless_they_say_nothing() -> None:
    constant = Objective(
        ("a", "b"), lambda g: np.column_stack([cost(g), np.ones(len(g))]), lambda c: np.zeros(len(c)), max
    )
    foresight = Foresight(domain(objective=constant), [], 0)
    assert foresight.features == 1
    pool = foresight.pool(np.array([[0] * 6, [2] * 6]))
    assert pool.known.shape == (2, 1)
    assert pool.known[1, 0] > pool.known[0, 0]
    holes = Objective(("a",), lambda g: np.where(g[:, :1] == 0, np.inf, cost(g)), lambda c: np.zeros(len(c)), max)
    assert np.isfinite(Foresight(domain(objective=holes), [], 0).pool(np.zeros((1, 6), dtype=int)).known).all()


def test_earlier_searches_are_one_more_thing_known() -> None:
    rng = np.random.default_rng(1)
    genomes = rng.integers(0, SMALL, (60, 6))
    strategy = Surrogate(domain(), 0)
    strategy.tell(told(strategy, Proposals(np.arange(60), genomes, np.ones(60)), source=EARLIER))
    assert len(strategy.archive) == 0
    foresight = strategy._foresight
    assert foresight.features == 1
    probe = rng.integers(0, SMALL, (200, 6))
    assert np.corrcoef(foresight.pool(probe).known[:, 0], quality(probe))[0, 1] > 0.8


def test_the_wanted_quality_makes_up_for_the_cost() -> None:
    """Under a soft reward a dearer candidate must be better: by exactly what its cost takes away."""
    slope = 0.01
    archive = Archive(6)
    genomes = np.random.default_rng(0).integers(0, SMALL, (12, 6))
    archive.add(genomes, quality(genomes))
    foresight = Foresight(domain(objective=objective(slope=slope)), [], 0)
    model = QualityModel(foresight, archive, list(range(len(archive))))
    pool = foresight.pool(np.array([[0] * 6, [3, 3, 3, 3, 2, 2]]))
    known = foresight.pool(archive.genomes)
    best = (archive.values - slope * known.costs[:, 0]).max()
    np.testing.assert_allclose(model.warp.inverse(model._wanted(pool)), best + slope * pool.costs[:, 0], atol=1e-4)


# ---- what it proposes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [math.inf, 10.0], ids=["free", "budget"])
def test_it_finds_the_best_of_a_small_space(limit: float) -> None:
    grid = np.indices(tuple(SMALL)).reshape(6, -1).T
    feasible = cost(grid)[:, 0] <= limit
    highest = quality(grid)[feasible].max()
    for seed in range(3):
        best, proposed = run(Surrogate(domain(objective=objective(limit)), seed), 40)
        assert best == pytest.approx(highest)
        assert (cost(np.concatenate(proposed)) <= limit).all()  # prices are known: nothing else is asked


@pytest.mark.parametrize("name", ["evolution", "random", "reinforce", "local-search"])
def test_a_surrogate_is_no_worse_than_what_it_wraps(name: str) -> None:
    known = domain(LARGE, None, objective=objective(25.0))
    plain = np.mean([run(strategies.get(name)(known, seed), 60)[0] for seed in range(3)])
    assisted = np.mean([run(strategies.get(f"surrogate:{name}")(known, seed, steps=500), 60)[0] for seed in range(3)])
    assert assisted >= plain


def test_unknown_budgets_are_learnt() -> None:
    """Without prices, what breaks a budget is not proposed again, and its like less and less."""
    strategy = Surrogate(domain(), 0)
    asked = []
    for _ in range(60):
        one = strategy.ask()
        outcomes = told(strategy, one)
        over = outcomes.costs[:, 0] > 10
        strategy.tell(
            Outcomes(
                outcomes.index, outcomes.genomes, np.where(over, np.nan, outcomes.quality), outcomes.costs,
                over.astype(float), np.where(over, np.nan, outcomes.reward), outcomes.fidelity,
                np.where(over, SCREENED, COMPLETE), outcomes.source,
            )
        )  # fmt: skip
        asked.append((one.genomes[0].tobytes(), bool(over[0])))
    assert len({genome for genome, _ in asked}) == 60
    assert sum(over for _, over in asked[30:]) < sum(over for _, over in asked[:30])


def test_a_batch_is_spread() -> None:
    """What is under way counts as known: a batch is no single point and its neighbours' neighbours."""
    strategy = Surrogate(domain(objective=objective()), 3)
    strategy.tell(told(strategy, strategy.ask(10)))
    first = strategy.ask(6).genomes
    second = strategy.ask(6).genomes
    assert len(np.unique(np.concatenate([first, second]), axis=0)) == 12


def test_failed_candidates_are_not_tried_again() -> None:
    strategy = Surrogate(domain(), 0)
    seen = set()
    for _ in range(30):
        asked = strategy.ask()
        outcomes = told(strategy, asked)
        failed = asked.genomes[0, 0] == 0
        status = np.array([FAILED if failed else COMPLETE])
        value = np.where(failed, np.nan, outcomes.quality)
        strategy.tell(
            Outcomes(
                outcomes.index, outcomes.genomes, value, outcomes.costs, outcomes.violation, value,
                outcomes.fidelity, status, outcomes.source,
            )
        )  # fmt: skip
        seen.add(asked.genomes[0].tobytes())
    assert len(seen) == 30


@pytest.mark.parametrize("kind", ["default", "surrogate:random"])
def test_the_same_calls_give_the_same_proposals(kind: str) -> None:
    def trail(seed: int) -> Genomes:
        return np.concatenate(run(strategies.get(kind)(domain(LARGE, None), seed, steps=300), 24, batch=3)[1])

    assert np.array_equal(trail(5), trail(5))
    assert not np.array_equal(trail(5), trail(6))


def test_an_exhausted_space_goes_on() -> None:
    strategy = Surrogate(domain([2, 3], [0, 1]), 0)
    seen: set[bytes] = set()
    for _ in range(12):
        strategy.tell(told(strategy, strategy.ask(2), seen=seen))
    assert len(seen) == 6


@pytest.mark.parametrize("settings", [{"initial": 1}, {"steps": 0}, {"memory": 5}])
def test_settings_are_checked(settings: dict[str, int]) -> None:
    with pytest.raises(ExperimentError, match=next(iter(settings))):
        Surrogate(domain(), 0, **settings)


def test_what_is_wrapped_must_exist() -> None:
    with pytest.raises(ContentError, match="Unknown strategy 'nothing'"):
        strategies.get("surrogate:nothing")
    with pytest.raises(ExperimentError, match=r"strategy\.settings\.popultion"):
        Surrogate(domain(), 0, settings={"popultion": 3})
