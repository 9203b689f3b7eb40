"""Which slices of which layers one channel runs through: torch-pruning's dependency groups, as views of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from nas.errors import CompressionError

PRODUCERS = (tp.prune_conv_out_channels, tp.prune_depthwise_conv_out_channels, tp.prune_linear_out_channels)
CONSUMERS = (tp.prune_conv_in_channels, tp.prune_linear_in_channels)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def dependency_graph(model: nn.Module, sample: torch.Tensor) -> Any:
    """torch-pruning's graph of ``model``, which stays as it is.

    Raises:
        CompressionError: the forward cannot be followed.
    """
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    with evaluating(model), torch.enable_grad():  # the graph is that of the gradients
        for parameter in frozen:
            parameter.requires_grad_(True)
        try:
            return tp.DependencyGraph().build_dependency(model, example_inputs=(sample[:1],), verbose=False)
        except Exception as error:
            raise CompressionError(
                f"channel_prune: the model's layers cannot be followed from output to input: {error}.",
                expected="a forward of one tensor whose result has gradients",
            ) from error
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)


@dataclass(frozen=True)
class Slices:
    """The part of one tensor that belongs to a group, one row a channel.

    Attributes:
        layer, attribute: where the tensor is looked up each time, since training and pruning replace it.
        rows: from the whole tensor to ``[channels of the layer, weights of one channel]``.
        here, root: channel numbers in this layer and in the group's first one, ``[k]`` each.
    """

    layer: nn.Module
    attribute: str
    rows: Callable[[torch.Tensor], torch.Tensor]
    here: torch.Tensor
    root: torch.Tensor

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rows of ``tensor`` that belong to the group, ``[k, n]``."""
        return self.rows(tensor)[self.here]

    @property
    def parameter(self) -> torch.Tensor:
        found: torch.Tensor = getattr(self.layer, self.attribute)
        return found


def slices(group: Any) -> list[Slices]:
    """Every weight, bias, and normalisation's scale and offset that a group's channels own."""
    found = []
    for i, (dep, idxs) in enumerate(group):
        layer, here, root = dep.layer, torch.tensor(idxs), torch.tensor(group[i].root_idxs)
        rows = _rows(layer, dep.handler in CONSUMERS)
        if rows is not None:
            found.append(Slices(layer, "weight", rows, here, root))
            if getattr(layer, "bias", None) is not None and dep.handler not in CONSUMERS:
                found.append(Slices(layer, "bias", _column, here, root))
    return found


def _rows(layer: Any, consumes: bool) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """How a layer's weight is cut into channels; nothing where it has none to cut."""
    if isinstance(layer, nn.Linear):
        return _second if consumes else _first
    if isinstance(layer, CONVOLUTIONS):
        return partial(_second, groups=layer.groups) if consumes else _first
    if isinstance(layer, nn.ConvTranspose2d) and layer.groups == 1:
        return _first if consumes else _second
    weight = getattr(layer, "weight", None)
    return _column if isinstance(weight, nn.Parameter) and weight.ndim == 1 and len(weight) > 1 else None


def _column(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.unsqueeze(1)


def _first(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten(1)


def _second(tensor: torch.Tensor, groups: int = 1) -> torch.Tensor:
    """``[out, in / groups, ...]`` → ``[in, out / groups · ...]``."""
    split = tensor.reshape(groups, tensor.shape[0] // groups, tensor.shape[1], -1)
    return split.transpose(1, 2).reshape(groups * tensor.shape[1], -1)


def squared_norms(parts: list[Slices], channels: int) -> torch.Tensor:
    """Sum of squares of everything that each channel owns, ``[channels]``; has gradients."""
    first = parts[0].parameter
    total = torch.zeros(channels, dtype=first.dtype, device=first.device)
    for part in parts:
        total = total.index_add(0, part.root.to(first.device), part.of(part.parameter).square().sum(dim=1))
    return total
