"""The contract of a reward: quality pays, cost beyond the target does not, and nonsense is refused."""

from __future__ import annotations

import numpy as np

from nas.errors import RewardError
from nas.reward import Reward
from nas.testing.require import require


def check_reward(reward: Reward) -> None:
    """Check a reward: rising with quality, never rising with the cost beyond the target, and strict about its input.

    Raises:
        AssertionError: names the clause that is broken.
    """
    kind = type(reward).__name__
    quality = np.linspace(0.05, 1.0, 20)
    costs = reward.target * np.array([0.25, 0.5, 0.9, 1.0, 1.1, 2.0, 5.0])
    table = reward(*np.meshgrid(quality, costs, indexing="ij"))  # [qualities, costs]
    require(table.shape == (20, 7), f"{kind}: arrays of shape (20, 7) give a reward of shape {table.shape}.")
    require(bool(np.isfinite(table).all()), f"{kind}: a reward is not finite.")
    require(bool((np.diff(table, axis=0) > 0).all()), f"{kind}: a higher quality at one cost does not pay.")
    beyond = table[:, costs >= reward.target]
    require(bool((np.diff(beyond, axis=1) <= 0).all()), f"{kind}: beyond the target, a higher cost pays.")
    scalar = reward(0.5, float(costs[4]))
    require(np.shape(scalar) == (), f"{kind}: two numbers give a reward of shape {np.shape(scalar)}.")
    row = reward([0.5, 0.6], [float(costs[4])] * 2)
    require(row.shape == (2,) and row[0] == scalar, f"{kind}: the reward of a pair depends on its neighbours.")
    good = (0.5, reward.target)
    for what, pair in {
        "quality NaN": (np.nan, good[1]), "quality infinite": (np.inf, good[1]), "cost NaN": (good[0], np.nan),
        "cost infinite": (good[0], np.inf), "cost 0": (good[0], 0.0), "cost below 0": (good[0], -1.0),
    }.items():  # fmt: skip
        for arguments in (pair, ([good[0], pair[0]], [good[1], pair[1]])):
            try:
                got = reward(*arguments)
            except RewardError:
                continue
            raise AssertionError(f"{kind}: {what} gives {got} instead of a RewardError.")
