"""The sweep file: its schema, and what is varied, validated before anything runs."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from nas.errors import ExperimentError
from nas.experiment import Section, explain, read_mapping

SCHEMA = "docs/sweep.md"
Goal = Literal["maximize", "minimize"]
# What a trial's measured winner offers, and which way is better.
METRICS: dict[str, Goal] = {
    "reward": "maximize", "quality": "maximize", "latency_ms": "minimize", "latency_p95_ms": "minimize",
    "size_bytes": "minimize", "macs": "minimize", "params": "minimize",
}  # fmt: skip


class Range(Section):
    """Values between two ends, both included."""

    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = None

    @model_validator(mode="after")
    def _ends(self) -> Range:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"low {self.low:g} must be below high {self.high:g}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("a logarithmic range has low > 0 and no step")
        if self.step is not None:
            steps = (self.high - self.low) / self.step if self.step > 0 else math.nan
            if not (steps >= 1 and abs(steps - round(steps)) < 1e-6):
                raise ValueError(f"step {self.step:g} must divide high − low, {self.high - self.low:g}")
        return self


class Sweep(Section):
    """One sweep, checked except for what its experiment says about the keys."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    experiment: str | dict[str, Any] | None = None
    function: str | None = None
    set: dict[str, Any] = Field(default_factory=dict)
    vary: dict[str, Any] = Field(min_length=1)
    metric: str = "reward"
    direction: Goal | None = None
    sampler: str = "TPESampler"
    sampler_settings: dict[str, Any] = Field(default_factory=dict)
    trials: int | None = Field(20, ge=1)
    seconds: float | None = Field(None, gt=0)
    workers: int = Field(1, ge=1)
    seed: int = Field(0, ge=0)

    @field_validator("vary")
    @classmethod
    def _shapes(cls, vary: dict[str, Any]) -> dict[str, Any]:
        for key, shape in vary.items():
            if not isinstance(shape, list | dict) or not shape:
                raise ValueError(f"{key} needs a list of values or a range {{low, high}}; a fixed value goes under set")
        return vary

    @model_validator(mode="after")
    def _whole(self) -> Sweep:
        if (self.experiment is None) == (self.function is None):
            raise ValueError("a sweep has an experiment, or a function instead")
        if self.trials is None and self.seconds is None:
            raise ValueError("trials or seconds must bound the sweep")
        if self.experiment is not None and self.metric not in METRICS:
            raise ValueError(f"metric {self.metric!r} is none of {', '.join(METRICS)}")
        return self

    @property
    def goal(self) -> Goal:
        """``maximize`` or ``minimize``."""
        return self.direction or METRICS.get(self.metric, "maximize")


@dataclass(frozen=True)
class Parameter:
    """One varied key: a list of values, or a range.

    Attributes:
        wrapped: the key takes a list of choices, and the runner puts each value into a list of its own.
    """

    key: str
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float | None = None
    whole: bool = False
    wrapped: bool = False

    @property
    def labels(self) -> tuple[str, ...]:
        """The values of a list as text, which can stand for any YAML value."""
        return tuple(map(text, self.values))

    @property
    def ends(self) -> tuple[Any, ...]:
        """What has to be valid for everything between to be: all values of a list, or both ends."""
        return self.values or (self.low, self.high)

    @property
    def options(self) -> tuple[Any, ...] | None:
        """All values in the form of the record (labels of a list, numbers of a range); nothing if not finite."""
        if self.values:
            return self.labels
        if self.whole or self.step is not None:
            step = self.step or 1
            return tuple(self.number(self.low + i * step) for i in range(round((self.high - self.low) / step) + 1))
        return None

    def number(self, value: float) -> float:
        """A value of the range as whole as it should be."""
        return round(value) if self.whole else float(value)

    def value(self, recorded: Any) -> Any:
        """What a label or number of the record stands for."""
        return self.values[self.labels.index(recorded)] if self.values else self.number(recorded)

    def draw(self, rng: np.random.Generator) -> Any:
        """A label or number at random."""
        if (options := self.options) is not None:
            return options[rng.integers(len(options))]
        if self.log:
            return float(np.exp(rng.uniform(math.log(self.low), math.log(self.high))))
        return float(rng.uniform(self.low, self.high))

    def plain(self) -> dict[str, Any]:
        """JSON-able form for the record and the report."""
        if self.values:
            return {"key": self.key, "values": list(self.values)}
        ends = {"low": self.number(self.low), "high": self.number(self.high)}
        return {"key": self.key, **ends, "log": self.log, "step": self.step, "whole": self.whole}


def combinations(parameters: Sequence[Parameter]) -> float:
    """How many there are; infinite if one parameter is continuous."""
    return math.prod(math.inf if p.options is None else len(p.options) for p in parameters)


def all_combinations(parameters: Sequence[Parameter]) -> Iterator[dict[str, Any]]:
    """Every combination, as labels and numbers; only for finite ones."""
    for row in itertools.product(*(p.options or () for p in parameters)):
        yield dict(zip((p.key for p in parameters), row, strict=True))


def load_sweep(source: str | Path | dict[str, Any], overrides: list[str] | None = None) -> Sweep:
    """Read a file (path or bundled name) or a dictionary, apply ``key=value`` overrides, and validate its own keys.

    An override of a key under ``set``, ``vary`` or ``sampler_settings`` names it behind the dot:
    ``vary.training.lr={low: 0.001, high: 0.1}``.

    Raises:
        ExperimentError: names the key, what was found and what is expected.
        ContentError: there is no such sweep.
    """
    raw, origin = (dict(source), "the sweep") if isinstance(source, dict) else _read(source)
    for override in overrides or []:
        _set(raw, override)
    try:
        return Sweep.model_validate(raw)
    except ValidationError as error:
        raise explain(error, origin, Sweep, SCHEMA) from None


def parameters(sweep: Sweep) -> tuple[Parameter, ...]:
    """What the file says is varied.

    Raises:
        ExperimentError: a range is wrong, or a list has a value twice.
    """
    return tuple(_parameter(key, shape) for key, shape in sweep.vary.items())


def _parameter(key: str, shape: Any) -> Parameter:
    if isinstance(shape, list):
        found = Parameter(key, tuple(map(_number, shape)))
        if len(set(found.labels)) < len(shape):
            raise ExperimentError(f"vary.{key} is {shape!r}.", expected="each value once")
        return found
    try:
        r = Range.model_validate(shape)
    except ValidationError as error:
        raise explain(error, f"vary.{key}", Range, SCHEMA) from None
    whole = isinstance(r.low, int) and isinstance(r.high, int) and isinstance(r.step, int | None)
    return Parameter(key, (), r.low, r.high, r.log, r.step, whole)


def _number(value: Any) -> Any:
    """YAML takes 1e-4 for text."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value


def text(value: Any) -> str:
    """A value as YAML on one line, as ``--set`` reads it."""
    dumped = yaml.safe_dump(value, default_flow_style=True, width=math.inf, sort_keys=False, allow_unicode=True)
    return str(dumped).strip().removesuffix("...").strip()


def _read(source: str | Path) -> tuple[dict[str, Any], str]:
    path, raw = read_mapping("experiments/sweeps", source)
    if isinstance(name := raw.get("experiment"), str) and (beside := path.parent / name).is_file():
        here = Path.cwd()
        raw["experiment"] = str(beside.relative_to(here) if beside.is_relative_to(here) else beside)
    return raw, str(path)


def _set(raw: dict[str, Any], override: str) -> None:
    key, equals, words = override.partition("=")
    if not equals or not key.strip():
        raise ExperimentError(f"--set {override!r}.", expected="key=value, such as trials=20")
    section, dot, inner = key.strip().partition(".")
    try:
        value = yaml.safe_load(words)
    except yaml.YAMLError as error:
        raise ExperimentError(f"--set {override!r} is no valid YAML value: {error}.") from error
    if not dot:
        raw[section] = value
        return
    if section not in ("set", "vary", "sampler_settings"):
        raise ExperimentError(
            f"--set {key}: a sweep has no section {section!r}.",
            expected="a key of the sweep",
            remedy=f"set.{key}=… for a key of the experiment",
        )
    raw[section] = {**(raw.get(section) or {}), inner: value}
