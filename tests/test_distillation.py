"""Distillation beyond logits: points of comparison, distances, several teachers, and trainings that follow them."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import SMALL, TinyModel, TinySpace
from safetensors.torch import save_file
from torch import nn

import nas
from nas import members
from nas.content import load_space
from nas.errors import ContentError, ExperimentError, NasError, SpaceError, TrainingError
from nas.evaluators import Distil, distillation
from nas.evaluators.distillation import Guide, Hints, attention_distance, feature_distance, mixed_logits
from nas.evaluators.points import as_map, maps, stage_outputs
from nas.evaluators.train import Lessons, Recipe, predict, train
from nas.executors import Processes, Serial
from nas.experiment import load_experiment
from nas.space import Candidate, TaskInfo, Training
from nas.student.export import to_onnx
from nas.tasks import Task, tasks

RECIPE = Recipe(epochs=4, compressed_epochs=1, batch_size=32, lr=1e-2)
OPTIONS: dict[str, Any] = {
    "resolutions": [8], "stem": [8, 1], "widths": [[8, 16], [16, 24]], "depths": [[1, 2], [1]], "strides": [1, 2],
}  # fmt: skip


class Conv(nn.Module):
    """Two stages of a convolutional network: 8×8 and 4×4."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU())
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x / 16)).mean(dim=(2, 3)))


@pytest.fixture(scope="module")
def task() -> Task:
    return tasks.get("classification")("digits", limit=320, limit_test=50)  # type: ignore[call-arg, arg-type]


@pytest.fixture(scope="module")
def teacher(task: Task) -> nn.Module:
    torch.manual_seed(0)
    lessons = Lessons.prepare(task, None, 1, 0)
    return train(Conv(24), task, lessons, Training(), replace(RECIPE, epochs=15), 0)


@pytest.fixture(scope="module")
def lessons(task: Task, teacher: nn.Module) -> Lessons:
    return Lessons.prepare(task, teacher, views=2, seed=0)


def student(width: int = 8, seed: int = 1) -> Conv:
    torch.manual_seed(seed)
    return Conv(width)


def batch(n: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


# ---- points ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "depths"), [("mobilenet", [[1, 2], [1]]), ("resnet", [[1, 2], [1]])])
def test_points_of_a_staged_model_are_the_ends_of_its_stages(family: str, depths: Any) -> None:
    space = load_space(family, TaskInfo((1, 8, 8), 10), {**OPTIONS, "depths": depths})
    for depth in (1, 2):
        member = {**space.ladder()[0].as_dict(), "stage0.depth": depth}
        assert stage_outputs(space.build(Candidate(member)), batch()) == (f"stages.0.{depth - 1}", "stages.1.0")


def test_points_of_a_transformer_are_blocks_at_even_distances() -> None:
    space = load_space("vit", TaskInfo((1, 8, 8), 10), {"resolutions": [8], "depths": [[4]], "widths": [16]})
    found = stage_outputs(space.build(space.ladder()[0]), batch())  # attention and MLP of four layers: 8 blocks
    assert found == ("groups.0.1", "groups.0.3", "groups.0.5", "groups.0.7")


def test_points_of_other_models() -> None:
    plain = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )  # fmt: skip
    assert stage_outputs(plain, batch()) == ("1", "4")

    class Whole(nn.Module):
        """A network inside another, and an activation that is run many times."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.act = plain, nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(self.inner(self.act(x)))

    assert stage_outputs(Whole(), batch()) == ("inner.1", "inner.4")

    class Text(nn.Module):
        """Token numbers in, layers that give tuples."""

        class Layer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(8, 8)

            def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
                return self.linear(x) + x, None

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.layers = nn.Embedding(9, 8), nn.ModuleList(self.Layer() for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.embed(x)
            for layer in self.layers:
                y, _ = layer(y)
            return y.mean(dim=1)

    numbers = torch.randint(0, 9, (2, 5), generator=torch.Generator().manual_seed(0))
    assert stage_outputs(Text(), numbers) == ("layers.0", "layers.1", "layers.2")
    assert {m.shape for m in maps(Text(), numbers, ["layers.0", "layers.2"]).values()} == {(2, 8, 5, 1)}


def test_finding_points_leaves_the_model_alone() -> None:
    model = student().train()
    model.first[1].eval()
    before = copy.deepcopy(model.state_dict())
    stage_outputs(model, batch())
    assert [m.training for m in (model, model.first[1], model.second)] == [True, False, True]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_model_without_maps() -> None:
    with pytest.raises(TrainingError, match=r"No layer of Sequential gives maps or tokens[^$]*pairs of names"):
        stage_outputs(nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), batch())


def test_one_form_for_every_output() -> None:
    tokens = torch.arange(2 * 4 * 3).float().view(2, 4, 3)  # [n, tokens, channels]
    grid = as_map(tokens, 2)
    assert grid.shape == (2, 3, 2, 2)
    assert torch.equal(grid[1, 2].flatten(), tokens[1, :, 2])
    assert torch.equal(as_map(tokens.reshape(8, 3), 2), grid)
    assert as_map(tokens[:, :3], 2).shape == (2, 3, 3, 1)
    assert as_map(torch.rand(2, 5), 2).shape == (2, 5, 1, 1)
    with pytest.raises(TrainingError, match=r"shape \[3, 4, 2\] for 2 samples"):
        as_map(torch.rand(3, 4, 2), 2)


# ---- distances ---------------------------------------------------------------------------------------


def test_feature_distance_by_hand() -> None:
    mine, wanted = torch.tensor([[[[1.0, 2], [3, 4]]]]), torch.tensor([[[[1.0, 2], [3, 8]]]])
    assert feature_distance(mine, wanted).item() == pytest.approx(0.5 * (16 / 4) / (78 / 4))
    assert feature_distance(10 * mine, 10 * wanted).item() == pytest.approx(0.5 * 16 / 78)
    assert feature_distance(mine, torch.tensor([[[[4.5]]]])).item() == pytest.approx(0.5 * 2**2 / 4.5**2)


def test_attention_distance_is_equation_2() -> None:
    generator = torch.Generator().manual_seed(0)
    mine, wanted = torch.randn(3, 5, 4, 4, generator=generator), torch.randn(3, 7, 4, 4, generator=generator)
    terms = []
    for a, b in zip(mine.numpy(), wanted.numpy(), strict=True):
        qa, qb = (np.square(t).sum(axis=0).ravel() for t in (a, b))
        terms.append(np.linalg.norm(qa / np.linalg.norm(qa) - qb / np.linalg.norm(qb)) / 2)
    assert attention_distance(mine, wanted).item() == pytest.approx(np.mean(terms), rel=1e-5)
    assert attention_distance(3 * wanted, wanted).item() == pytest.approx(0, abs=1e-6)
    exact = mine.clone().requires_grad_()
    attention_distance(exact, mine).backward()
    assert exact.grad is not None
    assert bool(torch.isfinite(exact.grad).all()), "the root has no gradient at 0"


@pytest.mark.parametrize(
    "shapes", [((2, 3, 8, 8), (2, 3, 4, 4)), ((2, 3, 4, 4), (2, 3, 5, 1)), ((2, 3, 2, 3), (2, 3, 3, 2))]
)
def test_maps_of_any_two_sizes_can_be_compared(shapes: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(shape, generator=generator) for shape in shapes)
    for distance in (feature_distance, attention_distance):
        assert 0 < distance(a, b).item() < 1
        torch.testing.assert_close(distance(a, a), torch.tensor(0.0))


# ---- several teachers --------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_several_teachers_give_the_mixture(task: Task, temperature: float) -> None:
    """T² KL(Σ wₖ softmax(zₖ / T) ‖ softmax(z / T)), through the loss of one teacher."""
    generator = torch.Generator().manual_seed(0)
    z, zs = torch.randn(6, 10, generator=generator), 3 * torch.randn(3, 6, 10, generator=generator)
    y, weights = torch.arange(6), [0.5, 0.2, 0.3]
    mixture = sum(w * F.softmax(logits / temperature, dim=1) for w, logits in zip(weights, zs, strict=True))
    assert isinstance(mixture, torch.Tensor)
    kl = (mixture * (mixture.log() - F.log_softmax(z / temperature, dim=1))).sum(dim=1).mean()
    wanted = 0.3 * F.cross_entropy(z, y) + 0.7 * temperature**2 * kl
    found = task.distillation_loss(z, mixed_logits(zs, weights, temperature), y, 0.7, temperature)
    torch.testing.assert_close(found, wanted)


def test_lessons_of_several_teachers(task: Task, teacher: nn.Module) -> None:
    other = student(4).eval()
    lessons = Lessons.prepare(task, [teacher, Guide(other, weight=3.0)], views=2, seed=0)
    assert lessons.teacher is not None
    assert lessons.teacher.shape == (2, 2, *lessons.y.shape, 10)
    np.testing.assert_array_equal(lessons.teacher[1, 1].numpy(), predict(other, lessons.x[1]))
    rows, temperature = torch.tensor([5, 0, 7]), 2.0
    soft = lessons.soft_targets(1, rows, temperature)
    assert soft is not None
    with torch.no_grad():
        words = [F.softmax(model(lessons.x[1, rows]) / temperature, dim=1) for model in (teacher, other)]
    torch.testing.assert_close(F.softmax(soft / temperature, dim=1), (words[0] + 3 * words[1]) / 4)
    alike = replace(lessons, guides=()).soft_targets(1, rows, temperature)
    assert alike is not None
    torch.testing.assert_close(F.softmax(alike / temperature, dim=1), (words[0] + words[1]) / 2)
    one = Lessons.prepare(task, teacher, views=2, seed=0).soft_targets(1, rows, temperature)
    assert one is not None
    torch.testing.assert_close(one, lessons.teacher[0, 1, rows])


def test_a_student_of_two_teachers_learns(task: Task, teacher: nn.Module) -> None:
    both = Lessons.prepare(task, [teacher, Guide(copy.deepcopy(teacher), 0.5)], 1, 0)
    setting = Training(kd_weight=0.9, temperature=4.0, feature_weight=0.5, attention_weight=0.5)
    x, y = task.split("valid")
    model = train(student(), task, both, setting, replace(RECIPE, epochs=10), 0)
    assert task.evaluate(predict(model, x), y.numpy())["accuracy"] > 0.6
    # A teacher twice, whatever the weights, is that teacher.
    one = train(student(), task, Lessons.prepare(task, teacher, 1, 0), replace(setting, feature_weight=0.0), RECIPE, 0)
    two = train(student(), task, both, replace(setting, feature_weight=0.0), RECIPE, 0)
    np.testing.assert_allclose(predict(one, x), predict(two, x), atol=0.05)


# ---- trainings ---------------------------------------------------------------------------------------


def distance(model: nn.Module, teacher: nn.Module, x: torch.Tensor, measure: Callable[..., torch.Tensor]) -> float:
    points = ["first", "second"]
    mine, wanted = maps(model, x, points), maps(teacher, x, points)
    return sum(float(measure(mine[p], wanted[p])) for p in points)


@pytest.mark.parametrize(
    ("setting", "measure", "width"),
    [
        (Training(feature_weight=5.0), feature_distance, 24),
        (Training(attention_weight=5.0), attention_distance, 24),
        (Training(attention_weight=5.0), attention_distance, 8),
    ],
)
def test_a_student_comes_nearer_to_what_it_is_shown(
    task: Task, teacher: nn.Module, lessons: Lessons, setting: Training, measure: Any, width: int
) -> None:
    """On validation data, and nearer than a student that only learns labels."""
    x, _ = task.split("valid")
    start = distance(student(width), teacher, x, measure)
    shown = distance(train(student(width), task, lessons, setting, RECIPE, 0), teacher, x, measure)
    not_shown = distance(train(student(width), task, lessons, Training(), RECIPE, 0), teacher, x, measure)
    assert shown < 0.8 * start
    assert shown < 0.8 * not_shown


def test_a_projected_student_comes_nearer_and_the_gradient_reaches_it(teacher: nn.Module, lessons: Lessons) -> None:
    model, rows = student(), torch.arange(64)
    untouched = [None if p.grad is None else p.grad.clone() for p in teacher.parameters()]
    hints = Hints(lessons.guides, lessons.x, feature_weight=1.0, attention_weight=0.0, seed=0)
    losses = []
    with hints.on(model) as watch:
        shapes = sorted(tuple(p.shape) for p in hints.parameters())
        assert shapes == [(24,), (24, 8, 1, 1), (48,), (48, 16, 1, 1)]
        optimiser = torch.optim.Adam([*model.parameters(), *hints.parameters()], 1e-2)
        for _ in range(40):
            model.train()(lessons.x[1, rows])
            loss = watch.loss(1, rows)
            assert loss is not None
            optimiser.zero_grad()
            loss.backward()
            if not losses:
                grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
                reached = {name for name, grad in grads.items() if grad.abs().max() > 0}
                assert {"first.0.weight", "first.1.weight", "second.0.weight", "second.1.bias"} <= reached
                assert not any(name.startswith("head") for name in reached)
            optimiser.step()
            losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    for after, before in zip(teacher.parameters(), untouched, strict=True):
        assert (after.grad is None and before is None) or torch.equal(after.grad, before)


def test_nothing_of_it_stays_in_the_student(task: Task, lessons: Lessons, tmp_path: Path) -> None:
    setting = Training(0.5, 2.0, {"channel_prune": {"first.0": 4}}, feature_weight=1.0, attention_weight=1.0)
    model = train(student(), task, lessons, setting, RECIPE, 0)
    plain = train(student(), task, lessons, replace(setting, feature_weight=0, attention_weight=0), RECIPE, 0)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    exported, usual = (to_onnx(m, setting.compression, batch(1), batch().numpy()) for m in (model, plain))
    assert [tuple(t.dims) for t in exported.graph.initializer] == [tuple(t.dims) for t in usual.graph.initializer]


def weights_of(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_seed_decides_everything(task: Task, lessons: Lessons) -> None:
    setting = Training(0.5, 2.0, feature_weight=1.0, attention_weight=1.0)
    found = []
    for seed, noise in ((0, 1), (0, 2), (1, 3)):
        model = student()
        torch.manual_seed(noise)  # the global generator has no say, and is left alone
        expected = torch.rand(2)
        torch.manual_seed(noise)
        found.append(weights_of(train(model, task, lessons, setting, replace(RECIPE, epochs=1), seed)))
        assert torch.equal(torch.rand(2), expected)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    projections = []
    for seed in (0, 0, 1):
        hints = Hints(lessons.guides, lessons.x, 1.0, 0.0, seed)
        with hints.on(student()):
            projections.append(torch.cat([p.detach().flatten() for p in hints.parameters()]))
    assert torch.equal(projections[0], projections[1])
    assert not torch.equal(projections[0], projections[2])


def test_weights_of_zero_change_nothing(task: Task, lessons: Lessons) -> None:
    with_guides = train(student(), task, lessons, Training(0.5, 2.0), RECIPE, 0)
    without = train(student(), task, replace(lessons, guides=()), Training(0.5, 2.0), RECIPE, 0)
    assert torch.equal(weights_of(with_guides), weights_of(without))


@pytest.mark.parametrize(
    "compression",
    [
        {"channel_prune": {"first.0": 4}, "quantize": {"first.0": 8, "second.0": 8}},
        {"low_rank": {"second.0": [4, 4], "head": 4}},
    ],
)
def test_hints_go_on_after_the_compression(task: Task, lessons: Lessons, compression: Any) -> None:
    """Pruned channels get a new projection, all else goes on with the old one."""
    hints = Hints(lessons.guides, lessons.x, 1.0, 1.0, 0)
    model = student()
    with hints.on(model):
        before = dict(hints._projections)
    setting = Training(0.5, 2.0, compression, feature_weight=1.0, attention_weight=1.0)
    compressed = train(model, task, lessons, setting, RECIPE, 0)
    with hints.on(compressed) as watch:
        pruned = "channel_prune" in compression
        assert (hints._projections[0, 0] is before[0, 0]) is not pruned
        assert hints._projections[0, 1] is before[0, 1]
        compressed.train()(lessons.x[0, :8])
        loss = watch.loss(0, torch.arange(8))
    assert loss is not None
    assert 0 < loss.item() < math.inf


def test_a_transformer_learns_from_a_convolutional_network(task: Task, lessons: Lessons) -> None:
    space = load_space("vit", task.info, {"resolutions": [8], "depths": [[1], [1]], "widths": [16], "heads": [2]})
    torch.manual_seed(0)
    model = space.build(space.ladder()[0])
    hints = Hints(lessons.guides, lessons.x, 1.0, 1.0, 0)
    rows = torch.arange(6)
    with hints.on(model) as watch:
        model.train()(lessons.x[0, rows])
        loss = watch.loss(0, rows)
        assert loss is not None
        loss.backward()
    assert all(
        p.grad is not None and bool(torch.isfinite(p.grad).all())
        for name, p in model.named_parameters() if name.startswith("groups.0")
    )  # fmt: skip


def test_pairs_by_name(task: Task, teacher: nn.Module) -> None:
    guide = Guide(teacher, pairs=(("second.0", "second.1"), ("head", "head")))
    lessons = Lessons.prepare(task, guide, views=1, seed=0)
    hints = Hints(lessons.guides, lessons.x, 1.0, 0.0, 0)
    model, rows = student().eval(), torch.arange(8)
    with hints.on(model) as watch, torch.no_grad():
        model(lessons.x[0, rows])
        found = watch.loss(0, rows)
        mine = maps(model, lessons.x[0, rows], ["second.0", "head"])
        wanted = maps(teacher, lessons.x[0, rows], ["second.1", "head"])
        projected = hints._projections[0, 0](mine["second.0"])
        expected = feature_distance(projected, wanted["second.1"]) + feature_distance(mine["head"], wanted["head"])
    torch.testing.assert_close(found, expected)


def test_features_are_the_same_kept_or_computed_anew(
    teacher: nn.Module, lessons: Lessons, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.tensor([3, 0, 200])
    kept = Guide(teacher).features(lessons.x, 1, rows)
    monkeypatch.setattr(distillation, "CACHE_BYTES", 0)
    anew = Guide(teacher)
    found = anew.features(lessons.x, 1, rows)
    assert not any(isinstance(key, tuple) for key in anew._cache), "nothing is kept"
    assert list(found) == list(kept) == ["first.2", "second.2"]
    for name in found:
        torch.testing.assert_close(found[name], kept[name])
        torch.testing.assert_close(found[name], maps(teacher, lessons.x[1, rows], [name])[name])
    guide, other = Guide(teacher), lessons.x.flip(1)
    monkeypatch.undo()
    assert torch.equal(guide.features(lessons.x, 1, rows)["first.2"], kept["first.2"])
    wanted = maps(teacher, other[1, rows], ["first.2"])
    torch.testing.assert_close(guide.features(other, 1, rows)["first.2"], wanted["first.2"])


# ---- what can be wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting", [Training(feature_weight=-0.5), Training(attention_weight=math.nan), Training(kd_weight=-0.1)]
)
def test_weights_out_of_range(task: Task, lessons: Lessons, setting: Training) -> None:
    with pytest.raises(ExperimentError, match=r"weight"):
        train(student(), task, lessons, setting, RECIPE, 0)


def test_wrong_names(task: Task, teacher: nn.Module) -> None:
    with pytest.raises(ExperimentError, match=r"The teacher has no module 'secnd'[^$]*second"):
        Guide(teacher, pairs=(("first", "secnd"),))
    lessons = Lessons.prepare(task, Guide(teacher, pairs=(("frist", "first"),)), 1, 0)
    with pytest.raises(ExperimentError, match=r"The student has no module 'frist'[^$]*first"):
        train(student(), task, lessons, Training(feature_weight=1.0), RECIPE, 0)
    with pytest.raises(ExperimentError, match=r"weight is 0[^$]*above 0"):
        Guide(teacher, weight=0)


def test_features_without_the_teacher_itself(task: Task, lessons: Lessons) -> None:
    alone = replace(lessons, guides=())
    with pytest.raises(TrainingError, match=r"hold only its logits[^$]*prepare the lessons with the teacher"):
        train(student(), task, alone, Training(feature_weight=1.0), RECIPE, 0)
    untaught = Lessons.prepare(task, None, 1, 0)  # as kd_weight, it means nothing where nobody teaches
    taught_nothing = train(student(), task, untaught, Training(0.5, 2.0, feature_weight=1.0), RECIPE, 0)
    assert torch.equal(weights_of(taught_nothing), weights_of(train(student(), task, untaught, Training(), RECIPE, 0)))


def test_a_layer_that_does_not_run() -> None:
    class Idle(Conv):
        def __init__(self) -> None:
            super().__init__(8)
            self.spare = nn.Conv2d(1, 1, 1)

    with pytest.raises(TrainingError, match=r"Module 'spare' does not run"):
        maps(Idle(), batch(), ["first", "spare"])


# ---- genes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mobilenet", "resnet", "vit"])
def test_spaces_offer_features_and_attention_as_genes(family: str) -> None:
    info = TaskInfo((1, 8, 8), 10)
    usual = load_space(family, info, {})
    assert [c.name for c in usual.choices][-2:] == ["kd_weight", "temperature"]
    space = load_space(family, info, {"feature_weights": [0.0, 0.5], "attention_weights": [2.0]})
    added = space.choices[len(usual.choices) :]
    assert [(c.name, c.values, c.technique) for c in added] == [
        ("feature_weight", (0.0, 0.5), "distillation"), ("attention_weight", (2.0,), "distillation"),
    ]  # fmt: skip
    genome = space.sample(np.random.default_rng(0), 1)[0]
    genome[space.position["feature_weight"]] = 1
    training = space.training(space.decode(genome))
    assert (training.feature_weight, training.attention_weight) == (0.5, 2.0)
    assert space.active(genome)[0, space.position["feature_weight"]]
    assert space.ladder()
    assert space.uniform()
    with pytest.raises(SpaceError, match=r"feature_weights has -1[^$]*0 or more"):
        load_space(family, info, {"feature_weights": [0.0, -1.0]})


def test_no_weight_is_no_choice() -> None:
    names = [c.name for c in members.distillation_choices([0.5], [2.0], feature_weights=[0], attention_weights=[0.0])]
    assert names == ["kd_weight", "temperature"]


# ---- workers and whole searches ----------------------------------------------------------------------


def test_a_guide_is_made_again_where_its_class_is_not_known(teacher: nn.Module) -> None:
    space = load_space("mobilenet", TaskInfo((1, 8, 8), 10), OPTIONS)
    member = space.ladder()[0]
    module = space.build(member).eval()
    from functools import partial

    guide = pickle.loads(pickle.dumps(Guide(module, 2.0, build=partial(space.build, member))))
    np.testing.assert_array_equal(predict(guide.module, batch()), predict(module, batch()))
    assert (guide.weight, guide.pairs) == (2.0, ())
    sent = pickle.loads(pickle.dumps(Guide(teacher, pairs=(("first", "first"),))))
    np.testing.assert_array_equal(predict(sent.module, batch()), predict(teacher, batch()))
    assert sent.pairs == (("first", "first"),)


class Shown(TinySpace):
    """The tiny space with features and attention in every training."""

    def training(self, candidate: Candidate) -> Training:
        return replace(super().training(candidate), feature_weight=0.5, attention_weight=0.5)


def _judged(distil: Distil, genome: Any) -> Any:
    return distil.evaluate(genome)


@pytest.mark.slow
def test_a_worker_process_comes_to_the_same_quality(task: Task) -> None:
    torch.manual_seed(0)
    lessons = Lessons.prepare(task, TinyModel(task.info, 16, 3), views=2, seed=0)
    distil = Distil(Shown(task.info), task, lessons, RECIPE, seed=3)
    genomes = [np.array([1, 1, 1, 1, 1, 0, 1, 1]), np.array([1, 0, 0, 0, 0, 0, 0, 0])]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with Serial(distil) as here, Processes(distil, 1) as there:
            found = [dict(executor.run(_judged, genomes)) for executor in (here, there)]
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]
    assert not any(isinstance(result, Exception) or result.failed for result in found[0].values())


MODELS = """
from torch import nn


def build() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 32, 3, stride=2, padding=1),
        nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
    )
"""


@pytest.mark.slow
def test_a_search_with_features_and_two_teachers(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("NAS_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "features_own.py").write_text(MODELS)
    scope: dict[str, Any] = {}
    exec(MODELS, scope)
    torch.manual_seed(0)
    lessons = Lessons.prepare(task, None, 1, 0)
    model = train(scope["build"](), task, lessons, Training(), replace(RECIPE, epochs=10), 0)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "own.safetensors")
    experiment = {
        **SMALL,
        "space": {**SMALL["space"], "feature_weights": [0.5, 1.0], "attention_weights": [0.0, 1.0]},
        "teacher": {"epochs": 3, "also": [{"model": "features_own:build", "weights": "own.safetensors"}]},
        "search": {"trials": 3, "batch": 3, "workers": 1},
        "training": {**SMALL["training"], "batch_size": 16},
        "finalists": {**SMALL["finalists"], "epochs": 20, "compressed_epochs": 5},
        "baselines": [],
    }
    student = nas.search(experiment, out=tmp_path / "run")
    assert student.manifest["candidate"]["feature_weight"] in (0.5, 1.0)
    assert student.quality > 0.3
    wrong = {**experiment, "teacher": {"also": [{"model": "features_own:build", "weights": "none.safetensors"}]}}
    with pytest.raises(ContentError, match=r"no weights at none\.safetensors"):
        nas.search(wrong, out=tmp_path / "other")


@pytest.mark.parametrize(
    ("further", "message"),
    [
        ({"model": "a:b"}, r"teacher\.also[^$]*weights"),
        ({"model": "a:b", "weights": "w", "influence": 0}, r"teacher\.also[^$]*influence"),
        ({"model": "a:b", "weights": "w", "weight": 1}, r"teacher\.also[^$]*weight"),
    ],
)
def test_further_teachers_in_the_experiment(further: dict[str, Any], message: str) -> None:
    with pytest.raises(NasError, match=message):
        load_experiment({**SMALL, "teacher": {"also": [further]}})
