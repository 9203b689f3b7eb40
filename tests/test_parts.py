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
from nas.latency.runtimes import OnnxRuntimeCpu
from nas.parts import (
    AddInput,
    AddProjected,
    Attention,
    Boundary,
    Conv,
    GlobalAveragePool,
    LayerNorm,
    Linear,
    MaxPool,
    Mlp,
    Normalize,
    Op,
    Part,
    PatchEmbed,
    Resize,
    TokenMean,
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
    "basic": Part((Conv(8, 3, activation="relu"), Conv(16, 3), AddInput("relu")), (16, 8, 8), count=2),
    "projected": Part((Conv(32, 3, 2, activation="relu"), Conv(32, 3), AddProjected(16, 2, "relu")), (16, 9, 9)),
    "pooled stem": Part((Conv(16, 7, 2, activation="relu"), MaxPool()), (8, 24, 24)),
}
# A float stream of tokens, whatever the precision of the linear layers.
TOKENS = {
    "attention": Part((LayerNorm(), Attention(2, 8), AddInput()), (9, 32), count=2),
    "mlp": Part((LayerNorm(), Mlp(64), AddInput()), (9, 32)),
    "relu mlp": Part((LayerNorm(), Mlp(64, "relu"), AddInput()), (9, 32)),
    "classifier": Part((LayerNorm(), TokenMean(), Linear(10)), (9, 32)),
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
        ("basic", (16, 8, 8), 2 * 64 * 9 * (8 * 16 + 16 * 8), 2 * (9 * 8 * 16 + 8 + 9 * 16 * 8 + 16)),
        (
            "projected",
            (32, 5, 5),
            25 * (9 * 32 * 16 + 9 * 32 * 32 + 32 * 16),
            9 * 32 * 16 + 32 + 9 * 32 * 32 + 32 + 32 * 17,
        ),
        ("pooled stem", (16, 6, 6), 144 * 49 * 8 * 16, 49 * 8 * 16 + 16),
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


def test_keys_say_everything_but_the_count() -> None:
    part = PARTS["bottleneck"]
    assert part.key == "fp32 16x8x8 conv48k1.relu6 dw48k3.relu6 conv16k1 +in"
    assert Part(part.ops, part.shape, "fp32", 1).key == part.key
    assert PARTS["conv stride"].key == "fp32 8x9x9 conv16k3s2.relu6"
    assert PARTS["conv groups"].key == "fp32 8x8x8 conv16k3g4.relu6"
    assert BOUNDARIES["quantize"].key == "boundary 16x8x8 quantize"
    assert FLOAT_ONLY["resize"].key == "fp32 3x8x8 normalize resize12"
    assert PARTS["projected"].key == "fp32 16x9x9 conv32k3s2.relu conv32k3 +conv1s2.relu"
    assert PARTS["basic"].key == "fp32 16x8x8 conv8k3.relu conv16k3 +in.relu"
    assert TOKENS["attention"].key == "fp32 9x32 ln att2x8 +in"
    assert TOKENS["mlp"].key == "fp32 9x32 ln mlp64.gelu +in"
    both = {**PARTS, **TOKENS}.values()
    every = [*both, *map(int8, both), *FLOAT_ONLY.values(), *BOUNDARIES.values()]
    assert len({p.key for p in every}) == len(every)


@pytest.mark.parametrize(
    ("name", "out_shape", "macs", "params"),
    [
        (
            "attention",
            (9, 32),
            2 * (4 * 9 * 32 * 16 + 2 * 81 * 16),
            2 * (64 + 3 * (32 * 16 + 16) + 16 * 32 + 32),
        ),
        ("mlp", (9, 32), 9 * 2 * 32 * 64, 64 + 32 * 64 + 64 + 64 * 32 + 32),
        ("classifier", (10,), 320, 64 + 330),
    ],
)
def test_costs_of_transformers_by_hand(name: str, out_shape: tuple[int, ...], macs: int, params: int) -> None:
    part = TOKENS[name]
    assert part.out_shape == out_shape
    assert part.macs == int8(part).macs == macs
    assert part.params == int8(part).params == params
    patches = Part((PatchEmbed(32, 4),), (3, 12, 12))
    assert (patches.out_shape, patches.macs, patches.params) == ((9, 32), 9 * 32 * 48, 32 * 48 + 32 + 9 * 32)


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


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", TOKENS)
def test_parts_of_tokens_run_on_rows(name: str, batch: int) -> None:
    for part in (TOKENS[name], int8(TOKENS[name])):
        x, y = run(part, batch)
        assert x.shape == (9 * batch, 32)
        assert y.shape == ((batch, 10) if name == "classifier" else x.shape)
        assert (x.dtype, y.dtype) == (np.float32, np.float32)
        assert np.isfinite(y).all()
        assert y.std() > 0


def test_patches_become_rows() -> None:
    x, y = run(Part((PatchEmbed(32, 4),), (3, 12, 8)), 2)
    assert (x.shape, y.shape) == ((2, 3, 12, 8), (12, 32))


def test_an_mlp_knows_its_activation() -> None:
    with pytest.raises(SpaceError, match=r"'silu' of an Mlp[^$]*gelu or relu"):
        Mlp(8, "silu")


@pytest.mark.parametrize("name", PARTS)
def test_int8_parts_run_and_fuse(name: str) -> None:
    part = int8(PARTS[name])
    x, y = run(part, 2)
    assert (x.dtype, y.dtype) == (np.uint8, np.uint8)
    assert y.shape == (2, *part.out_shape)
    assert y.std() > 0
    fused = OnnxRuntimeCpu().load(part.to_onnx(1), threads=1, batch=1).fused()
    convolutions = sum(isinstance(op, Conv | AddProjected) for op in part.ops)
    assert fused.get("QLinearConv") == convolutions
    assert "Conv" not in fused
    assert fused.get("QLinearAdd", 0) == (name in ("bottleneck", "basic", "projected"))
    assert fused.get("QLinearGlobalAveragePool", 0) == (name == "head")
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(fused)


def test_float_parts_fuse_their_activation() -> None:
    fused = OnnxRuntimeCpu().load(PARTS["conv"].to_onnx(1), threads=1, batch=1).fused()
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
