"""REINFORCE: a policy gradient over everything that the memory holds."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nas.strategies.base import Domain, strategies
from nas.strategies.policies import Independent
from nas.strategies.policy_gradient import PolicyGradient, Samples, positive

Array = npt.NDArray[np.float64]


class ReplayedReinforce(PolicyGradient):
    """REINFORCE (Williams 1992) with experience replay.

    ``θ ← θ + Adam(Σ_i w_i (u_i − b) ∇ log π(α_i) / Σ_i w_i + β ∇H(π))`` over the latest ``memory`` own samples. As a
    training costs minutes, no sample is thrown away after one step: older ones come from an older policy and are
    weighted by ``w_i = min(1, π(α_i) / π_asked(α_i))``, truncated importance sampling (Ionides 2008; for replay
    Wang et al. 2017, "Sample Efficient Actor-Critic with Experience Replay"). There is a step for each new
    outcome of a tell, at most four.
    """

    def improve(self, samples: Samples, utility: Array) -> None:
        weights = self.weights(samples)
        advantage = weights * self.advantage(utility, weights)
        self.policy.ascend(samples.genomes, advantage[:, None] * samples.active, self.entropy)

    def weights(self, samples: Samples) -> Array:
        """``min(1, π(α) / π_asked(α))``, over the genes that are not dormant, divided by their sum, ``[n]``."""
        logs = ((self.policy.logs(samples.genomes) - samples.logs) * samples.active).sum(axis=1)
        logs = np.minimum(logs, 0.0)
        weights = np.exp(logs - logs.max())
        return np.asarray(weights / weights.sum())


@strategies.register("reinforce")
class Reinforce(ReplayedReinforce):
    """REINFORCE with an independent softmax per choice, as in TuNAS (Bender et al. 2020).

    Choices of one kind share part of their logits. See :class:`ReplayedReinforce` for the gradient and
    :class:`~nas.strategies.policy_gradient.PolicyGradient` for the draws, the utilities and off-policy outcomes.

    Args:
        lr: Adam's step.
        momentum: of the moving average of the utility, the baseline.
        entropy: initial weight of the entropy bonus; every step multiplies it by ``entropy_decay``.
        memory: own samples that are replayed, the latest.
    """

    def __init__(
        self, domain: Domain, seed: int = 0, *, lr: float = 0.1, momentum: float = 0.5, entropy: float = 1.0,
        entropy_decay: float = 0.99, memory: int = 256,
    ) -> None:  # fmt: skip
        super().__init__(
            domain, seed, Independent(domain, positive("lr", lr)), momentum=momentum, entropy=entropy,
            entropy_decay=entropy_decay, memory=memory,
        )  # fmt: skip
