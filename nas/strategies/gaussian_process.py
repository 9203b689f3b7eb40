"""A Gaussian process over genomes: what a handful of trainings says about every candidate that was not trained.

The kernel is the sum of two, each a Matérn 5/2 of a distance between embedded genomes:

- by place: every value of a choice has a learnt embedding, shared by all choices of a kind (a 3×3 convolution is the
  same thing on every edge), and every choice a learnt weight;
- by count: how often each value occurs over the choices of a kind, wherever it does.

Numbers that are known of a genome without training it (its costs, a prediction of an earlier search) enter the first
distance and a linear mean. All parameters are fitted together by maximum a posteriori, with Adam on the analytic
gradient of the marginal likelihood (Rasmussen & Williams 2006, equations 5.8 and 5.9); the priors carry the fit while
data are few.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nas.space import Genomes
from nas.strategies.base import Domain

Array = npt.NDArray[np.float64]
Parameters = dict[str, Array]
Embedded = tuple[Array, Array, Array]  # coordinates in both distances, prior mean
JITTER = 1e-6
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
# Standard deviations of the Gaussian priors, by the kind of parameter.
PRIORS = {
    "embedding": 0.5, "weight": 1.0, "count": 1.0, "feature": 1.0, "slope": 0.3, "scale": 1.0, "noise": 1.0,
    "mean": 0.5,
}  # fmt: skip


@dataclass(frozen=True)
class _Kind:
    """Choices that take the same values in the same role: their columns, and how many values there are."""

    columns: npt.NDArray[np.intp]
    values: int
    ordered: bool

    def embedding(self) -> Array:
        """``[values + 1, dimensions]`` to begin with: a line for ordered values, a simplex for others; the last row
        is a dormant gene, in the middle."""
        if self.ordered:
            placed = np.linspace(-1.0, 1.0, self.values)[:, None] if self.values > 1 else np.zeros((1, 1))
        else:
            placed = (np.eye(self.values) - 1.0 / self.values) / math.sqrt(2.0)
        return np.vstack([placed, np.zeros(placed.shape[1])])


class GaussianProcess:
    """Regression from genomes (and known numbers) to one value of mean about 0 and spread about 1.

    Args:
        domain: cardinalities, kinds, order and dormancy of the genes.
        features: known numbers per genome.
    """

    def __init__(self, domain: Domain, features: int = 0) -> None:
        self.domain, self.features = domain, features
        kinds = np.arange(len(domain.cardinalities)) if domain.kinds is None else domain.kinds
        self._kinds = []
        for kind in dict.fromkeys(kinds.tolist()):
            columns = np.flatnonzero(kinds == kind)
            values = int(domain.cardinalities[columns].max())
            if values > 1:
                self._kinds.append(_Kind(columns, values, bool(domain.ordered[columns].all())))
        self._prior = self._initial()
        self.parameters = {name: value.copy() for name, value in self._prior.items()}

    def _initial(self) -> Parameters:
        choices = sum(len(kind.columns) for kind in self._kinds)
        start: Parameters = {}
        for i, kind in enumerate(self._kinds):
            start[f"embedding{i}"] = kind.embedding()
            start[f"weight{i}"] = np.full(len(kind.columns), -0.5 * math.log(choices))
            if len(kind.columns) > 1:
                start[f"count{i}"] = np.full(kind.values + 1, math.log(1.8 / len(kind.columns)))
        if self.features:
            start["feature"] = np.full(self.features, math.log(0.3 / math.sqrt(self.features)))
            start["slope"] = np.full(self.features, 0.3 / self.features)
        start["scale"] = np.log([0.5, 0.5])
        start["noise"], start["mean"] = np.log([0.1]), np.zeros(1)
        return start

    # ---- encoding -----------------------------------------------------------------------------

    def encode(self, genomes: Genomes) -> Genomes:
        """Genomes ``[n, choices]`` with a value of its own for every dormant gene."""
        return np.where(self.domain.active(genomes), genomes, self.domain.cardinalities)

    def _place(self, genomes: Genomes, known: Array, p: Parameters) -> Array:
        blocks = []
        for i, kind in enumerate(self._kinds):
            placed = p[f"embedding{i}"][self._values(genomes, kind)] * np.exp(p[f"weight{i}"])[:, None]
            blocks.append(placed.reshape(len(genomes), -1))
        if self.features:
            blocks.append(known * np.exp(p["feature"]))
        return np.concatenate([*blocks, np.zeros((len(genomes), 1))], axis=1)

    def _count(self, genomes: Genomes, p: Parameters) -> Array:
        blocks = [c * np.exp(p[f"count{i}"]) for i, c in self._counts(genomes).items()]
        return np.concatenate([*blocks, np.zeros((len(genomes), 1))], axis=1)

    def _counts(self, genomes: Genomes) -> dict[int, Array]:
        return {
            i: (self._values(genomes, kind)[:, :, None] == np.arange(kind.values + 1)).sum(axis=1).astype(np.float64)
            for i, kind in enumerate(self._kinds)
            if len(kind.columns) > 1
        }

    @staticmethod
    def _values(genomes: Genomes, kind: _Kind) -> Genomes:
        # A dormant gene carries its choice's own cardinality; within a kind they are all alike.
        return np.minimum(genomes[:, kind.columns], kind.values)

    def embed(self, genomes: Genomes, known: Array) -> Embedded:
        """Coordinates of encoded genomes in both distances, and their prior means."""
        p = self.parameters
        return self._place(genomes, known, p), self._count(genomes, p), self._mean(known, p)

    def _mean(self, known: Array, p: Parameters) -> Array:
        return np.asarray(p["mean"][0] + (known @ p["slope"] if self.features else np.zeros(len(known))))

    def kernel(self, a: Embedded, b: Embedded) -> Array:
        """Covariances ``[len(a), len(b)]`` of embedded genomes."""
        first, second = np.exp(2 * self.parameters["scale"])
        return np.asarray(first * _matern(_distance(a[0], b[0]))[0] + second * _matern(_distance(a[1], b[1]))[0])

    @property
    def variance(self) -> float:
        """Prior variance of any genome."""
        return float(np.exp(2 * self.parameters["scale"]).sum())

    @property
    def noise(self) -> float:
        """Variance of a repeated observation."""
        return float(np.exp(2 * self.parameters["noise"][0])) + JITTER

    # ---- fitting ------------------------------------------------------------------------------

    def fit(self, genomes: Genomes, known: Array, y: Array, steps: int, lr: float = 0.1) -> None:
        """Improve the parameters by ``steps`` of Adam (Kingma & Ba 2015) from where they are.

        Args:
            genomes: encoded, ``[n, choices]``; known: ``[n, features]``; y: ``[n]``.
        """
        first = {name: np.zeros_like(value) for name, value in self.parameters.items()}
        second = {name: np.zeros_like(value) for name, value in self.parameters.items()}
        onehots = [(self._values(genomes, k)[:, :, None] == np.arange(k.values + 1)).astype(float) for k in self._kinds]
        counts = self._counts(genomes)
        for step in range(1, steps + 1):
            gradient = self._gradient(genomes, known, y, onehots, counts)
            if gradient is None:
                return
            for name, g in gradient.items():
                first[name] = BETA1 * first[name] + (1 - BETA1) * g
                second[name] = BETA2 * second[name] + (1 - BETA2) * g**2
                update = first[name] / (1 - BETA1**step) / (np.sqrt(second[name] / (1 - BETA2**step)) + EPSILON)
                self.parameters[name] = self.parameters[name] - lr * update

    def loss(self, genomes: Genomes, known: Array, y: Array) -> float:
        """Negative log posterior of the parameters, up to a constant."""
        embedded = self.embed(genomes, known)
        covariance = self.kernel(embedded, embedded) + self.noise * np.eye(len(y))
        lower = np.linalg.cholesky(covariance)
        half = np.linalg.solve(lower, y - embedded[2])
        return float(0.5 * half @ half + np.log(np.diagonal(lower)).sum() + self._penalty())

    def _penalty(self) -> float:
        off = ((v - self._prior[n]) / PRIORS[n.rstrip("0123456789")] for n, v in self.parameters.items())
        return 0.5 * float(sum((o**2).sum() for o in off))

    def _gradient(
        self, genomes: Genomes, known: Array, y: Array, onehots: list[Array], counts: dict[int, Array]
    ) -> Parameters | None:
        """Of :meth:`loss`, by the chain rule through both distances; None where the covariance is singular."""
        p = self.parameters
        place, count, mean = self.embed(genomes, known)
        scales = np.exp(2 * p["scale"])
        (k1, d1), (k2, d2) = _matern(_distance(place, place)), _matern(_distance(count, count))
        try:
            inverse = np.linalg.inv(scales[0] * k1 + scales[1] * k2 + self.noise * np.eye(len(y)))
        except np.linalg.LinAlgError:
            return None
        alpha = inverse @ (y - mean)
        outer = 0.5 * (inverse - np.outer(alpha, alpha))  # ∂loss/∂K
        g = {n: (v - self._prior[n]) / PRIORS[n.rstrip("0123456789")] ** 2 for n, v in p.items()}
        g["scale"] = g["scale"] + 2 * scales * np.array([(outer * k1).sum(), (outer * k2).sum()])
        g["noise"] = g["noise"] + 2 * (self.noise - JITTER) * np.trace(outer)
        g["mean"] = g["mean"] - alpha.sum()
        by_place = _pull(outer * d1 * scales[0], place)
        by_count = _pull(outer * d2 * scales[1], count)
        at_place = at_count = 0
        for i, onehot in enumerate(onehots):
            embedding, weight = p[f"embedding{i}"], np.exp(p[f"weight{i}"])
            width = onehot.shape[1] * embedding.shape[1]
            block = by_place[:, at_place : at_place + width].reshape(len(y), onehot.shape[1], -1)
            here = place[:, at_place : at_place + width].reshape(block.shape)
            g[f"weight{i}"] = g[f"weight{i}"] + (block * here).sum(axis=(0, 2))
            g[f"embedding{i}"] = g[f"embedding{i}"] + np.tensordot(onehot, block * weight[:, None], ((0, 1), (0, 1)))
            at_place += width
            if i in counts:
                width = counts[i].shape[1]
                part = slice(at_count, at_count + width)
                g[f"count{i}"] = g[f"count{i}"] + (by_count[:, part] * count[:, part]).sum(axis=0)
                at_count += width
        if self.features:
            part = slice(at_place, at_place + self.features)
            g["feature"] = g["feature"] + (by_place[:, part] * place[:, part]).sum(axis=0)
            g["slope"] = g["slope"] - known.T @ alpha
        return g


class Posterior:
    """A fitted process given data: predictions, and data added one at a time without another factorisation.

    Args:
        process: fitted.
        data: embedded genomes that are known.
        pool: embedded genomes whose predictions are kept up to date as data are added, at O(n · pool) each.
    """

    def __init__(self, process: GaussianProcess, data: Embedded, pool: Embedded | None = None) -> None:
        self.process, self.data, self.pool = process, data, pool
        covariance = process.kernel(data, data) + process.noise * np.eye(len(data[0]))
        self._whiten = np.linalg.inv(np.linalg.cholesky(covariance))  # L⁻¹, of L Lᵀ = K + σ²
        if pool is not None:
            self._across = self._whiten @ process.kernel(data, pool)
            self._explained = (self._across**2).sum(axis=0)

    def __len__(self) -> int:
        return len(self._whiten)

    def copy(self) -> Posterior:
        """One that can be added to without changing this one."""
        return copy.copy(self)  # arrays are replaced, never written to

    def add(self, new: Embedded) -> None:
        """One more datum, embedded as a matrix of one row."""
        across = self._whiten @ self.process.kernel(self.data, new)[:, 0]
        left = math.sqrt(max(self.process.variance + self.process.noise - float(across @ across), JITTER))
        n = len(self)
        grown = np.zeros((n + 1, n + 1))
        grown[:n, :n] = self._whiten
        grown[n, :n], grown[n, n] = -across @ self._whiten / left, 1 / left
        if self.pool is not None:
            latest = (self.process.kernel(new, self.pool)[0] - across @ self._across) / left
            self._across = np.vstack([self._across, latest])
            self._explained = self._explained + latest**2
        self._whiten = grown
        self.data = _joined(self.data, new)

    def predict(self, at: Embedded, y: Array) -> tuple[Array, Array]:
        """Mean and standard deviation at embedded genomes, where the data were worth ``y [n]``."""
        across = self._whiten @ self.process.kernel(self.data, at)
        return self._mean(at, across, y), self._spread((across**2).sum(axis=0))

    def predict_pool(self, y: Array) -> tuple[Array, Array]:
        """Mean and standard deviation of every row of the pool."""
        assert self.pool is not None
        return self._mean(self.pool, self._across, y), self._spread(self._explained)

    def _mean(self, at: Embedded, across: Array, y: Array) -> Array:
        return np.asarray(at[2] + (self._whiten @ (y - self.data[2])) @ across)

    def _spread(self, explained: Array) -> Array:
        return np.sqrt(np.maximum(self.process.variance - explained, 1e-9))


def _joined(a: Embedded, b: Embedded) -> Embedded:
    return np.concatenate([a[0], b[0]]), np.concatenate([a[1], b[1]]), np.concatenate([a[2], b[2]])


def _distance(a: Array, b: Array) -> Array:
    """Squared Euclidean distances ``[len(a), len(b)]``."""
    squared = (a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1)[None] - 2 * a @ b.T
    return np.maximum(squared, 0.0)


def _matern(squared: Array) -> tuple[Array, Array]:
    """Matérn 5/2 of squared distances, and its derivative by them."""
    r = np.sqrt(5.0 * squared)
    decay = np.exp(-r)
    return (1 + r + r * r / 3) * decay, -5.0 / 6.0 * (1 + r) * decay


def _pull(weights: Array, places: Array) -> Array:
    """Gradient by the places ``[n, d]`` of Σ weights · squared distances, ``weights [n, n]`` symmetric."""
    return np.asarray(4 * (weights.sum(axis=1)[:, None] * places - weights @ places))
