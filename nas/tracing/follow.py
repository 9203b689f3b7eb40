"""Following all axes through a traced model, operator by operator.

An operator that is not known ties its inputs to their sizes and is told of, so nothing is pruned that should not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from nas.tracing.axes import Axes, Use, as_is, flat
from nas.tracing.dims import Dim, Var, constant, resolve, tie
from nas.tracing.layers import layer_axes
from nas.tracing.operators import HANDLERS
from nas.tracing.trace import opname, shape_of


def axes(model: fx.GraphModule) -> Axes:
    """Follow all axes through a traced model."""
    found = Axes(model)
    modules = dict(model.named_modules())
    for node in model.graph.nodes:
        _visit(found, node, modules)
    found.uses = [Use(use.tensor, use.axis, resolve(use.dim)) for use in found.uses]
    found.layers = {path: (resolve(x), resolve(out)) for path, (x, out) in found.layers.items()}
    found.of = {node: _resolved(dims) for node, dims in found.of.items()}
    return found


def _resolved(dims: Any) -> Any:
    return [_resolved(item) if isinstance(item, list) else resolve(item) for item in dims]


def _visit(found: Axes, node: fx.Node, modules: dict[str, nn.Module]) -> None:
    if node.op == "placeholder":
        found.of[node] = as_is(found, node.meta["val"])
    elif node.op == "get_attr":
        found.of[node] = _attribute(found, node)
    elif node.op == "output":
        tie(found.of[node.args[0]], "it is the model's output")  # type: ignore[index]
    elif node.op == "call_module":
        x = found.of[node.args[0]]  # type: ignore[index]
        found.of[node] = layer_axes(found, node, str(node.target), modules[str(node.target)], x)
    elif node.op == "call_method" and node.target == "size":
        return
    else:
        name = opname(node) or getattr(node.target, "__name__", str(node.target))
        inputs = [found.of[n] for n in node.all_input_nodes if n in found.of]
        if not inputs or not _is_tensor(node):
            if _is_tensor(node):
                found.of[node] = as_is(found, node.meta["val"])
            return
        handler = HANDLERS.get(name)
        result = handler(found, node) if handler is not None else None
        if result is None:
            _opaque(found, node, inputs, f"operator {name} ({node.name}) is not followed")
        else:
            found.of[node] = result


def _is_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) or (
        isinstance(value, tuple | list) and all(isinstance(v, torch.Tensor) for v in value)
    )


def _opaque(found: Axes, node: fx.Node, inputs: Sequence[Any], reason: str) -> None:
    """Tie all inputs, so that the node's own shape stays as it is."""
    free = [v for dims in inputs for dim in flat(dims) for v in resolve(dim).variables if not v.tied]
    for dims in inputs:
        tie(flat(dims), reason)
    if free:
        found.notes.append(f"{reason}: {', '.join(sorted({str(v) for v in free}))} stay as they are")
    found.of[node] = as_is(found, node.meta["val"])


def _attribute(found: Axes, node: fx.Node) -> list[Dim]:
    name = str(node.target)
    known = {use.axis: use.dim for use in found.uses if use.tensor == name}
    dims = []
    for axis, size in enumerate(shape_of(node) if "val" in node.meta else _tensor(found.model, name).shape):
        dim = known.get(axis) or (constant(1) if size == 1 else Dim(((Var(size, name),),)))
        if axis not in known:
            found.uses.append(Use(name, axis, dim))
        dims.append(dim)
    return dims


def _tensor(model: nn.Module, name: str) -> torch.Tensor:
    parent, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(parent), leaf)
