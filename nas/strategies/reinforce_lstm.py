"""REINFORCE with an autoregressive policy."""

from __future__ import annotations

from nas.strategies.base import Domain, strategies
from nas.strategies.policies import Policy
from nas.strategies.policy_gradient import positive
from nas.strategies.reinforce import ReplayedReinforce


@strategies.register("reinforce-lstm")
class ReinforceLstm(ReplayedReinforce):
    """REINFORCE with an LSTM that chooses gene after gene (Zoph & Le 2017; ENAS, Pham et al. 2018).

    It can learn what goes together, at the price of more to learn: see :class:`~nas.strategies.lstm.Controller`, and
    :class:`~nas.strategies.reinforce.ReplayedReinforce` for the gradient.

    Args:
        lr: Adam's step.
        hidden: units of the LSTM.
        momentum: of the moving average of the utility, the baseline.
        entropy: initial weight of the entropy bonus; every step multiplies it by ``entropy_decay``.
        memory: own samples that are replayed, the latest.
    """

    def __init__(
        self, domain: Domain, seed: int = 0, *, lr: float = 0.02, hidden: int = 64, momentum: float = 0.5,
        entropy: float = 1.0, entropy_decay: float = 0.99, memory: int = 256,
    ) -> None:  # fmt: skip
        super().__init__(
            domain, seed, lstm_policy(domain, seed, lr, hidden), momentum=momentum, entropy=entropy,
            entropy_decay=entropy_decay, memory=memory,
        )  # fmt: skip


def lstm_policy(domain: Domain, seed: int, lr: float, hidden: int) -> Policy:
    """The LSTM policy; torch is imported only where one is made."""
    from nas.strategies.lstm import Lstm

    positive("hidden", hidden)
    return Lstm(domain, positive("lr", lr), hidden, seed)
