"""Channels, units and heads that go without a change of what a model computes, and the model without them.

A channel whose value is the same whatever comes in is not computed but known. What the layers that read it make of it
goes into their bias; where that differs from position to position, as it does at the borders of a convolution that pads
with zeros, it is a constant map that is added to what the layer gives.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from nas.tracing.axes import Use, flat
from nas.tracing.dims import Dim, Var
from nas.tracing.known import Known
from nas.tracing.layers import NORMS, is_depthwise
from nas.tracing.shrink import shrunk
from nas.tracing.structure import Structure
from nas.tracing.trace import is_constant, opname

aten: Any = torch.ops.aten

SAME = 1e-5  # relative spread of what counts as one value
MAPS = "maps"  # where added constants live

COMPUTED = "others in its group compute it"
MIXED = "a normalisation or attention takes all of its group together"
ALIGNED = "kept for a round number"
LAST = "the last of its group"


@dataclass
class Verdict:
    """What becomes of the places of a variable.

    Attributes:
        removed: ``[size]``.
        reasons: of each place why it stays; "" where it goes.
    """

    removed: torch.Tensor
    reasons: list[str]


@dataclass
class Removable:
    """What of a traced model can go.

    Args:
        structure: of the model; :meth:`without` changes its layers and its graph, and is called once.
        sample: a raw input, ``[1, *input_shape]``.
        align: channels are left in multiples of this, as far as there are as many; 1 for as few as there can be.
    """

    structure: Structure
    sample: torch.Tensor
    align: int = 1
    verdicts: dict[Var, Verdict] = field(init=False)

    def __post_init__(self) -> None:
        self.verdicts = {group.variable: self._judge(group.variable) for group in self.structure.groups}

    @cached_property
    def _known(self) -> Known:
        return Known(self.structure, self.sample)

    @cached_property
    def chosen(self) -> dict[Var, torch.Tensor]:
        """Variable → places that stay, of those that lose some."""
        return {v: (~found.removed).nonzero().flatten() for v, found in self.verdicts.items() if found.removed.any()}

    @torch.no_grad()
    def without(self) -> fx.GraphModule:
        """The smaller model; it computes what the model did, for inputs of the sample's size."""
        readers = {path: nodes for path, nodes in self.structure.calls.items() if _reads(self.structure.modules[path])}
        left = {path: [self._left(path, node) for node in nodes] for path, nodes in readers.items()}
        for path, nodes in readers.items():  # once nothing looks at the graph as it was any more
            self._fold(path, nodes, left[path])
        return shrunk(self.structure.axes, self.chosen)

    # ---- what goes -------------------------------------------------------------------------------

    def _judge(self, variable: Var) -> Verdict:
        if is_mixed(self.structure, variable):
            return Verdict(torch.zeros(variable.size, dtype=torch.bool), [MIXED] * variable.size)
        removed, of = torch.ones(variable.size, dtype=torch.bool), self.structure.axes.of
        for node in self.structure.nodes:
            for x in node.all_input_nodes:
                if x in of and node in of and variable in _variables(of[x]):
                    removed &= self._spares(node, x, variable)
        reasons = ["" if gone else COMPUTED for gone in removed]
        self._keep_some(variable, removed, reasons)
        return Verdict(removed, reasons)

    def _keep_some(self, variable: Var, removed: torch.Tensor, reasons: list[str]) -> None:
        """Take back what would leave nothing, or no round number."""
        left = variable.size - int(removed.sum())
        wanted = max(left, 1)
        if not variable.role:
            wanted = min(variable.size, -(-wanted // self.align) * self.align)
        for place in removed.nonzero().flatten()[: wanted - left].tolist():
            removed[place] = False
            reasons[place] = ALIGNED if left else LAST

    def _spares(self, node: fx.Node, x: fx.Node, variable: Var) -> torch.Tensor:
        """Places of a variable that a node does without, or hands on one by one, ``[size]``."""
        path, of = str(node.target), self.structure.axes.of
        layer = self.structure.layer(node)
        if layer is not None and _reads(layer) and variable in self.structure.axes.layers[path][0].variables:
            if is_constant(node):
                return torch.zeros(variable.size, dtype=torch.bool)
            place = self.structure.axes.layers[path][0].place(variable)
            return _every(self._folds(layer, x), place, variable.size)
        if (summed := self._summed(node, variable)) is not None:
            return torch.stack([self._zero(n, axis, variable) for n, axis in summed]).any(dim=0)
        several = isinstance(of[x][0], list)  # of which one is taken
        goes_on = several or _count(of[x], variable) <= _count(of[node], variable)
        return torch.full((variable.size,), goes_on)

    def _folds(self, layer: Any, x: fx.Node) -> torch.Tensor:
        """Places of a layer's input axis of which it makes nothing, or what is known."""
        unread = (layer.weight.movedim(1, 0).flatten(1) == 0).all(dim=1)
        known = self._known.known[x].movedim(_axis(layer), 0).flatten(1).all(dim=1)
        batch = self.structure.axes.batch
        if any(batch in dim.variables and dim.terms != ((batch,),) for dim in self.structure.axes.of[x]):
            # Samples and positions are one axis, along which a map cannot be added.
            value = self._known.values[x].movedim(_axis(layer), 0).flatten(1)
            known = known & (value.amax(dim=1) - value.amin(dim=1) <= SAME * value.abs().amax(dim=1))
        return unread | known

    def _summed(self, node: fx.Node, variable: Var) -> list[tuple[fx.Node, int]] | None:
        """Factors and the axis of each that an operator multiplies and sums up over, where the variable is in it."""
        of: Any = self.structure.axes.of
        given: Any = node.args
        if opname(node) in ("matmul", "bmm", "mm") and variable in of[given[0]][-1].variables:
            return [(given[0], -1), (given[1], -2)]
        if opname(node) == "sum" and _count(of[given[0]], variable) == 1 and not _count(of[node], variable):
            return [(given[0], next(i for i, dim in enumerate(of[given[0]]) if variable in dim.variables))]
        return None

    def _zero(self, node: fx.Node, axis: int, variable: Var) -> torch.Tensor:
        """Places of a variable on an axis at which a value is zero whatever comes in."""
        zero = self._known.zero(node).movedim(axis, 0).flatten(1).all(dim=1)
        return _every(zero, self.structure.axes.of[node][axis].place(variable), variable.size)

    # ---- what it leaves --------------------------------------------------------------------------

    def _left(self, path: str, node: fx.Node) -> torch.Tensor:
        """What a call of a layer makes of the known values that go, without its bias."""
        layer: Any = self.structure.modules[path]
        dim, x, axis = self.structure.axes.layers[path][0], node.all_input_nodes[0], _axis(layer)
        gone = torch.ones(dim.size, dtype=torch.bool)
        gone[dim.kept(self.chosen)] = False
        value, known = self._known.values[x], self._known.known[x]
        value = torch.where(known & _along(gone, value.ndim, axis), value, 0.0)
        if isinstance(layer, nn.Linear):
            return F.linear(value, layer.weight)
        found: torch.Tensor = layer._conv_forward(value, layer.weight, None)
        return found

    def _fold(self, path: str, nodes: list[fx.Node], left: list[torch.Tensor]) -> None:
        """Into a layer's bias, or into maps after it, what it makes of the constants that go."""
        axis = _axis(self.structure.modules[path])
        first = left[0].movedim(axis, 0).flatten(1)[:, 0]
        if not all(_close(made, _along(first, made.ndim, axis)) for made in left):
            for node, made in zip(nodes, left, strict=True):
                self._add_map(path, node, made)
        elif first.any():
            self._bias(path).add_(first)

    def _bias(self, path: str) -> torch.Tensor:
        layer: Any = self.structure.modules[path]
        if layer.bias is None:
            size, needed = layer.weight.shape[0], layer.weight.requires_grad
            layer.bias = nn.Parameter(layer.weight.new_zeros(size), requires_grad=needed)
            self.structure.axes.uses.append(Use(f"{path}.bias", 0, self._out(path)))
        bias: torch.Tensor = layer.bias
        return bias

    def _add_map(self, path: str, node: fx.Node, made: torch.Tensor) -> None:
        """Add a constant to what a call of a layer gives, after the normalisation that is folded into the layer.

        A map of a convolution is a few rows and columns at the borders and the same in between. So few values are
        stored, and which row and column each position has, as products that a runtime computes once.
        """
        norm: Any = self.structure.layer(next(iter(node.users))) if len(node.users) == 1 else None
        after, axis = node, _axis(self.structure.layer(node))
        if isinstance(norm, NORMS) and norm.running_var is not None:
            after = next(iter(node.users))
            scale = torch.rsqrt(norm.running_var + norm.eps) * (1 if norm.weight is None else norm.weight)
            made = made * _along(scale, made.ndim, axis)
        rows = columns = None
        if made.ndim == 4 and axis == 1:
            made, rows = _distinct(made, 2)
            made, columns = _distinct(made, 3)
        graph, users = self.structure.model.graph, list(after.users)
        with graph.inserting_after(after):
            total = graph.call_function(aten.add.Tensor, (after, after))
        with graph.inserting_before(total):
            value = self._stored(f"{node.name}_values", made)
            self.structure.axes.uses.append(Use(str(value.target), axis % made.ndim, self._out(path)))
            if rows is not None and columns is not None:
                first, last = self._stored(f"{node.name}_rows", rows), self._stored(f"{node.name}_columns", columns.t())
                value = graph.call_function(aten.matmul.default, (first, value))
                value = graph.call_function(aten.matmul.default, (value, last))
        total.args = (after, value)
        for user in users:
            user.replace_input_with(after, total)

    def _out(self, path: str) -> Dim:
        return self.structure.axes.layers[path][1]

    def _stored(self, name: str, value: torch.Tensor) -> fx.Node:
        model = self.structure.model
        if not isinstance(getattr(model, MAPS, None), nn.Module):
            model.add_module(MAPS, nn.Module())
        home = model.get_submodule(MAPS)
        while hasattr(home, name):  # of an earlier time, where a smaller model is made smaller again
            name += "_"
        home.register_buffer(name, value.contiguous())
        return self.structure.model.graph.get_attr(f"{MAPS}.{name}")


def is_mixed(structure: Structure, variable: Var) -> bool:
    """Whether some results at one place of a variable depend on all of its other places, and on how many there are."""
    return any(_mixes(structure, node, variable) for node in structure.nodes)


def _mixes(structure: Structure, node: fx.Node, variable: Var) -> bool:
    layer, name = structure.layer(node), opname(node)
    of, given = structure.axes.of, [n for n in node.all_input_nodes if n in structure.axes.of]
    if isinstance(layer, nn.LayerNorm) or name == "layer_norm":
        return variable in of[given[0]][-1].variables
    if isinstance(layer, nn.Softmax) or name in ("softmax", "_softmax", "log_softmax"):
        dim: Any = layer.dim if isinstance(layer, nn.Softmax) else (*node.args, *node.kwargs.values())[1]
        x = of[given[0]]
        return variable in (x[dim].variables if isinstance(dim, int) else _variables(x))
    if name == "scaled_dot_product_attention":  # which divides by the root of the number of them, too
        return any(variable in of[n][-1].variables for n in given[:2])
    return False


def _variables(dims: Any) -> list[Var]:
    return [variable for dim in flat(dims) for variable in dim.variables]


def _count(dims: Any, variable: Var) -> int:
    return _variables(dims).count(variable)


def _every(found: torch.Tensor, place: torch.Tensor, size: int) -> torch.Tensor:
    """Of each place of a variable whether it is so at all places of an axis that belong to it, ``[size]``."""
    return torch.stack([found[place == p].all() for p in range(size)])


def _reads(layer: Any) -> bool:
    """Whether a layer sums up over its input channels."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        return layer.groups == 1 and not is_depthwise(layer)
    return isinstance(layer, nn.Linear)


def _axis(layer: Any) -> int:
    """The axis of channels of what a layer reads and gives."""
    return -1 if isinstance(layer, nn.Linear) else 1


def _along(values: torch.Tensor, ndim: int, axis: int) -> torch.Tensor:
    """Values of an axis, for a tensor of so many."""
    shape = [1] * ndim
    shape[axis] = -1
    return values.view(shape)


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(((a - b).abs() <= SAME * a.abs().amax()).all())


def _distinct(values: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The slices along an axis that differ, and which of them each one is, ``[size, distinct]`` of ones and zeros."""
    slices: list[torch.Tensor] = []
    which = []
    limit = SAME * float(values.abs().amax())
    for own in values.unbind(axis):
        same = [i for i, other in enumerate(slices) if float((own - other).abs().amax()) <= limit]
        which.append(same[0] if same else len(slices))
        if not same:
            slices.append(own)
    return torch.stack(slices, dim=axis), F.one_hot(torch.tensor(which), len(slices)).to(values.dtype)
