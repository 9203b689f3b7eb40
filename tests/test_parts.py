"""Parts: keys, shapes, costs counted by hand, and ONNX that runs and really fuses in int8."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper

from nas.errors import SpaceError
from nas.latency.runtimes import OnnxRuntime
from nas.parts import (
    AddInput,
    Boundary,
    Conv,
    GlobalAveragePool,
    Normalize,
    Op,
    Part,
    Resize,
    resize_scales,
)

BOTTLENECK = (
    Conv(48, 1, activation="relu6"), Conv(48, 3, groups=0, activation="relu6"), Conv(16, 1), AddInput(),
)  # fmt: skip
PARTS = {
    "conv": Part((Conv(16, 3, activation="relu6"),), (8, 8, 8)),
    "conv relu": Part((Conv(16, 5, activation="relu"),), (8, 8, 8)),
    "conv linear": Part((Conv(16, 1),), (8, 8, 8)),
    "conv stride": Part((Conv(16, 3, 2, activation="relu6"),), (8, 9, 9)),
    "conv groups": Part((Conv(16, 3, groups=4, activation="relu6"),), (8, 8, 8)),
    "depthwise": Part((Conv(16, 5, 2, groups=0, activation="relu6"),), (16, 8, 8)),
    "bottleneck": Part(BOTTLENECK, (16, 8, 8), count=3),
    "head": Part((GlobalAveragePool(), Conv(10, 1)), (16, 8, 8)),
}
FLOAT_ONLY = {
    "normalize": Part((Normalize(),), (3, 8, 8)),
    "resize": Part((Normalize(), Resize(12)), (3, 8, 8)),
    "shrink": Part((Resize(5),), (3, 8, 8)),
}
BOUNDARIES = {kind: Part((Boundary(kind),), (16, 8, 8), "boundary") for kind in ("quantize", "dequantize")}


def int8(part: Part) -> Part:
    return Part(part.ops, part.shape, "int8", part.count)


def run(part: Part, batch: int) -> tuple[Any, Any]:
    session = ort.InferenceSession(part.to_onnx(batch).SerializeToString(), providers=["CPUExecutionProvider"])
    (value,) = session.get_inputs()
    kind = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}[value.type]
    x = np.random.default_rng(0).integers(0, 7, value.shape).astype(kind)
    return x, session.run(None, {value.name: x})[0]


# ---- costs by hand -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "out_shape", "macs", "params"),
    [
        ("conv", (16, 8, 8), 16 * 8 * 9 * 64, 16 * 8 * 9 + 16),
        ("conv relu", (16, 8, 8), 16 * 8 * 25 * 64, 16 * 8 * 25 + 16),
        ("conv linear", (16, 8, 8), 16 * 8 * 64, 16 * 8 + 16),
        ("conv stride", (16, 5, 5), 16 * 8 * 9 * 25, 16 * 8 * 9 + 16),
        ("conv groups", (16, 8, 8), 16 * 2 * 9 * 64, 16 * 2 * 9 + 16),
        ("depthwise", (16, 4, 4), 16 * 25 * 16, 16 * 25 + 16),
        ("bottleneck", (16, 8, 8), 3 * 64 * (48 * 16 + 48 * 9 + 16 * 48), 3 * (48 * 17 + 48 * 10 + 16 * 49)),
        ("head", (10, 1, 1), 160, 170),
    ],
)
def test_costs_by_hand(name: str, out_shape: tuple[int, ...], macs: int, params: int) -> None:
    part = PARTS[name]
    assert part.out_shape == out_shape
    assert part.macs == int8(part).macs == macs
    assert part.params == int8(part).params == params
    assert part.weight_bytes == 4 * params
    assert int8(part).weight_bytes == params


@pytest.mark.parametrize("name", [*FLOAT_ONLY, *BOUNDARIES])
def test_what_has_no_weights_has_no_macs(name: str) -> None:
    part = {**FLOAT_ONLY, **BOUNDARIES}[name]
    assert (part.macs, part.params, part.weight_bytes) == (0, 0, 0)


@pytest.mark.parametrize(
    ("part", "numbers"),
    [
        (PARTS["conv"], 8 * 64 + 16 * 64),
        (PARTS["conv stride"], 8 * 81 + 16 * 25),
        # at the depthwise convolution: its input and output, and the 16 channels that the residual adds later
        (PARTS["bottleneck"], (48 + 48 + 16) * 64),
        (Part((Conv(4, 1), Conv(16, 1), AddInput()), (16, 8, 8)), (16 + 16 + 16) * 64),
        (Part((AddInput(), Conv(4, 1)), (16, 8, 8)), (16 + 16) * 64),
        (Part((Conv(16, 1), AddInput(), Conv(48, 1)), (16, 8, 8)), (16 + 48) * 64),
        (Part((Conv(16, 1), Conv(16, 1), AddInput()), (16, 8, 8)), (16 + 16 + 16) * 64),
        (PARTS["head"], 16 * 64 + 16),
        (FLOAT_ONLY["resize"], 3 * 64 + 3 * 144),
    ],
)
def test_peak_activations_by_hand(part: Part, numbers: int) -> None:
    assert part.peak_bytes() == 4 * numbers
    assert part.peak_bytes(batch=3) == 3 * 4 * numbers
    assert int8(part).peak_bytes(2) == 2 * numbers


def test_a_boundary_has_one_side_of_floats() -> None:
    for part in BOUNDARIES.values():
        assert part.peak_bytes() == (4 + 1) * 16 * 64


def test_keys_say_everything_but_the_count() -> None:
    part = PARTS["bottleneck"]
    assert part.key == "fp32 16x8x8 conv48k1.relu6 dw48k3.relu6 conv16k1 +in"
    assert Part(part.ops, part.shape, "fp32", 1).key == part.key
    assert PARTS["conv stride"].key == "fp32 8x9x9 conv16k3s2.relu6"
    assert PARTS["conv groups"].key == "fp32 8x8x8 conv16k3g4.relu6"
    assert BOUNDARIES["quantize"].key == "boundary 16x8x8 quantize"
    assert FLOAT_ONLY["resize"].key == "fp32 3x8x8 normalize resize12"
    every = [*PARTS.values(), *map(int8, PARTS.values()), *FLOAT_ONLY.values(), *BOUNDARIES.values()]
    assert len({p.key for p in every}) == len(every)


def test_groups_that_do_not_divide() -> None:
    part = Part((Conv(16, 3, groups=3),), (8, 8, 8))
    for cost in ("macs", "params"):
        with pytest.raises(SpaceError, match="conv16k3g3 on 8 channels does not divide into 3 groups"):
            getattr(part, cost)


# ---- ONNX that runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", [*PARTS, *FLOAT_ONLY])
def test_float_parts_run(name: str, batch: int) -> None:
    part = {**PARTS, **FLOAT_ONLY}[name]
    x, y = run(part, batch)
    assert x.shape == (batch, *part.shape)
    assert y.shape == (batch, *part.out_shape)
    assert y.dtype == np.float32
    assert np.isfinite(y).all()
    assert y.std() > 0


@pytest.mark.parametrize("name", PARTS)
def test_int8_parts_run_and_fuse(name: str) -> None:
    part = int8(PARTS[name])
    x, y = run(part, 2)
    assert (x.dtype, y.dtype) == (np.uint8, np.uint8)
    assert y.shape == (2, *part.out_shape)
    assert y.std() > 0
    fused = OnnxRuntime().load(part.to_onnx(1), threads=1, batch=1).fused()
    convolutions = sum(isinstance(op, Conv) for op in part.ops)
    assert fused.get("QLinearConv") == convolutions
    assert "Conv" not in fused
    assert fused.get("QLinearAdd", 0) == (name == "bottleneck")
    assert fused.get("QLinearGlobalAveragePool", 0) == (name == "head")
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(fused)


def test_float_parts_fuse_their_activation() -> None:
    fused = OnnxRuntime().load(PARTS["conv"].to_onnx(1), threads=1, batch=1).fused()
    assert "Clip" not in fused


def test_boundaries_cross_precisions() -> None:
    x, y = run(BOUNDARIES["quantize"], 2)
    assert (x.dtype, y.dtype) == (np.float32, np.uint8)
    np.testing.assert_array_equal(y, np.clip(np.round(x / np.float32(6 / 255)), 0, 255))
    x, y = run(BOUNDARIES["dequantize"], 2)
    assert (x.dtype, y.dtype) == (np.uint8, np.float32)
    np.testing.assert_allclose(y, x * (6 / 255), rtol=1e-6)


def test_the_written_model_is_the_convolution() -> None:
    """The weights that the model holds give what PyTorch computes from them."""
    part = PARTS["conv stride"]
    weights = [numpy_helper.to_array(t) for t in part.to_onnx(2).graph.initializer]
    weight, bias = (next(w for w in weights if w.ndim == d) for d in (4, 1))
    x, y = run(part, 2)
    wanted = F.conv2d(torch.from_numpy(x), torch.tensor(weight), torch.tensor(bias), stride=2, padding=1).clamp(0, 6)
    np.testing.assert_allclose(y, wanted.numpy(), atol=1e-4)
    assert weight.size + bias.size == part.params


def test_a_residual_adds_the_input_of_the_part() -> None:
    ops: tuple[Op, ...] = (Conv(4, 1), AddInput())
    with_input = run(Part(ops, (4, 3, 3)), 1)
    model = Part(ops, (4, 3, 3)).to_onnx(1)
    adds = [node for node in model.graph.node if node.op_type == "Add"]
    assert adds[0].input[1] == model.graph.input[0].name == "x"
    weight, bias = (numpy_helper.to_array(t) for t in model.graph.initializer)
    x = torch.from_numpy(with_input[0])
    wanted = F.conv2d(x, torch.tensor(weight), torch.tensor(bias)) + x
    np.testing.assert_allclose(with_input[1], wanted.numpy(), atol=1e-4)


def test_random_weights_are_a_function_of_the_key() -> None:
    first, again = PARTS["conv"].to_onnx(), PARTS["conv"].to_onnx()
    assert first.SerializeToString() == again.SerializeToString()


@pytest.mark.parametrize("side", [5, 7, 11, 12, 13, 20, 28, 31])
@pytest.mark.parametrize("size", [8, 9, 10, 28, 33])
def test_resizing_hits_the_side_exactly(size: int, side: int) -> None:
    """The runtime floors side·scale: no pixel may be lost to rounding."""
    scales = resize_scales((3, size, size), (side, side))
    assert scales.dtype == np.float32
    assert [int(np.float32(size) * s) for s in scales[2:]] == [side, side]
    x, y = run(Part((Resize(side),), (2, size, size)), 1)
    assert y.shape == (1, 2, side, side)
    wanted = F.interpolate(torch.from_numpy(x), size=(side, side), mode="bilinear", align_corners=False)
    np.testing.assert_allclose(y, wanted.numpy(), atol=1e-3)
