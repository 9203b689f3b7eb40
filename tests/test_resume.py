"""Real searches in real processes, killed at random moments: the resumed study equals the uninterrupted one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import SMALL


def command(experiment: Path, run: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "nas", "search", str(experiment), "--out", str(run), "--debug", *more]


def trials(run: Path, arm: str = "search") -> list[dict[str, Any]]:
    """What the study holds, without what a clock decides."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    storage = JournalStorage(JournalFileBackend(str(run / "study.jsonl")))
    study = optuna.load_study(study_name=arm, storage=storage)
    found = []
    for trial in study.get_trials(deepcopy=False):
        facts = {k: v for k, v in trial.user_attrs.items() if k not in ("seconds", "elapsed")}
        found.append({**facts, "params": trial.params, "value": trial.value, "state": trial.state.name})
    return sorted(found, key=lambda trial: int(trial["index"]))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, str]]:
    """An experiment, its uninterrupted run, and an environment with the table and teacher cached."""
    folder = tmp_path_factory.mktemp("resume")
    environment = {**os.environ, "NAS_CACHE_DIR": str(folder / "cache")}
    experiment = folder / "small.yaml"
    experiment.write_text(json.dumps(SMALL))
    whole = folder / "whole"
    done = subprocess.run(command(experiment, whole), env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return experiment, whole, environment


def kill_when(run: Path, process: subprocess.Popen[str], lines: int, pause: float) -> bool:
    """kill -9 the search once its journal has grown to ``lines`` lines, ``pause`` seconds later."""
    journal = run / "study.jsonl"
    end = time.monotonic() + 300
    while time.monotonic() < end and process.poll() is None:
        if journal.exists() and journal.read_bytes().count(b"\n") >= lines:
            time.sleep(pause)
            break
        time.sleep(0.02)
    killed = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return killed


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_killed_and_resumed_equals_uninterrupted(
    prepared: tuple[Path, Path, dict[str, str]], tmp_path: Path, seed: int
) -> None:
    experiment, whole, environment = prepared
    rng = random.Random(seed)
    run = tmp_path / "run"
    kills = 0
    for lines in (4, 9):
        # A new session, so that the kill hits the parent alone: its workers must notice by themselves.
        process = subprocess.Popen(
            command(experiment, run, "--resume"), env=environment, text=True, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        kills += kill_when(run, process, lines + rng.randrange(4), rng.random() * 0.4)
    assert kills == 2, "the search was over before it could be killed"
    before = trials(run)
    journal = run / "study.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"op_code": 4, "trial')  # the line that a crash tore
    os.symlink(journal, f"{journal}.lock")  # and the lock that Optuna's own file backend would have left
    start = time.monotonic()
    done = subprocess.run(
        command(experiment, run, "--resume"), env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 120
    assert "torn by a crash" in done.stdout
    after = trials(run)
    assert [t for t in after if t["index"] in {b["index"] for b in before}] == before, "a finished candidate was lost"
    assert after == trials(whole)
    assert trials(run, "random") == trials(whole, "random")
    assert json.loads((run / "summary.json").read_text())["trials"]


@pytest.mark.slow
def test_halving_with_outcomes_from_elsewhere_is_resumed_exactly(
    prepared: tuple[Path, Path, dict[str, str]], tmp_path: Path
) -> None:
    """Trainings of several lengths, an enqueued candidate and an earlier run: killed and resumed, nothing differs."""
    _, whole, environment = prepared
    experiment = tmp_path / "halving.yaml"
    strategy = {"kind": "halving:evolution", "eta": 2, "wrapped": {"population": 4, "sample": 2}}
    search = {**SMALL["search"], "trials": 5, "enqueue": [{"kd_weight": 0.5}], "earlier": [str(whole)]}
    experiment.write_text(json.dumps({**SMALL, "name": "halving", "strategy": strategy, "search": search}))
    runs = tmp_path / "one", tmp_path / "two"
    process = subprocess.Popen(
        command(experiment, runs[0], "--resume"), env=environment, text=True, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert kill_when(runs[0], process, 7, 0.2), "the search was over before it could be killed"
    for run in runs:
        done = subprocess.run(
            command(experiment, run, "--resume"), env=environment, capture_output=True, text=True, timeout=500
        )
        assert done.returncode == 0, done.stderr
    found = trials(runs[0])
    assert found == trials(runs[1])
    assert found[0]["source"] == "enqueued"
    assert {t["fidelity"] for t in found} == {0.25, 0.5, 1.0}
    summary = json.loads((runs[0] / "summary.json").read_text())
    manifest = json.loads((runs[0] / "student" / "manifest.json").read_text())
    assert 5 <= manifest["search"]["trainings"] < 6
    assert manifest["search"]["evaluated"] == len(found) > 6
    of_full = {t["index"] for t in found if t["fidelity"] == 1}
    assert {f["index"] for f in summary["finalists"] if f["arm"] == "search"} <= of_full
    assert "full trainings" in (runs[0] / "report.html").read_text()


def test_a_second_process_is_refused_and_a_changed_experiment_too(
    prepared: tuple[Path, Path, dict[str, str]], tmp_path: Path
) -> None:
    experiment, whole, environment = prepared
    again = subprocess.run(command(experiment, whole), env=environment, capture_output=True, text=True, timeout=120)
    assert again.returncode == 2
    assert "--resume" in again.stderr
    changed = subprocess.run(
        command(experiment, whole, "--resume", "--set", "training.epochs=4"),
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert changed.returncode == 2
    assert "training" in changed.stderr
    assert "another experiment" in changed.stderr
    assert "epochs: 4" not in (whole / "experiment.yaml").read_text(), "a refused resume leaves the run as it was"


def test_workers_do_not_change_the_search(prepared: tuple[Path, Path, dict[str, str]], tmp_path: Path) -> None:
    experiment, whole, environment = prepared
    run = tmp_path / "one"
    done = subprocess.run(
        command(experiment, run, "--set", "search.workers=1"),
        env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert trials(run) == trials(whole)
