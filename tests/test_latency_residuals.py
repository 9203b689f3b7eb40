"""Residuals of whole networks are blamed on the parts that they share, and on nothing where they are noise."""

from __future__ import annotations

import numpy as np

from nas.latency.residuals import corrections
from nas.parts import Conv, Part

SHAPES = [(width, kernel, side) for width in (8, 16, 24) for kernel in (1, 3) for side in (4, 9)]
PARTS = {p.key: p for p in (Part((Conv(width, kernel),), (8, side, side)) for width, kernel, side in SHAPES)}
LARGE = {key for key, part in PARTS.items() if part.shape[1] == 9}


def nets(n: int, seed: int) -> list[dict[str, float]]:
    """Shares of some parts each, of one map size or the other."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        keys = sorted(LARGE if i % 2 else set(PARTS) - LARGE)
        chosen = rng.choice(keys, 4, replace=False)
        found.append(dict(zip(chosen.tolist(), rng.dirichlet(np.ones(4)).tolist(), strict=True)))
    return found


def test_parts_of_one_map_size_are_found_slower() -> None:
    some = nets(30, seed=0)
    rng = np.random.default_rng(1)
    truth = np.array([0.03 * sum(share for key, share in net.items() if key in LARGE) for net in some])
    result = corrections(some, truth + rng.normal(0, 0.003, 30), PARTS)
    large, small = ([result.by_key[key] for key in PARTS if (key in LARGE) == which] for which in (True, False))
    assert 0.02 < np.mean(large) < 0.04
    assert abs(np.mean(small)) < 0.01
    assert np.abs(result.held_out - truth).mean() < 0.006
    fresh = nets(20, seed=2)
    predicted = [sum(share * result.by_key[key] for key, share in net.items()) for net in fresh]
    wanted = [0.03 if next(iter(net)) in LARGE else 0.0 for net in fresh]
    assert np.abs(np.array(predicted) - wanted).mean() < 0.008


def test_a_part_that_no_net_has_is_corrected_as_its_shape_is() -> None:
    unseen = sorted(LARGE)[0]
    some = [net for net in nets(60, seed=3) if unseen not in net]
    residual = np.array([0.03 if next(iter(net)) in LARGE else 0.0 for net in some])
    assert 0.01 < corrections(some, residual, PARTS).by_key[unseen] < 0.03


def test_noise_is_blamed_on_nobody() -> None:
    some = nets(30, seed=0)
    for seed in range(5):
        noise = np.random.default_rng(seed).normal(0, 0.01, 30)
        result = corrections(some, noise, PARTS)
        assert max(map(abs, result.by_key.values()), default=0.0) < 0.01
    assert corrections(some, np.zeros(30), PARTS).by_key == {}
