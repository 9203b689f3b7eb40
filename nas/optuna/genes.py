"""Optuna's distributions as genes: the values that a parameter may take, in a row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from nas.errors import SpaceError


@dataclass(frozen=True)
class Gene:
    """One parameter with its values.

    Attributes:
        values: what the gene's numbers 0, 1, … stand for.
        ordered: whether neighbours are alike.
    """

    distribution: BaseDistribution
    values: tuple[Any, ...]
    ordered: bool

    def index(self, value: Any) -> int:
        """Number of a value; of the nearest one where it lies between two."""
        if isinstance(self.distribution, CategoricalDistribution):
            return int(self.distribution.to_internal_repr(value))
        points, point = np.array(self.values, dtype=np.float64), float(value)
        if getattr(self.distribution, "log", False):
            points, point = np.log(points), math.log(point)
        return int(np.abs(points - point).argmin())


def gene(distribution: BaseDistribution, grid: int) -> Gene:
    """The gene of a distribution.

    Every value of a categorical parameter, and every value of a number that has at most ``grid`` of them; of any other
    number ``grid`` values from the lowest to the highest, evenly spaced, in the logarithm where the distribution asks
    for it. A categorical parameter is ordered where its choices are numbers in rising or falling order.
    """
    if isinstance(distribution, CategoricalDistribution):
        choices = distribution.choices
        numbers = all(isinstance(c, int | float) and not isinstance(c, bool) for c in choices)
        ordered = numbers and list(choices) in (sorted(choices), sorted(choices, reverse=True))  # type: ignore[type-var]
        return Gene(distribution, tuple(choices), ordered)
    if isinstance(distribution, IntDistribution):
        return Gene(distribution, _integers(distribution, grid), True)
    if isinstance(distribution, FloatDistribution):
        return Gene(distribution, _floats(distribution, grid), True)
    raise SpaceError(f"A parameter with a {type(distribution).__name__}.", expected="a category, an integer or a float")


def _integers(d: IntDistribution, grid: int) -> tuple[int, ...]:
    count = (d.high - d.low) // d.step + 1
    if count > grid and d.log:
        points = _logarithmic(d.low, d.high, grid).tolist()
        return tuple(sorted({min(max(round(point), d.low), d.high) for point in points}))
    return tuple(d.low + d.step * i for i in _spread(count, grid))


def _floats(d: FloatDistribution, grid: int) -> tuple[float, ...]:
    if d.step is not None:
        count = round((d.high - d.low) / d.step) + 1
        return tuple(min(d.low + d.step * i, d.high) for i in _spread(count, grid))
    points = _logarithmic(d.low, d.high, grid) if d.log else np.linspace(d.low, d.high, grid)
    return tuple(np.clip(points, d.low, d.high).tolist())


def _spread(count: int, grid: int) -> list[int]:
    """At most ``grid`` of the numbers 0..count−1, evenly spaced, both ends among them."""
    if count <= grid:
        return list(range(count))
    return [i * (count - 1) // (grid - 1) for i in range(grid)]


def _logarithmic(low: float, high: float, grid: int) -> npt.NDArray[np.float64]:
    return np.exp(np.linspace(math.log(low), math.log(high), grid))
