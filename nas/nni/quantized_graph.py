"""From a traced graph with QuantizeLinear and DequantizeLinear to one that onnxruntime runs in integers.

Every step leaves the values as they are: scales take what a normalisation multiplies by, codes are transposed with
their weight, a bias goes to the steps of the integer sum, an activation becomes the range of the codes behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from nas.compression.qdq import LINEAR
from nas.compression.storage import Affine, Signed, decoded, store_codes
from nas.nni.onnx_graph import Array, Graph
from nas.nni.roundings import MOVES, bound, join, pairs, scalar
from nas.student.export import compact

CODES = ".weight_codes"
PRODUCTS = ("Conv", *LINEAR)


def finish(
    model: onnx.ModelProto, layers: Mapping[str, int], exact: bool = True
) -> tuple[onnx.ModelProto, dict[str, str]]:
    """Bring an exported simulation into the form that runs in integers; in place.

    Args:
        layers: names of the layers whose weight is in codes → bits of a code.
        exact: keep every rounding; otherwise a rounding to 8 bits of what another has rounded is left out.

    Returns:
        The model, and for each of the layers why it computes in floats; "" where it computes in integers.
    """
    graph = Graph(model)
    weights = _weights(graph, layers)
    for weight in weights:
        _take_norm(graph, weight)
    join(graph, exact)
    for weight in weights:
        _feed(graph, weight)
    bound(graph)
    why = [_why_floats(graph, weight.node) for weight in weights]
    for weight, reason in zip(weights, why, strict=True):
        weight.write(graph, integers=not reason)
    graph.write()
    for weight, reason in zip(weights, why, strict=True):
        weight.pack(model, integers=not reason)
    reasons = dict.fromkeys(layers, "no convolution or matrix product reads its weight as it is")
    reasons |= {weight.layer: "" for weight in weights}
    reasons |= {weight.layer: reason for weight, reason in zip(weights, why, strict=True) if reason}
    return compact(model), reasons


# ---- weights ---------------------------------------------------------------------------------------------


@dataclass
class Weight:
    """The weight of one product, in codes.

    Attributes:
        layer: whose it is.
        bits: of a code.
        node: the convolution or matrix product.
        codes: int8 or uint8, of the shape that ``node`` reads.
        scale, zero: of one value, or of one for each output channel; a value is ``(code - zero) * scale``.
        axis: the dimension of the output channels.
        tensor: what it is stored as, once written.
    """

    layer: str
    bits: int
    node: onnx.NodeProto
    codes: Array
    scale: Array
    zero: Array
    axis: int
    tensor: str = ""

    def times(self, gain: Array) -> None:
        """Multiply by a factor for each output channel, in the scales alone."""
        channels = self.codes.shape[self.axis]
        scale, zero = (np.broadcast_to(value, channels).copy() for value in (self.scale, self.zero))
        shape, whole = self._along, np.int16(255 if self.codes.dtype == np.uint8 else 0)
        flipped = gain < 0  # scales are positive
        self.codes = np.where(flipped.reshape(shape), whole - self.codes, self.codes).astype(self.codes.dtype)
        zero = np.where(flipped, whole - zero, zero).astype(zero.dtype)
        self.codes = np.where((gain == 0).reshape(shape), zero.reshape(shape), self.codes)
        self.scale = np.where(gain == 0, scale, scale * np.abs(gain)).astype(np.float32)
        self.zero = zero

    def write(self, graph: Graph, integers: bool) -> None:
        """Store it where its product reads it, through a DequantizeLinear where that runs in integers."""
        if not integers:
            self.tensor = self.node.input[1] = graph.store(decoded(self.codes, self._affine()), f"{self.layer}.weight")
            return
        self.tensor = graph.store(self.codes, f"{self.layer}.weight_quantized")
        source = graph.maker(self.node.input[0])
        step = graph.tensors[source.input[1]] if source is not None else np.ones((), np.float32)
        self._settle(step)
        self.node.input[1] = f"{self.tensor}.floats"
        parts = [self.tensor, graph.store(self.scale, f"{self.layer}.s"), graph.store(self.zero, f"{self.layer}.z")]
        dequantize = helper.make_node("DequantizeLinear", parts, [self.node.input[1]], axis=self.axis)
        graph.insert([dequantize], before=self.node)
        if len(self.node.input) > 2:
            _whole_bias(graph, self, step)

    def _settle(self, step: Array) -> None:
        """A channel of zeros may have any scale: one that leaves room for its bias."""
        if self.scale.ndim:
            others = tuple(i for i in range(self.codes.ndim) if i != self.axis)
            dead = (self.codes == np.broadcast_to(self.zero, self.scale.shape).reshape(self._along)).all(axis=others)
            self.scale = np.where(dead, np.maximum(self.scale.max(), np.float32(1e-3) / step), self.scale)
            self.scale = self.scale.astype(np.float32)

    def _affine(self, low: int = 0) -> Affine:
        """How codes become floats, once they are counted from ``low``."""
        return Affine(self.scale, (self.zero.astype(np.float32) - low).astype(np.float32), self.axis)

    @property
    def _along(self) -> list[int]:
        """The shape in which one value a channel spreads over the codes."""
        return [-1 if i == self.axis else 1 for i in range(self.codes.ndim)]

    def pack(self, model: onnx.ModelProto, integers: bool) -> None:
        """Store it in as few bits as it has, where that makes the file smaller."""
        low = int(self.codes.min())
        stored = (self.codes.astype(np.int16) - low).astype(np.uint8)
        if not integers:
            store_codes(model, self.tensor, stored, self.bits, self._affine(low))
        elif self.bits < 8:
            store_codes(model, self.tensor, stored, self.bits, Signed(np.array(-low, np.float32), self.axis))


def _weights(graph: Graph, layers: Mapping[str, int]) -> list[Weight]:
    """The weights in codes that a product reads; each reader has its own."""
    found = []
    for name, codes in list(graph.tensors.items()):
        owners = [layer for layer in layers if name == layer + CODES or name.endswith(f"_{layer}{CODES}")]
        if not owners:
            continue
        layer = max(owners, key=len)
        for dequantize in graph.readers(name):
            scale, zero = (graph.tensors[part] for part in dequantize.input[1:3])
            for reader in graph.readers(dequantize.output[0]):
                transposed = reader.op_type == "Transpose"
                for node in graph.readers(reader.output[0]) if transposed else [reader]:
                    if node.op_type in PRODUCTS:
                        turned = any(a.name == "transB" and a.i for a in node.attribute)
                        axis = 0 if node.op_type == "Conv" or turned else 1
                        own = codes.T if transposed else codes
                        found.append(Weight(layer, layers[layer], node, own, scale, zero, axis))
    return found


def _take_norm(graph: Graph, weight: Weight) -> None:
    """A normalisation that alone reads a product goes into its scales and its bias."""
    node = weight.node
    norm = graph.sole(node.output[0])
    if norm is None or norm.op_type != "BatchNormalization" or node.op_type == "MatMul":
        return
    gain, shift, mean, var = (graph.tensors[name].astype(np.float64) for name in norm.input[1:5])
    epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
    gain = gain / np.sqrt(var + epsilon)
    bias = graph.tensors[node.input[2]] if len(node.input) > 2 else np.zeros_like(mean)
    weight.times(gain.astype(np.float32))
    del node.input[2:]
    node.input.append(graph.store(((bias - mean) * gain + shift).astype(np.float32), f"{weight.layer}.bias"))
    graph.drop(norm)


def _whole_bias(graph: Graph, weight: Weight, step: Array) -> None:
    """The bias in steps of the integer sum, unless it does not fit."""
    scale = np.atleast_1d(weight.scale * step).astype(np.float32)
    bias = graph.tensors[weight.node.input[2]].astype(np.float64)
    codes = np.round(bias / scale)
    if np.abs(codes).max(initial=0) > np.iinfo(np.int32).max:
        return
    names = [
        graph.store(codes.astype(np.int32), f"{weight.layer}.bias_quantized"),
        graph.store(scale if weight.scale.ndim else scale[0], f"{weight.layer}.bias_s"),
    ]
    weight.node.input[2] = f"{names[0]}.floats"
    graph.insert([helper.make_node("DequantizeLinear", names, [weight.node.input[2]], axis=0)], before=weight.node)


# ---- products --------------------------------------------------------------------------------------------


def _feed(graph: Graph, weight: Weight) -> None:
    """Round a product's input on the grid that its values are on already, so that the runtime sees integers."""
    node = weight.node
    name, passed = node.input[0], False
    source = graph.maker(name)
    while source is not None and source.op_type in (*MOVES, "Relu"):
        name, passed = source.input[0], True
        source = graph.maker(name)
    pair = next((pair for pair in pairs(graph) if pair.dequantize is source), None) if passed else None
    if pair is not None and scalar(graph, pair.quantize):
        prefix = f"{node.output[0]}.input"
        graph.insert(pair.again(node.input[0], prefix), before=node)
        node.input[0] = f"{prefix}.d"


def _why_floats(graph: Graph, node: onnx.NodeProto) -> str:
    """Why onnxruntime computes a product in floats; "" where it computes it in integers."""
    source = graph.maker(node.input[0])
    if source is None or source.op_type != "DequantizeLinear":
        return "its input is not quantised"
    if not scalar(graph, source):
        return "its input has a scale for each channel"
    if node.op_type != "Conv":
        return ""  # products of matrices may give floats
    reader = graph.sole(node.output[0])
    if reader is None:
        return "its result goes to several readers as it is"
    if reader.op_type != "QuantizeLinear" or not scalar(graph, reader):
        return f"its result goes to {reader.op_type} as it is"
    return ""
