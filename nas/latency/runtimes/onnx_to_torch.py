"""From an ONNX graph to a torch module of the functions that a PyTorch user would call.

A node becomes a call of one torch function in an ``fx`` graph, whose generated code has no more overhead than
hand-written code. Shapes are fixed: every node is run once while it is translated, and what does not depend on the
input (shapes, folded constants) becomes a constant.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import fx, nn

from nas.errors import TableError
from nas.latency.runtimes.base import is_int8

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class Node:
    """An ONNX node while it is translated: inputs by position, constants as numbers, attributes by name."""

    def __init__(self, node: onnx.NodeProto, writer: _Writer) -> None:
        self.proto, self.writer = node, writer
        self.attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}

    def __getitem__(self, i: int) -> Any:
        """Input ``i`` of the call: a tensor of the graph, or None."""
        return self.writer.tensor(self.proto.input[i]) if self.has(i) else None

    def has(self, i: int) -> bool:
        """Whether the optional input ``i`` is given."""
        return i < len(self.proto.input) and bool(self.proto.input[i])

    def number(self, i: int) -> Any:
        """Input ``i`` as a plain number where it is a constant scalar, else as a tensor."""
        value = self.writer.values[self.proto.input[i]]
        constant = self.proto.input[i] in self.writer.constants
        return value.item() if constant and value.numel() == 1 and value.ndim == 0 else self[i]

    def constant(self, i: int, default: Any = None) -> Any:
        """Input ``i`` as a list or number; it must not depend on the model's input."""
        if not self.has(i):
            return default
        if self.proto.input[i] not in self.writer.constants:
            raise self.refuse("an input that must be constant depends on the model's input")
        return self.writer.values[self.proto.input[i]].tolist()

    def shape(self, i: int = 0) -> list[int]:
        """Shape of input ``i``."""
        return list(self.writer.values[self.proto.input[i]].shape)

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute; strings come as str."""
        value = self.attributes.get(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def axes(self, i: int = 1) -> Any:
        """``axes``, an input in newer operator sets and an attribute in older ones."""
        return self.constant(i) if self.has(i) else self.attribute("axes")

    def refuse(self, why: str) -> TableError:
        """The error for a node that has no translation."""
        return TableError(
            f"The runtime torch cannot execute {self.proto.op_type}: {why}.",
            remedy="use the runtime onnxruntime, or add the operator to nas/latency/runtimes/onnx_to_torch.py",
        )


def _function(target: Callable[..., Any]) -> Callable[[Node], Call]:
    """All inputs go to ``target`` as they are."""
    return lambda n: (target, tuple(n[i] for i in range(len(n.proto.input))), {})


def _arithmetic(target: Callable[..., Any]) -> Callable[[Node], Call]:
    """Two inputs, of which a constant scalar is a plain number."""
    return lambda n: (target, (n[0], n.number(1)), {})


def _padded(n: Node, dims: int) -> tuple[Any, Any]:
    """The input and torch's padding; padding that differs between the sides is a call of its own."""
    if n.attribute("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise n.refuse(f"auto_pad {n.attribute('auto_pad')}")
    pads = n.attribute("pads", [0] * 2 * dims)
    before, after = pads[:dims], pads[dims:]
    if before == after:
        return n[0], before
    sides = [side for pair in zip(reversed(before), reversed(after), strict=True) for side in pair]
    return n.writer.call(F.pad, n[0], sides), [0] * dims


def _conv(n: Node) -> Call:
    dims = len(n.shape()) - 2
    x, padding = _padded(n, dims)
    target = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
    stride, dilation = n.attribute("strides", [1] * dims), n.attribute("dilations", [1] * dims)
    return target, (x, n[1], n[2], stride, padding, dilation, n.attribute("group", 1)), {}


def _clip(n: Node) -> Call:
    low, high = n.constant(1), n.constant(2)
    return (F.relu6, (n[0],), {}) if (low, high) == (0.0, 6.0) else (torch.clamp, (n[0], low, high), {})


def _pool(target: Callable[..., Any]) -> Callable[[Node], Call]:
    def call(n: Node) -> Call:
        kernel = n.attribute("kernel_shape")
        before, after = np.split(np.array(n.attribute("pads", [0] * 2 * len(kernel))), 2)
        if (before != after).any() or n.attribute("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
            raise n.refuse("padding that differs between the sides")
        if n.attribute("dilations", [1] * len(kernel)) != [1] * len(kernel):
            raise n.refuse("dilations")
        options: dict[str, Any] = {"ceil_mode": bool(n.attribute("ceil_mode", 0))}
        if target is F.avg_pool2d:
            options["count_include_pad"] = bool(n.attribute("count_include_pad", 0))
        return target, (n[0], kernel, n.attribute("strides", [1] * len(kernel)), before.tolist()), options

    return call


def _resize(n: Node) -> Call:
    mode, how = n.attribute("mode", "nearest"), n.attribute("coordinate_transformation_mode", "half_pixel")
    names = {"linear": "bilinear", "cubic": "bicubic", "nearest": "nearest"}
    fits = how == "asymmetric" if mode == "nearest" else how in ("half_pixel", "pytorch_half_pixel", "align_corners")
    shape = n.shape()
    if len(shape) != 4 or not fits or (mode == "nearest" and n.attribute("nearest_mode") != "floor"):
        raise n.refuse(f"mode {mode} with {how} on {len(shape)} dimensions")
    if n.has(3):
        sizes = n.constant(3)
    else:
        # onnxruntime multiplies in single precision, and floors.
        sizes = [int(np.float32(side) * np.float32(s)) for side, s in zip(shape, n.constant(2), strict=True)]
    options: dict[str, Any] = {"size": sizes[2:], "mode": names[mode]}
    if mode != "nearest":
        options["align_corners"] = how == "align_corners"
    return F.interpolate, (n[0],), options


def _flatten(n: Node) -> Call:
    axis, shape = n.attribute("axis", 1), n.shape()
    return torch.reshape, (n[0], [int(np.prod(shape[:axis])), int(np.prod(shape[axis:]))]), {}


def _reshape(n: Node) -> Call:
    wanted = n.constant(1)
    if not n.attribute("allowzero", 0):
        wanted = [n.shape()[i] if side == 0 else side for i, side in enumerate(wanted)]
    return torch.reshape, (n[0], wanted), {}


def _gemm(n: Node) -> Call:
    a, b, alpha, beta = n[0], n[1], n.attribute("alpha", 1.0), n.attribute("beta", 1.0)
    if n.attribute("transA", 0):
        a = n.writer.call(torch.t, a)
    if n.attribute("transB", 0) and (alpha, beta) == (1.0, 1.0) and len(n.shape(2) if n.has(2) else [0]) == 1:
        return F.linear, (a, b, n[2]), {}
    if n.attribute("transB", 0):
        b = n.writer.call(torch.t, b)
    if n.has(2):
        return torch.addmm, (n[2], a, b), {"beta": beta, "alpha": alpha}
    product = n.writer.call(torch.matmul, a, b)
    return torch.mul, (product, alpha), {}


def _reduce(target: Callable[..., Any]) -> Callable[[Node], Call]:
    def call(n: Node) -> Call:
        axes = n.axes() or list(range(len(n.shape())))
        return target, (n[0],), {"dim": axes, "keepdim": bool(n.attribute("keepdims", 1))}

    return call


def _layer_norm(n: Node) -> Call:
    return F.layer_norm, (n[0], n.shape()[n.attribute("axis", -1) :], n[1], n[2], n.attribute("epsilon", 1e-5)), {}


def _batch_norm(n: Node) -> Call:
    return F.batch_norm, (n[0], n[3], n[4], n[1], n[2], False, 0.0, n.attribute("epsilon", 1e-5)), {}


def _slice(n: Node) -> Call:
    starts, ends = n.constant(1), n.constant(2)
    axes, steps = n.constant(3, list(range(len(starts)))), n.constant(4, [1] * len(starts))
    if min(steps) < 1:
        raise n.refuse("steps below 1")
    where = [slice(None)] * len(n.shape())
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        where[axis] = slice(start, end, step)
    return operator.getitem, (n[0], tuple(where)), {}


def _gather(n: Node) -> Call:
    axis = n.attribute("axis", 0) % len(n.shape())
    if isinstance(index := n.number(1), int):
        return torch.select, (n[0], axis, index), {}
    if axis == 0 and len(n.shape()) == 2 and n.proto.input[1] not in n.writer.constants:
        return F.embedding, (index, n[0]), {}
    return operator.getitem, (n[0], (*[slice(None)] * axis, index)), {}


def _split(n: Node) -> Call:
    axis, outputs = n.attribute("axis", 0), len(n.proto.output)
    side = n.shape()[axis]
    sizes = n.constant(1) if n.has(1) else n.attribute("split", -(-side // outputs))
    return torch.split, (n[0], sizes, axis), {}


def _unsqueeze(n: Node) -> Call:
    shape, axes = n.shape(), n.axes()
    rank = len(shape) + len(axes)
    sides, axes = iter(shape), {axis % rank for axis in axes}
    return torch.reshape, (n[0], [1 if i in axes else next(sides) for i in range(rank)]), {}


def _squeeze(n: Node) -> Call:
    shape, axes = n.shape(), n.axes()
    gone = {i for i, side in enumerate(shape) if side == 1} if axes is None else {a % len(shape) for a in axes}
    return torch.reshape, (n[0], [side for i, side in enumerate(shape) if i not in gone]), {}


def _gelu(n: Node) -> Call:
    return F.gelu, (n[0],), {"approximate": n.attribute("approximate", "none")}


def _cast(n: Node) -> Call:
    kind = torch.from_numpy(np.zeros(0, helper.tensor_dtype_to_np_dtype(n.attribute("to")))).dtype
    return torch.Tensor.to, (n[0], kind), {}


def _div(n: Node) -> Call:
    whole = not n.writer.values[n.proto.input[0]].is_floating_point()
    return torch.div, (n[0], n.number(1)), {"rounding_mode": "trunc"} if whole else {}


def _expand(n: Node) -> Call:
    return torch.broadcast_to, (n[0], list(np.broadcast_shapes(n.shape(), n.constant(1)))), {}


def _hard_sigmoid(n: Node) -> Call:
    alpha, beta = n.attribute("alpha", 0.2), n.attribute("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return F.hardsigmoid, (n[0],), {}
    line = n.writer.call(torch.add, n.writer.call(torch.mul, n[0], alpha), beta)
    return torch.clamp, (line, 0.0, 1.0), {}


def _along(target: Callable[..., Any]) -> Callable[[Node], Call]:
    return lambda n: (target, (n[0],), {"dim": n.attribute("axis", -1)})


OPERATORS: dict[str, Callable[[Node], Call]] = {
    "Add": _arithmetic(torch.add), "Sub": _arithmetic(torch.sub), "Mul": _arithmetic(torch.mul),
    "Div": _div, "Pow": _arithmetic(torch.pow), "Equal": _function(torch.eq),
    "Less": _function(torch.lt), "LessOrEqual": _function(torch.le), "Greater": _function(torch.gt),
    "GreaterOrEqual": _function(torch.ge), "And": _function(torch.logical_and), "Not": _function(torch.logical_not),
    "IsNaN": _function(torch.isnan), "CumSum": lambda n: (torch.cumsum, (n[0], n.constant(1)), {}),
    "MatMul": _function(torch.matmul), "Where": _function(torch.where), "Max": _function(torch.maximum),
    "Min": _function(torch.minimum),
    "Relu": _function(F.relu), "Sigmoid": _function(torch.sigmoid), "Tanh": _function(torch.tanh),
    "Erf": _function(torch.erf), "Sqrt": _function(torch.sqrt), "Exp": _function(torch.exp),
    "Neg": _function(torch.neg), "HardSwish": _function(F.hardswish), "Gelu": _gelu, "HardSigmoid": _hard_sigmoid,
    "LeakyRelu": lambda n: (F.leaky_relu, (n[0], n.attribute("alpha", 0.01)), {}),
    "Clip": _clip, "Softmax": _along(F.softmax), "LogSoftmax": _along(F.log_softmax),
    "Conv": _conv, "Gemm": _gemm, "LayerNormalization": _layer_norm, "BatchNormalization": _batch_norm,
    "MaxPool": _pool(F.max_pool2d), "AveragePool": _pool(F.avg_pool2d), "Resize": _resize,
    "GlobalAveragePool": lambda n: (F.adaptive_avg_pool2d, (n[0], 1), {}),
    "ReduceMean": _reduce(torch.mean), "ReduceSum": _reduce(torch.sum),
    "Flatten": _flatten, "Reshape": _reshape, "Squeeze": _squeeze, "Unsqueeze": _unsqueeze,
    "Transpose": lambda n: (torch.permute, (n[0], n.attribute("perm", list(range(len(n.shape())))[::-1])), {}),
    "Concat": lambda n: (torch.cat, ([n[i] for i in range(len(n.proto.input))],), {"dim": n.attribute("axis")}),
    "Expand": _expand, "Slice": _slice, "Gather": _gather, "Split": _split, "Cast": _cast,
}  # fmt: skip


def to_torch(model: onnx.ModelProto, inputs: dict[str, npt.NDArray[Any]]) -> fx.GraphModule:
    """The model as a module in evaluation mode, for tensors of exactly these shapes.

    Raises:
        TableError: the model is int8, or has an operator that is not translated.
    """
    if is_int8(model):
        raise TableError(
            "The runtime torch executes no int8: it would compute in float and round, which nobody deploys.",
            remedy="profile fp32 only, or use the runtime onnxruntime or openvino",
        )
    stored = {tensor.name for tensor in model.graph.initializer}
    decoding = set()
    for i, node in enumerate(model.graph.node):
        if node.input and stored.issuperset(node.input):  # weights that are stored packed
            decoding.add(i)
            stored.update(node.output)
    kinds = {node.op_type for i, node in enumerate(model.graph.node) if i not in decoding}
    if unknown := sorted(kinds - OPERATORS.keys() - {"Constant", "Shape", "ConstantOfShape", "Identity", "Dropout"}):
        raise TableError(
            f"The runtime torch has no translation of {', '.join(unknown)}.",
            remedy="use the runtime onnxruntime, or add the operator to nas/latency/runtimes/onnx_to_torch.py",
        )
    writer = _Writer(model.graph, inputs)
    opsets = {opset.domain: opset.version for opset in model.opset_import}
    with torch.inference_mode():
        for i, node in enumerate(model.graph.node):
            if i in decoding:
                writer.decode(node, opsets)
            else:
                writer.add(node)
    return writer.module([value.name for value in model.graph.output])


class _Writer:
    """The fx graph under construction, with the value that every tensor has for the given inputs."""

    def __init__(self, graph: onnx.GraphProto, inputs: dict[str, npt.NDArray[Any]]) -> None:
        self.graph, self.root = fx.Graph(), nn.Module()
        self.values = {name: torch.from_numpy(array) for name, array in inputs.items()}
        self.nodes = {name: self.graph.placeholder(f"x{i}") for i, name in enumerate(inputs)}
        self._examples: dict[fx.Node, Any] = {node: self.values[name] for name, node in self.nodes.items()}
        self.constants: set[str] = set()
        for tensor in graph.initializer:
            self._constant(tensor.name, torch.from_numpy(numpy_helper.to_array(tensor).copy()))

    def add(self, proto: onnx.NodeProto) -> None:
        """Translate one node."""
        node, name = Node(proto, self), proto.output[0]
        if proto.op_type == "Constant":
            self._constant(name, _constant_value(node))
        elif proto.op_type == "Shape":
            self._constant(name, torch.tensor(node.shape()[node.attribute("start", 0) : node.attribute("end")]))
        elif proto.op_type == "ConstantOfShape":
            value = node.attribute("value")
            fill = numpy_helper.to_array(value).item() if value is not None else 0.0
            self._constant(name, torch.full(node.constant(0), fill))
        elif proto.op_type in ("Identity", "Dropout"):
            self._alias(name, proto.input[0])
        else:
            self._call(node)

    def decode(self, proto: onnx.NodeProto, opsets: dict[str, int]) -> None:
        """Compute a node of stored values alone by ONNX's reference, which knows every operator."""
        given = {name: self.values[name].numpy() for name in proto.input}
        for name, value in zip(proto.output, ReferenceEvaluator(proto, opsets=opsets).run(None, given), strict=True):
            self._constant(name, torch.from_numpy(np.array(value)))

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A call in the graph, made once with the values that its arguments have."""
        node = self.graph.call_function(target, args, kwargs)
        self._examples[node] = target(
            *fx.map_arg(args, self._examples.__getitem__), **fx.map_arg(kwargs, self._examples.__getitem__)
        )
        return node

    def tensor(self, name: str) -> fx.Node:
        """The graph's node of a tensor; a constant becomes a buffer when it is first used as one."""
        if name not in self.nodes:
            buffer = f"c{len(self.nodes)}"
            self.root.register_buffer(buffer, self.values[name])
            self.nodes[name] = self.graph.get_attr(buffer)
            self._examples[self.nodes[name]] = self.values[name]
        return self.nodes[name]

    def module(self, outputs: list[str]) -> fx.GraphModule:
        """The finished module, which returns a tuple."""
        self.graph.output(tuple(self.tensor(name) for name in outputs))
        self.graph.eliminate_dead_code()
        return fx.GraphModule(self.root, self.graph).eval()

    def _call(self, node: Node) -> None:
        proto = node.proto
        try:
            target, args, kwargs = OPERATORS[proto.op_type](node)
            result = self.call(target, *args, **kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError) as error:
            raise node.refuse(str(error).partition("\n")[0]) from error
        several = isinstance(self._examples[result], tuple)
        for i, name in enumerate(proto.output):
            if name:
                self._keep(name, self.call(operator.getitem, result, i) if several else result, node)

    def _keep(self, name: str, result: fx.Node, node: Node) -> None:
        value = self._examples[result]
        if all(not i or i in self.constants for i in node.proto.input):
            self._constant(name, value)  # the call itself is dead code
        else:
            self.values[name], self.nodes[name] = value, result

    def _constant(self, name: str, value: torch.Tensor) -> None:
        self.values[name] = value
        self.constants.add(name)

    def _alias(self, name: str, of: str) -> None:
        if of in self.constants:
            self._constant(name, self.values[of])
        else:
            self.values[name], self.nodes[name] = self.values[of], self.nodes[of]


def _constant_value(node: Node) -> torch.Tensor:
    for name, value in node.attributes.items():
        if name == "value":
            return torch.from_numpy(numpy_helper.to_array(value).copy())
        if name in ("value_float", "value_floats", "value_int", "value_ints"):
            return torch.tensor(value)
    raise node.refuse(f"a constant of {', '.join(node.attributes)}")
