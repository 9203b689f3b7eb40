"""Parts of a derived space: clusters of a traced model at given sizes, described, counted, and exported to be timed.

What is timed is made by the very functions that make the student: the cluster is cut out of the model, compressed by
the same passes, and exported by the same exporter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import fx, nn

from nas.compression import apply_passes, restore, rewrite_onnx
from nas.compression.base import Plan
from nas.compression.fold import fold_batchnorm
from nas.derived.clusters import FOLDED, Cluster, Clustered
from nas.parts import Part, Shape
from nas.student.export import export_fixed
from nas.tracing.axes import flat
from nas.tracing.dims import Dim, Var
from nas.tracing.layers import is_depthwise
from nas.tracing.shrink import shrunk
from nas.tracing.trace import is_constant, opname

Sizes = Mapping[Var, int]
ACTIVATION_SCALE = 6.0 / 255
CALIBRATION_SEED = 0


@dataclass(frozen=True)
class Segment(Part):
    """A cluster at given sizes.

    Attributes:
        text: operators and sizes, as they stand in the key.
        more: shapes of further inputs, without the batch.
        results: shapes of the outputs.
        work: MACs and deployed parameters of one copy.
        stored: bytes of one copy's weights, as the file holds them.
        writer: batch → a runnable model with the weights that the traced model has.
    """

    text: str = ""
    more: tuple[Shape, ...] = ()
    results: tuple[Shape, ...] = ()
    work: tuple[int, int] = (0, 0)
    stored: int = 0
    writer: Callable[[int], onnx.ModelProto] | None = field(default=None, compare=False, repr=False)

    @cached_property
    def key(self) -> str:
        """Latency-table key; equal keys are equal work, whatever the count."""
        shapes = "+".join("x".join(map(str, shape)) or "1" for shape in (self.shape, *self.more))
        return f"{self.precision} {shapes} {self.text}"

    @cached_property
    def out_shape(self) -> Shape:
        """Shape of the first output, without the batch."""
        return self.results[0]

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates of all copies, one sample."""
        return self.count * self.work[0]

    @cached_property
    def params(self) -> int:
        """Deployed parameters of all copies."""
        return self.count * self.work[1]

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of the stored parameters of all copies."""
        return self.count * self.stored

    @cached_property
    def traffic(self) -> int:
        """Elements that one copy reads from and hands to its neighbours, one sample."""
        return sum(math.prod(shape) for shape in (self.shape, *self.more, *self.results))

    def peak_bytes(self, batch: int = 1) -> int:
        """Bytes of inputs and outputs together: what surely lives at one time."""
        return batch * self.traffic * (1 if self.precision == "int8" else 4)

    def to_onnx(self, batch: int = 1) -> onnx.ModelProto:
        """A runnable model of one copy."""
        if self.writer is None:
            raise AssertionError("a segment without its model")
        return self.writer(batch)


def segment(structure: Clustered, cluster: Cluster, sizes: Sizes, plan: Plan, precision: str, bits: int) -> Segment:
    """The part of ``cluster`` where the variables have ``sizes``.

    Args:
        plan: passes and settings of the cluster's own layer.
        precision: ``int8`` where what flows through it is integers.
        bits: of the stored weights.
    """
    single = {**sizes, structure.axes.batch: 1}
    shapes = [_shape(structure, node, single) for node in cluster.inputs]
    macs, params = _counts(structure, cluster, single, plan)
    return Segment(
        (), shapes[0] if shapes else (), precision,
        text=_text(structure, cluster, single, plan, bits),
        more=tuple(shapes[1:]),
        results=tuple(_shape(structure, node, single) for node in cluster.outputs),
        work=(macs, params),
        stored=params * bits // 8,
        writer=partial(piece_onnx, structure, cluster, dict(sizes), plan, precision),
    )  # fmt: skip


def _shape(structure: Clustered, node: fx.Node, single: Sizes) -> Shape:
    """Shape for one sample, without axes of the batch alone."""
    batch = structure.axes.batch
    dims: list[Dim] = structure.axes.of[node]
    return tuple(dim.sized(single) for dim in dims if dim.terms != ((batch,),))


# ---- what it is called ------------------------------------------------------------------------------


def _text(structure: Clustered, cluster: Cluster, single: Sizes, plan: Plan, bits: int) -> str:
    places = {node: f"i{i}" for i, node in enumerate(cluster.inputs)}
    words, before = [], cluster.inputs[0] if cluster.inputs else None
    for i, node in enumerate(cluster.nodes):
        layer = structure.layer(node)
        reads = [n for n in node.all_input_nodes if n in places]
        wires = "" if reads == [before] else f"({','.join(places[n] for n in reads)})"
        places[node] = f"n{i}"
        before = node
        if isinstance(layer, FOLDED) and not (isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) and i == 0):
            continue  # nothing of it is left
        words.append(_word(structure, node, layer, single) + wires)
    rank = plan.get("low_rank", {}).get(cluster.layer)
    if rank is not None:
        words.append(f"rank{rank}")
    if bits < 8:
        words.append(f"w{bits}")
    return " ".join(words)


def _word(structure: Clustered, node: fx.Node, layer: nn.Module | None, single: Sizes) -> str:
    if isinstance(layer, nn.Conv2d | nn.Conv1d):
        out = structure.axes.layers[str(node.target)][1].sized(single)
        depthwise = is_depthwise(layer)
        kind = "dw" if depthwise else "conv"
        groups = f"g{layer.groups}" if layer.groups > 1 and not depthwise else ""
        dilation = f"d{_numbers(layer.dilation)}" if max(layer.dilation) > 1 else ""
        stride = f"s{_numbers(layer.stride)}" if max(layer.stride) > 1 else ""
        padding = layer.padding if isinstance(layer.padding, str) else _numbers(layer.padding)
        return f"{kind}{out}k{_numbers(layer.kernel_size)}{stride}p{padding}{dilation}{groups}"
    if isinstance(layer, nn.Linear):
        return f"linear{structure.axes.layers[str(node.target)][1].sized(single)}"
    if isinstance(layer, nn.Embedding):
        return f"embed{layer.num_embeddings}x{structure.axes.layers[str(node.target)][1].sized(single)}"
    if layer is not None:
        return type(layer).__name__.lower() + _settings(layer)
    name = opname(node) or getattr(node.target, "__name__", str(node.target))
    numbers = [n for arg in node.args[1:] for n in _integers(arg)]
    dims = structure.axes.of[node]
    if name in SHAPED:
        numbers = [d.sized(single) for d in flat(dims)]
    return name + ",".join(map(str, numbers))


SHAPED = ("reshape", "view", "_unsafe_view", "expand", "unflatten", "split", "split_with_sizes", "layer_norm")


def _numbers(sides: Any) -> str:
    sides = sides if isinstance(sides, tuple) else (sides,)
    return str(sides[0]) if len(set(sides)) == 1 else "x".join(map(str, sides))


def _settings(layer: nn.Module) -> str:
    found = [
        _numbers(getattr(layer, name)) for name in ("kernel_size", "stride", "padding", "output_size")
        if isinstance(getattr(layer, name, None), int | tuple)
    ]  # fmt: skip
    return "x".join(found)


def _integers(value: Any) -> list[int]:
    if isinstance(value, bool) or not isinstance(value, int | list | tuple):
        return []
    return [value] if isinstance(value, int) else [n for item in value for n in _integers(item)]


# ---- what it costs on paper ---------------------------------------------------------------------------


def _counts(structure: Clustered, cluster: Cluster, single: Sizes, plan: Plan) -> tuple[int, int]:
    """MACs of a sample and deployed parameters, counted as :func:`nas.student.export.onnx_macs_params` does."""
    macs = params = 0
    for node in cluster.nodes:
        more = layer_counts(structure, node, single, plan) or _operator_counts(structure, node, single)
        macs, params = macs + more[0], params + more[1]
    return macs, params


def layer_counts(structure: Clustered, node: fx.Node, single: Sizes, plan: Plan) -> tuple[int, int] | None:
    """MACs of a sample and deployed parameters of a layer; nothing where a node calls none that has any."""
    layer, path = structure.layer(node), str(node.target)
    if isinstance(layer, nn.Conv2d | nn.Conv1d | nn.Linear):
        x, out = (dim.sized(single) for dim in structure.axes.layers[path])
        has_bias = layer.bias is not None or _is_normalised(structure, node)
        shape = [dim.sized(single) for dim in structure.axes.of[node]]
        places = math.prod(shape) // out
        fan_in, taps = (x, 1)
        if not isinstance(layer, nn.Linear):
            taps = math.prod(layer.kernel_size)
            fan_in = 1 if is_depthwise(layer) else x // layer.groups
        rank = plan.get("low_rank", {}).get(path)
        weights = out * fan_in * taps if rank is None else rank * (fan_in * taps + out)
        return places * weights, weights + (out if has_bias else 0)
    if isinstance(layer, nn.Embedding):
        return 0, layer.num_embeddings * structure.axes.layers[path][1].sized(single)
    if isinstance(layer, nn.LayerNorm):
        size = (
            structure.axes.layers[path][0].sized(single)
            if path in structure.axes.layers
            else math.prod(layer.normalized_shape)
        )
        return 0, size * 2
    if isinstance(layer, nn.GroupNorm) and layer.affine:
        return 0, layer.num_channels  # its offset is an addition of its own
    return None


def _is_normalised(structure: Clustered, node: fx.Node) -> bool:
    """Whether a batch normalisation follows alone, which leaves its shift as the layer's bias."""
    users = list(node.users)
    return (
        len(users) == 1 and isinstance(structure.layer(node), nn.Conv2d)
        and isinstance(structure.layer(users[0]), nn.BatchNorm2d)
    )  # fmt: skip


def _operator_counts(structure: Clustered, node: fx.Node, single: Sizes) -> tuple[int, int]:
    name = opname(node)

    def size(n: fx.Node, axis: int | None = None) -> int:
        dims = structure.axes.of[n]
        return math.prod(d.sized(single) for d in dims) if axis is None else dims[axis].sized(single)

    stored = sum(size(n) for n in node.all_input_nodes if is_constant(n))
    if name in ("matmul", "bmm", "mm"):
        return size(node) * size(node.args[0], -1), stored  # type: ignore[arg-type]
    if name == "scaled_dot_product_attention":
        q, k = node.args[:2]
        rows = size(q) // size(q, -1)  # type: ignore[arg-type]
        return rows * size(k, -2) * (size(q, -1) + size(node, -1)), stored  # type: ignore[arg-type]
    return 0, stored if name in ("add", "layer_norm") else 0


# ---- what is timed -----------------------------------------------------------------------------------


def piece_onnx(
    structure: Clustered, cluster: Cluster, sizes: Sizes, plan: Plan, precision: str, batch: int
) -> onnx.ModelProto:
    """The cluster as a model of its own for ``batch`` samples; integers in and out where it is int8."""
    chosen = {variable: torch.arange(size) for variable, size in sizes.items()}
    module: nn.Module = shrunk(structure.axes, chosen, outputs=cluster.outputs, inputs=cluster.inputs)
    generator = torch.Generator().manual_seed(CALIBRATION_SEED)
    whole = {**sizes, structure.axes.batch: batch}
    samples = tuple(_sample(structure, node, whole, generator) for node in cluster.inputs)
    if plan:
        module = apply_passes(module, plan, samples[0])
        module = restore(module.eval(), plan)
    exported = export_fixed(fold_batchnorm(module).eval(), samples)
    if plan:
        exported = rewrite_onnx(exported, plan, samples[0].numpy())
    if precision == "int8" and not isinstance(structure.modules.get(cluster.layer), nn.Linear):
        exported = _integer_ends(exported) if cluster.layer else _in_integers(exported)
    _free_batch(exported, structure, cluster)
    onnx.checker.check_model(exported)
    return exported


def _free_batch(model: onnx.ModelProto, structure: Clustered, cluster: Cluster) -> None:
    """Batches of any size, as the whole network takes them: the runtime fuses more where it knows the size."""
    values = (*model.graph.input, *model.graph.output)
    for value, node in zip(values, (*cluster.inputs, *cluster.outputs), strict=True):
        for axis, dim in enumerate(structure.axes.of[node]):
            if dim.terms == ((structure.axes.batch,),):
                value.type.tensor_type.shape.dim[axis].dim_param = "batch"


def _sample(structure: Clustered, node: fx.Node, sizes: Sizes, generator: torch.Generator) -> torch.Tensor:
    shape = [dim.sized(sizes) for dim in structure.axes.of[node]]
    dtype = node.meta["val"].dtype
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator)
    return torch.zeros(shape, dtype=dtype)


def _integer_ends(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without the quantisation of the input and the dequantisation of the output, which are the neighbours'."""
    graph = model.graph
    first = next(node for node in graph.node if graph.input[0].name in node.input)
    if first.op_type == "QuantizeLinear":
        graph.input[0].name = first.output[0]
        graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.UINT8
        graph.node.remove(first)
    last = next(node for node in graph.node if graph.output[0].name in node.output)
    if last.op_type == "DequantizeLinear":
        graph.output[0].name = last.input[0]
        graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.UINT8
        graph.node.remove(last)
    del graph.value_info[:]
    return model


def _in_integers(model: onnx.ModelProto) -> onnx.ModelProto:
    """Additions and poolings between quantisations; a ReLU is the quantisation itself."""
    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(np.array(ACTIVATION_SCALE, np.float32), "scale"))
    graph.initializer.append(numpy_helper.from_array(np.array(0, np.uint8), "zero"))
    renamed: dict[str, str] = {}
    kept = []
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
        if node.op_type in ("Relu", "Clip"):
            renamed[node.output[0]] = node.input[0]
        else:
            kept.append(node)
    result = renamed.get(graph.output[0].name, graph.output[0].name)
    before = []
    for value in graph.input:
        before.append(helper.make_node("DequantizeLinear", [value.name, "scale", "zero"], [f"{value.name}_float"]))
        value.type.tensor_type.elem_type = onnx.TensorProto.UINT8
        for node in kept:
            for i, name in enumerate(node.input):
                if name == value.name:
                    node.input[i] = f"{value.name}_float"
    if result in {value.name for value in graph.input}:
        result = f"{result}_float"  # a ReLU alone
    after = helper.make_node("QuantizeLinear", [result, "scale", "zero"], ["quantized"])
    del graph.node[:]
    graph.node.extend([*before, *kept, after])
    graph.output[0].name = "quantized"
    graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.UINT8
    del graph.value_info[:]
    return model
