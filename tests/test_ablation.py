"""Joint against one after the other: phases freeze, seconds and screening are equal, points are what was measured."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import IMAGES, SMALL
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from nas.ablation import ARMS
from nas.ablation.phases import (
    Phase,
    budgets,
    can_go_on,
    lowest,
    phases_of,
    plain_genome,
    share,
    step,
    teaching_columns,
)
from nas.ablation.result import compare
from nas.ablation.search import Contest
from nas.ablation.spec import load_ablation
from nas.ablation.stats import paired
from nas.cli import main
from nas.content import load_space
from nas.controller import Budget, best
from nas.errors import ExperimentError, StudyError
from nas.evaluators import Evaluation, Evaluator
from nas.executors import Serial
from nas.latency import AdditiveEstimator
from nas.reward import Limit, violation
from nas.space import Genomes, SearchSpace
from nas.study import read_trials
from nas.testing import synthetic_table

SPACE = {
    "name": "mobilenet", "resolutions": [8], "stem": [8, 1], "widths": [[8, 16], [16, 32]], "depths": [[1, 2], [1, 2]],
    "strides": [1, 2], "kernels": [3], "expansions": [2, 4], "bits": [32, 8], "prune": [0.0, 0.5],
    "kd_weights": [0.0, 0.5], "temperatures": [2.0],
}  # fmt: skip
EXPERIMENT: dict[str, Any] = {
    **{key: value for key, value in SMALL.items() if key not in ("budget", "baselines")},
    "task": {"data": "digits", "limit": 400}, "space": SPACE, "search": {"trials": 8, "batch": 2, "workers": 0},
}  # fmt: skip


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return load_space("mobilenet", IMAGES, {key: value for key, value in SPACE.items() if key != "name"})


class MadeUp(Evaluator):
    """A quality that larger and less compressed candidates have more of; remembers what it was given."""

    def __init__(self, space: SearchSpace, seconds: float = 0.002) -> None:
        self.space, self.seconds, self.genomes = space, seconds, list[Genomes]()
        grows = ("architecture", "distillation")
        self.weights = np.array([1.0 if choice.technique in grows else -0.5 for choice in space.choices])

    def evaluate(self, genome: Genomes, fidelity: float = 1.0) -> Evaluation:
        self.genomes.append(genome.copy())
        time.sleep(self.seconds)
        return Evaluation(0.5 + 0.4 * float((genome * self.weights).mean()))


def contest(tmp_path: Path, within: float = 0.6, **changes: Any) -> tuple[Contest, MadeUp]:
    """A contest with made-up prices and qualities, of whose candidates a share ``within`` meets the target.

    The target is a quarter of what the teacher takes.
    """
    from nas.job import Job

    job = Job(load_ablation({**EXPERIMENT, **changes}).at(0, "25%"), tmp_path)
    table = synthetic_table(job.space)
    evaluator = MadeUp(job.space)
    estimator = AdditiveEstimator(job.space, table)
    prices = estimator.price(job.space.sample(np.random.default_rng(0), 5_000))
    screened = 1 - table.errors["latency_ms"].mape
    whole = dict(zip(estimator.costs[:3], 4 * np.quantile(prices[:, :3], within, axis=0) / screened, strict=True))
    return Contest(job, table, {}, Serial(evaluator), whole), evaluator


# ---- the phases -----------------------------------------------------------------------------------------


def test_the_phases_of_a_space_part_its_choices_by_technique(space: SearchSpace) -> None:
    found = phases_of(space)
    assert [phase.name for phase in found] == ["architecture", "pruning", "quantization"]
    names = [{space.choices[i].name.rpartition(".")[2] for i in phase.columns} for phase in found]
    assert names == [{"depth", "width", "expand"}, {"prune"}, {"bits"}]
    assert {space.choices[i].name for i in teaching_columns(space)} == {"kd_weight", "temperature"}
    assert found[1].bits == 2.0
    assert phases_of(space, {("stage0.prune", 0.5)})[1].bits == 1.0, "what pays nowhere does not count"
    plain = space.decode(plain_genome(space))
    assert {plain[f"stage{s}.bits"] for s in (0, 1)} == {32}
    assert {plain[f"stage{s}.prune"] for s in (0, 1)} == {0.0}


def test_a_space_without_compression_has_no_order_to_search_in() -> None:
    plain = load_space("mobilenet", IMAGES, {"resolutions": [8], "bits": [32], "prune": [0.0]})
    with pytest.raises(ExperimentError, match="only architecture to choose from"):
        phases_of(plain)
    without = load_space("mobilenet", IMAGES, {"resolutions": [8], "bits": [32], "prune": [0.25, 0.5]})
    with pytest.raises(ExperimentError, match=r"'stage0.prune' has no plain value"):
        phases_of(without)


def test_the_lowest_cost_is_that_of_looking_through_everything(space: SearchSpace) -> None:
    estimator = AdditiveEstimator(space, synthetic_table(space, 3))
    genome = space.encode(space.ladder()[-1])
    columns = phases_of(space)[0].columns
    sizes = tuple(space.cardinalities[list(columns)].tolist())
    rows = np.tile(genome, (math.prod(sizes), 1))
    rows[:, list(columns)] = np.indices(sizes).reshape(len(sizes), -1).T
    assert lowest(estimator, space, genome, columns, "latency_ms") == pytest.approx(estimator.price(rows)[:, 0].min())


def test_every_phase_goes_the_same_share_of_the_way_that_is_open_to_it() -> None:
    # Three techniques that can save 8 ×, 2 × and 4 ×; 8 × is a half of 64 × on a logarithmic scale.
    reached, now = [], 1.0
    for after, finally_ in ((1 / 8, 1 / 64), (1 / 2, 1 / 8), (1 / 4, 1 / 4)):
        now = step(1 / 8, now, now * after, now * finally_)
        reached.append(now)
    assert reached == pytest.approx([8**-0.5, 8**-0.5 * 2**-0.5, 1 / 8])


@pytest.mark.parametrize(
    ("start", "after", "finally_", "expected"),
    [
        (1.0, 0.5, 0.4, 2.0),  # the start meets the limit
        (4.0, 3.0, 4.0, 2.0),  # nothing can be saved: the limit, which the phase will fail
        (4.0, 3.0, 2.5, 3.0),  # the limit is out of reach: all that can be done
        (4.0, 1.0, 1.0, 2.0),  # the last phase ends at the limit
    ],
)
def test_the_ends_of_a_step(start: float, after: float, finally_: float, expected: float) -> None:
    assert step(2.0, start, after, finally_) == pytest.approx(expected)


def test_budgets_fall_from_the_teacher_to_the_target_and_can_be_met(space: SearchSpace) -> None:
    estimator = AdditiveEstimator(space, synthetic_table(space))
    genome, phases = plain_genome(space), phases_of(space)
    start = dict(zip(estimator.costs, 3 * estimator.price(space.encode(space.ladder()[-1]))[0], strict=True))
    limits = (Limit("latency_ms", 0.27 * start["latency_ms"]), Limit("size_bytes", 0.2 * start["size_bytes"]))
    margins = {"latency_ms": 0.1, "size_bytes": 0.0}
    first = budgets(limits, margins, start, estimator, space, genome, phases)
    for limit, end in zip(first, limits, strict=True):
        assert end.limit < limit.limit < start[limit.cost]
        cheapest = lowest(estimator, space, genome, phases[0].columns, limit.cost)
        assert cheapest <= limit.limit * (1 - margins[limit.cost])
    assert budgets(limits, margins, start, estimator, space, genome, phases[-1:]) == limits
    assert can_go_on(limits, estimator, space, genome, phases)
    assert not can_go_on((Limit("latency_ms", 1e-9),), estimator, space, genome, phases)


def test_seconds_are_shared_by_bits_and_what_cannot_be_used_goes_to_the_others() -> None:
    phases = [Phase("architecture", (0,), 6.0), Phase("pruning", (1,), 3.0), Phase("quantization", (2,), 1.0)]
    assert share(100.0, phases, None, 0.0) == pytest.approx(60.0)
    assert share(100.0, phases[2:], None, 0.0) == pytest.approx(100.0)
    assert share(100.0, [Phase("quantization", (2,), 0.0)], 2.0, 0.0) == pytest.approx(100.0)
    # Two candidates of 2 s each are all that the last can train, eight all of the second.
    assert share(100.0, phases, 2.0, 0.0) == pytest.approx(100 - 16 - 4)
    assert share(100.0, phases[1:], 2.0, 0.0) == pytest.approx(16.0)
    assert share(100.0, phases, 2.0, 2.0) == pytest.approx(60.0), "with the distillation's there are enough for all"


# ---- the searches ---------------------------------------------------------------------------------------


def test_a_phase_changes_its_own_choices_and_those_of_the_distillation_only(tmp_path: Path) -> None:
    held, evaluator = contest(tmp_path)
    space = held.job.space
    found = held.search("sequential", 0.2, 0.003)
    assert not found.reason
    assert [phase["name"] for phase in found.phases] == ["architecture", "pruning", "quantization"]
    genome, first = plain_genome(space), 0
    for phase, entry in zip(phases_of(space), found.phases, strict=True):
        trained = np.array(evaluator.genomes[first : first + entry["evaluations"]]).reshape(-1, len(genome))
        first += entry["evaluations"]
        fixed = [i for i in range(len(space.choices)) if i not in {*phase.columns, *teaching_columns(space)}]
        assert (trained[:, fixed] == genome[fixed]).all()
        assert np.array_equal(space.encode(entry["best"])[fixed], genome[fixed])
        genome = space.encode(entry["best"])
        assert set(entry["free"]) == {space.choices[i].name for i in {*phase.columns, *teaching_columns(space)}}
    assert first == len(evaluator.genomes) == found.evaluations
    assert sum(entry["evaluations"] > 0 for entry in found.phases) > 1
    ids = space.canonical_ids(np.array(evaluator.genomes))
    assert len(set(ids)) == len(ids), "nothing is trained twice, whatever the phase"


def test_the_best_of_a_phase_goes_on_and_is_not_trained_again(tmp_path: Path) -> None:
    held, evaluator = contest(tmp_path)
    found = held.search("sequential", 0.2, 0.003)
    names = [f"sequential-{i + 1}-{phase['name']}" for i, phase in enumerate(found.phases)]
    before, carried = None, 0
    for name, entry in zip(names, found.phases, strict=True):
        trials = read_trials(tmp_path / "study.jsonl", name)
        if before is not None:
            again = [(trial, params) for trial, params in trials if trial.source == "enqueued"]
            for trial, params in again:  # unless it breaks this phase's budget
                assert trial.seconds < evaluator.seconds
                carried += 1
                assert params == {choice: before[choice] for choice in entry["free"]}
        rewards = [trial.reward for trial, _ in trials if trial.status == "complete"]
        chosen = [p for t, p in trials if t.reward == max(rewards)]
        assert {choice: entry["best"][choice] for choice in entry["free"]} in chosen
        before = entry["best"]
    assert carried, "some best one met the next phase's budget"


def test_all_arms_are_screened_alike(tmp_path: Path) -> None:
    held, _ = contest(tmp_path)
    for arm in ARMS:
        found = held.search(arm, 0.1, 0.003)
        genomes = np.array([trial.genome for trial in found.trials])
        assert len(genomes), arm
        costs = held.estimator.price(genomes)
        assert (violation(costs, held.estimator.costs, held.screen) == 0).all(), arm
        assert len(genomes[0]) == len(held.job.space.choices)
    margin = held.table.errors["latency_ms"].mape
    assert held.screen[0].limit == pytest.approx(held.limits[0].limit * (1 - margin))


def test_arms_stop_when_their_seconds_are_spent(tmp_path: Path) -> None:
    held, _ = contest(tmp_path)
    joint = held.search("joint", None, None)
    assert joint.evaluations == 8
    assert joint.train_seconds == pytest.approx(math.fsum(trial.seconds for trial in joint.trials))
    random = held.search("random", joint.train_seconds, joint.train_seconds / 8)
    last = [trial.seconds for trial in random.trials[-held.job.experiment.search.batch :]]
    assert random.train_seconds - sum(last) < joint.train_seconds, "the last batch was asked for while there was time"
    mean = random.train_seconds / random.evaluations
    assert random.train_seconds > joint.train_seconds - mean


def test_seconds_of_a_search_are_kept_over_a_resume(tmp_path: Path) -> None:
    first = contest(tmp_path)[0].run("random", Budget(sys.maxsize, training=0.04), random=True)
    held, evaluator = contest(tmp_path)
    again = held.run("random", Budget(sys.maxsize, training=0.04), random=True)
    assert again == first
    assert evaluator.genomes == []
    held, evaluator = contest(tmp_path)
    longer = math.fsum(trial.seconds for trial in first) + 0.05  # however long a busy machine slept
    more = held.run("random", Budget(sys.maxsize, training=longer), random=True)
    assert more[: len(first)] == first
    assert len(evaluator.genomes) == len(more) - len(first) > 0


def test_uniform_members_come_slowest_first_and_as_they_are(tmp_path: Path) -> None:
    held, evaluator = contest(tmp_path, within=0.9)
    found = held.search("uniform", 10.0, None)
    space = held.job.space
    members = {tuple(space.encode(member)) for member in space.uniform()}
    assert {tuple(genome.tolist()) for genome in evaluator.genomes} <= members
    prices = held.estimator.price(np.array(evaluator.genomes))[:, 0]
    assert (np.diff(prices) <= 0).all()
    everything = np.array(sorted(members))
    feasible = violation(held.estimator.price(everything), held.estimator.costs, held.screen) == 0
    assert found.evaluations == len(set(space.canonical_ids(everything[feasible]))) > 1


def test_a_small_phase_ends_when_everything_was_tried(tmp_path: Path) -> None:
    held, _ = contest(tmp_path, strategy={"kind": "random"})
    found = held.search("sequential", 30.0, None)
    combinations = [2 ** (phase.bits + 1) for phase in phases_of(held.job.space)]
    assert all(entry["evaluations"] <= n for entry, n in zip(found.phases, combinations, strict=True))
    assert found.train_seconds < 30.0


@pytest.mark.parametrize("arm", ARMS)
def test_a_point_that_cannot_be_reached_is_missing_and_said(tmp_path: Path, arm: str) -> None:
    held, _ = contest(tmp_path)
    held.whole = {cost: value / 10 for cost, value in held.whole.items()}
    found = held.search(arm, 0.1, 0.003)
    assert best(found.trials, 1) == []
    assert found.reason


# ---- the statistics -------------------------------------------------------------------------------------


def test_the_interval_is_that_of_the_paired_t_statistic() -> None:
    joint, other = [0.90, 0.92, 0.88], [0.87, 0.90, 0.87]
    found = paired(joint, other)
    assert found is not None
    d = np.array(joint) - np.array(other)
    table_t = 4.302653  # t(0.975, 2) of any printed table
    assert found.mean == pytest.approx(d.mean())
    assert found.half == pytest.approx(table_t * d.std(ddof=1) / np.sqrt(3), rel=1e-6)
    assert not found.clear
    five = paired([1.0, 1.1, 1.2, 1.3, 1.4], [0.0, 0.0, 0.1, 0.1, 0.2])
    assert five is not None
    assert five.half == pytest.approx(2.776445 * np.std([1.0, 1.1, 1.1, 1.2, 1.2], ddof=1) / np.sqrt(5), rel=1e-6)
    assert five.clear


def test_one_pair_has_no_interval_and_no_pair_no_difference() -> None:
    one = paired([0.5], [0.25])
    assert one is not None
    assert (one.mean, one.half, one.n, one.clear) == (0.25, None, 1, False)
    assert paired([], []) is None


def test_only_seeds_with_both_points_are_compared() -> None:
    def rows(qualities: dict[int, float]) -> list[dict[str, Any]]:
        common = {
            "target": "50%", "latency_ms": 1.0, "target_ms": 2.0, "size_bytes": 10, "train_seconds": 3.0,
            "evaluations": 4, "feasible": True,
        }  # fmt: skip
        return [
            {"seed": seed, "points": [{**common, "quality": qualities[seed]}] if seed in qualities else []}
            for seed in (0, 1, 2)
        ]

    result = {"targets": ["50%"], "arms": {
        "joint": rows({0: 0.9, 1: 0.8, 2: 0.7}), "sequential": rows({0: 0.8, 2: 0.5}), "uniform": rows({}),
    }}  # fmt: skip
    joint, sequential, uniform = compare(result)
    assert joint["difference"] is None
    assert joint["quality"] == pytest.approx(0.8)
    assert (sequential["pairs"], sequential["seeds"]) == (2, 2)
    assert sequential["difference"] == pytest.approx(15.0)
    assert (uniform["quality"], uniform["difference"], uniform["pairs"]) == (None, None, 0)


# ---- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arms": "joint,serial"}, "Unknown arm 'serial'"),
        ({"arms": "joint,joint"}, "twice"),
        ({"arms": "sequential,random"}, "--arms leaves it out"),
        ({"targets": "50%,120%"}, "slower than the teacher"),
        ({"targets": "0%"}, "--targets '0%'"),
        ({"targets": "-3"}, "--targets '-3'"),
        ({"targets": "fast"}, "--targets 'fast'"),
        ({"targets": "50%,"}, "commas"),
        ({"seeds": "0,x"}, "--seeds 'x'"),
        ({"seeds": "-1"}, "--seeds '-1'"),
        ({"seconds": 0.0}, "--seconds 0"),
    ],
)
def test_options_that_are_wrong_are_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ExperimentError) as error:
        load_ablation(EXPERIMENT, **options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("search.enqueue=[{stage0.depth: 1}]", "search.enqueue"),
        ("search.earlier=[runs/digits]", "search.earlier"),
        ("search.seconds=60", "search.seconds"),
        ("reward.target=1.0", "reward.target"),
        ("budget.percentile=p95", "budget.percentile"),
    ],
)
def test_what_would_favour_an_arm_is_refused(override: str, message: str) -> None:
    with pytest.raises(ExperimentError) as error:
        load_ablation(EXPERIMENT, [override])
    assert message in str(error.value)


def test_an_experiment_without_a_device_is_refused() -> None:
    with pytest.raises(ExperimentError, match="no device"):
        load_ablation("nb201")


def test_targets_may_be_shares_or_milliseconds_and_seconds_replace_the_joint_arm() -> None:
    found = load_ablation(EXPERIMENT, targets="50%, 2.5", arms="random", seconds=3.0, seeds="4,2")
    assert found.targets == ("50%", 2.5)
    assert found.seeds == (4, 2)
    assert found.at(4, 2.5).budget.latency == 2.5
    assert found.at(4, "50%").seed == 4


# ---- a whole one, with real files -----------------------------------------------------------------------

TEACHER = '''
from torch import nn


def build() -> nn.Module:
    """Wide enough to be slower than anything in the space."""
    return nn.Sequential(
        nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(),
        nn.Conv2d(128, 64, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10),
    )
'''


def nas(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "NAS_CACHE_DIR": str(folder / "cache"), "COLUMNS": "100"}
    command = [sys.executable, "-m", "nas", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained teacher of one's own, and an experiment."""
    folder = tmp_path_factory.mktemp("ablation")
    (folder / "slow_teacher.py").write_text(TEACHER)
    scope: dict[str, Any] = {}
    exec(TEACHER, scope)
    torch.manual_seed(0)
    model, digits = scope["build"](), load_digits()
    x, y = torch.from_numpy(digits.images.astype(np.float32))[:600, None], torch.from_numpy(digits.target)[:600]
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(15):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    save_file(model.state_dict(), folder / "slow.safetensors")
    experiment = {
        **EXPERIMENT, "teacher": {"model": "slow_teacher:build", "weights": "slow.safetensors"},
        "search": {"trials": 5, "batch": 2, "workers": 1},
    }  # fmt: skip
    (folder / "small.json").write_text(json.dumps(experiment))
    return folder


def records(folder: Path) -> dict[str, list[str]]:
    """Study → its trials as they stand in the journal, clock and all."""
    journal = folder / "runs" / "seed0-60pct" / "study.jsonl"
    phases = ("sequential-1-architecture", "sequential-2-pruning", "sequential-3-quantization")
    found = {}
    for name in ("joint", *phases, "uniform", "random"):
        try:
            found[name] = [repr(trial) for trial, _ in read_trials(journal, name)]
        except StudyError:
            continue
    return found


@pytest.mark.slow
def test_an_ablation_is_killed_resumed_and_finished(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = prepared / "out"
    asked = ("ablate", "small.json", "--seeds", "0", "--targets", "60%", "--out", "out")
    process = nas(prepared, *asked)
    journal, end = folder / "runs" / "seed0-60pct" / "study.jsonl", time.monotonic() + 300
    while process.poll() is None and time.monotonic() < end:
        if journal.exists() and journal.read_bytes().count(b"\n") >= 10:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    before = records(folder)
    assert sum(map(len, before.values())) > 3, "it was killed in the middle"

    refused = nas(prepared, *asked)
    assert "--resume" in refused.communicate()[1]
    assert refused.returncode == 2
    other = nas(prepared, *asked, "--resume", "--arms", "joint,random")
    assert "arms changed" in other.communicate()[1]

    again = nas(prepared, *asked, "--resume")
    said, errors = again.communicate(timeout=500)
    assert again.returncode == 0, errors
    after = records(folder)
    assert all(after[name][: len(trials)] == trials for name, trials in before.items()), "finished trainings stand"

    result = json.loads((folder / "ablation.json").read_text())
    _check_result(result, folder)
    assert "joint" in said
    assert "sequential" in said
    page = (folder / "ablation.html").read_text()
    assert "Joint against the others" in page
    assert "figure-0" in page
    assert "https://" not in page.partition("<body>")[2].partition("<script")[0]

    # Nothing is left to do: a further resume trains and measures nothing, and a report writes the page again.
    contests = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/contest.json")}
    (folder / "ablation.html").unlink()
    done = nas(prepared, *asked, "--resume")
    done.communicate(timeout=200)
    assert done.returncode == 0
    assert {path: path.stat().st_mtime_ns for path in contests} == contests
    (folder / "ablation.html").unlink()
    assert main(["report", str(folder)]) == 0
    assert (folder / "ablation.html").exists()
    assert "sequential" in capsys.readouterr().out


def _check_result(result: dict[str, Any], folder: Path) -> None:
    assert {"latency_ms", "quality", "size_bytes"} <= set(result["teacher"])
    assert set(result["arms"]) == set(ARMS)
    assert result["teacher"]["size_bytes"] == (folder / "runs" / "seed0" / "teacher.onnx").stat().st_size
    for arm, rows in result["arms"].items():
        (row,) = rows
        assert {"seed", "evaluations", "train_seconds", "points"} <= set(row)
        assert row["seed"] == 0
        for point in row["points"]:
            assert {"target_ms", "latency_ms", "quality", "size_bytes"} <= set(point)
            assert point["target_ms"] == pytest.approx(0.6 * result["teacher"]["latency_ms"])
            model = folder / "runs" / "seed0-60pct" / "finalists" / point["name"] / "model.onnx"
            assert point["size_bytes"] == model.stat().st_size
            assert point["feasible"] == (point["latency_ms"] <= point["target_ms"])
            assert 0.0 <= point["quality"] <= 1.0
        assert row["points"] or any(arm in warning for warning in result["warnings"])
    assert result["arms"]["joint"][0]["evaluations"] == 5
    # Random search goes on to within a training of what the joint search took, or beyond by what a batch took.
    journal = folder / "runs" / "seed0-60pct" / "study.jsonl"
    seconds = [trial.seconds for trial, _ in read_trials(journal, "random")]
    spent, joint = sum(seconds), result["arms"]["joint"][0]["train_seconds"]
    assert spent > joint - max(seconds)
    assert spent - sum(seconds[-2:]) < joint
    assert [(row["target"], row["arm"]) for row in result["comparison"]] == [("60%", arm) for arm in ARMS]


@pytest.mark.slow
def test_a_target_that_nothing_meets_is_said_before_anything_is_trained(prepared: Path) -> None:
    process = nas(prepared, "ablate", "small.json", "--seeds", "0", "--targets", "50%,0.01%", "--out", "none")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "Target 0.01%" in errors
    assert "--targets" in errors
    assert not list((prepared / "none").rglob("study.jsonl"))


@pytest.mark.slow
def test_a_dry_run_says_what_would_be_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "small.json"
    file.write_text(json.dumps(EXPERIMENT))
    assert main(["ablate", str(file), "--dry-run", "--seeds", "0,1", "--targets", "50%,25%,12.5%"]) == 0
    said = capsys.readouterr().out
    assert "24 searches" in said
    assert "architecture (6 choices), then pruning (2 choices), then quantization (2 choices)" in said
