"""What is known of a model's values, and channels that go without a change of its outputs."""

from __future__ import annotations

import tempfile

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nas.student.export import deployable, export_float
from nas.tracing import Structure
from nas.tracing.known import Known
from nas.tracing.removable import ALIGNED, COMPUTED, MIXED, Removable
from tests.own_models import MODELS, Residual, made

EVERY = pytest.mark.parametrize("name", MODELS)


@torch.no_grad()
def with_dead_channels(model: nn.Module, classes: int, share: float, same: bool) -> int:
    """Zero a share of the filters and biases of all layers but the last, the same ones of each or any."""
    draw, count = torch.Generator().manual_seed(1), 0
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):  # offsets, so that dead channels leave something behind
            layer.bias.copy_(torch.randn(layer.bias.shape, generator=draw))
        elif isinstance(layer, nn.Conv2d | nn.Linear) and len(layer.weight) != classes:
            size = len(layer.weight)
            lost = torch.arange(size) if same else torch.randperm(size, generator=draw)
            layer.weight[lost[: int(share * size)]] = 0
            if layer.bias is not None:
                layer.bias[lost[: int(share * size)]] = 0
            count += int(share * size)
    return count


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@EVERY
@pytest.mark.parametrize("same", [False, True])
def test_a_model_without_its_dead_channels_computes_the_same(name: str, same: bool) -> None:
    model, x, info = made(name)
    assert with_dead_channels(model, info.classes, 0.4, same)
    smaller = Removable(Structure(model, x[:2]), x[:1]).without()
    other = info.random(32, seed=9)
    with torch.no_grad():
        for inputs in (x, other, other[:1]):
            torch.testing.assert_close(smaller(inputs), model(inputs), rtol=1e-4, atol=1e-5)
    assert _size(smaller) < 0.85 * _size(model)


@EVERY
def test_what_is_known_is_the_same_for_other_inputs(name: str) -> None:
    model, x, info = made(name)
    with_dead_channels(model, info.classes, 0.4, True)
    structure, other = Structure(model, x[:2]), info.random(1, seed=9)
    here, there = Known(structure, x[:1]), Known(structure, other)
    checked = 0
    for node in structure.nodes:
        known = here.known.get(node)
        if isinstance(known, torch.Tensor):
            torch.testing.assert_close(here.values[node][known], there.values[node][known])
            assert torch.equal(known, there.known[node])
            checked += int(known.sum())
    assert checked


def test_a_relu_that_happens_to_be_dead_is_not_known() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    with torch.no_grad():
        model[0].bias[:3] = -100.0  # zero for every input in sight
    found = Removable(Structure(model, torch.rand(8, 4)), torch.rand(1, 4))
    assert not found.chosen


def test_constants_go_into_the_bias_and_borders_into_a_small_map() -> None:
    torch.manual_seed(0)
    first, norm = nn.Conv2d(1, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
    model = nn.Sequential(
        first, norm, nn.ReLU(), nn.Conv2d(8, 6, 3, 1, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1),
        nn.Flatten(), nn.Linear(6 * 64, 3),
    ).eval()  # fmt: skip
    with torch.no_grad():
        first.weight[:4] = 0
        norm.bias[:4] = torch.tensor([-1.0, 0.5, 2.0, 1.0])  # the first is zero after the ReLU
        model[3].weight[:3] = 0
        model[4].bias[:3] = 1.0  # a convolution of 1 × 1 reads it: nothing is padded
    structure = Structure(model, torch.rand(2, 1, 8, 8))
    found = Removable(structure, torch.rand(1, 1, 8, 8))
    verdicts = {group.name: found.verdicts[group.variable] for group in structure.groups}
    assert verdicts["0"].reasons == [*[""] * 4, *[COMPUTED] * 4]
    assert verdicts["3"].reasons == [*[""] * 3, *[COMPUTED] * 3]
    smaller, x = found.without(), torch.randn(5, 1, 8, 8)
    assert [smaller.get_submodule(name).weight.shape[0] for name in ("0", "3", "6")] == [4, 3, 6]
    # Rows and columns at the borders, and one of each in between; nothing but the bias where nothing is padded.
    assert {name: tuple(buffer.shape) for name, buffer in smaller.get_submodule("maps").named_buffers()} == {
        "_3_values": (1, 3, 3, 3), "_3_rows": (8, 3), "_3_columns": (3, 8)
    }  # fmt: skip
    assert not torch.equal(smaller.get_submodule("6").bias, model[6].bias)
    with torch.no_grad():
        torch.testing.assert_close(smaller(x), model(x), rtol=1e-5, atol=1e-6)


def test_what_a_depthwise_convolution_makes_of_a_constant_goes_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 1), nn.Conv2d(6, 6, 3, 1, 1, groups=6), nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(4 * 64, 3)
    ).eval()
    with torch.no_grad():
        model[0].weight[:3] = 0
        model[1].weight[0] = 0
    structure = Structure(model, torch.rand(2, 1, 8, 8))
    found = Removable(structure, torch.rand(1, 1, 8, 8))
    assert found.verdicts[structure.groups[0].variable].reasons == [*[""] * 3, *[COMPUTED] * 3]
    x, smaller = torch.randn(5, 1, 8, 8), found.without()
    assert smaller.get_submodule("1").groups == 3
    with torch.no_grad():
        torch.testing.assert_close(smaller(x), model(x), rtol=1e-5, atol=1e-6)


def test_what_nothing_reads_goes_although_it_is_computed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        model[2].weight[:, 2:5] = 0
    smaller, x = Removable(Structure(model, torch.rand(2, 4)), torch.rand(1, 4)).without(), torch.randn(5, 4)
    assert smaller.get_submodule("0").weight.shape == (5, 4)
    with torch.no_grad():
        torch.testing.assert_close(smaller(x), model(x))


def test_a_layer_that_is_called_twice_gives_up_only_what_both_calls_can() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.shared = nn.Linear(4, 8), nn.Linear(8, 8)
            self.last = nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.tanh(self.shared(torch.tanh(self.shared(self.first(x))))))

    torch.manual_seed(0)
    model = Twice().eval()
    with torch.no_grad():
        model.first.weight[:4] = 0
        model.shared.weight[2:6] = 0
    smaller, x = Removable(Structure(model, torch.rand(2, 4)), torch.rand(1, 4)).without(), torch.randn(5, 4)
    with torch.no_grad():
        torch.testing.assert_close(smaller(x), model(x))


def test_maps_are_computed_once_and_normalisations_still_fold() -> None:
    model, x, info = made("inverted")
    with_dead_channels(model, info.classes, 0.4, False)
    smaller = Removable(Structure(model, x[:2]), x[:1]).without()
    assert list(smaller.get_submodule("maps").buffers())
    exported = export_float(deployable(smaller, {}), x[:1])
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = f"{folder}/optimised.onnx"
        session = ort.InferenceSession(exported.SerializeToString(), options, providers=["CPUExecutionProvider"])
        optimised = onnx.load(options.optimized_model_filepath)
    assert "MatMul" not in {node.op_type for node in optimised.graph.node}
    assert "BatchNormalization" not in {node.op_type for node in optimised.graph.node}
    with torch.no_grad():
        np.testing.assert_allclose(session.run(None, {"input": x.numpy()})[0], model(x).numpy(), rtol=1e-3, atol=1e-4)


def test_normalised_channels_stay() -> None:
    model, x, _ = made("vision transformer")
    with torch.no_grad():
        model.patch.weight[:4] = 0
        model.patch.bias[:4] = 0
    structure = Structure(model, x[:2])
    found = Removable(structure, x[:1])
    assert set(found.verdicts[structure.groups[0].variable].reasons) == {MIXED}


@pytest.mark.parametrize("align", [4, 16, 64])
def test_round_numbers_are_kept_and_outputs_too(align: int) -> None:
    model, x, info = made("residual")
    with_dead_channels(model, info.classes, 0.4, True)
    found = Removable(Structure(model, x[:2]), x[:1], align)
    assert any(ALIGNED in verdict.reasons for verdict in found.verdicts.values())
    smaller = found.without()
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            left = smaller.get_submodule(name).weight.shape[0]
            assert left % align == 0 or left == layer.out_channels
    with torch.no_grad():
        torch.testing.assert_close(smaller(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_smaller_model_can_be_made_smaller_again() -> None:
    model, x, info = made("inverted")
    with_dead_channels(model, info.classes, 0.3, False)
    first = Removable(Structure(model, x[:2]), x[:1]).without()
    with torch.no_grad():
        for layer in first.modules():
            if isinstance(layer, nn.Conv2d):
                layer.weight[:2] = 0
        wanted = first(x)
        second = Removable(Structure(first, x[:2]), x[:1]).without()
        torch.testing.assert_close(second(x), wanted, rtol=1e-4, atol=1e-5)
    assert _size(second) < _size(first)


def test_padding_apart_and_functions_in_the_place_of_layers() -> None:
    class Functions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, 2)
            self.fc = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.dropout(F.relu(self.norm(self.a(F.pad(x, (1, 1, 1, 1))))), 0.5, self.training)
            return self.fc(F.max_pool2d(self.b(F.pad(x, (0, 1, 0, 1))), 2).mean((2, 3)))

    torch.manual_seed(0)
    model, x = Functions().eval(), torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        model.a.weight[:5] = 0
        model.norm.bias.normal_()
        smaller = Removable(Structure(model, x), x[:1]).without()
        assert smaller.get_submodule("a").weight.shape[0] == 3
        torch.testing.assert_close(smaller(x), model(x), rtol=1e-5, atol=1e-6)


def test_one_channel_stays_where_all_are_constant() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 1), Residual(4, 4, 1), nn.Flatten(), nn.Linear(4 * 64, 3)).eval()
    with torch.no_grad():
        model[1].conv1.weight.zero_()
    x = torch.rand(3, 1, 8, 8)
    smaller = Removable(Structure(model, x), x[:1]).without()
    assert smaller.get_submodule("1.conv1").weight.shape[0] == 1
    with torch.no_grad():
        torch.testing.assert_close(smaller(x), model(x), rtol=1e-5, atol=1e-6)
