"""From a traced graph with QuantizeLinear and DequantizeLinear to one that onnxruntime runs in integers.

Every step leaves the values as they are: scales take what a normalisation multiplies by, codes are transposed with
their weight, a bias goes to the steps of the integer sum, an activation becomes the range of the codes behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from nas.compression.qdq import LINEAR
from nas.compression.storage import Affine, Signed, decoded, store_codes
from nas.student.export import compact

Array = npt.NDArray[Any]
CODES = ".weight_codes"
PRODUCTS = ("Conv", *LINEAR)
KEEP = "keep"  # the name of a Clip whose highest code is reached
MOVES = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity")  # they only pass values on


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
    for pair in _pairs(graph):
        _pull(graph, pair)
    for pair in _pairs(graph):
        _absorb(graph, pair)
    while any(_merge(graph, pair, exact) for pair in _pairs(graph)):
        pass
    for weight in weights:
        _feed(graph, weight)
    for pair in _pairs(graph):
        _bound(graph, pair)
    for node in graph.nodes:
        if node.name == KEEP:
            node.name = ""
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


class Graph:
    """A graph's nodes and tensors while they are changed; `write` brings them back into the model."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes: list[onnx.NodeProto] = list(model.graph.node)
        self.tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant":
                self.tensors[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        self.nodes = [node for node in self.nodes if node.op_type != "Constant"]
        self.ends = {value.name for value in model.graph.output}

    def maker(self, name: str) -> onnx.NodeProto | None:
        """The node that makes a value."""
        return next((node for node in self.nodes if name in node.output), None)

    def readers(self, name: str) -> list[onnx.NodeProto]:
        """The nodes that read a value."""
        return [node for node in self.nodes if name in node.input]

    def sole(self, name: str) -> onnx.NodeProto | None:
        """The only reader of a value that is no output of the model."""
        found = self.readers(name)
        return found[0] if len(found) == 1 and name not in self.ends else None

    def store(self, value: Array, name: str) -> str:
        """A tensor of that name, or of one like it that is free."""
        free = name
        while free in self.tensors:
            free = f"{free}_"
        self.tensors[free] = np.array(value, order="C")
        return free

    def insert(self, nodes: list[onnx.NodeProto], before: onnx.NodeProto) -> None:
        """Put nodes before another."""
        place = next(i for i, node in enumerate(self.nodes) if node is before)
        self.nodes[place:place] = nodes

    def drop(self, node: onnx.NodeProto) -> None:
        """Take a node out; what read its result reads its first input."""
        self.nodes = [other for other in self.nodes if other is not node]
        for reader in self.readers(node.output[0]):
            reader.input[:] = [node.input[0] if name == node.output[0] else name for name in reader.input]

    def write(self) -> None:
        """Bring nodes and tensors back, but what nothing reads."""
        alive, kept = set(self.ends), []
        for node in reversed(self.nodes):
            if alive.intersection(node.output):
                alive.update(node.input)
                kept.append(node)
        tensors = [numpy_helper.from_array(value, name) for name, value in self.tensors.items() if name in alive]
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in reversed(kept)]
        del self.model.graph.node[:], self.model.graph.initializer[:], self.model.graph.value_info[:]
        self.model.graph.node.extend(nodes)
        self.model.graph.initializer.extend(tensors)


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


# ---- activations -----------------------------------------------------------------------------------------


@dataclass
class Pair:
    """A QuantizeLinear to uint8, perhaps a Clip of its codes, and the DequantizeLinear."""

    quantize: onnx.NodeProto
    clip: onnx.NodeProto | None
    dequantize: onnx.NodeProto

    def top(self, graph: Graph) -> int:
        """The highest code."""
        return 255 if self.clip is None else int(graph.tensors[self.clip.input[2]])

    def low(self, graph: Graph) -> int:
        """The lowest code."""
        return 0 if self.clip is None or not self.clip.input[1] else int(graph.tensors[self.clip.input[1]])

    def chain(self) -> list[onnx.NodeProto]:
        """Its nodes in order."""
        return [node for node in (self.quantize, self.clip, self.dequantize) if node is not None]

    def again(self, source: str, prefix: str) -> list[onnx.NodeProto]:
        """The same rounding of another value; its result is ``{prefix}.d``."""
        copies = []
        for node in self.chain():
            twin = onnx.NodeProto.FromString(node.SerializeToString())
            twin.input[0], twin.output[0], twin.name = source, f"{prefix}.{node.op_type[0].lower()}", ""
            source = twin.output[0]
            copies.append(twin)
        return copies


def _pairs(graph: Graph) -> list[Pair]:
    """Every DequantizeLinear with what it takes its codes from."""
    found = []
    for quantize in graph.nodes:
        if quantize.op_type == "QuantizeLinear":
            clip = graph.sole(quantize.output[0])
            if clip is not None and clip.op_type != "Clip":
                clip = None
            for node in graph.readers((clip or quantize).output[0]):
                if node.op_type == "DequantizeLinear":
                    found.append(Pair(quantize, clip, node))
    return found


def _scalar(graph: Graph, node: onnx.NodeProto) -> bool:
    return graph.tensors[node.input[1]].size == 1


def _pull(graph: Graph, pair: Pair) -> None:
    """What is rounded behind a move of values may be rounded before it, too: there a product or an activation is."""
    first = pair.quantize
    while _scalar(graph, pair.quantize):
        move = graph.maker(first.input[0])
        if move is None or move.op_type not in MOVES or graph.sole(move.output[0]) is not first:
            break
        first = move
    source = graph.maker(first.input[0])
    moved = first is not pair.quantize and graph.sole(first.input[0]) is first
    if moved and source is not None and source.op_type != "DequantizeLinear":
        prefix = f"{first.output[0]}.before"
        graph.insert(pair.again(first.input[0], prefix), before=first)
        first.input[0] = f"{prefix}.d"


def _absorb(graph: Graph, pair: Pair) -> None:
    """An activation that cuts a range becomes the range of the codes: rounding keeps the order of values."""
    node = graph.maker(pair.quantize.input[0])
    if node is None or node.op_type not in ("Relu", "Clip") or graph.sole(node.output[0]) is not pair.quantize:
        return
    if not _scalar(graph, pair.quantize):
        return
    limits = [*node.input[1:], "", ""][:2] if node.op_type == "Clip" else ["", ""]
    low, high = (float(graph.tensors[name]) if name else None for name in limits)
    if node.op_type == "Relu":
        low = 0.0
    if low != 0.0:
        return
    scale, zero = (graph.tensors[name] for name in pair.quantize.input[1:3])
    top = pair.top(graph)
    if high is not None:
        top = min(top, int(np.round(np.float32(high) / scale)) + int(zero))
    graph.drop(node)
    _set_range(graph, pair, top - int(zero), keep=high is not None)


def _set_range(graph: Graph, pair: Pair, top: int, keep: bool) -> None:
    """Codes 0..``top`` with zero at 0."""
    zero = graph.store(np.array(0, np.uint8), f"{pair.quantize.output[0]}.z")
    pair.quantize.input[2] = pair.dequantize.input[2] = zero
    _clip(graph, pair, 0, top)
    if pair.clip is not None:
        pair.clip.name = KEEP * keep


def _clip(graph: Graph, pair: Pair, low: int, high: int) -> None:
    """Codes ``low``..``high``."""
    if pair.clip is None:
        pair.clip = helper.make_node("Clip", [pair.quantize.output[0], "", ""], [f"{pair.dequantize.output[0]}.c"])
        graph.insert([pair.clip], before=pair.dequantize)
        pair.dequantize.input[0] = pair.clip.output[0]
    for i, end in enumerate((low, high), 1):
        pair.clip.input[i] = graph.store(np.array(end, np.uint8), f"{pair.clip.output[0]}.{i}")


def _merge(graph: Graph, second: Pair, exact: bool) -> bool:
    """Two roundings one after the other where the second only renames codes, or cuts some off: the first's codes,
    the second's scale. What NNI rounds as a result and again as the next layer's input mostly is that."""
    first = next((pair for pair in _pairs(graph) if pair.dequantize.output[0] == second.quantize.input[0]), None)
    if first is None:
        return False
    alone = graph.sole(second.quantize.input[0]) is second.quantize
    if not (_scalar(graph, first.dequantize) and _scalar(graph, second.quantize)):
        return False
    (fine, origin), (scale, zero) = (
        (graph.tensors[node.input[1]], int(graph.tensors[node.input[2]]))
        for node in (first.dequantize, second.quantize)
    )
    bottom, top = first.low(graph), first.top(graph)
    values = (np.arange(bottom, top + 1) - origin).astype(np.float32) * fine
    codes = np.clip(np.round(values / scale).astype(int) + zero, second.low(graph), second.top(graph))
    low = bottom + int(np.flatnonzero(codes == codes[0])[-1])
    high = bottom + int(np.flatnonzero(codes == codes[-1])[0])
    renames = low <= origin <= high and (np.diff(codes[low - bottom : high - bottom + 1]) == 1).all()
    if not renames and (exact or second.top(graph) < 127):
        return False
    if not renames:  # the first's values go on, but those that an activation cuts off
        low, high = origin if second.low(graph) == zero else bottom, top
    cuts, shared = (low, high) != (bottom, top), graph.readers(second.dequantize.input[0]) != [second.dequantize]
    if shared or (cuts and not alone):  # others read the codes
        return False
    if not renames:
        second.dequantize.input[1] = first.dequantize.input[1]
    if cuts:
        _clip(graph, first, low, high)
    if first.clip is not None and high < top:
        first.clip.name = KEEP
    second.dequantize.input[0], second.dequantize.input[2] = first.dequantize.input[0], first.dequantize.input[2]
    gone = (first.dequantize if alone else None, second.quantize, second.clip)
    graph.nodes = [node for node in graph.nodes if all(node is not other for other in gone)]
    return True


def _bound(graph: Graph, pair: Pair) -> None:
    """No Clip where the type ends at the highest code, or one later where nothing is known to go that far.

    Behind another rounding it stays: onnxruntime would make one approximate rounding of two.
    """
    source = graph.maker(pair.quantize.input[0])
    if source is not None and source.op_type == "DequantizeLinear":
        if pair.clip is None:
            _clip(graph, pair, 0, 255)
    elif pair.clip is not None and not pair.low(graph):
        top = pair.top(graph)
        if top == 255 or (top == 254 and pair.clip.name != KEEP):
            graph.drop(pair.clip)
            pair.clip = None
    if pair.clip is not None and not pair.low(graph):
        pair.clip.input[1] = ""  # an unsigned code has no lower end to check


def _feed(graph: Graph, weight: Weight) -> None:
    """Round a product's input on the grid that its values are on already, so that the runtime sees integers."""
    node = weight.node
    name, passed = node.input[0], False
    source = graph.maker(name)
    while source is not None and source.op_type in (*MOVES, "Relu"):
        name, passed = source.input[0], True
        source = graph.maker(name)
    pair = next((pair for pair in _pairs(graph) if pair.dequantize is source), None) if passed else None
    if pair is not None and _scalar(graph, pair.quantize):
        prefix = f"{node.output[0]}.input"
        graph.insert(pair.again(node.input[0], prefix), before=node)
        node.input[0] = f"{prefix}.d"


def _why_floats(graph: Graph, node: onnx.NodeProto) -> str:
    """Why onnxruntime computes a product in floats; "" where it computes it in integers."""
    source = graph.maker(node.input[0])
    if source is None or source.op_type != "DequantizeLinear":
        return "its input is not quantised"
    if not _scalar(graph, source):
        return "its input has a scale for each channel"
    if node.op_type != "Conv":
        return ""  # products of matrices may give floats
    reader = graph.sole(node.output[0])
    if reader is None:
        return "its result goes to several readers as it is"
    if reader.op_type != "QuantizeLinear" or not _scalar(graph, reader):
        return f"its result goes to {reader.op_type} as it is"
    return ""
