"""Formats of a student: verified against onnxruntime, loaded by torch alone, and safe to load; ``nas export``."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import SMALL
from safetensors.torch import load_file
from torch import nn

import nas
from nas.cli import main
from nas.errors import ContentError, ExtraError, StudentError, StudyError
from nas.exporting import candidates, export
from nas.pipeline import Tuning
from nas.student.formats import Format, add_format, formats
from nas.student.program import load_program, program_module, save_program
from nas.student.teacher import onnx_logits
from nas.study import read_trials


def cnn() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(288, 10),
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was trained, and quantised to real integer operators."""
    out = tmp_path_factory.mktemp("runs") / "compressed"
    tuning = Tuning(epochs=8, lr=1e-2, kd_weight=0.0)
    nas.compress(
        cnn(), "digits", settings={"quantize": {"0": 8, "3": 8}}, task={"limit": 900}, tuning=tuning, out=out,
        seconds=0.3,
    )  # fmt: skip
    return out


@pytest.fixture
def student(run: Path, tmp_path: Path) -> Path:
    """A copy of its student folder."""
    shutil.copytree(run / "student", tmp_path / "student")
    return tmp_path / "student"


@pytest.fixture
def x(run: Path) -> np.ndarray[Any, Any]:
    with np.load(run / "test.npz", allow_pickle=False) as file:
        return file["x"]


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(package) is None, reason=f"the extra {package} is not installed")


def lacks(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(package) is not None, reason=f"the extra {package} is installed")


# ---- formats ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "onnx",
        "pt2",
        pytest.param("openvino", marks=needs("openvino")),
        pytest.param("executorch", marks=[needs("executorch"), pytest.mark.filterwarnings("ignore")]),
    ],
)
def test_a_format_answers_as_onnxruntime_does(name: str, student: Path, x: np.ndarray[Any, Any]) -> None:
    wanted = onnx_logits(student / "model.onnx", torch.from_numpy(x))
    facts = add_format(name, student, x, wanted)
    assert facts["agreement"] >= 0.97
    assert facts["n"] == len(x)
    assert facts["size_bytes"] == sum((student / file).stat().st_size for file in facts["files"])
    manifest = json.loads((student / "manifest.json").read_text())
    assert manifest["formats"] == {name: facts}
    found = formats.get(name)().logits(student, x)
    assert float(np.abs(found - wanted).max()) == pytest.approx(facts["max_abs_diff"], rel=1e-3, abs=1e-6)
    assert nas.load_student(student).quality == manifest["quality"]["student_onnx"]


@pytest.mark.parametrize(
    "name", [pytest.param("openvino", marks=lacks("openvino")), pytest.param("executorch", marks=lacks("executorch"))]
)
def test_a_missing_extra_is_said_before_anything_is_made(name: str, run: Path, tmp_path: Path) -> None:
    with pytest.raises(ExtraError, match=rf"pip install 'latency-nas\[{name}\]'"):
        export(run, tmp_path / "out", kinds=[name])
    assert not list(tmp_path.iterdir())


def test_a_format_that_answers_otherwise_is_refused(run: Path, tmp_path: Path) -> None:
    @formats.register("upside_down")
    class UpsideDown(Format):
        def write(self, student: Path) -> list[Path]:
            return [student / "model.onnx"]

        def logits(self, student: Path, x: Any) -> Any:
            return -onnx_logits(student / "model.onnx", torch.from_numpy(x))

    try:
        with pytest.raises(StudentError, match="upside_down the student answers"):
            export(run, tmp_path / "out", kinds=["upside_down"])
        assert not list(tmp_path.iterdir()), "nothing half made is left"
    finally:
        del formats._items["upside_down"]
    with pytest.raises(ContentError, match="Unknown format 'tflite'"):
        export(run, tmp_path / "out", kinds=["tflite"])


def test_the_student_of_a_compression_is_exported_in_several_formats(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "out"
    assert main(["export", str(run), "--format", "pt2", "--format", "onnx", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    made = nas.load_student(out)
    assert (out / "model.onnx").read_bytes() == (run / "student" / "model.onnx").read_bytes()
    assert set(made.manifest["formats"]) == {"pt2", "onnx"}
    for facts in made.manifest["formats"].values():
        assert f"{100 * facts['agreement']:.2f} % of {facts['n']} inputs" in said
    assert main(["export", str(run), "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["export", str(run / "student"), "--out", str(tmp_path / "again")]) == 0, "a student folder will do"
    assert main(["export", str(run), "--list"]) == 0
    assert f"{made.quality:.4f}" in capsys.readouterr().out
    assert main(["export", str(run)]) == 2
    assert "--out" in capsys.readouterr().err


# ---- plain torch --------------------------------------------------------------------------------------


ALONE = """
import importlib.abc
import sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("nas", "torch_pruning"):
            raise ImportError("refused: " + name)

sys.meta_path.insert(0, Refuse())
import numpy, torch
program = torch.export.load("model.pt2").module()
proof = numpy.load("selftest.npz", allow_pickle=False)
logits = program(torch.from_numpy(proof["x"])).detach().numpy()
agreement = float((logits.argmax(1) == proof["logits"].argmax(1)).mean())
print(agreement, len(logits), "nas" in sys.modules)
"""


def test_torch_alone_loads_the_program(student: Path) -> None:
    """In a fresh process, isolated, elsewhere, where there is no framework to import."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE], cwd=student, capture_output=True, text=True, timeout=120,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    agreement, n, framework = done.stdout.split()
    assert float(agreement) > 0.9
    assert (n, framework) == ("32", "False")


def test_the_program_takes_any_batch_and_holds_neither_paths_nor_data(student: Path) -> None:
    program = nas.load_student(student).torch_program()
    with torch.no_grad():
        assert [tuple(program(torch.rand(n, 1, 8, 8)).shape) for n in (1, 3, 70)] == [(1, 10), (3, 10), (70, 10)]
    with zipfile.ZipFile(student / "model.pt2") as archive:
        content = b"".join(archive.read(name) for name in archive.namelist())
        (inputs,) = (archive.getinfo(name).file_size for name in archive.namelist() if "sample_inputs" in name)
    assert inputs < 4000, "two samples, and not the data that they are a part of"
    assert str(Path(torch.__file__).parent).encode() not in content


def test_a_transformer_goes_through_the_loader(tmp_path: Path) -> None:
    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.layer = nn.Linear(8, 16), nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.head = nn.Linear(16, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            n, _, rows, columns = x.shape
            return self.head(self.layer(self.embed(x.reshape(n * rows, columns)).reshape(n, rows, 16)).mean(1))

    model, x = Tiny().eval(), torch.rand(5, 1, 8, 8)
    save_program(model, x, tmp_path / "model.pt2")
    with torch.no_grad():
        torch.testing.assert_close(program_module(load_program(tmp_path / "model.pt2"))(x), model(x))


def rewritten(path: Path, change: Callable[[str, bytes], bytes], extra: dict[str, bytes] | None = None) -> None:
    """The archive with its records changed, as torch reads them."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(records)).partition("/")[0]
    changed = {name: change(name.partition("/")[2], content) for name, content in records.items()}
    changed |= {f"{root}/{name}": content for name, content in (extra or {}).items()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in changed.items():
            archive.writestr(name, content)


class Trap:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def trapped(path: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(Trap(path), buffer)
    return buffer.getvalue()


def asked_to_unpickle(record: str, content: bytes, trap: Path) -> bytes:
    if record == "data/weights/model_weights_config.json":
        config = json.loads(content)
        config["config"]["0.weight"]["use_pickle"] = True
        return json.dumps(config).encode()
    return trapped(trap) if record == "data/weights/weight_0" else content


def with_inputs_that_run(record: str, content: bytes, trap: Path) -> bytes:
    return trapped(trap) if record == "data/sample_inputs/model.pt" else content


def calling_the_system(record: str, content: bytes, trap: Path) -> bytes:
    return content.replace(b"torch.ops.aten.relu.default", b"torch.serialization.os.system")


def with_a_size_that_runs(record: str, content: bytes, trap: Path) -> bytes:
    return content.replace(
        b"Symbol('", b"__import__('pathlib').Path('" + str(trap).encode() + b"').touch() or Symbol('"
    )


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        (asked_to_unpickle, "asks for unpickling"),
        (with_inputs_that_run, "sample inputs"),
        (calling_the_system, "torch.serialization.os.system"),
        (with_a_size_that_runs, "a size in it"),
    ],
)
def test_a_program_that_would_run_code_is_not_loaded(
    attack: Callable[[str, bytes, Path], bytes], words: str, student: Path, tmp_path: Path
) -> None:
    trap = tmp_path / "sprung"
    rewritten(student / "model.pt2", lambda record, content: attack(record, content, trap))
    with pytest.raises(StudentError, match=words):
        nas.load_student(student).torch_program()
    assert not trap.exists()


def test_other_archives_are_no_programs(student: Path, tmp_path: Path) -> None:
    rewritten(student / "model.pt2", lambda _, content: content)
    assert nas.load_student(student).torch_program()(torch.rand(2, 1, 8, 8)).shape == (2, 10), "the tool is harmless"
    rewritten(student / "model.pt2", lambda _, content: content, {"data/weights/model.pt": trapped(tmp_path / "trap")})
    with pytest.raises(StudentError, match="it holds"):
        load_program(student / "model.pt2")
    torch.save({"a": torch.zeros(1)}, student / "model.pt2")
    with pytest.raises(StudentError, match="it holds"):
        load_program(student / "model.pt2")
    (student / "model.pt2").write_bytes(b"not a program")
    with pytest.raises(StudentError, match="no torch program"):
        load_program(student / "model.pt2")
    (student / "model.pt2").unlink()
    with pytest.raises(StudentError, match="no torch program"):
        load_program(student / "model.pt2")


# ---- any point of a search -----------------------------------------------------------------------------


SEARCH = {
    **SMALL,
    "task": {"data": "digits", "limit": 400},
    "table": {"seconds": 1.0, "nets": 8},
    "search": {"trials": 4, "batch": 2, "workers": 0},
    "finalists": {"count": 1, "epochs": 6, "compressed_epochs": 2, "seconds": 0.3},
    "baselines": ["uniform"],
}


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "search"
    nas.search(SEARCH, out=out)
    return out


@pytest.fixture
def search(searched: Path, tmp_path: Path) -> Path:
    """A copy of the run, which exports may add finalists to."""
    shutil.copytree(searched, tmp_path / "search")
    return tmp_path / "search"


def finalists(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "finalists").iterdir())


def test_a_finalist_is_packed_as_it_lies_there(search: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in (search / "finalists").rglob("*") if path.is_file()}
    name = next(name for name in finalists(search) if name.startswith("uniform"))
    made = export(search, tmp_path / "out", candidate=name, kinds=["onnx", "pt2"])
    assert {path: path.read_bytes() for path in (search / "finalists").rglob("*") if path.is_file()} == before
    assert (made.folder / "model.onnx").read_bytes() == (search / "finalists" / name / "model.onnx").read_bytes()
    facts = json.loads((search / "finalists" / name / "facts.json").read_text())
    winner = json.loads((search / "student" / "manifest.json").read_text())
    manifest = made.manifest
    assert manifest.keys() == {*winner.keys(), "formats"}
    assert (manifest["macs"], manifest["params"]) == (facts["macs"], facts["params"])
    assert manifest["size_bytes"]["onnx"] == facts["size_bytes"]
    assert manifest["quality"]["teacher"] == winner["quality"]["teacher"]
    assert manifest["table"] == winner["table"]
    assert manifest["latency"][0]["p50_ms"] > 0
    with np.load(search / "test.npz", allow_pickle=False) as file:
        x, y = file["x"], file["y"]
    student = nas.load_student(made.folder)
    assert (student.predict(x).argmax(1) == y).mean() == pytest.approx(student.quality)
    candidate = json.loads((made.folder / "candidate.json").read_text())
    assert candidate["values"] == manifest["candidate"]


def test_a_trial_is_trained_as_the_finalists_were(search: Path, tmp_path: Path) -> None:
    """The student's own trial, forgotten: the run's recipe makes the very same weights again."""
    (name,) = (name for name in finalists(search) if name.startswith("search"))
    weights = load_file(search / "finalists" / name / "state.safetensors")
    shutil.rmtree(search / "finalists" / name)
    made = export(search, tmp_path / "out", candidate=name.removeprefix("search-"))
    assert made.name == name
    again = load_file(search / "finalists" / name / "state.safetensors")
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[key], again[key]) for key in weights)
    assert made.manifest["quality"]["student_onnx"] == nas.load_student(search / "student").quality
    done = subprocess.run(
        [sys.executable, "predict.py", "--selftest"], cwd=made.folder, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_the_list_names_what_can_be_exported(search: Path, tmp_path: Path) -> None:
    head, student, *rows = candidates(search)
    assert head[0] == "candidate"
    assert student[1] == f"{nas.load_student(search / 'student').quality:.4f}"
    named = [row[0] for row in rows]
    assert {name for name in named if "-" in name} == set(finalists(search))
    trials = [name for name in named if "-" not in name]
    known = {f"search-{trial.index}" for trial, _ in read_trials(search / "study.jsonl", "search")}
    others = {name.removeprefix("search-") for name in known - set(finalists(search))}
    assert set(trials) <= others
    made = export(search, tmp_path / "out", candidate=[*trials, *sorted(others)][0])
    assert made.name in finalists(search)
    assert nas.load_student(made.folder).manifest["latency"][0]["teacher_p50_ms"] > 0


@pytest.mark.parametrize(
    ("candidate", "words"),
    [("99", "no candidate 99"), ("best", "no candidate 'best'"), ("uniform-99", "no candidate 'uniform-99'"),
     ("random-0", "no trials of 'random'")],
)  # fmt: skip
def test_a_candidate_that_is_not_there(candidate: str, words: str, searched: Path, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=words):
        export(searched, tmp_path / "out", candidate=candidate)
    assert not (tmp_path / "out").exists()


def test_what_is_no_finished_run(run: Path, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="holds no student"):
        export(tmp_path, tmp_path / "out")
    with pytest.raises(StudyError, match="no folder of a search"):
        export(run, tmp_path / "out", candidate="3")
