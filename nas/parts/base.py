"""Parts: pure descriptions of what the runtime executes, each with its key, its costs and an ONNX to profile.

A part is a short chain of operators that the runtime runs as one fused segment (a convolution with its
activation, a whole inverted bottleneck) or one precision boundary. No weights and no torch are involved: the
numbers in the profiled ONNX are random, because time does not depend on them.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Shape = tuple[int, ...]
OPSET = 18
PRECISIONS = ("fp32", "int8", "boundary")
INPUT_SCALE = 6.0 / 255


@runtime_checkable
class Op(Protocol):
    """One operator of a part. ``shape`` is the input's, without the batch dimension."""

    @property
    def text(self) -> str:
        """Readable form in a latency-table key."""

    def out_shape(self, shape: Shape) -> Shape:
        """Shape of the output."""

    def macs(self, shape: Shape) -> int:
        """Multiply-accumulate operations for one sample."""

    def params(self, shape: Shape) -> int:
        """Deployed parameters: batch normalisation is folded into weights and bias."""

    def emit(self, graph: GraphWriter, x: str, shape: Shape) -> str:
        """Write the operator's nodes for input tensor ``x`` and return the output tensor's name."""


class Weightless:
    """An operator without weights, whose output has the shape of its input unless it says otherwise."""

    def out_shape(self, shape: Shape) -> Shape:
        """Shape of the output: the input's."""
        return shape

    def macs(self, shape: Shape) -> int:
        """None."""
        return 0

    def params(self, shape: Shape) -> int:
        """None."""
        return 0


@dataclass(frozen=True)
class Part:
    """A fused segment or precision boundary.

    Args:
        ops: the operators in order.
        shape: input shape without batch, ``(channels, height, width)`` for images and ``(tokens, width)`` for tokens.
        precision: ``fp32``, ``int8`` (uint8 in, uint8 out, static QDQ, weights per channel) or ``boundary``. An int8
            part of operators whose ``float_stream`` is true has float in and out, and integer matrix products within.
        count: how many identical copies the runtime executes one after the other.
    """

    ops: tuple[Op, ...]
    shape: Shape
    precision: str = "fp32"
    count: int = 1

    @cached_property
    def key(self) -> str:
        """Latency-table key; equal keys are equal work, whatever the count."""
        return f"{self.precision} {'x'.join(map(str, self.shape))} {' '.join(op.text for op in self.ops)}"

    def _shapes(self) -> list[Shape]:
        shapes = [self.shape]
        for op in self.ops:
            shapes.append(op.out_shape(shapes[-1]))
        return shapes

    @cached_property
    def out_shape(self) -> Shape:
        """Output shape without batch."""
        return self._shapes()[-1]

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates of all copies, one sample."""
        return self.count * sum(op.macs(s) for op, s in zip(self.ops, self._shapes(), strict=False))

    @cached_property
    def params(self) -> int:
        """Deployed parameters of all copies."""
        return self.count * sum(op.params(s) for op, s in zip(self.ops, self._shapes(), strict=False))

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of the stored parameters of all copies: 4 a parameter in fp32, 1 in int8."""
        return self.params * (1 if self.precision == "int8" else 4)

    @cached_property
    def traffic(self) -> int:
        """Elements that one copy reads from and hands to its neighbours, one sample."""
        return math.prod(self.shape) + math.prod(self.out_shape)

    def to_onnx(self, batch: int = 1) -> onnx.ModelProto:
        """A runnable model of one copy with random weights, input and output in the part's own precision."""
        return GraphWriter(self, batch).model()


class GraphWriter:
    """Writes the ONNX graph of one part, with Q/DQ nodes where the part is int8."""

    def __init__(self, part: Part, batch: int) -> None:
        self.part, self.batch = part, batch
        self.quantized = part.precision == "int8"
        #: Whether what flows between operators is uint8.
        self.integer_stream = self.quantized and not any(getattr(op, "float_stream", False) for op in part.ops)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.rng = np.random.default_rng(zlib.crc32(part.key.encode()))
        self.input = "x"
        self._scales: dict[float, list[str]] = {}
        self._through_uint8: dict[str, str] = {}

    def constant(self, array: npt.NDArray[np.generic]) -> str:
        """Add an initializer and return its name."""
        name = f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def node(self, op_type: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Add a node with one output and return the output's name."""
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [name], name=f"{op_type}_{name}", **attributes))
        return name

    def activation_scale(self, top: float) -> list[str]:
        """Names of scale and zero point for a uint8 tensor with values in ``[0, top]``."""
        if top not in self._scales:
            scale = self.constant(np.array(top / 255, np.float32))
            self._scales[top] = [scale, self.constant(np.array(0, np.uint8))]
        return self._scales[top]

    def weights(self, shape: Shape) -> tuple[str, str]:
        """Weight and bias tensors, as int8 and int32 behind DequantizeLinear where the part is int8."""
        fan_in = int(np.prod(shape[1:]))
        weight = self.rng.normal(0, fan_in**-0.5, shape).astype(np.float32)
        bias = self.rng.normal(0, 0.1, shape[0]).astype(np.float32)
        if not self.quantized:
            return self.constant(weight), self.constant(bias)
        top = np.maximum(np.abs(weight).reshape(shape[0], -1).max(1), 1e-6)
        scale = (top / 127).astype(np.float32)
        stored = np.clip(np.round(weight / scale.reshape(-1, *[1] * (len(shape) - 1))), -127, 127).astype(np.int8)
        bias_scale = (scale * INPUT_SCALE).astype(np.float32)
        stored_bias = np.round(bias / bias_scale).astype(np.int32)
        w = self._dequantized_weight(stored, scale, np.zeros(shape[0], np.int8))
        b = self._dequantized_weight(stored_bias, bias_scale, np.zeros(shape[0], np.int32))
        return w, b

    def _dequantized_weight(
        self, stored: npt.NDArray[np.generic], scale: npt.NDArray[np.float32], zero: npt.NDArray[np.generic]
    ) -> str:
        inputs = [self.constant(stored), self.constant(scale), self.constant(zero)]
        return self.node("DequantizeLinear", inputs, axis=0)

    def linear(self, x: str, fan_in: int, fan_out: int) -> str:
        """A linear layer on float rows; where the part is int8, a product of integers with a float result."""
        if self.quantized:
            x = self._rounded(x)
        return self.node("Gemm", [x, *self.weights((fan_out, fan_in))], transB=1)

    def _rounded(self, x: str) -> str:
        """A float tensor through uint8 and back, once for all of its readers."""
        if x not in self._through_uint8:
            scale = [self.constant(np.array(INPUT_SCALE, np.float32)), self.constant(np.array(128, np.uint8))]
            stored = self.node("QuantizeLinear", [x, *scale])
            self._through_uint8[x] = self.node("DequantizeLinear", [stored, *scale])
        return self._through_uint8[x]

    def reshaped(self, x: str, shape: Shape) -> str:
        """Another shape of the same numbers, for any batch."""
        return self.node("Reshape", [x, self.constant(np.array([-1, *shape], np.int64))])

    def activation(self, x: str, kind: str) -> str:
        """Activation; in int8 the clamp is the quantisation itself, as the runtime's quantiser writes it."""
        if self.integer_stream:
            quantized = self.node("QuantizeLinear", [x, *self.activation_scale(6.0)])
            return self.node("DequantizeLinear", [quantized, *self.activation_scale(6.0)])
        if kind == "relu6":
            low, high = self.constant(np.array(0, np.float32)), self.constant(np.array(6, np.float32))
            return self.node("Clip", [x, low, high])
        if kind == "relu":
            return self.node("Relu", [x])
        return x

    def model(self) -> onnx.ModelProto:
        """The finished, checked model."""
        part = self.part
        u8_in = self.integer_stream or part.ops[0].text == "dequantize"
        u8_out = self.integer_stream or part.ops[-1].text == "quantize"
        x = "x"
        if self.integer_stream:
            x = self.input = self.node("DequantizeLinear", ["x", *self.activation_scale(6.0)])
        for op, shape in zip(part.ops, part._shapes(), strict=False):
            x = op.emit(self, x, shape)
        if self.integer_stream:
            # The last DequantizeLinear belongs to the neighbour: an int8 part ends in uint8.
            x = self.nodes.pop().input[0]
        graph = helper.make_graph(
            self.nodes,
            "part",
            [helper.make_tensor_value_info("x", _dtype(u8_in), self._dims(part.shape))],
            [helper.make_tensor_value_info(x, _dtype(u8_out), self._dims(part.out_shape))],
            self.initializers,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
        onnx.checker.check_model(model)
        return model

    def _dims(self, shape: Shape) -> list[int]:
        """Tokens of all samples are rows of one matrix, as they flow through a whole net."""
        return [self.batch * shape[0], shape[1]] if len(shape) == 2 else [self.batch, *shape]


def _dtype(quantized: bool) -> int:
    return int(TensorProto.UINT8 if quantized else TensorProto.FLOAT)
