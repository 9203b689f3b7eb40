"""Mutation and crossover: one gene that matters, neighbours for ordered choices, children between their parents."""

from __future__ import annotations

import numpy as np
import pytest

from nas.space import Genomes
from nas.strategies import Domain, Draws
from nas.strategies.variation import crossover, mutate, pick_true

SIZES = np.array([4, 9, 1, 2, 7])
MIXED = Domain(SIZES, np.array([False, True, True, False, True]))


def draws(n: int, seed: int = 0) -> Draws:
    return Draws(seed, np.arange(n))


def genomes(n: int, seed: int = 99) -> Genomes:
    return draws(n, seed).integers(SIZES)


def test_a_child_differs_in_one_gene() -> None:
    parents = genomes(4000)
    kept = parents.copy()
    children = mutate(parents, draws(4000), MIXED)
    np.testing.assert_array_equal(parents, kept)
    assert ((children >= 0) & (children < SIZES)).all()
    changed = children != parents
    assert (changed.sum(axis=1) == 1).all()
    # Every gene that can change is as likely to.
    np.testing.assert_allclose(changed.mean(axis=0), [0.25, 0.25, 0, 0.25, 0.25], atol=0.03)


def test_dormant_genes_are_left_alone() -> None:
    def active(rows: Genomes) -> np.ndarray:
        mask = np.ones(rows.shape, dtype=bool)
        mask[:, 1:] = rows[:, :1] > 0
        return mask

    domain = Domain(SIZES, MIXED.ordered, active)
    parents = genomes(2000)
    changed = mutate(parents, draws(2000), domain) != parents
    assert (changed.sum(axis=1) == 1).all()
    assert changed[parents[:, 0] == 0, 0].all()
    assert changed[parents[:, 0] > 0, 1:].any()


def test_ordered_genes_move_to_neighbours_half_of_the_time() -> None:
    def share_of_neighbours(ordered: bool, value: int) -> float:
        domain = Domain(np.array([9]), np.array([ordered]))
        return float(np.mean(np.abs(mutate(np.full((4000, 1), value), draws(4000), domain) - value) == 1))

    # Any other value otherwise, and of those are the neighbours 2 in 8 (1 in 8 at the ends).
    assert share_of_neighbours(False, 4) == pytest.approx(2 / 8, abs=0.03)
    assert share_of_neighbours(True, 4) == pytest.approx(0.5 + 0.5 * 2 / 8, abs=0.03)
    assert share_of_neighbours(True, 0) == pytest.approx(0.5 + 0.5 * 1 / 8, abs=0.03)
    assert share_of_neighbours(True, 8) == pytest.approx(0.5 + 0.5 * 1 / 8, abs=0.03)


def test_other_values_are_alike() -> None:
    domain = Domain(np.array([5]), np.array([False]))
    children = mutate(np.full((8000, 1), 2), draws(8000), domain)
    np.testing.assert_allclose(np.bincount(children[:, 0], minlength=5) / 8000, [0.25, 0.25, 0, 0.25, 0.25], atol=0.02)


def test_where_nothing_can_change_nothing_does() -> None:
    domain = Domain(np.array([1, 1]), np.array([True, False]))
    np.testing.assert_array_equal(mutate(np.zeros((3, 2), dtype=np.int64), draws(3), domain), np.zeros((3, 2)))


def test_crossover_takes_from_both_and_stays_between() -> None:
    first, second = genomes(4000, 1), genomes(4000, 2)
    child = crossover(first, second, draws(4000), MIXED)
    low, high = np.minimum(first, second), np.maximum(first, second)
    ordered = MIXED.ordered
    assert ((child >= low) & (child <= high))[:, ordered].all()
    assert ((child == first) | (child == second))[:, ~ordered].all()
    assert ((child != first) & (child != second))[:, [1, 4]].any(axis=0).all()
    differ = first != second
    for gene in (0, 3):
        assert np.mean((child == first)[differ[:, gene], gene]) == pytest.approx(0.5, abs=0.04)


def test_twins_have_a_twin() -> None:
    parents = genomes(200)
    np.testing.assert_array_equal(crossover(parents, parents, draws(200), MIXED), parents)


def test_pick_true_is_uniform_over_the_true_ones() -> None:
    mask = np.tile([False, True, True, False, True], (3000, 1))
    picked = pick_true(mask, draws(3000).uniform(1)[:, 0])
    np.testing.assert_allclose(np.bincount(picked, minlength=5) / 3000, [0, 1 / 3, 1 / 3, 0, 1 / 3], atol=0.03)
    np.testing.assert_array_equal(pick_true(np.eye(4, dtype=bool), np.full(4, 0.999)), np.arange(4))
