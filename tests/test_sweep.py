"""Sweeps: files checked at the door; trials in real processes, killed and gone on with; each done once."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import SMALL, alive, start_sweep, until

from nas import content
from nas.errors import ExperimentError, NasError, StudyError
from nas.locks import cache_lock, file_lock
from nas.sweep.experiments import ExperimentRunner, bind
from nas.sweep.page import headline, render, write_report
from nas.sweep.parameter import Parameter, combinations, text
from nas.sweep.record import Record
from nas.sweep.result import read_result
from nas.sweep.runners import FunctionRunner
from nas.sweep.samplers import check_sampler
from nas.sweep.schedule import forecast_sweep, prepare, run_sweep
from nas.sweep.spec import Sweep, load_sweep, parameters

TOY = '''
import os
import time
from pathlib import Path

from nas.errors import TrainingError


def score(values, folder):
    """A bowl over x with a better and a worse kind; waits while there is a file called hold."""
    with (folder / "attempts").open("a") as file:
        file.write(f"{os.getpid()}\\n")
    while Path("hold").exists():
        time.sleep(0.02)
    if values["kind"] == "bad":
        raise TrainingError("the kind is bad")
    if values["kind"] == "broken":
        raise ZeroDivisionError("a bug")
    if values["kind"] == "empty":
        return {"other": 1.0}
    return {"score": {"a": 0.0, "b": 1.0}[values["kind"]] - (values["x"] - 0.3) ** 2, "twice": 2 * values["x"]}


def number(values, folder):
    return values["x"]


def words(values, folder):
    return "good"
'''

VARY = {"x": {"low": 0.0, "high": 1.0}, "kind": ["a", "b"]}


def toy(**changes: Any) -> dict[str, Any]:
    whole = {"name": "toy", "function": "toy:score", "vary": VARY, "metric": "score", "trials": 6, "workers": 2}
    return {**whole, **changes}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the toy in it."""
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "toy", raising=False)
    return tmp_path


def attempts(folder: Path) -> dict[int, list[int]]:
    """Trial → the processes that worked on it."""
    found = {}
    for file in sorted((folder / "trials").glob("*/attempts")):
        found[int(file.parent.name)] = [int(line) for line in file.read_text().split()]
    return found


def start(place: Path, *arguments: str) -> subprocess.Popen[str]:
    return start_sweep(place, "toy.yaml", *arguments)


def finish(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    return said


def write(place: Path, **changes: Any) -> None:
    (place / "toy.yaml").write_text(yaml.safe_dump(toy(**changes)))


# ---- the file ---------------------------------------------------------------------------------------


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"vari": {}}, "Unknown key 'vari'"),
    ({"trials": 0}, "trials is 0"),
    ({"trials": None}, "trials or seconds"),
    ({"vary": {}}, "vary is {}"),
    ({"vary": {"x": 3}}, "x needs a list of values or a range"),
    ({"vary": {"x": []}}, "x needs a list of values or a range"),
    ({"experiment": "digits"}, "an experiment, or a function or a command instead"),
    ({"function": None}, "an experiment, or a function or a command instead"),
    ({"function": None, "experiment": "digits", "metric": "test"}, "'test' is none of reward, quality"),
    ({"direction": "up"}, "direction is 'up'"),
    ({"workers": 0}, "workers is 0"),
]


@pytest.mark.parametrize(("changes", "said"), MISTAKES, ids=[said for _, said in MISTAKES])
def test_a_mistake_in_the_file_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ExperimentError) as caught:
        load_sweep(toy(**changes))
    assert said in str(caught.value)


RANGES: list[tuple[Any, str]] = [
    ({"low": 1, "high": 1}, "low 1 must be below high 1"),
    ({"low": 2, "high": 1}, "low 2 must be below high 1"),
    ({"low": 0, "high": 1, "log": True}, "low > 0"),
    ({"low": 1, "high": 2, "log": True, "step": 1}, "no step"),
    ({"low": 0, "high": 1, "step": 0.3}, "must divide"),
    ({"low": 0, "high": 1, "step": -1}, "must divide"),
    ({"low": 0}, "'high' is missing in vary.x"),
    ({"low": 0, "high": "much"}, "high is 'much' in vary.x"),
    ({"low": 0, "high": 1, "stop": 2}, "Unknown key 'stop' in vary.x"),
    ({"low": 0, "high": float("inf")}, "below"),
    ([1, 2, 1], "each value once"),
]


@pytest.mark.parametrize(("shape", "said"), RANGES, ids=[said for _, said in RANGES])
def test_a_wrong_range_is_named(shape: Any, said: str) -> None:
    with pytest.raises(ExperimentError) as caught:
        parameters(load_sweep(toy(vary={"x": shape})))
    assert said in str(caught.value)


def one(shape: Any) -> Parameter:
    (found,) = parameters(load_sweep(toy(vary={"x": shape})))
    return found


def test_shapes_become_parameters() -> None:
    assert one({"low": "1e-4", "high": "1e-2", "log": True}).ends == (1e-4, 1e-2)
    assert one(["1e-4", 2, "evolution"]).values == (1e-4, 2, "evolution")
    assert one({"low": 4, "high": 16, "step": 4}).options == (4, 8, 12, 16)
    assert one({"low": 0, "high": 0.5, "step": 0.25}).options == (0.0, 0.25, 0.5)
    assert one({"low": 0.0, "high": 1.0}).options is None
    assert combinations([one([1, 2]), one({"low": 1, "high": 3})]) == 6
    assert one([[1, 2], {"kind": "random"}, None]).labels == ("[1, 2]", "{kind: random}", "null")
    for value in (1e-5, 0.1, 3, "on", "a: b", [0.5], {"kind": "x", "n": None}, True):
        assert yaml.safe_load(text(value)) == value, "--set reads back what it is given"


def test_overrides_and_files(place: Path) -> None:
    write(place)
    sweep = load_sweep("toy.yaml", ["trials=3", "set.training.lr=1.0e-3", "vary.x=[1, 2]"])
    assert (sweep.trials, sweep.set, sweep.vary["x"]) == (3, {"training.lr": 1e-3}, [1, 2])
    with pytest.raises(ExperimentError, match=r"set\.training\.lr"):
        load_sweep("toy.yaml", ["training.lr=1"])
    with pytest.raises(NasError, match="No sweep 'nothing'"):
        load_sweep("nothing")


@pytest.mark.parametrize("name", list(content.available("experiments/sweeps")))
def test_bundled_sweeps_are_valid_and_no_experiments(name: str) -> None:
    assert prepare(load_sweep(name), Path("nowhere")).parameters
    assert all(path.parent.name == "experiments" for path in content.available("experiments").values())


def test_an_experiment_beside_the_sweep_is_found(place: Path) -> None:
    (place / "deep").mkdir()
    (place / "deep" / "mine.yaml").write_text(yaml.safe_dump(SMALL))
    sweep = {"experiment": "mine.yaml", "vary": {"seed": [1, 2]}}
    (place / "deep" / "s.yaml").write_text(yaml.safe_dump(sweep))
    assert load_sweep("deep/s.yaml").experiment == "deep/mine.yaml"
    assert load_sweep("deep/s.yaml").name == "s"


# ---- what the experiment says about it ---------------------------------------------------------------


def experiment_sweep(vary: dict[str, Any], **changes: Any) -> Sweep:
    return load_sweep({"name": "s", "experiment": SMALL, "vary": vary, **changes})


def bound(vary: dict[str, Any], **changes: Any) -> tuple[ExperimentRunner, dict[str, Parameter]]:
    sweep = experiment_sweep(vary, **changes)
    runner, found = bind(sweep, parameters(sweep))
    return runner, {p.key: p for p in found}


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"training.lrr": [1, 2]}, r"vary.training.lrr, value 1: Unknown key 'training.lrr'"),
    ({"trainin.lr": [1, 2]}, "Unknown key 'trainin'"),
    ({"training.lr": [0.1, -1]}, "vary.training.lr, value -1: training.lr is -1"),
    ({"training.lr": {"low": -1, "high": 1}}, "value -1"),
    ({"training.epochs": {"low": 1.5, "high": 4.5}}, "value 1.5"),
    ({"strategy.kind": ["evolution", "annealing"]}, "vary.strategy.kind, value annealing: Unknown strategy"),
    ({"strategy.populatio": [2, 3]}, "Unknown key strategy.populatio"),
    ({"strategy.kind": ["evolution", "random"], "strategy.momentum": [0.5]}, "none of evolution, random has this key"),
    ({"strategy.population": [1, 2]}, "value 1: strategy: sample 2, population 1"),
    ({"space.widths": [[[8], [16]], [[9], [16]]]}, "multiples of 8"),
    ({"space.kd_weights": ["heavy"]}, "space.kd_weights"),
    ({"task.valid": [0.2, 2.0]}, "task.valid"),
    ({"reward.w": {"low": -0.1, "high": 0.1}}, "value 0.1"),
    ({"task.data": ["digits", "gone.npz"]}, "gone.npz"),
    ({"training.epochs": [1, 2], "training.compressed_epochs": [4]}, "compressed_epochs 4 exceeds epochs"),
]


@pytest.mark.parametrize(("vary", "said"), WRONG, ids=[said for _, said in WRONG])
def test_what_the_experiment_refuses_is_said_before_anything_runs(vary: dict[str, Any], said: str) -> None:
    with pytest.raises(NasError) as caught:
        bound(vary)
    assert said in str(caught.value)
    assert "vary." in str(caught.value)


def test_a_wrong_experiment_is_named() -> None:
    with pytest.raises(NasError, match="traininng"):
        bound({"seed": [1]}, set={"traininng.lr": 1})


def test_ranges_are_as_whole_as_the_key() -> None:
    runner, found = bound(
        {
            "training.epochs": {"low": 1, "high": 4}, "training.weight_decay": {"low": 0, "high": 1},
            "strategy.population": {"low": 2, "high": 8}, "space.kd_weights": {"low": 0, "high": 1},
            "training.lr": {"low": "1e-4", "high": "1e-2", "log": True},
        }
    )  # fmt: skip
    whole = {key for key, p in found.items() if p.whole}
    assert whole == {"training.epochs", "strategy.population"}
    assert found["space.kd_weights"].wrapped
    assert runner.settle({"space.kd_weights": 0.25}) == {"space.kd_weights": [0.25]}
    assert found["training.epochs"].value(3) == 3


def test_values_that_only_fit_together_are_tried_together() -> None:
    """Four compressed epochs exceed the experiment's three epochs, but not what is varied with them."""
    _, found = bound({"training.epochs": {"low": 2, "high": 8}, "training.compressed_epochs": {"low": 1, "high": 4}})
    assert all(p.whole for p in found.values())


def test_keys_of_a_plugin_that_was_not_chosen_are_left_out() -> None:
    vary = {"strategy.kind": ["evolution", "reinforce"], "strategy.population": [2, 4], "strategy.lr": [0.1]}
    runner, found = bound(vary)
    values = {"strategy.kind": "reinforce", "strategy.population": 2, "strategy.lr": 0.1}
    settled = runner.settle({p.key: p.value(text(values[p.key])) for p in found.values()})
    assert settled == {"strategy.kind": "reinforce", "strategy.lr": 0.1}
    assert runner.experiment(settled).strategy.settings == {"lr": 0.1}
    evolution = runner.settle({**values, "strategy.kind": "evolution"})
    assert runner.experiment(evolution).strategy.settings == {"population": 2, "sample": 2}


def test_a_section_may_be_varied_whole() -> None:
    runner, found = bound({"strategy": [{"kind": "evolution", "population": 4, "sample": 2}, {"kind": "random"}]})
    label = found["strategy"].labels[1]
    assert runner.experiment({"strategy": found["strategy"].value(label)}).strategy.kind == "random"


VARIED: list[dict[str, Any]] = [
    {"space.kd_weights": {"low": 0.1, "high": 0.9}, "space.temperatures": [1.0, 8.0], "training.epochs": [1, 2]},
    {"space.bits": [[32], [32, 8]], "baselines": ["uniform", "random"], "budget.latency": ["50%", 1.5, None]},
    {"strategy.kind": ["random", "evolution"], "strategy.population": {"low": 2, "high": 9}, "seed": [1, 2]},
    {"reward": [{"kind": "mnasnet_hard"}, {"kind": "tunas_absolute", "beta": -0.1}], "table.noise": [1e-5, 0.01]},
]


@pytest.mark.parametrize("vary", VARIED, ids=[next(iter(vary)) for vary in VARIED])
def test_what_is_drawn_is_what_the_experiment_takes(tmp_path: Path, vary: dict[str, Any]) -> None:
    record = prepare(experiment_sweep(vary), tmp_path)
    assert isinstance(record.runner, ExperimentRunner)
    for _ in range(6):
        with record.open() as ledger:
            entry = ledger.ask()
        if entry is None:
            break
        experiment = record.runner.experiment(entry.values)
        for key, value in entry.values.items():
            assert key in vary
            section, _, leaf = key.partition(".")
            if section == "space":
                assert experiment.space.settings[leaf] == value
                assert isinstance(value, list)


def test_the_best_command_is_the_trial(place: Path) -> None:
    (place / "mine.yaml").write_text(yaml.safe_dump(SMALL))
    runner, _ = bound({"training.lr": [1e-5, 1e-2]}, experiment="mine.yaml", set={"search.trials": 4})
    command = runner.command({"strategy.kind": "random", "training.lr": 1e-5}, Path("nowhere"))
    words = command.split()
    assert words[:3] == ["nas", "search", "mine.yaml"]
    from nas.experiment import load_experiment

    again = load_experiment("mine.yaml", [word for word in words[3:] if word != "--set"])
    assert (again.search.trials, again.strategy.kind, again.training.lr) == (4, "random", 1e-5)


def test_every_trial_is_measured_by_one_yardstick(tmp_path: Path) -> None:
    """Reward and budget are the experiment's own, whatever a trial was told."""
    runner, _ = bound({"reward.w": {"low": -0.2, "high": 0.0}}, set={"budget.latency": "50%", "reward.w": -0.1})
    winner = {"quality_valid": 0.9, "p50_ms": 2.0, "p95_ms": 3.0, "size_bytes": 1000, "winner": True}
    student = {"name": "student", "macs": 10, "params": 20, "quality": 0.1234}
    summary = {"finalists": [{"winner": False}, winner], "rows": [{"name": "teacher"}, student]}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    timing = {"p50": 3.0, "p95": 4.0, "mean": 3.0, "n": 1, "noise": 0.0}
    (tmp_path / "teacher_latency.json").write_text(json.dumps(timing))
    (tmp_path / "teacher.onnx").write_bytes(b"x" * 10)
    figures = runner.figures(tmp_path)
    assert figures["reward"] == pytest.approx(0.9 * (2.0 / 1.5) ** -0.1)
    assert figures["violation"] == pytest.approx(2.0 / 1.5 - 1)
    assert figures["quality"] == 0.9
    assert 0.1234 not in figures.values(), "the test split decides nothing"


# ---- samplers and the record ----------------------------------------------------------------------


SAMPLERS: list[tuple[dict[str, Any], str]] = [
    ({"sampler": "BestSampler"}, "Unknown sampler 'BestSampler'"),
    ({"sampler": "nowhere:Sampler"}, "nowhere"),
    ({"sampler_settings": {"startup": 3}}, "Unknown key sampler_settings.startup"),
    ({"sampler_settings": {"n_startup_trials": "many"}}, "or other sampler_settings"),
    ({"sampler": "GridSampler"}, "vary.x is a continuous range"),
    ({"sampler": "BruteForceSampler"}, "cannot draw what is varied"),
]


@pytest.mark.parametrize(("changes", "said"), SAMPLERS, ids=[said for _, said in SAMPLERS])
def test_a_sampler_that_cannot_do_it_is_refused(changes: dict[str, Any], said: str) -> None:
    sweep = load_sweep(toy(**changes))
    with pytest.raises(NasError) as caught:
        check_sampler(sweep, parameters(sweep))
    assert said in str(caught.value)


def record_of(folder: Path, **changes: Any) -> Record:
    sweep = load_sweep(toy(**changes))
    runner = FunctionRunner("toy:score", "score", sweep.vary)
    return Record(folder, sweep, parameters(sweep), runner, {"seed": sweep.seed})


FINITE = {"x": {"low": 0, "high": 2}, "kind": ["a", "b"]}
KINDS = [
    "BruteForceSampler", "GridSampler", "GPSampler", "NSGAIISampler", "NSGAIIISampler", "QMCSampler", "RandomSampler",
    "TPESampler",
]  # fmt: skip


@pytest.mark.parametrize("sampler", KINDS)
def test_every_sampler_tries_each_combination_once(tmp_path: Path, sampler: str) -> None:
    record = record_of(tmp_path, vary=FINITE, sampler=sampler)
    seen = []
    for _ in range(6):
        with record.open() as ledger:  # anew, as another process would
            entry = ledger.ask()
            assert entry is not None
            seen.append((entry.values["x"], entry.values["kind"]))
            ledger.complete(entry, {"score": float(entry.values["x"])}, 1.0, 1.0)
    assert sorted(seen) == [(x, kind) for x in (0, 1, 2) for kind in "ab"]
    with record.open() as ledger:
        assert ledger.ask() is None
        assert [entry.index for entry in ledger.entries()] == list(range(6))
        shares, _ = ledger.importances()
        assert shares is not None
        assert next(iter(shares)) == "x"
        assert sum(shares.values()) == pytest.approx(1.0)


def test_draws_are_a_function_of_seed_and_history(tmp_path: Path) -> None:
    def drawn(folder: Path, seed: int) -> list[Any]:
        record, found = record_of(folder, seed=seed), []
        for i in range(12):
            with record.open() as ledger:
                entry = ledger.ask()
                assert entry is not None
                ledger.complete(entry, {"score": float(i % 3)}, 1.0, 1.0)
                found.append(entry.values)
        return found

    assert drawn(tmp_path / "1", 0) == drawn(tmp_path / "2", 0)
    assert drawn(tmp_path / "3", 1) != drawn(tmp_path / "4", 0)


def test_importances_say_why_they_are_missing(tmp_path: Path) -> None:
    record = record_of(tmp_path)
    with record.open() as ledger:
        assert ledger.importances() == (None, "0 complete trials; importances need 4")
        for _ in range(4):
            entry = ledger.ask()
            assert entry is not None
            ledger.complete(entry, {"score": 1.0}, 1.0, 1.0)
        assert ledger.importances() == (None, "every complete trial has the same value")


def test_a_metric_that_is_no_number_is_a_failure(tmp_path: Path) -> None:
    with record_of(tmp_path).open() as ledger:
        for figures, reason in (({"other": 1.0}, "was not measured"), ({"score": float("nan")}, "is nan")):
            entry = ledger.ask()
            assert entry is not None
            assert reason in ledger.complete(entry, figures, 1.0, 1.0).reason
        assert [entry.status for entry in ledger.entries()] == ["failed", "failed"]


# ---- running ----------------------------------------------------------------------------------------


def test_a_sweep_runs_each_trial_once_and_goes_on_past_failures(place: Path) -> None:
    kinds = ["a", "b", "bad", "broken", "empty"]
    sweep = load_sweep(toy(vary={"x": [0.25], "kind": kinds}, sampler="GridSampler", trials=9, set={"unused": 1}))
    result = run_sweep(sweep, Path("out"))
    assert {i: len(found) for i, found in attempts(Path("out")).items()} == dict.fromkeys(range(5), 1)
    by_kind = {t["values"]["kind"]: t for t in result["trials"]}
    assert by_kind["b"]["value"] == pytest.approx(1 - 0.0025)
    assert by_kind["b"]["figures"]["twice"] == 0.5
    assert result["best"]["values"] == {"x": 0.25, "kind": "b"}
    assert [t["values"]["kind"] for t in result["trials"][:2]] == ["b", "a"]
    assert by_kind["bad"]["reason"] == "the kind is bad"
    assert "ZeroDivisionError: a bug" in by_kind["broken"]["reason"]
    assert "Traceback" in (Path("out") / by_kind["broken"]["folder"] / "log.txt").read_text()
    assert by_kind["empty"]["reason"] == "metric score was not measured"
    assert not any(t["deaths"] for t in result["trials"])
    assert read_result(Path("out")) == result
    assert "2 complete, 3 failed" in headline(result)[0]


def test_a_number_is_the_metric_and_words_are_a_failure(place: Path) -> None:
    vary = {"x": [1, 2]}
    result = run_sweep(load_sweep(toy(function="toy:number", vary=vary, direction="minimize")), Path("out"))
    assert result["best"]["value"] == 1
    with pytest.raises(StudyError, match="All 2 trials failed: toy:words returned 'good'"):
        run_sweep(load_sweep(toy(function="toy:words", vary=vary)), Path("words"))
    assert (place / "words" / "report.html").exists()


def test_the_door_of_a_function(place: Path) -> None:
    with pytest.raises(NasError, match="no 'gone'"):
        prepare(load_sweep(toy(function="toy:gone")), place / "out")
    with pytest.raises(NasError, match="toy:TrainingErro"):
        prepare(load_sweep(toy(function="toy:TrainingErro")), place / "out")
    assert not (place / "out").exists()


def test_seconds_bound_a_sweep(place: Path) -> None:
    result = run_sweep(load_sweep(toy(trials=None, seconds=0.01, workers=1)), Path("out"))
    assert len(result["trials"]) == 1, "what has begun is finished, and nothing begins after the time"
    more = run_sweep(load_sweep(toy(trials=3, seconds=None, workers=1)), Path("out"), resume=True)
    assert len(more["trials"]) == 3, "budgets may change on a resume"


def test_a_folder_belongs_to_one_sweep(place: Path) -> None:
    sweep = load_sweep(toy(trials=1))
    run_sweep(sweep, Path("out"))
    with pytest.raises(StudyError, match="holds a sweep already"):
        run_sweep(sweep, Path("out"))
    before = (place / "out" / "sweep.yaml").read_text()
    other = load_sweep(toy(trials=1, seed=1, vary={**VARY, "x": {"low": 0.0, "high": 2.0}}))
    with pytest.raises(StudyError, match="seed, vary changed"):
        run_sweep(other, Path("out"), resume=True)
    assert (place / "out" / "sweep.yaml").read_text() == before
    (place / "run").mkdir()
    (place / "run" / "experiment.yaml").write_text("")
    with pytest.raises(StudyError, match="run of a search"):
        run_sweep(sweep, Path("run"))


def test_dry_run_writes_nothing(place: Path) -> None:
    lines = forecast_sweep(load_sweep(toy()), Path("out"))
    assert "x: 0.0 to 1.0" in "\n".join(lines)
    assert "6 trials, 2 at a time" in lines[-1]
    assert not Path("out").exists()


# ---- kills ------------------------------------------------------------------------------------------


def begun(folder: Path, trials: int) -> Callable[[], dict[int, list[int]] | None]:
    def look() -> dict[int, list[int]] | None:
        found = attempts(folder)
        return found if len(found) >= trials and all(found.values()) else None

    return look


def test_a_killed_workers_trial_is_tried_once_more(place: Path) -> None:
    write(place)
    out = place / "runs" / "toy"
    (place / "hold").touch()
    process = start(place)
    pids = until(begun(out, 2))
    os.kill(pids[0][0], signal.SIGKILL)
    until(lambda: len(attempts(out)[0]) == 2)
    (place / "hold").unlink()
    said = finish(process)
    assert "killed by signal 9; it is tried once more" in said
    found = attempts(out)
    assert {i: len(pids) for i, pids in found.items()} == {0: 2, 1: 1, 2: 1, 3: 1, 4: 1, 5: 1}
    trials = {t["index"]: t for t in read_result(out)["trials"]}
    assert all(t["status"] == "complete" for t in trials.values())
    assert [trials[i]["deaths"] for i in range(6)] == [1, 0, 0, 0, 0, 0]


def test_a_trial_that_kills_its_worker_twice_has_failed(place: Path) -> None:
    write(place, trials=2)
    out = place / "runs" / "toy"
    (place / "hold").touch()
    process = start(place)
    first = until(begun(out, 2))[0][0]
    os.kill(first, signal.SIGKILL)
    second = until(lambda: attempts(out)[0][1:])[0]
    os.kill(second, signal.SIGKILL)
    (place / "hold").unlink()
    finish(process)
    trials = {t["index"]: t for t in read_result(out)["trials"]}
    assert trials[0]["status"] == "failed"
    assert "signal 9, after a first one had died too" in trials[0]["reason"]
    assert trials[1]["status"] == "complete"
    assert len(attempts(out)[0]) == 2


def test_a_killed_sweep_goes_on(place: Path) -> None:
    write(place)
    out = place / "runs" / "toy"
    process = start(place)
    until(begun(out, 3))
    (place / "hold").touch()
    until(lambda: (out / "trials" / "0000" / "outcome.json").exists())
    pids = [pid for found in attempts(out).values() for pid in found]
    process.kill()  # the command alone: its trials must notice by themselves
    process.communicate()
    until(lambda: not any(map(alive, pids)))
    done = {p.parent.name: p.read_text() for p in out.glob("trials/*/outcome.json")}
    with (out / "sweep.jsonl").open("a") as journal:
        journal.write('{"op_code": 4, "tri')  # the line that a crash tore
    (place / "hold").unlink()
    refused = start(place)
    assert "holds a sweep already" in refused.communicate(timeout=300)[0]
    assert refused.returncode == 2
    said = finish(start(place, "--resume"))
    assert "torn by a crash" in said
    result = read_result(out)
    assert sorted(t["index"] for t in result["trials"]) == list(range(6))
    assert all(t["status"] == "complete" for t in result["trials"])
    assert all(len(attempts(out)[int(name)]) == 1 for name in done), "a finished trial was repeated"
    assert {name: (out / "trials" / name / "outcome.json").read_text() for name in done} == done
    assert not any(t["deaths"] for t in result["trials"]), "the sweep was killed, not its workers"
    again = finish(start(place, "--resume"))
    assert "6 complete" in again
    assert read_result(out)["trials"] == result["trials"]


def test_ctrl_c_loses_nothing(place: Path) -> None:
    write(place)
    out = place / "runs" / "toy"
    (place / "hold").touch()
    process = start(place)
    pids = [pid for found in until(begun(out, 2)).values() for pid in found]
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: to all of them
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "go on with --resume" in said
    assert "Traceback" not in said
    assert not any(map(alive, pids))
    (place / "hold").unlink()
    finish(start(place, "--resume"))
    assert all(t["status"] == "complete" and not t["deaths"] for t in read_result(out)["trials"])
    assert len(attempts(out)) == 6


def test_two_commands_share_one_sweep(place: Path) -> None:
    write(place, trials=8)
    out = place / "runs" / "toy"
    (place / "hold").touch()
    first = start(place)
    until(begun(out, 2))
    second = start(place, "--resume")
    found = until(begun(out, 4))
    mine = [pid for i in (0, 1) for pid in found[i]]
    first.kill()
    first.communicate()
    until(lambda: not any(map(alive, mine)))
    (place / "hold").unlink()
    finish(second)  # it waits for what the first one left, and takes it over
    result = read_result(out)
    assert sorted(t["index"] for t in result["trials"]) == list(range(8))
    assert all(t["status"] == "complete" for t in result["trials"])
    assert {i: len(pids) for i, pids in attempts(out).items()} == {0: 2, 1: 2, **dict.fromkeys(range(2, 8), 1)}
    values = [json.dumps(t["values"], sort_keys=True) for t in result["trials"]]
    assert len(set(values)) == 8


# ---- caches, report ---------------------------------------------------------------------------------


BUILDER = """
import sys, time
from pathlib import Path
from nas.locks import cache_lock
thing = Path(sys.argv[1])
with cache_lock(thing):
    if not thing.exists():
        time.sleep(0.3)
        thing.write_text("built")
        print("built", flush=True)
"""


def test_what_is_cached_is_built_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", BUILDER, str(tmp_path / "thing")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert sorted(process.communicate(timeout=300)[0] for process in both) == ["", "", "built\n"]
    with cache_lock(tmp_path / "thing"), pytest.raises(BlockingIOError):
        file_lock(tmp_path / ".thing.lock", wait=False).__enter__()


@pytest.fixture
def swept(place: Path) -> Path:
    vary = {
        "x": {"low": 0.0, "high": 1.0}, "rate": {"low": 1e-4, "high": 1e-1, "log": True},
        "kind": ["a", "b", "bad"], "<i>odd</i>": [[1, 2], "<script>alert(1)</script>"],
    }  # fmt: skip
    run_sweep(load_sweep(toy(vary=vary, trials=8)), place / "swept")
    return place / "swept"


def test_the_report_is_one_safe_file(swept: Path) -> None:
    (swept / "report.html").unlink()
    page = write_report(swept).read_text()
    assert "<script>alert(1)" not in page
    assert "<i>odd" not in page
    assert "&lt;i&gt;odd&lt;/i&gt;" in page
    bare = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.findall(r'(?:src|href)="', bare), "nothing is loaded"
    for heading in ("History", "What mattered", "All parameters", "Each parameter", "Every trial"):
        assert f"<h2>{heading}</h2>" in page
    result = read_result(swept)
    assert render({**result, "importances": None, "importances_note": "too few"}).count("Not known: too few.") == 1
    assert render({**result, "trials": [], "best": None, "importances": None})


def test_nas_report_and_list_know_sweeps(swept: Path) -> None:
    def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "nas", *arguments]
        return subprocess.run(command, cwd=swept.parent, capture_output=True, text=True, timeout=60, check=False)

    (swept / "report.html").unlink()
    done = cli("report", "swept")
    assert done.returncode == 0, done.stderr
    assert (swept / "report.html").exists()
    assert "Best: trial" in done.stdout
    assert cli("list", "sweeps").stdout.split() == list(content.available("experiments/sweeps"))
    (swept / "sweep.json").write_text("{}")
    broken = cli("report", "swept")
    assert broken.returncode == 2
    assert "no sweep of schema version" in broken.stderr


@pytest.mark.slow
def test_a_sweep_of_real_searches(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three whole searches, two at a time: one table and one teacher for all, and one killed on the way."""
    monkeypatch.setenv("NAS_CACHE_DIR", str(place / "cache"))
    (place / "mine.yaml").write_text(yaml.safe_dump(SMALL))
    sweep = {
        "name": "toy", "experiment": "mine.yaml", "trials": 3, "workers": 2,
        "set": {"search.trials": 3, "training.epochs": 2, "finalists.epochs": 2, "baselines": []},
        "vary": {"strategy.kind": ["evolution", "random"], "strategy.population": [2, 4], "reward.w": [-0.2, -0.05]},
    }  # fmt: skip
    (place / "toy.yaml").write_text(yaml.safe_dump(sweep))
    out = place / "runs" / "toy"
    process = start(place)
    until(lambda: (out / "trials" / "0001" / "study.jsonl").exists(), 300)
    process.kill()
    process.communicate()
    said, _ = (process := start(place, "--resume")).communicate(timeout=500)
    assert process.returncode == 0, said
    result = read_result(out)
    assert [t["status"] for t in result["trials"]] == ["complete"] * 3
    logs = "".join((out / t["folder"] / "log.txt").read_text() for t in result["trials"])
    assert len(re.findall(r"no table for \S+ yet: measuring", logs)) == 1
    assert logs.count("timing the teacher") == 1
    assert len(list((place / "cache" / "teachers").glob("[!.]*"))) == 1
    for trial in result["trials"]:
        folder = out / trial["folder"]
        assert (folder / "student" / "model.onnx").exists()
        winner = next(f for f in json.loads((folder / "summary.json").read_text())["finalists"] if f["winner"])
        assert trial["figures"]["quality"] == winner["quality_valid"]
        assert trial["figures"]["latency_ms"] == winner["p50_ms"]
    assert result["best"]["command"].startswith("nas search mine.yaml --set")
