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
    hypervolume,
    pareto_front,
    rewards,
    violation,
)
from nas.testing import check_reward


@pytest.mark.parametrize("target", [0.05, 80.0])
@pytest.mark.parametrize("kind", list(rewards))
def test_every_registered_reward(kind: str, target: float) -> None:
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


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("kind", list(rewards))
def test_targets_are_costs(kind: str, target: float) -> None:
    with pytest.raises(RewardError, match="target"):
        rewards.get(kind)(target)


@pytest.mark.parametrize(
    ("kind", "settings"), [(MnasNetSoft, {"w": 0.07}), (MnasNetHard, {"w": 1.0}), (TuNASAbsolute, {"beta": 0.1})]
)
def test_exponents_that_would_pay_for_latency(kind: type[Reward], settings: dict[str, Any]) -> None:
    with pytest.raises(RewardError, match=rf"{next(iter(settings.values()))}[^$]*≤ 0"):
        kind(1.0, **settings)


@pytest.mark.parametrize("kind", [MnasNetSoft, MnasNetHard])
@pytest.mark.parametrize("quality", [0.0, -0.5])
def test_multiplicative_rewards_refuse_what_they_would_turn_round(kind: type[Reward], quality: float) -> None:
    with pytest.raises(RewardError, match="multiplies by the quality") as caught:
        kind(1.0)([0.5, quality], [1.0, 2.0])
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
