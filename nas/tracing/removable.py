"""Channels, units and heads that go without a change of what a model computes, and the model without them.

A channel whose value is the same whatever comes in is not computed but known. What the layers that read it make of it
goes into their bias. A convolution that pads with zeros makes of a constant something else at the borders: there, one
of the constant channels stays and stands for the others, whose weights are added to its own in the ratio of their
constants.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import Any

import torch
from torch import fx, nn

from nas.tracing.axes import Use, flat
from nas.tracing.dims import Dim, Var
from nas.tracing.known import Known
from nas.tracing.layers import is_depthwise
from nas.tracing.shrink import shrunk
from nas.tracing.structure import Structure
from nas.tracing.trace import is_constant, opname

NOTHING, CONSTANT, PADDED, VARIES = range(4)  # what a reader gets of a place; PADDED: a constant, and zeros around it
SAME = 1e-5  # relative spread of what counts as one constant
WEAK = 1e-3  # of the largest constant: smaller ones stand for no others

COMPUTED = "others in its group compute it"
MIXED = "a normalisation or attention takes all of its group together"
BORDER = "stands for the constants of others at the borders"
PATTERN = "what it leaves differs from place to place"
ALIGNED = "kept for a round number"
LAST = "the last of its group"


@dataclass
class Reading:
    """What a layer reads at every place of its input axis.

    Attributes:
        dim: the axis.
        state: of each place, :data:`NOTHING` to :data:`VARIES`.
        value: the constant, where there is one.
        known: whether the value is the same for all inputs, constant over positions or not.
    """

    dim: Dim
    state: torch.Tensor
    value: torch.Tensor
    known: torch.Tensor

    def at(self, variable: Var) -> torch.Tensor:
        """Places of the axis that belong to each place of a variable, ``[variable.size, k]``."""
        place = self.dim.place(variable)
        return torch.stack([(place == p).nonzero().flatten() for p in range(variable.size)])


@dataclass
class Verdict:
    """What becomes of the places of a variable.

    Attributes:
        removed: ``[size]``.
        reasons: of each place why it stays; "" where it goes.
        carrier: the place that stands for others, or nothing.
    """

    removed: torch.Tensor
    reasons: list[str]
    carrier: int | None = None


@dataclass
class Removable:
    """What of a traced model can go.

    Args:
        structure: of the model, whose weights :meth:`without` changes.
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

    def without(self) -> fx.GraphModule:
        """The smaller model; it computes what the model did."""
        with torch.no_grad():
            for path, reading in self._readings.items():
                self._fold(path, reading)
        return shrunk(self.structure.axes, self.chosen)

    # ---- what is read ----------------------------------------------------------------------------

    @cached_property
    def _readings(self) -> dict[str, Reading]:
        return {
            path: reduce(_merged, [self._reading(path, self.structure.modules[path], node) for node in nodes])
            for path, nodes in self.structure.calls.items()
            if _reads(self.structure.modules[path])
        }

    def _reading(self, path: str, layer: Any, node: fx.Node) -> Reading:
        x, axis = node.all_input_nodes[0], -1 if isinstance(layer, nn.Linear) else 1
        value, known = (t.movedim(axis, 0).flatten(1) for t in (self._known.values[x], self._known.known[x]))
        known, mean = known.all(dim=1), value.mean(dim=1)
        even = known & (value.amax(dim=1) - value.amin(dim=1) <= SAME * mean.abs())
        state = torch.where(even, PADDED if _pads(layer) else CONSTANT, VARIES)
        unread = (layer.weight.movedim(1, 0).flatten(1) == 0).all(dim=1)
        state[unread | (known & (value == 0).all(dim=1))] = NOTHING
        return Reading(self.structure.axes.layers[path][0], state, mean, known)

    def _state(self, variable: Var) -> tuple[torch.Tensor, torch.Tensor]:
        """What of each place the model needs, and where that is known although it differs from place to place."""
        state = torch.full((variable.size,), NOTHING)
        known = torch.ones(variable.size, dtype=torch.bool)
        for node in self.structure.nodes:
            for x in node.all_input_nodes:
                of = self.structure.axes.of
                if x in of and node in of and variable in _variables(of[x]):
                    own, sure = self._needed(node, x, variable)
                    state, known = torch.maximum(state, own), known & (sure | (own < VARIES))
        return state, known

    def _needed(self, node: fx.Node, x: fx.Node, variable: Var) -> tuple[torch.Tensor, torch.Tensor]:
        path, of = str(node.target), self.structure.axes.of
        everything = torch.full((variable.size,), VARIES)
        nothing, unsure = torch.full((variable.size,), NOTHING), torch.zeros(variable.size, dtype=torch.bool)
        if node.op == "call_module" and path in self._readings and variable in self._readings[path].dim.variables:
            reading = self._readings[path]
            at = reading.at(variable)
            return (everything, unsure) if is_constant(node) else (
                reading.state[at].amax(dim=1), reading.known[at].all(dim=1)
            )  # fmt: skip
        if (summed := self._summed(node, variable)) is not None:
            zero = torch.stack([self._zero(n, axis, variable) for n, axis in summed]).any(dim=0)
            return torch.where(zero, NOTHING, VARIES), unsure
        several = isinstance(of[x][0], list)  # of which one is taken
        goes_on = several or _count(of[x], variable) <= _count(of[node], variable)
        return (nothing if goes_on else everything), unsure

    def _summed(self, node: fx.Node, variable: Var) -> list[tuple[fx.Node, int]] | None:
        """Factors and the axis of each that an operator multiplies and sums up over, where the variable is in it."""
        of: Any = self.structure.axes.of
        given: Any = node.args
        if opname(node) in ("matmul", "bmm", "mm") and variable in (of[given[0]][-1].variables):
            return [(given[0], -1), (given[1], -2)]
        if opname(node) == "sum" and _count(of[given[0]], variable) == 1 and not _count(of[node], variable):
            return [(given[0], next(i for i, dim in enumerate(of[given[0]]) if variable in dim.variables))]
        return None

    def _zero(self, node: fx.Node, axis: int, variable: Var) -> torch.Tensor:
        """Places of a variable on an axis at which a value is zero whatever comes in."""
        zero = self._known.zero(node).movedim(axis, 0).flatten(1).all(dim=1)
        place = self.structure.axes.of[node][axis].place(variable)
        return torch.stack([zero[place == p].all() for p in range(variable.size)])

    # ---- what goes -------------------------------------------------------------------------------

    def _judge(self, variable: Var) -> Verdict:
        if is_mixed(self.structure, variable):
            return Verdict(torch.zeros(variable.size, dtype=torch.bool), [MIXED] * variable.size)
        state, known = self._state(variable)
        removed = state <= CONSTANT
        reasons = ["" if r else PATTERN if k else COMPUTED for r, k in zip(removed, known, strict=True)]
        carrier = None
        if (state == PADDED).any():
            carrier, carried = self._carrier(variable, state == PADDED)
            removed |= carried
            reasons = ["" if r else reason for r, reason in zip(removed, reasons, strict=True)]
            if carrier is not None:
                reasons[carrier] = BORDER
        self._keep_some(variable, removed, reasons)
        return Verdict(removed, reasons, carrier)

    def _carrier(self, variable: Var, padded: torch.Tensor) -> tuple[int | None, torch.Tensor]:
        """The place that stands for others, and those others."""
        strength = padded.float()
        lost = padded.clone()
        readings = [r for r in self._readings.values() if variable in r.dim.variables]
        readings = [r for r in readings if (r.state[r.at(variable)][padded] == PADDED).any()]
        for reading in readings:
            at = reading.at(variable)
            bordered = reading.state[at] == PADDED
            size = torch.where(bordered, reading.value[at].abs(), 0.0)
            strength = torch.minimum(strength, (size / size.amax()).amin(dim=1))
        carrier = int(strength.argmax())
        if strength[carrier] < WEAK:
            return None, torch.zeros_like(padded)
        lost[carrier] = False
        return carrier, lost

    def _keep_some(self, variable: Var, removed: torch.Tensor, reasons: list[str]) -> None:
        """Take back what would leave nothing, or no round number."""
        left = variable.size - int(removed.sum())
        wanted = max(left, 1)
        if not variable.role:
            wanted = min(variable.size, -(-wanted // self.align) * self.align)
        for place in removed.nonzero().flatten()[: wanted - left].tolist():
            removed[place] = False
            reasons[place] = ALIGNED if left else LAST

    def _fold(self, path: str, reading: Reading) -> None:
        """What a layer makes of the constants that go, into its weights and its bias."""
        layer: Any = self.structure.modules[path]
        chosen = {v: places for v, places in self.chosen.items() if v in reading.dim.variables}
        if not chosen:
            return
        gone = torch.ones(reading.dim.size, dtype=torch.bool)
        gone[reading.dim.kept(chosen)] = False
        for variable in chosen:
            verdict = self.verdicts[variable]
            if verdict.carrier is None:
                continue
            at = reading.at(variable)
            to = at[verdict.carrier]
            for place in verdict.removed.nonzero().flatten().tolist():
                for source, target in zip(at[place].tolist(), to.tolist(), strict=True):
                    if reading.state[source] == PADDED:
                        ratio = reading.value[source] / reading.value[target]
                        layer.weight[:, target] += ratio * layer.weight[:, source]
        constant = gone & (reading.state == CONSTANT)
        if constant.any():
            weight = layer.weight[:, constant]
            self._bias(path, layer).add_(weight.reshape(*weight.shape[:2], -1).sum(dim=2) @ reading.value[constant])

    def _bias(self, path: str, layer: Any) -> torch.Tensor:
        if layer.bias is None:
            size, needed = layer.weight.shape[0], layer.weight.requires_grad
            layer.bias = nn.Parameter(layer.weight.new_zeros(size), requires_grad=needed)
            self.structure.axes.uses.append(Use(f"{path}.bias", 0, self.structure.axes.layers[path][1]))
        bias: torch.Tensor = layer.bias
        return bias


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


def _reads(layer: nn.Module) -> bool:
    """Whether a layer sums up over its input channels."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        return layer.groups == 1 and not is_depthwise(layer)
    return isinstance(layer, nn.Linear)


def _pads(layer: nn.Module) -> bool:
    """Whether a layer sees zeros around its input."""
    if not isinstance(layer, nn.Conv1d | nn.Conv2d) or layer.padding_mode != "zeros":
        return False
    if isinstance(layer.padding, str):
        return layer.padding == "same" and max(layer.kernel_size) > 1
    return max(layer.padding) > 0


def _merged(a: Reading, b: Reading) -> Reading:
    """Of two calls of one layer: its weights and its bias are one, so the constants have to be."""
    state = torch.maximum(a.state, b.state)
    apart = (a.state != b.state) | ((a.value - b.value).abs() > SAME * a.value.abs())
    state[apart & (state > NOTHING)] = VARIES
    return Reading(a.dim, state, a.value, a.known & b.known)
