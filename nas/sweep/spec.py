"""The sweep file: its schema, and what it says is varied, validated before anything runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from nas.errors import ExperimentError
from nas.experiment import Section, explain, read_mapping
from nas.sweep.nni_space import is_nni, nni_parameters
from nas.sweep.parameter import Parameter, as_number

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
    command: str | None = None
    directory: str | None = None
    set: dict[str, Any] = Field(default_factory=dict)
    vary: dict[str, Any] = Field(min_length=1)
    metric: str = "reward"
    direction: Goal | None = None
    sampler: str = "TPESampler"
    sampler_settings: dict[str, Any] = Field(default_factory=dict)
    pruner: str | None = None
    pruner_settings: dict[str, Any] = Field(default_factory=dict)
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
        if sum(subject is not None for subject in (self.experiment, self.function, self.command)) != 1:
            raise ValueError("a sweep has an experiment, or a function or a command instead")
        if self.directory is not None and self.command is None:
            raise ValueError("directory is where a command runs, and there is none")
        if self.trials is None and self.seconds is None:
            raise ValueError("trials or seconds must bound the sweep")
        if self.experiment is not None and self.metric not in METRICS:
            raise ValueError(f"metric {self.metric!r} is none of {', '.join(METRICS)}")
        if self.experiment is not None and self.pruner is not None:
            raise ValueError("a pruner judges what trials report on the way, and searches report nothing")
        return self

    @property
    def goal(self) -> Goal:
        """``maximize`` or ``minimize``."""
        return self.direction or METRICS.get(self.metric, "maximize")


def load_sweep(source: str | Path | dict[str, Any], overrides: list[str] | None = None) -> Sweep:
    """Read a file (path or bundled name) or a dictionary, apply ``key=value`` overrides, and validate its own keys.

    An override of a key under ``set``, ``vary`` or a sampler's or pruner's settings names it behind the dot:
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
    found = [p for key, shape in sweep.vary.items() for p in _parameters(key, shape)]
    if twice := {p.key for p in found if sum(p.key == q.key for q in found) > 1}:
        raise ExperimentError(f"vary says twice what {min(twice)} is.", remedy="rename one of them")
    return tuple(found)


def _parameters(key: str, shape: Any) -> tuple[Parameter, ...]:
    return tuple(nni_parameters(key, shape)) if is_nni(shape) else (_parameter(key, shape),)


def _parameter(key: str, shape: Any) -> Parameter:
    if isinstance(shape, list):
        found = Parameter(key, tuple(map(as_number, shape)))
        if len(set(found.labels)) < len(shape):
            raise ExperimentError(f"vary.{key} is {shape!r}.", expected="each value once")
        return found
    try:
        r = Range.model_validate(shape)
    except ValidationError as error:
        raise explain(error, f"vary.{key}", Range, SCHEMA) from None
    whole = isinstance(r.low, int) and isinstance(r.high, int) and isinstance(r.step, int | None)
    return Parameter(key, (), r.low, r.high, r.log, r.step, whole)


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
    if section not in ("set", "vary", "sampler_settings", "pruner_settings"):
        raise ExperimentError(
            f"--set {key}: a sweep has no section {section!r}.",
            expected="a key of the sweep",
            remedy=f"set.{key}=… for a key of the experiment",
        )
    raw[section] = {**(raw.get(section) or {}), inner: value}
