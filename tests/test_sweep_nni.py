"""NNI's search spaces and trial scripts under `nas sweep`: exact distributions, real processes, files of NNI's form."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import yaml
from helpers import alive, start_sweep, until

from nas.cli import main
from nas.errors import ContentError, ExperimentError, StudyError
from nas.sweep.commands import STANDIN
from nas.sweep.nni_config import load_nni
from nas.sweep.nni_space import TYPES, effective, nested, nni_parameters, read_space
from nas.sweep.page import render
from nas.sweep.parameter import combinations
from nas.sweep.record import Record
from nas.sweep.reports import begin, read_reports, report
from nas.sweep.result import read_result
from nas.sweep.runners import FunctionRunner
from nas.sweep.schedule import forecast_sweep, prepare, run_sweep
from nas.sweep.spec import Sweep, load_sweep, parameters

SPACE: dict[str, Any] = {
    "lr": {"_type": "loguniform", "_value": [0.0001, 0.1]},
    "width": {"_type": "randint", "_value": [2, 5]},
    "mode": {"_type": "choice", "_value": ["a b", True, 1.5]},
    "optimizer": {
        "_type": "choice",
        "_value": [
            {"_name": "sgd", "momentum": {"_type": "uniform", "_value": [0, 1]}},
            {"_name": "adam", "amsgrad": {"_type": "choice", "_value": [{"_name": "no"}, {
                "_name": "yes", "beta": {"_type": "quniform", "_value": [0.8, 0.99, 0.05]}}]}},
        ],
    },
}  # fmt: skip

# A script as NNI's users have it: parameters by a call, defaults of its own, results reported as they come.
SCRIPT = '''
import nni
from sklearn.datasets import load_digits
from sklearn.linear_model import SGDClassifier
from sklearn.model_selection import train_test_split

params = {"alpha": 1e-4, "penalty": "l2"}
params.update(nni.get_next_parameter())
x, y = load_digits(return_X_y=True)
x_train, x_test, y_train, y_test = train_test_split(x / 16, y, random_state=0)
model = SGDClassifier(alpha=params["alpha"], penalty=params["penalty"], random_state=0)
for epoch in range(4):
    model.partial_fit(x_train, y_train, classes=range(10))
    accuracy = model.score(x_test, y_test)
    nni.report_intermediate_result(accuracy)
print("trial", nni.get_sequence_id(), "of", nni.get_experiment_id(), "with", params["alpha"])
nni.report_final_result({"default": accuracy, "epochs": epoch + 1})
'''

# Says what it got, and does what the file called "mode" beside it says.
PROBE = '''
import json, os, pathlib, signal, subprocess, sys, time
import nni


def leave(*_):
    time.sleep(0.5)
    (out / "saved").touch()
    sys.exit(1)


params = nni.get_next_parameter()
out = pathlib.Path(os.environ["NNI_OUTPUT_DIR"])
signal.signal(signal.SIGTERM, leave)
with (out / "attempts").open("a") as file:
    file.write(f"{os.getpid()}\\n")
told = {"params": params, "argv": sys.argv[1:], "trial": nni.get_trial_id(), "cwd": os.getcwd(), "number":
        nni.get_sequence_id(), "current": nni.get_current_parameter()}
(out / "told.json").write_text(json.dumps(told))
mode = pathlib.Path("mode")
if mode.exists() and mode.read_text() == "hold":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (out / "child").write_text(str(child.pid))
    while mode.exists():
        time.sleep(0.02)
    child.kill()
for step in range(3):
    nni.report_intermediate_result({"default": params["x"] + step, "other": 1})
nni.report_final_result(params["x"])
'''


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def swept(place: Path, *arguments: str, code: int = 0) -> str:
    process = start_sweep(place, *arguments)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == code, said
    return said


def write_space(place: Path, space: dict[str, Any]) -> None:
    (place / "search_space.json").write_text(json.dumps(space, indent="\t"))


def command_sweep(script: str, **changes: Any) -> Sweep:
    Path("trial.py").write_text(script)
    whole = {
        "name": "trial", "command": "python trial.py", "metric": "result", "trials": 3,
        "vary": {"x": {"_type": "uniform", "_value": [0, 1]}},
    }  # fmt: skip
    return load_sweep({**whole, **changes})


def only(result: dict[str, Any]) -> dict[str, Any]:
    (trial,) = result["trials"]
    return trial


# ---- the search space ---------------------------------------------------------------------------------


def one(kind: str, value: list[Any]) -> Any:
    (parameter,) = nni_parameters("x", {"_type": kind, "_value": value})
    return parameter


VALUES: dict[str, list[Any]] = {
    "choice": [1, 2.5, "three"], "randint": [3, 7], "uniform": [-1, 2], "quniform": [0.3, 2.6, 1],
    "loguniform": [0.001, 10], "qloguniform": [0.7, 20, 3], "normal": [5, 2], "qnormal": [5, 2, 0.5],
    "lognormal": [1, 0.5], "qlognormal": [1, 0.5, 2],
}  # fmt: skip


@pytest.mark.parametrize("kind", TYPES)
def test_each_distribution_is_that_of_nni(kind: str) -> None:
    """Two samples are from one distribution: NNI's own expressions, and what is drawn here."""
    expressions = pytest.importorskip("nni.parameter_expressions")
    parameter, rng, n = one(kind, VALUES[kind]), np.random.default_rng(0), 4000
    if parameter.values or parameter.whole:
        ours = [parameter.value(parameter.draw(rng)) for _ in range(n)]
    else:  # as any sampler of Optuna draws without knowledge: evenly, in the logarithm where it says so
        ends = (math.log(parameter.low), math.log(parameter.high)) if parameter.log else (parameter.low, parameter.high)
        drawn = rng.uniform(*ends, n)
        ours = [parameter.value(float(np.exp(d)) if parameter.log else float(d)) for d in drawn]
    state = np.random.RandomState(1)
    arguments = [VALUES[kind]] if kind == "choice" else VALUES[kind]
    theirs = [getattr(expressions, kind)(*arguments, state) for _ in range(n)]
    if kind == "choice":  # numpy makes them text
        ours, theirs = [VALUES[kind].index(v) for v in ours], [[*map(str, VALUES[kind])].index(str(v)) for v in theirs]
    grid = np.unique(np.concatenate([ours, theirs]).astype(float).round(9))
    a, b = (np.searchsorted(np.sort(np.asarray(s, float).round(9)), grid, "right") / n for s in (ours, theirs))
    # Kolmogorov-Smirnov: the distance that two such samples exceed once in 10,000 times.
    assert np.abs(a - b).max() < math.sqrt(-math.log(0.5e-4) / n)
    if parameter.scale and parameter.scale.quantum:
        found, shares = np.unique(np.round(theirs, 9), return_counts=True)
        assert set(np.round(ours, 9)) >= set(found[shares > 0.01 * n])


def test_quantised_values_are_countable_and_drawn_as_themselves() -> None:
    parameter = one("quniform", [0.3, 2.6, 1])
    assert [parameter.value(option) for option in parameter.options] == [0.3, 1.0, 2.0, 2.6]
    assert combinations([parameter, one("randint", [0, 10**9])]) == 4 * 10**9
    assert one("qloguniform", [1, 64, 16]).options == (1.0, 16.0, 32.0, 48.0, 64.0)
    assert one("normal", [0, 1]).options is None
    assert one("randint", [3, 4]).options == (3,)
    assert isinstance(one("uniform", [0, 1]).value(1.0), float)


def test_a_normal_number_is_the_quantile_that_was_drawn() -> None:
    parameter = one("lognormal", [1, 2])
    for quantile in (0.001, 0.5, 0.975):
        assert parameter.value(quantile) == pytest.approx(math.exp(NormalDist(1, 2).inv_cdf(quantile)))
    assert all(math.isfinite(parameter.value(end)) for end in (parameter.low, parameter.high))
    assert parameter.ends == (pytest.approx(math.e),)


def test_nested_choices_are_those_of_nni() -> None:
    """The same structure as NNI's own tuner makes of the same choices."""
    formatting = pytest.importorskip("nni.common.hpo_utils")
    varied, rng = [p for key in SPACE for p in nni_parameters(key, SPACE[key])], np.random.default_rng(0)
    assert [p.key for p in varied] == [
        "lr", "width", "mode", "optimizer", "optimizer.sgd.momentum", "optimizer.adam.amsgrad",
        "optimizer.adam.amsgrad.yes.beta",
    ]  # fmt: skip
    space, seen = formatting.format_search_space(SPACE), set()
    for _ in range(40):
        values = effective(SPACE, {p.key: p.value(p.draw(rng)) for p in varied})
        ours = nested(SPACE, values)
        seen.add(ours["optimizer"]["_name"] + str(len(values)))
        if ours["optimizer"]["_name"] == "sgd":  # NNI itself fails on a choice within a branch that was not chosen
            assert set(ours["optimizer"]) == {"_name", "momentum"}
            continue
        again = formatting.deformat_parameters(formatting.format_parameters(ours, space), space)
        assert again.pop("lr") == pytest.approx(ours.pop("lr"))
        assert again == ours
    assert seen == {"sgd5", "adam5", "adam6"}


MISTAKES: list[tuple[Any, str, str]] = [
    ({"_type": "unifrom", "_value": [0, 1]}, "x: unknown _type 'unifrom'", "choice, randint, uniform"),
    ({"_value": [0, 1]}, "x: there is no _type", "_type"),
    ({"_type": "uniform"}, "x: there is no _value", "_value"),
    ({"low": 0, "high": 1}, "x: there is no _type", "_type"),
    (3, "x: 3.", "a mapping with _type and _value"),
    ({"_type": "uniform", "_value": [1, 0]}, "uniform of [1, 0]", "low below high"),
    ({"_type": "uniform", "_value": [0]}, "uniform of [0]", "[low, high]"),
    ({"_type": "uniform", "_value": "0, 1"}, "uniform of '0, 1'", "[low, high]"),
    ({"_type": "uniform", "_value": [False, True]}, "uniform of [False, True]", "[low, high]"),
    ({"_type": "uniform", "_value": [0, math.inf]}, "uniform of [0, inf]", "[low, high]"),
    ({"_type": "quniform", "_value": [0, 1]}, "quniform of [0, 1]", "[low, high, q]"),
    ({"_type": "quniform", "_value": [0, 1, 0]}, "quniform of [0, 1, 0]", "q above 0"),
    ({"_type": "loguniform", "_value": [0, 1]}, "loguniform of [0, 1]", "0 < low"),
    ({"_type": "normal", "_value": [0, 0]}, "normal of [0, 0]", "sigma above 0"),
    ({"_type": "lognormal", "_value": [0, 1000]}, "lognormal of [0, 1000]", "[mu, sigma]"),
    ({"_type": "randint", "_value": [0.5, 3]}, "randint of [0.5, 3]", "whole numbers"),
    ({"_type": "choice", "_value": []}, "choice of []", "a list of the values"),
    ({"_type": "choice", "_value": [1, 1]}, "choice of [1, 1]", "each value once"),
    ({"_type": "choice", "_value": [{"_name": "a"}, {"_name": "a"}]}, "choice of", "each _name once"),
    ({"_type": "choice", "_value": [1], "_valeu": 3}, "unknown key '_valeu'", "_type and _value"),
    ({"_type": "choice", "_value": [{"_name": "a", "y": {"_type": "gauss", "_value": []}}]}, "x.a.y: unknown", ""),
]


@pytest.mark.parametrize(("shape", "found", "expected"), MISTAKES, ids=[found for _, found, _ in MISTAKES])
def test_a_mistake_in_a_search_space_is_named(place: Path, shape: Any, found: str, expected: str) -> None:
    write_space(place, {"x": shape})
    with pytest.raises(ExperimentError) as caught:
        read_space(Path("search_space.json"))
    assert found in caught.value.found
    assert expected in caught.value.expected


def test_a_file_that_is_no_search_space_is_refused(place: Path) -> None:
    with pytest.raises(ContentError, match="cannot be read: No such file"):
        load_nni(Path("missing.json"))
    for words, said in (('{"x": ', "no valid JSON"), ("[1]", "a mapping of keys"), ("{}", "a mapping of keys")):
        (place / "search_space.json").write_text(words)
        with pytest.raises(ExperimentError, match=said):
            load_nni(Path("search_space.json"))


def test_the_command_line_says_what_is_missing(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: str) -> str:
        assert main(["sweep", *arguments]) == 2
        return capfd.readouterr().err

    write_space(place, SPACE)
    assert "--command 'python train.py'" in refused("--nni", "search_space.json")
    assert "one of the two is needed" in refused("--trials", "3")
    said = refused("--nni", "search_space.json", "--command", "true", "--pruner", "MeanPruner")
    assert "Unknown pruner 'MeanPruner'" in said
    assert "MedianPruner" in said
    write_space(place, {"x": {"_type": "nomral", "_value": [0, 1]}})
    said = refused("--nni", "search_space.json", "--command", "true")
    assert said.count("error") == 1
    assert "unknown _type 'nomral'" in said
    assert not (place / "runs").exists()


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"command": " "}, "The command is empty"),
    ({"directory": "nowhere"}, "nowhere, which is no folder"),
    ({"pruner_settings": {"n_startup_trials": 1}}, "no pruner"),
    ({"pruner": "MedianPruner", "pruner_settings": {"startup": 1}}, "Unknown key pruner_settings.startup"),
    ({"pruner": "MedianPruner", "pruner_settings": {"n_startup_trials": -1}}, "refuses its settings"),
    ({"command": None, "function": "a:b", "directory": "."}, "directory is where a command runs"),
    ({"command": None, "experiment": "digits", "metric": "reward", "pruner": "NopPruner"}, "searches report nothing"),
    ({"command": None, "experiment": "digits", "metric": "reward", "vary": {"optimizer": SPACE["optimizer"]}},
     "vary.optimizer is a nested choice"),
    ({"vary": {"optimizer": SPACE["optimizer"], "optimizer.sgd.momentum": [1, 2]}}, "vary says twice"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "said"), WRONG, ids=[said for _, said in WRONG])
def test_a_wrong_sweep_of_a_command_is_refused(place: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ExperimentError) as caught:
        prepare(command_sweep("", **changes), Path("out"))
    assert said in str(caught.value)


def test_an_experiment_takes_distributions_of_nni() -> None:
    vary = {
        "training.epochs": {"_type": "quniform", "_value": [8, 16, 4]},
        "training.lr": {"_type": "lognormal", "_value": [-5, 0.5]},
    }
    record = prepare(load_sweep({"name": "toy", "experiment": "digits", "vary": vary}), Path("nowhere"))
    epochs, lr = record.parameters
    assert [epochs.value(option) for option in epochs.options or ()] == [8, 12, 16]
    assert all(isinstance(epochs.value(option), int) for option in epochs.options or ())
    assert "normal, mean -5, deviation 0.5, of the logarithm" in lr.describe()


# ---- experiments of NNI ---------------------------------------------------------------------------------


CONFIG: dict[str, Any] = {
    "experimentName": "My trial!", "searchSpaceFile": "search_space.json", "trialCommand": "python trial.py",
    "trialConcurrency": 2, "maxTrialNumber": 5, "maxExperimentDuration": "1h", "trialGpuNumber": 1,
    "tuner": {"name": "TPE", "classArgs": {"optimize_mode": "minimize", "seed": 3, "tpe_args": {"n_startup_jobs": 4}}},
    "assessor": {"name": "Medianstop", "classArgs": {"start_step": 3}},
    "trainingService": {"platform": "local"},
}  # fmt: skip


def config(place: Path, **changes: Any) -> tuple[dict[str, Any], list[str]]:
    whole = {**CONFIG, **changes}
    (place / "config.yml").write_text(yaml.safe_dump({k: v for k, v in whole.items() if v is not None}))
    return load_nni(place / "config.yml")


def test_an_experiment_of_nni_is_a_sweep(place: Path) -> None:
    write_space(place, SPACE)
    keys, notes = config(place)
    sweep = load_sweep(keys)
    assert (sweep.name, sweep.command, sweep.workers, sweep.trials, sweep.seconds) == (
        "My-trial", "python trial.py", 2, 5, 3600,
    )  # fmt: skip
    assert (sweep.sampler, sweep.goal, sweep.seed, sweep.metric) == ("TPESampler", "minimize", 3, "result")
    assert (sweep.pruner, sweep.pruner_settings) == ("MedianPruner", {"n_startup_trials": 1, "n_warmup_steps": 2})
    assert sweep.vary == SPACE
    assert sweep.directory == str(place)
    assert {note.split(" is left out")[0] for note in notes} == {
        "trialGpuNumber", "trainingService", "tuner.classArgs.tpe_args",
    }  # fmt: skip
    assert "by MedianPruner" in "\n".join(forecast_sweep(sweep, Path("out")))
    keys, notes = config(place, assessor={"name": "Curvefitting"}, maxTrialNumber=None, searchSpaceFile=None,
                         searchSpace={"x": SPACE["lr"]})  # fmt: skip
    sweep = load_sweep(keys)
    assert sweep.pruner is None
    assert sweep.trials is None
    assert "Curvefitting has no counterpart" in notes[-1]


UNLIKE: list[tuple[dict[str, Any], str]] = [
    ({"tuner": {"name": "Anneal"}}, "Tuner 'Anneal' has no counterpart"),
    ({"tuner": "TPE"}, "tuner is 'TPE'"),
    ({"searchSpace": {"x": 1}}, "no search space, or two"),
    ({"searchSpaceFile": None}, "no search space, or two"),
    ({"searchSpaceFile": None, "searchSpace": {"x": {"_type": "gauss", "_value": [1]}}}, "unknown _type 'gauss'"),
    ({"maxExperimentDuration": "1 week"}, "maxExperimentDuration is '1 week'"),
    ({"maxExperimentDuration": "1.2.3h"}, "maxExperimentDuration is '1.2.3h'"),
    ({"assessor": {"name": "Medianstop", "classArgs": {"start_step": "third"}}}, "start_step is 'third'"),
    ({"maxTrialNumbr": 3}, "Unknown key 'maxTrialNumbr'"),
    ({"trial": {"command": "python trial.py"}}, "first version"),
]


@pytest.mark.parametrize(("changes", "said"), UNLIKE, ids=[said for _, said in UNLIKE])
def test_what_has_no_counterpart_is_named(place: Path, changes: dict[str, Any], said: str) -> None:
    write_space(place, SPACE)
    with pytest.raises(ExperimentError) as caught:
        config(place, **changes)
    assert said in str(caught.value)


# ---- trials -------------------------------------------------------------------------------------------


def test_a_script_of_nni_runs_unchanged(place: Path) -> None:
    """A training of its own under TPE: results, output and report are there, and a resume adds to it."""
    (place / "trial.py").write_text(SCRIPT)
    write_space(place, {
        "alpha": {"_type": "loguniform", "_value": [1e-5, 10]},
        "penalty": {"_type": "choice", "_value": ["l1", "l2"]},
    })  # fmt: skip
    asked = ("--nni", "search_space.json", "--command", "python trial.py", "--workers", "2", "--out", "out")
    assert "3 complete" in swept(place, *asked, "--trials", "3")
    said = swept(place, *asked, "--trials", "5", "--resume")
    assert "Importances: " in said
    result = read_result(place / "out")
    assert len(result["trials"]) == 5
    assert result["best"]["value"] == max(trial["value"] for trial in result["trials"])
    assert result["best"]["command"] == ""
    for trial in result["trials"]:
        folder = place / "out" / trial["folder"]
        alpha = trial["values"]["alpha"]
        assert f"trial {trial['index']} of search_space with {alpha}\n" in (folder / "log.txt").read_text()
        assert [step for step, _ in trial["intermediate"]] == [0, 1, 2, 3]
        assert trial["figures"] == {"result": trial["value"], "epochs": 4.0}
        assert trial["intermediate"][-1][1] == trial["value"]
        assert json.loads((folder / "parameter.cfg").read_text())["parameters"] == trial["values"]
    assert len({trial["value"] for trial in result["trials"]}) > 1, "the parameters reached the training"
    page = (place / "out" / "report.html").read_text()
    assert "On the way" in page
    assert "sweep of python trial.py" in page


def test_options_and_calls_say_the_same(place: Path) -> None:
    space = {**SPACE, "x": {"_type": "normal", "_value": [0, 1]}}
    sweep = command_sweep(
        PROBE, vary=space, command="cd sub && python ../trial.py {params}", trials=6, set={"note": "it's $HOME"}
    )
    (place / "sub").mkdir()
    result = run_sweep(sweep, Path("out"))
    assert [t["status"] for t in result["trials"]] == ["complete"] * 6
    branches = set()
    for trial in result["trials"]:
        told = json.loads((place / "out" / trial["folder"] / "told.json").read_text())
        given = told["params"]
        assert given == {"note": "it's $HOME", **nested(space, trial["values"])}
        assert told["current"] == given
        assert (told["trial"], told["number"]) == (f"trial-{trial['index']:04d}", trial["index"])
        assert told["cwd"] == str(place / "sub")
        options = dict(zip(told["argv"][::2], told["argv"][1::2], strict=True))
        assert options["--note"] == "it's $HOME"
        assert float(options["--x"]) == given["x"] == trial["drawn"]["x"] == trial["value"]
        assert options["--mode"] == (given["mode"] if isinstance(given["mode"], str) else json.dumps(given["mode"]))
        assert options["--optimizer"] == given["optimizer"]["_name"]
        assert ("--optimizer.momentum" in options) == ("momentum" in given["optimizer"])
        branches.add(options["--optimizer"])
    assert branches == {"sgd", "adam"}
    assert "--optimizer " in result["best"]["command"]
    render(read_result(Path("out")))


FAILURES: list[tuple[str, str]] = [
    ("import sys\nprint('what happened')\nsys.exit(3)", "the command ended with code 3; its last lines: what happened"),
    ("raise ValueError('no such thing')", "ValueError: no such thing"),
    ("import nni\nnni.report_intermediate_result(1)", "without nni.report_final_result (1 intermediate results)"),
    ("import nni\nnni.report_final_result('good')", "reported 'good', in which result is no number"),
    ("import nni\nnni.report_final_result({'accuracy': 1})", "reported {'accuracy': 1}, in which result is no number"),
    ("import nni\nnni.report_final_result(float('nan'))", "metric result is nan"),
    ("import nni\nnni.report_final_result(object())", "TypeError"),
    ("import nni\nnni.mutate", "no attribute 'mutate'"),
]


def test_a_failing_trial_is_recorded_with_its_reason(place: Path) -> None:
    """Every kind of failure, and one trial that is well, in one sweep that goes on past them all."""
    scripts = {**{f"s{i}": script for i, (script, _) in enumerate(FAILURES)}, "well": "import nni\n"
               "nni.report_final_result({'result': 2, 'default': 1})"}  # fmt: skip
    for name, script in scripts.items():
        (place / f"{name}.py").write_text(script)
    vary = {"script": {"_type": "choice", "_value": list(scripts)}}
    runner = "import runpy, nni\nrunpy.run_path(nni.get_next_parameter()['script'] + '.py')"
    result = run_sweep(command_sweep(runner, vary=vary, trials=20, workers=2), Path("out"))
    assert len(result["trials"]) == len(scripts), "every combination has been tried"
    reasons = {t["values"]["script"]: t["reason"] for t in result["trials"]}
    for i, (_, said) in enumerate(FAILURES):
        assert said in reasons[f"s{i}"]
    assert result["best"]["values"] == {"script": "well"}
    assert result["best"]["value"] == 2, "a figure that is called like the metric is the metric"
    assert "On the way" in render(read_result(Path("out")))


def test_a_sweep_in_which_nothing_worked_says_why(place: Path) -> None:
    with pytest.raises(StudyError, match="All 2 trials failed: the command ended with code 1"):
        run_sweep(command_sweep("raise SystemExit(1)", trials=2), Path("out"))


def test_metrics_may_be_numpy_numbers(place: Path) -> None:
    script = "import nni, numpy\nnni.report_final_result({'default': numpy.float32(0.5), 'n': numpy.int64(3)})"
    trial = only(run_sweep(command_sweep(script, trials=1), Path("out")))
    assert trial["figures"] == {"result": 0.5, "n": 3.0}


# ---- NNI itself ---------------------------------------------------------------------------------------


def test_the_module_needs_the_standard_library_only(place: Path) -> None:
    begin(place, 4, {"x": 1})
    script = "import nni; p = nni.get_next_parameter(); nni.report_final_result(p['x'] + 1); print(nni.get_trial_id())"
    environment = {"PYTHONPATH": str(STANDIN), "NNI_SYS_DIR": str(place), "NNI_TRIAL_JOB_ID": "me"}
    done = subprocess.run([sys.executable, "-S", "-s", "-c", script], env=environment, check=True, capture_output=True)
    assert done.stdout == b"me\n"
    assert read_reports(place).finals == [2]
    del environment["NNI_SYS_DIR"], environment["NNI_TRIAL_JOB_ID"]
    script = "import nni; print(nni.get_next_parameter(), nni.get_trial_id()); nni.report_final_result(1)"
    done = subprocess.run([sys.executable, "-S", "-s", "-c", script], env=environment, check=True, capture_output=True)
    assert done.stdout == b"{} STANDALONE\n"


def test_the_rest_of_nni_is_its_own(place: Path) -> None:
    """A script that uses NNI's model spaces and serialiser beside the calls of a trial."""
    pytest.importorskip("nni")
    script = """
import nni
from nni.trial import report_intermediate_result
import nni.mutable
from nni.common.hpo_utils import format_search_space
params = nni.get_next_parameter()
choice = nni.choice("layers", [1, 2, 3])
assert isinstance(choice, nni.mutable.Categorical), type(choice)
assert nni.load(nni.dump({"a": 1})) == {"a": 1}
assert nni.__version__.startswith("3"), nni.__version__
import nni.nas.nn.pytorch as space


class Mine(space.ModelSpace):
    def __init__(self):
        super().__init__()
        self.layer = space.LayerChoice([space.MutableLinear(2, 3), space.MutableLinear(2, 4)], label="x")


assert "x" in Mine().simplify()
report_intermediate_result(0.5)
nni.report_final_result(params["x"])
"""
    trial = only(run_sweep(command_sweep(script, trials=1), Path("out")))
    assert trial["status"] == "complete", trial["reason"]
    assert trial["intermediate"] == [[0, 0.5]]


def test_nni_itself_speaks_the_same_files(place: Path) -> None:
    """A trial whose Python does not look at PYTHONPATH finds NNI instead of the stand-in."""
    pytest.importorskip("nni")
    script = """
import os, nni
assert "standin" not in nni.__file__
params = nni.get_next_parameter()
nni.report_intermediate_result({"default": 0.25, "loss": 2})
nni.report_final_result(params["x"])
"""
    trial = only(run_sweep(command_sweep(script, trials=1, command="python -E trial.py"), Path("out")))
    assert trial["status"] == "complete", trial["reason"]
    assert trial["value"] == trial["values"]["x"]
    assert trial["intermediate"] == [[0, 0.25]]


# What the published script reads; its own data are a download.
DIGITS = """
import torch
from sklearn.datasets import load_digits


class FashionMNIST(torch.utils.data.Dataset):
    def __init__(self, root, train, download, transform):
        images, labels = load_digits(return_X_y=True)
        images = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
        images = torch.nn.functional.interpolate(images, size=(28, 28))
        kept = slice(0, 600) if train else slice(1500, None)
        self.images, self.labels = images[kept], labels[kept].tolist()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.images[i], self.labels[i]
"""


def test_the_published_trial_of_nni_runs_unchanged(place: Path) -> None:
    """The example of ``nnictl hello`` and of NNI's first tutorial, as its package ships it."""
    assets = pytest.importorskip("nni_assets")
    published = Path(assets.__path__[0], "hello_hpo")
    shutil.copy(published / "model.py", place)
    (place / "torchvision").mkdir()
    (place / "torchvision" / "__init__.py").write_text("")
    (place / "torchvision" / "datasets.py").write_text(DIGITS)
    (place / "torchvision" / "transforms.py").write_text("def ToTensor():\n    return None\n")
    write_space(place, {
        "features": {"_type": "choice", "_value": [128, 256]},
        "lr": {"_type": "loguniform", "_value": [0.0001, 0.1]},
        "momentum": {"_type": "uniform", "_value": [0, 1]},
    })  # fmt: skip
    said = swept(place, "--nni", "search_space.json", "--command", "python model.py", "--trials", "2",
                 "--set", "sampler=RandomSampler")  # fmt: skip
    assert (place / "model.py").read_bytes() == (published / "model.py").read_bytes()
    assert "2 complete" in said
    trials = read_result(place / "runs" / "search_space")["trials"]
    assert all(len(trial["intermediate"]) == 5 for trial in trials)
    assert all(trial["value"] == trial["intermediate"][-1][1] for trial in trials)
    assert trials[0]["value"] > 0.5, "digits are learnt"


# ---- ending trials early ------------------------------------------------------------------------------


RUNNING = '''
import pathlib, time, nni
params = nni.get_next_parameter()
for step in range(60):
    nni.report_intermediate_result(params["x"])
    if params["x"] <= 5:  # the first ones are quick; those that come after are worse, and would take a minute
        continue
    time.sleep(1)
nni.report_final_result(params["x"])
'''


def test_intermediate_results_end_a_trial(place: Path) -> None:
    """Those that stand worse than the median are ended on their way, with all that they have started."""
    sweep = command_sweep(
        RUNNING, vary={"x": list(range(1, 9))}, direction="minimize", trials=8, workers=2, sampler="BruteForceSampler",
        pruner="MedianPruner", pruner_settings={"n_startup_trials": 3}, seed=2,
    )  # fmt: skip
    record = prepare(sweep, Path("out"))
    with record.open() as ledger:  # what is known beforehand: the good ones
        for _ in range(3):
            entry = ledger.ask()
            assert entry is not None
            ledger.report(entry, dict.fromkeys(range(60), 1.0))
            ledger.complete(entry, {"result": 1.0}, 1.0, 1.0)
    result = run_sweep(sweep, Path("out"), resume=True)
    later = [trial for trial in result["trials"] if trial["index"] >= 3]
    assert {t["status"] for t in later if t["values"]["x"] > 5} == {"pruned"}
    assert len(later) == 5
    for trial in later:
        if trial["status"] == "pruned":
            assert trial["value"] is None
            assert trial["seconds"] < 60
            assert trial["intermediate"][0] == [0, float(trial["values"]["x"])]
            assert trial["reason"].startswith("at step ")
        else:
            assert len(trial["intermediate"]) == 60
    assert "pruned" in render(read_result(Path("out")))


COUNT = '''
import time
from nas.sweep.reports import report

def count(values, folder):
    for step in range(200):
        report(folder, step, values["x"])
        if values["x"] > 0:
            time.sleep(0.3)
    return values["x"]
'''


def test_a_function_may_be_ended_as_well(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "counting.py").write_text(COUNT)
    monkeypatch.syspath_prepend(place)
    sweep = load_sweep({
        "name": "count", "function": "counting:count", "vary": {"x": [-2, -1, 0, 7]}, "metric": "loss",
        "direction": "minimize", "trials": 4, "pruner": "ThresholdPruner", "pruner_settings": {"upper": 5.0},
    })  # fmt: skip
    result = run_sweep(sweep, Path("out"))
    assert {t["values"]["x"]: t["status"] for t in result["trials"]} == {
        -2: "complete", -1: "complete", 0: "complete", 7: "pruned",
    }  # fmt: skip
    assert all(len(t["intermediate"]) == 200 for t in result["trials"] if t["status"] == "complete")


def test_the_record_asks_the_pruner_step_by_step(tmp_path: Path) -> None:
    sweep = load_sweep({
        "name": "toy", "function": "toy:f", "vary": {"x": [1, 2, 3]}, "metric": "y",
        "pruner": "MedianPruner", "pruner_settings": {"n_startup_trials": 1, "n_warmup_steps": 1},
    })  # fmt: skip
    runner = FunctionRunner("toy:f", "y", sweep.vary)
    with Record(tmp_path, sweep, parameters(sweep), runner, {}).open() as ledger:
        first, second = ledger.ask(), ledger.ask()
        assert first is not None
        assert second is not None
        assert not ledger.report(first, {0: 0.5, 1: 0.6, 2: math.nan})
        ledger.complete(first, {"y": 0.6}, 1.0, 1.0)
        assert not ledger.report(second, {0: 0.1}), "within the warm-up"
        assert ledger.report(second, {0: 0.1, 1: 0.2})
        told = ledger.prune(second, 1.0, 2.0)
        assert (told.status, told.value, told.reason) == ("pruned", None, "at step 1, with 0.2")
    with Record(tmp_path, sweep, parameters(sweep), runner, {}).open() as ledger:
        assert [entry.status for entry in ledger.entries()] == ["complete", "pruned"]
        assert ledger.entries()[1].intermediate == {0: 0.1, 1: 0.2}


def test_a_torn_report_is_left_for_the_next_time(tmp_path: Path) -> None:
    assert read_reports(tmp_path).intermediate == {}
    report(tmp_path, 0, 1.0)
    report(tmp_path, 1, math.inf)
    metrics = tmp_path / ".nni" / "metrics"
    whole = metrics.read_bytes()
    assert read_reports(tmp_path).intermediate == {0: 1.0, 1: math.inf}
    for cut in (1, 5, 20):
        metrics.write_bytes(whole[:-cut])
        assert read_reports(tmp_path).intermediate == {0: 1.0}
    metrics.write_bytes(whole + b"rubbish")
    assert read_reports(tmp_path).intermediate == {0: 1.0, 1: math.inf}


# ---- kills --------------------------------------------------------------------------------------------


def held(place: Path, trials: int) -> tuple[subprocess.Popen[str], dict[int, list[int]]]:
    """A sweep whose trials wait, and the processes of each: the script's, and what it has started."""
    (place / "trial.py").write_text(PROBE)
    (place / "mode").write_text("hold")
    write_space(place, {"x": {"_type": "uniform", "_value": [0, 1]}})
    process = start_sweep(place, "--nni", "search_space.json", "--command", "python trial.py", "--trials", str(trials),
                          "--workers", "2", "--out", "out")  # fmt: skip

    def begun() -> dict[int, list[int]] | None:
        found = {int(child.parent.name): child for child in place.glob("out/trials/*/child") if child.read_text()}
        return {
            i: [*map(int, (child.parent / "attempts").read_text().split()), int(child.read_text())]
            for i, child in found.items()
        } if len(found) == 2 else None  # fmt: skip

    return process, until(begun)


def resume(place: Path, *more: str) -> dict[str, Any]:
    swept(place, "--nni", "search_space.json", "--command", "python trial.py", "--workers", "2", "--out", "out",
          "--resume", *more)  # fmt: skip
    return read_result(place / "out")


@pytest.mark.parametrize("how", ["interrupt", "kill"])
def test_a_command_ends_with_its_sweep_and_is_gone_on_with(place: Path, how: str) -> None:
    process, pids = held(place, 3)
    if how == "interrupt":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
        said, _ = process.communicate(timeout=100)
        assert process.returncode == 130
        assert "go on with --resume" in said
        assert "Traceback" not in said
    else:
        process.kill()
        process.communicate()
    until(lambda: not any(alive(pid) for found in pids.values() for pid in found))
    assert len(list(place.glob("out/trials/*/saved"))) == (2 if how == "interrupt" else 0), "it may save what it has"
    (place / "mode").unlink()
    result = resume(place, "--trials", "3")
    assert [t["status"] for t in result["trials"]] == ["complete"] * 3
    assert not any(t["deaths"] for t in result["trials"])
    for trial in result["trials"]:
        folder = place / "out" / trial["folder"]
        assert len((folder / "attempts").read_text().split()) == (2 if trial["index"] in pids else 1)
        assert len(read_reports(folder).finals) == 1, "what an earlier attempt reported is forgotten"


def test_a_killed_command_is_tried_once_more(place: Path) -> None:
    process, pids = held(place, 2)
    os.kill(pids[0][0], signal.SIGKILL)
    until(lambda: not alive(pids[0][1]))  # what it had started goes with it
    until(lambda: len((place / "out/trials/0000/attempts").read_text().split()) == 2)
    (place / "mode").unlink()
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 0, said
    assert "it is tried once more" in said
    trials = {t["index"]: t for t in read_result(place / "out")["trials"]}
    assert {i: (t["status"], t["deaths"]) for i, t in trials.items()} == {0: ("complete", 1), 1: ("complete", 0)}


@pytest.mark.slow
def test_nobody_begins_a_trial_that_an_orphan_still_works_on(place: Path) -> None:
    """The command is killed together with the trial's process, and the script outlives both."""
    process, pids = held(place, 2)
    workers = [int(Path(f"/proc/{found[0]}/stat").read_text().rpartition(")")[2].split()[1]) for found in pids.values()]
    groups = {os.getpgid(found[0]) for found in pids.values()}
    assert groups.isdisjoint({os.getpgid(process.pid)})
    for pid in {process.pid, *groups, *workers} - {found[0] for found in pids.values()}:
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert all(alive(found[0]) for found in pids.values())
    second = start_sweep(place, "--nni", "search_space.json", "--command", "python trial.py", "--trials", "2",
                         "--workers", "2", "--out", "out", "--resume")  # fmt: skip
    time.sleep(4)
    assert all(len((place / f"out/trials/{i:04d}/attempts").read_text().split()) == 1 for i in pids)
    (place / "mode").unlink()
    said, _ = second.communicate(timeout=100)
    assert second.returncode == 0, said
    assert [t["status"] for t in read_result(place / "out")["trials"]] == ["complete"] * 2
