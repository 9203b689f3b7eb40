"""What is varied: one parameter of a sweep, between the form that a sampler draws and the value that a trial gets."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import yaml


@dataclass(frozen=True)
class Scale:
    """From the number that a sampler draws to the value that a trial gets.

    Attributes:
        normal: mean and standard deviation; what is drawn is then the value's quantile in that distribution.
        exponential: the normal number is the value's logarithm.
        quantum: the value is rounded to a multiple of it.
        clip: and then put between these ends.
    """

    normal: tuple[float, float] | None = None
    exponential: bool = False
    quantum: float | None = None
    clip: tuple[float, float] | None = None

    def __call__(self, drawn: float) -> float:
        """The value of what was drawn."""
        value = NormalDist(*self.normal).inv_cdf(drawn) if self.normal else float(drawn)
        value = math.exp(value) if self.exponential else value
        value = round(value / self.quantum) * self.quantum if self.quantum else value
        return min(max(value, self.clip[0]), self.clip[1]) if self.clip else value


@dataclass(frozen=True)
class Parameter:
    """One varied key: a list of values, or a range.

    Attributes:
        wrapped: the key takes a list of choices, and the runner puts each value into a list of its own.
        scale: what makes the value of a drawn number, where that is not the value itself.
    """

    key: str
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float | None = None
    whole: bool = False
    wrapped: bool = False
    scale: Scale | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """The values of a list as text, which can stand for any YAML value."""
        return tuple(map(text, self.values))

    @property
    def ends(self) -> tuple[Any, ...]:
        """What has to be valid for everything between to be: all values of a list, or both ends.

        A normal distribution has none; its median stands for them.
        """
        if self.values:
            return self.values
        inner = (self.low, self.high) if self.bounded else (0.5,)
        return tuple(map(self.value, inner)) if self.scale else inner

    @property
    def bounded(self) -> bool:
        """Whether a range's values have ends."""
        return self.scale is None or self.scale.normal is None

    @property
    def count(self) -> float:
        """How many values there are; infinite for a continuous range."""
        if self.values:
            return len(self.values)
        if (grid := self._grid()) is None:
            return math.inf
        return grid[1]

    def _grid(self) -> tuple[float, int, float] | None:
        """Where the values of a range lie, if they are countable: the first, how many, and how far apart."""
        if self.scale is not None and self.scale.quantum and self.bounded:
            q = self.scale.quantum
            first, last = round(self.low / q), round(self.high / q)
            return first * q, last - first + 1, q
        if self.whole or self.step is not None:
            step = self.step or 1
            return self.low, round((self.high - self.low) / step) + 1, step
        return None

    def option(self, i: int) -> Any:
        """The value number ``i`` of a countable parameter, as it is drawn: a label or a number."""
        if self.values:
            return self.labels[i]
        first, _, step = self._grid() or (self.low, 1, 0.0)
        return self.number(min(max(first + i * step, self.low), self.high))

    @property
    def options(self) -> tuple[Any, ...] | None:
        """All values as they are drawn; nothing if there are infinitely many."""
        return None if math.isinf(self.count) else tuple(self.option(i) for i in range(int(self.count)))

    def number(self, value: float) -> float:
        """A value of the range as whole as it should be."""
        return round(value) if self.whole else float(value)

    def value(self, recorded: Any) -> Any:
        """What a label or number of the record stands for."""
        if self.values:
            return self.values[self.labels.index(recorded)]
        return self.number(self.scale(recorded) if self.scale else recorded)

    def shown(self, recorded: Any) -> Any:
        """A label or number of the record for people: a number is the value that it stands for."""
        return recorded if self.values else self.value(recorded)

    def draw(self, rng: np.random.Generator) -> Any:
        """A label or number at random."""
        if self.values or (self.scale is None and not math.isinf(self.count)):
            return self.option(int(rng.integers(int(self.count))))
        if self.log:
            return float(np.exp(rng.uniform(math.log(self.low), math.log(self.high))))
        return float(rng.uniform(self.low, self.high))

    def describe(self) -> str:
        """For people: what values there are."""
        if self.scale is not None and self.scale.normal is not None:
            mean, deviation = self.scale.normal
            place = f"normal, mean {mean:g}, deviation {deviation:g}"
            place += ", of the logarithm" if self.scale.exponential else ""
        else:
            place = ", ".join(self.labels) if self.values else f"{text(self.ends[0])} to {text(self.ends[1])}"
            place += ", logarithmic" if self.log else ""
        step = self.step or (self.scale and self.scale.quantum)
        place += f", in steps of {text(step)}" if step else ""
        return place + (", each in a list of its own" if self.wrapped else "")

    def plain(self) -> dict[str, Any]:
        """JSON-able form for the record and the report."""
        if self.values:
            return {"key": self.key, "values": list(self.values)}
        shape = {"log": self.log, "step": self.step, "whole": self.whole}
        if self.scale is None:
            return {"key": self.key, "low": self.number(self.low), "high": self.number(self.high), **shape}
        low, high = self.ends if self.bounded else (None, None)
        normal = dict(zip(("mean", "deviation"), self.scale.normal or (), strict=False))
        # The logarithm of a rounded number may be that of nothing.
        shape["log"] = self.log or (self.scale.exponential and not self.scale.quantum)
        scale = {"quantum": self.scale.quantum, "exponential": self.scale.exponential, **normal}
        return {"key": self.key, "low": low, "high": high, **shape, **scale}


def combinations(parameters: Sequence[Parameter]) -> float:
    """How many there are; infinite if one parameter is continuous."""
    return math.prod(p.count for p in parameters)


def all_combinations(parameters: Sequence[Parameter]) -> Iterator[dict[str, Any]]:
    """Every combination, as labels and numbers; only for finite ones."""
    for row in itertools.product(*(p.options or () for p in parameters)):
        yield dict(zip((p.key for p in parameters), row, strict=True))


def as_number(value: Any) -> Any:
    """What YAML takes for text and is a number: 1e-4."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value


def is_number(value: Any) -> bool:
    """Whether it is one; what is true or false is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def text(value: Any) -> str:
    """A value as YAML on one line, as ``--set`` reads it."""
    dumped = yaml.safe_dump(value, default_flow_style=True, width=math.inf, sort_keys=False, allow_unicode=True)
    return str(dumped).strip().removesuffix("...").strip()
