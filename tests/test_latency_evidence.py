"""The marginal likelihood and the mixture of settings, against their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from nas.latency.evidence import Settings, evidence, maximise


def test_evidence_is_that_of_a_gaussian() -> None:
    from scipy.stats import multivariate_normal

    settings = Settings.spread(8)
    settings = Settings(settings.theta, np.full(8, 0.1), settings.gamma, np.full(8, 1e-30))
    rng = np.random.default_rng(0)
    basis, mean = [rng.normal(size=(4, width)) for width in (1, 1, 5, 5)], rng.gamma(2.0, 1.0, 4)
    values = np.array([0.1, 0.3, -0.2, 0.1])
    found = evidence([block @ block.T for block in basis], values, mean, settings).log
    for i, log in enumerate(found):
        covariance = sum(t * b @ b.T for t, b in zip(settings.theta[i], basis, strict=False))
        expected = multivariate_normal(np.zeros(4), covariance + np.diag(settings.noise(mean)[i])).logpdf(values)
        assert log == pytest.approx(expected + 2 * np.log(2 * np.pi), rel=1e-4)


def test_settings_that_explain_the_tasks_get_the_weight() -> None:
    weights = maximise(np.array([[0.0, 5.0, 0.0], [0.0, 5.0, 0.0], [-3.0, 4.0, 0.0]]))
    assert weights.sum() == pytest.approx(1)
    assert weights.argmax() == 1
    assert (weights > 0).all()


def test_an_outlier_is_more_likely_disturbed() -> None:
    settings = Settings.spread(64)
    mean = np.ones(6)
    grams = [np.full((6, 6), 1.0), np.zeros((6, 6))]
    plain = evidence(grams, np.full(6, 0.1), mean, settings).outlier
    odd = evidence(grams, np.array([0.1, 0.1, 0.1, 1.5, 0.1, 0.1]), mean, settings).outlier
    assert plain.max() < 0.2
    assert (odd.argmax(axis=1) == 3).all()
    assert np.median(odd[:, 3]) > 0.9


def test_settings_are_the_same_every_time() -> None:
    first, second = Settings.spread(), Settings.spread()
    np.testing.assert_array_equal(first.theta, second.theta)
    assert ((first.gamma >= 0) & (first.gamma <= 1)).all()
    assert first[np.array([3, 5])].sigma.shape == (2,)
