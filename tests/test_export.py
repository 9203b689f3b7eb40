"""Exported models: any batch size, plain layers, counted costs, and nothing of the exporter's that hinders fusion."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from helpers import IMAGES, TinyModel
from torch import nn

from nas.compression import apply_passes, rewrite_onnx
from nas.compression.fake_quant import ActivationQuantizer, QuantConv2d
from nas.latency.runtimes import OnnxRuntime
from nas.student.export import INPUT, OUTPUT, compact, deployable, export_float, onnx_macs_params, to_onnx

PLAN = {"channel_prune": {"stem.conv": 8}, "quantize": {"stem.conv": 8, "body.conv": 8, "head": 8}}


def images(n: int = 16) -> torch.Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def run(model: onnx.ModelProto, x: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = session.run([OUTPUT], {INPUT: x.numpy()})[0]
    return result


@pytest.fixture(scope="module")
def compressed() -> nn.Module:
    torch.manual_seed(0)
    return apply_passes(TinyModel(IMAGES, 16, 5).eval(), PLAN, images()).eval()


def test_deployable_is_plain_and_a_copy(compressed: nn.Module) -> None:
    before = copy.deepcopy(compressed.state_dict())
    plain = deployable(compressed, PLAN)
    kinds = {type(module) for module in plain.modules()}
    assert not kinds & {QuantConv2d, ActivationQuantizer, nn.BatchNorm2d}
    assert not plain.training
    assert isinstance(compressed.get_submodule("stem.conv"), QuantConv2d)
    for key, value in compressed.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_any_batch_size(compressed: nn.Module, batch: int) -> None:
    exported = to_onnx(compressed, PLAN, images(), images().numpy())
    onnx.checker.check_model(exported)
    assert [v.name for v in exported.graph.input] == [INPUT]
    got = run(exported, images(batch))
    assert got.shape == (batch, 10)
    with torch.no_grad():
        wanted = compressed(images(batch)).numpy()
    assert np.abs(got - wanted).max() < 0.1 * np.abs(wanted).max()


class Resizing(nn.Module):
    def __init__(self, side: int) -> None:
        super().__init__()
        self.side, self.conv = side, nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.interpolate(x, size=(self.side, self.side), mode="bilinear", align_corners=False)
        return self.conv(x).mean(dim=(2, 3))


@pytest.mark.parametrize("side", [5, 11, 12, 13, 28])
def test_resizing_keeps_the_batch_free_and_every_pixel(side: int) -> None:
    model = Resizing(side).eval()
    exported = export_float(model, images(1))
    (resize,) = [node for node in exported.graph.node if node.op_type == "Resize"]
    assert len(resize.input) == 3  # scales, not sizes, which would hold a batch
    for batch in (1, 5):
        with torch.no_grad():
            wanted = model(images(batch)).numpy()
        np.testing.assert_allclose(run(exported, images(batch)), wanted, atol=1e-4)
    assert onnx_macs_params(exported) == (4 * 9 * side * side, 4 * 9 + 4)


def test_no_dead_nodes_and_no_shared_weights() -> None:
    """The exporter merges equal tensors, and a shared bias does not fuse in int8."""
    first, second, third = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
    for layer in (first, second, third):
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)
    with torch.no_grad():
        third.weight.copy_(second.weight)
    model = nn.Sequential(first, second, third, nn.Flatten())
    exported = export_float(model.eval(), images(1))
    names = {tensor.name for tensor in exported.graph.initializer}
    reads = [name for node in exported.graph.node for name in node.input if name in names]
    assert len(reads) == len(set(reads))
    alive = {value.name for value in exported.graph.output}.union(*(set(node.input) for node in exported.graph.node))
    assert all(alive & set(node.output) for node in exported.graph.node)
    with torch.no_grad():
        np.testing.assert_allclose(run(exported, images(3)), model(images(3)).numpy(), atol=1e-5)
    assert onnx_macs_params(exported) == (64 * (72 + 64 + 64), 80 + 72 + 72)


def test_counts_by_hand(compressed: nn.Module) -> None:
    float_model = export_float(deployable(TinyModel(IMAGES, 16, 5), {}), images(1))
    macs = 64 * 9 * 16 + 64 * 25 * 16 * 16 + 16 * 10
    params = (9 * 16 + 16) + (25 * 16 * 16 + 16) + (16 * 10 + 10)
    assert onnx_macs_params(float_model) == (macs, params)
    # half of the stem's channels are gone, int8 or not
    pruned_macs = 64 * 9 * 8 + 64 * 25 * 8 * 16 + 16 * 10
    pruned_params = (9 * 8 + 8) + (25 * 8 * 16 + 16) + (16 * 10 + 10)
    for plan in (PLAN, {"channel_prune": PLAN["channel_prune"]}):
        exported = to_onnx(compressed, PLAN, images(), images().numpy()) if "quantize" in plan else export_float(
            deployable(compressed, PLAN), images(1)
        )  # fmt: skip
        assert onnx_macs_params(exported) == (pruned_macs, pruned_params)


def test_grouped_convolutions_are_counted() -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 1), nn.Conv2d(8, 16, 3, 2, 1, groups=4, bias=False))
    assert onnx_macs_params(export_float(model, images(1))) == (64 * 8 + 16 * 16 * 2 * 9, 16 + 16 * 2 * 9)


class Attending(nn.Module):
    """One head over 16 tokens of width 8, normalised, with positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.position, self.norm = nn.Conv2d(1, 8, 2, 2), nn.Embedding(16, 8), nn.LayerNorm(8)
        self.query, self.key = nn.Linear(8, 4), nn.Linear(8, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x).reshape(-1, 8, 16).permute(0, 2, 1) + self.position.weight)
        scores = torch.softmax(self.query(x) @ self.key(x.reshape(-1, 8)).reshape(-1, 16, 4).permute(0, 2, 1), dim=-1)
        return scores.mean(dim=1)


def test_transformers_are_counted() -> None:
    """Products of two activations are multiply-accumulates; positions, scales and offsets are parameters."""
    torch.manual_seed(0)
    macs = 16 * 4 * 8 + 2 * 16 * 8 * 4 + 16 * 16 * 4
    params = (8 * 4 + 8) + 16 * 8 + 2 * 8 + (8 * 4 + 4) + 8 * 4
    assert onnx_macs_params(export_float(Attending(), images(1))) == (macs, params)


def test_the_whole_model_really_runs_in_int8(compressed: nn.Module) -> None:
    exported = to_onnx(compressed, PLAN, images(), images().numpy())
    fused = OnnxRuntime().load(exported, threads=1, batch=1).fused()
    assert fused["QLinearConv"] == 3
    assert "Conv" not in fused
    assert fused["QLinearGlobalAveragePool"] == 1
    assert (fused["QuantizeLinear"], fused["DequantizeLinear"]) == (1, 1)


def test_int8_files_are_smaller() -> None:
    torch.manual_seed(0)
    model = TinyModel(IMAGES, 64, 5).eval()
    plan = {"quantize": {"stem.conv": 8, "body.conv": 8, "head": 8}}
    whole = export_float(deployable(model, {}), images(1)).ByteSize()
    small = to_onnx(apply_passes(copy.deepcopy(model), plan, images()), plan, images(), images().numpy()).ByteSize()
    assert small < 0.35 * whole


def test_the_original_goes_on_training(compressed: nn.Module) -> None:
    model = copy.deepcopy(compressed).train()
    to_onnx(model, PLAN, images(), images().numpy())
    assert all(parameter.requires_grad for parameter in model.parameters())
    model(images()).sum().backward()
    assert model.get_submodule("stem.conv").weight.grad is not None


def test_what_only_costs_bytes_is_left_out(compressed: nn.Module) -> None:
    """Weights and the nodes that read them keep their names; the rest is numbered, and the file computes the same."""
    whole = rewrite_onnx(export_float(deployable(compressed, PLAN), images(1)), PLAN, images().numpy())
    wanted = run(whole, images(5))
    size = whole.ByteSize()
    small = compact(whole)
    onnx.checker.check_model(small, full_check=True)
    np.testing.assert_array_equal(run(small, images(5)), wanted)
    assert small.ByteSize() < 0.7 * size
    names = {tensor.name for tensor in small.graph.initializer}
    assert {"stem.conv.weight_quantized", "body.conv.bias_quantized", "head.weight_quantized"} <= names
    assert {"/stem/conv/Conv", "/head/Conv"} <= {node.name for node in small.graph.node}
    assert not small.graph.value_info
    assert not small.metadata_props
