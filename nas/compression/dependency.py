"""Groups of channels by torch-pruning's dependency graph: of any module whose forward computes its shapes itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from nas.compression.base import layers_of
from nas.compression.groups import (
    Group,
    Groups,
    Slices,
    UnprunableError,
    evaluating,
    shape_of_output,
    unprunable,
)
from nas.errors import CompressionError

PRODUCERS = (tp.prune_conv_out_channels, tp.prune_depthwise_conv_out_channels, tp.prune_linear_out_channels)
CONSUMERS = (tp.prune_conv_in_channels, tp.prune_linear_in_channels)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Inputs to try the pruned model with: a reshape to [-1, ...] makes a smaller batch of fewer channels, and 7 hides none.
TRIAL = 7


class DependencyGroups(Groups):
    """Groups as torch-pruning finds them (Fang et al. 2023, "DepGraph: Towards Any Structural Pruning"); pruned in
    place.

    Raises:
        CompressionError: the forward cannot be followed.
    """

    def __init__(self, model: nn.Module, sample: torch.Tensor) -> None:
        self.model = model
        self.graph = _graph(model, sample)
        self._names = {module: name for name, module in model.named_modules()}
        self._order = {name: i for i, name in enumerate(self._names.values())}

    def all(self, leave_out: bool = False) -> list[Group]:
        found: dict[str, Group] = {}
        for group in self.graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]):
            makers = self._makers(group)
            if makers and not _reaches_output(group):
                name = next(name for name in makers if not _depthwise(self.model.get_submodule(name)))
                try:
                    found[name] = self.named(name)
                except UnprunableError:
                    if not leave_out:
                        raise
        return [found[name] for name in sorted(found, key=self._order.__getitem__)]

    def named(self, name: str) -> Group:
        layer = self._last(name)
        if layer not in self.graph.module2node:
            raise unprunable(name, "the forward does not use it, or not once and by its own call")
        prune, channels = _pruner(layer)
        whole = self.graph.get_pruning_group(layer, prune, idxs=list(range(channels)))
        grouped = next((self._names[dep.layer] for dep, _ in whole if _grouped(dep.layer)), None)
        if grouped is not None:
            raise unprunable(name, f"{grouped!r} is a grouped convolution, whose groups would lose unequally")
        parts = tuple(_slices(whole))
        if any(int(part.here.max()) >= len(part.rows(part.parameter)) for part in parts):
            raise unprunable(name, "the forward has constants of the unpruned shape, which hide where its channels go")
        return Group(name, channels, parts, self._makers(whole))

    def without(self, lost: Mapping[str, Sequence[int]], sample: torch.Tensor) -> nn.Module:
        frozen = {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}
        layers = {name: self._last(name) for name in lost}
        sizes = {name: _pruner(layer)[1] for name, layer in layers.items()}
        shape = shape_of_output(self.model, sample[:TRIAL])
        for name, places in lost.items():
            prune, left = _pruner(layers[name])
            if left == sizes[name] - len(places):
                continue  # nothing to do, or done under another name of the group
            if left != sizes[name]:
                raise CompressionError(f"channel_prune: {name!r} is in a group with another layer that is named.")
            try:
                self.graph.get_pruning_group(layers[name], prune, idxs=sorted(places)).prune()
                found = shape_of_output(self.model, sample[:TRIAL])
            except Exception as error:
                raise unprunable(name, f"the forward has constants of the unpruned shape ({error})") from error
            if found != shape:
                raise unprunable(name, f"its channels reach the output, which becomes {found} instead of {shape}")
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        return self.model

    def apart(self, sample: torch.Tensor) -> DependencyGroups:
        return DependencyGroups(copy.deepcopy(self.model), sample)

    def _last(self, name: str) -> nn.Module:
        """The layer, or the last of the pieces that an earlier pass made of it, which has its outputs."""
        *_, layer = layers_of(self.model, name, "channel_prune").values()
        return layer

    def _makers(self, group: Any) -> tuple[str, ...]:
        layers = [dep.layer for dep, _ in group if dep.handler in PRODUCERS and dep.layer in self._names]
        return tuple(sorted((self._names[layer] for layer in layers), key=self._order.__getitem__))


def _graph(model: nn.Module, sample: torch.Tensor) -> Any:
    """torch-pruning's graph of ``model``, which stays as it is."""
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


def _pruner(layer: nn.Module) -> tuple[Any, int]:
    if isinstance(layer, nn.Conv2d):
        return tp.prune_conv_out_channels, layer.out_channels
    assert isinstance(layer, nn.Linear)
    return tp.prune_linear_out_channels, layer.out_features


def _depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.out_channels > 1


def _grouped(layer: Any) -> bool:
    return isinstance(layer, CONVOLUTIONS) and 1 < layer.groups < layer.in_channels


def _reaches_output(group: Any) -> bool:
    """Whether the last operator of the model gives these channels out, rather than reads them."""
    return any(not dep.target.outputs and dep.handler not in CONSUMERS for dep, _ in group)


def _slices(group: Any) -> list[Slices]:
    """Every weight, bias, and normalisation's scale and offset that a group's channels own."""
    found = []
    for i, (dep, idxs) in enumerate(group):
        layer, here, root = dep.layer, torch.tensor(idxs), torch.tensor(group[i].root_idxs)
        reads = dep.handler in CONSUMERS
        rows = _rows(layer, reads)
        if rows is not None:
            found.append(Slices(layer, "weight", rows, here, root, reads))
            if getattr(layer, "bias", None) is not None and not reads:
                found.append(Slices(layer, "bias", _column, here, root, reads))
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
