"""Search spaces in the form of NNI's tuner, ``{"_type": …, "_value": …}``: read, checked, and made parameters.

The semantics are those of NNI 3.0 (``nni/common/hpo_utils/formatting.py``). A nested choice is one parameter for the
branch and one for everything in each branch; all of them are drawn always, and :func:`effective` says which count.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from nas.errors import ContentError, ExperimentError
from nas.sweep.parameter import Parameter, Scale, as_number, is_number

NAME, TYPE, VALUE = "_name", "_type", "_value"
# Optuna has no normal distribution, so what is drawn is the quantile: evenly distributed, and through the inverse of
# the distribution function it becomes a normal number, cut off where a double ends (about 8 deviations). A sampler
# that learns from quantiles knows what is likely beforehand.
_QUANTILES = (1e-15, 1 - 1e-15)
_BOUNDED = ("uniform", "quniform", "loguniform", "qloguniform")
_NORMAL = ("normal", "qnormal", "lognormal", "qlognormal")
TYPES = ("choice", "randint", *_BOUNDED, *_NORMAL)
_MEANING = {
    "randint": "[lower, upper], whole numbers, lower below upper, which is excluded",
    "uniform": "[low, high], low below high", "quniform": "[low, high, q], low below high, q above 0",
    "loguniform": "[low, high], 0 < low < high", "qloguniform": "[low, high, q], 0 < low < high, q above 0",
    "normal": "[mu, sigma], sigma above 0", "qnormal": "[mu, sigma, q], sigma and q above 0",
    "lognormal": "[mu, sigma], sigma above 0", "qlognormal": "[mu, sigma, q], sigma and q above 0",
}  # fmt: skip


def read_file(path: Path, what: str) -> dict[str, Any]:
    """A file of NNI's, in JSON or YAML.

    Raises:
        ContentError: there is no such file.
        ExperimentError: it is no mapping.
    """
    try:
        words = path.read_text()
        # YAML takes JSON's 1e-4 for text.
        found = json.loads(words) if path.suffix == ".json" else yaml.safe_load(words)
    except OSError as error:
        raise ContentError(f"The {what} {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ExperimentError(f"{path} is no valid {path.suffix[1:].upper() or 'YAML'}: {error}.") from error
    if not isinstance(found, dict) or not found:
        raise ExperimentError(f"{path} holds {found!r}.", expected=f"the {what}, a mapping of keys")
    return found


def read_space(path: Path) -> dict[str, Any]:
    """A ``search_space.json``, every entry of it checked. Raises as :func:`read_file` and :func:`nni_parameters`."""
    space = read_file(path, "search space")
    check_space(space)
    return space


def check_space(space: Any) -> None:
    """Raises ExperimentError where it is none of NNI's form."""
    if not isinstance(space, dict) or not space:
        raise ExperimentError(f"The search space is {space!r}.", expected=f"a mapping of keys to {_types()}")
    for key, shape in space.items():
        _ = tuple(nni_parameters(key, shape))


def is_nni(shape: Any) -> bool:
    """Whether a shape under ``vary`` is in NNI's form, or was meant to be."""
    return isinstance(shape, Mapping) and bool({TYPE, VALUE} & shape.keys())


def nni_parameters(key: str, shape: Any) -> Iterator[Parameter]:
    """The parameters of one entry of a search space; those in the branches of a nested choice are named
    ``KEY.BRANCH.NAME``.

    Raises:
        ExperimentError: names the entry, what is wrong with it and what is expected.
    """
    kind, arguments = _checked(key, shape)
    if kind != "choice":
        yield _number(key, kind, arguments)
        return
    nested = branches(shape)
    values = tuple(nested) if nested else tuple(arguments)
    parameter = Parameter(key, values)
    if len(set(parameter.labels)) < len(arguments):
        raise _wrong(key, shape, "each value once" if not nested else f"each {NAME} once")
    yield parameter
    for name, inner in nested.items():
        for part, deeper in inner.items():
            yield from nni_parameters(f"{key}.{name}.{part}", deeper)


def branches(shape: Any) -> dict[str, dict[str, Any]]:
    """Name of each branch of a nested choice, and what is in it; empty for every other shape."""
    values = shape[VALUE] if is_nni(shape) and shape.get(TYPE) == "choice" else []
    if not all(isinstance(value, Mapping) and NAME in value for value in values):
        return {}
    return {str(value[NAME]): {k: v for k, v in value.items() if k != NAME} for value in values}


def effective(space: Mapping[str, Any], values: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    """What of the drawn values counts: not what lies in branches that were not chosen."""
    found: dict[str, Any] = {}
    for name, shape in space.items():
        key = f"{within}{name}"
        found[key] = values[key]
        if inner := branches(shape):
            found |= effective(inner[values[key]], values, f"{key}.{values[key]}.")
    return found


def nested(space: Mapping[str, Any], values: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    """Effective values as ``nni.get_next_parameter()`` returns them: a chosen branch is a dictionary with its name."""
    found: dict[str, Any] = {}
    for name, shape in space.items():
        key = f"{within}{name}"
        found[name] = values[key]
        if inner := branches(shape):
            chosen = values[key]
            found[name] = {NAME: chosen, **nested(inner[chosen], values, f"{key}.{chosen}.")}
    return found


def _checked(key: str, shape: Any) -> tuple[str, list[Any]]:
    if not isinstance(shape, Mapping):
        raise ExperimentError(f"Search space, {key}: {shape!r}.", expected=f"a mapping with {TYPE} and {VALUE}")
    if missing := [name for name in (TYPE, VALUE) if name not in shape]:
        raise ExperimentError(f"Search space, {key}: there is no {missing[0]} in {dict(shape)!r}.", expected=_types())
    if shape[TYPE] not in TYPES:
        raise ExperimentError(f"Search space, {key}: unknown {TYPE} {shape[TYPE]!r}.", expected=_types())
    if unknown := sorted(set(shape) - {TYPE, VALUE}):
        raise ExperimentError(f"Search space, {key}: unknown key {unknown[0]!r}.", expected=f"{TYPE} and {VALUE}")
    if not isinstance(shape[VALUE], list) or not shape[VALUE]:
        raise _wrong(key, shape, _MEANING.get(shape[TYPE], "a list of the values"))
    return shape[TYPE], shape[VALUE]


def _types() -> str:
    return f"a {TYPE} of {', '.join(TYPES)}, with its {VALUE}"


def _wrong(key: str, shape: Any, expected: str) -> ExperimentError:
    return ExperimentError(f"Search space, {key}: {shape[TYPE]} of {shape[VALUE]!r}.", expected=expected)


def _number(key: str, kind: str, arguments: list[Any]) -> Parameter:
    wrong = _wrong(key, {TYPE: kind, VALUE: arguments}, _MEANING[kind])
    numbers = [as_number(argument) for argument in arguments]
    if not all(is_number(n) and math.isfinite(n) for n in numbers) or len(numbers) != 2 + kind.startswith("q"):
        raise wrong
    (first, second), log = numbers[:2], "log" in kind
    quantum = float(numbers[2]) if len(numbers) == 3 else None
    if quantum is not None and quantum <= 0:
        raise wrong
    if kind in _NORMAL:
        if second <= 0:
            raise wrong
        return _normal(key, Scale((float(first), float(second)), log, quantum), wrong)
    if first >= second or (log and first <= 0) or (kind == "randint" and not all(isinstance(n, int) for n in numbers)):
        raise wrong
    if kind == "randint":
        return Parameter(key, low=first, high=second - 1, whole=True)
    scale = Scale(quantum=quantum, clip=(float(first), float(second))) if quantum else None
    return Parameter(key, low=float(first), high=float(second), log=log, scale=scale)


def _normal(key: str, scale: Scale, wrong: ExperimentError) -> Parameter:
    low, high = _QUANTILES
    try:
        scale(low), scale(high)
    except OverflowError:
        raise wrong from None
    return Parameter(key, low=low, high=high, scale=scale)
