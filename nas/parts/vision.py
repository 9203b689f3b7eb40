"""Operators of convolutional parts, and the boundaries between precisions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nas.errors import SpaceError
from nas.parts.base import GraphWriter, Shape, Weightless


@dataclass(frozen=True)
class Conv:
    """2-d convolution, ``same`` padding for odd kernels, bias and optional activation fused.

    Args:
        out_channels: output channels; ``groups=0`` means depthwise (as many groups as input channels).
        activation: ``"relu6"``, ``"relu"`` or ``""``.
    """

    out_channels: int
    kernel: int
    stride: int = 1
    groups: int = 1
    activation: str = ""

    @property
    def text(self) -> str:
        kind = "dw" if self.groups == 0 else "conv"
        grouped = f"g{self.groups}" if self.groups > 1 else ""
        stride = f"s{self.stride}" if self.stride > 1 else ""
        tail = f".{self.activation}" if self.activation else ""
        return f"{kind}{self.out_channels}k{self.kernel}{stride}{grouped}{tail}"

    def _groups(self, shape: Shape) -> int:
        groups = self.groups or shape[0]
        if shape[0] % groups or self.out_channels % groups:
            raise SpaceError(
                f"Convolution {self.text} on {shape[0]} channels does not divide into {groups} groups.",
                expected="channel counts that the groups divide",
            )
        return groups

    def out_shape(self, shape: Shape) -> Shape:
        pad = self.kernel // 2
        height, width = ((side + 2 * pad - self.kernel) // self.stride + 1 for side in shape[1:])
        return (self.out_channels, height, width)

    def macs(self, shape: Shape) -> int:
        _, height, width = self.out_shape(shape)
        per_output = shape[0] // self._groups(shape) * self.kernel**2
        return self.out_channels * height * width * per_output

    def params(self, shape: Shape) -> int:
        return self.out_channels * (shape[0] // self._groups(shape) * self.kernel**2 + 1)

    def emit(self, graph: GraphWriter, x: str, shape: Shape) -> str:
        groups = self._groups(shape)
        weight_shape = (self.out_channels, shape[0] // groups, self.kernel, self.kernel)
        weight, bias = graph.weights(weight_shape)
        pad = self.kernel // 2
        y = graph.node(
            "Conv", [x, weight, bias],
            kernel_shape=[self.kernel] * 2, strides=[self.stride] * 2, pads=[pad] * 4, group=groups,
        )  # fmt: skip
        return graph.activation(y, self.activation)


@dataclass(frozen=True)
class AddInput(Weightless):
    """Residual connection: adds the part's own input; then the optional activation, as in :class:`Conv`."""

    activation: str = ""

    @property
    def text(self) -> str:
        return f"+in.{self.activation}" if self.activation else "+in"

    def emit(self, graph: GraphWriter, x: str, shape: Shape) -> str:
        return graph.activation(graph.node("Add", [x, graph.input]), self.activation)


@dataclass(frozen=True)
class AddProjected(Weightless):
    """Residual connection across shapes: adds a 1×1 convolution of the part's own input (He et al. 2016, eq. 2).

    Args:
        in_channels: channels of the part's input.
        stride: of the projection; its output has the shape of what it is added to.
        activation: after the addition, as in :class:`Conv`.
    """

    in_channels: int
    stride: int = 1
    activation: str = ""

    @property
    def text(self) -> str:
        stride = f"s{self.stride}" if self.stride > 1 else ""
        return f"+conv1{stride}.{self.activation}" if self.activation else f"+conv1{stride}"

    def macs(self, shape: Shape) -> int:
        return self.in_channels * int(np.prod(shape))

    def params(self, shape: Shape) -> int:
        return shape[0] * (self.in_channels + 1)

    def emit(self, graph: GraphWriter, x: str, shape: Shape) -> str:
        projection = Conv(shape[0], 1, self.stride)
        projected = projection.emit(graph, graph.input, graph.part.shape)
        return graph.activation(graph.node("Add", [x, projected]), self.activation)


@dataclass(frozen=True)
class MaxPool(Weightless):
    """Maximum over a window with an odd side, padded by half of it."""

    kernel: int = 3
    stride: int = 2

    @property
    def text(self) -> str:
        return f"max{self.kernel}s{self.stride}"

    def out_shape(self, shape: Shape) -> Shape:
        pad = self.kernel // 2
        height, width = ((side + 2 * pad - self.kernel) // self.stride + 1 for side in shape[1:])
        return (shape[0], height, width)

    def emit(self, graph: GraphWriter, x: str, shape: Shape) -> str:
        window: dict[str, Any] = {"kernel_shape": [self.kernel] * 2, "strides": [self.stride] * 2}
        return graph.activation(graph.node("MaxPool", [x], pads=[self.kernel // 2] * 4, **window), "")


@dataclass(frozen=True)
class GlobalAveragePool(Weightless):
    """Mean over height and width, kept as a ``1×1`` map."""

    text: str = "gap"

    def out_shape(self, shape: Shape) -> Shape:
        return (shape[0], 1, 1)

    def emit(self, graph: GraphWriter, x: str, shape: Shape) -> str:
        return graph.activation(graph.node("GlobalAveragePool", [x]), "")


@dataclass(frozen=True)
class Normalize(Weightless):
    """Per-channel ``(x - mean) * (1 / std)``: the preprocessing that travels inside a student."""

    text: str = "normalize"

    def emit(self, graph: GraphWriter, x: str, shape: Shape) -> str:
        mean = graph.constant(np.full((1, shape[0], 1, 1), 0.5, np.float32))
        scale = graph.constant(np.full((1, shape[0], 1, 1), 2.0, np.float32))
        return graph.node("Mul", [graph.node("Sub", [x, mean]), scale])


@dataclass(frozen=True)
class Resize(Weightless):
    """Bilinear resize to ``side × side`` (half-pixel centres), as ``F.interpolate`` exports it."""

    side: int

    @property
    def text(self) -> str:
        return f"resize{self.side}"

    def out_shape(self, shape: Shape) -> Shape:
        return (shape[0], self.side, self.side)

    def emit(self, graph: GraphWriter, x: str, shape: Shape) -> str:
        return graph.node(
            "Resize",
            [x, "", graph.constant(resize_scales(shape, (self.side, self.side)))],
            mode="linear",
            coordinate_transformation_mode="pytorch_half_pixel",
        )


def resize_scales(shape: Shape, sides: tuple[int, int]) -> npt.NDArray[np.float32]:
    """``scales`` input of an ONNX Resize from ``shape`` (C, H, W) to ``sides``, for any batch size.

    The runtime floors ``side * scale``; one step up from the quotient keeps rounding from losing a pixel.
    """
    exact = [np.float32(to / size) for to, size in zip(sides, shape[1:], strict=True)]
    return np.array([1, 1, *(np.nextafter(s, np.float32(np.inf)) for s in exact)], np.float32)


@dataclass(frozen=True)
class Boundary(Weightless):
    """Crossing between precisions: ``quantize`` (float → uint8) or ``dequantize`` (uint8 → float)."""

    text: str

    def emit(self, graph: GraphWriter, x: str, shape: Shape) -> str:
        kind = "QuantizeLinear" if self.text == "quantize" else "DequantizeLinear"
        return graph.node(kind, [x, *graph.activation_scale(6.0)])
