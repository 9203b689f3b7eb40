"""From a trained module to the ONNX file that runs: plain layers, any batch size, the passes' rewrites."""

from __future__ import annotations

import copy
import io
import json
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from nas.compression import restore, rewrite_onnx
from nas.compression.base import Plan
from nas.compression.fake_quant import REMARKS
from nas.compression.fold import fold_batchnorm
from nas.errors import StudentError
from nas.parts import OPSET, resize_scales

INPUT, OUTPUT = "input", "logits"
AGREE = 1e-2  # of the largest output: what two runtimes may differ by
MULTIPLYING = ("Conv", "Gemm", "MatMul", "MatMulInteger")
WEIGHTED = (*MULTIPLYING, "LayerNormalization", "Add")


def deployable(model: nn.Module, plan: Plan) -> nn.Module:
    """A float copy in evaluation mode with plain layers: helpers removed, normalisation folded."""
    plain = restore(copy.deepcopy(model).eval(), plan)
    return fold_batchnorm(plain).eval()


def to_onnx(model: nn.Module, plan: Plan, sample: torch.Tensor, calibration: npt.NDArray[Any]) -> onnx.ModelProto:
    """Export a trained (still simulating) module with all of its compression.

    Args:
        model: as trained, with the passes of ``plan`` applied.
        sample: raw inputs ``[n, *input_shape]`` that fix the shapes.
        calibration: raw training inputs for activation ranges.
    """
    exported = export_float(deployable(model, plan), sample[:1])
    return compact(rewrite_onnx(exported, plan, calibration))


def compact(model: onnx.ModelProto) -> onnx.ModelProto:
    """Leave out of the file what a runtime does not need: shapes in between, zero points of zero, long names.

    In a small model these weigh more than its weights. Weights, biases and the nodes that read them keep their names.
    """
    graph = model.graph
    zeros = {
        t.name for t in graph.initializer
        if t.data_type in (TensorProto.INT8, TensorProto.INT32) and not numpy_helper.to_array(t).any()
    }  # fmt: skip
    convolved = {name for node in graph.node if node.op_type == "Conv" for name in node.input}
    for node in graph.node:
        # A missing one means zero. Products of matrices are fused only where it is there.
        if node.op_type == "DequantizeLinear" and node.output[0] in convolved and zeros.issuperset(node.input[2:]):
            del node.input[2:]
    read = {name for node in graph.node for name in node.input}
    tensors = [t for t in graph.initializer if t.name in read]
    del graph.initializer[:], graph.value_info[:]
    graph.initializer.extend(tensors)
    ends = {value.name for value in (*graph.input, *graph.output)}
    made = {t.name for t in graph.initializer}.union(*(node.output for node in graph.node))
    kept = ends | {name for name in made if name.rpartition(".")[2].removesuffix("_quantized") in ("weight", "bias")}
    names = {"": ""} | {name: name for name in sorted(kept)}
    for tensor in graph.initializer:
        tensor.name = names.setdefault(tensor.name, f"c{len(names)}")
    for node in graph.node:
        if node.op_type not in WEIGHTED:
            node.name = ""
        for slots in (node.input, node.output):
            slots[:] = [names.setdefault(name, f"t{len(names)}") for name in slots]
    return model


def export_float(model: nn.Module, sample: torch.Tensor) -> onnx.ModelProto:
    """Plain export of a float module, with a free batch dimension.

    Args:
        model: one raw input → one output.
        sample: raw inputs ``[n, *input_shape]`` of the type that the model takes; they fix the shapes.

    Raises:
        StudentError: the exporter cannot express the model.
    """
    exported = free_batch(_traced(model, (sample,), {}))
    if _keeps_batch(exported, len(sample)) or not _takes(exported, model, torch.cat([sample, sample[:1].flip(-1)])):
        # Somebody wrote the number of samples into a shape: x.view(x.shape[0], …). Then shapes must be computed.
        axes = {INPUT: {0: "batch"}, OUTPUT: {0: "batch"}}
        exported = free_batch(_constant_shapes(_traced(model, (sample,), axes), sample))
    return exported


def export_fixed(model: nn.Module, samples: tuple[torch.Tensor, ...]) -> onnx.ModelProto:
    """Plain export of a float module for inputs of exactly these shapes; the first is called ``input``."""
    exported = _traced(model, samples, {})
    _drop_dead_nodes(exported)
    _unshare_initializers(exported)
    return exported


def _traced(
    model: nn.Module, samples: tuple[torch.Tensor, ...], axes: dict[str, dict[int, str]]
) -> onnx.ModelProto:
    buffer: Any = io.BytesIO()
    with warnings.catch_warnings():
        # The TorchScript exporter is deprecated but takes well under a second where its successor takes 4 to 11.
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                model.eval(), samples, buffer, dynamo=False, opset_version=OPSET,
                input_names=[INPUT, *(f"{INPUT}{i}" for i in range(1, len(samples)))], output_names=[OUTPUT],
                dynamic_axes=axes,
            )  # fmt: skip
        except torch.onnx.OnnxExporterError as error:
            raise StudentError(
                f"The model cannot be exported to ONNX: {str(error).splitlines()[0]}",
                remedy="write what it names with other operators",
            ) from error
    exported = onnx.load_from_string(buffer.getvalue())
    _unmerge(exported)
    _drop_dead_nodes(exported)  # so that no name is taken by what nothing reads
    _name_linear_weights(exported, model)
    _pass_on_remarks(exported, model)
    return exported


def _pass_on_remarks(exported: onnx.ModelProto, model: nn.Module) -> None:
    """What restored layers remember of their training and the graph cannot say, for the rewrite to take out again."""
    remarks = {name: vars(layer)[REMARKS] for name, layer in model.named_modules() if vars(layer).get(REMARKS)}
    if remarks:
        onnx.helper.set_model_props(exported, {REMARKS: json.dumps(remarks)})


def _keeps_batch(model: onnx.ModelProto, batch: int) -> bool:
    """Whether some shape in a graph with a free batch may be that of ``batch`` samples, whatever comes in.

    Told by the shapes that follow for another batch: they contradict each other, a reshape of more values has as many
    rows as before, or something is gathered by position. A false alarm costs a few operators on shapes.
    """
    try:
        before, after = (_shapes_of_batch(model, size) for size in (batch, batch + 1))
    except onnx.shape_inference.InferenceError:
        return True
    for node in model.graph.node:
        if node.op_type == "GatherElements":
            return True
        if node.op_type == "Reshape":
            source, result = node.input[0], node.output[0]
            if before.get(source) != after.get(source) and before.get(result, [0])[:1] == after.get(result, [0])[:1]:
                return True
    return any(after.get(value.name, [])[:1] != [batch + 1] for value in model.graph.output)


def _takes(model: onnx.ModelProto, module: nn.Module, x: torch.Tensor) -> bool:
    """Whether a graph gives every sample its own row: what was counted or repeated for a batch may be stored for it."""
    try:
        (result,) = _values(model, [model.graph.output[0].name], x.numpy()).values()
    except Exception:  # the runtime's own errors have no common base
        return False
    with torch.no_grad():
        wanted = module.eval()(x).numpy()
    return result.shape == wanted.shape and bool(np.abs(result - wanted).max() <= AGREE * np.abs(wanted).max())


def _shapes_of_batch(model: onnx.ModelProto, batch: int) -> dict[str, list[int]]:
    sized = onnx.ModelProto()
    sized.CopyFrom(model)
    for value in sized.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = batch
    for value in sized.graph.output:
        value.type.tensor_type.shape.dim[0].ClearField("value")
    return _shapes(sized, strict=True)


def _constant_shapes(model: onnx.ModelProto, sample: torch.Tensor) -> onnx.ModelProto:
    """What is computed from the shape of the input becomes constant: found by running two batches.

    Values that are the same for both are stored, and a reshape of which one side differs leaves that to be inferred.
    Operators on shapes are no work, but each costs a call, and none of them is in the parts that a table prices.
    """
    moving = {value.name for value in model.graph.input}
    fixed: list[str] = []
    for node in model.graph.node:
        stored = node.op_type == "DequantizeLinear"  # a weight in codes, no shape
        if stored or (node.op_type not in ("Shape", "Size") and moving.intersection(node.input)):
            moving.update(node.output)
        elif node.op_type not in ("Constant", "Identity"):  # Identity: of weights that layers share
            fixed.extend(node.output)
    if not fixed:
        return model
    reshaped = [node.output[0] for node in model.graph.node if node.op_type == "Reshape"]
    one = sample[:1].numpy()
    small, large = (_values(model, [*fixed, *reshaped], np.concatenate([one] * n)) for n in (2, 3))
    same = {name for name in fixed if np.array_equal(small[name], large[name])}
    model.graph.initializer.extend(numpy_helper.from_array(small[name], name) for name in fixed if name in same)
    kept = [node for node in model.graph.node if not same.intersection(node.output)]
    for node in kept:
        name = node.output[0]
        if node.op_type == "Reshape" and node.input[1] in fixed and node.input[1] not in same:
            shape = np.array(small[name].shape)
            shape[shape != large[name].shape] = -1
            if (shape < 0).sum() <= 1:
                model.graph.initializer.append(numpy_helper.from_array(shape, f"{name}_shape"))
                node.input[1] = f"{name}_shape"
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return model


def _values(model: onnx.ModelProto, names: list[str], x: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
    """Intermediate values of a graph for one input."""
    import onnxruntime as ort

    from nas.latency.sessions import session_options

    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = session_options(1)
    options.log_severity_level = 4  # what fails here is an answer, and no news
    session = ort.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(names, {probe.graph.input[0].name: x}), strict=True))


def _unmerge(model: onnx.ModelProto) -> None:
    """Equal tensors apart: the exporter merges them, and hands those on by an Identity that has the other's name."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    results = {value.name for value in model.graph.output}
    for node in list(model.graph.node):
        if node.op_type == "Identity" and node.input[0] in tensors and node.output[0] not in results:
            twin = model.graph.initializer.add()
            twin.CopyFrom(tensors[node.input[0]])
            twin.name = node.output[0]
            tensors[twin.name] = twin
            model.graph.node.remove(node)


def _name_linear_weights(exported: onnx.ModelProto, model: nn.Module) -> None:
    """Give the transposed weights of linear layers their names back; the exporter numbers them.

    That happens where a layer becomes a MatMul: without a bias, or on more than two dimensions. Layers of equal weights
    get their names in the order in which they come.
    """
    names: dict[bytes, list[str]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            names.setdefault(layer.weight.detach().t().contiguous().numpy().tobytes(), []).append(f"{name}.weight")
    graph = exported.graph
    numbered = {tensor.name: tensor for tensor in graph.initializer if tensor.name.startswith("onnx::MatMul")}
    taken = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        for i, name in enumerate(node.input):
            own = names.get(numpy_helper.to_array(numbered[name]).tobytes(), []) if name in numbered else []
            free = [wanted for wanted in own if wanted not in taken]
            if free:
                named = graph.initializer.add()
                named.CopyFrom(numbered[name])
                named.name = node.input[i] = free[0]
                taken.add(free[0])
    read = {name for node in graph.node for name in node.input}
    for name, tensor in numbered.items():
        if name not in read:
            graph.initializer.remove(tensor)


def free_batch(model: onnx.ModelProto) -> onnx.ModelProto:
    """Make the first dimension symbolic; a Resize becomes one by constant scales, which know no batch."""
    shapes = _shapes(model)
    for node in model.graph.node:
        if node.op_type == "Resize":
            scales = resize_scales(tuple(shapes[node.input[0]][1:]), tuple(shapes[node.output[0]][2:]))  # type: ignore[arg-type]
            name = f"{node.name}_scales"
            model.graph.initializer.append(numpy_helper.from_array(scales, name))
            del node.input[1:]
            node.input.extend(["", name])
    _drop_dead_nodes(model)
    _unshare_initializers(model)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    del model.graph.value_info[:]
    return model


def _unshare_initializers(model: onnx.ModelProto) -> None:
    """Give every reader its own copy: shared ones do not fuse in int8."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    read: set[str] = set()
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name in tensors and name in read:
                twin = model.graph.initializer.add()
                twin.CopyFrom(tensors[name])
                twin.name = node.input[i] = f"{node.name}_{name}"
            read.add(name)


def _drop_dead_nodes(model: onnx.ModelProto) -> None:
    """Drop nodes and stored tensors that nothing reads."""
    alive = {value.name for value in model.graph.output}
    kept = []
    for node in reversed(model.graph.node):
        if alive.intersection(node.output):
            alive.update(_read(node))
            kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(kept))
    stored = [tensor for tensor in model.graph.initializer if tensor.name in alive]
    if len(stored) < len(model.graph.initializer):
        del model.graph.initializer[:]
        model.graph.initializer.extend(stored)


def _read(node: onnx.NodeProto) -> set[str]:
    """What a node reads, also inside its branches."""
    graphs = [attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH]
    return {*node.input, *(name for graph in graphs for inner in graph.node for name in _read(inner))}


def _shapes(model: onnx.ModelProto, strict: bool = False) -> dict[str, list[int]]:
    """Name → sides of every value that has a known rank; 0 where a side is not known."""
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True, strict_mode=strict)
    graph = inferred.graph
    return {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*graph.value_info, *graph.input, *graph.output)
        if v.type.tensor_type.HasField("shape")
    }


def _whole(shape: list[int] | None) -> bool:
    return shape is not None and 0 not in shape


def onnx_macs_params(model: onnx.ModelProto) -> tuple[int, int]:
    """MACs of one sample and deployed parameters counted on the exported graph itself.

    MACs are those of convolutions and matrix products, attention's products of two activations among them. Parameters
    are their weights and biases, the scale and offset of layer normalisations, tensors that are added (a linear
    layer's bias stands in an addition of its own, and so do learnt positions), and tables that the input looks
    something up in, such as the embedding of tokens.
    """
    single = onnx.ModelProto()
    single.CopyFrom(model)
    for value in (*single.graph.input, *single.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    shapes = _shapes(single)
    counted = [node for node in model.graph.node if node.op_type in MULTIPLYING]
    names = {name for node in counted for name in (node.input[1], node.output[0])}
    if unknown := [name for name in names - {t.name for t in model.graph.initializer} if not _whole(shapes.get(name))]:
        # Shapes that are computed are known once the model has run.
        value = single.graph.input[0].type.tensor_type
        sides = [side.dim_value for side in value.shape.dim]
        found = _values(model, unknown, np.zeros(sides, onnx.helper.tensor_dtype_to_np_dtype(value.elem_type)))
        shapes |= {name: list(array.shape) for name, array in found.items()}
    sizes = {t.name: tuple(t.dims) for t in model.graph.initializer}
    constants = {name for node in model.graph.node if node.op_type == "Constant" for name in node.output}
    decoding = set()
    for i, node in enumerate(model.graph.node):
        # Weights may be scaled, merged or stored in few bits: what is computed from constants alone is one.
        if any(name in sizes for name in node.input) and constants.union(sizes, [""]).issuperset(node.input):
            decoding.add(i)
            sizes |= {name: tuple(shapes[name]) for name in node.output if name in shapes}
    macs = params = 0
    fed = {value.name for value in model.graph.input}
    for i, node in enumerate(model.graph.node):
        if fed.intersection(node.input):
            fed.update(node.output)
        if node.op_type == "Gather" and node.input[0] in sizes and node.input[1] in fed:
            params += int(np.prod(sizes[node.input[0]]))
        if i in decoding or node.op_type not in WEIGHTED:
            continue
        params += sum(int(np.prod(sizes[name])) for name in node.input if name in sizes)
        if node.op_type == "Conv":
            # The weight is repeated at every position.
            macs += int(np.prod(sizes[node.input[1]])) * int(np.prod(shapes[node.output[0]][2:]))
        elif node.op_type in ("Gemm", "MatMul", "MatMulInteger"):
            factor = sizes.get(node.input[1]) or shapes[node.input[1]]
            transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
            macs += int(np.prod(shapes[node.output[0]])) * factor[-1 if transposed else -2]
    return macs, params
