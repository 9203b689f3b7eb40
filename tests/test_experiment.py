"""The experiment file: whatever is wrong with it is said by the name of its key."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from nas import content
from nas.errors import ContentError, ExperimentError
from nas.experiment import Experiment, amount, load_any, load_experiment

MINIMAL: dict[str, Any] = {"name": "mine", "task": {"data": "digits"}, "space": {"name": "mobilenet"}}


def having(**sections: Any) -> dict[str, Any]:
    return {**MINIMAL, **sections}


@pytest.mark.parametrize("name", list(content.available("experiments")))
def test_bundled_experiments_are_valid(name: str) -> None:
    experiment = load_any(name)
    assert experiment.name == name
    again = load_any(experiment.plain())
    assert again == experiment


def test_the_minimum_and_its_defaults() -> None:
    experiment = load_experiment(MINIMAL)
    assert experiment.task.kind == "classification"
    assert experiment.search.batch == 4
    assert experiment.search.seconds == math.inf
    assert experiment.budget.latency is None
    assert experiment.table.path == "auto"


def test_a_plugins_own_keys_are_kept_for_it() -> None:
    experiment = load_experiment(having(strategy={"kind": "evolution", "population": 8}, reward={"w": -0.1}))
    assert experiment.strategy.settings == {"population": 8}
    assert experiment.reward.settings == {"w": -0.1}
    assert experiment.task.settings == {}


# ---- what is wrong is named --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (having(serch={}), r"Unknown key 'serch'[^$]*one of name, seed, task"),
        (having(search={"trails": 3}), r"Unknown key 'search\.trails'[^$]*one of trials, seconds, batch, workers"),
        (having(finalists={"n": 3}), r"Unknown key 'finalists\.n'"),
        (having(search={"trials": 0}), r"search\.trials is 0 [^$]*greater than or equal to 1"),
        (having(search={"trials": "many"}), r"search\.trials is 'many'"),
        (having(search={"workers": "all"}), r"search\.workers is 'all'"),
        (having(search={"workers": -1}), r"search\.workers is -1"),
        (having(search={"retries": 2}), r"search\.retries is 2"),
        (having(search={"enqueue": [3]}), r"search\.enqueue\.0 is 3"),
        (having(search={"enqueue": [{"width": [3]}]}), r"search\.enqueue\.0\.width is \[3\]"),
        (having(search={"earlier": "runs/a"}), r"search\.earlier is 'runs/a'"),
        (having(search=5), r"search is 5"),
        (having(search=None), r"search is None"),
        (having(strategy={"kind": 5}), r"strategy\.kind is 5"),
        (having(strategy=5), r"strategy is 5"),
        (having(study={"storage": 5}), r"study\.storage is 5"),
        (having(seed=-1), r"seed is -1"),
        (having(seed=1.5), r"seed is 1\.5"),
        (having(name="no spaces"), r"name is 'no spaces'"),
        (having(reward={"target": 0}), r"reward\.target is 0"),
        (having(baselines=["grid"]), r"baselines\.0 is 'grid'[^$]*'random' or 'uniform'"),
        (
            having(training={"epochs": 2, "compressed_epochs": 3}),
            r"training is [^$]*compressed_epochs 3 exceeds epochs 2",
        ),
        (
            having(finalists={"epochs": 2, "compressed_epochs": 3}),
            r"finalists is [^$]*compressed_epochs 3 exceeds epochs 2",
        ),
        (having(teacher={"model": "a:b"}), r"teacher is [^$]*model and weights go together"),
        (having(table={"others": {"my phone": "a.json"}}), r"table\.others\.my phone"),
        (having(table={"others": {"pixel": 3}}), r"table\.others\.pixel is 3"),
        (having(budget={"others": {"pixel": 12.0}}), r"budget is [^$]*table\.others only, which lacks 'pixel'"),
        (having(table={"others": {"a": "a.json"}}, budget={"others": {"b": 1}}), r"budget is [^$]*lacks 'b'"),
        (having(table={"others": {"a": "a.json"}}, budget={"others": {"a": 0}}), r"budget\.others\.a is 0"),
        (having(table={"others": {"a": "a.json"}}, budget={"others": {"a": "30%"}}), r"budget\.others\.a is '30%'"),
        (having(budget={"percentile": "p99"}), r"budget\.percentile is 'p99'[^$]*'p50' or 'p95'"),
        ({"name": "mine", "space": {"name": "mobilenet"}}, r"Key 'task' is missing"),
        (having(task={"kind": "classification"}), r"Key 'task\.data' is missing"),
        (having(space={}), r"Key 'space\.name' is missing"),
        ({"task": MINIMAL["task"], "space": MINIMAL["space"]}, r"Key 'name' is missing"),
        ({}, r"Key 'name' is missing"),
    ],
)
def test_every_message_names_the_key(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        load_experiment(raw)


# ---- amounts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "wanted"), [(3, 3.0), (0.25, 0.25), ("30%", "30%"), (" 12.50 % ", "12.5%"), ("150%", "150%")]
)
def test_amounts(value: Any, wanted: float | str) -> None:
    assert amount(value) == wanted
    experiment = load_experiment(having(budget={"latency": value, "size": value}))
    assert experiment.budget.latency == experiment.budget.size == wanted
    assert type(experiment.budget.latency) is type(wanted)


@pytest.mark.parametrize("value", [0, -1, "30", "0%", "-5%", "1.2.3%", "%", "fast", True, math.nan, math.inf, [3]])
@pytest.mark.parametrize("key", ["latency", "size"])
def test_amounts_that_are_none(key: str, value: Any) -> None:
    with pytest.raises(ExperimentError, match=rf"budget\.{key} is "):
        load_experiment(having(budget={key: value}))


# ---- files -------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


MINIMAL_YAML = "task: {data: digits}\nspace: {name: mobilenet}\n"


def test_a_file_has_its_stem_for_a_name(tmp_path: Path) -> None:
    assert load_experiment(write(tmp_path / "night-run.yaml", MINIMAL_YAML)).name == "night-run"
    assert load_experiment(write(tmp_path / "other.yaml", "name: own\n" + MINIMAL_YAML)).name == "own"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: [unclosed\n", r"mine\.yaml is no valid YAML: [^$]*line"),
        ("a: b: c\n", r"mine\.yaml is no valid YAML"),
        ("- just\n- a list\n", r"mine\.yaml holds list[^$]*a mapping of keys"),
        ("", r"mine\.yaml holds NoneType"),
        (MINIMAL_YAML + "serach: {}\n", r"Unknown key 'serach' in .*mine\.yaml"),
    ],
)
def test_files_that_are_wrong_name_themselves(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        load_experiment(write(tmp_path / "mine.yaml", text))


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ExperimentError, match=r"mine\.yaml is no valid YAML"):
        load_experiment(path)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ContentError, match=r"No experiment 'digts'") as caught:
        load_experiment("digts")
    assert "digits" in str(caught.value)


# ---- --set -------------------------------------------------------------------------------------------


def test_overrides_are_yaml_values() -> None:
    raw = having(search={"trials": 5})
    kept = json.dumps(raw)
    experiment = load_experiment(
        raw,
        ["search.trials=7", "strategy.kind=reinforce", "strategy.lr=0.2", "baselines=[random]", "budget.latency=30%",
         " seed = 3", "device.name=my laptop", "study.storage=sqlite:///a=b.db"],
    )  # fmt: skip
    assert experiment.search.trials == 7
    assert experiment.strategy.settings == {"lr": 0.2}
    assert experiment.baselines == ("random",)
    assert experiment.budget.latency == "30%"
    assert experiment.seed == 3
    assert experiment.device.name == "my laptop"
    assert experiment.study.storage == "sqlite:///a=b.db"
    assert json.dumps(raw) == kept


def test_another_plugin_does_not_inherit_the_settings_of_the_first() -> None:
    raw = having(strategy={"kind": "evolution", "population": 8}, reward={"kind": "mnasnet_hard", "w": -2, "target": 3})
    experiment = load_experiment(raw, ["strategy.kind=reinforce", "reward.kind=tunas_absolute"])
    assert experiment.strategy.settings == {}
    assert experiment.reward.settings == {}
    assert experiment.reward.target == 3
    same = load_experiment(raw, ["strategy.kind=evolution"])
    assert same.strategy.settings == {"population": 8}


def test_another_name_of_the_device_keeps_its_threads() -> None:
    raw = having(device={"name": "desk", "threads": 4})
    assert load_experiment(raw, ["device.name=lap"]).device.threads == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trials", r"--set 'trials'[^$]*key=value"),
        ("=3", r"--set '=3'"),
        ("search.trials.more=3", r"'trials' is a value, not a section"),
        ("search.trials=[", r"no valid YAML value"),
        ("search.trails=3", r"Unknown key 'search\.trails'"),
        ("search.trials=soon", r"search\.trials is 'soon'"),
        ("serch.trials=3", r"Unknown key 'serch'"),
    ],
)
def test_bad_overrides(override: str, message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        load_experiment(having(search={"trials": 5}), [override])


# ---- identity ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    ["seed=1", "task.limit=100", "space.stem=[8,1]", "strategy.kind=random", "reward.w=-0.2", "budget.latency=20%",
     "search.batch=2", "search.enqueue=[{}]", "search.earlier=[runs/a]", "training.epochs=9", "teacher.epochs=3",
     "table.others.pixel=pixel.json"],
)  # fmt: skip
def test_what_a_resume_must_not_change(override: str) -> None:
    raw = having(strategy={"kind": "evolution"})
    assert load_experiment(raw, [override]).identity != load_experiment(raw).identity


@pytest.mark.parametrize(
    "override",
    ["name=other", "search.trials=99", "search.seconds=60", "search.workers=1", "search.retries=1", "finalists.count=1",
     "baselines=[]"],
)  # fmt: skip
def test_what_a_resume_may_change(override: str) -> None:
    assert load_experiment(MINIMAL, [override]).identity == load_experiment(MINIMAL).identity


def test_the_plain_form_is_strict_json() -> None:
    text = json.dumps(load_experiment(MINIMAL).plain(), allow_nan=False)
    assert isinstance(load_experiment(json.loads(text)), Experiment)
