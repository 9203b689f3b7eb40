"""Passes: the contract for every one; pruning removes what matters least, quantisation reaches the exported graph."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from helpers import IMAGES, TinyModel, TinySpace
from torch import nn

from nas.compression import ChannelPrune, Quantize, apply_passes, passes, restore, rewrite_onnx
from nas.compression.base import named_module
from nas.compression.fake_quant import ActivationQuantizer, QuantConv2d, QuantLinear, Setting
from nas.compression.fold import consumers, fold_batchnorm
from nas.compression.qdq import quantized_nodes
from nas.errors import CompressionError
from nas.latency.runtimes import OnnxRuntime
from nas.student.export import deployable, export_float, to_onnx
from nas.testing import check_pass


class Residual(nn.Module):
    """A residual block with a depthwise convolution, pooled: what the passes must see through."""

    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.expand = nn.Sequential(nn.Conv2d(8, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6())
        self.depthwise = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()
        )
        self.project = nn.Sequential(nn.Conv2d(hidden, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Conv2d(8, 10, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = self.project(self.depthwise(self.expand(x))) + x
        return self.head(self.pool(x)).flatten(1)


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights and statistics that are not the initial ones."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight.data, 0.5, 1.5), (module.bias.data, -0.3, 0.3),
                (module.running_mean, -0.3, 0.3), (module.running_var, 0.5, 2.0),
            ):  # fmt: skip
                assert tensor is not None
                tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))
    return model.eval()


def residual(hidden: int = 16) -> Residual:
    torch.manual_seed(0)
    model = Residual(hidden)
    lively(model)
    return model


def weight(model: nn.Module, name: str) -> torch.Tensor:
    found = model.get_submodule(name).weight
    assert isinstance(found, torch.Tensor)
    return found


def norm(model: nn.Module, name: str) -> nn.BatchNorm2d:
    found = model.get_submodule(name)
    assert isinstance(found, nn.BatchNorm2d)
    return found


def images(n: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


# One entry a pass: settings for the model ``Residual``. A new pass has to be entered here.
EVERYTHING = ["first.0", "expand.0", "depthwise.0", "project.0", "head"]
EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "channel_prune": [{"expand.0": 8}, {"first.0": 4, "expand.0": 3}, {"expand.0": 16}],
    "layer_drop": [{"expand.2": True}, {"first.2": True, "depthwise.2": True}],
    "weight_prune": [dict.fromkeys(EVERYTHING, 0.8), {"expand.0": 0.5, "head": {"threshold": 0.1}}],
    "low_rank": [{"expand.0": 4}, {"first.0": 4, "project.0": 8, "head": 5}],
    "quantize": [
        dict.fromkeys(EVERYTHING, 8),
        dict.fromkeys(EVERYTHING[1:4], 8),
        {"head": 8},
        {"first.0": 8, "head": 8},
        *(dict.fromkeys(EVERYTHING, b) for b in range(2, 8)),
        {name: {"weights": 4, "symmetric": False} for name in EVERYTHING},
        {name: {"weights": 3, "activations": None} for name in EVERYTHING},
        {name: {"weights": 8, "activations": None, "symmetric": False} for name in EVERYTHING},
        {name: {"weights": 4, "activations": 4} for name in EVERYTHING},
        {"first.0": 8, "expand.0": 2, "depthwise.0": {"activations": 5}, "head": {"weights": 4, "activations": None}},
    ],
    "cluster": [dict.fromkeys(EVERYTHING, 16), {"expand.0": 2, "head": 256}],
}


def test_every_pass_has_examples() -> None:
    assert set(EXAMPLES) == set(passes), "add example settings of the new pass to EXAMPLES"


@pytest.mark.parametrize(("kind", "settings"), [(k, s) for k in passes for s in EXAMPLES.get(k, [])])
def test_every_registered_pass(kind: str, settings: dict[str, Any]) -> None:
    check_pass(passes.get(kind), residual(), settings, images())


class Rows(nn.Module):
    """Linear layers around a residual and operators without integer kernels, after a convolution."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 2, 2)
        self.norm, self.act = nn.LayerNorm(16), nn.GELU()
        self.up, self.down = nn.Linear(16, 32, bias), nn.Linear(32, 16, bias)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).reshape(-1, 16, 16).permute(0, 2, 1).reshape(-1, 16)
        x = self.down(self.act(self.up(self.norm(x)))) + x
        return self.head(x.reshape(-1, 16, 16).mean(dim=1))


LINEAR = ["up", "down"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("names", [["up"], LINEAR, ["head"], [*LINEAR, "head"], ["conv", *LINEAR]])
def test_linear_layers_are_quantised(names: list[str], bias: bool) -> None:
    torch.manual_seed(0)
    check_pass(Quantize, Rows(bias).eval(), dict.fromkeys(names, 8), images())


class Tokens(nn.Module):
    """A linear layer on three dimensions, which is exported as a product and an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 10, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x.flatten(1, 2)))).mean(dim=1)


def test_linear_layers_on_tokens_are_quantised() -> None:
    torch.manual_seed(0)
    plan = {"quantize": {"first": 8, "second": 8}}
    check_pass(Quantize, Tokens().eval(), plan["quantize"], images())
    exported = to_onnx(apply_passes(Tokens().eval(), plan, images()).eval(), plan, images(), images().numpy())
    fused = OnnxRuntime().load(exported, threads=1, batch=1).fused()
    assert {"MatMulIntegerToFloat", "QuantizeLinear"} <= set(fused)
    assert not {"MatMul", "DequantizeLinear", "QLinearMatMul"} & set(fused)


def test_linear_layers_run_in_integers_with_a_float_result() -> None:
    torch.manual_seed(0)
    plan = {"channel_prune": {"up": 24}, "quantize": dict.fromkeys(LINEAR, 8)}
    model = apply_passes(Rows().eval(), plan, images()).eval()
    assert isinstance(model.get_submodule("up"), QuantLinear)
    exported = to_onnx(model, plan, images(), images().numpy())
    fused = OnnxRuntime().load(exported, threads=1, batch=1).fused()
    assert {kind: fused.get(kind, 0) for kind in ("QGemm", "Gemm", "QuantizeLinear", "DequantizeLinear", "Add")} == {
        "QGemm": 2, "Gemm": 1, "QuantizeLinear": 2, "DequantizeLinear": 0, "Add": 1,
    }  # fmt: skip


# ---- the pipeline ------------------------------------------------------------------------------------


def test_passes_work_together_in_their_order() -> None:
    plan = {"channel_prune": {"expand.0": 8}, "quantize": dict.fromkeys(EVERYTHING, 8)}
    model = apply_passes(residual(), plan, images())
    pruned = model.get_submodule("depthwise.0")
    assert isinstance(pruned, QuantConv2d)
    assert pruned.weight.shape == (8, 1, 3, 3)
    plain = restore(copy.deepcopy(model), plan)
    assert not any(isinstance(m, QuantConv2d | ActivationQuantizer) for m in plain.modules())
    exported = to_onnx(model, plan, images(), images().numpy())
    shapes = [tuple(tensor.dims) for tensor in exported.graph.initializer]
    assert shapes.count((8, 1, 3, 3)) == 2  # the first and the depthwise


def test_an_empty_plan_changes_nothing() -> None:
    model = residual()
    before = copy.deepcopy(model.state_dict())
    assert restore(apply_passes(model, {}, images()), {}) is model
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    exported = export_float(model, images(1))
    assert rewrite_onnx(exported, {}, images().numpy()) is exported


def test_a_wrong_name_lists_near_ones() -> None:
    with pytest.raises(CompressionError, match=r"prune: the model has no module 'expnd\.0'") as caught:
        named_module(residual(), "expnd.0", "prune")
    assert "expand.0" in caught.value.expected


# ---- pruning -----------------------------------------------------------------------------------------


def test_the_least_important_channels_go() -> None:
    """Channels of known small norm, in every layer that they run through, are the ones removed."""
    model = residual()
    weak = [1, 4, 5, 9, 10, 11, 14, 15]
    strong = [i for i in range(16) if i not in weak]
    for layer in ("expand", "depthwise"):
        for tensor in (weight(model, f"{layer}.0"), norm(model, f"{layer}.1").weight, norm(model, f"{layer}.1").bias):
            tensor.data[weak] *= 0.01
    weight(model, "project.0").data[:, weak] *= 0.01
    kept = {name: weight(model, f"{name}.0").data.clone() for name in ("expand", "depthwise", "project")}
    pruned = ChannelPrune({"expand.0": 8}).apply(model, images())
    assert torch.equal(weight(pruned, "expand.0"), kept["expand"][strong])
    assert torch.equal(weight(pruned, "depthwise.0"), kept["depthwise"][strong])
    assert torch.equal(weight(pruned, "project.0"), kept["project"][:, strong])
    depthwise = pruned.get_submodule("depthwise.0")
    assert isinstance(depthwise, nn.Conv2d)
    assert (depthwise.groups, depthwise.in_channels, norm(pruned, "depthwise.1").num_features) == (8, 8, 8)


def test_pruned_equals_masked() -> None:
    """A physically smaller model computes what the whole one computes with those channels at zero."""
    model = residual()
    whole = copy.deepcopy(model)
    pruned = ChannelPrune({"expand.0": 6}).apply(model, images())
    kept = weight(pruned, "depthwise.0")
    lost = [i for i, row in enumerate(weight(whole, "depthwise.0")) if not any(torch.equal(row, k) for k in kept)]
    assert len(lost) == 10
    norm(whole, "depthwise.1").weight.data[lost] = 0
    norm(whole, "depthwise.1").bias.data[lost] = 0
    with torch.no_grad():
        torch.testing.assert_close(pruned.eval()(images()), whole.eval()(images()))


def test_channels_that_a_residual_ties_go_together() -> None:
    model = ChannelPrune({"first.0": 4}).apply(residual(), images())
    shapes = {name: tuple(weight(model, f"{name}.0").shape) for name in ("first", "expand", "project")}
    assert shapes == {"first": (4, 1, 3, 3), "expand": (16, 4, 1, 1), "project": (4, 16, 1, 1)}
    assert model(images()).shape == (32, 10)


def test_linear_layers_are_pruned_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    linear = model[1]
    assert isinstance(linear, nn.Linear)
    linear.weight.data[20:] *= 0.001
    linear.bias.data[20:] *= 0.001
    wanted = linear.weight.data[:20].clone()
    pruned = ChannelPrune({"1": 20}).apply(model, images())
    assert torch.equal(weight(pruned, "1"), wanted)
    assert weight(pruned, "3").shape == (10, 20)


@pytest.mark.parametrize("keep", [0, 17, -1])
def test_impossible_counts(keep: int) -> None:
    with pytest.raises(CompressionError, match=rf"keep {keep} of 16 channels of 'expand\.0'[^$]*1\.\.16"):
        ChannelPrune({"expand.0": keep}).apply(residual(), images())


def test_what_has_no_channels_to_prune() -> None:
    with pytest.raises(CompressionError, match=r"'expand\.1' is a BatchNorm2d[^$]*Conv2d or Linear"):
        ChannelPrune({"expand.1": 4}).apply(residual(), images())


# ---- folding -----------------------------------------------------------------------------------------


def test_folding_preserves_outputs() -> None:
    model = residual()
    folded = fold_batchnorm(copy.deepcopy(model))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    with torch.no_grad():
        torch.testing.assert_close(folded(images()), model(images()), rtol=1e-4, atol=1e-5)


def test_folding_named_layers_only_and_keeping_the_mode() -> None:
    model = residual().train()
    fold_batchnorm(model, ["expand.0"])
    kinds = {name: type(model.get_submodule(f"{name}.1")) for name in ("first", "expand", "depthwise", "project")}
    assert kinds == {
        "first": nn.BatchNorm2d,
        "expand": nn.Identity,
        "depthwise": nn.BatchNorm2d,
        "project": nn.BatchNorm2d,
    }
    assert model.training
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images()), residual()(images()), rtol=1e-4, atol=1e-5)


def test_a_convolution_with_two_readers_is_not_folded() -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return self.norm(y) + y

    model = lively(Forked())
    assert consumers(model)["conv"] == ["norm", "<add>"]
    wanted = model(images())
    assert isinstance(fold_batchnorm(model).get_submodule("norm"), nn.BatchNorm2d)
    torch.testing.assert_close(model(images()), wanted)


def test_a_shared_convolution_before_two_normalisations_is_not_folded() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.a, self.b = nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(self.conv(x)) + self.b(self.conv(2 * x))

    model = lively(Shared())
    with torch.no_grad():
        wanted = model(images())
        torch.testing.assert_close(fold_batchnorm(model)(images()), wanted, rtol=1e-4, atol=1e-5)


def test_a_model_that_cannot_be_traced() -> None:
    class Moody(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(CompressionError, match="cannot be traced"):
        fold_batchnorm(nn.Sequential(nn.Conv2d(1, 1, 1), Moody(), nn.BatchNorm2d(1)))


def test_a_folded_bias_goes_on_learning() -> None:
    """Folding makes biases where there were none; frozen, they would hold the normalisation's shift for ever."""
    model = fold_batchnorm(residual())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.get_submodule("expand.0").bias is not None


# ---- quantisation ------------------------------------------------------------------------------------


def test_simulation_rounds_to_the_grid() -> None:
    conv = nn.Conv2d(3, 4, 1)
    layer = QuantConv2d(conv, Setting(), quantize_output=False).eval()
    layer.input_quantizer.high.fill_(2.55)  # a step of 0.01
    x = torch.tensor([0.014, 0.026, 9.0]).view(1, 3, 1, 1)
    rounded = torch.tensor([0.01, 0.03, 2.55]).view(1, 3, 1, 1)
    top = conv.weight.detach().abs().amax(dim=(1, 2, 3), keepdim=True) / 127
    weight = torch.round(conv.weight.detach() / top) * top
    wanted = torch.nn.functional.conv2d(rounded, weight, conv.bias)
    torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("low", [0.0, -1.5])
def test_training_and_evaluation_simulate_alike(low: float) -> None:
    quantizer = ActivationQuantizer(8)
    x = low + (3 - low) * torch.rand(2000, generator=torch.Generator().manual_seed(0))
    first = quantizer.train()(x)  # the first batch sets the range
    assert float(quantizer.high) == float(x.max())
    assert float(quantizer.low) == min(0.0, float(x.min()))
    torch.testing.assert_close(quantizer.eval()(x), first, atol=1e-5, rtol=0)
    assert len(first.unique()) <= 256
    assert float((first - x).abs().max()) <= (3 - low) / 255
    before = float(quantizer.high)
    quantizer(2 * x)
    assert float(quantizer.high) == before
    quantizer.train()(2 * x)
    assert float(quantizer.high) == pytest.approx(1.1 * before, rel=1e-5)


def test_gradients_pass_straight_through() -> None:
    conv = nn.Conv2d(2, 2, 1, bias=False)
    layer = QuantConv2d(conv, Setting(), quantize_output=False).train()
    x = torch.rand(4, 2, 3, 3, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert x.grad is not None
    # d/dw of Σ conv(q(x), q(w)) is Σ q(x), and q(x) ≈ x; rounding itself has no slope
    wanted = x.detach().sum(dim=(0, 2, 3)).expand(2, 2).view(2, 2, 1, 1)
    torch.testing.assert_close(layer.weight.grad, wanted, rtol=0.01, atol=0)
    assert (x.grad != 0).all()


def test_training_the_simulation_learns() -> None:
    model = apply_passes(residual(), {"quantize": dict.fromkeys(EVERYTHING, 8)}, images())
    y = torch.arange(64) % 10
    x = images(64) * y.view(-1, 1, 1, 1) / 10  # the label is the brightness
    optimiser = torch.optim.Adam(model.train().parameters(), 0.01)
    losses = []
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_restored_weights_are_the_trained_ones() -> None:
    settings = dict.fromkeys(EVERYTHING, 8)
    model = Quantize(settings).apply(residual(), images())
    trained = {name: model.get_submodule(name).weight for name in EVERYTHING}
    plain = Quantize(settings).restore(model)
    for name, weight in trained.items():
        layer = plain.get_submodule(name)
        assert type(layer) is nn.Conv2d
        assert layer.weight is weight
    # folded and not rounded: the float model again
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(images()), residual()(images()), rtol=1e-4, atol=1e-5)


def test_calibration_leaves_normalisation_and_mode_alone() -> None:
    model = residual().train()
    before = copy.deepcopy(norm(model, "first.1").state_dict())
    Quantize({"head": 8}).apply(model, images())
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in norm(model, "first.1").state_dict().items())
    head = model.head
    assert isinstance(head, QuantConv2d)
    assert bool(head.input_quantizer.seen)


def graph_of(settings: dict[str, int]) -> Any:
    plan = {"quantize": settings}
    model = apply_passes(residual(), plan, images())
    return to_onnx(model, plan, images(), images().numpy()).graph


def test_the_exported_model_has_real_quantisation() -> None:
    graph = graph_of(dict.fromkeys(EVERYTHING, 8))
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("Conv") == 5
    tensors = {t.name: t for t in graph.initializer}
    producers = {out: node for node in graph.node for out in node.output}
    for node in graph.node:
        if node.op_type == "Conv":
            x, weight = producers[node.input[0]], producers[node.input[1]]
            assert (x.op_type, weight.op_type) == ("DequantizeLinear", "DequantizeLinear")
            stored, scale = tensors[weight.input[0]], tensors[weight.input[1]]
            assert stored.data_type == 3  # int8
            assert list(scale.dims) == [stored.dims[0]]  # per channel


@pytest.mark.parametrize("named", [["depthwise.0"], ["expand.0", "depthwise.0", "project.0"], ["first.0"], ["head"]])
def test_mixed_precision_only_around_named_layers(named: list[str]) -> None:
    graph = graph_of(dict.fromkeys(named, 8))
    producers = {out: node for node in graph.node for out in node.output}
    quantized, floats = set[str](), set[str]()
    for node in graph.node:
        if node.op_type == "Conv":
            weight = producers.get(node.input[1])
            (quantized if weight is not None and weight.op_type == "DequantizeLinear" else floats).add(node.name)
    assert (len(quantized), len(floats)) == (len(named), 5 - len(named))
    for name in named:
        assert any(name.split(".")[0] in node for node in quantized)


def test_what_only_passes_a_result_on_takes_its_precision() -> None:
    settings = ["first.0", "expand.0", "depthwise.0", "project.0"]
    plain = export_float(deployable(apply_passes(residual(), {"quantize": dict.fromkeys(settings, 8)}, images()), {
        "quantize": dict.fromkeys(settings, 8)
    }), images(1))  # fmt: skip
    kinds = {node.name: node.op_type for node in plain.graph.node}
    assert sorted(kinds[name] for name in quantized_nodes(plain, settings)) == sorted(
        ["Conv"] * 4 + ["Clip"] * 3 + ["Add", "GlobalAveragePool"]
    )
    assert sorted(kinds[name] for name in quantized_nodes(plain, ["head"])) == ["Conv"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"expand.1": 8}, r"'expand\.1' is a BatchNorm2d[^$]*Conv2d"),
        ({"expand.0": 9}, r"9 bits for 'expand\.0'[^$]*2\.\.8"),
        ({"expand.9": 8}, r"no module 'expand\.9'"),
    ],
)
def test_what_cannot_be_quantised(settings: dict[str, int], message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        Quantize(settings).apply(residual(), images())


def test_weights_that_the_export_lost() -> None:
    exported = export_float(fold_batchnorm(residual()), images(1))
    with pytest.raises(CompressionError, match=r"no exported node carries the weights of \['gone'\]"):
        quantized_nodes(exported, ["head", "gone"])


def test_no_settings_quantise_nothing() -> None:
    exported = export_float(fold_batchnorm(residual()), images(1))
    rewritten = Quantize({}).rewrite(exported, images().numpy())
    assert not any(node.op_type == "QuantizeLinear" for node in rewritten.graph.node)


def test_changing_the_output_breaks_the_contract() -> None:
    class Careless(ChannelPrune):
        def apply(self, model: nn.Module, sample: torch.Tensor, loss: Any = None) -> nn.Module:
            return nn.Sequential(super().apply(model, sample, loss), nn.Linear(10, 4))

    with pytest.raises(AssertionError, match="changes the output"):
        check_pass(Careless, residual(), {"expand.0": 4}, images())


def test_tiny_space_passes_everything_it_offers() -> None:
    """Every combination of passes that the tiny space's training can ask for."""
    space = TinySpace()
    plans = {
        repr(p): p
        for g in space.sample(np.random.default_rng(0), 60)
        if (p := space.training(space.decode(g)).compression)
    }
    assert len(plans) >= 4
    for plan in plans.values():
        for kind, settings in plan.items():
            model = lively(TinyModel(IMAGES, 16, 3))
            check_pass(passes.get(kind), model, settings, images())
