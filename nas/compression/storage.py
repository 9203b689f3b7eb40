"""Low-bit storage inside the ONNX file: a weight as bit-planes of its codes, decoded by nodes that fold at load.

ONNX has no type of 3, 5, 6 or 7 bits, and those of 2 and 4 have no operators in older opsets nor integer kernels. So a
weight of ``k``-bit codes is stored as ``k`` planes of one bit a weight, and ordinary operators (opset 18) put them
together again. They depend on constants only: a runtime computes them once, while it loads the file, and then runs
what it would have run with the weight written out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from nas.errors import CompressionError

Floats = npt.NDArray[np.float32]
SHIFTS, ONE, FLAT, FIRST = "bits.shifts", "bits.one", "bits.flat", "bits.first"


@dataclass(frozen=True)
class Affine:
    """Codes that stand for float values ``(code - zero) * scale``.

    Attributes:
        scale, zero: one for all, or one a channel.
        axis: which dimension of the weight the channels are.
    """

    scale: Floats
    zero: Floats
    axis: int = 0


@dataclass(frozen=True)
class Signed:
    """Codes that stand for int8 values ``code - zero``, which a DequantizeLinear reads; ``zero`` as of `Affine`."""

    zero: Floats
    axis: int = 0


@dataclass(frozen=True)
class Codebook:
    """Codes that stand for the float values of a table ``[n]``."""

    values: Floats


Decode = Affine | Signed | Codebook


def decoded(codes: npt.NDArray[np.uint8], decode: Decode) -> npt.NDArray[Any]:
    """What the runtime makes of ``codes``: float32, or int8 for `Signed`."""
    if isinstance(decode, Codebook):
        return decode.values[codes]
    whole = codes.astype(np.float32) - _along(decode.zero, decode.axis, codes.ndim)
    if isinstance(decode, Signed):
        return whole.astype(np.int8)
    return whole * _along(decode.scale, decode.axis, codes.ndim)


def store_codes(
    model: onnx.ModelProto, initializer_name: str, codes: npt.NDArray[np.uint8], bits: int, decode: Decode
) -> bool:
    """Replace an initializer by ``bits`` planes of its codes and the nodes that decode them; in place.

    The decoded tensor takes the initializer's name, so that every reader of it stays as it is. The nodes cost about 300
    bytes; where they outweigh what the planes save, the codes are stored as bytes, or else the decoded values.

    Args:
        codes: of the initializer's shape, each below 2 ** ``bits``.
        bits: 1..8.

    Returns:
        Whether the file becomes smaller for it; otherwise the initializer holds the decoded values.

    Raises:
        CompressionError: there is no such initializer, or codes or bits do not fit.
    """
    graph = model.graph
    old = next((t for t in graph.initializer if t.name == initializer_name), None)
    if old is None:
        raise CompressionError(f"storage: the exported model has no initializer {initializer_name!r}.")
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise CompressionError(f"storage: {bits!r} bits for {initializer_name!r}.", expected="a whole number, 1..8")
    if codes.dtype != np.uint8 or codes.shape != tuple(old.dims) or int(codes.max(initial=0)) >= 2**bits:
        raise CompressionError(
            f"storage: codes {codes.dtype} {list(codes.shape)} up to {int(codes.max(initial=0))} for "
            f"{initializer_name!r}.",
            expected=f"uint8 {list(old.dims)} below {2**bits}",
        )
    known = {t.name for t in graph.initializer}
    whole = numpy_helper.from_array(decoded(codes, decode), initializer_name)
    ways = [_Chain(initializer_name, codes, 8, decode, known)]
    if bits < 8:
        ways.append(_Chain(initializer_name, codes, bits, decode, known))
    best = min(ways, key=_Chain.size)
    graph.initializer.remove(old)
    if best.size() >= whole.ByteSize():
        graph.initializer.append(whole)
        return False
    graph.initializer.extend(best.tensors)
    nodes = [*best.nodes, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return True


class _Chain:
    """The constants and nodes of one decoding. Names are short, for they are a good part of its size."""

    def __init__(self, name: str, codes: npt.NDArray[np.uint8], bits: int, decode: Decode, known: set[str]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.known = known
        number = next(i for i in range(len(known) + 1) if f"bits{i}" not in known)
        self.prefix = f"bits{number}"
        code = self._planes(codes, bits) if bits < 8 else self._constant(codes, self.prefix)
        if isinstance(decode, Codebook):
            table = self._constant(decode.values, f"{self.prefix}.c")
            self._node("Gather", [table, self._node("Cast", [code], to=TensorProto.INT32)])
        else:
            if bits == 8:
                code = self._node("Cast", [code], to=TensorProto.FLOAT)
            zero = _along(decode.zero, decode.axis, codes.ndim)
            code = self._node("Sub", [code, self._constant(zero, f"{self.prefix}.z")])
            if isinstance(decode, Signed):
                self._node("Cast", [code], to=TensorProto.INT8)
            else:
                scale = _along(decode.scale, decode.axis, codes.ndim)
                self._node("Mul", [code, self._constant(scale, f"{self.prefix}.s")])
        self.nodes[-1].output[0] = name

    def _planes(self, codes: npt.NDArray[np.uint8], bits: int) -> str:
        """Codes as floats: Σ 2^i · bit i, over planes ``[bits, ⌈n / 8⌉, 1]`` of eight weights a byte."""
        flat = codes.reshape(-1)
        planes = np.stack([np.packbits((flat >> i) & 1, bitorder="little") for i in range(bits)])[:, :, None]
        packed = self._constant(planes, self.prefix)
        shifted = self._node(
            "BitShift", [packed, self._constant(np.arange(8, dtype=np.uint8), SHIFTS)], direction="RIGHT"
        )
        ones = self._node("BitwiseAnd", [shifted, self._constant(np.array(1, np.uint8), ONE)])
        powers = self._constant((2.0 ** np.arange(bits)).astype(np.float32), f"bits.powers{bits}")
        summed = self._node(
            "Einsum", [self._node("Cast", [ones], to=TensorProto.FLOAT), powers], equation="kmb,k->mb"
        )
        if flat.size % 8:  # the last byte has bits to spare
            summed = self._node("Reshape", [summed, self._constant(np.array([-1], np.int64), FLAT)])
            end = self._constant(np.array([flat.size], np.int64), f"{self.prefix}.n")
            summed = self._node("Slice", [summed, self._constant(np.array([0], np.int64), FIRST), end])
        return self._node("Reshape", [summed, self._constant(np.array(codes.shape, np.int64), f"{self.prefix}.d")])

    def _constant(self, value: npt.NDArray[Any], name: str) -> str:
        if name not in self.known and all(t.name != name for t in self.tensors):
            self.tensors.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def _node(self, kind: str, inputs: list[str], **attributes: Any) -> str:
        output = f"{self.prefix}.{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def size(self) -> int:
        """Bytes in the file."""
        return sum(node.ByteSize() for node in self.nodes) + sum(tensor.ByteSize() for tensor in self.tensors)


def _along(values: Floats, axis: int, ndim: int) -> Floats:
    """One value for all as ``[]``, one a channel shaped to broadcast along ``axis`` of ``ndim`` dimensions."""
    values = np.asarray(values, np.float32)
    if values.ndim and np.all(values == values.flat[0]):
        values = values.flat[0:1].reshape(())
    return values if values.ndim == 0 else values.reshape([-1 if i == axis else 1 for i in range(ndim)])


def spell_out(model: onnx.ModelProto, names: list[str], kind: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """Make initializers again of tensors of ``kind`` that an earlier pass stored in a form to be decoded.

    Returns the model itself where all of them are initializers already, else a changed copy.
    """
    from onnxruntime import InferenceSession

    known = {t.name for t in model.graph.initializer}
    producers = {out: node for node in model.graph.node for out in node.output}
    hidden = [name for name in names if name not in known and name in producers]
    if not hidden:
        return model
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    reached = _behind(hidden, producers)
    small = onnx.ModelProto()
    small.CopyFrom(model)
    del small.graph.node[:], small.graph.input[:], small.graph.output[:], small.graph.value_info[:]
    small.graph.node.extend(node for node in model.graph.node if set(node.output) & reached)
    del small.graph.initializer[:]
    small.graph.initializer.extend(t for t in model.graph.initializer if t.name in reached)
    small.graph.output.extend(helper.make_tensor_value_info(name, kind, None) for name in hidden)
    values = InferenceSession(small.SerializeToString(), providers=["CPUExecutionProvider"]).run(hidden, {})
    for name, value in zip(hidden, values, strict=True):
        changed.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    # Only what nothing else needs goes with the decoding.
    left = [node for node in changed.graph.node if not set(node.output) & set(hidden)]
    needed = _behind(
        [*(name for node in left if not set(node.output) & reached for name in node.input), *_outputs(changed)],
        {out: node for node in left for out in node.output},
    )
    nodes = [node for node in left if not set(node.output) & reached or set(node.output) & needed]
    tensors = [t for t in changed.graph.initializer if t.name not in reached - set(hidden) or t.name in needed]
    del changed.graph.node[:], changed.graph.initializer[:]
    changed.graph.node.extend(nodes)
    changed.graph.initializer.extend(tensors)
    return changed


def _outputs(model: onnx.ModelProto) -> list[str]:
    return [value.name for value in model.graph.output]


def _behind(names: list[str], producers: dict[str, onnx.NodeProto]) -> set[str]:
    """All tensors that ``names`` are computed from, they themselves among them."""
    found: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo.extend(producers[name].input if name in producers else ())
    return found
