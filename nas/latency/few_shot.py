"""Costs on a new device from other devices' costs and about ten measurements.

The prior of the new device is learnt from the known ones (:mod:`nas.latency.device_prior`); the measurements weigh its
settings and condition it, in closed form. Lee et al. 2021 (HELP) learn such a prior by meta-training a network.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from nas.errors import TableError
from nas.latency.device_prior import Devices, scale
from nas.latency.evidence import BLOCKS, Settings, evidence

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
JUDGES = 32  # measurements that weigh the settings, at most: all are used to predict
KEPT = 16  # settings that a prediction averages over, at most
POOL = 400  # rows among which a sample is chosen, and by whose uncertainty it is judged
GREEDY = 256  # rows chosen one by one; further ones are drawn
LEAST = 0.1  # of what the mean profile says: a linear model must not predict nothing


@dataclass(frozen=True)
class Adapted:
    """What is predicted of a new device.

    Attributes:
        predicted: costs in the unit of the measurements, ``[n]``, positive.
        uncertainty: standard deviation of a new measurement as a share of ``predicted``, ``[n]``; infinite for rows
            that no known device has and no genome describes.
        weights: of the known devices (in medians) in the mix that resembles the new one, ``[d]``; 0 for unusable ones.
        shares: part of the basis → its share of the predicted variation; they need not add up to 1.
        outliers: probability that a measurement was disturbed, ``[k]``.
    """

    predicted: Array
    uncertainty: Array
    weights: Array
    shares: dict[str, float]
    outliers: Array


class FewShot:
    """Chooses what to measure on a new device, and predicts the rest.

    Args:
        known: costs ``[n, d]`` of networks or parts on known devices; NaN, infinite and ≤ 0 mean unknown.
        genomes: integers ``[n, places]``, the same symbol for the same operation everywhere; or none.
        samples: number of measurements that the prior is learnt for.
        fixed: how often each row bears a fixed cost that only the new device may have, ``[n]``; 1 without it.

    Raises:
        TableError: as :class:`~nas.latency.device_prior.Devices`, or fewer than 2 samples.
    """

    def __init__(
        self,
        known: npt.ArrayLike,
        genomes: npt.ArrayLike | None = None,
        samples: int = 10,
        fixed: npt.ArrayLike | None = None,
    ) -> None:
        self.devices = Devices(known, genomes, fixed)
        self.samples = _count(samples, len(self.devices.mean))
        self.settings = Settings.spread()
        self.prior = self.devices.learn(self.samples, self.settings)

    @cached_property
    def _basis(self) -> list[Array]:
        return self.devices.basis()

    @cached_property
    def _stacked(self) -> Array:
        return np.hstack(self._basis)

    def choose(self, seed: int, among: npt.ArrayLike | None = None) -> Ints:
        """``samples`` distinct rows worth measuring, a function of the seed, in the order of their worth.

        Each is the one of a random pool that lowers the pool's mean variance most (A-optimal, greedily).

        Args:
            among: rows to choose from; all without it.

        Raises:
            TableError: there are fewer rows than samples.
        """
        rows = np.arange(len(self.devices.mean)) if among is None else self._rows(among)
        rows = np.unique(rows)
        _count(self.samples, len(rows))
        rng = np.random.default_rng(seed)
        pool = rng.permutation(rows)[: max(POOL, self.samples)]
        inner = pool[: max(POOL, GREEDY)]
        theta, noise = self.prior @ self.settings.theta, float(self.prior @ self.settings.sigma**2)
        # In units of each row's noise, so that what is lowered is the relative error where noise is relative.
        unit = self.devices.mean[inner] ** float(self.prior @ self.settings.gamma)
        scaled = np.hstack([np.sqrt(t) * b[inner] for t, b in zip(theta, self._basis, strict=False)]) / unit[:, None]
        taken = _greedy(scaled @ scaled.T, noise, min(self.samples, GREEDY))
        rest = np.setdiff1d(np.arange(len(pool)), taken)
        return np.asarray(pool[[*taken, *rng.permutation(rest)[: self.samples - len(taken)]]], dtype=np.int64)

    def adapt(self, rows: npt.ArrayLike, measured: npt.ArrayLike) -> Adapted:
        """Predict every row from the measured costs ``[k]`` of some ``rows [k]``.

        Raises:
            TableError: shapes differ, rows do not exist, or costs are not finite and positive.
        """
        index, values = self._rows(rows), np.asarray(measured, dtype=np.float64)
        if values.shape != index.shape:
            raise TableError(
                f"{index.size} rows were measured, but there are {values.size} costs of shape {values.shape}.",
                expected="one cost per measured row",
            )
        if not (np.isfinite(values) & (values > 0)).all():
            wrong = values[~(np.isfinite(values) & (values > 0))][0]
            raise TableError(
                f"A measured cost is {wrong}.",
                expected="finite, positive costs",
                remedy="measure it again, or leave the row out",
            )
        _count(len(np.unique(index)), len(self.devices.mean))
        unit = scale(values, self.devices.mean[index])
        return self._posterior(index, values / unit, unit)

    def _rows(self, rows: npt.ArrayLike) -> Ints:
        index, count = np.asarray(rows), len(self.devices.mean)
        integers = index.ndim == 1 and index.dtype.kind in "iu"
        if not integers or ((index < 0) | (index >= count)).any():
            raise TableError(
                f"Rows of shape {index.shape} and type {index.dtype} do not name measured rows.",
                expected=f"a list of integers 0..{count - 1}",
            )
        return index.astype(np.int64)

    def _posterior(self, index: Ints, values: Array, unit: float) -> Adapted:
        """Average the predictions under the likeliest settings; law of total variance for the uncertainty."""
        # Spread over all of them: the order of a sample is that of its worth.
        judges = np.unique(np.linspace(0, len(index) - 1, min(len(index), JUDGES)).astype(np.int64))
        rows, mean = index[judges], self.devices.mean
        grams = [block[rows] @ block[rows].T for block in self._basis]
        found = evidence(grams, values[judges] - mean[rows], mean[rows], self.settings)
        weights = self.prior * np.exp(found.log - found.log.max())
        kept = np.argsort(-weights, kind="stable")[:KEPT]
        weights = weights[kept] / weights[kept].sum()
        settings, outlier = self.settings[kept], np.zeros((len(kept), len(index)))
        outlier[:, judges] = found.outlier[kept]
        noise = settings.noise(mean[index])
        noise = 1 / ((1 - outlier) / noise + outlier / (noise + settings.surprise(mean[index])))

        widths = [block.shape[1] for block in self._basis]
        thetas = np.repeat(settings.theta[:, : len(widths)], widths, axis=1)
        stacked, excess = self._stacked, values - mean[index]
        betas = np.empty_like(thetas)
        variance = weights @ settings.noise(mean)
        if len(index) <= stacked.shape[1]:
            variance += np.einsum("np,np,p->n", stacked, stacked, weights @ thetas)
        for i, (theta, own) in enumerate(zip(thetas, noise, strict=True)):
            betas[i], half, sign = _condition(stacked[index], theta, excess, own)
            variance += sign * weights[i] * ((stacked @ half.T) ** 2).sum(axis=1)
        each = stacked @ betas.T
        beta = weights @ betas
        variance += (each - (each @ weights)[:, None]) ** 2 @ weights
        raw = mean + stacked @ beta
        predicted = np.maximum(raw, LEAST * mean)
        spread = np.sqrt(np.maximum(variance, 0.0)) / predicted
        spread[~self.devices.seen] = np.inf
        return Adapted(
            predicted * unit, spread, self._weights(beta), self._shares(beta, widths), np.asarray(weights @ outlier)
        )

    def _weights(self, beta: Array) -> Array:
        """The known devices' shares of the blocks "mean" and "devices"."""
        count = int(self.devices.usable.sum())
        own = beta[2 : 2 + count]
        found = np.zeros(len(self.devices.usable))
        found[self.devices.usable] = (1 + beta[1]) / count + (own - own.mean()) * count**-0.5
        return found

    def _shares(self, beta: Array, widths: list[int]) -> dict[str, float]:
        """Variance that each block contributes, over that of the prediction."""
        parts = np.split(beta, np.cumsum(widths)[:-1])
        terms = dict(zip(BLOCKS, (b @ part for b, part in zip(self._basis, parts, strict=True)), strict=False))
        terms["mean"] = terms["mean"] + self.devices.mean
        total = float(np.var(sum(terms.values())))
        return {name: float(np.var(term)) / max(total, 1e-300) for name, term in terms.items()}


def adapt(
    known: npt.ArrayLike, rows: npt.ArrayLike, measured: npt.ArrayLike, genomes: npt.ArrayLike | None = None
) -> Adapted:
    """Predict costs ``[n]`` on a new device from the ``measured [k]`` ones of some ``rows [k]``.

    Args:
        known: costs ``[n, d]`` on known devices.
        genomes: integers ``[n, places]``, or none.

    Raises:
        TableError: as :class:`FewShot` and :meth:`FewShot.adapt`.
    """
    return FewShot(known, genomes, max(2, np.size(rows))).adapt(rows, measured)


def choose(known: npt.ArrayLike, k: int, seed: int, genomes: npt.ArrayLike | None = None) -> Ints:
    """The ``k`` rows of ``known [n, d]`` worth measuring on a new device: see :meth:`FewShot.choose`."""
    return FewShot(known, genomes, k).choose(seed)


def _condition(basis: Array, theta: Array, values: Array, noise: Array) -> tuple[Array, Array, float]:
    """Posterior of the weights given ``values [k]`` of ``basis [k, p]``: mean ``[p]``, half ``[r, p]``, and a sign.

    The weights' covariance is diag(θ) − halfᵀ half where the sign is −1, halfᵀ half where it is +1: the smaller system
    is solved (Rasmussen and Williams 2006, eq. 2.12 for k ≤ p and 2.11 for k > p).
    """
    scaled = basis * np.sqrt(theta)
    if len(basis) <= len(theta):
        lower = np.linalg.cholesky(scaled @ scaled.T + np.diag(noise))
        half = np.linalg.solve(lower, scaled) * np.sqrt(theta)
        return half.T @ np.linalg.solve(lower, values), half, -1.0
    weighted = scaled / noise[:, None]
    lower = np.linalg.cholesky(scaled.T @ weighted + np.eye(len(theta)))
    half = np.linalg.solve(lower, np.diag(np.sqrt(theta)))
    return half.T @ np.linalg.solve(lower, weighted.T @ values), half, 1.0


def _greedy(kernel: Array, noise: float, count: int) -> list[int]:
    """Points that in turn lower the trace of ``kernel [m, m]`` most when measured with ``noise``."""
    taken: list[int] = []
    for _ in range(count):
        gain = (kernel**2).sum(axis=0) / (np.diag(kernel) + noise)
        gain[taken] = -np.inf
        best = int(np.argmax(gain))
        taken.append(best)
        kernel = kernel - np.outer(kernel[:, best], kernel[best]) / (kernel[best, best] + noise)
    return taken


def _count(samples: int, rows: int) -> int:
    if not 2 <= samples <= rows:
        raise TableError(
            f"{samples} samples of {rows} rows.",
            expected="at least 2 samples and at most as many as there are rows",
            remedy="measure more networks or parts" if samples < 2 else "ask for fewer samples",
        )
    return int(samples)
