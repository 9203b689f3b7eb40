"""The contract of a reward: quality pays, cost beyond the target does not, and nonsense is refused."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from nas.errors import RewardError
from nas.reward import Array, Reward, SingleCost
from nas.testing.require import require


def check_reward(reward: Reward) -> None:
    """Check a reward: rising with quality, never rising with a cost beyond its target, and strict about its input.

    Costs are found by name, whatever else is priced and in whatever order.

    Raises:
        AssertionError: names the clause that is broken.
    """
    kind = type(reward).__name__
    require(bool(reward.costs), f"{kind} reads no cost.")
    names = ("another_cost", *reversed(reward.costs))
    at_target = np.array([7.0, *(reward.targets[cost] for cost in names[1:])])
    quality = np.linspace(0.05, 1.0, 20)
    for cost in reward.costs:
        _check_trade(reward, quality, at_target, names, names.index(cost), f"{kind}, {cost}")
    shuffled = reward.score(quality, np.tile(at_target[::-1], (20, 1)), names[::-1])
    straight = reward.score(quality, np.tile(at_target, (20, 1)), names)
    require(bool((shuffled == straight).all()), f"{kind}: costs are not found by their names.")
    one = reward.score(quality[3:4], at_target[None], names)
    require(one.shape == (1,) and one[0] == straight[3], f"{kind}: a reward depends on its neighbours.")
    for what, q, row in _improper(reward, names, at_target):
        _require_refused(reward, [q], [row], names, what)
        _require_refused(reward, [0.5, q], [at_target, row], names, what)
    _require_refused(reward, [0.5], [[1.0]], ("another_cost",), "a missing cost")
    if isinstance(reward, SingleCost):
        _check_call(reward)


def _check_trade(
    reward: Reward, quality: Array, at_target: Array, names: tuple[str, ...], column: int, where: str
) -> None:
    """Quality against one cost, the others at their targets."""
    share = np.array([0.25, 0.5, 0.9, 1.0, 1.1, 2.0, 5.0])
    rows = np.tile(at_target, (len(share), 1))
    rows[:, column] *= share
    table = np.array([reward.score(np.full(len(share), q), rows, names) for q in quality])  # [qualities, shares]
    require(table.shape == (len(quality), len(share)), f"{where}: 7 candidates give rewards {table.shape[1:]}.")
    require(bool(np.isfinite(table).all()), f"{where}: a reward is not finite.")
    require(bool((np.diff(table, axis=0) > 0).all()), f"{where}: a higher quality at one cost does not pay.")
    beyond = table[:, share >= 1.0]
    require(bool((np.diff(beyond, axis=1) <= 0).all()), f"{where}: beyond the target, a higher cost pays.")


def _improper(reward: Reward, names: tuple[str, ...], at_target: Array) -> Iterator[tuple[str, float, Array]]:
    """Values that no reward is defined for: what is wrong, quality, costs."""
    yield "quality NaN", np.nan, at_target
    yield "quality infinite", np.inf, at_target
    for cost in reward.costs:
        for what, value in {"NaN": np.nan, "infinite": np.inf, "0": 0.0, "below 0": -1.0}.items():
            row = at_target.copy()
            row[names.index(cost)] = value
            yield f"cost {what}", 0.5, row


def _require_refused(
    reward: Reward, quality: npt.ArrayLike, costs: npt.ArrayLike, names: tuple[str, ...], what: str
) -> None:
    try:
        got = reward.score(quality, costs, names)
    except RewardError:
        return
    raise AssertionError(f"{type(reward).__name__}: {what} gives {got} instead of a RewardError.")


def _check_call(reward: SingleCost) -> None:
    """Calling it gives what ``score`` gives, in the shape of its arguments."""
    kind = type(reward).__name__
    quality, costs = np.linspace(0.05, 1.0, 20), reward.target * np.array([0.25, 1.0, 5.0])
    q, c = np.meshgrid(quality, costs, indexing="ij")
    table = reward(q, c)
    require(table.shape == (20, 3), f"{kind}: arrays of shape (20, 3) give a reward of shape {table.shape}.")
    same = table.ravel() == reward.score(q.ravel(), c.reshape(-1, 1), reward.costs)
    require(bool(same.all()), f"{kind}: calling it and score() differ.")
    scalar = reward(0.5, float(costs[2]))
    require(np.shape(scalar) == (), f"{kind}: two numbers give a reward of shape {np.shape(scalar)}.")
    row = reward([0.5, 0.6], [float(costs[2])] * 2)
    require(row.shape == (2,) and row[0] == scalar, f"{kind}: the reward of a pair depends on its neighbours.")
