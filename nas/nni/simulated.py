"""Layers that round what NNI rounded, in operators that the exporter writes as QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nas.errors import CompressionError

CODES = "weight_codes"  # the buffer of a layer whose weight is in codes
END = 255  # of the codes that QuantizeLinear gives


@dataclass(frozen=True)
class Grid:
    """Values ``(code - zero) * scale`` with codes ``low..high``.

    Attributes:
        scale, zero: float32, ``[]`` for a tensor's one, ``[channels]`` along ``axis``, or of the tensor's rank where
            they vary along several dimensions.
        axis: the dimension of the channels; None for a tensor's one; -1 for several.
    """

    scale: torch.Tensor
    zero: torch.Tensor
    low: int
    high: int
    axis: int | None

    @classmethod
    def of(
        cls, where: str, scale: torch.Tensor, zero: torch.Tensor, low: int, high: int, shape: tuple[int, ...] | None
    ) -> Grid:
        """NNI's scales have the tensor's rank, with 1 or a number of blocks on each side; ``shape`` of a parameter.

        Raises:
            CompressionError: they are not those of such a tensor.
        """
        if scale.numel() == 1:
            return cls(scale.reshape(()), zero.reshape(-1)[0], low, high, None)
        zero = zero.expand_as(scale)
        if shape is not None:
            if scale.ndim != len(shape) or any(side % blocks for side, blocks in zip(shape, scale.shape, strict=True)):
                raise CompressionError(
                    f"NNI: {where} has scales {list(scale.shape)} for a tensor {list(shape)}.",
                    remedy="the model whose configuration it is",
                )
            for i, (side, blocks) in enumerate(zip(shape, scale.shape, strict=True)):
                if 1 < blocks < side:
                    scale, zero = (t.repeat_interleave(side // blocks, i) for t in (scale, zero))
        sides = [i for i, side in enumerate(scale.shape) if side > 1]
        if len(sides) > 1:
            return cls(scale, zero, low, high, -1)
        return cls(scale.reshape(-1), zero.reshape(-1), low, high, sides[0])

    def text(self) -> str:
        """For people: type and granularity."""
        name = f"{'' if self.low else 'u'}int{self.bits}"
        kinds = {None: "one scale", -1: "a scale a block"}
        return f"{name}, {kinds.get(self.axis, f'a scale a channel of dimension {self.axis}')}"

    def along(self, value: torch.Tensor, ndim: int) -> torch.Tensor:
        """``scale`` or ``zero`` in a shape that spreads over a tensor of that rank."""
        return _along(value, self.axis or 0, ndim)

    def codes(self, value: torch.Tensor) -> torch.Tensor:
        """Codes ``low..high`` as floats, by NNI's arithmetic (``ClampRound``)."""
        scale, zero = (self.along(t, value.ndim) for t in (self.scale, self.zero))
        return torch.round(torch.clamp(zero + value / scale, self.low, self.high))

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """What codes stand for."""
        return (codes - self.along(self.zero, codes.ndim)) * self.along(self.scale, codes.ndim)

    @property
    def bits(self) -> int:
        """Of a code."""
        return (self.high - self.low).bit_length()

    @property
    def plain(self) -> bool:
        """Whether QuantizeLinear can say it."""
        return self.axis != -1


def _along(value: torch.Tensor, axis: int, ndim: int) -> torch.Tensor:
    """One value a channel in a shape that spreads along ``axis``; what is one for all, or of full rank, as it is."""
    return value.reshape([-1 if i == axis else 1 for i in range(ndim)]) if value.ndim == 1 else value


class Dequantize(torch.autograd.Function):
    """Integer codes → floats: DequantizeLinear."""

    @staticmethod
    def forward(ctx: Any, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, axis: int) -> torch.Tensor:
        scale, zero = (_along(t, axis, codes.ndim) for t in (scale, zero))
        return (codes.float() - zero.float()) * scale

    @staticmethod
    def symbolic(g: Any, codes: Any, scale: Any, zero: Any, axis: int) -> Any:
        result = g.op("DequantizeLinear", codes, scale, zero, axis_i=axis)
        return result.setType(codes.type().with_dtype(torch.float32))


class Round(torch.autograd.Function):
    """Floats → the nearest values of a grid with codes ``0..high``: QuantizeLinear, Clip, DequantizeLinear."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, high: int, axis: int
    ) -> torch.Tensor:
        scale, whole = (_along(t, axis, x.ndim) for t in (scale, zero.float()))
        return (torch.round(torch.clamp(whole + x / scale, 0, high)) - whole) * scale

    @staticmethod
    def symbolic(g: Any, x: Any, scale: Any, zero: Any, high: int, axis: int) -> Any:
        codes = g.op("QuantizeLinear", x, scale, zero, axis_i=axis)
        codes.setType(x.type().with_dtype(torch.uint8))
        if high < END:
            ends = (g.op("Constant", value_t=torch.tensor(end, dtype=torch.uint8)) for end in (0, high))
            codes = g.op("Clip", codes, *ends)
            codes.setType(x.type().with_dtype(torch.uint8))
        return g.op("DequantizeLinear", codes, scale, zero, axis_i=axis).setType(x.type())


class Simulation:
    """Stands in place of a layer's ``forward``, as NNI's wrapper does: rounds inputs and outputs, and sets weights."""

    def __init__(
        self, layer: nn.Module, grids: Mapping[str, Grid], codes: Collection[str], after: nn.Module | None
    ) -> None:
        self.layer, self.grids, self.codes, self.after = layer, dict(grids), tuple(codes), after
        self.forward = layer.forward
        self.names = list(inspect.signature(self.forward).parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's result."""
        arguments = dict(zip(self.names, args, strict=False))
        rest = args[len(self.names) :]
        for target in self.grids:
            if target.startswith("_input_"):
                key = target.removeprefix("_input_")
                name = self.names[int(key)] if key.isdigit() and int(key) < len(self.names) else key
                for given in (arguments, kwargs):
                    if isinstance(given.get(name), torch.Tensor):
                        given[name] = self.rounded(target, given[name])
        for target in self.codes:
            found = (getattr(self.layer, f"{target}_{part}") for part in ("codes", "scale", "zero"))
            setattr(self.layer, target, Dequantize.apply(*found, self.grids[target].axis or 0))
        result = self.forward(*arguments.values(), *rest, **kwargs)
        if self.after is not None:
            result = self.after(result)
        if isinstance(result, torch.Tensor):
            return self.rounded("_output_0", result)
        if isinstance(result, tuple | list):
            return type(result)(self.rounded(f"_output_{i}", value) for i, value in enumerate(result))
        if isinstance(result, dict):
            return {key: self.rounded(f"_output_{key}", value) for key, value in result.items()}
        return result

    def rounded(self, target: str, x: torch.Tensor) -> torch.Tensor:
        """``x`` on the grid of ``target``, if it has one."""
        grid = self.grids.get(target)
        if grid is None:
            return x
        scale, zero = (getattr(self.layer, f"{target}_{part}") for part in ("scale", "zero"))
        rounded: torch.Tensor = Round.apply(x, scale, zero, grid.high - grid.low, grid.axis or 0)
        return rounded


def simulate(
    layer: nn.Module,
    grids: Mapping[str, Grid],
    after: nn.Module | None,
    masks: Mapping[str, torch.Tensor],
    integer: tuple[type[nn.Module], ...],
) -> None:
    """Make a plain layer round its targets; in place.

    Activations get codes from 0, whatever NNI's start at: QuantizeLinear then saturates at NNI's own lower end. Weights
    keep NNI's codes.

    Args:
        after: an activation that is computed before the output is rounded.
        masks: parameter → 0 and 1, applied to what is rounded.
        integer: types of layers whose weight stays in codes.

    Raises:
        CompressionError: an activation's scales vary along several dimensions.
    """
    codes = []
    with torch.no_grad():
        for target, grid in grids.items():
            if target.startswith("_"):
                if not grid.plain:
                    raise CompressionError(
                        f"NNI: {target} of a {type(layer).__name__} has scales along several dimensions.",
                        expected="one scale, or one a channel",
                    )
                layer.register_buffer(f"{target}_scale", grid.scale)
                layer.register_buffer(f"{target}_zero", (grid.zero - grid.low).to(torch.uint8))
                continue
            value = grid.codes(getattr(layer, target))
            if target in masks:
                value = torch.where(masks[target] == 0, grid.along(grid.zero, value.ndim), value)
            if target == "weight" and isinstance(layer, integer) and grid.axis in (None, 0):
                kind = torch.int8 if grid.low < 0 or grid.high < 128 else torch.uint8
                delattr(layer, target)  # set by every forward pass
                layer.register_buffer(CODES, value.to(kind))
                layer.register_buffer("weight_scale", grid.scale)
                layer.register_buffer("weight_zero", grid.zero.to(kind))
                codes.append(target)
            else:
                getattr(layer, target).copy_(grid.values(value))
        for target in set(masks) - set(grids):
            getattr(layer, target).mul_(masks[target])
    if grids:
        vars(layer)["forward"] = Simulation(layer, grids, codes, after)
