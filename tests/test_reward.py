"""Rewards equal the papers' formulas; fronts, hypervolumes and violations equal what a hand computes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from nas.errors import RewardError
from nas.reward import (
    Limit,
    MnasNetHard,
    MnasNetSoft,
    Reward,
    TuNASAbsolute,
    WeightedProduct,
    hypervolume,
    pareto_front,
    reference_point,
    rewards,
    violation,
    where_defined,
)
from nas.testing import check_reward

TARGETS = {"latency_ms": 80.0, "size_bytes": 2e6, "latency_ms@pixel": 12.0}
NAMES = ("size_bytes", "latency_ms", "macs", "latency_ms@pixel")
WEIGHTS = {"latency_ms": -0.07, "size_bytes": -0.03}
SETTINGS: dict[str, dict[str, Any]] = {"weighted_product": {"weights": WEIGHTS}}


@pytest.mark.parametrize("target", [0.05, 80.0])
@pytest.mark.parametrize("kind", list(rewards))
def test_every_registered_reward(kind: str, target: float) -> None:
    settings = SETTINGS.get(kind, {})
    check_reward(rewards.get(kind)({**TARGETS, "latency_ms": target}, **settings))
    if not settings:
        check_reward(rewards.get(kind)(target))


def test_mnasnet_soft_equals_the_paper() -> None:
    """Tan et al. 2019, section 3: doubling the latency for 5 % more accuracy gives about the same reward."""
    reward = MnasNetSoft(80.0)
    assert float(reward(0.75, 160.0)) == pytest.approx(0.75 * 2**-0.07, rel=1e-12)
    assert float(reward(0.75, 40.0)) == pytest.approx(0.75 * 0.5**-0.07, rel=1e-12)
    assert float(reward(0.75, 80.0)) == 0.75
    assert float(reward(0.5 * 1.05, 160.0)) == pytest.approx(float(reward(0.5, 80.0)), rel=1e-3)
    assert float(MnasNetSoft(80.0, w=-0.2)(0.75, 160.0)) == pytest.approx(0.75 * 2**-0.2, rel=1e-12)


def test_mnasnet_hard_equals_the_paper() -> None:
    reward = MnasNetHard(80.0)
    np.testing.assert_allclose(
        reward([0.7, 0.7, 0.7, 0.7], [8.0, 80.0, 160.0, 320.0]), [0.7, 0.7, 0.35, 0.175], rtol=1e-12
    )
    assert float(MnasNetHard(80.0, w=-0.5)(0.7, 320.0)) == pytest.approx(0.35, rel=1e-12)


def test_tunas_absolute_equals_the_paper() -> None:
    """Bender et al. 2020, equation 3: both sides of the target cost the same."""
    reward = TuNASAbsolute(80.0)
    np.testing.assert_allclose(reward([0.7] * 4, [40.0, 80.0, 120.0, 200.0]), [0.665, 0.7, 0.665, 0.595], rtol=1e-12)
    assert float(TuNASAbsolute(80.0, beta=-0.5)(-3.0, 160.0)) == pytest.approx(-3.5, rel=1e-12)


def test_the_first_target_is_that_of_a_reward_of_one_cost() -> None:
    """Which latency is meant is the experiment's to say; the other columns do not matter."""
    reward = MnasNetSoft({"latency_p95_ms": 3.0, "latency_ms": 2.0, "size_bytes": 100.0})
    assert reward.costs == ("latency_p95_ms",)
    assert reward.target == 3.0
    got = reward.score([0.75, 0.5], [[9.0, 6.0, 1.0], [9.0, 3.0, 1.0]], ("latency_ms", "latency_p95_ms", "macs"))
    np.testing.assert_allclose(got, [0.75 * 2**-0.07, 0.5], rtol=1e-12)


def test_weighted_product_is_mnasnets_product_with_one_factor_a_cost() -> None:
    """R = Q · Π (c_i/T_i)^w_i, Tan et al. 2019, equation 2, factor by factor."""
    weights = {"latency_ms": -0.07, "size_bytes": -0.03, "latency_ms@pixel": -0.2}
    reward = WeightedProduct(TARGETS, weights)
    assert reward.costs == tuple(weights)
    rng = np.random.default_rng(0)
    quality, costs = rng.uniform(0.1, 1.0, 50), rng.uniform(0.1, 200.0, (50, 4))
    wanted = quality.copy()
    for name, weight in weights.items():
        wanted *= (costs[:, NAMES.index(name)] / TARGETS[name]) ** weight
    np.testing.assert_allclose(reward.score(quality, costs, NAMES), wanted, rtol=1e-12)


def test_weighted_product_with_one_cost_is_mnasnet_soft() -> None:
    soft, product = MnasNetSoft(80.0), WeightedProduct(80.0, {"latency_ms": -0.07})
    quality, costs = np.array([0.7, 0.8, 0.9]), np.array([[40.0], [80.0], [200.0]])
    np.testing.assert_allclose(
        product.score(quality, costs, ["latency_ms"]), soft.score(quality, costs, ["latency_ms"]), rtol=1e-12
    )


def test_targets_of_a_product_may_be_its_own() -> None:
    assert WeightedProduct(TARGETS, WEIGHTS, {"size_bytes": 5.0}).targets == {"latency_ms": 80.0, "size_bytes": 5.0}
    assert WeightedProduct(TARGETS, {"energy_mj": -1.0}, {"energy_mj": 3.0}).targets == {"energy_mj": 3.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": {}}, "has no weights"),
        (
            {"weights": {"energy_mj": -0.1}},
            r"no target for the cost 'energy_mj'[^$]*latency_ms@pixel[^$]*reward.targets",
        ),
        ({"weights": WEIGHTS, "targets": {"macs": 1e6}}, r"reward\.targets names 'macs'[^$]*size_bytes"),
        ({"weights": {"latency_ms": 0.07}}, r"weights\.latency_ms = 0\.07[^$]*≤ 0"),
        ({"weights": {"latency_ms": -math.inf}}, r"weights\.latency_ms"),
        ({"weights": WEIGHTS, "targets": {"size_bytes": 0.0}}, r"target 0\.0 for size_bytes"),
    ],
)
def test_products_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        WeightedProduct(TARGETS, **settings)


def test_a_cost_that_is_not_priced_is_named() -> None:
    with pytest.raises(RewardError, match=r"reads the cost 'latency_ms'[^$]*one of macs, params"):
        MnasNetSoft(1.0).score([0.5], [[1.0, 2.0]], ("macs", "params"))


def test_where_a_reward_is_not_defined() -> None:
    quality, costs = [0.5, 0.0, math.nan, 0.5, -1.0], [[2.0]] * 5
    got = where_defined(MnasNetSoft(1.0), quality, costs, ["latency_ms"])
    known = 0.5 * 2**-0.07
    np.testing.assert_allclose(got, [known, np.nan, np.nan, known, np.nan], rtol=1e-12)
    got = where_defined(TuNASAbsolute(1.0), quality, costs, ["latency_ms"])
    np.testing.assert_allclose(got, [0.43, -0.07, np.nan, 0.43, -1.07], rtol=1e-12)
    with pytest.raises(RewardError, match="reads the cost"):
        where_defined(MnasNetSoft(1.0), quality, costs, ["macs"])


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("kind", list(rewards))
def test_targets_are_costs(kind: str, target: float) -> None:
    with pytest.raises(RewardError, match="target"):
        rewards.get(kind)({**TARGETS, "latency_ms": target}, **SETTINGS.get(kind, {}))


@pytest.mark.parametrize(
    ("kind", "settings"), [(MnasNetSoft, {"w": 0.07}), (MnasNetHard, {"w": 1.0}), (TuNASAbsolute, {"beta": 0.1})]
)
def test_exponents_that_would_pay_for_latency(kind: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(RewardError, match=rf"{next(iter(settings.values()))}[^$]*≤ 0"):
        kind(1.0, **settings)


@pytest.mark.parametrize(
    "reward",
    [MnasNetSoft(1.0), MnasNetHard(1.0), WeightedProduct(1.0, {"latency_ms": -1.0})],
    ids=lambda r: type(r).__name__,
)
@pytest.mark.parametrize("quality", [0.0, -0.5])
def test_multiplicative_rewards_refuse_what_they_would_turn_round(reward: Reward, quality: float) -> None:
    with pytest.raises(RewardError, match="multiplies by the quality") as caught:
        reward.score([0.5, quality], [[1.0], [2.0]], ["latency_ms"])
    assert "tunas_absolute" in caught.value.remedy


# ---- budgets -----------------------------------------------------------------------------------------


def test_violation_by_hand() -> None:
    names = ("latency_ms", "size_bytes")
    limits = (Limit("latency_ms", 2.0), Limit("size_bytes", 100.0))
    costs = [[1.0, 50.0], [2.0, 100.0], [3.0, 100.0], [1.0, 150.0], [4.0, 200.0]]
    np.testing.assert_allclose(violation(costs, names, limits), [0, 0, 0.5, 0.5, 2.0])
    np.testing.assert_allclose(violation(costs, names, limits[1:]), [0, 0, 0, 0.5, 1.0])
    assert violation(costs, names, ()).tolist() == [0] * 5


# ---- fronts ------------------------------------------------------------------------------------------

QUALITY = [0.5, 0.7, 0.6, 0.9, 0.8, 0.9, 0.4]
COST = [1.0, 2.0, 3.0, 4.0, 4.0, 5.0, 0.5]


def test_pareto_front_by_hand() -> None:
    assert pareto_front(QUALITY, COST).tolist() == [6, 0, 1, 3]
    assert pareto_front([], []).tolist() == []
    assert pareto_front([0.5], [1.0]).tolist() == [0]
    # equal costs: only the better; equal points: only one
    assert pareto_front([0.5, 0.6, 0.6], [1.0, 1.0, 1.0]).tolist() == [1]


def test_hypervolume_by_hand() -> None:
    # columns from 0.5 to 1, 1 to 2, 2 to 4, 4 to 6
    assert hypervolume(QUALITY, COST, (0.0, 6.0)) == pytest.approx(0.5 * 0.4 + 1 * 0.5 + 2 * 0.7 + 2 * 0.9)
    # the reference cuts off what is dearer or worse than it
    assert hypervolume(QUALITY, COST, (0.45, 3.5)) == pytest.approx(1 * 0.05 + 1.5 * 0.25)
    assert hypervolume(QUALITY, COST, (0.95, 6.0)) == 0.0
    assert hypervolume([], [], (0.0, 1.0)) == 0.0


def test_front_and_hypervolume_equal_brute_force() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        q, c = rng.integers(1, 12, (2, 25)).astype(float)
        beaten = (
            (q[None] >= q[:, None]) & (c[None] <= c[:, None]) & ((q[None] > q[:, None]) | (c[None] < c[:, None]))
        ).any(1)
        wanted = {(q[i], c[i]) for i in np.flatnonzero(~beaten)}
        front = pareto_front(q, c)
        assert {(q[i], c[i]) for i in front} == wanted
        assert len(front) == len(wanted)
        assert (np.diff(c[front]) > 0).all()
        cells = sum(bool(((q >= x) & (c <= y)).any()) for x in range(1, 13) for y in range(13))
        assert hypervolume(q, c, (0.0, 13.0)) == cells


@pytest.mark.parametrize("k", [1, 2, 3])
def test_fronts_of_any_number_of_costs_equal_brute_force(k: int) -> None:
    rng = np.random.default_rng(k)
    for _ in range(10):
        q, c = rng.integers(0, 6, 60).astype(float), rng.integers(1, 6, (60, k)).astype(float)
        points = np.column_stack([c, -q])
        beaten = ((points[None] <= points[:, None]).all(2) & (points[None] < points[:, None]).any(2)).any(1)
        front = pareto_front(q, c)
        assert {tuple(points[i]) for i in front} == {tuple(p) for p in points[~beaten]}
        assert len(front) == len({tuple(p) for p in points[~beaten]}), "equal points, only one"
        assert (np.diff(c[front, 0]) >= 0).all()
        if k == 1:
            assert front.tolist() == pareto_front(q, c[:, 0]).tolist()


def test_unknown_values_are_on_no_front() -> None:
    assert pareto_front([0.5, math.nan, 0.9], [1.0, 0.1, math.nan]).tolist() == [0]
    assert pareto_front([0.5, 0.6], [[1.0, math.nan], [2.0, 2.0]]).tolist() == [1]
    assert hypervolume([0.5, math.nan], [1.0, 0.1], (0.0, 2.0)) == 0.5


def test_a_long_front_is_found_at_once() -> None:
    """50,000 points, all of them on the front; the last one hides a thousand copies."""
    x = np.linspace(0.0, 1.0, 50_000)
    front = pareto_front(np.concatenate([x, np.full(1000, 1.0)]), np.concatenate([x, np.full(1000, 1.0)]))
    assert front.tolist() == list(range(50_000))


def test_hypervolume_of_boxes_by_hand() -> None:
    """Two boxes in three dimensions: 0.5·1·1 and 0.3·2·2, which share 0.3·1·1."""
    assert hypervolume([0.5, 0.3], [[2.0, 2.0], [1.0, 1.0]], (0.0, 3.0, 3.0)) == pytest.approx(0.5 + 1.2 - 0.3)
    assert hypervolume([0.5], [[2.0, 2.0, 1.0]], (0.1, 3.0, 4.0, 2.0)) == pytest.approx(0.4 * 1 * 2 * 1)
    assert hypervolume([0.5, 0.4], [[3.0, 1.0], [1.0, 3.0]], (0.0, 3.0, 3.0)) == 0.0, "none is inside"
    with pytest.raises(RewardError, match=r"3 numbers[^$]*1 cost"):
        hypervolume([0.5], [1.0], (0.0, 1.0, 1.0))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_hypervolume_equals_monte_carlo(k: int) -> None:
    """The share of a million random points that something dominates, within five standard errors."""
    rng = np.random.default_rng(k)
    quality, costs = rng.random(40), rng.random((40, k))
    reference = (0.1, *[0.9] * k)
    samples = rng.uniform([0.1] + [0.0] * k, [1.0] + [0.9] * k, (1_000_000, 1 + k))
    dominated = np.zeros(len(samples), dtype=bool)
    for i in pareto_front(quality, costs):
        dominated |= (samples[:, 0] <= quality[i]) & (samples[:, 1:] >= costs[i]).all(axis=1)
    box = 0.9 ** (1 + k)
    error = box * float(dominated.std()) / math.sqrt(len(samples))
    assert hypervolume(quality, costs, reference) == pytest.approx(box * float(dominated.mean()), abs=5 * error)


def test_hypervolume_in_whole_cells_is_exact() -> None:
    rng = np.random.default_rng(5)
    q, c = rng.integers(1, 6, 15).astype(float), rng.integers(0, 5, (15, 2)).astype(float)
    cells = sum(
        bool(((q >= x) & (c[:, 0] <= y) & (c[:, 1] <= z)).any())
        for x in range(1, 7)
        for y in range(6)
        for z in range(6)
    )
    assert hypervolume(q, c, (0.0, 6.0, 6.0)) == pytest.approx(cells, rel=1e-12)


def test_reference_points_do_not_move_with_the_best() -> None:
    costs = [[1.0, 50.0], [3.0, 70.0]]
    names, limits = ("latency_ms", "size_bytes"), (Limit("latency_ms", 2.0), Limit("macs", 1e6))
    assert reference_point([0.5, 0.9], costs, names, limits) == (0.0, 2.0, 70.0)
    assert reference_point([-3.0, 0.9], costs, names, ()) == (-3.0, 3.0, 70.0)
