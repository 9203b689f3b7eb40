"""Rewards R(α): quality and costs in, one number out; fronts and hypervolumes whatever the reward was."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nas.errors import RewardError
from nas.registry import Registry

Array = npt.NDArray[np.float64]
Targets = float | Mapping[str, float]  # a number is milliseconds of latency_ms


class Reward(abc.ABC):
    """Scalar objective of a quality and of the costs that it names, maximised.

    Args:
        targets: cost name → the value aimed at, in the cost's unit (ms for latencies, bytes for sizes).

    Attributes:
        targets: the costs that the reward reads, with what it aims at.

    Raises:
        RewardError: a target is no cost.
    """

    def __init__(self, targets: Mapping[str, float]) -> None:
        for cost, target in targets.items():
            if not np.isfinite(target) or target <= 0:
                raise RewardError(f"Reward target {target!r} for {cost}.", expected="a finite cost above 0")
        self.targets = {cost: float(target) for cost, target in targets.items()}

    @property
    def costs(self) -> tuple[str, ...]:
        """Names of the costs that the reward reads."""
        return tuple(self.targets)

    def score(self, quality: npt.ArrayLike, costs: npt.ArrayLike, names: Sequence[str]) -> Array:
        """R(α) ``[n]`` of quality ``[n]`` and costs ``[n, k]`` whose columns are called ``names``.

        Raises:
            RewardError: a cost that the reward reads is not among them, or the reward is not defined for a value.
        """
        return self.combine(
            np.asarray(quality, dtype=np.float64), np.asarray(costs, dtype=np.float64)[:, self.columns(names)]
        )

    def columns(self, names: Sequence[str]) -> list[int]:
        """Where the costs that the reward reads stand among ``names``; raises RewardError where one does not."""
        names = list(names)
        if missing := [cost for cost in self.costs if cost not in names]:
            raise RewardError(f"The reward reads the cost {missing[0]!r}.", expected=f"one of {', '.join(names)}")
        return [names.index(cost) for cost in self.costs]

    @abc.abstractmethod
    def combine(self, quality: Array, costs: Array) -> Array:
        """R(α) ``[n]`` of quality ``[n]`` and costs ``[n, k]``, one column for each of ``self.costs``.

        Raises:
            RewardError: the reward is not defined for a value.
        """


class SingleCost(Reward):
    """A reward of quality and one cost; callable with arrays of one shape, and the result has that shape too.

    Args:
        target: T₀ with the name of the cost, the first of several; a number is milliseconds of ``latency_ms``.
    """

    def __init__(self, target: Targets) -> None:
        named = named_targets(target)
        cost = next(iter(named))
        super().__init__({cost: named[cost]})
        self.cost, self.target = cost, self.targets[cost]

    def combine(self, quality: Array, costs: Array) -> Array:
        return self(quality, costs[:, 0])

    @abc.abstractmethod
    def __call__(self, quality: npt.ArrayLike, cost: npt.ArrayLike) -> Array:
        """R(α) for every pair. Raises RewardError where the kind is not defined for a value."""


def named_targets(targets: Targets) -> dict[str, float]:
    """Targets by the name of their cost; a number is milliseconds of ``latency_ms``."""
    return dict(targets) if isinstance(targets, Mapping) else {"latency_ms": targets}


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
class MnasNetSoft(SingleCost):
    """``R = Q · (T/T₀)^w`` everywhere, MnasNet (Tan et al. 2019), equations 2-3 with α = β = w.

    Args:
        w: exponent; the paper's −0.07 means that doubling the latency must buy about 5 % accuracy.
    """

    def __init__(self, target: Targets, w: float = -0.07) -> None:
        super().__init__(target)
        self.w = _not_positive("w", w)

    def __call__(self, quality: npt.ArrayLike, cost: npt.ArrayLike) -> Array:
        q, c = _checked(quality, cost, positive=True, kind="mnasnet_soft")
        return np.asarray(q * (c / self.target) ** self.w)


@rewards.register("mnasnet_hard")
class MnasNetHard(SingleCost):
    """``R = Q`` within the target, ``Q · (T/T₀)^w`` beyond, MnasNet (Tan et al. 2019), α = 0, β = w.

    Args:
        w: exponent beyond the target; the paper's −1 cuts the reward in half at twice the latency.
    """

    def __init__(self, target: Targets, w: float = -1.0) -> None:
        super().__init__(target)
        self.w = _not_positive("w", w)

    def __call__(self, quality: npt.ArrayLike, cost: npt.ArrayLike) -> Array:
        q, c = _checked(quality, cost, positive=True, kind="mnasnet_hard")
        return np.asarray(q * np.maximum(c / self.target, 1.0) ** self.w)


@rewards.register("tunas_absolute")
class TuNASAbsolute(SingleCost):
    """``R = Q + β · |T/T₀ − 1|``, TuNAS (Bender et al. 2020), equation 3: pulls towards the target from both sides.

    Args:
        beta: strength of the pull, negative; the paper's −0.07 is for Q in 0..1.
    """

    def __init__(self, target: Targets, beta: float = -0.07) -> None:
        super().__init__(target)
        self.beta = _not_positive("beta", beta)

    def __call__(self, quality: npt.ArrayLike, cost: npt.ArrayLike) -> Array:
        q, c = _checked(quality, cost, positive=False, kind="tunas_absolute")
        return np.asarray(q + self.beta * np.abs(c / self.target - 1.0))


@rewards.register("weighted_product")
class WeightedProduct(Reward):
    """``R = Q · Π_i (c_i/T_i)^w_i`` over any costs: MnasNet's product (Tan et al. 2019, equation 2), one factor a cost.

    Args:
        defaults: targets of the costs that ``targets`` leaves out.
        weights: cost name → its exponent, each ≤ 0.
        targets: cost name → T_i, in the cost's unit.
    """

    def __init__(self, defaults: Targets, weights: dict[str, float], targets: dict[str, float] | None = None) -> None:
        if not weights:
            raise RewardError("weighted_product has no weights.", expected="a weight ≤ 0 for at least one cost")
        if stray := sorted(set(targets or {}) - set(weights)):
            raise RewardError(f"reward.targets names {stray[0]!r}.", expected=f"one of {', '.join(weights)}")
        known = {**named_targets(defaults), **(targets or {})}
        if missing := [cost for cost in weights if cost not in known]:
            raise RewardError(
                f"weighted_product has no target for the cost {missing[0]!r}.",
                expected=f"one of {', '.join(known)}",
                remedy="set it in reward.targets, or give that cost a budget",
            )
        super().__init__({cost: known[cost] for cost in weights})
        self.exponents = np.array([_not_positive(f"weights.{cost}", w) for cost, w in weights.items()])

    def combine(self, quality: Array, costs: Array) -> Array:
        q, c = _checked(quality, costs, positive=True, kind="weighted_product")
        return np.asarray(q * np.prod((c / np.array(list(self.targets.values()))) ** self.exponents, axis=1))


def where_defined(reward: Reward, quality: npt.ArrayLike, costs: npt.ArrayLike, names: Sequence[str]) -> Array:
    """R(α) ``[n]`` like :meth:`Reward.score`, but NaN where the quality is unknown or the reward not defined for it.

    A reward that multiplies is not defined for qualities ≤ 0, so these are asked for apart from the others.
    """
    q, c = np.asarray(quality, dtype=np.float64), np.asarray(costs, dtype=np.float64)
    reward.columns(names)  # a cost that is missing is no matter of a single value
    values = np.full(len(q), np.nan)
    for group in (q > 0, q <= 0):
        if group.any():
            try:
                values[group] = reward.score(q[group], c[group], names)
            except RewardError:
                continue
    return values


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


def pareto_front(quality: npt.ArrayLike, costs: npt.ArrayLike) -> npt.NDArray[np.intp]:
    """Indices of the points that no other beats: higher quality, lower costs; by rising (first) cost.

    Of equal points only the first is kept; a point with a NaN never is. With one cost this takes one sort; with
    more, time grows with the number of points times the length of the front.

    Args:
        quality: ``[n]``.
        costs: ``[n]`` or ``[n, k]``.
    """
    points, index = _minimised(quality, costs)
    points, first = np.unique(points, axis=0, return_index=True)  # sorted by the first cost, then the second, …
    index = index[first]
    if points.shape[1] == 2:
        lowest = np.minimum.accumulate(points[:, 1])
        return index[np.concatenate([[True], points[1:, 1] < lowest[:-1]])] if len(points) else index
    front, left = list[int](), np.arange(len(points))
    while len(left):
        # Of what is left, nothing beats the first in this order, and it is beaten by nothing that went before.
        best, left = left[0], left[1:]
        front.append(best)
        left = left[(points[left] < points[best]).any(axis=1)]
    return index[front]


def hypervolume(quality: npt.ArrayLike, costs: npt.ArrayLike, reference: Sequence[float]) -> float:
    """Volume that the points dominate within ``reference``; exact, by slicing (Zitzler 2001; While et al. 2006).

    Meant for one to three costs: every further one multiplies the time by the length of the front.

    Args:
        quality: ``[n]``.
        costs: ``[n]`` or ``[n, k]``.
        reference: lowest quality, then the highest of each cost, ``[1 + k]``. What is no better than it in every
            respect adds nothing.

    Raises:
        RewardError: the reference has another number of costs.
    """
    points, _ = _minimised(quality, costs)
    if len(reference) != points.shape[1]:
        raise RewardError(
            f"A reference point of {len(reference)} numbers.", expected=f"a quality and {points.shape[1] - 1} cost(s)"
        )
    corner = np.array([*reference[1:], -reference[0]], dtype=np.float64)
    return _volume(points[(points < corner).all(axis=1)], corner)


def reference_point(
    quality: npt.ArrayLike, costs: npt.ArrayLike, names: Sequence[str], limits: Sequence[Limit]
) -> tuple[float, ...]:
    """A reference for :func:`hypervolume` that the best points do not move, so that volumes can be compared.

    Quality 0, or the lowest there is where that is lower; of each cost its limit, or the highest where it has none.

    Args:
        costs: ``[n, len(names)]``, n ≥ 1.
    """
    bounds = {limit.cost: limit.limit for limit in limits}
    highest = np.asarray(costs, dtype=np.float64).max(axis=0)
    lowest = min(0.0, float(np.min(quality)))
    return (lowest, *(bounds.get(name, float(top)) for name, top in zip(names, highest, strict=True)))


def _minimised(quality: npt.ArrayLike, costs: npt.ArrayLike) -> tuple[Array, npt.NDArray[np.intp]]:
    """Costs and −quality as columns ``[n, k + 1]``, rows with a NaN left out, and which rows are left."""
    q, c = np.asarray(quality, dtype=np.float64), np.asarray(costs, dtype=np.float64)
    points = np.column_stack([c, -q])
    index = np.flatnonzero(~np.isnan(points).any(axis=1))
    return points[index], index


def _volume(points: Array, corner: Array) -> float:
    """Volume dominated by ``points [n, d]``, all below ``corner [d]`` in every coordinate; smaller is better."""
    if points.shape[1] == 2:
        x, y = points[np.argsort(points[:, 0], kind="stable")].T
        widths = np.diff(np.append(x, corner[0]))
        return float(widths @ (corner[1] - np.minimum.accumulate(y))) if len(x) else 0.0
    points = points[np.argsort(points[:, -1], kind="stable")]
    depths = np.diff(np.append(points[:, -1], corner[-1]))
    section, area, total = points[:0, :-1], 0.0, 0.0  # what the slice holds, seen along the last coordinate
    for point, depth in zip(points[:, :-1], depths, strict=True):
        if not (section <= point).all(axis=1).any():
            section = np.vstack([section[(section < point).any(axis=1)], point])
            area = _volume(section, corner[:-1])
        total += area * float(depth)
    return total
