"""The fit recovers the law that made its data, and leaves a sum alone that is right already."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from nas.latency.fit import LinearFit, error, features, fit, spearman
from nas.parts import PRECISIONS, Boundary, Conv, Part

FP32 = Part((Conv(8, 1),), (8, 4, 4))
INT8 = Part((Conv(8, 1),), (8, 4, 4), "int8", 3)
CROSSING = Part((Boundary("quantize"),), (8, 4, 4), "boundary")


def nets(n: int, seed: int = 0) -> list[list[tuple[Part, float]]]:
    rng = np.random.default_rng(seed)
    kinds = (FP32, INT8, CROSSING)
    return [
        [(kinds[k], float(rng.lognormal(-3, 0.5))) for k in rng.integers(0, 3, rng.integers(4, 25))] for _ in range(n)
    ]


def test_features_by_hand() -> None:
    rows = features([[(FP32, 0.5), (INT8, 0.25), (FP32, 1.0)], [(CROSSING, 0.125)]])
    assert PRECISIONS == ("fp32", "int8", "boundary")
    # sums by group with the count, parts by group with the count, one net
    assert rows.tolist() == [[1.5, 0.75, 0.0, 2.0, 3.0, 0.0, 1.0], [0.0, 0.0, 0.125, 0.0, 0.0, 1.0, 1.0]]


def test_nets_that_equal_their_sums_leave_the_sum_unchanged() -> None:
    x = features(nets(24))
    y = x[:, :3].sum(axis=1)
    result, quality, held_out = fit(x, y)
    np.testing.assert_allclose(result.scale, 1.0, atol=1e-9)
    np.testing.assert_allclose(result.per_part, 0.0, atol=1e-9)
    assert result.per_net == pytest.approx(0.0, abs=1e-9)
    np.testing.assert_allclose(held_out, y, rtol=1e-9)
    assert quality.mape == pytest.approx(0, abs=1e-9)
    assert quality.spearman == pytest.approx(1)
    assert (quality.within_5, quality.within_10, quality.nets) == (1.0, 1.0, 24)


@pytest.mark.parametrize("unit", [1.0, 1e3, 1e6])
def test_known_coefficients_are_recovered(unit: float) -> None:
    """Whatever the unit: one ridge serves milliseconds and bytes."""
    x = features(nets(30))
    x[:, :3] *= unit
    law = np.array([0.85, 1.2, 0.7, 0.01 * unit, -0.005 * unit, 0.02 * unit, 0.1 * unit])
    y = x @ law
    result, quality, _ = fit(x, y)
    found = np.array([*result.scale, *result.per_part, result.per_net])
    np.testing.assert_allclose(found[:3], law[:3], atol=0.08)
    np.testing.assert_allclose(found[3:] / unit, law[3:] / unit, atol=0.04)
    assert quality.mape < 0.01
    assert quality.within_5 == 1.0
    fresh = features(nets(40, seed=1))
    fresh[:, :3] *= unit
    np.testing.assert_allclose(fresh @ found, fresh @ law, rtol=0.05)


def test_noise_does_not_run_away_on_few_nets() -> None:
    rng = np.random.default_rng(0)
    x = features(nets(20))
    law = np.array([0.9, 1.1, 1.0, 0.003, 0.0, 0.0, 0.02])
    y = x @ law * rng.lognormal(0, 0.02, 20)
    result, quality, _ = fit(x, y)
    assert quality.mape < 0.04
    assert quality.within_10 > 0.9
    fresh = features(nets(200, seed=2))
    found = np.array([*result.scale, *result.per_part, result.per_net])
    assert np.mean(np.abs(fresh @ found / (fresh @ law) - 1)) < 0.03


def test_groups_that_no_net_has_stay_plain() -> None:
    """A table without int8 nets must not invent a correction for them."""
    only = [[(part, value) for part, value in net if part is FP32] or [(FP32, 0.1)] for net in nets(20)]
    x = features(only)
    result, _, _ = fit(x, 0.8 * x[:, 0] + 0.05)
    assert result.scale[1:] == (1.0, 1.0)
    assert result.per_part[1:] == (0.0, 0.0)
    assert result.part(0.3, INT8) == 0.3


def test_the_fit_of_a_part() -> None:
    one = LinearFit((0.5, 2.0, 3.0), (0.1, 0.2, 0.3), 7.0)
    assert one.part(1.0, FP32) == pytest.approx(0.6)
    assert one.part(1.0, INT8) == pytest.approx(2.2)
    assert one.part(1.0, CROSSING) == pytest.approx(3.3)
    assert LinearFit(**one.as_dict()) == one
    assert LinearFit().part(0.7, INT8) == 0.7


def test_held_out_predictions_have_not_seen_their_net() -> None:
    x = features(nets(20))
    y = x[:, :3].sum(axis=1)
    spoiled = y.copy()
    spoiled[3] *= 2
    _, _, held_out = fit(x, spoiled)
    assert held_out[3] == pytest.approx(y[3], rel=1e-6)


def test_errors_by_hand() -> None:
    found = error(np.array([1.0, 1.04, 0.92, 1.2]), np.ones(4) * np.array([1.0, 1.0, 1.0, 1.0]))
    assert found.mape == pytest.approx((0 + 0.04 + 0.08 + 0.2) / 4)
    assert (found.within_5, found.within_10, found.nets) == (0.5, 0.75, 4)
    assert found.spearman == 0.0


def test_spearman_with_ties() -> None:
    a, b = [1, 2, 2, 3, 5, 5], [2, 1, 4, 4, 5, 9]
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert spearman([1, 2, 3], [10, 20, 30]) == pytest.approx(1.0)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    assert spearman([1, 2, 3], [1, 1, 1]) == 0.0
