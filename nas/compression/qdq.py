"""Quantisation in ONNX: which nodes run in integers, and the operators, scales and codes that make them do so."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from nas.compression.fake_quant import REMARKS, Setting, weight_codes, weight_grid
from nas.compression.storage import Affine, Signed, decoded, store_codes
from nas.errors import CompressionError

FOLLOWERS = {"Add", "GlobalAveragePool", "AveragePool", "MaxPool", "Clip", "Relu"}
LINEAR = ("Gemm", "MatMul")
Ranges = Mapping[str, Mapping[str, tuple[float, float]]]  # layer → "input" or "output" → low, high


def take_ranges(model: onnx.ModelProto) -> Ranges:
    """The activation ranges that the exported layers were trained with, which the model carries no further."""
    found: Ranges = json.loads(_take_property(model, REMARKS) or "{}")
    return found


def _take_property(model: onnx.ModelProto, key: str) -> str:
    """Remove a property of the model and return its value, "" where there is none."""
    found = next((entry for entry in model.metadata_props if entry.key == key), None)
    if found is None:
        return ""
    value = str(found.value)
    model.metadata_props.remove(found)
    return value


def layer_nodes(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """Layer name → the convolution or product that reads its weight."""
    return {
        node.input[1].removesuffix(".weight"): node
        for node in model.graph.node
        if node.op_type in ("Conv", *LINEAR) and node.input[1].endswith(".weight")
    }


def pieces_of(model: onnx.ModelProto, name: str, technique: str = "quantize") -> list[str]:
    """``name`` itself, or the layers that an earlier pass split it into.

    Raises:
        CompressionError: no node carries such weights.
    """
    layers = layer_nodes(model)
    found = [name] if name in layers else [layer for layer in layers if layer.rpartition(".")[0] == name]
    if not found:
        raise CompressionError(f"{technique}: no exported node carries the weights of [{name!r}].")
    return found


def quantized_nodes(model: onnx.ModelProto, layers: Collection[str]) -> list[str]:
    """Names of the nodes that run in int8: the named layers' own and those that only pass their result on.

    A layer is found by the name of its weight. An addition or pooling takes the precision of the input that
    was computed last, which in a residual block is the block's own projection. A linear layer passes nothing on.
    """
    producers = {out: i for i, node in enumerate(model.graph.node) if node.op_type != "Constant" for out in node.output}
    quantized: dict[int, bool] = {}
    for i, node in enumerate(model.graph.node):
        weight = node.input[1] if len(node.input) > 1 else ""
        if node.op_type in ("Conv", *LINEAR):
            quantized[i] = weight.removesuffix(".weight") in layers
        elif node.op_type in FOLLOWERS:
            sources = [producers[x] for x in node.input if x in producers]
            last = max(sources, default=-1)
            quantized[i] = quantized.get(last, False) and model.graph.node[last].op_type not in LINEAR
    names = [node.name for i, node in enumerate(model.graph.node) if quantized.get(i)]
    weights = {
        n.input[1].removesuffix(".weight")
        for i, n in enumerate(model.graph.node)
        if quantized.get(i) and len(n.input) > 1
    }
    if missing := set(layers) - weights:
        raise CompressionError(f"quantize: no exported node carries the weights of {sorted(missing)}.")
    return names


# ---- codes of weights --------------------------------------------------------------------------------


class Codes:
    """Codes of one exported weight on the grid that training used.

    Attributes:
        codes: uint8, of the weight's shape, 0 .. 2^bits - 1.
        scale, zero: float32 ``[out]``; a value is ``(code - zero) * scale``.
        axis: the dimension of the output channels.
    """

    def __init__(self, model: onnx.ModelProto, node: onnx.NodeProto, setting: Setting) -> None:
        tensor = initializer(model, node.input[1])
        transposed = any(a.name == "transB" and a.i for a in node.attribute)
        self.axis = 0 if node.op_type == "Conv" or transposed else 1
        weight = torch.from_numpy(numpy_helper.to_array(tensor).copy()).movedim(self.axis, 0)
        grid = weight_grid(weight, setting)
        codes = (weight_codes(weight, grid) - grid.low).movedim(0, self.axis)
        self.codes = np.ascontiguousarray(codes.numpy().astype(np.uint8))
        self.scale, self.zero = grid.scale.numpy(), (grid.zero - grid.low).numpy()

    def affine(self) -> Affine:
        """How they become floats."""
        return Affine(self.scale, self.zero, self.axis)

    def signed(self) -> Signed:
        """How they become int8."""
        return Signed(self.zero, self.axis)


def initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    """The initializer called ``name``, which has to exist."""
    return next(t for t in model.graph.initializer if t.name == name)


def store_weights(model: onnx.ModelProto, settings: Mapping[str, Setting]) -> None:
    """Weights only: the named layers go on in floats, their weights are stored as codes; in place."""
    layers = layer_nodes(model)
    for name, setting in settings.items():
        codes = Codes(model, layers[name], setting)
        store_codes(model, layers[name].input[1], codes.codes, setting.weights, codes.affine())


# ---- static ------------------------------------------------------------------------------------------


def to_integers(
    model: onnx.ModelProto, settings: Mapping[str, Setting], ranges: Ranges, calibration: npt.NDArray[np.float32]
) -> onnx.ModelProto:
    """QuantizeLinear/DequantizeLinear around the named layers, with the ranges that training simulated.

    What training does not simulate, such as the sum at the end of a residual block, is calibrated.
    """
    layers = layer_nodes(model)
    nodes = quantized_nodes(model, settings)
    overrides: dict[str, list[dict[str, Any]]] = {}
    stored: dict[str, Codes] = {}
    for kind in ("input", "output"):  # a tensor with both has the range of the layer that makes it
        for name in settings:
            if kind in ranges.get(name, {}):
                scale, zero = activation_grid(ranges[name][kind], 8)
                overrides[getattr(layers[name], kind)[0]] = [{"scale": scale, "zero_point": zero}]
    for name, setting in settings.items():
        if setting.weights < 8:
            tensor = initializer(model, layers[name].input[1])
            stored[name] = codes = Codes(model, layers[name], setting)
            tensor.CopyFrom(numpy_helper.from_array(decoded(codes.codes, codes.affine()), tensor.name))
            overrides[tensor.name] = [
                {"axis": codes.axis, "scale": scale, "zero_point": np.array(0, np.int8)} for scale in codes.scale
            ]
    biases = {
        name: numpy_helper.to_array(initializer(model, node.input[2]))
        for name, node in layers.items() if name in settings and len(node.input) > 2
    }  # fmt: skip
    made = {layers[name].output[0] for name in settings if "output" in ranges.get(name, {})}
    names = {name: layers[name].name for name in settings}
    model = quantize_static(model, nodes, calibration, overrides)
    by_name = {node.name: node for node in model.graph.node}
    producers = {out: node for node in model.graph.node for out in node.output}
    for name, codes in stored.items():
        tensor = initializer(model, producers[by_name[names[name]].input[1]].input[0])
        # Read back: the quantiser widens the scale of a channel whose bias would not fit int32.
        shape = [-1 if i == codes.axis else 1 for i in range(len(tensor.dims))]
        values = numpy_helper.to_array(tensor).astype(np.int16) + codes.zero.reshape(shape).astype(np.int16)
        store_codes(model, tensor.name, values.astype(np.uint8), settings[name].weights, codes.signed())
    for name, setting in settings.items():
        if setting.activations is not None and setting.activations < 8:
            if "input" not in ranges.get(name, {}):
                raise CompressionError(
                    f"quantize: the exported model has no trained range for the {setting.activations}-bit input of "
                    f"{name!r}.",
                    remedy="export what restore() returns",
                )
            _narrow(model, names[name], setting.activations, ranges[name]["input"], made, biases.get(name))
    return model


def activation_grid(limits: tuple[float, float], bits: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """Scale and zero point of a range, by the arithmetic of the simulation."""
    low, high = np.float32(limits[0]), np.float32(limits[1])
    scale = np.asarray((high - low) / np.float32(2**bits - 1), np.float32)
    return scale, np.asarray(np.round(-low / scale), np.uint8)


def _narrow(
    model: onnx.ModelProto,
    reader: str,
    bits: int,
    limits: tuple[float, float],
    made: Collection[str],
    bias: npt.NDArray[np.float32] | None,
) -> None:
    """Round the input of the node ``reader`` to ``bits``: that grid, and codes that end at 2^bits - 1; in place.

    QuantizeLinear saturates at 255 only, so a Clip on the uint8 codes follows it. Where it alone reads a tensor
    that no simulated output rounds (``made``), the pair that is there takes the grid; anywhere else another pair
    follows it. The bias goes to the scale that its sum now has.
    """
    graph = model.graph
    node = next(n for n in graph.node if n.name == reader)
    producers = {out: n for n in graph.node for out in n.output}
    dequantize = producers[node.input[0]]
    quantize = producers[dequantize.input[0]]
    scale, zero = activation_grid(limits, bits)
    prefix = f"{node.name}.in{bits}"
    graph.initializer.extend(
        numpy_helper.from_array(value, f"{prefix}.{key}")
        for key, value in (("s", scale), ("z", zero), ("top", np.array(2**bits - 1, np.uint8)))
    )
    if bias is not None:
        codes, steps = (initializer(model, name) for name in producers[node.input[2]].input[:2])
        step = scale * numpy_helper.to_array(initializer(model, producers[node.input[1]].input[1]))
        limit = np.iinfo(np.int32)
        whole = np.clip(np.round(bias.astype(np.float64) / step), limit.min, limit.max).astype(np.int32)
        codes.CopyFrom(numpy_helper.from_array(whole, codes.name))
        steps.CopyFrom(numpy_helper.from_array(step, steps.name))
    grid = [f"{prefix}.s", f"{prefix}.z"]
    clip = helper.make_node("Clip", [f"{prefix}.q", "", f"{prefix}.top"], [f"{prefix}.c"], name=f"{prefix}.clip")
    readers = sum(list(n.input).count(dequantize.output[0]) for n in graph.node)
    own = sum(list(n.input).count(quantize.input[1]) for n in graph.node) == 2  # the pair shares its scale with none
    simulated = quantize.input[0] in made
    if readers == 1 and own and not simulated:
        clip.input[0] = quantize.output[0]
        quantize.input[1:] = grid
        dequantize.input[:] = [f"{prefix}.c", *grid]
        _insert(model, [clip], before=dequantize.name)
        return
    others = [n for n in graph.node if dequantize.output[0] in n.input and n.op_type in ("Conv", *LINEAR)]
    if own and not simulated and others == [node]:
        _refine(model, quantize, float(scale))
    pair = [
        helper.make_node("QuantizeLinear", [node.input[0], *grid], [f"{prefix}.q"], name=f"{prefix}.quantize"),
        clip,
        helper.make_node("DequantizeLinear", [f"{prefix}.c", *grid], [f"{prefix}.d"], name=f"{prefix}.dequantize"),
    ]
    node.input[0] = f"{prefix}.d"
    _insert(model, pair, before=node.name)


def _refine(model: onnx.ModelProto, quantize: onnx.NodeProto, step: float) -> None:
    """Make a tensor's 8-bit grid a refinement of the coarser one that a reader rounds it to next; in place.

    With an odd number of fine steps in a coarse one no fine value lies on a coarse border, so that rounding twice is
    rounding once. The range stays at least what it was.
    """
    fine, zero = (initializer(model, name) for name in quantize.input[1:3])
    size, origin = float(numpy_helper.to_array(fine)), int(numpy_helper.to_array(zero))
    below, above = math.ceil(origin * size / step), math.ceil((255 - origin) * size / step)
    parts = 255 // (below + above)
    parts -= 1 - parts % 2
    if parts >= 3:  # else the other readers would lose more than the coarse one gains
        fine.CopyFrom(numpy_helper.from_array(np.asarray(step / parts, np.float32), fine.name))
        zero.CopyFrom(numpy_helper.from_array(np.asarray(below * parts, np.uint8), zero.name))


def _insert(model: onnx.ModelProto, new: list[onnx.NodeProto], before: str, replace: bool = False) -> None:
    """Put nodes before the one of that name, or in its place. What was read off the graph before is a copy after."""
    nodes = list(model.graph.node)
    place = next(i for i, node in enumerate(nodes) if node.name == before)
    nodes[place : place + replace] = new
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def quantize_static(
    model: onnx.ModelProto,
    nodes: list[str],
    calibration: npt.NDArray[np.float32],
    overrides: Mapping[str, list[dict[str, Any]]] | None = None,
) -> onnx.ModelProto:
    """onnxruntime's static quantiser, QDQ, uint8 activations, int8 weights per channel, on the named nodes.

    Args:
        overrides: tensor name → its scale and zero point (one, or one a channel) in place of calibrated ones.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as ort_quantize

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(np.array_split(calibration, max(1, len(calibration) // 64)))

        def get_next(self) -> dict[str, npt.NDArray[np.float32]] | None:
            batch = next(self.batches, None)
            return None if batch is None else {model.graph.input[0].name: batch}

    root = logging.getLogger()
    level = root.level
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        target = Path(folder) / "quantized.onnx"
        root.setLevel(logging.ERROR)  # the quantiser logs advice on the root logger
        try:
            ort_quantize(
                model, target, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, nodes_to_quantize=nodes,
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
                extra_options={
                    "OpTypesToExcludeOutputQuantization": list(LINEAR), "TensorQuantOverrides": dict(overrides or {}),
                },
            )  # fmt: skip
        finally:
            root.setLevel(level)
        quantized = onnx.load(target)
    _take_property(quantized, "onnx.infer")  # says that shapes are inferred, which what follows does not keep up
    return quantized


# ---- dynamic -----------------------------------------------------------------------------------------


def to_dynamic(model: onnx.ModelProto, settings: Mapping[str, Setting]) -> None:
    """Products in integers whose input is scaled by its own range while the model runs; in place.

    DynamicQuantizeLinear, MatMulInteger with int8 weights, and a rescaling, which onnxruntime runs as one operator.
    """
    graph = model.graph
    layers = layer_nodes(model)
    for name, setting in settings.items():
        node = layers[name]
        codes = Codes(model, node, setting)
        # MatMulInteger has no transposition.
        table = np.ascontiguousarray(codes.codes.T) if codes.axis == 0 else codes.codes
        signed = Signed(codes.zero, axis=1)
        weight = f"{name}.weight_quantized"
        graph.initializer.remove(initializer(model, node.input[1]))
        graph.initializer.append(numpy_helper.from_array(decoded(table, signed), weight))
        graph.initializer.append(numpy_helper.from_array(codes.scale, f"{name}.weight_scale"))
        x, bias = node.input[0], node.input[2] if len(node.input) > 2 else ""
        product = f"{name}.product" if bias else node.output[0]
        new = [
            helper.make_node("DynamicQuantizeLinear", [x], [f"{name}.{part}" for part in ("x", "scale", "zero")]),
            helper.make_node("MatMulInteger", [f"{name}.x", weight, f"{name}.zero"], [f"{name}.integers"]),
            helper.make_node("Cast", [f"{name}.integers"], [f"{name}.floats"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{name}.scale", f"{name}.weight_scale"], [f"{name}.scales"]),
            helper.make_node("Mul", [f"{name}.floats", f"{name}.scales"], [product]),
        ]
        if bias:
            new.append(helper.make_node("Add", [product, bias], [node.output[0]]))
        for part in new:
            part.name = f"{node.name}.{part.output[0].removeprefix(name)}"
        _insert(model, new, before=node.name, replace=True)
        if setting.weights < 8:
            store_codes(model, weight, table, setting.weights, signed)
