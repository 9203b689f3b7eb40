"""Spaces of users' own models: what is found in them, what is cut out of them, and what that costs."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import nas
from nas.derived import DerivedSpace, Structure, trace
from nas.derived.shrink import shrunk
from nas.errors import CompressionError, NasError, SpaceError
from nas.experiment import load_experiment
from nas.latency import Device
from nas.space import TaskInfo
from nas.student.export import export_float
from nas.testing import check_space
from tests import own_models
from tests.own_models import (
    Dense,
    Grouped,
    InvertedNet,
    ResidualNet,
    TextTransformer,
    VisionTransformer,
)

IMAGES = TaskInfo((1, 8, 8), 10, value_range=(0.0, 16.0))
TOKENS = TaskInfo((12,), 5, dtype="int64", value_range=(0, 99))
MODELS = {
    "residual": (ResidualNet, IMAGES),
    "inverted": (InvertedNet, IMAGES),
    "vision transformer": (VisionTransformer, IMAGES),
    "text transformer": (TextTransformer, TOKENS),
    "dense": (Dense, IMAGES),
    "grouped": (Grouped, IMAGES),
}
EVERY = pytest.mark.parametrize("name", MODELS)


def made(name: str) -> tuple[nn.Module, torch.Tensor, TaskInfo]:
    build, info = MODELS[name]
    torch.manual_seed(0)
    model = build()
    x = info.random(16, seed=1)
    if info.dtype == "float32":  # statistics of real activations, so that nothing vanishes
        with torch.no_grad():
            for _ in range(10):
                model.train()(x)
    return model.eval(), x, info


# ---- tracing -----------------------------------------------------------------------------------------


@EVERY
def test_a_traced_model_is_the_model(name: str) -> None:
    model, x, _ = made(name)
    traced = trace(model, x[:2])
    with torch.no_grad():
        torch.testing.assert_close(traced(x), model(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(traced(x[:1]), model(x[:1]), rtol=1e-5, atol=1e-5)
    assert {id(p) for p in traced.parameters()}.isdisjoint(id(p) for p in model.parameters())
    assert not model.training


def test_tracing_keeps_names_and_layers() -> None:
    model, x, _ = made("residual")
    traced = trace(model, x[:2])
    assert set(traced.state_dict()) == set(model.state_dict())
    assert isinstance(traced.get_submodule("layers.1.down.0"), nn.Conv2d)


def test_a_traced_model_trains_as_the_model_does() -> None:
    model, x, _ = made("vision transformer")
    traced = trace(model, x[:2])
    for module in (model, traced):
        module.eval()(x).square().mean().backward()
    grads = dict(traced.named_parameters())
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(grads[key].grad, parameter.grad, rtol=1e-4, atol=1e-6)


@EVERY
def test_a_traced_model_exports_with_a_free_batch(name: str) -> None:
    model, x, _ = made(name)
    exported = export_float(trace(model, x[:2]), x[:1])
    session = ort.InferenceSession(exported.SerializeToString())
    with torch.no_grad():
        wanted = model(x).numpy()
    np.testing.assert_allclose(session.run(None, {"input": x.numpy()})[0], wanted, rtol=1e-3, atol=1e-4)


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


class Fixed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(3, -1)[:, :10]


class Two(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x


@pytest.mark.parametrize("model", [Branching(), Fixed(), Two()])
def test_what_cannot_be_traced_is_said(model: nn.Module) -> None:
    with pytest.raises(CompressionError) as caught:
        trace(model, torch.rand(2, 1, 8, 8))
    assert caught.value.expected


# ---- groups -------------------------------------------------------------------------------------------


def groups(name: str) -> dict[str, int]:
    model, x, _ = made(name)
    return {group.name: group.variable.size for group in Structure(model, x).groups}


def test_groups_of_a_residual_network() -> None:
    found = groups("residual")
    # The stream of each stage is one group with its shortcut; the inner channels of a block are one of their own.
    assert found == {
        "stem": 16, "layers.0.conv1": 16, "layers.1.conv1": 32, "layers.1.conv2": 32, "layers.2.conv1": 64,
        "layers.2.conv2": 64,
    }  # fmt: skip


def test_heads_are_groups_however_attention_is_written() -> None:
    found = groups("vision transformer")
    for layer in (0, 1):
        assert found[f"layers.{layer}.attention.qkv.heads"] == 4
        assert found[f"layers.{layer}.attention.qkv.head_dim"] == 8
        assert found[f"layers.{layer}.mlp.0"] == 64
    assert groups("text transformer")["encoder.layers.0.self_attn.in_proj.heads"] == 4


def test_what_cannot_be_pruned_stays_and_is_said() -> None:
    model, _, info = made("grouped")
    space = DerivedSpace(info, model=model)
    assert [group.name for group in space.groups] == ["free"]
    said = "\n".join(space.report())
    for layer, reason in (("stem", "grouped"), ("cut", "cuts")):
        assert any(line.startswith(f"{layer}:") and reason in line for line in said.splitlines()), said


@pytest.mark.parametrize("name", ["residual", "inverted", "dense", "vision transformer", "text transformer"])
def test_pruning_zeroed_places_changes_nothing(name: str) -> None:
    """Channels without weights are removed: what is left computes what the whole did."""
    model, x, _ = made(name)
    structure = Structure(model, x)
    state = structure.model.state_dict()
    checked = 0
    for group in structure.groups:
        variable = group.variable
        # A layer normalisation counts its channels, and heads' dimensions scale the attention; both see what is gone.
        norms = [n for n, layer in structure.modules.items() if isinstance(layer, nn.LayerNorm)]
        touched = {use.tensor.rpartition(".")[0] for use in structure.axes.uses if variable in use.dim.variables}
        if touched & set(norms) or variable.role == "head_dim":
            continue
        gone = torch.arange(1, variable.size, 2)
        for use in structure.axes.uses:
            if variable in use.dim.variables:
                places = torch.isin(use.dim.place(variable), gone)
                if use.tensor.endswith("running_var"):
                    continue
                state[use.tensor].movedim(use.axis, 0)[places] = 0.0
        with torch.no_grad():
            whole = structure.model(x)
            small = shrunk(structure.axes, {variable: torch.arange(0, variable.size, 2)})
            torch.testing.assert_close(small(x), whole, rtol=1e-4, atol=1e-5)
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in structure.model.parameters())
        checked += 1
    assert checked


def test_the_most_important_channels_are_kept() -> None:
    model, _, info = made("dense")
    with torch.no_grad():
        model.b.weight[[1, 4, 7, 9, 10, 11, 14, 15]] *= 1e-3
        model.c.weight[:, [16 + i for i in (1, 4, 7, 9, 10, 11, 14, 15)]] *= 1e-3
    space = DerivedSpace(info, model=model, prune=[0.0, 0.5], multiple=8)
    values = space.ladder()[0].as_dict() | {"b.prune": 0.5}
    kept = space.build(space.decode(space.encode(values))).get_submodule("b").weight
    torch.testing.assert_close(kept, model.b.weight[[0, 2, 3, 5, 6, 8, 12, 13]])


# ---- the space ------------------------------------------------------------------------------------------


@EVERY
def test_space_keeps_the_contract(name: str) -> None:
    model, _, info = made(name)
    check_space(DerivedSpace(info, model=model, ranks=[1.0, 0.5], multiple=4), candidates=6, info=info)


@pytest.mark.slow
@EVERY
def test_space_keeps_the_contract_on_many(name: str) -> None:
    model, _, info = made(name)
    space = DerivedSpace(info, model=model, ranks=[1.0, 0.5, 0.25], bits=[32, 8, 4], multiple=4, head_dims=True)
    check_space(space, candidates=100, info=info)


def test_deep_chains_of_blocks_stay_small() -> None:
    torch.manual_seed(0)
    info = TaskInfo((1, 16, 16), 10)
    space = DerivedSpace(info, model=ResidualNet(8, depth=9), multiple=4)
    names = [choice.name for choice in space.choices]
    assert sum(name.endswith(".keep") for name in names) == 25
    assert max(len(site.values) for site in space.compiled) <= 20_000
    check_space(space, candidates=3, export=False, info=info)


def test_the_plain_candidate_is_the_teacher() -> None:
    model, x, info = made("residual")
    space = DerivedSpace(info, model=model)
    built = space.build(space.ladder()[0])
    with torch.no_grad():
        torch.testing.assert_close(built.eval()(x), model(x), rtol=1e-5, atol=1e-5)
    assert not space.training(space.ladder()[0]).compression


def test_a_block_that_is_left_out_is_gone() -> None:
    model, x, info = made("residual")
    space = DerivedSpace(info, model=model)
    without = space.ladder()[0].as_dict() | {"layers.0.keep": False, "layers.0.conv1.bits": 8}
    built = space.build(space.decode(space.encode(without)))
    assert not any(name.startswith("layers.0.") for name, _ in built.named_modules())
    model.layers[0] = nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(built.eval()(x), model(x), rtol=1e-5, atol=1e-5)
    assert not space.training(space.decode(space.encode(without))).compression


def test_parts_execute_what_the_network_does() -> None:
    """Mixed precision, layer by layer: convolutions in integers and floats are as many in parts as in the whole."""
    from nas.executors import Serial
    from nas.student.tables import exported_nets

    model, _, info = made("residual")
    space = DerivedSpace(info, model=model, ranks=[1.0])
    device = Device.local()
    genomes = space.sample(np.random.default_rng(3), 8)
    for net in exported_nets(space, info, Serial(None), genomes):
        whole = device.load(net.model).fused()
        parts: dict[str, int] = {}
        for part in net.parts:
            for name, count in device.load(part.to_onnx(1), part=True).fused().items():
                parts[name] = parts.get(name, 0) + count * part.count
        for name in ("Conv", "QLinearConv", "QLinearAdd", "QGemm", "Gemm"):
            assert whole.get(name, 0) == parts.get(name, 0), name


@EVERY
def test_parts_run(name: str) -> None:
    model, _, info = made(name)
    space = DerivedSpace(info, model=model, multiple=4)
    keys = space.keys()
    device = Device.local()
    chosen = np.random.default_rng(0).permutation(sorted(keys))[:25]
    for key in chosen:
        assert all(t > 0 for t in device.load(keys[key].to_onnx(1), part=True).time(1))


def test_skipped_layers_are_no_choice() -> None:
    model, _, info = made("residual")
    names = [choice.name for choice in DerivedSpace(info, model=model, skip=["stem", "layers.2.*"]).choices]
    assert not any(name.startswith(("stem.", "layers.2.")) for name in names)
    assert "layers.1.conv1.prune" in names


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prune": [1.0]}, "prune"),
        ({"bits": [16]}, "bits"),
        ({"ranks": [0.0]}, "ranks"),
        ({"multiple": 0}, "multiple"),
        ({"skip": ["*"]}, "Nothing"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], said: str) -> None:
    model, _, info = made("residual")
    with pytest.raises(SpaceError, match=said):
        DerivedSpace(info, model=model, **options)


def test_a_model_of_other_classes_is_refused() -> None:
    model, _, _ = made("residual")
    with pytest.raises(SpaceError, match="outputs of shape"):
        DerivedSpace(TaskInfo((1, 8, 8), 7), model=model)


# ---- from Python and from a file ---------------------------------------------------------------------------


def test_derive_from_python() -> None:
    model, x, _ = made("residual")
    space = nas.derive(model, x, prune=[0.0, 0.5])
    assert space.task.classes == 10
    assert all(len(c.values) == 2 for c in space.choices if c.name.endswith(".prune"))
    with pytest.raises(NasError, match="prunes"):
        nas.derive(model, x, prunes=[0.0])


def test_an_experiment_takes_a_model_for_space_and_teacher(tmp_path) -> None:
    path = tmp_path / "own.safetensors"
    save_file(own_models.residual_net().state_dict(), path)
    own = {"model": "tests.own_models:residual_net", "weights": str(path)}
    experiment = load_experiment({"name": "own", "task": {"data": "digits"}, "space": own})
    assert experiment.space.name == "derived"
    assert (experiment.teacher.model, experiment.teacher.weights) == (own["model"], own["weights"])
    from nas import content

    space = content.load_space(experiment.space.name, IMAGES, experiment.space.settings)
    import pickle

    again = pickle.loads(pickle.dumps(space))
    assert [c.name for c in again.choices] == [c.name for c in space.choices]


def test_a_model_without_weights_is_refused() -> None:
    with pytest.raises(SpaceError, match="no weights"):
        DerivedSpace(IMAGES, model="tests.own_models:residual_net")
