"""What is known of the axes of a traced model: of every value, and of every parameter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from nas.tracing.dims import Dim, Var, constant, reshaped, tie, unify
from nas.tracing.trace import BATCH, number, shape_of


@dataclass(frozen=True)
class Use:
    """An axis of a parameter or buffer, by name."""

    tensor: str
    axis: int
    dim: Dim


@dataclass
class Axes:
    """What is known of a traced model.

    Attributes:
        model: as traced.
        of: node → axes of its value (a list of such where the value is a list of tensors).
        uses: every axis of every parameter and buffer.
        notes: what could not be followed, and where.
        layers: path of a layer with weights → its input and output axis.
        batch: the variable that counts samples.

    All axes are resolved.
    """

    model: fx.GraphModule
    of: dict[fx.Node, Any] = field(default_factory=dict)
    uses: list[Use] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    layers: dict[str, tuple[Dim, Dim]] = field(default_factory=dict)
    batch: Var = field(default_factory=lambda: Var(BATCH, "batch", tied="it is the batch"))

    def tensors(self, name: str) -> list[Use]:
        """Axes of one parameter or buffer."""
        return [use for use in self.uses if use.tensor == name]


def as_is(found: Axes, value: Any) -> Any:
    """Axes of a tensor, or of each of several, as they are: all fixed but for the batch."""
    if not isinstance(value, torch.Tensor):
        return [as_is(found, v) for v in value]
    return [
        constant(size) if isinstance(size, int) else
        Dim(((found.batch, number(size) // BATCH),)) if number(size) > BATCH else Dim(((found.batch,),))
        for size in value.shape
    ]  # fmt: skip


def flat(dims: Any) -> list[Dim]:
    """Axes of a value, of all tensors where it is several."""
    return [d for item in dims for d in (flat(item) if isinstance(item, list) else [item])]


def used(found: Axes, tensor: str, axis: int, dim: Dim) -> None:
    """An axis of a tensor; where the tensor is used twice, both uses are one."""
    for use in found.uses:
        if use.tensor == tensor and use.axis == axis:
            unify(use.dim, dim)
            return
    found.uses.append(Use(tensor, axis, dim))


def output_axis(found: Axes, path: str, size: int) -> Dim:
    """The output axis of a layer, the same for each of its calls."""
    if path in found.layers:
        return found.layers[path][1]
    return Dim(((Var(size, path),),)) if size > 1 else constant(1)


def shaped(found: Axes, node: fx.Node, x: list[Dim]) -> list[Dim]:
    """Axes of a node that gives ``x`` another shape; where that cuts through variables, they are tied."""
    dims = reshaped(x, shape_of(node))
    if dims is None:
        tie(x, f"{node.name} cuts through channels")
        return list(as_is(found, node.meta["val"]))
    return dims
