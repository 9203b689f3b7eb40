"""A whole search on the user's own data and teacher, and everything in the folder that comes out of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from helpers import SMALL
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits

import nas
from nas.content import load_space
from nas.experiment import load_experiment
from nas.job import Job
from nas.latency import LatencyTable
from nas.space import TaskInfo
from nas.testing import synthetic_table

TEACHER = '''
from torch import nn


def build() -> nn.Module:
    """A plain little network of the user's own; not of any family here."""
    return nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 32, 3, stride=2, padding=1),
        nn.ReLU(), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
    )
'''


def cli(*arguments: object, cwd: Path, cache: Path, timeout: int = 500) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NAS_CACHE_DIR": str(cache), "COLUMNS": "120"}
    command = [sys.executable, "-m", "nas", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: data, a trained teacher, an experiment."""
    place = tmp_path_factory.mktemp("own")
    digits = load_digits()
    np.savez(place / "scans.npz", x=digits.images.astype(np.float32)[:, None], y=digits.target)
    (place / "my_teacher.py").write_text(TEACHER)
    scope: dict[str, Any] = {}
    exec(TEACHER, scope)
    torch.manual_seed(0)
    model = scope["build"]()
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    x, y = torch.from_numpy(digits.images.astype(np.float32))[:900, None], torch.from_numpy(digits.target)[:900]
    for _ in range(30):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    save_file(model.state_dict(), place / "teacher.safetensors")
    experiment = {
        **SMALL,
        "task": {"data": "scans.npz", "limit": 600},
        "teacher": {"model": "my_teacher:build", "weights": "teacher.safetensors"},
        "strategy": {"kind": "reinforce"},
        "table": {**SMALL["table"], "others": {"pixel": "pixel.json"}},
        "reward": {
            "kind": "weighted_product",
            "weights": {"latency_p95_ms": -0.07, "size_bytes": -0.03, "latency_ms@pixel": -0.05},
            "targets": {"latency_ms@pixel": 0.02},
        },
        "budget": {"latency": 1.0, "percentile": "p95", "size": "90%", "others": {"pixel": 0.04}},
        "search": {"trials": 4, "batch": 2},
        "training": {"epochs": 6, "compressed_epochs": 2, "views": 1},
        "finalists": {"count": 2, "pick": "front", "epochs": 10, "compressed_epochs": 4, "seconds": 1.0},
        "baselines": ["random", "uniform"],
    }
    (place / "own.yaml").write_text(json.dumps(experiment))
    options = {key: value for key, value in experiment["space"].items() if key != "name"}
    space = load_space("mobilenet", TaskInfo((1, 8, 8), 10), options)  # keys depend on the shapes alone
    synthetic_table(space).save(place / "pixel.json")
    return place


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """The finished run folder."""
    done = cli("search", "own.yaml", "--out", "run", cwd=folder, cache=folder / "cache")
    assert done.returncode == 0, done.stderr
    assert "student" in done.stdout
    assert "predict.py --selftest" in done.stdout
    return folder / "run"


def test_files(run: Path) -> None:
    for name in (
        "experiment.yaml",
        "study.jsonl",
        "table.json",
        "report.html",
        "teacher.onnx",
        "test.npz",
        "summary.json",
    ):
        assert (run / name).stat().st_size > 0, name
    student = {path.name for path in (run / "student").iterdir()}
    assert student == {
        "model.onnx", "model.pt2", "weights.safetensors", "candidate.json", "manifest.json", "README.md", "predict.py",
        "selftest.npz",
    }  # fmt: skip


def test_another_device_is_a_cost_and_said_to_be_predicted(run: Path, folder: Path) -> None:
    manifest = json.loads((run / "student" / "manifest.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    here, pixel = manifest["latency"]
    assert (here["measured"], pixel["measured"]) == (True, False)
    assert pixel["name"] == "pixel"
    assert "p50_ms" not in pixel
    assert pixel["predicted_p95_ms"] <= 0.04
    assert (run / "table-pixel.json").read_bytes() == (folder / "pixel.json").read_bytes()
    assert {"cost": "latency_p95_ms@pixel", "limit": 0.04} in summary["limits"]
    targets = summary["reward"]["targets"]
    assert targets["latency_ms@pixel"] == 0.02
    assert targets["latency_p95_ms"] == summary["reward"]["target"] == 1.0
    trials = [*summary["trials"], *summary["baseline_trials"]["random"]]
    assert all(0 < trial["predicted_elsewhere"]["latency_p95_ms@pixel"] <= 0.04 for trial in trials)
    (best,) = [f for f in summary["finalists"] if f["winner"]]
    costs = {"latency_p95_ms": best["p95_ms"], "size_bytes": best["size_bytes"], **best["predicted_elsewhere"]}
    weights = {"latency_p95_ms": -0.07, "size_bytes": -0.03, "latency_ms@pixel": -0.05}
    factors = [(costs[name] / targets[name]) ** weight for name, weight in weights.items()]
    assert best["reward"] == pytest.approx(best["quality_valid"] * np.prod(factors))
    assert "p95 latency on pixel" in (run / "report.html").read_text()


def test_a_resume_has_the_other_tables_it_began_with(
    run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(folder / "scans.npz", tmp_path)
    monkeypatch.chdir(tmp_path)  # where there is no pixel.json
    tables = Job(load_experiment(run / "experiment.yaml"), run).others
    assert [table.sha256 for table in tables.values()] == [LatencyTable.load(folder / "pixel.json").sha256]


def test_fronts_of_the_finished_run(run: Path, folder: Path) -> None:
    """The command and the summary agree; another reward needs no training, and the run stays as it is."""
    summary = json.loads((run / "summary.json").read_text())
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    for arm in ("search", "random"):
        done = cli("front", "run", "--arm", arm, "--json", cwd=folder, cache=folder / "cache")
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert told["costs"] == [summary["hypervolume"]["cost"]] == ["latency_p95_ms"]
        assert told["reference"]["latency_p95_ms"] == summary["hypervolume"]["reference"]["cost"] == 1.0
        assert told["hypervolume"] == pytest.approx(summary["hypervolume"]["arms"][arm])
    done = cli("front", "run", "--reward", "mnasnet_hard", "--limit", "latency_ms@pixel=0.03", cwd=folder, cache=folder)
    assert done.returncode == 0, done.stderr
    assert "reward mnasnet_hard, aiming at latency_p95_ms 1" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def accuracy(path: Path, x: Any, y: Any) -> float:
    import onnxruntime as ort

    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return float((session.run(None, {session.get_inputs()[0].name: x})[0].argmax(1) == y).mean())


def test_anyone_can_measure_every_quality_again(run: Path) -> None:
    manifest = json.loads((run / "student" / "manifest.json").read_text())
    with np.load(run / "test.npz", allow_pickle=False) as data:
        x, y = data["x"], data["y"]
    assert manifest["quality"]["n"] == len(y)
    assert accuracy(run / "student" / "model.onnx", x, y) == pytest.approx(manifest["quality"]["student_onnx"])
    assert accuracy(run / "teacher.onnx", x, y) == pytest.approx(manifest["quality"]["teacher"])
    assert manifest["quality"]["student_onnx"] > 0.5, "ten classes: a trained student is far from chance"
    assert manifest["size_bytes"]["onnx"] == (run / "student" / "model.onnx").stat().st_size
    assert manifest["size_bytes"]["onnx"] < 0.9 * manifest["size_bytes"]["teacher_onnx"]
    assert manifest["parity"]["agreement"] > 0.95
    assert set(manifest["baselines"]) == {"random", "uniform"}


def test_macs_and_parameters_are_those_of_the_file(run: Path) -> None:
    manifest = json.loads((run / "student" / "manifest.json").read_text())
    weights = load_file(run / "student" / "weights.safetensors")
    buffers = ("mean", "scale")
    assert manifest["params"] == sum(v.numel() for k, v in weights.items() if k not in buffers)
    assert onnx.load(run / "student" / "model.onnx").graph.input[0].name == manifest["input"]["name"]


ONLY = """
import importlib.abc, runpy, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {refused}:
            raise ImportError("refused: " + name)
sys.meta_path.insert(0, Refuse())
{then}
"""


def test_the_student_runs_without_torch_and_without_this_framework(run: Path, tmp_path: Path) -> None:
    alone = tmp_path / "elsewhere"
    shutil.copytree(run / "student", alone)
    refused = ("torch", "nas", "onnx", "optuna", "sklearn", "scipy", "safetensors", "yaml", "pydantic")
    then = "sys.argv = ['predict.py', *sys.argv[1:]]; runpy.run_path('predict.py', run_name='__main__')"
    script = ONLY.format(refused=refused, then=then)

    def predict(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", script, *arguments], cwd=alone, capture_output=True, text=True, timeout=60
        )

    passed = predict("--selftest")
    assert passed.returncode == 0, passed.stderr
    assert "selftest passed" in passed.stdout
    with np.load(run / "test.npz", allow_pickle=False) as data:
        np.save(alone / "some.npy", data["x"][:5])
    assert len(predict("some.npy").stdout.splitlines()) == 5
    model = onnx.load(alone / "model.onnx")
    for tensor in model.graph.initializer:
        if tensor.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.INT8) and len(tensor.dims) == 4:
            tensor.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(tensor), tensor.name))
    onnx.save(model, alone / "model.onnx")
    assert predict("--selftest").returncode == 1, "a selftest that passes on a broken model proves nothing"


def test_the_torch_program_loads_without_this_framework(run: Path) -> None:
    then = (
        "import numpy, torch; p = torch.export.load('model.pt2').module(); z = numpy.load('selftest.npz');"
        "y = p(torch.from_numpy(z['x'])).detach().numpy(); print((y.argmax(1) == z['logits'].argmax(1)).mean())"
    )
    script = ONLY.format(refused=("nas", "torch_pruning"), then=then)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=run / "student", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 0.9


def test_python_face(run: Path) -> None:
    student = nas.load_student(run / "student")
    with np.load(run / "test.npz", allow_pickle=False) as data:
        x, y = data["x"], data["y"]
    assert (student.predict(x).argmax(1) == y).mean() == pytest.approx(student.quality)
    assert student.latency_ms > 0
    assert student.size_bytes > 0
    with pytest.raises(nas.NasError, match="shape"):
        student.predict(x[:, :, :4])
    with pytest.raises(nas.NasError, match="no student folder"):
        nas.load_student(run)


def test_report_and_list(run: Path, folder: Path) -> None:
    (run / "report.html").unlink()
    done = cli("report", "run", cwd=folder, cache=folder / "cache")
    assert done.returncode == 0, done.stderr
    assert (run / "report.html").exists()
    listed = cli("list", cwd=folder, cache=folder / "cache").stdout
    assert "mobilenet" in listed
    assert "reinforce" in listed


MISTAKES = [
    (["--set", "serch.trials=3"], "serch"),
    (["--set", "search.trials=many"], "search.trials"),
    (["--set", "strategy.kind=annealing"], "annealing"),
    (["--set", "strategy.temperature=3"], "strategy.temperature"),
    (["--set", "task.data=missing.npz"], "missing.npz"),
    (["--set", "space.name=nowhere"], "nowhere"),
    (["--set", "space.widths=[[9],[16]]"], "multiples of 8"),
    (["--set", "reward.kind=mnasnet_soft", "--set", "reward.w=1"], "w"),
    (["--set", "reward.weights.energy_mj=-1"], "energy_mj"),
    (["--set", "table.others.pixel=none.json"], "none.json"),
    (["--set", "space.stem=[16, 2]"], "table.others.pixel"),
    (["--set", "teacher.weights=nothing.safetensors"], "nothing.safetensors"),
    (["--set", "budget.latency=0.0001"], "the lowest is"),
    (["--set", "table.path=none.json"], "none.json"),
]


@pytest.mark.parametrize(("arguments", "named"), MISTAKES, ids=[named for _, named in MISTAKES])
def test_a_mistake_is_one_clear_message(
    run: Path, folder: Path, tmp_path: Path, arguments: list[str], named: str
) -> None:
    done = cli("search", "own.yaml", "--out", tmp_path / "run", *arguments, cwd=folder, cache=folder / "cache")
    assert done.returncode == 2, done.stderr
    assert named in done.stderr
    assert "error" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "space",
    [
        {"name": "resnet", "resolutions": [8], "stem": [8, 1], "widths": [[8, 16], [16, 24]], "depths": [[1], [1, 2]],
         "strides": [1, 2]},
        {"name": "vit", "resolutions": [8], "patches": [2, 4], "widths": [16, 32], "depths": [[1, 2]], "head_dim": 8},
    ],
    ids=lambda space: str(space["name"]),
)  # fmt: skip
def test_other_families_are_searched(space: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(json.dumps({**SMALL, "space": space, "search": {"trials": 6, "batch": 3}}))
    done = cli("search", "small.yaml", "--out", "run", cwd=tmp_path, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    table = LatencyTable.load(tmp_path / "run" / "table.json")
    assert any(kind in entry.fused for entry in table.entries.values() for kind in ("QLinearConv", "QGemm"))
    program = [sys.executable, tmp_path / "run" / "student" / "predict.py", "--selftest"]
    assert subprocess.run(program, cwd=tmp_path, capture_output=True, timeout=120).returncode == 0
