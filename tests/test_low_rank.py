"""Low rank: pieces that compute what the layer did, ranks by their definition, and accuracy won back by training."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nas.compression import LowRank, Quantize, apply_passes
from nas.compression.low_rank import macs
from nas.errors import CompressionError
from nas.evaluators.train import Lessons, Recipe, predict, train
from nas.space import Training
from nas.student.export import deployable, export_float, onnx_macs_params, to_onnx
from nas.student.teacher import onnx_logits
from nas.tasks import tasks
from nas.testing import check_pass


class Net(nn.Module):
    """A strided, a dilated and a depthwise convolution, each normalised; a 1×1 and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU())
        self.wide = nn.Sequential(nn.Conv2d(32, 32, (3, 5), 1, (2, 4), 2, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.point = nn.Conv2d(32, 24, 1, 2, 1)
        self.hidden, self.head = nn.Linear(24 * 9, 32), nn.Linear(32, 10, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.down(self.stem(x))
        x = self.point(torch.relu(self.depthwise(self.wide(x) + x)))
        return self.head(torch.relu(self.hidden(x.flatten(1))))


EVERY = ["stem.0", "down.0", "wide.0", "point", "hidden", "head"]
FULL: dict[str, Any] = {"stem.0": 9, "down.0": [32, 16], "wide.0": 32, "point": 24, "hidden": 32, "head": 10}


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model = Net()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def images(n: int = 8) -> torch.Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def rank_limited(model: nn.Module, settings: dict[str, Any]) -> nn.Module:
    """Weights whose rank, or multilinear rank, is what the settings say."""
    for name, ranks in settings.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        for mode, rank in enumerate(ranks if isinstance(ranks, list) else [ranks]):
            matrix = weight.data.transpose(0, mode)
            u, s, v = torch.linalg.svd(matrix.flatten(1), full_matrices=False)
            s[rank:] = 0
            weight.data = ((u * s) @ v).view(matrix.shape).transpose(0, mode).contiguous()
    return model


# ---- the contract ------------------------------------------------------------------------------------

PLANS: list[dict[str, Any]] = [
    {"stem.0": 4},
    {"down.0": 8, "wide.0": [8, 12]},
    {"down.0": [32, 4], "wide.0": [8, 32]},
    {"point": 8, "hidden": 12, "head": 5},
    {"stem.0": 4, "down.0": [8, 8], "wide.0": 8, "point": 8, "hidden": 8, "head": 4},
    FULL,
]


@pytest.mark.parametrize("settings", PLANS)
def test_the_contract(settings: dict[str, Any]) -> None:
    check_pass(LowRank, net(), settings, images())


def test_at_full_rank_the_model_is_the_one_it_was() -> None:
    model, wanted = LowRank(FULL).apply(net(), images()), net().state_dict()
    assert list(model.state_dict()) == list(wanted)
    assert all(torch.equal(value, wanted[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("settings", PLANS[:-1])
def test_weights_of_that_rank_lose_nothing(settings: dict[str, Any]) -> None:
    """Whatever stride, padding, dilation and bias are."""
    model = rank_limited(net(), settings)
    split = LowRank(settings).apply(copy.deepcopy(model), images())
    with torch.no_grad():
        torch.testing.assert_close(split(images()), model(images()), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in split.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("padding", [{"padding": 1, "padding_mode": "reflect"}, {"padding": "same", "dilation": 2}])
def test_padding_of_another_kind_stays(padding: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, **padding), nn.ReLU()).eval()
    x = torch.rand(2, 8, 6, 6)
    for settings in ({"0": 3}, {"0": [3, 4]}):
        low = rank_limited(copy.deepcopy(model), settings)
        torch.testing.assert_close(LowRank(settings).apply(copy.deepcopy(low), x)(x), low(x), rtol=1e-4, atol=1e-5)


def test_pieces_are_plain_layers_by_their_numbers() -> None:
    model = LowRank({"down.0": [8, 4], "wide.0": 6, "hidden": 3}).apply(net(), images())
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items() if "num_batches" not in key}
    assert {key: shape for key, shape in shapes.items() if key.startswith("down.0")} == {
        "down.0.0.weight": (4, 16, 1, 1), "down.0.1.weight": (8, 4, 3, 3), "down.0.2.weight": (32, 8, 1, 1),
        "down.0.2.bias": (32,),
    }  # fmt: skip
    assert {key: shape for key, shape in shapes.items() if key.startswith("wide.0")} == {
        "wide.0.0.weight": (6, 32, 3, 5), "wide.0.1.weight": (32, 6, 1, 1),
    }  # fmt: skip
    assert {key: shape for key, shape in shapes.items() if key.startswith("hidden")} == {
        "hidden.0.weight": (3, 216), "hidden.1.weight": (32, 3), "hidden.1.bias": (32,),
    }  # fmt: skip


def test_a_later_pass_finds_the_pieces_by_the_layers_name() -> None:
    from nas.compression.base import layers_of

    model = LowRank({"down.0": [8, 8], "hidden": 8}).apply(net(), images())
    assert list(layers_of(model, "down.0", "test")) == ["down.0.0", "down.0.1", "down.0.2"]
    assert list(layers_of(model, "hidden", "test")) == ["hidden.0", "hidden.1"]


def test_pruned_first_then_split() -> None:
    plan = {"channel_prune": {"down.0": 16}, "low_rank": {"down.0": [8, 8], "wide.0": 8}}
    model = apply_passes(net(), plan, images()).eval()
    assert model.get_submodule("down.0.0").weight.shape == (8, 16, 1, 1)
    assert model.get_submodule("wide.0.0").weight.shape == (8, 16, 3, 5)
    exported = to_onnx(model, plan, images(), images().numpy())
    assert onnx_macs_params(exported)[1] == sum(p.numel() for p in deployable(model, plan).parameters())


def test_an_untrained_skeleton_has_the_same_state() -> None:
    settings = PLANS[-2]
    trained = LowRank(settings).apply(net(1), images())
    empty = LowRank(settings).apply(Net().eval(), images())
    empty.load_state_dict(trained.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(empty(images()), trained(images()))


# ---- how good ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", [False, True])
def test_the_error_falls_as_the_rank_grows(pair: bool) -> None:
    """By the definition of a truncated SVD: what is lost is the rest of the squared singular values."""
    model = net()
    weight = model.get_submodule("wide.0").weight
    assert isinstance(weight, torch.Tensor)
    x = torch.randn(16, 32, 9, 9, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model.wide[0](x)
        errors = []
        for rank in (4, 8, 16, 24, 31):
            split = LowRank({"wide.0": [rank, rank] if pair else rank}).apply(copy.deepcopy(model), images())
            errors.append(float((split.get_submodule("wide.0")(x) - wanted).square().mean()))
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 0.1 * errors[0]
        if not pair:
            split = LowRank({"wide.0": 8}).apply(copy.deepcopy(model), images())
            first, last = split.get_submodule("wide.0").children()
            product = (last.weight.flatten(1) @ first.weight.flatten(1)).view_as(weight)
            rest = torch.linalg.svdvals(weight.flatten(1))[8:].square().sum()
            torch.testing.assert_close((product - weight).square().sum(), rest, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_fine_tuning_wins_the_accuracy_back() -> None:
    task = tasks.get("classification")("digits", limit=600)  # type: ignore[call-arg, arg-type]
    lessons, recipe = Lessons.prepare(task, None, 1, 0), Recipe(6, 0, batch_size=32)
    model = train(net(), task, lessons, Training(), recipe, 0)
    x, y = task.split("valid")

    def accuracy(module: nn.Module) -> float:
        return task.evaluate(predict(module, x), y.numpy())["accuracy"]

    settings = {"down.0": 6, "wide.0": [6, 6], "hidden": 6}
    split = LowRank(settings).apply(copy.deepcopy(model), x[:2])
    before, whole = accuracy(split), accuracy(model)
    after = accuracy(train(split, task, lessons, Training(), replace(recipe, epochs=4, lr=3e-3), 0))
    assert before < whole - 0.1
    assert after > before + 0.5 * (whole - before)


def test_torch_and_onnx_agree_with_the_normalisation_folded(tmp_path: Path) -> None:
    plan = {"low_rank": PLANS[-2]}
    model = apply_passes(net(), plan, images()).eval()
    folded = deployable(model, plan)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    for last in ("stem.0.1", "down.0.2", "wide.0.1"):  # the piece before the normalisation has taken it
        assert not torch.equal(folded.get_submodule(last).weight, model.get_submodule(last).weight)
    exported = to_onnx(model, plan, images(), images().numpy())
    (tmp_path / "m.onnx").write_bytes(exported.SerializeToString())
    np.testing.assert_allclose(onnx_logits(tmp_path / "m.onnx", images()), predict(model, images()), atol=1e-4)


# ---- settings for a whole model ----------------------------------------------------------------------


def test_energy_gives_the_rank_by_its_definition() -> None:
    model = nn.Sequential(nn.Linear(12, 12, bias=False))
    squares = torch.tensor([50.0, 20, 10, 10, 5, 5, 0, 0, 0, 0, 0, 0])
    q = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0))).Q
    model[0].weight.data = q @ torch.diag(squares.sqrt())  # type: ignore[operator]
    found = {
        energy: LowRank.settings_for(model, torch.rand(1, 12), energy=energy, round_to=1).get("0")
        for energy in (0.4, 0.5, 0.51, 0.79, 0.9, 0.95, 0.96)
    }
    # 6 of 12 takes as many multiplications as the whole layer, so that it is left out.
    assert found == {0.4: 1, 0.5: 1, 0.51: 2, 0.79: 3, 0.9: 4, 0.95: 5, 0.96: None}
    assert LowRank.settings_for(model, torch.rand(1, 12), energy=0.51, round_to=4) == {"0": 4}


@pytest.mark.parametrize("method", ["svd", "tucker"])
def test_a_ratio_for_the_whole_model(method: str) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    settings = LowRank.settings_for(model, images(), ratio=0.25, method=method)
    pair: Any = [8, 8] if method == "tucker" else 8  # 4 channels of 16 are rounded up to 8
    assert settings == {"down.0": pair, "wide.0": pair, "point": 8, "hidden": 8}  # the first and last gain nothing
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    split = LowRank(settings).apply(model, images())
    assert onnx_macs_params(export_float(split, images(1)))[0] < onnx_macs_params(export_float(net(), images(1)))[0]


@pytest.mark.parametrize(("name", "ranks"), [("down.0", 4), ("down.0", (8, 4)), ("down.0", (32, 4)), ("point", 8)])
def test_multiplications_are_those_of_the_export(name: str, ranks: Any) -> None:
    model = net()
    layer = model.get_submodule(name)
    before, after = {"down.0": (64, 16), "point": (16, 9)}[name]
    whole, _ = onnx_macs_params(export_float(copy.deepcopy(model), images(1)))
    split, _ = onnx_macs_params(export_float(LowRank({name: ranks}).apply(copy.deepcopy(model), images()), images(1)))
    assert split - whole == macs(layer, ranks, before, after) - macs(layer, None, before, after)  # type: ignore[arg-type]


def test_patterns_choose_layers() -> None:
    found = LowRank.settings_for(net(), images(), ratio=0.25, layers=["*.0", "hid*"], skip=["stem.*"])
    assert list(found) == ["down.0", "wide.0", "hidden"]
    with pytest.raises(CompressionError, match=r"'conv\*' fits no layer[^$]*stem\.0"):
        LowRank.settings_for(net(), images(), layers=["conv*"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0}, "ratio is 0[^$]*above 0"),
        ({"ratio": 1.5}, "ratio is 1.5"),
        ({"energy": "high"}, "energy is 'high'"),
        ({"method": "cp"}, "method is 'cp'[^$]*svd, tucker"),
        ({"round_to": 0}, "round_to is 0"),
        ({"rank": 3}, "no option 'rank'[^$]*ratio"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        LowRank.settings_for(net(), images(), **options)


# ---- what cannot be done -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden": 33}, r"rank 33 for 'hidden'[^$]*1\.\.32"),
        ({"hidden": 0}, r"rank 0 for 'hidden'"),
        ({"hidden": 2.5}, r"rank 2\.5 for 'hidden'"),
        ({"hidden": True}, r"rank True for 'hidden'"),
        ({"hidden": [4, 4]}, r"two ranks \[4, 4\] for 'hidden', which is one matrix[^$]*one rank"),
        ({"point": [4, 4]}, r"two ranks \[4, 4\] for 'point'"),
        ({"down.0": [4]}, r"rank \[4\] for 'down\.0'[^$]*\[1\.\.32, 1\.\.16\]"),
        ({"down.0": [4, 17]}, r"rank \[4, 17\] for 'down\.0'"),
        ({"down.0": "half"}, r"rank 'half' for 'down\.0'"),
        ({"depthwise": 4}, r"'depthwise' is a convolution of 32 groups[^$]*depthwise and grouped"),
        ({"down.1": 4}, r"'down\.1' is a BatchNorm2d[^$]*Conv2d or Linear"),
        ({"dawn.0": 4}, r"no module 'dawn\.0'[^$]*down\.0"),
        ({"": 4}, r"'' is a Net"),
    ],
)
def test_what_cannot_be_split(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        LowRank(settings).apply(net(), images())


class Encoder(nn.Module):
    """Torch's own encoder layer, which reads the weights of its linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.embed(x.flatten(1, 2))).mean(dim=1))


def test_layers_whose_weights_the_model_reads() -> None:
    model = Encoder().eval()
    assert list(LowRank.settings_for(model, images(), ratio=0.5, round_to=1)) == ["embed", "head"]
    with pytest.raises(CompressionError, match=r"own code reads[^$]*weight[^$]*leave that layer out"):
        LowRank({"layer.linear1": 4}).apply(model, images())


def test_a_layer_whose_bits_are_simulated_already() -> None:
    model = Quantize({"point": 8}).apply(net(), images())
    with pytest.raises(CompressionError, match=r"'point' is a QuantConv2d"):
        LowRank({"point": 4}).apply(model, images())
