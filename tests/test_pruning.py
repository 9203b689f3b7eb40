"""Pruning of channels, blocks and weights: on real digits, trained for seconds, exported and run in onnxruntime."""

from __future__ import annotations

import copy
import functools
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, numpy_helper
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from nas.compression import (
    ChannelPrune,
    LayerDrop,
    Pass,
    Quantize,
    WeightPrune,
    apply_passes,
    passes,
    penalties,
    restore,
)  # fmt: skip
from nas.compression.importance import IMPORTANCES
from nas.compression.sparse import SHARED, store_sparse
from nas.compression.weight_prune import CHILD
from nas.errors import CompressionError
from nas.latency.runtimes.onnx_to_torch import to_torch
from nas.latency.sessions import session_options
from nas.student.export import deployable, export_float, onnx_macs_params, to_onnx
from nas.testing import check_pass

MARGIN = 0.03  # accuracy that a fine-tuned model may be below its original


class Block(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.b, self.nb = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.nb(self.b(self.act(self.na(self.a(x))))) + x)


class ResNet(nn.Module):
    """Stem, two blocks, a strided layer, two blocks, pooled."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.one = nn.Sequential(Block(width), Block(width))
        self.down = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, 2, padding=1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU()
        )
        self.two = nn.Sequential(Block(2 * width), Block(2 * width))
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(2 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(self.two(self.down(self.one(self.stem(x))))).flatten(1))


class Inverted(nn.Module):
    """An inverted residual: expand, depthwise, project, add."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(width, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6())
        self.depthwise = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()
        )
        self.project = nn.Sequential(nn.Conv2d(hidden, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.project(self.depthwise(self.expand(x)))


class MobileNet(nn.Module):
    """Stem, three inverted residuals, pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.blocks = nn.Sequential(*(Inverted(16, 48) for _ in range(3)))
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 10, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(self.blocks(self.stem(x)))).flatten(1)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 10))


BUILD: dict[str, Callable[[], nn.Module]] = {"resnet": ResNet, "mobilenet": MobileNet, "mlp": mlp}
EPOCHS = {"resnet": 4, "mobilenet": 8, "mlp": 12}


@functools.cache
def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training images and labels, then those of the test."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    inputs = torch.tensor(x[order] / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    labels = torch.tensor(y[order])
    return inputs[:1300], labels[:1300], inputs[1300:], labels[1300:]


def fit(
    model: nn.Module, epochs: int, lr: float = 5e-3, extra: Callable[[], torch.Tensor | None] = lambda: None
) -> nn.Module:
    x, y, *_ = digits()
    optimiser = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(50):
            loss = cross_entropy(model(x[rows]), y[rows])
            if (penalty := extra()) is not None:
                loss = loss + penalty
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return model.eval()


def accuracy(model: nn.Module) -> float:
    _, _, x, y = digits()
    with torch.no_grad():
        return float((model.eval()(x).argmax(1) == y).float().mean())


@functools.cache
def _trained(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return fit(BUILD[kind](), EPOCHS[kind])


def trained(kind: str) -> nn.Module:
    """A model that can read digits; a copy."""
    return copy.deepcopy(_trained(kind))


def sample(n: int = 128) -> torch.Tensor:
    return digits()[0][:n]


def loss_of(n: int = 128) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda out: cross_entropy(out, digits()[1][:n])


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def run(model: onnx.ModelProto, x: torch.Tensor) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), session_options(1), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def same_in_onnx(model: nn.Module, plan: dict[str, Any]) -> onnx.ModelProto:
    """Export the model; it must say of the test images what torch says."""
    exported = to_onnx(model, plan, sample(), sample().numpy())
    onnx.checker.check_model(exported, full_check=True)
    _, _, x, _ = digits()
    with torch.no_grad():
        np.testing.assert_allclose(run(exported, x), model.eval()(x).numpy(), rtol=1e-3, atol=1e-3)
    return exported


def channels(model: nn.Module, name: str) -> int:
    return len(model.get_submodule(name).weight)  # type: ignore[arg-type]


# ---- the contract, and what fine-tuning brings back ---------------------------------------------------

OPTIONS: list[tuple[str, str, dict[str, Any]]] = [
    *(("channel_prune", "resnet", {"ratio": 0.5, "importance": importance}) for importance in IMPORTANCES),
    ("channel_prune", "mobilenet", {"macs": 0.6}),
    ("channel_prune", "mobilenet", {"ratio": 0.25, "scope": "global", "importance": "taylor"}),
    ("channel_prune", "mlp", {"ratio": 0.5}),
    ("layer_drop", "resnet", {"count": 1}),
    ("layer_drop", "mobilenet", {"ratio": 0.34, "importance": "loss"}),
    ("weight_prune", "resnet", {"sparsity": 0.8}),
    ("weight_prune", "mobilenet", {"sparsity": 0.6, "scope": "layer", "skip": ["head", "*.depthwise.0"]}),
    ("weight_prune", "mlp", {"threshold": 0.05}),
]


@pytest.mark.parametrize(
    ("technique", "kind", "options"),
    [pytest.param(*case, marks=[] if case[1] == "mlp" else pytest.mark.slow) for case in OPTIONS],
)
def test_what_is_asked_of_a_model_recovers_and_exports(technique: str, kind: str, options: dict[str, Any]) -> None:
    """Settings come from options; the pass keeps its contract; fine-tuned, the model is nearly as good as it was."""
    model = trained(kind)
    before, size = accuracy(model), parameters(model)
    assert before > 0.9
    state = copy.deepcopy(model.state_dict())
    chosen: type[Pass] = passes.get(technique)
    settings = chosen.settings_for(model, sample(), loss_of(), **options)
    assert settings
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    check_pass(chosen, model, settings, sample(16))
    plan = {technique: settings}
    model = apply_passes(model, plan, sample(), loss_of())
    fit(model, 4)
    assert accuracy(model) >= before - MARGIN
    exported = same_in_onnx(model, plan)
    if technique != "weight_prune":
        assert parameters(deployable(model, plan)) < size
    assert len(exported.SerializeToString()) < len(dense(trained(kind), {}).SerializeToString())


@pytest.mark.parametrize(
    ("technique", "kind", "options"),
    [pytest.param(*case, marks=[pytest.mark.slow] if case[1] == "mobilenet" else []) for case in OPTIONS],
)
def test_a_saved_state_fits_the_skeleton(technique: str, kind: str, options: dict[str, Any]) -> None:
    """Settings alone decide the structure: an untrained model takes the compressed state, whatever chose it."""
    plan = {technique: passes.get(technique).settings_for(trained(kind), sample(), loss_of(), **options)}
    model = apply_passes(trained(kind).to(memory_format=torch.channels_last), plan, sample(), loss_of())
    fit(model, 1)
    skeleton = apply_passes(BUILD[kind]().eval(), plan, sample(8)).eval()
    skeleton.load_state_dict(model.state_dict())
    x = digits()[2]
    with torch.no_grad():
        wanted = model(x)
        torch.testing.assert_close(skeleton(x), wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(copy.deepcopy(model)(x), wanted)
        torch.testing.assert_close(deployable(model, plan)(x), wanted, rtol=1e-3, atol=1e-3)
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(skeleton, (sample(2),), dynamic_shapes=({0: batch},))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), wanted, rtol=1e-4, atol=1e-4)


# ---- channels: which ones go -------------------------------------------------------------------------


def lost_channels(model: nn.Module, name: str, importance: str, keep: int, loss: Any = None) -> set[int]:
    """Rows of the layer's weight that pruning removes."""
    weight = model.get_submodule(name).weight.detach().clone()  # type: ignore[operator]
    pruned = ChannelPrune({name: {"keep": keep, "importance": importance}}).apply(model, sample(), loss)
    kept = pruned.get_submodule(name).weight.detach()  # type: ignore[operator]
    return {i for i, row in enumerate(weight) if not any(torch.equal(row, other) for other in kept)}


def test_importances_differ() -> None:
    chosen = {kind: frozenset(lost_channels(trained("resnet"), "two.0.a", kind, 16, loss_of())) for kind in IMPORTANCES}
    assert {len(lost) for lost in chosen.values()} == {16}
    assert len(set(chosen.values())) >= 5  # two may agree by chance


@pytest.mark.parametrize("importance", ["l1", "l2", "group_lasso"])
def test_magnitudes_drop_what_is_small(importance: str) -> None:
    model = trained("mlp")
    small = [3, 50, 95]
    model[1].weight.data[small] *= 0.001  # type: ignore[index]
    model[1].bias.data[small] *= 0.001  # type: ignore[index]
    model[3].weight.data[:, small] *= 0.001  # type: ignore[index]
    assert lost_channels(model, "1", importance, 93) == set(small)


def test_taylor_keeps_what_the_loss_depends_on() -> None:
    """A channel of small weights that the loss hangs on stays; magnitudes would drop it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    model[1].weight.data[5] = 0.01
    model[1].bias.data[5] = 0.1
    model[3].weight.data[:, 5] = 0.05

    def loss(out: torch.Tensor) -> torch.Tensor:
        """Nothing but channel 5: what it alone adds to the outputs, which the others' weights are corrected for."""
        return (out @ direction).square().mean()

    others = model[3].weight.data[:, [i for i in range(8) if i != 5]]
    direction = torch.linalg.svd(others.T).Vh[-1]  # at right angles to what all other channels write
    assert 5 in lost_channels(copy.deepcopy(model), "1", "l1", 1)
    assert 5 not in lost_channels(copy.deepcopy(model), "1", "taylor", 1, loss)
    assert all(p.grad is None for p in ChannelPrune({"1": {"keep": 4, "importance": "taylor"}}).apply(
        model, sample(), loss).parameters())  # fmt: skip


def test_entropy_drops_what_says_nothing() -> None:
    """A channel that is constant over the images goes, however large its weights are."""
    model = trained("resnet")
    block = model.get_submodule("two.0")
    block.na.weight.data[7] = 0.0
    block.na.bias.data[7] = 100.0  # the same for every image, far from the others
    block.na.weight.data[9] *= 1e-6
    block.na.bias.data[9] = 0.0
    lost = lost_channels(model, "two.0.a", "entropy", 30)
    assert 7 in lost


def test_slimming_drops_the_smallest_scales() -> None:
    model = trained("resnet")
    scales = model.get_submodule("two.0.na").weight.detach().abs()  # type: ignore[operator]
    wanted = set(torch.argsort(scales)[:12].tolist())
    assert lost_channels(model, "two.0.a", "bn", 20) == wanted


def test_slimming_wants_normalisation() -> None:
    with pytest.raises(CompressionError, match=r"'1' cannot be scored[^$]*no batch normalisation"):
        ChannelPrune({"1": {"keep": 8, "importance": "bn"}}).apply(mlp(), sample())
    with pytest.raises(CompressionError, match="no layer that fits"):
        ChannelPrune.settings_for(mlp(), sample(), importance="bn")


def test_random_is_the_same_each_time() -> None:
    first, second = (lost_channels(trained("mlp"), "1", "random", 40) for _ in range(2))
    assert first == second
    assert lost_channels(trained("mlp"), "1", "l1", 40) != first


def test_the_group_lasso_learns_what_to_remove() -> None:
    """With the penalty, channels' norms shrink in training, and cutting the smallest costs less than without it."""
    settings = {"1": {"keep": 24, "importance": "group_lasso", "strength": 0.01}}
    norms, costs = {}, {}
    for eased in (False, True):
        torch.manual_seed(0)
        model = mlp()
        fit(model, 8, extra=penalties(model, {"channel_prune": settings})[0] if eased else lambda: None)
        first, second = model[1], model[3]  # type: ignore[index]
        norms[eased] = torch.cat([first.weight, first.bias[:, None], second.weight.T], dim=1).detach().norm(dim=1)
        before = accuracy(model)
        costs[eased] = before - accuracy(ChannelPrune(settings).apply(model, sample()))
        assert before > 0.9
    assert norms[True].mean() < 0.7 * norms[False].mean()
    assert norms[True].min() < 0.2 * norms[False].min()
    assert costs[True] < 0.5 * costs[False]


def test_the_penalty_is_the_sum_of_norms_and_its_groups_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import nas.compression.channel_prune as module

    found = []
    real = module.groups_of
    monkeypatch.setattr(module, "groups_of", lambda *args, **more: found.append(1) or real(*args, **more))
    model = trained("mlp").train()
    step = ChannelPrune({"1": {"keep": 8, "importance": "group_lasso", "strength": 0.5}, "3": 16})
    assert step.penalty(model) is None  # no input was seen yet
    model(sample())
    value = step.penalty(model)
    assert value is not None
    first, second = model[1], model[3]  # type: ignore[index]
    owned = torch.cat([first.weight, first.bias[:, None], second.weight.T], dim=1)
    torch.testing.assert_close(value, 0.5 * owned.norm(dim=1).sum())
    value.backward()
    assert first.weight.grad.abs().sum() > 0
    assert model.training
    first.weight.data *= 2
    assert step.penalty(model) > value
    assert len(found) == 1
    assert not model._forward_pre_hooks
    assert ChannelPrune({"1": 8}).penalty(model) is None


# ---- channels: how many ------------------------------------------------------------------------------


def test_a_group_is_named_once_and_the_output_never() -> None:
    settings = ChannelPrune.settings_for(trained("resnet"), sample(), ratio=0.5, round_to=1)
    assert settings == {
        "stem.0": 8, "one.0.a": 8, "one.1.a": 8, "down.0": 16, "two.0.a": 16, "two.1.a": 16,
    }  # fmt: skip
    inverted = ChannelPrune.settings_for(trained("mobilenet"), sample(), ratio=0.5)
    assert inverted == {"stem.0": 8, **{f"blocks.{i}.expand.0": 24 for i in range(3)}}


@pytest.mark.parametrize("multiple", [1, 4, 8, 16, 64])
def test_rounding_is_up_to_the_multiple(multiple: int) -> None:
    settings = ChannelPrune.settings_for(trained("mobilenet"), sample(), ratio=0.7, round_to=multiple)
    for i in range(3):
        kept = settings.get(f"blocks.{i}.expand.0", 48)
        assert kept == min(48, max(multiple, math.ceil(48 * 0.3 / multiple) * multiple))
    pruned = ChannelPrune(settings).apply(trained("mobilenet"), sample())
    assert channels(pruned, "blocks.1.depthwise.0") == settings.get("blocks.1.expand.0", 48)


@pytest.mark.parametrize(("kind", "share"), [("resnet", 0.5), ("resnet", 0.25), ("mobilenet", 0.5), ("mlp", 0.3)])
def test_the_share_of_macs_is_met_and_not_missed_by_much(kind: str, share: float) -> None:
    settings = ChannelPrune.settings_for(trained(kind), sample(), macs=share, round_to=1)
    pruned = ChannelPrune(settings).apply(trained(kind), sample())
    whole, smaller = (onnx_macs_params(export_float(deployable(m, {}), sample(1)))[0] for m in (trained(kind), pruned))
    assert 0.85 * share < smaller / whole <= share


@pytest.mark.slow
def test_what_rounding_takes_too_much_is_given_back() -> None:
    """In multiples of 8 no one ratio meets the share; groups differ, and none could keep 8 channels more."""

    def macs(keep: dict[str, int]) -> int:
        return onnx_macs_params(dense(ChannelPrune(keep).apply(trained("resnet"), sample()), {}))[0]

    settings = ChannelPrune.settings_for(trained("resnet"), sample(), macs=0.5)
    assert macs(settings) <= 0.5 * macs({})
    widths = {name: channels(trained("resnet"), name) for name in settings}
    assert len({keep / widths[name] for name, keep in settings.items()}) > 1
    for name, keep in settings.items():
        assert keep % 8 == 0
        assert macs(settings | {name: keep + 8}) > 0.5 * macs({})


def test_a_share_of_macs_that_rounding_forbids() -> None:
    with pytest.raises(CompressionError, match=r"5 % of the MACs cannot be reached[^$]*macs of at least 0\.\d+"):
        ChannelPrune.settings_for(trained("resnet"), sample(), macs=0.05, round_to=8)


def test_a_global_threshold_takes_more_where_there_is_more_to_take() -> None:
    """One group's channels are mostly dead: it loses most, although all are asked for the same share."""
    model = trained("resnet")
    block = model.get_submodule("two.0")
    for tensor in (block.a.weight.data, block.na.weight.data, block.na.bias.data):
        tensor[:28] *= 1e-4
    block.b.weight.data[:, :28] *= 1e-4
    options = {"ratio": 0.25, "round_to": 1, "scope": "global"}
    settings = ChannelPrune.settings_for(model, sample(), **options)
    assert settings["two.0.a"] <= 4
    assert settings.get("two.1.a", 32) > 16
    lost = sum(channels(model, name) - keep for name, keep in settings.items())
    groups = ("stem.0", "one.0.a", "one.1.a", "down.0", "two.0.a", "two.1.a")
    assert lost == int(0.25 * sum(channels(model, name) for name in groups))


def test_groups_may_have_ratios_of_their_own_and_be_left_out() -> None:
    options = {"ratio": 0.5, "round_to": 1, "ratios": {"two.*.a": 0.75, "one.0.a": 0.0}, "skip": ["down.0"]}
    for scope in ("uniform", "global"):
        settings = ChannelPrune.settings_for(trained("resnet"), sample(), scope=scope, **options)
        assert "down.0" not in settings
        assert "one.0.a" not in settings
        assert (settings["two.0.a"], settings["two.1.a"]) == (8, 8)
    only = ChannelPrune.settings_for(trained("resnet"), sample(), layers=["two.1.b"], round_to=1)
    assert only == {"down.0": 16}  # the residual's group, by its first layer


def test_importance_and_strength_are_part_of_the_settings() -> None:
    settings = ChannelPrune.settings_for(trained("mlp"), sample(), importance="group_lasso", strength=0.01)
    assert settings["1"] == {"keep": 48, "importance": "group_lasso", "strength": 0.01}
    assert ChannelPrune.settings_for(trained("mlp"), sample(), ratio=0.0) == {}


class Attention(nn.Module):
    """One transformer block with separate projections and a constant number of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(8, 32), nn.LayerNorm(32)
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.up, self.down, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x.flatten(1, 2))
        q, k, v = (f(self.norm(x)).reshape(-1, 8, 4, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = (q @ k.transpose(-1, -2) / 8**0.5).softmax(dim=-1) @ v
        x = x + self.o(mixed.transpose(1, 2).reshape(-1, 8, 32))
        return self.head((x + self.down(torch.relu(self.up(x)))).mean(dim=1))


def test_a_forward_with_constants_is_pruned_through_its_graph() -> None:
    torch.manual_seed(0)
    model = Attention().eval()
    for name in ("q", "v"):
        with pytest.raises(CompressionError, match=rf"'{name}' cannot be pruned: its outputs are made of"):
            ChannelPrune({name: 16}).apply(model, sample())
    settings = ChannelPrune.settings_for(model, sample(), ratio=0.5)
    assert settings == {"embed": 16, "q.heads": 2, "up": 32}
    assert ChannelPrune.settings_for(model, sample(), layers=["q"]) == {"q.heads": 2}
    check_pass(ChannelPrune, model, settings, sample(8))
    pruned = ChannelPrune(settings).apply(model, sample())
    assert channels(pruned, "k") == channels(pruned, "v") == 2 * 8


class Unfollowed(Attention):
    """The same, where the graph cannot be had either."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if bool(x.max() > -1) else x


def test_what_neither_way_prunes_is_left_alone() -> None:
    with pytest.raises(CompressionError, match="'q' cannot be pruned: the forward has constants"):
        ChannelPrune({"q": 16}).apply(Unfollowed(), sample())
    assert ChannelPrune.settings_for(Unfollowed(), sample(), ratio=0.5) == {"embed": 16, "up": 32}
    with pytest.raises(CompressionError, match="'q' cannot be pruned"):
        ChannelPrune.settings_for(Unfollowed(), sample(), layers=["q"])


def test_grouped_convolutions_are_left_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.Conv2d(16, 16, 3, groups=4), nn.Conv2d(16, 32, 1), nn.Flatten(), nn.Linear(512, 10)
    ).eval()
    settings = ChannelPrune.settings_for(model, sample(), ratio=0.5)
    assert settings == {"2": 16}
    check_pass(ChannelPrune, model, settings, sample(8))
    with pytest.raises(CompressionError, match=r"'0' cannot be pruned: .*grouped convolution"):
        ChannelPrune({"0": 8}).apply(model, sample())


def test_the_output_layer_is_not_pruned() -> None:
    with pytest.raises(CompressionError, match="'head' cannot be pruned: it is the model's output"):
        ChannelPrune({"head": 4}).apply(ResNet(), sample())
    with pytest.raises(CompressionError, match="no layer that fits"):
        ChannelPrune.settings_for(ResNet(), sample(), layers=["head"])


def test_frozen_weights_and_modes_stay() -> None:
    model = trained("resnet").train()
    model.get_submodule("stem.1").eval()
    for p in model.get_submodule("one").parameters():
        p.requires_grad_(False)
    pruned = ChannelPrune({"one.0.a": {"keep": 8, "importance": "entropy"}}).apply(model, sample())
    assert pruned.training
    assert not pruned.get_submodule("stem.1").training
    assert not pruned.get_submodule("one.0.a").weight.requires_grad  # type: ignore[union-attr]
    assert pruned.get_submodule("two.0.a").weight.requires_grad  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"two.0.x": 8}, r"no module 'two\.0\.x'"),
        ({"two.0.na": 8}, r"'two\.0\.na' is a BatchNorm2d"),
        ({"two.0.a": 40}, r"keep 40 of 32 channels[^$]*1\.\.32"),
        ({"two.0.a": {"keep": 0}}, r"keep 0 of 32"),
        ({"two.0.a": 0.5}, r"keep 0\.5 channels of 'two\.0\.a'[^$]*whole number"),
        ({"two.0.a": True}, r"keep True channels"),
        ({"two.0.a": {"keep": 8, "importance": "l3"}}, r"unknown importance 'l3'[^$]*l1, l2, taylor"),
        ({"two.0.a": {"keep": 8, "kind": "l1"}}, r"unknown key 'kind' for 'two\.0\.a'[^$]*keep, importance"),
        ({"two.0.a": {"importance": "l1"}}, r"no key 'keep'"),
        ({"two.0.a": {"keep": 8, "strength": -1}}, r"strength -1"),
    ],
)
def test_wrong_channel_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        ChannelPrune(settings).apply(ResNet(), sample())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.0}, r"ratio is 1\.0[^$]*\[0, 1\)"),
        ({"ratio": "half"}, r"ratio is 'half'"),
        ({"ratio": 0.5, "macs": 0.5}, "both ratio and macs"),
        ({"macs": 0}, r"macs is 0[^$]*\(0, 1\]"),
        ({"importance": "size"}, "unknown importance 'size'"),
        ({"round_to": 0}, "round_to is 0"),
        ({"scope": "layer"}, r"unknown scope 'layer'[^$]*uniform or global"),
        ({"layers": ["body.*"]}, r"'body\.\*' fits no layer"),
        ({"layers": "two.*"}, r"'two\.\*' is no list"),
        ({"skip": ["body"]}, "'body' fits no layer"),
        ({"ratios": {"body": 0.5}}, "'body' fits no layer"),
        ({"ratios": {"two.*": 2}}, r"ratios of 'two\.\*' is 2"),
    ],
)
def test_wrong_channel_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        ChannelPrune.settings_for(ResNet(), sample(), **options)


# ---- blocks ------------------------------------------------------------------------------------------


def test_the_block_that_changes_least_goes_first() -> None:
    """Blocks of a stage are found one by one; the one whose body is nearly nothing is the first to go."""
    model = trained("resnet")
    last = model.get_submodule("two.1")
    last.nb.weight.data *= 1e-3
    last.nb.bias.data *= 1e-3
    for options in ({}, {"importance": "loss"}):
        assert LayerDrop.settings_for(model, sample(), loss_of(), **options) == {"two.1": True}
    everything = LayerDrop.settings_for(model, sample(), loss_of(), ratio=1.0)
    assert next(iter(everything)) == "two.1"
    assert set(everything) == {"one.0", "one.1", "two.0", "two.1"}
    assert LayerDrop.settings_for(model, sample(), count=0) == {}


def test_dropping_the_measured_block_costs_least() -> None:
    """By the loss, the first choice is the best one: no other block costs less on the same sample."""
    chosen = next(iter(LayerDrop.settings_for(trained("resnet"), sample(), loss_of(), importance="loss")))
    costs = {}
    for name in ("one.0", "one.1", "two.0", "two.1"):
        with torch.no_grad():
            smaller = LayerDrop({name: True}).apply(trained("resnet"), sample())
            costs[name] = float(loss_of()(smaller.eval()(sample())))
    assert costs[chosen] == min(costs.values())


def test_importance_is_measured_again_after_each_drop() -> None:
    """Alone, the second block is cheaper to drop than the third; once the first is gone, the third makes up for it."""
    torch.manual_seed(0)

    def scaled(by: float) -> nn.Linear:
        layer = nn.Linear(16, 16, bias=False)
        layer.weight.data.copy_(by * torch.eye(16))
        return layer

    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), scaled(1.1), scaled(1.12), scaled(1 / 1.14)).eval()
    with torch.no_grad():
        wanted = model(sample())

    def loss(out: torch.Tensor) -> torch.Tensor:
        return (out - wanted).square().mean()

    apart = [LayerDrop({name: True}).apply(copy.deepcopy(model), sample()) for name in "234"]
    once = [loss(dropped(sample())).item() for dropped in apart]
    assert once == sorted(once)
    assert list(LayerDrop.settings_for(model, sample(), loss, count=3, importance="loss")) == ["2", "4", "3"]


def test_a_dropped_block_is_the_identity() -> None:
    model = trained("resnet")
    pruned = LayerDrop({"one.1": True}).apply(copy.deepcopy(model), sample())
    assert isinstance(pruned.get_submodule("one.1"), nn.Identity)
    with torch.no_grad():
        torch.testing.assert_close(pruned.get_submodule("one")(model.get_submodule("stem")(sample())),
            model.get_submodule("one.0")(model.get_submodule("stem")(sample())))  # fmt: skip
    kinds = Counter(node.op_type for node in export_float(deployable(pruned, {}), sample(1)).graph.node)
    assert kinds["Conv"] == 8  # of ten


def test_only_named_candidates_are_dropped() -> None:
    found = LayerDrop.settings_for(trained("resnet"), sample(), ratio=1.0, candidates=["one.*"])
    assert set(found) == {"one.0", "one.1"}
    inside = LayerDrop.settings_for(trained("resnet"), sample(), ratio=1.0, candidates=["two.?.b"])
    assert set(inside) == {"two.0.b", "two.1.b"}


class Odd(nn.Module):
    """A block of two inputs, one of two outputs, one that runs twice and one that never does."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.split = nn.Bilinear(64, 64, 64), nn.LSTM(64, 64, batch_first=True)
        self.twice, self.never, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        x = self.twice(self.twice(self.mix(x, x)))
        return self.head(self.split(x)[0])


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (ResNet, {"down": True}, r"'down' cannot be dropped: it makes \[n, 32, 4, 4\] of \[n, 16, 8, 8\]"),
        (ResNet, {"one.9": True}, r"no module 'one\.9'"),
        (ResNet, {"one.0": False}, r"False for 'one\.0'[^$]*True"),
        (ResNet, {"one.0": 1}, r"1 for 'one\.0'"),
        (ResNet, {"": True}, "the whole model"),
        (ResNet, {"one": True, "one.0": True}, r"'one\.0' lies in 'one'"),
        (Odd, {"mix": True}, "'mix' cannot be dropped: it is called with 2 arguments"),
        (Odd, {"split": True}, "'split' cannot be dropped: it makes a tuple of a Tensor"),
        (Odd, {"never": True}, "'never' cannot be dropped: the forward does not call it"),
    ],
)
def test_what_cannot_be_dropped(model: Callable[[], nn.Module], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        LayerDrop(settings).apply(model(), sample())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 9}, r"9 blocks to drop, but only 4 can be[^$]*at most 4"),
        ({"count": -1}, "count is -1"),
        ({"count": 1, "ratio": 0.5}, "both count and ratio"),
        ({"ratio": 1.5}, r"ratio is 1\.5"),
        ({"importance": "size"}, r"unknown importance 'size'[^$]*change, loss"),
        ({"importance": "loss"}, "no loss to measure"),
        ({"candidates": ["body*"]}, r"'body\*' fits no layer"),
    ],
)
def test_wrong_block_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        LayerDrop.settings_for(ResNet(), sample(), None, **options)


def test_what_runs_twice_is_no_candidate() -> None:
    assert LayerDrop.settings_for(Odd(), sample(), ratio=1.0) == {}


# ---- weights -----------------------------------------------------------------------------------------


def zeros(model: nn.Module) -> dict[str, float]:
    """Share of zeros by layer."""
    return {
        name: float((m.weight == 0).double().mean())
        for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)
    }  # fmt: skip


def masked(model: nn.Module, settings: dict[str, Any]) -> nn.Module:
    """With its weights pruned, as the pipeline does it."""
    return apply_passes(model, {"weight_prune": settings}, sample())


def test_the_smallest_weights_go_and_the_others_stay() -> None:
    model = trained("mlp")
    before = model[1].weight.detach().clone()  # type: ignore[index]
    plain = restore(masked(model, {"1": 0.75}), {"weight_prune": {"1": 0.75}})
    after = plain[1].weight.detach()  # type: ignore[index]
    lost = after == 0
    assert int(lost.sum()) == round(0.75 * before.numel())
    assert before[lost].abs().max() <= before[~lost].abs().min()
    assert torch.equal(after[~lost], before[~lost])
    assert CHILD not in dict(plain.named_modules())
    assert not plain._forward_pre_hooks


def test_a_threshold_is_a_magnitude() -> None:
    model = trained("mlp")
    small = model[1].weight.detach().abs() < 0.05  # type: ignore[index]
    settings = WeightPrune.settings_for(model, sample(), threshold=0.05, layers=["1"])
    assert settings == {"1": {"threshold": 0.05}}
    masked(model, settings)
    assert torch.equal(model[1].weight == 0, small)  # type: ignore[index]


def test_zeros_stay_zeros_while_the_rest_is_trained() -> None:
    model = trained("resnet")
    settings = WeightPrune.settings_for(model, sample(), sparsity=0.9)
    masked(model, settings)
    start, kept = zeros(model), model.get_submodule("two.0.a").weight.detach().clone()  # type: ignore[operator]
    fit(model, 2)
    assert zeros(model) == start == settings  # exactly: shares are of whole weights
    trained_weight = model.get_submodule("two.0.a").weight  # type: ignore[union-attr]
    assert (trained_weight[kept != 0] != kept[kept != 0]).float().mean() > 0.9  # type: ignore[index]


def test_global_sparsity_is_that_of_the_model() -> None:
    model = trained("resnet")
    sizes = {name: model.get_submodule(name).weight.numel() for name in zeros(model)}  # type: ignore[union-attr,operator]
    settings = WeightPrune.settings_for(model, sample(), sparsity=0.8)
    assert len(set(settings.values())) > 5
    total = sum(share * sizes[name] for name, share in settings.items())
    assert round(total) == round(0.8 * sum(sizes.values()))
    model = masked(model, settings)
    weights = [model.get_submodule(name).weight.detach().abs() for name in sizes]  # type: ignore[union-attr,operator]
    before = [trained("resnet").get_submodule(name).weight.detach().abs() for name in sizes]  # type: ignore[union-attr,operator]
    largest_lost = max(float(b[w == 0].max()) for w, b in zip(weights, before, strict=True))
    assert largest_lost <= min(float(w[w > 0].min()) for w in weights)  # one threshold
    uniform = WeightPrune.settings_for(model, sample(), sparsity=0.8, scope="layer", skip=["head"])
    assert uniform == dict.fromkeys([name for name in sizes if name != "head"], 0.8)


def test_a_layer_of_nothing_but_small_weights_keeps_one() -> None:
    model = trained("mlp")
    model[3].weight.data *= 1e-6  # type: ignore[index]
    settings = WeightPrune.settings_for(model, sample(), sparsity=0.7)
    assert settings["3"] == (96 * 64 - 1) / (96 * 64)
    assert zeros(masked(model, settings))["3"] == settings["3"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"3": 1.0}, r"sparsity 1\.0 for '3'[^$]*\[0, 1\)"),
        ({"3": -0.1}, r"sparsity -0\.1"),
        ({"3": "most"}, "sparsity 'most'"),
        ({"3": True}, "sparsity True"),
        ({"3": {"threshold": -1}}, "threshold -1 for '3'"),
        ({"3": {"share": 0.5}}, r"\{'share': 0\.5\} for '3'"),
        ({"9": 0.5}, "no module '9'"),
        ({"2": 0.5}, r"'2' is a ReLU"),
    ],
)
def test_wrong_weight_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        WeightPrune(settings).apply(mlp(), sample())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1}, r"sparsity 1 for '\*'"),
        ({"sparsity": 0.5, "threshold": 0.1}, "both sparsity and threshold"),
        ({"scope": "uniform"}, r"unknown scope 'uniform'[^$]*global or layer"),
        ({"layers": ["x*"]}, r"'x\*' fits no Conv2d or Linear"),
    ],
)
def test_wrong_weight_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        WeightPrune.settings_for(mlp(), sample(), **options)


# ---- weights: their storage --------------------------------------------------------------------------


def optimised(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """What onnxruntime runs: its graph after loading."""
    options = session_options(1)
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 3  # it warns that such a file belongs to this machine
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimised.onnx")


def kinds(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def dense(model: nn.Module, plan: dict[str, Any]) -> onnx.ModelProto:
    return export_float(deployable(model, plan), sample(1))


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("kind", ["resnet", "mlp"])
def test_the_file_is_as_small_as_the_sparsity_says(kind: str, sparsity: float, tmp_path: Path) -> None:
    """One bit a weight and four bytes for each that is left; decoded at loading, so the runtime's graph is the same."""
    model = trained(kind)
    plan = {"weight_prune": WeightPrune.settings_for(model, sample(), sparsity=sparsity, scope="layer")}
    model = apply_passes(model, plan, sample())
    whole, small = dense(model, plan), same_in_onnx(model, plan)
    stored = {t.name: t for t in whole.graph.initializer}
    gone = set(stored) - {t.name for t in small.graph.initializer}
    saved = wanted = 0
    for name in gone:
        n = math.prod(stored[name].dims)
        wanted += math.ceil(n / 8) + 4 * (n - round(sparsity * n))
        saved += 4 * n
    assert saved > 0.9 * sum(4 * math.prod(t.dims) for t in whole.graph.initializer)
    operators = 800 * len(gone) + 500
    size = len(small.SerializeToString())
    expected = len(whole.SerializeToString()) - saved + wanted
    assert expected < size < expected + operators
    assert kinds(optimised(small, tmp_path)) == kinds(optimised(whole, tmp_path))
    assert onnx_macs_params(small) == onnx_macs_params(whole)


def test_decoded_weights_are_the_weights() -> None:
    """Bit for bit, for every shape and share of zeros, those at the ends included."""
    generator = np.random.default_rng(0)
    for shape, share in [((64, 64), 0.5), ((31, 7, 3, 3), 0.9), ((4097,), 0.99), ((2000,), 1.0)]:
        weights = generator.normal(size=shape).astype(np.float32)
        weights[generator.random(shape) < share] = 0
        weights.reshape(-1)[0] = 0
        for array in (weights, (100 * weights).clip(-127, 127).astype(np.int8).repeat(4, axis=0)):
            graph = onnx.helper.make_graph(
                [onnx.helper.make_node("Identity", ["w"], ["y"])], "g", [],
                [onnx.helper.make_tensor_value_info("y", onnx.helper.np_dtype_to_tensor_dtype(array.dtype), None)],
                [numpy_helper.from_array(array, "w")],
            )  # fmt: skip
            model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
            size = len(model.SerializeToString())
            model = store_sparse(model, {"w"})
            assert len(model.SerializeToString()) < size
            session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
            assert np.array_equal(session.run(None, {})[0], array)


def test_what_would_not_be_smaller_stays_dense() -> None:
    model = trained("mlp")
    plan = {"weight_prune": {"1": 0.02, "3": 0.9, "5": 0.2}}
    model = apply_passes(model, plan, sample())
    names = {t.name for t in same_in_onnx(model, plan).graph.initializer}
    assert {"1.weight", "5.weight"} <= names  # 64 · 10 weights: the operators would take more than is saved
    assert "3.weight" not in names
    plan = {"weight_prune": {"1": 0.01}}
    kept = to_onnx(apply_passes(trained("mlp"), plan, sample()), plan, sample(), sample().numpy())
    assert not {t.name for t in kept.graph.initializer} & set(SHARED)


def test_the_runtime_torch_decodes_too() -> None:
    model = trained("mlp")
    plan = {"weight_prune": {"1": 0.9, "3": 0.9}}
    exported = to_onnx(apply_passes(model, plan, sample()), plan, sample(), sample().numpy())
    assert "CumSum" in kinds(exported)
    x = sample(4)
    module = to_torch(exported, {exported.graph.input[0].name: x.numpy()})
    np.testing.assert_allclose(module(x)[0].numpy(), run(exported, x), rtol=1e-4, atol=1e-4)
    # Decoded while it is translated: what is left are the layers.
    assert [n.name for n in module.graph.nodes if n.op == "call_function"] == [
        "reshape", "linear", "relu", "linear_1", "relu_1", "linear_2",
    ]  # fmt: skip


class Shared(nn.Module):
    """A convolution that runs twice, whose weights the export copies for its second node."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.my_conv = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.rows, self.head = nn.Linear(32, 64, bias=False), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.my_conv(torch.relu(self.my_conv(self.first(x)))))
        return self.head(torch.relu(self.rows(x.flatten(2).transpose(1, 2))).mean(dim=1))


def test_weights_that_the_export_copies_or_turns_are_found() -> None:
    torch.manual_seed(0)
    model = Shared().eval()
    plan = {"weight_prune": {"my_conv": 0.9, "rows": 0.9}}
    check_pass(WeightPrune, model, plan["weight_prune"], sample(8))
    exported = same_in_onnx(apply_passes(model, plan, sample()), plan)
    largest = max(math.prod(t.dims) for t in exported.graph.initializer)
    assert largest < 0.2 * 32 * 32 * 9
    # A mask has one bit a weight; the convolution is there twice.
    masks = [t for t in exported.graph.initializer if t.data_type == TensorProto.UINT8 and math.prod(t.dims) > 100]
    assert 8 * sum(math.prod(t.dims) for t in masks) == 2 * 32 * 32 * 9 + 32 * 64


# ---- together ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("order", [("weight_prune", "quantize"), ("quantize", "weight_prune")])
def test_pruned_and_quantised_weights(order: tuple[str, str], tmp_path: Path) -> None:
    """Zeros outlive the folding and the rounding, and the file keeps the integers that are left."""
    names = [name for name in zeros(ResNet()) if name != "head"]
    settings = {"weight_prune": dict.fromkeys(names, 0.6), "quantize": dict.fromkeys(names, 8)}
    plan = {technique: settings[technique] for technique in order}
    model = apply_passes(trained("resnet"), plan, sample())
    fit(model, 2)
    assert accuracy(model) >= accuracy(trained("resnet")) - MARGIN
    assert min(zeros(model)[name] for name in names) > 0.59
    exported = to_onnx(model, plan, sample(), sample().numpy())
    plain = to_onnx(model, {"quantize": settings["quantize"]}, sample(), sample().numpy())
    stored, whole = ({t.name: len(t.raw_data) for t in m.graph.initializer} for m in (exported, plain))
    assert sum(stored.values()) < 0.75 * sum(whole.values())  # 1 bit and 8 · 0.4 of 8, and what is not pruned
    assert len(exported.SerializeToString()) < len(plain.SerializeToString())
    x = digits()[2]
    assert np.array_equal(run(exported, x), run(plain, x))
    ran = kinds(optimised(exported, tmp_path))
    assert ran == kinds(optimised(plain, tmp_path))
    assert ran["QLinearConv"] == 10


@pytest.mark.parametrize("technique", ["channel_prune", "layer_drop", "weight_prune"])
def test_traced_modules_are_pruned_like_any(technique: str) -> None:
    """A graph's copy keeps only the children that it calls."""
    torch.manual_seed(0)
    model = torch.fx.symbolic_trace(ResNet()).eval()
    settings = {"channel_prune": {"two.0.a": 8}, "layer_drop": {"two.0.nb": True}, "weight_prune": {"two.0.a": 0.5}}
    check_pass(passes.get(technique), model, settings[technique], sample(8))
    plan = {technique: settings[technique]}
    same_in_onnx(copy.deepcopy(apply_passes(model, plan, sample())), plan)


@pytest.mark.slow
def test_all_three_in_their_order_with_training_between() -> None:
    model = trained("mobilenet")
    before, size = accuracy(model), len(dense(model, {}).SerializeToString())
    plan: dict[str, Any] = {}
    for technique, options in (
        ("layer_drop", {"count": 1}), ("channel_prune", {"ratio": 0.5}), ("weight_prune", {"sparsity": 0.5}),
    ):  # fmt: skip
        settings = passes.get(technique).settings_for(model, sample(), loss_of(), **options)
        plan[technique] = settings
        model = fit(apply_passes(model, {technique: settings}, sample(), loss_of()), 5)
    assert accuracy(model) >= before - 2 * MARGIN
    exported = same_in_onnx(model, plan)
    assert len(exported.SerializeToString()) < 0.5 * size


def test_masks_follow_what_takes_the_place_of_a_layer() -> None:
    """A mask belongs to a name: the layer that folding and simulating make is sparse, in a Sequential as anywhere."""
    model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10))
    plan = {"weight_prune": {"0": 0.5, "4": 0.5}}
    model = apply_passes(model.eval(), plan, sample())
    model = Quantize({"0": 8}).apply(model, sample())
    assert type(model[0]) is not nn.Conv2d
    fit(model, 1)
    assert zeros(model) == {"0": 0.5, "4": 0.5}
    again = apply_passes(model, {"weight_prune": {"4": 0.75}}, sample())  # harder, later
    assert zeros(again)["4"] == 0.75
    assert len(again._forward_pre_hooks) == 1
