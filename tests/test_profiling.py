"""nas profile: here, interrupted, from a bundle; with everything measured or a part of it."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import SMALL

from nas import profiling
from nas.cli import main
from nas.errors import ExperimentError, TableError
from nas.experiment import load_experiment
from nas.latency import AdditiveEstimator, LatencyTable
from nas.latency.checkpoint import load as load_checkpoint
from nas.latency.plan import choose_keys
from nas.latency.profile import describe
from nas.profiling import Scenario
from nas.student.tables import partial_of

SETTINGS = [f"{key}={json.dumps(value)}" for key, value in SMALL["space"].items() if key != "name"]  # type: ignore[attr-defined]
ARGUMENTS = ["--space", "mobilenet", "--input", "1x8x8", "--classes", "10", *(f"--set={s}" for s in SETTINGS)]


def experiment_file(folder: Path) -> str:
    """The small experiment, which is profiled with few networks."""
    path = folder / "small.yaml"
    path.write_text(json.dumps({**SMALL, "table": {"seconds": 1.0, "nets": 8}}))
    return str(path)


def subject(minutes: float = 0.25) -> profiling.Subject:
    found = profiling.of_space("mobilenet", SETTINGS, (1, 8, 8), 10, Scenario(), minutes)
    return profiling.Subject(**{**vars(found), "nets": 10})


def test_a_space_without_data(tmp_path: Path) -> None:
    path, table = profiling.profile_here(subject(), tmp_path / "table.json")
    space = subject().space
    assert set(table.entries) == set(space.keys())
    assert all(entry.measured for entry in table.entries.values())
    assert LatencyTable.load(path) == table
    assert not list(tmp_path.glob("*.partial*"))
    assert table.energy
    prices = AdditiveEstimator(space, table).price(space.sample(np.random.default_rng(0), 100))
    assert (prices > 0).all()


def test_time_for_a_few_parts_only(tmp_path: Path) -> None:
    """What is not measured is interpolated, says so, and the calibration nets were predicted from such parts."""
    wide = ["resolutions=[8,12,16,24]", "kernels=[3,5]", "expansions=[2,3,4]", "widths=[[8,16],[16,24,32],[32,48,64]]"]
    found = profiling.of_space("mobilenet", wide, (1, 24, 24), 10, Scenario(), 1.0)
    all_parts = found.space.keys()
    notes: list[str] = []
    keys = choose_keys(found.space, found.device, 1.0, [], note=notes.append)
    assert 40 <= len(keys) < len(all_parts)
    assert "interpolated between them" in notes[0]
    short = profiling.Subject(**{**vars(found), "nets": 12, "effort": profiling.Effort(2.0)})
    _, table = profiling.profile_here(short, tmp_path / "table.json")
    guessed = {key: entry for key, entry in table.entries.items() if not entry.measured}
    assert set(table.entries) == set(all_parts)
    assert len(guessed) == table.interpolation["interpolated"] > 0
    assert table.interpolation["held_out"]["parts"] > 0
    assert all(entry.timing.n == 0 and entry.uncertainty > 0 for entry in guessed.values())
    assert f"({len(guessed)} of them interpolated)" in describe(table)
    assert LatencyTable.load(tmp_path / "table.json") == table


def test_ctrl_c_keeps_what_was_measured_and_resume_goes_on(tmp_path: Path) -> None:
    """A real process is interrupted in the middle of its rounds."""
    out = tmp_path / "table.json"
    arguments = ["profile", experiment_file(tmp_path), "--set", "table.noise=0", "--out", str(out)]
    command = [sys.executable, "-m", "nas", *arguments]
    terminal, other_end = pty.openpty()  # where progress is drawn as it happens
    with subprocess.Popen([*command, "--minutes", "5"], stdout=other_end) as process:
        os.close(other_end)
        shown = b""
        while b"round " not in shown:
            shown += os.read(terminal, 1024)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # the end of a terminal whose program is gone
            while os.read(terminal, 1024):
                pass
        assert process.wait(60) == 130
    os.close(terminal)
    kept, _ = load_checkpoint(partial_of(out))
    assert kept.rounds >= 1
    assert not out.exists()
    assert main([*arguments, "--minutes", "0.01", "--resume"]) == 0
    table = LatencyTable.load(out)
    assert table.protocol["rounds"] >= kept.rounds
    assert not partial_of(out).exists()


def test_resume_refuses_what_was_measured_of_something_else(tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    from test_latency_checkpoint import seen

    from nas.latency import checkpoint

    checkpoint.save(partial_of(out), seen(), "another")
    with pytest.raises(TableError, match="another space, device or set of networks"):
        profiling.profile_here(subject(), out, resume=True)


def test_a_bundle_becomes_the_same_kind_of_table(tmp_path: Path) -> None:
    bundle, out = tmp_path / "bundle", tmp_path / "table.json"
    assert main(["profile", experiment_file(tmp_path), "--minutes", "0.5", "--bundle", str(bundle)]) == 0
    with pytest.raises(TableError, match=r"run\.py"):
        profiling.read(bundle, out)
    subprocess.run([sys.executable, "run.py", "--seconds", "2"], cwd=bundle, check=True, capture_output=True)
    assert main(["profile", "--from-bundle", str(bundle), "--name", "board", "--out", str(out)]) == 0
    table = LatencyTable.load(out)
    assert table.name == "mobilenet-board"
    assert set(table.entries) == set(subject().space.keys())
    assert table.device["fingerprint"] == subject().device.fingerprint
    assert len(table.nets) == 8
    assert table.errors["size_bytes"].mape < 0.1
    # The measurements travel alone too.
    alone = tmp_path / "measurements.json"
    alone.write_bytes((bundle / "measurements.json").read_bytes())
    _, again = profiling.read(alone, tmp_path / "again.json", name="board")
    assert again.entries == table.entries


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "either an experiment or --space"),
        (["digits", "--space", "mobilenet"], "either an experiment or --space"),
        (["--space", "mobilenet", "--input", "3by4"], "a shape such as 3x224x224"),
        (["--space", "mobilenet", "--set", "resolutionz=[8]"], "resolutionz"),
        (["--space", "mobilenett"], "mobilenet"),
        (["--space", "mobilenet", "--runtime", "abacus"], "Unknown runtime"),
        (["--space", "mobilenet", "--provider", "abacus"], "CPUExecutionProvider"),
        (["--space", "mobilenet", "--bundle", "x", "--ssh", "y"], "exclude each other"),
        (["--space", "mobilenet", "--set", "bits=[32]", "--runtime", "torch", "--bundle", "x"], "by onnxruntime"),
        (["--from-bundle", "nowhere"], "nowhere"),
        (["--space", "mobilenet", "--threads", "0"], "--threads 0"),
        (["--space", "mobilenet", "--batch", "-2"], "--batch -2"),
        (["--space", "mobilenet", "--minutes", "0"], "--minutes 0"),
        (["--space", "mobilenet", "--classes", "0"], "--classes 0"),
        (["--space", "mobilenet", "--nets", "3"], "8 to 30"),
        (["--space", "mobilenet", "--keys", "nowhere"], "nowhere cannot be read"),
        (["--space", "mobilenet", "--runtime", "torch"], "executes no boundary and no int8 parts"),
    ],
)
def test_what_a_user_can_get_wrong(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    assert main(["profile", *arguments]) == 2
    assert complaint in capsys.readouterr().err


def test_the_scenario_is_the_options_before_the_experiments() -> None:
    experiment = load_experiment({**SMALL, "device": {"threads": 2, "batch": 4}})
    found = profiling.of_experiment(experiment, Scenario(batch=8, name="mine"), None)
    assert (found.device.threads, found.device.batch, found.device.name) == (2, 8, "mine")
    assert found.effort.seconds == SMALL["table"]["seconds"]  # type: ignore[index]
    assert profiling.of_experiment(experiment, Scenario(), 0.5).effort.seconds == 30
    with pytest.raises(ExperimentError, match="shape"):
        profiling.parse_shape("0x3")
