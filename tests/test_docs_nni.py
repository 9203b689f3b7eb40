"""docs/from-nni.md: its Python runs as it stands, section by section, each in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import yaml

pytest.importorskip("nni")

from nas.experiment import load_experiment

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "from-nni.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))


def blocks(title: str, language: str = "python") -> list[str]:
    (body,) = (body for name, body in SECTIONS.items() if name.startswith(title))
    return re.findall(rf"^```{language}\n(.*?)^```", body, re.MULTILINE | re.DOTALL)


def run(folder: Path, *code: str) -> str:
    script = folder / "snippet.py"
    script.write_text("\n".join(code))
    command = [sys.executable, "-W", "ignore", str(script)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_model_space_is_found_and_built(tmp_path: Path) -> None:
    file, look, sample = blocks("Model spaces")
    (tmp_path / "my_spaces.py").write_text(file)
    assert int(run(tmp_path, sample)) > 0
    said = run(tmp_path, look)
    assert "['width', 'depth', 'expand0', 'mix0'" in said
    assert "MySpace: 8 labels" in said
    assert int(said.split()[-1]) > 0


def test_the_experiment_is_one(tmp_path: Path) -> None:
    (text,) = blocks("Model spaces", "yaml")
    (tmp_path / "my-space.yaml").write_text(text)
    experiment = load_experiment(tmp_path / "my-space.yaml")
    assert experiment.space.name == "nni"
    assert experiment.space.model_extra == {"nni": "my_spaces:MySpace"} == yaml.safe_load(text)["space"]


def test_masks_become_small_models(tmp_path: Path) -> None:
    said = run(tmp_path, *blocks("Pruners"))
    assert "32" in said
    for name in ("small.onnx", "sparse.onnx"):
        session = onnxruntime.InferenceSession(tmp_path / name)
        assert session.get_outputs()[0].shape[-1] == 10
    assert (tmp_path / "sparse.onnx").stat().st_size > 0


def test_a_quantiser_is_exported(tmp_path: Path) -> None:
    said = run(tmp_path, *blocks("Quantisers"))
    (example,) = re.findall(r"^.+; integers$", SECTIONS["Quantisers"], re.MULTILINE)
    assert example in said
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert session.get_inputs()[0].shape[1:] == [1, 8, 8]


def test_a_search_space_is_swept(tmp_path: Path) -> None:
    said = run(tmp_path, *blocks("Tuning"))
    assert "lr" in said
