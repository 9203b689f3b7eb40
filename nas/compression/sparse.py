"""Sparse storage of weights in an ONNX file: one bit says which are not zero, and only those are kept.

The graph decodes them from initializers alone, so onnxruntime does it once, when it loads the file.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

BITS, ONE, AXIS, COLUMN, FLAT, START = (
    "sparse::bits", "sparse::one", "sparse::axis", "sparse::column", "sparse::flat", "sparse::start",
)  # fmt: skip
SHARED: dict[str, Any] = {
    BITS: np.arange(8, dtype=np.uint8),
    ONE: np.array(1, np.uint8),
    AXIS: np.array(0, np.int64),
    COLUMN: np.array([1], np.int64),
    FLAT: np.array([-1], np.int64),
    START: np.array([0], np.int64),
}


def store_sparse(model: onnx.ModelProto, names: set[str]) -> onnx.ModelProto:
    """Store the named initializers sparsely where that takes fewer bytes, in place; the rest stays dense.

    n weights of b bytes, k of them not zero, take n/8 + k·b bytes and about 0.7 kB for the operators, instead of n·b.

    Args:
        model: of opset 18 or later.
        names: initializers of floats or 8-bit integers without an offset.
    """
    shared = [numpy_helper.from_array(array, name) for name, array in SHARED.items()]
    done: list[tuple[onnx.TensorProto, list[onnx.TensorProto], list[onnx.NodeProto]]] = []
    for i, tensor in enumerate([tensor for tensor in model.graph.initializer if tensor.name in names]):
        tensors, nodes = _encode(tensor, f"sparse::{i}")
        size = sum(part.ByteSize() for part in tensors) + sum(node.ByteSize() for node in nodes)
        if size + (0 if done else sum(part.ByteSize() for part in shared)) < tensor.ByteSize():
            done.append((tensor, tensors, nodes))
    if not done:
        return model
    model.graph.initializer.extend(shared)
    readers = list(model.graph.node)
    del model.graph.node[:]
    for tensor, tensors, nodes in done:
        model.graph.initializer.remove(tensor)
        model.graph.initializer.extend(tensors)
        model.graph.node.extend(nodes)
    model.graph.node.extend(readers)
    return model


def _encode(tensor: onnx.TensorProto, prefix: str) -> tuple[list[onnx.TensorProto], list[onnx.NodeProto]]:
    """Initializers and operators that give ``tensor`` again, under its own name.

    Weight i is ``values[r_i]``, where r_i is 0 for a zero and else its rank among those that are not: the running sum
    of the bits. ``values`` begins with a zero.
    """
    weights = numpy_helper.to_array(tensor)
    flat = weights.reshape(-1)
    kept = flat != 0
    arrays = {
        "mask": np.packbits(kept, bitorder="little"),
        "values": np.concatenate([np.zeros(1, flat.dtype), flat[kept]]),
        "shape": np.array(weights.shape, np.int64),
    }
    whole_bytes = len(flat) % 8 == 0
    if not whole_bytes:
        arrays["size"] = np.array([len(flat)], np.int64)
    steps = ("column", "shifted", "bits", "line", "mine", "flags", "sum", "rank", "flat")
    x = {key: f"{prefix}::{key}" for key in (*arrays, *steps)}
    line = x["line"] if whole_bytes else x["mine"]
    nodes = [
        helper.make_node("Unsqueeze", [x["mask"], COLUMN], [x["column"]]),
        helper.make_node("BitShift", [x["column"], BITS], [x["shifted"]], direction="RIGHT"),
        helper.make_node("BitwiseAnd", [x["shifted"], ONE], [x["bits"]]),
        helper.make_node("Reshape", [x["bits"], FLAT], [x["line"]]),
        *([] if whole_bytes else [helper.make_node("Slice", [x["line"], START, x["size"]], [x["mine"]])]),
        helper.make_node("Cast", [line], [x["flags"]], to=onnx.TensorProto.INT32),
        helper.make_node("CumSum", [x["flags"], AXIS], [x["sum"]]),
        helper.make_node("Mul", [x["sum"], x["flags"]], [x["rank"]]),
        helper.make_node("Gather", [x["values"], x["rank"]], [x["flat"]]),
        helper.make_node("Reshape", [x["flat"], x["shape"]], [tensor.name]),
    ]
    return [numpy_helper.from_array(array, x[key]) for key, array in arrays.items()], nodes
