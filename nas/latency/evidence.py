"""How likely measurements are under many candidate priors at once, and which mixture of these the known devices teach.

The candidates are a fixed sample of hyperparameters. The known devices, each in turn treated as a new one, give them
their weights by EM (nonparametric empirical Bayes: Kiefer and Wolfowitz 1956; Laird 1978), so that nothing is tuned.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

#: Blocks of the basis and the range of the standard deviation of their weights; wide, and learnt within.
BLOCKS = {
    "offset": (0.02, 3.0),
    "mean": (0.05, 1.5),
    "devices": (0.05, 3.0),
    "rest": (0.03, 1.5),
    "places": (0.01, 1.0),
    "symbols": (0.01, 1.0),
    "mixes": (0.02, 2.0),
}
NOISE = (0.003, 0.2)  # σ: from a quiet accelerator to a telephone that reports whole milliseconds
OUTLIERS = (0.001, 0.1)  # share of measurements that another process disturbed
SURPRISE = 0.5  # by how much of a median network these are off
SETTINGS = 1024


@dataclass(frozen=True)
class Settings:
    """Hyperparameters of H candidate priors.

    Attributes:
        theta: variance of the weights of each block, ``[H, len(BLOCKS)]``.
        sigma: noise of a median network, ``[H]``, as a share.
        gamma: power with which the noise grows with the cost, ``[H]``.
        rho: probability that a measurement is an outlier, ``[H]``.
    """

    theta: Array
    sigma: Array
    gamma: Array
    rho: Array

    @classmethod
    def spread(cls, count: int = SETTINGS) -> Settings:
        """A fixed low-discrepancy sample, uniform in the logarithm (γ: uniform in 0..1)."""
        from scipy.stats import qmc

        ranges = np.log([*BLOCKS.values(), NOISE, OUTLIERS])
        unit = qmc.Sobol(len(ranges) + 1, seed=0).random(count)
        values = np.exp(ranges[:, 0] + unit[:, :-1] * (ranges[:, 1] - ranges[:, 0]))
        return cls(values[:, : len(BLOCKS)] ** 2, values[:, -2], unit[:, -1], values[:, -1])

    def noise(self, mean: Array) -> Array:
        """Noise variance of rows whose mean profile is ``mean [k]``: ``[H, k]``."""
        # The floor is for the arithmetic: matrices of costs that lie orders of magnitude apart are still inverted.
        return np.asarray((self.sigma[:, None] * mean ** self.gamma[:, None]) ** 2 + 1e-9 * max(1.0, mean.max() ** 2))

    def surprise(self, mean: Array) -> Array:
        """Variance of an outlier beyond the noise, ``[H, k]``."""
        return np.asarray((SURPRISE * mean ** self.gamma[:, None]) ** 2)

    def __getitem__(self, chosen: Ints) -> Settings:
        return Settings(self.theta[chosen], self.sigma[chosen], self.gamma[chosen], self.rho[chosen])


@dataclass(frozen=True)
class Evidence:
    """What k measurements say of H settings: log evidence ``[H]``, and probability of outliers ``[H, k]``."""

    log: Array
    outlier: Array


def evidence(grams: list[Array], values: Array, mean: Array, settings: Settings) -> Evidence:
    """Marginal likelihood of ``values [k]`` (of mean zero), where at most one of them is an outlier.

    The leave-one-out densities come from the inverse (Rasmussen and Williams 2006, eq. 5.12); an outlier's is wider.
    """
    covariance = np.einsum("hb,bij->hij", settings.theta[:, : len(grams)], np.array(grams))
    diagonal = np.arange(len(values))
    covariance[:, diagonal, diagonal] += settings.noise(mean)
    inverse = np.linalg.inv(covariance)
    precision = inverse[:, diagonal, diagonal]
    alpha = inverse @ values
    sound = -0.5 * (alpha @ values) - 0.5 * np.linalg.slogdet(covariance)[1]
    error, variance, rho = alpha / precision, 1 / precision, settings.rho[:, None]
    wide = variance + settings.surprise(mean)
    gain = _log_normal(error, wide) - _log_normal(error, variance) + np.log(rho / (1 - rho))
    top = np.maximum(gain.max(axis=1, keepdims=True), 0.0)
    total = np.exp(-top) + np.exp(gain - top).sum(axis=1, keepdims=True)
    log = sound + len(values) * np.log(1 - rho[:, 0]) + (top + np.log(total))[:, 0]
    return Evidence(log, np.exp(gain - top) / total)


def maximise(logs: Array, rounds: int = 200) -> Array:
    """Weights of settings ``[H]`` that make the tasks most likely, from log evidence ``[tasks, H]``, by EM.

    One more task that says nothing keeps every setting possible.
    """
    likely = np.exp(logs - logs.max(axis=1, keepdims=True))
    weights = np.full(logs.shape[1], 1 / logs.shape[1])
    for _ in range(rounds):
        share = likely * weights
        share /= share.sum(axis=1, keepdims=True)
        weights = (share.sum(axis=0) + 1 / logs.shape[1]) / (len(logs) + 1)
    return weights


def _log_normal(error: Array, variance: Array) -> Array:
    return np.asarray(-0.5 * (error**2 / variance + np.log(variance)))
