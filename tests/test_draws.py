"""Random numbers by number: uniform, independent, and the same whatever else is drawn beside them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from nas.strategies import Draws

NUMBERS = np.arange(20_000, dtype=np.int64)


def p_of_uniform(values: np.ndarray, bins: int) -> float:
    return float(stats.chisquare(np.bincount(values, minlength=bins)).pvalue)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**63, 3**200])
def test_columns_are_uniform(seed: int) -> None:
    drawn = Draws(seed, NUMBERS).uniform(4)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    # Along numbers within a column, and along the columns of neighbouring numbers.
    assert min(p_of_uniform((column * 64).astype(int), 64) for column in drawn.T) > 1e-3
    assert min(p_of_uniform((rows.ravel() * 64).astype(int), 64) for rows in np.split(drawn, 20)) > 1e-3


def test_columns_rows_and_seeds_are_independent() -> None:
    def independent(a: np.ndarray, b: np.ndarray) -> bool:
        return p_of_uniform((a * 16).astype(int) * 16 + (b * 16).astype(int), 256) > 1e-3

    draws = Draws(5, NUMBERS)
    first, later = draws.uniform(3), draws.uniform(3)
    assert independent(first[:, 0], first[:, 1])
    assert independent(first[:, 0], later[:, 0])
    assert independent(first[:-1, 0], first[1:, 0])
    assert independent(first[:-1, 1], first[1:, 0])
    assert independent(first[:, 0], Draws(6, NUMBERS).uniform(1)[:, 0])
    assert independent(first[:, 0], Draws(5, NUMBERS, attempt=1).uniform(1)[:, 0])


def test_integers_cover_every_value_alike() -> None:
    drawn = Draws(3, NUMBERS).integers([1, 2, 7, 400])
    assert drawn.dtype == np.int64
    assert (drawn[:, 0] == 0).all()
    for column, size in ((1, 2), (2, 7), (3, 400)):
        assert p_of_uniform(drawn[:, column], size) > 1e-3
    single = Draws(3, NUMBERS).integers(7)
    assert single.shape == NUMBERS.shape
    assert set(single.tolist()) == set(range(7))


def test_a_batch_is_its_members() -> None:
    numbers = np.array([0, 7, 3, 10**12])

    def draw(draws: Draws) -> np.ndarray:
        return np.hstack([draws.uniform(3), draws.integers([5, 9]), draws.uniform(1)])

    together = draw(Draws(11, numbers, attempt=2))
    apart = np.concatenate([draw(Draws(11, numbers[[i]], attempt=2)) for i in range(4)])
    np.testing.assert_array_equal(together, apart)
    # One call for several columns is the same numbers as one call for each.
    draws, again = Draws(11, numbers), Draws(11, numbers)
    np.testing.assert_array_equal(draws.uniform(3), np.hstack([again.uniform(1) for _ in range(3)]))


def test_seeds_attempts_and_numbers_differ() -> None:
    variants = [(0, 0), (1, 0), (0, 1), (1, 1), (2**64, 0), (2**64 + 1, 0), (10**80, 0)]
    drawn = np.stack([Draws(seed, np.arange(50), attempt).uniform(2) for seed, attempt in variants])
    assert len(np.unique(drawn)) == drawn.size


def test_the_generator_belongs_to_the_batch() -> None:
    def first(*arguments: object) -> float:
        return float(Draws(*arguments).generator().random())  # type: ignore[arg-type]

    same = first(0, np.array([4, 5]))
    assert first(0, np.array([4, 5])) == same
    others = [
        first(1, np.array([4, 5])),
        first(0, np.array([5, 6])),
        first(0, np.array([4])),
        first(0, np.array([4, 5]), 1),
    ]
    assert same not in others
    assert len(set(others)) == 4


def test_nothing_drawn_for_nobody() -> None:
    draws = Draws(0, np.arange(0))
    assert len(draws) == 0
    assert draws.uniform(3).shape == (0, 3)
    assert draws.integers([2, 3]).shape == (0, 2)
    assert 0 <= draws.generator().random() < 1
