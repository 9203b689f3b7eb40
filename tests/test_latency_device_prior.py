"""The known devices, cleaned and split, and what is learnt from them."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from nas.errors import TableError
from nas.latency.device_prior import Devices, scale
from nas.latency.evidence import Settings

GENOMES = np.array(list(product(range(3), repeat=5)))


def additive(seed: int, noise: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    total = rng.gamma(2.0, 1.0, (5, 3))[np.arange(5), GENOMES].sum(axis=1)
    return np.asarray(total * rng.lognormal(0, noise, len(total)))


def test_genes_take_the_noise_out() -> None:
    clean = np.column_stack([additive(seed) for seed in range(3)])
    noisy = clean * np.random.default_rng(9).lognormal(0, 0.1, clean.shape)
    found = Devices(noisy, GENOMES).basis()
    level = clean / np.median(noisy, axis=0)
    smooth = found[1] + found[2] * 3**0.5
    assert np.abs(smooth - level).mean() < 0.4 * np.abs(noisy / np.median(noisy, axis=0) - level).mean()


def test_columns_are_used_in_medians_and_unusable_ones_are_not() -> None:
    known = np.column_stack([additive(0), 1e6 * additive(0), np.full(243, 2.0), np.full(243, np.nan)])
    devices = Devices(known)
    assert devices.usable.tolist() == [True, True, False, False]
    np.testing.assert_allclose(devices.mean, additive(0) / np.median(additive(0)))
    assert len(devices.basis()) == 4
    assert len(Devices(known, GENOMES).basis(np.array([1, 2]))) == 7


def test_twins_teach_nothing() -> None:
    """Two columns of one device say nothing of a device that is new."""
    devices, settings = Devices(np.column_stack([additive(0), 3 * additive(0)])), Settings.spread(32)
    np.testing.assert_allclose(devices.learn(10, settings), 1 / 32)


def test_quiet_devices_teach_quiet_settings() -> None:
    settings = Settings.spread(256)
    learnt = []
    for noise in (0.003, 0.15):
        devices = Devices(np.column_stack([additive(s % 3, noise) + additive(7 + s, noise) for s in range(6)]), GENOMES)
        learnt.append(float(devices.learn(10, settings) @ np.log(settings.sigma)))
    assert learnt[0] < learnt[1]


def test_scale_is_that_of_a_median_network() -> None:
    assert scale(np.array([2.0, 4.0, 60.0]), np.array([1.0, 2.0, 3.0])) == 2.0


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(TableError, match="Fixed costs have shape"):
        Devices(np.arange(1.0, 9.0).reshape(4, 2), fixed=[1.0])
