"""NNI's model spaces: labels as choices, candidates as what NNI freezes, parts as what is exported."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

pytest.importorskip("nni")

from nas.errors import ContentError, NasError, SpaceError
from nas.experiment import load_experiment
from nas.latency import AdditiveEstimator
from nas.nni import NniSpace
from nas.space import Candidate, TaskInfo
from nas.strategies import strategies
from nas.testing import check_space
from nas.testing.spaces import synthetic_table
from nas.tracing.alternatives import is_choice
from tests.helpers import domain_of

GREY = TaskInfo((1, 8, 8), 10, mean=(0.5,), std=(0.25,))
COLOURS = TaskInfo((3, 16, 16), 10, mean=(0.5,) * 3, std=(0.25,) * 3)
SMALL_V3: dict[str, Any] = {
    "base_widths": (8, 8, 16, 16, 32, 64, 64), "width_multipliers": (0.5, 1.0), "depth_range": (1, 2),
    "stride": (2, 1, 2, 2, 1, 1, 1), "squeeze_excite": ("none", "none", "optional", "optional"),
    "activation": ("hswish", "relu", "relu", "hswish", "hswish", "hswish", "hswish"),
}  # fmt: skip


def own(name: str, **options: Any) -> NniSpace:
    return NniSpace(GREY, nni=f"tests.nni_spaces:{name}", **options)


@pytest.fixture(scope="module")
def mixed() -> NniSpace:
    return own("Mixed")


def with_values(space: NniSpace, **values: Any) -> Candidate:
    first = {choice.name: choice.values[0] for choice in space.choices}
    return Candidate({**first, **values})


def active(space: NniSpace, candidate: Candidate) -> set[str]:
    mask = space.active(space.encode(candidate))[0]
    return {choice.name for choice, on in zip(space.choices, mask, strict=True) if on}


# ---- the contract: what is priced is what is exported, compressed, and runs -----------------------------------


@pytest.mark.parametrize("name", ["Mixed", "Cells", "OwnModules", "Whole"])
def test_own_spaces_keep_the_contract(name: str) -> None:
    check_space(own(name, ranks=(1.0, 0.5)), candidates=6)


def test_the_hubs_mobilenet_keeps_the_contract() -> None:
    check_space(NniSpace(COLOURS, nni="nni_hub:MobileNetV3Space", args=SMALL_V3), candidates=3)


def test_the_hubs_nasbench201_keeps_the_contract() -> None:
    check_space(NniSpace(COLOURS, nni="nni_hub:NasBench201", args={"num_modules_per_stack": 1}), candidates=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("ProxylessNAS", {"width_mult": 0.25}),
        ("ShuffleNetSpace", {}),
        ("ShuffleNetSpace", {"channel_search": True}),
        ("DARTS", {"width": 8, "num_cells": 3, "dataset": "cifar"}),
    ],
)
def test_the_hubs_deep_spaces_keep_the_contract(name: str, args: dict[str, Any]) -> None:
    """In fp32: sixty untrained layers in integers agree with nothing, their own simulation included."""
    info = TaskInfo((3, 32, 32), 10, mean=(0.5,) * 3, std=(0.25,) * 3)
    check_space(NniSpace(info, nni=f"nni_hub:{name}", args=args, bits=(32,)), candidates=2, seed=1)


@pytest.mark.slow
def test_darts_is_priced_with_its_bits() -> None:
    info = TaskInfo((3, 32, 32), 10)
    space = NniSpace(info, nni="nni_hub:DARTS", args={"width": 8, "num_cells": 3, "dataset": "cifar"})
    genomes = space.sample(np.random.default_rng(0), 20)
    estimator = AdditiveEstimator(space, synthetic_table(space))
    for genome, fast in zip(genomes, estimator.price(genomes), strict=True):
        np.testing.assert_allclose(fast, estimator.price_slowly(space.decode(genome)))


@pytest.mark.slow
def test_the_hubs_largest_mobilenet_is_listed_in_little_time() -> None:
    """Seven widths, six expansions, three kernels, four depths: every site stays small enough to be tabulated."""
    space = NniSpace(TaskInfo((3, 64, 64), 10), nni="nni_hub:MobileNetV3Space")
    assert max(len(site.values) for site in space.compiled) < 100_000
    assert len(space.keys()) > 1000


def test_parts_are_models_that_run(mixed: NniSpace) -> None:
    """Of every make: with a layer and without, in floats and in integers, and between the two."""
    keys = mixed.keys()
    without_layer = [key for key, part in keys.items() if not part.macs]
    for key in {*without_layer, *sorted(keys)[::12]}:
        session = onnxruntime.InferenceSession(keys[key].to_onnx(1).SerializeToString())
        types = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}
        shapes = {i.name: [d if isinstance(d, int) else 1 for d in i.shape] for i in session.get_inputs()}
        feed = {i.name: np.ones(shapes[i.name], types[i.type]) for i in session.get_inputs()}
        assert all(np.isfinite(np.asarray(y, np.float32)).all() for y in session.run(None, feed)), key


# ---- labels ---------------------------------------------------------------------------------------------------


def test_every_label_is_a_choice_and_every_candidate_freezes(mixed: NniSpace) -> None:
    space = mixed.model_space
    assert {choice.name for choice in mixed.labels.choices} == {
        "width", "depth", "wide0", "wide1", "kernel0", "kernel1", "second0", "second1", "inner0", "inner1", "pool",
        "join", "one", "dropout", "units",
    }  # fmt: skip
    assert set(mixed.choices[mixed.position["join"]].values) == {"0", "1", "0+1"}
    for genome in mixed.sample(np.random.default_rng(0), 20):
        sample = mixed.labels.sample(mixed.decode(genome))
        assert space.contains(sample)


def test_a_candidate_computes_what_nni_freezes(mixed: NniSpace) -> None:
    x = GREY.random(4, seed=1)
    for genome in mixed.sample(np.random.default_rng(1), 4):
        candidate = mixed.decode(genome)
        torch.manual_seed(3)
        built = mixed.build(candidate)
        # Labels that nothing reads have their first value, which draws other initial weights of no use to anybody.
        read = active(mixed, candidate)
        values = {c.name: candidate[c.name] if c.name in read else c.values[0] for c in mixed.labels.choices}
        torch.manual_seed(3)
        frozen = mixed.model_space.freeze(mixed.labels.sample(values)).eval()
        with torch.no_grad():
            torch.testing.assert_close(built(x), frozen((x - 0.5) / 0.25))


def test_what_a_candidate_does_not_have_is_dormant(mixed: NniSpace) -> None:
    short = active(mixed, with_values(mixed, depth=1, second0="one"))
    assert not {"wide1", "kernel1", "second1", "inner1", "inner0", "blocks.1.bits", "blocks.1.prune"} & short
    deep = active(mixed, with_values(mixed, depth=2, second0="two", second1="one"))
    assert {"wide1", "kernel1", "second1", "inner0", "blocks.1.bits"} <= deep
    assert "inner1" not in deep


def test_a_label_that_costs_nothing_is_part_of_the_candidate(mixed: NniSpace) -> None:
    with_dropout, without = with_values(mixed, dropout=0.2), with_values(mixed, dropout=0.0)
    assert "dropout" in active(mixed, with_dropout)
    assert mixed.parts(with_dropout) == mixed.parts(without)
    assert mixed.canonical_id(mixed.encode(with_dropout)) != mixed.canonical_id(mixed.encode(without))
    assert any(isinstance(m, torch.nn.Dropout) and m.p == 0.2 for m in mixed.build(with_dropout).modules())


def test_cells_of_one_label_choose_alike() -> None:
    space = own("Cells")
    conv = with_values(space, **{"cell/op_1_0": "conv", "cell/op_2_0": "skip"})
    convolutions = [part for part in space.parts(conv) if part.macs and "conv8k3p1" in part.key]
    assert len(convolutions) == 2  # one in each cell


def test_the_union_takes_one_of_what_lies_side_by_side(mixed: NniSpace) -> None:
    choices = [node for node in mixed.structure.nodes if is_choice(node)]
    assert choices
    candidate = with_values(mixed, kernel0=3)
    paths = {p for p in mixed.structure.layers if not mixed._run.dropped(candidate, mixed.structure.calls[p][0])}
    assert "net.blocks.0.first.1" in paths
    assert "net.blocks.0.first.0" not in paths


# ---- sizes and compression ------------------------------------------------------------------------------------


def test_sizes_are_those_of_the_labels_and_then_pruned(mixed: NniSpace) -> None:
    def channels(**values: Any) -> int:
        built = mixed.build(with_values(mixed, **values))
        return int(built.get_submodule("net.blocks.0.first").out_channels)

    assert channels(wide0=3) == 24
    assert channels(wide0=1) == 8
    plan = mixed.training(with_values(mixed, wide0=3, kernel0=3, **{"blocks.0.prune": 0.5})).compression
    assert plan["channel_prune"] == {"net.blocks.0.first": 16}
    keys = [part.key for part in mixed.parts(with_values(mixed, wide0=3, kernel0=3, **{"blocks.0.prune": 0.5}))]
    assert any("conv16k3p1 relu" in key for key in keys), keys


def test_what_is_skipped_keeps_its_size_and_precision() -> None:
    space = own("Mixed", skip=("blocks.*",))
    assert not [choice.name for choice in space.choices if choice.name.startswith("blocks.")]
    int8 = Candidate({**with_values(space).as_dict(), **{c.name: 8 for c in space.choices if c.name.endswith(".bits")}})
    assert not [path for path in space.training(int8).compression["quantize"] if path.startswith("net.blocks")]


def test_grey_images_for_a_model_that_wants_colours() -> None:
    info = TaskInfo((1, 16, 16), 10, mean=(0.5,), std=(0.25,))
    space = NniSpace(info, nni="nni_hub:NasBench201", args={"num_modules_per_stack": 1}, bits=(32,))
    assert any("3 channels" in remark for remark in space.remarks())
    check_space(space, candidates=1)


def test_teachers_rise_and_uniform_members_are_compressed(mixed: NniSpace) -> None:
    macs = [sum(part.macs for part in mixed.parts(member)) for member in mixed.ladder()]
    assert macs == sorted(macs)
    assert len(set(macs)) == len(macs)
    assert all(not mixed.training(member).compression for member in mixed.ladder())
    for member in mixed.uniform():
        assert {member[c.name] for c in mixed.choices if c.name.endswith(".bits")} == {8}


def test_the_same_space_everywhere() -> None:
    """Modules without labels keep the space's own initial weights, which are drawn alike in every process."""
    one, other = own("Cells"), own("Cells")
    torch.manual_seed(0)
    a = one.build(with_values(one))
    torch.manual_seed(0)
    b = other.build(with_values(other))
    for (name, x), (_, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert torch.equal(x, y), name


# ---- searched -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["random", "default", "evolution", "nsga2", "local-search", "reinforce", "ppo"])
def test_every_strategy_proposes_models_of_it(mixed: NniSpace, kind: str) -> None:
    strategy = strategies.get(kind)(domain_of(mixed), 0)
    for genome in strategy.ask(3).genomes:
        assert mixed.model_space.contains(mixed.labels.sample(mixed.decode(genome)))


EXPERIMENT = """
name: own
task: {data: digits, limit: 300}
space: {nni: "tests.nni_spaces:Mixed", args: {widths: [8, 16]}, bits: [32, 8]}
teacher: {epochs: 2}
table: {seconds: 2}
budget: {latency: 90%}
search: {trials: 2, workers: 1}
training: {epochs: 2, compressed_epochs: 1}
finalists: {count: 1, epochs: 2, compressed_epochs: 1}
baselines: []
"""


def test_an_experiment_names_a_model_space(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(EXPERIMENT)
    assert load_experiment(path).space.name == "nni"


@pytest.mark.slow
def test_a_search_ends_in_a_student(tmp_path: Path) -> None:
    import nas

    path = tmp_path / "own.yaml"
    path.write_text(EXPERIMENT)
    student = nas.search(path, out=tmp_path / "run")
    x = np.zeros((2, 1, 8, 8), np.float32)
    assert student.predict(x).shape == (2, 10)
    assert student.latency_ms > 0


# ---- what cannot be searched ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("Unlabelled", ContentError, "[Ll]abel must be specified"),
        ("Range", SpaceError, "'rate'.*any number in a range"),
        ("Constrained", SpaceError, "constrained by 'equal'"),
        ("DependsOnData", SpaceError, "data-dependent"),
        ("Shapes", SpaceError, r"stride chooses has other shapes.*\[8, 8, 8\], \[8, 4, 4\]"),
        ("Fixed", SpaceError, "conv has a number of outputs that width chooses"),
        ("Namesake", SpaceError, "label 'temperature'.*name of a choice"),
        ("LooseEnds", SpaceError, "concatenates the nodes that no other reads"),
        ("not_a_space", ContentError, "is a Linear"),
        ("Missing", ContentError, "has no 'Missing'"),
    ],
)
def test_what_cannot_be_searched_is_one_error(
    name: str, error: type[NasError], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(error, match=said):
        own(name)
    assert "def forward" not in "".join(capfd.readouterr())  # nothing but the error


def test_arguments_that_the_class_does_not_take() -> None:
    with pytest.raises(ContentError, match="unexpected keyword argument 'depths'"):
        own("Mixed", args={"depths": 3})


def test_a_space_for_other_data() -> None:
    with pytest.raises(SpaceError, match=r"outputs of shape \[n, 10\]"):
        NniSpace(TaskInfo((1, 8, 8), 4), nni="tests.nni_spaces:Cells")


def test_a_parameter_that_a_module_makes_itself() -> None:
    """AutoFormer's class token is a parameter whose size a label chooses, and no layer's."""
    with pytest.raises(SpaceError, match="AutoFormer cannot be followed"):
        NniSpace(
            TaskInfo((3, 32, 32), 10), nni="nni_hub:AutoformerSpace",
            args={"search_embed_dim": (48, 96), "search_depth": (2,), "img_size": 32, "patch_size": 8},
        )  # fmt: skip


def test_without_nni(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nni.nas.nn.pytorch", None)
    import nas.nni

    with pytest.raises(NasError, match=r"(?s)needs the package nni.*latency-nas\[nni\]"):
        nas.nni.require("A model space of NNI")
