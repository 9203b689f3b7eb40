"""Bundles: measured where there is numpy and onnxruntime and nothing else, interrupted, damaged, and read back."""

from __future__ import annotations

import ast
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bare import bare_python

import nas
from nas.errors import TableError
from nas.files import read_sealed, write_sealed
from nas.latency import Device
from nas.latency.bundle import CODE, PARTIAL, RESULT, SCENARIO, read_measurements, write_bundle
from nas.latency.measure import MIN_ROUNDS
from nas.latency.profile import YARDSTICK
from nas.latency.runtimes import OnnxRuntime
from nas.parts import AddInput, Conv, Part

SMALL = Part((Conv(8, 3, activation="relu6"),), (8, 12, 12))
LARGE = Part((Conv(64, 3), Conv(64, 3), Conv(8, 3), AddInput()), (8, 12, 12))
MODELS = {part.key: part.to_onnx() for part in (SMALL, LARGE, Part(SMALL.ops, SMALL.shape, "int8"))}
FACTS = {"space": "tiny", "keys": ["a", "b"], "π": 3.14159265358979, "by number": {"9": "nine", "10": "ten"}}
PACKAGE = Path(nas.__file__).parent


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bare_python(tmp_path_factory.mktemp("bare"))


def bundle(folder: Path, **scenario: Any) -> Path:
    write_bundle(
        folder,
        MODELS,
        YARDSTICK.to_onnx(),
        {"seconds": 0.0, **scenario},
        {**FACTS, "by number": {10: "ten", 9: "nine"}},
    )
    return folder


def run(python: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(python), str(folder / "run.py"), *arguments],
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, python: Path) -> Path:
    folder = bundle(tmp_path_factory.mktemp("bundle") / "made" / "here", threads=1, calls=4, watch=[LARGE.key])
    done = run(python, folder)
    assert done.returncode == 0, done.stderr
    assert f"3 models in {MIN_ROUNDS} rounds: send {RESULT} back" in done.stderr
    assert done.stdout == ""
    return folder


@pytest.fixture
def copied(measured: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(measured, tmp_path / "copied"))


# ---- what is written -----------------------------------------------------------------------------------


def test_the_bare_python_has_nothing_of_ours(python: Path) -> None:
    for name in ("nas", "torch", "onnx", "optuna", "yaml"):
        done = subprocess.run([python, "-c", f"import {name}"], cwd="/", capture_output=True, text=True, check=False)
        assert f"No module named '{name}'" in done.stderr
    subprocess.run([python, "-c", "import numpy, onnxruntime"], cwd="/", check=True)


@pytest.mark.parametrize("path", CODE)
def test_what_travels_needs_little(path: str) -> None:
    """Standard library, numpy, onnxruntime and each other: no import of ours that is executed, no newer syntax."""
    tree = ast.parse((PACKAGE / path).read_text(), feature_version=(3, 9))
    typing_only = [
        node for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test) for node in ast.walk(block)
    ]  # fmt: skip
    imported = set()
    for node in ast.walk(tree):
        if node not in typing_only and isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            imported |= {name.partition(".")[0] for name in names}
    beside = {Path(name).stem for name in CODE.values()}
    assert imported <= set(sys.stdlib_module_names) | {"numpy", "onnxruntime", "pynvml"} | beside
    assert not beside & set(sys.stdlib_module_names)


def test_the_script_is_short() -> None:
    text = (PACKAGE / "latency" / "templates" / "run.py").read_text()
    assert len([line for line in text.splitlines() if line.strip()]) <= 150


def test_a_bundle_is_complete_and_repeatable(tmp_path: Path) -> None:
    first, again = bundle(tmp_path / "first"), bundle(tmp_path / "again")
    names = sorted(str(path.relative_to(first)) for path in first.rglob("*") if path.is_file())
    assert names == sorted(
        ["bundle.json", *CODE.values(), "models/yardstick.onnx", *(f"models/000{i}.onnx" for i in range(3))]
    )
    for name in names:
        assert (first / name).read_bytes() == (again / name).read_bytes()
    for path, name in CODE.items():
        assert (first / name).read_bytes() == (PACKAGE / path).read_bytes()
    content = read_sealed(first / "bundle.json")
    assert content["scenario"] == {**SCENARIO, "seconds": 0.0}
    assert content["facts"] == FACTS
    assert list(content["models"]) == list(MODELS)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_no_bundle_can_be_made_of(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("precious")
    with pytest.raises(TableError, match="not empty"):
        bundle(tmp_path / "taken")
    with pytest.raises(TableError, match="has no cores"):
        bundle(tmp_path / "new", cores=3)
    for key in ("watch", "energy"):
        with pytest.raises(TableError, match="'net 9', which is none"):
            bundle(tmp_path / "new", **{key: ["net 9"]})
    with pytest.raises(TableError, match="at least one model"):
        write_bundle(tmp_path / "new", {}, YARDSTICK.to_onnx(), {}, {})
    with pytest.raises(TypeError):
        write_bundle(tmp_path / "new", MODELS, YARDSTICK.to_onnx(), {}, {"space": object()})
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    (tmp_path / "empty").mkdir()
    assert (bundle(tmp_path / "empty") / "run.py").exists()


# ---- measured and read back ----------------------------------------------------------------------------


def test_what_comes_back(measured: Path) -> None:
    result = read_measurements(measured)
    seen = result.measurement
    assert (seen.rounds, list(seen.samples)) == (MIN_ROUNDS, list(MODELS))
    for samples in seen.samples.values():
        assert np.asarray(samples.calls).shape == (MIN_ROUNDS, 4)
        assert (np.asarray(samples.calls) > 0).all()
    assert seen.seconds > 0
    assert seen.reference == np.median([value for s in seen.samples.values() for value in s.yardstick])
    small, large = seen.values([SMALL.key, LARGE.key], "min")
    assert small < large
    assert result.facts == FACTS
    assert result.scenario["watch"] == [LARGE.key]
    assert result.nas_version == nas.__version__
    assert result.date.endswith("+00:00")
    here = Device.local()
    assert result.device == here  # the same facts as a local measurement writes, name and fingerprint included
    assert result.device.differences(here.as_dict()) == []
    for key, model in MODELS.items():
        assert result.fused[key] == OnnxRuntime().load(model, threads=1, batch=1).fused()
    assert set(result.energy) in ({"absent"}, {"source", "millijoules"})


def test_the_file_alone_is_enough(measured: Path, tmp_path: Path) -> None:
    shutil.copy(measured / RESULT, tmp_path / "mailed.json")
    assert read_measurements(tmp_path / "mailed.json") == read_measurements(measured)


def test_the_scenario_is_kept(tmp_path: Path, python: Path) -> None:
    folder = bundle(tmp_path / "b", threads=2, batch=3, graph="basic", calls=2, max_rounds=7, seconds=60)
    model = SMALL.to_onnx()
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    shutil.rmtree(folder)
    write_bundle(folder, {"net": model}, YARDSTICK.to_onnx(3), {
        "threads": 2, "batch": 3, "graph": "basic", "provider": "CPUExecutionProvider", "calls": 2, "max_rounds": 7,
    }, {})  # fmt: skip
    assert run(python, folder).returncode == 0
    result = read_measurements(folder)
    assert result.measurement.rounds == 7
    assert result.device == Device.local(threads=2, batch=3, graph="basic")


def test_what_is_settled_ends_early(tmp_path: Path, python: Path) -> None:
    folder = bundle(tmp_path / "b", seconds=60, watch=[SMALL.key], target_noise=10.0)
    assert run(python, folder).returncode == 0
    assert read_measurements(folder).measurement.rounds == MIN_ROUNDS


# ---- interrupted ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_loses_no_finished_round(tmp_path: Path, python: Path, how: signal.Signals) -> None:
    folder = bundle(tmp_path / "b", seconds=1000.0, max_rounds=1_000_000)
    process = subprocess.Popen([python, folder / "run.py"], stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("round 4,"):
            break
    process.send_signal(how)
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 130
    assert said.endswith("run.py: interrupted, go on with --resume\n")
    kept = read_sealed(folder / PARTIAL)
    assert kept["rounds"] >= 4
    assert {len(s["calls"]) for s in kept["samples"].values()} == {kept["rounds"]}
    with pytest.raises(TableError, match=r"only an unfinished one\.[^$]*run.py --resume"):
        read_measurements(folder)
    with pytest.raises(TableError, match="unfinished measurement"):
        read_measurements(folder / PARTIAL)

    done = run(python, folder)
    assert done.returncode == 2
    assert "go on with --resume, or delete it" in done.stderr
    done = run(python, folder, "--resume", "--seconds", "0")
    assert done.returncode == 0, done.stderr
    assert f"going on after {kept['rounds']} rounds" in done.stderr
    result = read_measurements(folder)
    assert result.measurement.rounds == max(MIN_ROUNDS, kept["rounds"])
    for name, samples in kept["samples"].items():
        assert result.measurement.samples[name].calls[: kept["rounds"]] == samples["calls"]
    assert result.measurement.seconds >= kept["seconds"]
    assert not (folder / PARTIAL).exists()
    done = run(python, folder, "--resume")
    assert "measured already" in done.stderr
    assert done.returncode == 0


def test_a_resume_on_another_machine_is_refused(tmp_path: Path, python: Path, measured: Path) -> None:
    folder = bundle(tmp_path / "b")
    state = read_sealed(measured / RESULT)
    write_sealed(folder / PARTIAL, {**state, "bundle": read_sealed(folder / "bundle.json"), "device": {"cpu": "Z80"}})
    done = run(python, folder, "--resume")
    assert (done.returncode, "the machine has changed" in done.stderr) == (2, True)


# ---- damaged -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda folder: (folder / "models" / "0001.onnx").unlink(), "models/0001.onnx is missing, damaged or edited"),
        (lambda folder: (folder / "models" / "yardstick.onnx").write_bytes(b"x"), "models/yardstick.onnx is missing"),
        (lambda folder: (folder / "bundle.json").unlink(), "bundle.json cannot be used"),
        (lambda folder: (folder / "bundle.json").write_text("{"), "bundle.json cannot be used"),
        (
            lambda folder: (folder / "bundle.json").write_text(
                (folder / "bundle.json").read_text().replace('"threads": 1', '"threads": 8')
            ),
            "does not match its own sha256",
        ),
    ],
)
def test_a_damaged_bundle_is_not_measured(
    tmp_path: Path, python: Path, damage: Callable[[Path], Any], complaint: str
) -> None:
    folder = bundle(tmp_path / "b")
    damage(folder)
    done = run(python, folder)
    assert done.returncode == 2
    assert complaint in done.stderr.strip().splitlines()[-1]
    assert not (folder / RESULT).exists()


@pytest.mark.parametrize(
    ("scenario", "complaint"),
    [({"provider": "abacus"}, "has no provider 'abacus'"), ({"graph": "much"}, "has no graph level 'much'")],
)
def test_what_the_device_cannot_do(tmp_path: Path, python: Path, scenario: dict[str, str], complaint: str) -> None:
    done = run(python, bundle(tmp_path / "b", **scenario))
    assert done.returncode == 2
    assert complaint in done.stderr.strip().splitlines()[-1]


def test_without_its_packages(tmp_path: Path) -> None:
    folder = bundle(tmp_path / "b")
    done = subprocess.run(
        [sys.executable, "-S", "-E", folder / "run.py"], capture_output=True, text=True, check=False, cwd="/"
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip install numpy onnxruntime" in done.stderr


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """An edit that is sealed again, as only a broken script could make it."""

    def apply(folder: Path) -> None:
        content = read_sealed(folder / RESULT)
        change(content)
        write_sealed(folder / RESULT, content)

    return apply


def cut(folder: Path) -> None:
    text = (folder / RESULT).read_text()
    (folder / RESULT).write_text(text[: len(text) // 2])


def touch_up(folder: Path) -> None:
    content = json.loads((folder / RESULT).read_text())
    content["samples"][SMALL.key]["calls"][0][0] /= 2
    (folder / RESULT).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda folder: (folder / RESULT).unlink(), r"no measurements\.json[^$]*run `python run\.py`"),
        (cut, "is cut or was edited"),
        (touch_up, "does not match its own sha256"),
        (lambda folder: (folder / RESULT).write_text("[]"), "no JSON object"),
        (edit(lambda c: c.update(schema_version=9)), "has schema 9"),
        (edit(lambda c: c.update(rounds=2)), "unfinished measurement: 2 rounds"),
        (edit(lambda c: c.update(complete=False)), "unfinished measurement"),
        (edit(lambda c: c["samples"].pop(LARGE.key)), "1 of 3 models were not measured"),
        (edit(lambda c: c["samples"][LARGE.key]["calls"].pop()), "timed calls, not"),
        (edit(lambda c: c["samples"][LARGE.key]["calls"][2].pop()), "garbles a field"),
        (edit(lambda c: c["samples"][LARGE.key]["calls"][2].__setitem__(0, -1.0)), "not finite and positive"),
        (edit(lambda c: c["samples"][LARGE.key]["yardstick"].__setitem__(0, 0.0)), "not finite and positive"),
        (edit(lambda c: c["samples"][LARGE.key]["calls"][2].__setitem__(0, None)), "not finite and positive"),
        (edit(lambda c: c["device"].pop("cpu")), "garbles a field"),
        (edit(lambda c: c.pop("fused")), "garbles a field: 'fused'"),
        (edit(lambda c: c["bundle"].update(facts={})), "another bundle"),
    ],
)
def test_measurements_that_cannot_be_trusted(copied: Path, damage: Callable[[Path], Any], complaint: str) -> None:
    damage(copied)
    with pytest.raises(TableError, match=complaint):
        read_measurements(copied)


def test_not_a_number_is_no_time(copied: Path) -> None:
    """Python's JSON writes NaN where it is not told not to."""
    text = (copied / RESULT).read_text()
    first = str(json.loads(text)["samples"][SMALL.key]["calls"][0][0])
    (copied / RESULT).write_text(text.replace(first, "NaN", 1))
    with pytest.raises(TableError, match="is cut or was edited"):
        read_measurements(copied)


# ---- in an environment of its own ----------------------------------------------------------------------


@pytest.mark.slow
def test_in_a_fresh_environment(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    installed = subprocess.run(
        [python, "-m", "pip", "install", "-q", "numpy", "onnxruntime"], capture_output=True, text=True, check=False
    )
    if installed.returncode:
        pytest.skip(f"no package index: {installed.stderr.strip().splitlines()[-1]}")
    folder, begin = bundle(tmp_path / "b", seconds=1.0), time.monotonic()
    done = run(python, folder)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begin < 30
    assert read_measurements(folder).measurement.rounds >= MIN_ROUNDS
