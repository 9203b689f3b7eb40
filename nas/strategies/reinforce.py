"""REINFORCE: a policy gradient over independent categorical choices."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nas.errors import ExperimentError
from nas.space import Genomes
from nas.strategies.base import ASKED, Domain, Outcomes, Strategy, strategies
from nas.strategies.draws import Draws

Array = npt.NDArray[np.float64]
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


@strategies.register("reinforce")
class Reinforce(Strategy):
    """Policy gradient (Williams 1992) with an independent softmax per choice, as in TuNAS (Bender et al. 2020).

    ``θ ← θ + Adam(E[(R − b)/σ · ∇ log π(α)] + β · ∇H(π))`` with an exponential moving average b of the reward
    (and σ of its spread, so that one learning rate suits rewards of any scale) and an entropy bonus β that decays.
    Only genes that were read carry a gradient. Only the strategy's own samples are learnt from: enqueued or
    earlier outcomes come from another policy. Candidates that their costs rule out have no reward and are left
    out: π conditioned on being feasible differs from π by a term that the baseline cancels in expectation.

    Args:
        lr: Adam's step.
        momentum: of the moving averages of reward and spread.
        entropy: initial weight of the entropy bonus; ``entropy_decay`` multiplies it with every update.
    """

    def __init__(
        self,
        domain: Domain,
        seed: int = 0,
        *,
        lr: float = 0.05,
        momentum: float = 0.9,
        entropy: float = 0.2,
        entropy_decay: float = 0.99,
    ) -> None:
        super().__init__(domain, seed)
        if lr <= 0 or not 0 <= momentum < 1 or entropy < 0:
            raise ExperimentError(
                f"strategy: lr {lr}, momentum {momentum}, entropy {entropy}.",
                expected="lr > 0, 0 ≤ momentum < 1, entropy ≥ 0",
            )
        self.lr, self.momentum, self.entropy, self.entropy_decay = lr, momentum, entropy, entropy_decay
        shape = (len(domain.cardinalities), int(domain.cardinalities.max()))
        self.valid = np.arange(shape[1]) < domain.cardinalities[:, None]
        self.theta = np.zeros(shape)
        self._first, self._second = np.zeros(shape), np.zeros(shape)
        self._updates = 0
        self.baseline, self.spread = 0.0, 0.0

    @property
    def policy(self) -> Array:
        """Probabilities ``[choices, most values]``; zero beyond a choice's own values."""
        logits = np.where(self.valid, self.theta, -np.inf)
        exp = np.exp(logits - logits.max(axis=1, keepdims=True))
        return np.asarray(exp / exp.sum(axis=1, keepdims=True))

    def propose(self, draws: Draws) -> Genomes:
        cumulative = np.cumsum(self.policy, axis=1)
        uniform = draws.uniform(len(cumulative))
        below = (uniform[:, :, None] > cumulative).sum(axis=2)
        return np.asarray(np.minimum(below, self.domain.cardinalities - 1))

    def learn(self, outcomes: Outcomes) -> None:
        rows = outcomes.scored & (outcomes.source == ASKED)
        if not rows.any():
            return
        genomes, reward = outcomes.genomes[rows], outcomes.reward[rows]
        advantage = self._advantage(reward)
        policy = self.policy
        chosen = np.eye(self.theta.shape[1])[genomes]  # [n, choices, values]
        active = self.domain.active(genomes)[:, :, None]
        gradient = (advantage[:, None, None] * active * (chosen - policy)).mean(axis=0)
        gradient += self.entropy * self._entropy_gradient(policy)
        self._ascend(gradient)
        self.entropy *= self.entropy_decay

    def _advantage(self, reward: Array) -> Array:
        """(R − b)/σ with averages that count the new rewards in; the first batch starts them."""
        if self._updates == 0:
            self.baseline, self.spread = float(reward.mean()), float(reward.std())
        else:
            keep = self.momentum ** len(reward)
            self.spread = keep * self.spread + (1 - keep) * float(np.abs(reward - self.baseline).mean())
            self.baseline = keep * self.baseline + (1 - keep) * float(reward.mean())
        return (reward - self.baseline) / max(self.spread, 1e-6)

    def _entropy_gradient(self, policy: Array) -> Array:
        log = np.log(np.where(policy > 0, policy, 1.0))
        entropy = -(policy * log).sum(axis=1, keepdims=True)
        return np.asarray(-policy * (log + entropy))

    def _ascend(self, gradient: Array) -> None:
        """One step of Adam (Kingma & Ba 2015), upwards."""
        self._updates += 1
        self._first = BETA1 * self._first + (1 - BETA1) * gradient
        self._second = BETA2 * self._second + (1 - BETA2) * gradient**2
        first = self._first / (1 - BETA1**self._updates)
        second = self._second / (1 - BETA2**self._updates)
        self.theta += self.lr * first / (np.sqrt(second) + EPSILON)
