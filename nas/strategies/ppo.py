"""Proximal policy optimisation."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from nas.errors import ExperimentError
from nas.strategies.base import Domain, strategies
from nas.strategies.policies import Independent
from nas.strategies.policy_gradient import PolicyGradient, Samples, positive
from nas.strategies.reinforce_lstm import lstm_policy

Array = npt.NDArray[np.float64]


@strategies.register("ppo")
class PPO(PolicyGradient):
    """Proximal policy optimisation (Schulman et al. 2017, equation 7).

    Several epochs of ``E[min(ρ A, clip(ρ, 1 − ε, 1 + ε) A)] + β H(π)`` over the latest ``batch`` own samples,
    whenever some are told. Each choice is an action: ρ is the ratio of a gene's probability now to the one under
    which it was asked, so a sample that an older policy asked is weighted like any other and has no say
    any more once the policy has moved by ε on its account. The advantage A = u − b is every gene's of the genome;
    u and b are those of :class:`~nas.strategies.policy_gradient.PolicyGradient`, and there is no critic, because there
    is no state to value.

    Args:
        policy: ``independent`` choices, or an ``lstm`` (:class:`~nas.strategies.lstm.Controller`).
        lr: Adam's step.
        clip: ε (0.2 in the paper, which has more samples).
        epochs: gradient steps for each new outcome of a tell, of which at most four count.
        batch: own samples that a step looks at, the latest.
        momentum: of the moving average of the utility, the baseline.
        entropy: initial weight of the entropy bonus; every step multiplies it by ``entropy_decay``.
        hidden: units of the LSTM.
    """

    def __init__(
        self, domain: Domain, seed: int = 0, *, policy: Literal["independent", "lstm"] = "independent",
        lr: float = 0.05, clip: float = 0.5, epochs: int = 4, batch: int = 128, momentum: float = 0.5,
        entropy: float = 0.1, entropy_decay: float = 0.99, hidden: int = 64,
    ) -> None:  # fmt: skip
        if not 0 < clip < 1 or epochs < 1:
            raise ExperimentError(f"strategy: clip {clip}, epochs {epochs}.", expected="0 < clip < 1, epochs ≥ 1")
        made = lstm_policy(domain, seed, lr, hidden) if policy == "lstm" else Independent(domain, positive("lr", lr))
        super().__init__(
            domain, seed, made, momentum=momentum, entropy=entropy, entropy_decay=entropy_decay, memory=batch
        )
        self.clip, self.epochs = clip, epochs

    def improve(self, samples: Samples, utility: Array) -> None:
        advantage = self.advantage(utility, np.full(len(samples), 1 / len(samples)))
        for _ in range(self.epochs):
            self.policy.ascend(samples.genomes, self.weights(samples, advantage), self.entropy)

    def weights(self, samples: Samples, advantage: Array) -> Array:
        """Weights ``[n, choices]`` of ∇log π that give the gradient of the clipped surrogate's mean."""
        ratio = np.exp(self.policy.logs(samples.genomes) - samples.logs)
        gain = advantage[:, None]
        # Where the minimum takes the clipped term it is constant; elsewhere ∇ρ = ρ ∇log π.
        clipped = np.where(gain > 0, ratio > 1 + self.clip, ratio < 1 - self.clip)
        return np.where(clipped | ~samples.active, 0.0, ratio * gain) / len(samples)
