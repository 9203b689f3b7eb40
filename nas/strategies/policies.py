"""Policies: distributions over genomes with a gradient. What a policy-gradient strategy samples from and moves."""

from __future__ import annotations

import abc

import numpy as np
import numpy.typing as npt

from nas.space import Genomes
from nas.strategies.base import Domain

Array = npt.NDArray[np.float64]
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


class Policy(abc.ABC):
    """π(α) = Π_j π_j(α_j | α_1 … α_{j−1}): a softmax per choice."""

    @abc.abstractmethod
    def sample(self, uniform: Array, heat: float = 1.0) -> Genomes:
        """Genomes ``[n, choices]`` by inversion of ``uniform [n, choices]`` in [0, 1).

        The logits are divided by ``heat`` ≥ 1, which flattens the policy.
        """

    @abc.abstractmethod
    def logs(self, genomes: Genomes) -> Array:
        """log π_j of every gene given those before it, ``[n, choices]``."""

    @abc.abstractmethod
    def ascend(self, genomes: Genomes, weights: Array, entropy: float) -> None:
        """One step of Adam up the gradient of ``Σ_ij weights_ij · log π_j(genomes_ij) + entropy · H(π)``.

        Both REINFORCE and PPO are this gradient with weights ``[n, choices]`` of their own; a weight of 0 leaves a
        gene out. H is the sum of the choices' entropies (of a conditional policy: its mean along ``genomes``).
        """


class Independent(Policy):
    """Independent choices. Choices of one kind share logits: ``π_j = softmax(θ_j + φ_kind(j))``.

    The kernel size that pays in one block is likely to pay in the next; θ learns where it does not. Everything
    starts at 0, the uniform policy.

    Args:
        domain: the genes.
        lr: step of Adam (Kingma & Ba 2015).

    Attributes:
        theta: logits ``[choices + shared kinds, most values]``, the shared ones last.
    """

    def __init__(self, domain: Domain, lr: float) -> None:
        sizes = domain.cardinalities
        self.lr = lr
        self.choices = len(sizes)
        self.valid = np.arange(int(sizes.max())) < sizes[:, None]
        self.owner = _shared(domain)
        shared = max(0, int(self.owner.max()) + 1)
        self.theta = np.zeros((self.choices + shared, self.valid.shape[1]))
        self._first, self._second = np.zeros_like(self.theta), np.zeros_like(self.theta)
        self._steps = 0

    @property
    def logits(self) -> Array:
        """``[choices, most values]``, −∞ beyond a choice's own values."""
        logits, members = self.theta[: self.choices].copy(), self.owner >= 0
        logits[members] += self.theta[self.choices + self.owner[members]]
        return np.where(self.valid, logits, -np.inf)

    @property
    def probabilities(self) -> Array:
        """``[choices, most values]``; zero beyond a choice's own values."""
        return np.exp(_log_softmax(self.logits))

    def sample(self, uniform: Array, heat: float = 1.0) -> Genomes:
        cumulative = np.cumsum(np.exp(_log_softmax(self.logits / heat)), axis=1)
        genomes = np.zeros(uniform.shape, dtype=np.int64)
        for column in cumulative[:, :-1].T:
            genomes += uniform >= column
        return np.minimum(genomes, self.valid.sum(axis=1) - 1)

    def logs(self, genomes: Genomes) -> Array:
        return np.asarray(_log_softmax(self.logits).ravel()[self._cells(genomes)])

    def _cells(self, genomes: Genomes) -> Genomes:
        """Places of the genes in a flat array of ``[choices, most values]``, ``[n, choices]``."""
        return np.arange(self.choices) * self.valid.shape[1] + genomes

    def gradient(self, genomes: Genomes, weights: Array, entropy: float) -> Array:
        """Of the objective of :meth:`ascend`, with respect to ``theta``."""
        log = _log_softmax(self.logits)
        policy = np.exp(log)
        gained = np.bincount(self._cells(genomes).ravel(), weights.ravel(), policy.size).reshape(policy.shape)
        gradient = gained - weights.sum(axis=0)[:, None] * policy
        log = np.where(self.valid, log, 0.0)
        gradient -= entropy * policy * (log - (policy * log).sum(axis=1, keepdims=True))
        total = np.zeros_like(self.theta)
        total[: self.choices] = gradient
        members = self.owner >= 0
        np.add.at(total, self.choices + self.owner[members], gradient[members])
        return total

    def ascend(self, genomes: Genomes, weights: Array, entropy: float) -> None:
        gradient = self.gradient(genomes, weights, entropy)
        self._steps += 1
        self._first = BETA1 * self._first + (1 - BETA1) * gradient
        self._second = BETA2 * self._second + (1 - BETA2) * gradient**2
        first = self._first / (1 - BETA1**self._steps)
        second = self._second / (1 - BETA2**self._steps)
        self.theta += self.lr * first / (np.sqrt(second) + EPSILON)


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def _shared(domain: Domain) -> Genomes:
    """Number of the kind that a choice shares with another, ``[choices]``; −1 where it is alone."""
    n = len(domain.cardinalities)
    if domain.kinds is None:
        return np.full(n, -1, dtype=np.int64)
    _, kind, count = np.unique(domain.kinds, return_inverse=True, return_counts=True)
    together = count > 1
    return np.where(together[kind], (np.cumsum(together) - 1)[kind], -1).astype(np.int64)
