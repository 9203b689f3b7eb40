"""The contract of a compression pass, and the pipeline that applies a candidate's passes in order."""

from __future__ import annotations

import abc
from collections.abc import Mapping
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


class Pass(abc.ABC):
    """One technique in its three moments; ``settings`` maps module names to what is asked of them.

    1. :meth:`apply` before the last training epochs: module in, smaller or simulating module out;
    2. :meth:`restore` after training: back to plain layers that export cleanly;
    3. :meth:`rewrite` on the exported ONNX: what only the runtime's format can express.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = dict(settings)

    @abc.abstractmethod
    def apply(self, model: nn.Module, sample: torch.Tensor) -> nn.Module:
        """Compress ``model``; ``sample`` is a small batch of real raw inputs ``[n, *input_shape]``.

        Raises:
            CompressionError: a name is no module of the model, or a setting cannot be met.
        """

    def restore(self, model: nn.Module) -> nn.Module:
        """Replace training-time helpers by plain layers (default: nothing to do)."""
        return model

    def rewrite(self, model: onnx.ModelProto, calibration: npt.NDArray[np.float32]) -> onnx.ModelProto:
        """Rewrite the exported model; ``calibration`` holds raw training inputs (default: unchanged)."""
        return model


passes: Registry[type[Pass]] = Registry("compression pass")


def _pipeline(plan: Plan) -> list[Pass]:
    return [passes.get(name)(settings) for name, settings in plan.items()]


def apply_passes(model: nn.Module, plan: Plan, sample: torch.Tensor) -> nn.Module:
    """Apply every pass of ``plan`` in order."""
    for step in _pipeline(plan):
        model = step.apply(model, sample)
    return model


def restore(model: nn.Module, plan: Plan) -> nn.Module:
    """Undo training-time helpers, last pass first; the result has plain layers of the final sizes."""
    for step in reversed(_pipeline(plan)):
        model = step.restore(model)
    return model


def rewrite_onnx(model: onnx.ModelProto, plan: Plan, calibration: npt.NDArray[np.float32]) -> onnx.ModelProto:
    """Let every pass rewrite the exported model in order."""
    for step in _pipeline(plan):
        model = step.rewrite(model, calibration)
    return model


def named_module(model: nn.Module, name: str, technique: str) -> nn.Module:
    """The module called ``name``, or a CompressionError that lists near names."""
    import difflib

    modules = dict(model.named_modules())
    if name not in modules:
        near = difflib.get_close_matches(name, list(modules), n=3) or sorted(modules)[:5]
        raise CompressionError(f"{technique}: the model has no module {name!r}.", expected=f"a name such as {near}")
    return modules[name]
