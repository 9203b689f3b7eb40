"""Masks of NNI's pruners become smaller models with the outputs of the masked ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn

from nas.compression import apply_passes
from nas.compression.traced import TracedGroups
from nas.errors import CompressionError
from nas.nni.masks import load_masks, masked
from nas.nni.pruners import OUTVOTED, shrink, sparse_plan, speedup, to_onnx
from nas.student import export
from tests.own_models import InvertedNet, ResidualNet, VisionTransformer

nni = pytest.importorskip("nni")

STEPS = 12  # of training under a pruner that needs some


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images ``[n, 1, 8, 8]`` and classes ``[n]``."""
    images, classes = load_digits(return_X_y=True)
    return torch.from_numpy(images.astype(np.float32)).view(-1, 1, 8, 8), torch.from_numpy(classes)


def fit(model: nn.Module, optimizer: Any, x: torch.Tensor, y: torch.Tensor, steps: int) -> None:
    """A training in which NNI's wrappers take part, as its users write it."""
    model.train()
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = torch.randint(len(x), (64,), generator=draw)
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()


class Plain(nn.Module):
    """Convolutions one after the other, and a hidden linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, 2, 1), nn.BatchNorm2d(24),
            nn.ReLU(), nn.Conv2d(24, 24, 3, 1, 1), nn.BatchNorm2d(24), nn.ReLU(),
        )  # fmt: skip
        self.hidden, self.head = nn.Linear(24 * 16, 32), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.hidden(self.features(x / 16.0).flatten(1))))


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "plain": (Plain, "head"),
    "residual": (ResidualNet, "fc"),
    "inverted": (InvertedNet, "classifier.1"),
    "transformer": (VisionTransformer, "head"),
}


@pytest.fixture(scope="module")
def trained(digits: tuple[torch.Tensor, torch.Tensor]) -> dict[str, nn.Module]:
    """Every model after a short training, so that its normalisations have offsets and statistics."""
    found = {}
    for name, (build, _) in MODELS.items():
        torch.manual_seed(0)
        model = build()
        fit(model, torch.optim.Adam(model.parameters(), 3e-3), *digits, 40)
        found[name] = model.eval()
    return found


def config(name: str, ratio: float) -> list[dict[str, Any]]:
    return [
        {"op_types": ["Conv2d", "Linear"], "sparse_ratio": ratio, "exclude_op_names": [MODELS[name][1]]}
    ]  # fmt: skip


def evaluator(model: nn.Module, digits: tuple[torch.Tensor, torch.Tensor]) -> Any:
    from nni.compression import TorchEvaluator

    draw = torch.Generator().manual_seed(0)

    def training(model: nn.Module, optimizer: Any, step: Any, *given: Any, max_steps: Any = None, **_: Any) -> None:
        model.train()
        for _ in range(max_steps or STEPS):
            batch = torch.randint(len(digits[0]), (64,), generator=draw)
            optimizer.zero_grad()
            step((digits[0][batch], digits[1][batch]), model).backward()
            optimizer.step()

    def step(batch: Any, model: nn.Module) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    return TorchEvaluator(training, nni.trace(torch.optim.SGD)(model.parameters(), lr=0.01), step)


PRUNERS = ("Level", "L1Norm", "L2Norm", "FPGM", "Taylor", "Slim", "Linear", "AGP", "Movement")


def prune(kind: str, name: str, model: nn.Module, digits: Any, ratio: float = 0.5) -> tuple[Any, dict[str, Any]]:
    """A pruner that has done its work, and its masks; the model is wrapped still."""
    from nni.compression import pruning

    torch.manual_seed(0)
    asked = config(name, ratio)
    if kind in ("Level", "L1Norm", "L2Norm", "FPGM"):
        pruner = getattr(pruning, f"{kind}Pruner")(model, asked)
        return pruner, pruner.compress()[1]
    told = evaluator(model, digits)
    if kind in ("Taylor", "Slim"):
        pruner = getattr(pruning, f"{kind}Pruner")(model, asked, told, training_steps=STEPS)
        return pruner, pruner.compress(None, None)[1]
    if kind == "Movement":
        pruner = pruning.MovementPruner(model, asked, told, warmup_step=2, cooldown_begin_step=STEPS - 2)
        return pruner, pruner.compress(STEPS, None)[1]
    scheduled = getattr(pruning, f"{kind}Pruner")
    pruner = scheduled(pruning.L1NormPruner(model, asked, told), interval_steps=3, total_times=4)
    return pruner, pruner.compress(STEPS, None)[1]


def close(smaller: nn.Module, wanted: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(smaller.eval()(x), wanted.eval()(x), rtol=1e-4, atol=1e-4)


def run(model: nn.Module, x: torch.Tensor) -> np.ndarray[Any, Any]:
    session = ort.InferenceSession(to_onnx(model, x[:8]).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"input": x.numpy()})[0]


# ---- every pruner ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "residual"])
@pytest.mark.parametrize("kind", PRUNERS)
def test_outputs_are_those_of_the_masked_model(
    kind: str, name: str, trained: dict[str, nn.Module], digits: tuple[torch.Tensor, torch.Tensor]
) -> None:
    model, x = copy.deepcopy(trained[name]), digits[0]
    pruner, masks = prune(kind, name, model, digits)
    pruner.unwrap_model()
    before = copy.deepcopy(model.state_dict())
    found = shrink(model, x[:8], masks)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items()), "the model stays as it is"

    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        for layer, own in masks.items():
            for parameter, mask in own.items():
                if mask is not None:
                    by_hand.get_submodule(layer).get_parameter(parameter).mul_(mask)
    close(found.model, by_hand, x)
    with torch.no_grad():
        np.testing.assert_allclose(run(found.model, x), by_hand.eval()(x).numpy(), rtol=1e-3, atol=1e-3)

    layers = {layer.name: layer for layer in found.layers}
    for layer, own in masks.items():
        assert layers[layer].asked == int((own["weight"].flatten(1).sum(1) == 0).sum())
        assert layers[layer].left == found.model.get_submodule(layer).weight.shape[0]
    assert found.difference <= 1e-4 * max(1.0, found.largest)
    if kind == "Level":
        dense = len(export.export_float(found.model, x[:1]).SerializeToString())
        assert len(to_onnx(found.model, x[:8]).SerializeToString()) < dense
    elif name == "plain" and kind != "Movement":
        for layer in found.layers:
            assert layer.left == layer.channels - layer.asked
            assert not layer.stay
        assert found.parameters[1] < 0.5 * found.parameters[0]


@pytest.mark.parametrize("name", MODELS)
def test_wrapped_and_unwrapped_are_one_model(
    name: str, trained: dict[str, nn.Module], digits: tuple[torch.Tensor, torch.Tensor]
) -> None:
    model, x = copy.deepcopy(trained[name]), digits[0]
    pruner, masks = prune("L1Norm", name, model, digits, 0.4)
    wrapped = speedup(model, x[:4], masks)
    assert type(wrapped.get_submodule(config(name, 0)[0]["exclude_op_names"][0])) is nn.Linear
    with torch.no_grad():
        wanted = model.eval()(x)
        torch.testing.assert_close(wrapped(x), wanted, rtol=1e-4, atol=1e-4)
    pruner.unwrap_model()
    with torch.no_grad():
        torch.testing.assert_close(speedup(model, x[:4], masks)(x), wanted, rtol=1e-4, atol=1e-4)


def test_what_slim_scales_is_kept_while_it_is_wrapped(
    trained: dict[str, nn.Module], digits: tuple[torch.Tensor, torch.Tensor]
) -> None:
    model, x = copy.deepcopy(trained["plain"]), digits[0]
    pruner, masks = prune("Slim", "plain", model, digits)
    wrapped = speedup(model, x[:4], masks)
    close(wrapped, model, x)
    pruner.unwrap_model()
    with torch.no_grad():
        assert not torch.allclose(speedup(model, x[:4], masks)(x), wrapped(x), rtol=1e-2), "NNI drops the scale"


# ---- tied layers -------------------------------------------------------------------------------------


def test_tied_layers_agree_on_what_was_asked(
    trained: dict[str, nn.Module], digits: tuple[torch.Tensor, torch.Tensor]
) -> None:
    model, x = copy.deepcopy(trained["residual"]), digits[0]
    pruner, masks = prune("L1Norm", "residual", model, digits)
    pruner.unwrap_model()
    kept, voted = shrink(model, x[:8], masks), shrink(model, x[:8], masks, conflicts="vote")
    tied = {"stem", "layers.0.conv2", "layers.1.conv2", "layers.1.down.0", "layers.2.conv2", "layers.2.down.0"}
    assert any(layer.left > layer.channels - layer.asked for layer in kept.layers if layer.name in tied)
    for layer in voted.layers:
        assert layer.asked == layer.channels // 2
        assert layer.left == layer.channels - layer.asked
        assert set(layer.stay) <= {OUTVOTED}
    assert any(layer.stay for layer in voted.layers)
    assert voted.parameters[1] < kept.parameters[1]
    assert kept.difference <= 1e-4 * kept.largest
    assert voted.difference > 1e-3 * voted.largest, "and the record says so"
    close(voted.model, masked(model, voted.masks, x), x)
    asked = [own["weight"].flatten(1).any(1) for name, own in voted.masks.items() if name in ("stem", "layers.0.conv2")]
    assert torch.equal(asked[0], asked[1])


def test_most_votes_decide(digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    torch.manual_seed(0)
    model, x = ResidualNet(8, 3).eval(), digits[0]  # the stem and three blocks share the first stage's channels
    ask = {"stem": (0, 1), "layers.0.conv2": (1, 2), "layers.1.conv2": (1, 3), "layers.2.conv2": (1, 2)}
    masks = {}
    for name, lost in ask.items():
        masks[name] = {"weight": torch.ones_like(model.get_submodule(name).weight)}
        masks[name]["weight"][list(lost)] = 0
    found = shrink(model, x[:4], masks, conflicts="vote")
    for name in ask:
        assert (found.masks[name]["weight"].flatten(1).sum(1) == 0).nonzero().flatten().tolist() == [1, 2]


# ---- unstructured ------------------------------------------------------------------------------------


def test_zeros_stay_zeros_through_a_fine_tuning(
    trained: dict[str, nn.Module], digits: tuple[torch.Tensor, torch.Tensor]
) -> None:
    model, x = copy.deepcopy(trained["plain"]), digits[0]
    pruner, masks = prune("Level", "plain", model, digits, 0.8)
    pruner.unwrap_model()
    smaller = speedup(model, x[:8], masks)
    plan = sparse_plan(smaller)
    assert set(plan["weight_prune"]) == set(masks)
    tuned = apply_passes(smaller, plan, x[:8])
    before = tuned.get_submodule("hidden").weight.detach().clone()
    fit(tuned, torch.optim.Adam(tuned.parameters(), 1e-3), *digits, 5)
    after = tuned.eval().get_submodule("hidden").weight.detach()
    assert torch.equal(after == 0, before == 0)
    assert not torch.equal(after, before)
    with torch.no_grad():
        np.testing.assert_allclose(run(tuned, x), tuned(x).numpy(), rtol=1e-3, atol=1e-3)


# ---- and on ------------------------------------------------------------------------------------------


def test_a_smaller_model_is_quantised_and_derived_from(
    trained: dict[str, nn.Module], digits: tuple[torch.Tensor, torch.Tensor]
) -> None:
    model, x = copy.deepcopy(trained["residual"]), digits[0][:256]
    pruner, masks = prune("L1Norm", "residual", model, digits)
    pruner.unwrap_model()
    smaller = speedup(model, x, masks, conflicts="vote")
    assert [group.size for group in TracedGroups(smaller, x[:2]).all()] == [8, 8, 16, 16, 32, 32]
    plan = {"quantize": {name: 8 for name, layer in smaller.named_modules() if isinstance(layer, nn.Conv2d)}}
    exported = export.to_onnx(apply_passes(copy.deepcopy(smaller), plan, x), plan, x, x.numpy())
    session = ort.InferenceSession(exported.SerializeToString(), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        wanted = smaller.eval()(x).numpy()
    assert np.abs(session.run(None, {"input": x.numpy()})[0] - wanted).max() < 0.1 * np.abs(wanted).max()


# ---- files -------------------------------------------------------------------------------------------


def test_masks_are_read_from_files(
    trained: dict[str, nn.Module], digits: tuple[torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    model, x = copy.deepcopy(trained["plain"]), digits[0]
    pruner, masks = prune("L2Norm", "plain", model, digits)
    pruner.unwrap_model()
    torch.save(masks, tmp_path / "masks.pth")
    flat = {f"{name}.{kind}": mask for name, own in masks.items() for kind, mask in own.items() if mask is not None}
    save_file(flat, tmp_path / "masks.safetensors")
    wanted = speedup(model, x[:8], masks)
    for file in ("masks.pth", "masks.safetensors"):
        close(speedup(model, x[:8], tmp_path / file), wanted, x)


class Harmful:
    def __reduce__(self) -> Any:
        return print, ("unpickled",)


def test_a_file_of_other_things_is_not_unpickled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"head": {"weight": Harmful()}}, tmp_path / "masks.pth")
    for file in ("masks.pth", "none.pth", "none.safetensors"):
        with pytest.raises(CompressionError, match=f"{file} cannot be read as masks"):
            load_masks(tmp_path / file)
    assert "unpickled" not in capsys.readouterr().out


# ---- what is wrong -----------------------------------------------------------------------------------


def ones(model: nn.Module, name: str) -> torch.Tensor:
    return torch.ones_like(model.get_submodule(name).weight)


def wrong() -> Iterator[tuple[Callable[[nn.Module], Any], str]]:
    yield lambda m: {"body.conv": {"weight": ones(m, "features.0")}}, "'body.conv', and the model has no such layer"
    yield lambda m: {"features.0": {"weight": ones(m, "features.3")}}, r"shape \[24, 16, 3, 3\]"
    yield lambda m: {"features.0": {"weight": 0.5 * ones(m, "features.0")}}, "has the value 0.5"
    yield lambda m: {"features.0": {"weight": ones(m, "features.0") * float("nan")}}, "has the value nan"
    yield lambda m: {"features.3": {"weight": 0 * ones(m, "features.3")}}, "All of 'features.3' is masked"
    yield lambda m: {"features.0": {"_output_0": torch.ones(1, 16, 1, 1)}}, "of no parameter"
    yield lambda m: {"features.2": {"weight": torch.ones(3)}}, "the parameter is not"
    yield lambda m: {"features.0": ones(m, "features.0")}, "is a Tensor"
    yield lambda m: {"features.0": {"weight": [1, 0]}}, "is a list"
    yield lambda m: [1, 2], "is a list"
    yield lambda m: {}, "There are no masks"
    yield lambda m: {"features.0": {"weight": None}}, "There are no masks"


@pytest.mark.parametrize(("masks", "told"), list(wrong()))
def test_wrong_masks_are_one_clear_error(masks: Callable[[nn.Module], Any], told: str) -> None:
    model = Plain()
    with pytest.raises(CompressionError, match=told):
        speedup(model, torch.rand(2, 1, 8, 8), masks(model))


def test_wrong_options_are_one_clear_error() -> None:
    model, x = Plain(), torch.rand(2, 1, 8, 8)
    masks = {"features.0": {"weight": ones(model, "features.0")}}
    for given in ({"conflicts": "asked"}, {"align": 0}, {"align": 2.0}):
        with pytest.raises(CompressionError, match=next(iter(given))):
            speedup(model, x, masks, **given)  # type: ignore[arg-type]
    with pytest.raises(CompressionError, match="no batch of inputs"):
        speedup(model, torch.tensor(1.0), masks)


def test_an_example_that_the_model_does_not_take_is_one_clear_error() -> None:
    model = Plain()
    _, masks = prune("L1Norm", "plain", model, None)
    with pytest.raises(CompressionError, match="cannot be run on the example"):
        speedup(model, torch.rand(2, 3, 8, 8), masks)


@pytest.mark.parametrize(
    "asked",
    [
        {"op_types": ["BatchNorm2d"], "sparse_ratio": 0.5},
        {"op_types": ["Conv2d"], "sparse_ratio": 0.5, "granularity": "in_channel", "exclude_op_names": ["features.0"]},
        {"op_names": ["features.3", "features.6"], "sparse_ratio": 0.5, "dependency_group_id": 0},
    ],
    ids=["normalisation", "inputs", "one group"],
)
def test_other_ways_to_ask(
    asked: dict[str, Any], trained: dict[str, nn.Module], digits: tuple[torch.Tensor, torch.Tensor]
) -> None:
    from nni.compression.pruning import L1NormPruner

    model, x = copy.deepcopy(trained["plain"]), digits[0]
    pruner = L1NormPruner(model, [{"exclude_op_names": ["head"], **asked}])
    _, masks = pruner.compress()
    pruner.unwrap_model()
    found = shrink(model, x[:4], masks)
    close(found.model, masked(model, masks, x), x)
    assert found.parameters[1] < 0.8 * found.parameters[0]


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x)) if x.sum() > 0 else self.last(-self.first(x))


def test_a_model_that_cannot_be_traced_says_so() -> None:
    model = Branching()
    with pytest.raises(CompressionError, match="cannot be traced"):
        speedup(model, torch.rand(2, 4), {"first": {"weight": ones(model, "first")}})
