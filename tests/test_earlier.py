"""Earlier runs: their outcomes are read, kept, and refused where they are of another space."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import TinySpace, plain
from test_study import failed, trial

from nas.earlier import earlier_trials
from nas.errors import StudyError
from nas.experiment import Experiment, load_experiment
from nas.study import Study


def experiment(**changes: Any) -> Experiment:
    raw: dict[str, Any] = {"name": "now", "task": {"data": "digits"}, "space": {"name": "mobilenet"}}
    return load_experiment({**raw, **changes})


@pytest.fixture
def before(tmp_path: Path) -> Path:
    """A run folder with three trials in two arms, one of them failed."""
    folder = tmp_path / "before"
    folder.mkdir()
    (folder / "experiment.yaml").write_text(yaml.safe_dump(experiment(name="then").plain()))
    search = Study(folder / "study.jsonl", "search", TinySpace(), {})
    search.add(trial(0, fidelity=0.5))
    search.add(failed(1))
    Study(folder / "study.jsonl", "random", TinySpace(), {}).add(trial(2))
    return folder


def test_outcomes_are_read_and_kept(before: Path, tmp_path: Path) -> None:
    now = experiment(search={"earlier": [str(before)]})
    said: list[str] = []
    found = earlier_trials(now, TinySpace(), tmp_path, said.append)
    assert said == []
    assert {t.genome for t in found} == {trial(i).genome for i in range(3)}
    assert sorted((t.status, t.fidelity) for t in found) == [("complete", 0.5), ("complete", 1.0), ("failed", 1.0)]
    by_genome = {t.genome: t for t in found}
    assert by_genome[trial(0).genome].quality == trial(0).quality
    assert math.isnan(by_genome[trial(1).genome].quality)
    # The earlier run goes on, or is deleted: a resume has what it began with.
    Study(before / "study.jsonl", "search", TinySpace(), {}).add(trial(9))
    assert plain(earlier_trials(now, TinySpace(), tmp_path, said.append)) == plain(found)
    (before / "study.jsonl").unlink()
    assert plain(earlier_trials(now, TinySpace(), tmp_path, said.append)) == plain(found)
    assert earlier_trials(experiment(), TinySpace(), tmp_path / "other", said.append) == []


def test_other_data_or_another_training_are_said_each_time(before: Path, tmp_path: Path) -> None:
    now = experiment(search={"earlier": [str(before)]}, training={"epochs": 30})
    for _ in range(2):
        said: list[str] = []
        earlier_trials(now, TinySpace(), tmp_path, said.append)
        assert said == [f"the earlier run {before} had another training: qualities may differ"]


def test_a_study_in_another_storage(tmp_path: Path) -> None:
    folder = tmp_path / "before"
    folder.mkdir()
    url = f"sqlite:///{tmp_path}/trials.db"
    (folder / "experiment.yaml").write_text(yaml.safe_dump(experiment(name="then", study={"storage": url}).plain()))
    Study(url, "then-before-search", TinySpace(), {}).add(trial(0))
    Study(url, "then-another-search", TinySpace(), {}).add(trial(1))
    found = earlier_trials(experiment(search={"earlier": [str(folder)]}), TinySpace(), tmp_path, print)
    assert [t.genome for t in found] == [trial(0).genome]


def test_what_is_no_run(before: Path, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="is no run folder"):
        earlier_trials(experiment(search={"earlier": [str(tmp_path)]}), TinySpace(), tmp_path, print)
    (before / "study.jsonl").unlink()
    Study(before / "study.jsonl", "search", TinySpace(), {})
    with pytest.raises(StudyError, match="holds no trials"):
        earlier_trials(experiment(search={"earlier": [str(before)]}), TinySpace(), tmp_path, print)
    assert not (tmp_path / "earlier.json").exists()


def test_a_run_over_another_space_is_named_by_its_choices(before: Path, tmp_path: Path) -> None:
    space = TinySpace()
    space.choices = tuple(c for c in space.choices if c.name != "prune")
    with pytest.raises(StudyError, match="another space than 'tiny': prune differ"):
        earlier_trials(experiment(search={"earlier": [str(before)]}), space, tmp_path, print)
