"""The contract of a compression pass, and the pipeline that applies a candidate's passes in order."""

from __future__ import annotations

import abc
import difflib
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nas.errors import CompressionError
from nas.registry import Registry

if TYPE_CHECKING:
    import onnx
    import torch
    from torch import nn

Plan = Mapping[str, Mapping[str, Any]]
Loss = Callable[["torch.Tensor"], "torch.Tensor"]  # logits of the sample → mean loss, a scalar


class Pass(abc.ABC):
    """One technique in its moments; ``settings`` maps module names to what is asked of them.

    1. :meth:`penalty` while the model is trained plain: what makes it easier to compress;
    2. :meth:`apply` before the last training epochs: module in, smaller or simulating module out;
    3. :meth:`restore` after training: back to plain layers that export cleanly;
    4. :meth:`rewrite` on the exported ONNX: what only the runtime's format can express.

    A name that an earlier pass split into several layers stands for all of them (:func:`layers_of`).

    Attributes:
        stores: whether :meth:`rewrite` only changes how weights are stored; it is called after those that do not.
    """

    stores = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """An option that a pass does not know is one clear error, whoever asks for it."""
        super().__init_subclass__(**kwargs)
        own = cls.__dict__.get("settings_for")
        if own is not None:
            cls.settings_for = classmethod(_of_known_options(own.__func__))  # type: ignore[method-assign,assignment]

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = dict(settings)

    @classmethod
    def settings_for(
        cls, model: nn.Module, sample: torch.Tensor, loss: Loss | None = None, **options: Any
    ) -> dict[str, Any]:
        """Settings layer by layer of what is asked of a whole model, such as ``ratio=0.5``; the model stays as it is.

        What a person writes on the command line goes through here, and so does what depends on the weights, such as a
        rank by energy: settings alone decide the structure of what :meth:`apply` makes.

        Raises:
            CompressionError: an option is unknown or cannot be met.
        """
        raise CompressionError(f"{cls.__name__} takes no options for a whole model.", expected="settings by layer")

    def penalty(self, model: nn.Module) -> torch.Tensor | None:
        """Added to the loss of the epochs before :meth:`apply` (default: nothing)."""
        return None

    @abc.abstractmethod
    def apply(self, model: nn.Module, sample: torch.Tensor, loss: Loss | None = None) -> nn.Module:
        """Compress ``model``, in place or not.

        Args:
            sample: a small batch of real raw inputs ``[n, *input_shape]``.
            loss: of the model's output for ``sample``, for what follows gradients. Where there is none, the structure
                is what it would be with one, and the choice of weights may be worse.

        Raises:
            CompressionError: a name is no module of the model, or a setting cannot be met.
        """

    def restore(self, model: nn.Module) -> nn.Module:
        """Replace training-time helpers by plain layers (default: nothing to do)."""
        return model

    def rewrite(self, model: onnx.ModelProto, calibration: npt.NDArray[np.float32]) -> onnx.ModelProto:
        """Rewrite the exported model; ``calibration`` holds raw training inputs (default: unchanged)."""
        return model


def _of_known_options(function: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    parameters = inspect.signature(function).parameters.values()
    known = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)

    @wraps(function)
    def checked(
        cls: type[Pass], model: nn.Module, sample: torch.Tensor, loss: Loss | None = None, **options: Any
    ) -> dict[str, Any]:
        if unknown := [name for name in options if name not in known and not anything]:
            raise CompressionError(
                f"{cls.__name__} has no option {unknown[0]!r}.", expected=f"some of {', '.join(known) or 'none'}"
            )
        return function(cls, model, sample, loss, **options)

    return checked


passes: Registry[type[Pass]] = Registry("compression pass")


def _pipeline(plan: Plan) -> list[Pass]:
    return [passes.get(name)(settings) for name, settings in plan.items()]


def apply_passes(model: nn.Module, plan: Plan, sample: torch.Tensor, loss: Loss | None = None) -> nn.Module:
    """Apply every pass of ``plan`` in order; arguments as of :meth:`Pass.apply`."""
    for step in _pipeline(plan):
        model = step.apply(model, sample, loss)
    return model


def penalties(model: nn.Module, plan: Plan) -> list[Callable[[], torch.Tensor | None]]:
    """What the passes of ``plan`` add to the loss while ``model`` is trained plain."""
    return [partial(step.penalty, model) for step in _pipeline(plan) if type(step).penalty is not Pass.penalty]


def restore(model: nn.Module, plan: Plan) -> nn.Module:
    """Undo training-time helpers, last pass first; the result has plain layers of the final sizes."""
    for step in reversed(_pipeline(plan)):
        model = step.restore(model)
    return model


def rewrite_onnx(model: onnx.ModelProto, plan: Plan, calibration: npt.NDArray[np.float32]) -> onnx.ModelProto:
    """Let every pass rewrite the exported model in order, those that only store its weights last."""
    for step in sorted(_pipeline(plan), key=lambda step: step.stores):
        model = step.rewrite(model, calibration)
    return model


def named_module(model: nn.Module, name: str, technique: str) -> nn.Module:
    """The module called ``name``, or a CompressionError that lists near names."""
    modules = dict(model.named_modules())
    if name not in modules:
        near = difflib.get_close_matches(name, list(modules), n=3) or sorted(modules)[:5]
        raise CompressionError(f"{technique}: the model has no module {name!r}.", expected=f"a name such as {near}")
    return modules[name]


def matching(names: Collection[str], patterns: Sequence[str], technique: str, what: str = "layer") -> set[str]:
    """The ``names`` that fit any of the patterns (``*``, ``?``, ``[ab]``; case counts); ``what`` they are names of.

    Raises:
        CompressionError: a pattern fits none.
    """
    if isinstance(patterns, str):
        raise CompressionError(f"{technique}: {patterns!r} is no list of patterns.", expected=f"such as [{patterns!r}]")
    found: set[str] = set()
    for pattern in patterns:
        fitting = {name for name in names if fnmatchcase(name, pattern)}
        if not fitting:
            near = difflib.get_close_matches(pattern, names, n=3) or sorted(names)[:5]
            raise CompressionError(
                f"{technique}: {pattern!r} fits no {what} of the model.", expected=f"a name or pattern such as {near}"
            )
        found |= fitting
    return found


def layers_of(model: nn.Module, name: str, technique: str) -> dict[str, nn.Module]:
    """The convolution or linear layer called ``name``, or those that an earlier pass made of it, by their own names.

    Raises:
        CompressionError: there is no such module, or it is no such layer.
    """
    from torch import nn

    module = named_module(model, name, technique)
    if isinstance(module, nn.Conv2d | nn.Linear):
        return {name: module}
    if isinstance(module, nn.Sequential):
        pieces = {f"{name}.{leaf}": layer for leaf, layer in module.named_children()}
        if pieces and all(isinstance(layer, nn.Conv2d | nn.Linear) for layer in pieces.values()):
            return pieces
    raise CompressionError(f"{technique}: {name!r} is a {type(module).__name__}.", expected="a Conv2d or Linear layer")
