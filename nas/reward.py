"""Rewards R(α): quality and costs in, one number out; fronts and hypervolumes whatever the reward was."""

from __future__ import annotations

import abc
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nas.errors import RewardError
from nas.registry import Registry

Array = npt.NDArray[np.float64]


class Reward(abc.ABC):
    """Scalar objective, maximised. ``quality`` and ``cost`` are arrays of one shape; so is the result.

    Args:
        target: the cost T₀ that the reward aims at, in the cost's unit (ms for latency).
    """

    def __init__(self, target: float) -> None:
        if not np.isfinite(target) or target <= 0:
            raise RewardError(f"Reward target {target!r}.", expected="a finite cost above 0")
        self.target = float(target)

    @abc.abstractmethod
    def __call__(self, quality: npt.ArrayLike, cost: npt.ArrayLike) -> Array:
        """R(α) for every pair. Raises RewardError where the kind is not defined for a value."""


rewards: Registry[type[Reward]] = Registry("reward")


def _checked(quality: npt.ArrayLike, cost: npt.ArrayLike, *, positive: bool, kind: str) -> tuple[Array, Array]:
    q, c = np.asarray(quality, dtype=np.float64), np.asarray(cost, dtype=np.float64)
    if not (np.isfinite(q).all() and np.isfinite(c).all()) or (c <= 0).any():
        raise RewardError(f"Reward {kind!r} was given a cost or quality that is not finite, or a cost ≤ 0.")
    if positive and (q <= 0).any():
        raise RewardError(
            f"Reward {kind!r} multiplies by the quality and was given {float(q.min()):g}.",
            expected="quality > 0",
            remedy="reward.kind: tunas_absolute, which adds instead of multiplying",
        )
    return q, c


def _not_positive(name: str, value: float) -> float:
    if not -np.inf < value <= 0:
        raise RewardError(
            f"{name} = {value}.", expected=f"finite and {name} ≤ 0, so that a higher cost lowers the reward"
        )
    return value


@rewards.register("mnasnet_soft")
class MnasNetSoft(Reward):
    """``R = Q · (T/T₀)^w`` everywhere, MnasNet (Tan et al. 2019), equations 2-3 with α = β = w.

    Args:
        w: exponent; the paper's −0.07 means that doubling the latency must buy about 5 % accuracy.
    """

    def __init__(self, target: float, w: float = -0.07) -> None:
        super().__init__(target)
        self.w = _not_positive("w", w)

    def __call__(self, quality: npt.ArrayLike, cost: npt.ArrayLike) -> Array:
        q, c = _checked(quality, cost, positive=True, kind="mnasnet_soft")
        return np.asarray(q * (c / self.target) ** self.w)


@rewards.register("mnasnet_hard")
class MnasNetHard(Reward):
    """``R = Q`` within the target, ``Q · (T/T₀)^w`` beyond, MnasNet (Tan et al. 2019), α = 0, β = w.

    Args:
        w: exponent beyond the target; the paper's −1 cuts the reward in half at twice the latency.
    """

    def __init__(self, target: float, w: float = -1.0) -> None:
        super().__init__(target)
        self.w = _not_positive("w", w)

    def __call__(self, quality: npt.ArrayLike, cost: npt.ArrayLike) -> Array:
        q, c = _checked(quality, cost, positive=True, kind="mnasnet_hard")
        return np.asarray(q * np.maximum(c / self.target, 1.0) ** self.w)


@rewards.register("tunas_absolute")
class TuNASAbsolute(Reward):
    """``R = Q + β · |T/T₀ − 1|``, TuNAS (Bender et al. 2020), equation 3: pulls towards the target from both sides.

    Args:
        beta: strength of the pull, negative; the paper's −0.07 is for Q in 0..1.
    """

    def __init__(self, target: float, beta: float = -0.07) -> None:
        super().__init__(target)
        self.beta = _not_positive("beta", beta)

    def __call__(self, quality: npt.ArrayLike, cost: npt.ArrayLike) -> Array:
        q, c = _checked(quality, cost, positive=False, kind="tunas_absolute")
        return np.asarray(q + self.beta * np.abs(c / self.target - 1.0))


@dataclass(frozen=True)
class Limit:
    """A hard budget: ``cost ≤ limit`` on the named cost."""

    cost: str
    limit: float


def violation(costs: npt.ArrayLike, names: tuple[str, ...], limits: tuple[Limit, ...]) -> Array:
    """How far each row of ``costs [n, len(names)]`` breaks the budgets: Σ max(0, cost/limit − 1), 0 = feasible."""
    matrix = np.asarray(costs, dtype=np.float64)
    total = np.zeros(len(matrix))
    for limit in limits:
        total += np.maximum(matrix[:, names.index(limit.cost)] / limit.limit - 1.0, 0.0)
    return total


def pareto_front(quality: npt.ArrayLike, cost: npt.ArrayLike) -> npt.NDArray[np.intp]:
    """Indices of the points that no other beats on both (higher quality, lower cost), by rising cost."""
    q, c = np.asarray(quality, dtype=np.float64), np.asarray(cost, dtype=np.float64)
    front: list[int] = []
    best = -np.inf
    for i in np.lexsort((-q, c)):
        if q[i] > best:
            front.append(int(i))
            best = q[i]
    return np.array(front, dtype=np.intp)


def hypervolume(quality: npt.ArrayLike, cost: npt.ArrayLike, reference: tuple[float, float]) -> float:
    """Area dominated by the points and bounded by ``reference = (lowest quality, highest cost)``."""
    q, c = np.asarray(quality, dtype=np.float64), np.asarray(cost, dtype=np.float64)
    low, high = reference
    inside = (q > low) & (c < high)
    q, c = q[inside], c[inside]
    front = pareto_front(q, c)
    right = [*c[front], high][1:]
    return float(sum((end - c[i]) * (q[i] - low) for i, end in zip(front, right, strict=True)))
