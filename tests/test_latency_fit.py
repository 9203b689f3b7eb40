"""The fit recovers the law that made its data, and leaves a sum alone that is right already."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from nas.latency.fit import PLAIN, TERMS, LinearFit, error, features, fit, plain_sums, spearman
from nas.parts import PRECISIONS, Boundary, Conv, Part

FP32 = Part((Conv(8, 1),), (8, 4, 4))
INT8 = Part((Conv(8, 1),), (8, 4, 4), "int8", 3)
CROSSING = Part((Boundary("quantize"),), (8, 4, 4), "boundary")


def nets(n: int, seed: int = 0) -> list[list[tuple[Part, float]]]:
    rng = np.random.default_rng(seed)
    kinds = [
        Part((Conv(width, kernel),), (8, side, side), precision)
        for width in (8, 16, 64) for kernel in (1, 3) for side in (4, 16, 56) for precision in ("fp32", "int8")
    ]  # fmt: skip
    kinds += [Part((Boundary("quantize"),), (width, 16, 16), "boundary") for width in (8, 64)] * 4
    return [
        [(kinds[k], float(rng.lognormal(-3, 0.5))) for k in rng.integers(0, len(kinds), rng.integers(4, 25))]
        for _ in range(n)
    ]


LAW = LinearFit((0.85, 1.2, 0.7), (0.01, -0.005, 0.02), (-0.1, 0.05, 0.2), (2.0, -1.0, 0.0), (0.3, 0.2, 0.0), 0.1)


def costs(some: list[list[tuple[Part, float]]], law: LinearFit) -> np.ndarray:
    return np.array([law.net(net) for net in some])


def test_features_by_hand() -> None:
    rows = features([[(FP32, 0.5), (INT8, 0.25), (FP32, 1.0)], [(CROSSING, 0.125)]])
    assert PRECISIONS == ("fp32", "int8", "boundary")
    # by group: own costs with the count, parts, millions of elements in and out, billions of MACs, MB of weights; net
    traffic, gmacs, mb = 256 / 1e6, 1024 / 1e9, 72 / 1e6
    assert FP32.traffic == INT8.traffic == 256
    assert FP32.macs == 1024
    np.testing.assert_allclose(
        rows,
        [
            [1.5, 2.0, 2 * traffic, 2 * gmacs, 8 * mb, 0.75, 3.0, 3 * traffic, 3 * gmacs, 3 * mb, *[0.0] * 5, 1.0],
            [0.0] * 10 + [0.125, 1.0, traffic, 0.0, 0.0, 1.0],
        ],
    )


def test_nets_that_equal_their_sums_leave_the_sum_unchanged() -> None:
    x = features(nets(24))
    y = plain_sums(x)
    result, quality, held_out = fit(x, y)
    np.testing.assert_allclose(result.scale, 1.0, atol=1e-9)
    np.testing.assert_allclose(result.per_part, 0.0, atol=1e-9)
    assert result.per_net == pytest.approx(0.0, abs=1e-9)
    np.testing.assert_allclose(held_out, y, rtol=1e-9)
    assert quality.mape == pytest.approx(0, abs=1e-9)
    assert quality.spearman == pytest.approx(1)
    assert (quality.within_5, quality.within_10, quality.nets) == (1.0, 1.0, 24)


@pytest.mark.parametrize("unit", [1.0, 1e3, 1e6])
def test_a_law_is_recovered(unit: float) -> None:
    """Whatever the unit: one ridge serves milliseconds and bytes."""
    law, seen, fresh = LAW.scaled(unit), nets(30), nets(40, seed=1)
    result, quality, _ = fit(features(seen), costs(seen, law))
    assert quality.mape < 0.01
    assert quality.within_5 == 1.0
    np.testing.assert_allclose(costs(fresh, result), costs(fresh, law), rtol=0.03)


def test_terms_that_help_nothing_are_left_out() -> None:
    seen = nets(30)
    law = LinearFit((0.85, 1.2, 0.7), (0.01, 0.005, 0.02), per_net=0.1)
    result, _, _ = fit(features(seen), costs(seen, law))
    assert result.per_traffic == result.per_gmac == (0.0, 0.0, 0.0)
    richer, _, _ = fit(features(seen), costs(seen, LAW))
    assert any(richer.per_traffic)
    plain, _, _ = fit(features(seen), costs(seen, LAW), sets=(PLAIN,))
    assert not any(plain.per_traffic)


def test_a_plain_group_has_scale_and_count_alone() -> None:
    seen = nets(30)
    result, _, _ = fit(features(seen), costs(seen, LAW), plain=(2,))
    assert any(result.per_traffic[:2])
    assert result.per_traffic[2] == result.per_gmac[2] == result.per_weight_mb[2] == 0.0
    assert result.scale[2] != 1.0


def test_noise_does_not_run_away_on_few_nets() -> None:
    rng = np.random.default_rng(0)
    law, seen, fresh = LinearFit((0.9, 1.1, 1.0), (0.003, 0.0, 0.0), per_net=0.02), nets(20), nets(200, seed=2)
    result, quality, _ = fit(features(seen), costs(seen, law) * rng.lognormal(0, 0.02, 20))
    assert quality.mape < 0.05
    assert quality.within_10 > 0.9
    assert np.mean(np.abs(costs(fresh, result) / costs(fresh, law) - 1)) < 0.04


def test_groups_that_no_net_has_stay_plain() -> None:
    """A table without int8 nets must not invent a correction for them."""
    only = [[(part, value) for part, value in net if part.precision == "fp32"] or [(FP32, 0.1)] for net in nets(20)]
    x = features(only)
    result, _, _ = fit(x, 0.8 * x[:, 0] + 0.05)
    assert result.scale[1:] == (1.0, 1.0)
    assert result.per_part[1:] == (0.0, 0.0)
    assert result.part(0.3, INT8) == 0.3


def test_the_fit_of_a_part() -> None:
    one = LinearFit((0.5, 2.0, 3.0), (0.1, 0.2, 0.3), (0.0, 1e3, 0.0), (1e3, 0.0, 0.0), per_net=7.0)
    assert one.part(1.0, FP32) == pytest.approx(0.6 + 1024e-6)
    assert one.part(1.0, INT8) == pytest.approx(2.2 + 256e-3)  # of one copy of three
    assert one.part(1.0, CROSSING) == pytest.approx(3.3)
    assert one.net([(FP32, 1.0), (INT8, 1.0)]) == pytest.approx(7.0 + one.part(1.0, FP32) + 3 * one.part(1.0, INT8))
    assert one.scaled(2.0).part(1.0, CROSSING) == pytest.approx(6.6)
    assert LinearFit(**one.as_dict()) == one
    assert LinearFit().part(0.7, INT8) == 0.7


def test_held_out_predictions_have_not_seen_their_net() -> None:
    x = features(nets(20))
    y = plain_sums(x)
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


def test_a_fit_predicts_its_rows() -> None:
    some = nets(8)
    np.testing.assert_allclose(LAW.predict(features(some)), costs(some, LAW))


def test_groups_need_not_be_precisions() -> None:
    """Five groups of which one is never there: the fit has five, and finds the law of the others."""
    rng = np.random.default_rng(0)
    x = np.column_stack([rng.lognormal(0, 1, (40, 5 * TERMS)), np.ones(40)])
    x[:, 4 * TERMS : -1] = 0.0
    own = x[:, 0:-1:TERMS]
    y = own @ [0.9, 1.3, 1.0, 1.0, 1.0] + 0.2 * x[:, 1] + 0.5
    found, held_out, predicted = fit(x, y)
    assert len(found.scale) == len(found.per_gmac) == 5
    assert found.scale[4] == 1.0
    assert held_out.mape < 0.01
    np.testing.assert_allclose(found.predict(x), y, rtol=0.02)
    np.testing.assert_allclose(predicted, y, rtol=0.1)
