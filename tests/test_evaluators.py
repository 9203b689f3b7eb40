"""Evaluators: the contract for every one, the guard around them, and training as it is recorded."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TinyModel, TinySpace, tiny_quality

from nas.compression.quantize import QuantConv2d
from nas.errors import NasError, TrainingError
from nas.evaluators import Distil, Evaluation, Evaluator, Lookup, evaluators
from nas.evaluators.base import guarded
from nas.evaluators.distil import candidate_seed, skeleton
from nas.evaluators.train import Lessons, Recipe, _one_cycle, predict, train
from nas.space import Genomes, Training
from nas.tasks import Task, tasks
from nas.testing import check_evaluator

RECIPE = Recipe(epochs=2, compressed_epochs=1, batch_size=32, lr=1e-2)
EVERYTHING = np.array([1, 1, 1, 1, 1, 0, 1, 1])  # deep, wide, 5×5, int8, pruned, distilled
PLAIN = np.array([0, 0, 0, 0, 0, 0, 0, 0])


@pytest.fixture(scope="module")
def task() -> Task:
    return tasks.get("classification")("digits", limit=300, limit_test=50)  # type: ignore[call-arg, arg-type]


@pytest.fixture(scope="module")
def lessons(task: Task) -> Lessons:
    torch.manual_seed(0)
    return Lessons.prepare(task, TinyModel(task.info, 16, 3), views=2, seed=0)


@pytest.fixture(scope="module")
def distil(task: Task, lessons: Lessons) -> Distil:
    return Distil(TinySpace(task.info), task, lessons, RECIPE, seed=3)


# How to make one of each registered kind, and a genome that it can evaluate. A new evaluator is entered here.
MAKERS: dict[str, Callable[[Distil], tuple[Evaluator, Genomes]]] = {
    "distil": lambda distil: (distil, EVERYTHING),
    "lookup": lambda distil: (Lookup({(0, 1): 0.75}), np.array([0, 1])),
}


def test_every_evaluator_has_a_maker() -> None:
    assert set(MAKERS) == set(evaluators), "enter the new evaluator in MAKERS"


@pytest.mark.parametrize("kind", list(evaluators))
def test_every_registered_evaluator(kind: str, distil: Distil) -> None:
    check_evaluator(*MAKERS[kind](distil))


# ---- looking up --------------------------------------------------------------------------------------


def test_lookup() -> None:
    table = Lookup({(0, 1): 0.75})
    assert table.evaluate(np.array([0, 1])) == Evaluation(0.75)
    missing = table.evaluate(np.array([1, 1]))
    assert missing.failed
    assert missing.reason == "the table has no such genome"
    function = pickle.loads(pickle.dumps(Lookup(tiny_quality)))
    assert function.evaluate(EVERYTHING).quality == tiny_quality(EVERYTHING)


def test_a_lookup_answers_at_the_fidelities_that_it_has() -> None:
    table = Lookup({(0, 1): 0.75}, lower={0.06: {(0, 1): 0.5}, 1 / 3: lambda genome: 0.6})
    genome = np.array([0, 1])
    assert [table.evaluate(genome, f).quality for f in (1.0, 12 / 200, 3**-1)] == [0.75, 0.5, 0.6]
    assert table.evaluate(genome, 0.5).reason == "there is no table for fidelity 0.5"
    assert Lookup({(0, 1): 0.75}).evaluate(genome, 0.5).failed, "a full training's quality is not a short one's"


# ---- the guard ---------------------------------------------------------------------------------------


class Scripted(Evaluator):
    def __init__(self, result: Evaluation | Exception) -> None:
        self.result = result

    def evaluate(self, genome: Genomes, fidelity: float = 1.0) -> Evaluation:
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (Evaluation(math.nan), "the quality is nan"),
        (Evaluation(math.inf), "the quality is inf"),
        (Evaluation(math.nan, reason="diverged"), "diverged"),
        (Evaluation(-math.inf, reason="diverged"), "diverged"),
        (TrainingError("Out of time.", remedy="wait"), "Out of time."),
        (NasError("Found this.", expected="that"), "Found this."),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
        (MemoryError(), "MemoryError: "),
    ],
)
def test_whatever_goes_wrong_is_a_reason(result: Evaluation | Exception, reason: str) -> None:
    found = guarded(Scripted(result), PLAIN)
    assert found.failed
    assert found.reason == reason
    assert math.isnan(found.quality)
    assert found.seconds >= 0


def test_the_guard_lets_quality_and_interruption_through() -> None:
    found = guarded(Scripted(Evaluation(0.5, {"accuracy": 0.5}, seconds=-1.0)), PLAIN)
    assert (found.quality, found.metrics, found.reason) == (0.5, {"accuracy": 0.5}, "")
    assert found.seconds >= 0

    class Interrupted(Evaluator):
        def evaluate(self, genome: Genomes, fidelity: float = 1.0) -> Evaluation:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guarded(Interrupted(), PLAIN)


# ---- lessons and training ----------------------------------------------------------------------------


def test_lessons(task: Task) -> None:
    x, y = task.split("train")
    teacher = TinyModel(task.info, 8, None)
    lessons = Lessons.prepare(task, teacher, views=3, seed=1)
    assert lessons.x.shape == (3, *x.shape)
    assert torch.equal(lessons.x[0], x)
    assert torch.equal(lessons.y, y)
    assert lessons.teacher is not None
    np.testing.assert_array_equal(lessons.teacher[2].numpy(), predict(teacher, lessons.x[2]))
    assert Lessons.prepare(task, None, views=1, seed=1).teacher is None
    assert task.test_reads == 0


def test_predictions_do_not_depend_on_the_batch(task: Task) -> None:
    model = TinyModel(task.info, 8, None).train()
    x, _ = task.split("valid")
    np.testing.assert_allclose(predict(model, x, batch=7), predict(model, x), atol=1e-5)
    assert not model.training


def test_training_learns(task: Task) -> None:
    lessons = Lessons.prepare(task, None, views=1, seed=0)
    torch.manual_seed(0)
    model = train(TinyModel(task.info, 16, 3), task, lessons, Training(), replace(RECIPE, epochs=12), seed=0)
    x, y = task.split("valid")
    assert task.evaluate(predict(model, x), y.numpy())["accuracy"] > 0.6


def test_the_compressed_candidate_is_what_is_judged(distil: Distil) -> None:
    model = distil.fit(EVERYTHING, RECIPE)
    stem = model.get_submodule("stem.conv")
    assert isinstance(stem, QuantConv2d)
    assert stem.out_channels == 8  # of 16: pruned for good
    assert not model.training
    x, y = distil.task.split("valid")
    wanted = distil.task.evaluate(predict(model, x), y.numpy())
    found = distil.evaluate(EVERYTHING)
    assert found.metrics == wanted
    assert found.quality == wanted[distil.task.metric]


def test_state_of_a_candidate_fits_its_skeleton(distil: Distil) -> None:
    model = distil.fit(EVERYTHING, RECIPE)
    empty = skeleton(distil.space, distil.space.decode(EVERYTHING), distil.lessons.x[0, :8])
    empty.load_state_dict(model.state_dict())
    x, _ = distil.task.split("valid")
    np.testing.assert_allclose(predict(empty, x), predict(model, x), atol=1e-5)


def test_a_candidate_has_one_seed_and_others_have_theirs(distil: Distil) -> None:
    space = distil.space
    dormant_twin = PLAIN.copy()
    dormant_twin[[2, 7]] = 1
    assert candidate_seed(space, PLAIN, 3) == candidate_seed(space, dormant_twin, 3)
    assert distil.evaluate(PLAIN) == distil.evaluate(dormant_twin)
    seeds = {candidate_seed(space, genome, seed) for genome in (PLAIN, EVERYTHING) for seed in (0, 1, 2)}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_the_experiments_seed_matters(distil: Distil) -> None:
    other = replace(distil, seed=4)
    first, second = (torch.cat([p.flatten() for p in d.fit(PLAIN, RECIPE).parameters()]) for d in (distil, other))
    assert not torch.equal(first, second)


def test_fidelity_shortens_the_training(distil: Distil, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps of an optimiser are the cost; each phase of the training gets its share."""
    steps: list[list[float]] = []

    class Counted(torch.optim.AdamW):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            steps.append([])

        def step(self, *args: Any, **settings: Any) -> Any:
            steps[-1].append(self.param_groups[0]["lr"])
            return super().step(*args, **settings)

    monkeypatch.setattr(torch.optim, "AdamW", Counted)
    one = replace(distil, recipe=replace(RECIPE, epochs=10, compressed_epochs=3))
    found = [one.evaluate(EVERYTHING, fidelity) for fidelity in (1.0, 0.5, 1 / 9, 1e-3)]
    lengths = np.array([len(phase) for phase in steps]).reshape(4, 2)
    per_epoch = lengths[0].sum() / 10
    np.testing.assert_array_equal(lengths[0], [7 * per_epoch, 3 * per_epoch])
    np.testing.assert_array_equal(lengths[1], np.round(lengths[0] / 2))
    np.testing.assert_array_equal(lengths[2], np.round(lengths[0] / 9))
    np.testing.assert_array_equal(lengths[3], [1, 1])
    # The schedule is whole, whatever its length: up, then down to nearly nothing.
    assert steps[4][-1] < 0.2 * max(steps[4])
    assert len({one.quality for one in found}) > 1


def test_evaluating_leaves_the_global_generator_alone(distil: Distil) -> None:
    torch.manual_seed(11)
    wanted = torch.rand(3)
    torch.manual_seed(11)
    distil.evaluate(PLAIN)
    assert torch.equal(torch.rand(3), wanted)
    assert distil.task.test_reads == 0


def test_a_loss_that_is_not_finite(task: Task) -> None:
    lessons = Lessons.prepare(task, None, views=1, seed=0)
    poisoned = replace(lessons, x=lessons.x.clone().index_fill_(1, torch.tensor([5]), math.nan))
    with pytest.raises(TrainingError, match=r"The loss became nan in epoch 1") as caught:
        train(TinyModel(task.info, 8, None), task, poisoned, Training(), RECIPE, seed=0)
    assert "training.lr" in caught.value.remedy


def test_running_out_of_time(task: Task) -> None:
    lessons = Lessons.prepare(task, None, views=1, seed=0)
    with pytest.raises(TrainingError, match=r"Out of time in epoch 1 after 0 s"):
        train(TinyModel(task.info, 8, None), task, lessons, Training(), replace(RECIPE, seconds=0.0), seed=0)


def test_a_training_that_fails_costs_one_candidate(distil: Distil) -> None:
    found = guarded(replace(distil, recipe=replace(RECIPE, seconds=0.0)), PLAIN)
    assert found.failed
    assert found.reason.startswith("Out of time in epoch 1")


def test_the_learning_rate_warms_up_and_cools_down() -> None:
    assert _one_cycle(0.0) == pytest.approx(0.1)
    assert _one_cycle(0.0999) == pytest.approx(1.0, abs=0.01)
    assert _one_cycle(0.1) == pytest.approx(1.0)
    assert _one_cycle(0.55) == pytest.approx(0.505)
    assert _one_cycle(1.0) == pytest.approx(0.01)
