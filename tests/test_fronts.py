"""Fronts from a run's record: any reward, any limits, while the search goes on, and nothing in the run changes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers import SMALL

from nas.cli import main
from nas.content import load_space
from nas.controller import Budget, SearchController
from nas.errors import ContentError, ExperimentError, NasError, RewardError, StudyError
from nas.evaluators import Lookup
from nas.executors import Serial
from nas.experiment import load_experiment
from nas.fronts import Front, Point, run_front
from nas.job import Job, teacher_costs
from nas.latency import AdditiveEstimator, SeveralDevices
from nas.reward import MnasNetHard, TuNASAbsolute, hypervolume, violation
from nas.space import Genomes, TaskInfo
from nas.strategies import Domain, RandomSearch
from nas.study import Study, Trial, read_trials
from nas.testing import synthetic_table

TEACHER_MS, LIMIT_MS, PIXEL_MS = 0.07, 0.028, 0.023
EXPERIMENT = {
    **SMALL,
    "table": {"others": {"pixel": "pixel.json"}},
    "reward": {"kind": "mnasnet_soft", "w": -0.2},
    "budget": {"latency": f"{100 * LIMIT_MS / TEACHER_MS:g}%"},
}


def quality(genome: Genomes) -> float:
    """A made-up accuracy: larger is better, int8 costs a little, and some candidates fail."""
    if genome.sum() % 5 == 0:
        return float("nan")
    return 0.3 + 0.6 * float(genome.mean()) - 0.05 * float(genome[3])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as a search leaves it before its finalists: 40 candidates of the bundled space, two devices."""
    folder = tmp_path_factory.mktemp("fronts") / "run"
    folder.mkdir()
    experiment = load_experiment(EXPERIMENT)
    (folder / "experiment.yaml").write_text(yaml.safe_dump(experiment.plain()))
    (folder / "teacher.onnx").write_bytes(b"\0" * 5000)
    timing = {"p50": TEACHER_MS, "p95": 0.08, "mean": 0.07, "n": 100, "noise": 0.01}
    (folder / "teacher_latency.json").write_text(json.dumps(timing))
    space = load_space("mobilenet", TaskInfo((1, 8, 8), 10), experiment.space.settings)
    estimator = SeveralDevices(
        AdditiveEstimator(space, synthetic_table(space, 0), ("latency_ms", "latency_p95_ms", "size_bytes")),
        {"pixel": AdditiveEstimator(space, synthetic_table(space, 1), ("latency_ms", "latency_p95_ms"))},
    )
    job = Job(experiment, folder)
    whole = teacher_costs(folder)
    ordered = np.array([choice.ordered for choice in space.choices])
    with Serial(Lookup(quality)) as executor:
        SearchController(
            space, RandomSearch(Domain(space.cardinalities, ordered, space.active), 0), estimator, executor,
            job.reward(job.limits(whole), whole), (), Study(folder / "study.jsonl", "search", space, {}), Budget(40),
        ).run()  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def trials(run: Path) -> list[Trial]:
    """The evaluated ones."""
    found = [trial for trial, _ in read_trials(run / "study.jsonl", "search")]
    assert {trial.status for trial in found} == {"complete", "failed"}
    return [trial for trial in found if trial.status == "complete"]


def by_hand(trials: list[Trial], *costs: str) -> set[int]:
    """Indices of the trials that no other beats."""
    points = {t.index: (-t.quality, *(t.costs[cost] for cost in costs)) for t in trials}
    return {
        i for i, p in points.items()
        if not any(q != p and all(a <= b for a, b in zip(q, p, strict=True)) for q in points.values())
    }  # fmt: skip


def test_the_runs_own_reward_is_that_of_its_record(run: Path, trials: list[Trial]) -> None:
    front = run_front(run)
    assert front.costs == ("latency_ms",)
    assert {point.index for point in front.points} == by_hand(trials, "latency_ms")
    assert (front.evaluated, front.failed) == (40, 40 - len(trials))
    recorded = {trial.index: trial for trial in trials}
    for point in front.points:
        assert point.reward == recorded[point.index].reward
        assert point.quality == recorded[point.index].quality
        assert point.costs == recorded[point.index].costs
        assert set(point.candidate) == set(read_trials(run / "study.jsonl", "search")[0][1])
        assert (point.violation == 0) == (point.costs["latency_ms"] <= LIMIT_MS)
    assert front.limits == {"latency_ms": pytest.approx(LIMIT_MS)}
    assert front.reward == {"kind": "mnasnet_soft", "targets": front.limits}
    assert {point.violation == 0 for point in front.points} == {True, False}, "the front is of everything"
    within = [trial for trial in trials if trial.costs["latency_ms"] <= front.limits["latency_ms"]]
    assert front.best is not None
    assert front.best.index == max(within, key=lambda t: t.reward).index


def test_another_reward_over_the_same_record(run: Path, trials: list[Trial]) -> None:
    """The front stays; the rewards and the best candidate are the new one's."""
    own = run_front(run)
    front = run_front(run, kind="tunas_absolute", settings=["beta=-0.5", "reward.target=0.025"])
    assert [point.index for point in front.points] == [point.index for point in own.points]
    assert front.hypervolume == own.hypervolume
    reward = TuNASAbsolute(0.025, beta=-0.5)
    wanted = {t.index: float(reward(t.quality, t.costs["latency_ms"])) for t in trials}
    assert [point.reward for point in front.points] == pytest.approx([wanted[point.index] for point in front.points])
    able = [t.index for t in trials if t.costs["latency_ms"] <= LIMIT_MS]
    assert front.best is not None
    assert front.best.index == max(able, key=lambda i: wanted[i])
    assert front.reward == {"kind": "tunas_absolute", "targets": {"latency_ms": 0.025}}


def test_limits_take_the_place_of_the_runs_own(run: Path, trials: list[Trial]) -> None:
    """And a reward without a target of its own aims at them."""
    front = run_front(run, kind="mnasnet_hard", limits=["latency_ms=0.024", f"latency_ms@pixel={PIXEL_MS}"])
    assert front.limits == {"latency_ms": 0.024, "latency_ms@pixel": PIXEL_MS}
    assert front.reward["targets"] == {"latency_ms": 0.024}
    names = ("latency_ms", "latency_ms@pixel")
    limits = Job(load_experiment(EXPERIMENT), run).limits({"latency_ms": 1.0})
    assert len(limits) == 1
    able = [t for t in trials if t.costs["latency_ms"] <= 0.024 and t.costs[names[1]] <= PIXEL_MS]
    assert front.best is not None
    best = max(able, key=lambda t: float(MnasNetHard(0.024)(t.quality, t.costs["latency_ms"])))
    assert front.best.index == best.index
    for point in front.points:
        over = violation([[point.costs[name] for name in names]], names, tuple(_limits(front)))
        assert point.violation == pytest.approx(float(over[0]))
    nothing = run_front(run, limits=["latency_ms=0.0001"])
    assert nothing.best is None
    assert len(nothing.points) == len(front.points)


def _limits(front: Front) -> Iterator[Any]:
    from nas.reward import Limit

    return (Limit(cost, value) for cost, value in front.limits.items())


def test_a_product_over_several_costs_and_devices(run: Path, trials: list[Trial]) -> None:
    weights = {"latency_ms": -0.1, "size_bytes": -0.2, "latency_ms@pixel": -0.3}
    settings = [f"weights={json.dumps(weights)}", "targets={latency_ms@pixel: 0.2}"]
    front = run_front(run, kind="weighted_product", settings=settings, costs=["latency_ms@pixel", "size_bytes"])
    targets = {"latency_ms": LIMIT_MS, "size_bytes": 2500.0, "latency_ms@pixel": 0.2}
    assert front.reward["targets"] == pytest.approx(targets), "budgets, half of the teacher's, its own"
    assert {point.index for point in front.points} == by_hand(trials, "latency_ms@pixel", "size_bytes")

    def product(t: Trial | Point) -> float:
        return t.quality * float(np.prod([(t.costs[c] / targets[c]) ** w for c, w in weights.items()]))

    assert [point.reward for point in front.points] == pytest.approx([product(point) for point in front.points])
    able = [t for t in trials if t.costs["latency_ms"] <= LIMIT_MS]
    assert front.best is not None
    assert front.best.index == max(able, key=product).index
    costs = [[t.costs["latency_ms@pixel"], t.costs["size_bytes"]] for t in trials]
    highest = np.max(costs, axis=0).tolist()
    assert front.reference == {"quality": 0.0, "latency_ms@pixel": highest[0], "size_bytes": highest[1]}
    assert front.hypervolume == pytest.approx(hypervolume([t.quality for t in trials], costs, (0.0, *highest)))


def test_a_search_may_be_writing_and_nothing_is_touched(run: Path, tmp_path: Path) -> None:
    whole = run_front(run)
    live = tmp_path / "run"
    live.mkdir()
    for file in run.iterdir():
        if file.is_file():
            (live / file.name).write_bytes(file.read_bytes())
    journal = live / "study.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:22]) + lines[22][: len(lines[22]) // 2])
    before = {file.name: file.read_bytes() for file in live.iterdir()}
    partial = run_front(live)
    assert {file.name: file.read_bytes() for file in live.iterdir()} == before
    assert 0 < partial.evaluated < whole.evaluated


def test_rewards_that_are_not_defined_for_some(tmp_path: Path, run: Path) -> None:
    """A quality of −1 has no product, but it has a place on the front; where nothing has a reward, that is said."""
    from helpers import TinySpace

    for file in ("experiment.yaml", "teacher.onnx", "teacher_latency.json"):
        (tmp_path / file).write_bytes((run / file).read_bytes())
    study = Study(tmp_path / "study.jsonl", "search", TinySpace(), {})

    def trial(index: int, quality: float, ms: float) -> Trial:
        costs = {"latency_ms": ms, "latency_p95_ms": ms, "size_bytes": 100.0}
        return Trial(index, (0,) * 8, 0, "complete", costs, 0.0, quality, 0.1)

    study.add(trial(0, -1.0, 0.01))
    with pytest.raises(RewardError, match="multiplies by the quality") as caught:
        run_front(tmp_path)
    assert "tunas_absolute" in caught.value.remedy
    assert run_front(tmp_path, kind="tunas_absolute").points[0].reward is not None
    study.add(trial(1, 0.5, 0.02))
    front = run_front(tmp_path)
    assert [(p.index, p.reward is None) for p in front.points] == [(0, True), (1, False)]
    assert front.best is not None
    assert front.best.index == 1
    assert front.reference["quality"] == -1.0


# ---- the command -------------------------------------------------------------------------------------


def test_the_command_prints_a_table_or_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["front", str(run), "--reward", "mnasnet_hard", "--set", "w=-2", "--limit", "latency_ms=0.025"]
    assert main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    front = run_front(run, kind="mnasnet_hard", settings=["w=-2"], limits=["latency_ms=0.025"])
    assert told == json.loads(json.dumps(front.plain()))
    assert main(arguments) == 0
    said = capsys.readouterr().out
    for point in front.points:
        assert f"{point.quality:.4f}" in said
    assert front.best is not None
    assert f"best: {front.best.index}, reward {front.best.reward:.4f}" in said
    assert f"hypervolume {front.hypervolume:.6g}, reference point quality 0, latency_ms 0.025" in said
    assert "stage0.width=" in said


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"kind": "mnasnet"}, ContentError, r"Unknown reward 'mnasnet'[^$]*weighted_product"),
        ({"kind": "mnasnet_hard", "settings": ["v=-1"]}, ExperimentError, r"reward\.v[^$]*keys of reward: w"),
        ({"settings": ["w"]}, ExperimentError, r"key=value"),
        ({"settings": ["w=0.5"]}, RewardError, r"w ≤ 0"),
        ({"settings": ["target=0"]}, ExperimentError, r"reward\.target is 0"),
        ({"kind": "weighted_product"}, ExperimentError, r"reward\.weights is missing"),
        ({"kind": "weighted_product", "settings": ["weights.energy=-1"]}, RewardError, r"target for the cost 'energy'"),
        (
            {"kind": "weighted_product", "settings": ["weights.energy=-1", "targets.energy=2"]},
            RewardError,
            r"reads the cost 'energy'[^$]*latency_p95_ms@pixel",
        ),
        ({"limits": ["latency_ms"]}, ExperimentError, r"--limit 'latency_ms'[^$]*latency_ms=3\.0"),
        ({"limits": ["latency_ms=-1"]}, ExperimentError, r"--limit"),
        ({"limits": ["energy=1"]}, ExperimentError, r"--limit 'energy'[^$]*one of latency_ms"),
        ({"costs": ["energy"]}, ExperimentError, r"--cost 'energy'[^$]*one of latency_ms"),
        ({"arm": "random"}, StudyError, r"no trials of 'random'[^$]*one of search"),
    ],
    ids=str,
)
def test_mistakes(run: Path, settings: dict[str, Any], error: type[NasError], message: str) -> None:
    with pytest.raises(error, match=message):
        run_front(run, **settings)


def test_folders_without_a_front(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["front", str(tmp_path / "nowhere")]) == 2
    assert "holds no run" in capsys.readouterr().err
    for file in ("experiment.yaml", "teacher.onnx"):
        (tmp_path / file).write_bytes((run / file).read_bytes())
    with pytest.raises(StudyError, match="evaluated nothing yet"):
        run_front(tmp_path)
    (tmp_path / "study.jsonl").write_bytes((run / "study.jsonl").read_bytes())
    with pytest.raises(StudyError, match="teacher"):
        run_front(tmp_path)
    (tmp_path / "study.jsonl").write_text("this is no journal\n")
    with pytest.raises(StudyError, match="no trials of 'search'"):
        run_front(tmp_path)
