"""What is asked for: passes with options for the whole model or settings by layer, checked before anything trains."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from nas.compression import Loss, Pass, passes
from nas.errors import CompressionError, ContentError, ExperimentError
from nas.settings import check

FILLED = 3  # model, sample and loss, which the pipeline gives


@dataclass(frozen=True)
class Step:
    """One pass of a pipeline.

    Attributes:
        name: of the pass.
        options: for a whole model, such as ``{"ratio": 0.5}``.
        settings: layer → what is asked of it, instead of options.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] | None = None

    def plain(self) -> dict[str, Any]:
        """JSON-able form."""
        return {"pass": self.name, "options": dict(self.options), "settings": self.settings}


def parse_step(text: str) -> Step:
    """A step as people write it: ``NAME`` or ``NAME:key=value,key=value``, where values are YAML.

    ``NAME`` may be ``module:Class``. A value in square brackets is a list, in which patterns such as ``*.conv`` need
    no quotes.

    Raises:
        ExperimentError: an option has no value.
    """
    name, _, rest = text.strip().partition(":")
    if name not in passes and rest and "=" not in rest.partition(":")[0]:
        attribute, _, rest = rest.partition(":")
        name = f"{name}:{attribute}"
    options = {}
    for option in _parts(rest):
        key, equals, value = option.partition("=")
        if not equals or not key.strip():
            raise ExperimentError(
                f"Step {text!r}: the option {option.strip()!r} has no value.",
                expected="NAME:key=value,key=value, such as low_rank:energy=0.9",
            )
        options[key.strip()] = _value(value)
    return Step(name, options)


def _parts(text: str) -> list[str]:
    """What stands between the commas that are in no brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part for part in parts if part.strip()]


def _value(text: str) -> Any:
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):
        return [_value(part) for part in _parts(text[1:-1])]
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text  # a pattern such as *.conv, which is no YAML


def read_plan(path: Path) -> dict[str, dict[str, Any]]:
    """Settings by layer from a YAML or JSON file: pass → layer → setting.

    Raises:
        ContentError: there is no such file.
        ExperimentError: it holds something else.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ContentError(f"There is no plan at {path}: {error}.", expected="a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ExperimentError(f"{path} is no valid YAML: {error}.") from error
    if not isinstance(content, dict) or not content or not all(isinstance(v, dict) and v for v in content.values()):
        raise ExperimentError(
            f"{path} is no plan.", expected="pass → layer → setting, such as {quantize: {stem.conv: 8}}"
        )
    return {
        str(name): {str(layer): setting for layer, setting in settings.items()} for name, settings in content.items()
    }


def steps_of(
    asked: Iterable[str | tuple[str, Mapping[str, Any]] | Step], plan: Mapping[str, Mapping[str, Any]] | None = None
) -> tuple[Step, ...]:
    """The steps in their order, checked: known passes, each once, with options that they have.

    Args:
        asked: steps as text (:func:`parse_step`), as ``(name, options)``, or as they are.
        plan: settings by layer of passes that are asked for without options; alone, it is all steps, in its order.

    Raises:
        ContentError: a pass is unknown.
        ExperimentError: no step, a pass twice, settings for a pass that is not asked for, or a wrong option.
        CompressionError: a pass takes settings by layer only, and there are none.
    """
    steps = [_step(item) for item in asked] or [Step(name) for name in plan or {}]
    left = dict(plan or {})
    for i, step in enumerate(steps):
        if step.name in left:
            if step.options or step.settings:
                raise ExperimentError(f"{step.name} has options and settings by layer.", expected="one of the two")
            steps[i] = Step(step.name, settings=left.pop(step.name))
    names = [step.name for step in steps]
    if not steps:
        raise ExperimentError("There is nothing to do.", expected=f"at least one step of {', '.join(passes)}")
    if left:
        raise ExperimentError(
            f"There are settings for {next(iter(left))!r}, which is no step.", expected=f"settings for {names}"
        )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ExperimentError(f"{twice!r} is asked for twice.", expected="each pass once")
    return tuple(_checked(step) for step in steps)


def _step(item: str | tuple[str, Mapping[str, Any]] | Step) -> Step:
    if isinstance(item, Step):
        return item
    return parse_step(item) if isinstance(item, str) else Step(item[0], dict(item[1]))


def _checked(step: Step) -> Step:
    kind = passes.get(step.name)
    if not (isinstance(kind, type) and issubclass(kind, Pass)):
        raise ContentError(f"{step.name} is no compression pass.", expected="a subclass of nas.compression.Pass")
    if step.settings is not None:
        if not step.settings:
            raise CompressionError(f"{step.name}: the settings by layer are empty.", expected="at least one layer")
        return step
    if kind.settings_for.__func__ is Pass.settings_for.__func__:  # type: ignore[attr-defined]
        raise CompressionError(
            f"{step.name} takes no options for a whole model.", expected="settings by layer",
            remedy="a plan of settings, in a file with --settings",
        )  # fmt: skip
    known = options_of(kind)
    if unknown := [name for name in step.options if name not in known]:
        raise ExperimentError(
            f"{step.name} has no option {unknown[0]!r}.", expected=f"some of {', '.join(known) or 'none'}"
        )
    try:
        return Step(step.name, check(kind.settings_for, step.options, FILLED, where=step.name))
    except ExperimentError:
        # Names of layers may be numbers, as those of a Sequential are: layers=[0, 3].
        named = {
            key: [str(v) for v in value] if isinstance(value, list) else value for key, value in step.options.items()
        }
        if named == step.options:
            raise
        return Step(step.name, check(kind.settings_for, named, FILLED, where=step.name))


def options_of(kind: type[Pass]) -> dict[str, inspect.Parameter]:
    """Name of every option of a pass for a whole model → its parameter, with hint and default."""
    parameters = list(inspect.signature(kind.settings_for).parameters.values())[FILLED:]
    return {p.name: p for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD}


def settings_by_layer(step: Step, model: nn.Module, sample: torch.Tensor, loss: Loss) -> dict[str, Any]:
    """What the step asks of each layer of ``model``, in the plain form that a record keeps.

    Raises:
        CompressionError: the options cannot be met, or mean no layer at all.
    """
    settings = step.settings
    if settings is None:
        settings = passes.get(step.name).settings_for(model, sample, loss, **step.options)
    if not settings:
        raise CompressionError(
            f"{step.name}: no layer of the model is meant by {dict(step.options)}.",
            remedy="other options, or settings by layer",
        )
    try:
        plain: dict[str, Any] = json.loads(json.dumps(settings, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CompressionError(
            f"{step.name}: its settings are no plain values: {error}.", expected="numbers, texts, lists, mappings"
        ) from error
    return plain


def plan_of(steps: Sequence[tuple[Step, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The plan of steps whose settings are known."""
    return {step.name: dict(settings) for step, settings in steps}
