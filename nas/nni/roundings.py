"""Roundings of activations in a graph: moved to where a runtime looks for them, and made one where two say the same.

An activation becomes the range of the codes behind it; a rounding that only renames the codes of another goes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from nas.nni.onnx_graph import Graph

KEEP = "keep"  # the name of a Clip whose highest code is reached
MOVES = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity")  # they only pass values on


def join(graph: Graph, exact: bool) -> None:
    """Every rounding next to what makes its values, activations into ranges, and two roundings into one; in place.

    Args:
        exact: keep what changes values; otherwise a rounding to 8 bits of what another has rounded is left out.
    """
    for pair in pairs(graph):
        _pull(graph, pair)
    for pair in pairs(graph):
        _absorb(graph, pair)
    while any(_merge(graph, pair, exact) for pair in pairs(graph)):
        pass


def bound(graph: Graph) -> None:
    """Clips of codes where they are needed, and no others, once no rounding is added any more; in place."""
    for pair in pairs(graph):
        _bound(graph, pair)
    for node in graph.nodes:
        if node.name == KEEP:
            node.name = ""


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


def pairs(graph: Graph) -> list[Pair]:
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


def scalar(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether a rounding has one scale for all values."""
    return graph.tensors[node.input[1]].size == 1


def _pull(graph: Graph, pair: Pair) -> None:
    """What is rounded behind a move of values may be rounded before it, too: there a product or an activation is."""
    first = pair.quantize
    while scalar(graph, pair.quantize):
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
    if not scalar(graph, pair.quantize):
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
    first = next((pair for pair in pairs(graph) if pair.dequantize.output[0] == second.quantize.input[0]), None)
    if first is None:
        return False
    alone = graph.sole(second.quantize.input[0]) is second.quantize
    if not (scalar(graph, first.dequantize) and scalar(graph, second.quantize)):
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
