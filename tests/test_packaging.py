"""What is shipped: extras, pinned versions, the floors, and a wheel that is one package with its content inside."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import requires
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import nas

REPO = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())
CORE = PROJECT["project"]["dependencies"]
EXTRAS = PROJECT["project"]["optional-dependencies"]
TOP_FLOORS = ("cli", "experiment", "controller", "evaluators", "strategies", "latency", "tasks", "study", "locks")


def pins() -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (REPO / "constraints.txt").read_text().splitlines()]
    pairs = [line.split("==") for line in lines if line]
    return {canonicalize_name(name): version for name, version in pairs}


def test_the_extras_are_the_documented_ones():
    formats = {"openvino", "executorch"}
    assert set(EXTRAS) == formats | {"nni", "ray", "dashboard", "hf", "torchao", "tracking", "images", "dev"}


def test_the_core_stays_light():
    names = {canonicalize_name(Requirement(text).name) for text in CORE}
    assert names.isdisjoint({"nni", "ray", "transformers", "datasets", "torchao", "mlflow", "pandas", "executorch"})
    assert "openvino" not in names


def test_every_constraint_is_an_exact_public_version():
    assert pins()["torch"] == "2.13.0"
    for name, version in pins().items():
        assert re.fullmatch(r"\d+(\.\w+)*", version), f"{name}=={version} is no version that every index has"


@pytest.mark.parametrize("text", [*CORE, *EXTRAS["dev"], *EXTRAS["nni"]])
def test_constraints_pin_what_is_asked_for_within_its_range(text: str):
    asked = Requirement(text)
    assert asked.specifier.contains(pins()[canonicalize_name(asked.name)])


def test_constraints_pin_what_the_requirements_require():
    """Nothing floats: whatever the pinned set pulls in is pinned itself."""
    pinned = pins()
    for name in pinned:
        if find_spec(name.replace("-", "_")) is None:
            continue
        for text in requires(name) or ():
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                key = canonicalize_name(needed.name)
                # setuptools is the environment's own, and CUDA builds bring what their index has.
                assert key in pinned or key.startswith(("nvidia-", "cuda-")) or key in {"setuptools", "triton"}, text


def test_the_imports_respect_the_floors():
    if missing := [name for name in TOP_FLOORS if find_spec(f"nas.{name}") is None]:
        pytest.skip(f"not built yet: {missing}")
    script = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([script, "--no-cache"], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_wheel_is_one_package_with_its_content(tmp_path: Path):
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(REPO)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert f"-{nas.__version__}-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"nas", wheel.name.split("-")[0]}
    for kind in ("search_spaces", "latency_tables", "experiments", "experiments/sweeps"):
        shipped = {Path(name).name for name in names if str(Path(name).parent) == f"nas/_content/{kind}"}
        tracked = {path.name for path in (REPO / kind).iterdir() if path.is_file()}
        assert shipped == tracked, kind
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if "__pycache__" in name]
