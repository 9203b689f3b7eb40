"""Spaces of users' own models: what is found in them, what is cut out of them, and what that costs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import nas
from nas.derived import DerivedSpace
from nas.errors import NasError, SpaceError
from nas.experiment import load_experiment
from nas.latency import Device
from nas.space import TaskInfo
from nas.testing import check_space
from tests import own_models
from tests.own_models import IMAGES, MODELS, ResidualNet, made

EVERY = pytest.mark.parametrize("name", MODELS)


# ---- the space ------------------------------------------------------------------------------------------


def test_what_cannot_be_pruned_stays_and_is_said() -> None:
    model, _, info = made("grouped")
    space = DerivedSpace(info, model=model)
    assert [group.name for group in space.groups] == ["free"]
    said = "\n".join(space.report())
    for layer, reason in (("stem", "grouped"), ("cut", "cuts")):
        assert any(line.startswith(f"{layer}:") and reason in line for line in said.splitlines()), said


def test_the_most_important_channels_are_kept() -> None:
    model, _, info = made("dense")
    with torch.no_grad():
        model.b.weight[[1, 4, 7, 9, 10, 11, 14, 15]] *= 1e-3
        model.c.weight[:, [16 + i for i in (1, 4, 7, 9, 10, 11, 14, 15)]] *= 1e-3
    space = DerivedSpace(info, model=model, prune=[0.0, 0.5], multiple=8)
    values = space.ladder()[0].as_dict() | {"b.prune": 0.5}
    kept = space.build(space.decode(space.encode(values))).get_submodule("b").weight
    torch.testing.assert_close(kept, model.b.weight[[0, 2, 3, 5, 6, 8, 12, 13]])


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
    assert {len(c.values) for c in space.choices if c.name.endswith(".prune")} == {2}
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


def test_features_and_attention_of_ones_own_model_are_taught() -> None:
    """A pruned candidate of a traced model learns from the features of the model that it was made of."""
    from nas.evaluators import Distil
    from nas.evaluators.train import Lessons, Recipe
    from nas.tasks import ImageClassification

    task = ImageClassification("digits", limit=200)
    model, _, _ = made("residual")
    space = DerivedSpace(task.info, model=model, feature_weights=[0.0, 1.0], attention_weights=[0.0, 10.0])
    plain = space.ladder()[0].as_dict() | {"layers.1.conv1.prune": 0.5}
    lessons = Lessons.prepare(task, model, 1, 0)
    student = Distil(space, task, lessons, Recipe(2, 1, lr=1e-3), 0)
    states = [
        student.fit(space.encode(plain | taught), student.recipe).state_dict()
        for taught in ({}, {"feature_weight": 1.0}, {"attention_weight": 10.0})
    ]
    assert set(states[0]) == set(states[1]) == set(states[2])  # what compares the features is not part of the student
    for state in states[1:]:
        assert not torch.equal(state["stem.weight"], states[0]["stem.weight"])


def test_a_deep_transformer_is_tabulated() -> None:
    """Nothing of a stream of floats depends on which of many branches before it are kept."""
    info = TaskInfo((1, 8, 8), 10, value_range=(0.0, 16.0))
    torch.manual_seed(0)
    model = own_models.VisionTransformer()
    model.layers = nn.ModuleList([own_models.Layer(32, own_models.FusedAttention(32, 4)) for _ in range(16)])
    space = DerivedSpace(info, model=model)
    assert sum(choice.name.endswith(".keep") for choice in space.choices) == 32
    assert max(len(site.values) for site in space.compiled) <= 1_000
    check_space(space, candidates=2, export=False, info=info)
