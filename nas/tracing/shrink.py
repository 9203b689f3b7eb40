"""A traced model with fewer of everything: weights are sliced, and the numbers in its forward follow.

One function makes the student of a candidate and the piece of it that a part stands for: what is named is copied,
what it reads from elsewhere becomes an input.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from nas.tracing.axes import Axes
from nas.tracing.dims import Dim, Var
from nas.tracing.layers import is_depthwise
from nas.tracing.trace import is_reshape, opname

Chosen = Mapping[Var, torch.Tensor]


def shrunk(
    axes: Axes,
    chosen: Chosen,
    *,
    outputs: Sequence[fx.Node] = (),
    inputs: Sequence[fx.Node] = (),
    instead: Mapping[fx.Node, fx.Node] | None = None,
) -> fx.GraphModule:
    """The model, or what lies between ``inputs`` and ``outputs``, with only the chosen places of every variable.

    Args:
        axes: of the traced model, whose weights are copied.
        chosen: variable → places that are kept, in rising order; others stay whole.
        outputs, inputs: nodes; by default the model's own.
        instead: node → the node that is read in its place: a block that is left out.

    Returns:
        A graph module with the parameter names of the model, without what no output needs.
    """
    graph: fx.Graph = axes.model.graph
    instead = instead or {}
    outputs = [follow(node, instead) for node in outputs or _results(graph)]
    inputs = list(inputs) or [node for node in graph.nodes if node.op == "placeholder"]
    needed = _needed(outputs, inputs, instead)
    sizes = {variable: len(places) for variable, places in chosen.items()}
    new, copies = fx.Graph(), {}
    for i, node in enumerate(inputs):
        copies[node] = new.placeholder("x" if i == 0 else f"x{i}")
    for node in graph.nodes:
        if node in needed:
            copies[node] = new.node_copy(node, lambda n: copies[follow(n, instead)])
            _resize(copies[node], node, axes, sizes)
    results = tuple(copies[node] for node in outputs)
    new.output(results[0] if len(results) == 1 else results)
    targets = {str(node.target) for node in needed if node.op in ("call_module", "get_attr")}
    return fx.GraphModule({target: _part(axes, target, chosen) for target in targets}, new)


def with_modes(smaller: fx.GraphModule, model: nn.Module) -> fx.GraphModule:
    """``smaller``, each layer of it in training or evaluation mode as it is in ``model``."""
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in smaller.named_modules():
        module.training = modes.get(name, model.training)
    return smaller


def follow(node: fx.Node, instead: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """The node that is read where ``node`` was."""
    while node in instead:
        node = instead[node]
    return node


def _results(graph: fx.Graph) -> list[fx.Node]:
    output = next(node for node in graph.nodes if node.op == "output")
    return list(output.all_input_nodes)


def _needed(outputs: Sequence[fx.Node], inputs: Sequence[fx.Node], instead: Mapping[fx.Node, fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    queue = list(outputs)
    while queue:
        node = queue.pop()
        if node not in found and node not in inputs:
            found.add(node)
            queue += [follow(n, instead) for n in node.all_input_nodes]
    return found


def _resize(new: fx.Node, node: fx.Node, axes: Axes, sizes: dict[Var, int]) -> None:
    """Sizes that the forward names become those of the smaller model."""
    name = opname(node)
    args: list[Any] = list(new.args)
    given: Any = node.args
    if is_reshape(node):
        args[1] = _sizes(args[1], axes.of[node], sizes)
    elif node.op == "call_method" and name == "expand":
        args[1:] = _sizes(args[1:], axes.of[node], sizes)
    elif name == "expand":
        args[1] = _sizes(args[1], axes.of[node], sizes)
    elif name == "unflatten":
        at = given[1] % given[0].meta["val"].ndim
        args[2] = _sizes(args[2], axes.of[node][at : at + len(args[2])], sizes)
    elif name in ("split", "split_with_sizes"):
        at = (given[2] if len(given) > 2 else 0) % given[0].meta["val"].ndim
        pieces = [dims[at].sized(sizes) for dims in axes.of[node]]
        args[1] = pieces[0] if isinstance(args[1], int) else pieces
    elif name == "layer_norm":
        args[1] = _sizes(args[1], axes.of[node][-len(args[1]) :], sizes)
    new.args = tuple(args)


def _sizes(named: Sequence[Any], dims: Sequence[Dim], sizes: dict[Var, int]) -> list[Any]:
    return [
        dim.sized(sizes) if isinstance(size, int) and size != -1 else size
        for size, dim in zip(named, dims, strict=True)
    ]


def _part(axes: Axes, target: str, chosen: Chosen) -> Any:
    """A copy of a layer, parameter or buffer with the chosen places only."""
    parent, _, leaf = target.rpartition(".")
    value = getattr(axes.model.get_submodule(parent), leaf)
    if not isinstance(value, nn.Module):
        return _sliced(axes, target, value, chosen)
    layer = copy.deepcopy(value)
    for name, tensor in (*value.named_parameters(), *value.named_buffers()):
        smaller = _sliced(axes, f"{target}.{name}", tensor, chosen)
        if isinstance(tensor, nn.Parameter):
            setattr(layer, name, smaller)
        else:
            layer.register_buffer(name, smaller)
    _describe(layer)
    if isinstance(layer, nn.LayerNorm) and target in axes.layers:
        layer.normalized_shape = (axes.layers[target][0].sized({v: len(places) for v, places in chosen.items()}),)
    return layer


def _sliced(axes: Axes, name: str, tensor: torch.Tensor, chosen: Chosen) -> torch.Tensor:
    smaller = tensor.detach()
    for use in axes.tensors(name):
        if any(variable in chosen for variable in use.dim.variables):
            smaller = smaller.index_select(use.axis, use.dim.kept(chosen))
    smaller = smaller.clone()
    return nn.Parameter(smaller, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else smaller


def _describe(layer: nn.Module) -> None:
    """What a layer says of its own size."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        each = layer.out_channels // layer.in_channels
        depthwise = is_depthwise(layer)
        layer.out_channels = layer.weight.shape[0]
        if depthwise:
            layer.groups = layer.in_channels = layer.out_channels // each
        else:
            layer.in_channels = layer.weight.shape[1] * layer.groups
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, nn.Embedding):
        layer.num_embeddings, layer.embedding_dim = layer.weight.shape
    elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) and layer.running_mean is not None:
        layer.num_features = len(layer.running_mean)
