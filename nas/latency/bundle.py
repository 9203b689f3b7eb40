"""Bundles: a folder of models and one script that measures them where there is no torch and no checkout of ours.

The way: :func:`write_bundle` here; ``python run.py`` there, by hand or by :func:`run_over_ssh`;
:func:`read_measurements` here again. The script runs the same protocol on the same sessions as a local measurement,
because the bundle holds copies of the modules that make them.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from nas import __version__
from nas.errors import TableError
from nas.files import read_sealed, write_sealed
from nas.latency.device import Device
from nas.latency.measure import MIN_ROUNDS, Measurement, Samples

SCHEMA_VERSION = 1
RESULT, PARTIAL = "measurements.json", "measurements.partial.json"
SCRIPT = "run.py"
#: What travels with a bundle, word for word: where it lies in the package → its name there. It needs the standard
#: library, numpy and onnxruntime only, and Python 3.9.
CODE = {
    "latency/templates/run.py": SCRIPT, "latency/measure.py": "measure.py", "latency/sessions.py": "sessions.py",
    "latency/hardware.py": "hardware.py", "latency/energy.py": "energy.py", "files.py": "files.py",
}  # fmt: skip
#: The scenario's keys and their defaults; the times are in seconds.
SCENARIO: dict[str, Any] = {
    "threads": 1, "batch": 1, "provider": "", "graph": "",
    "seconds": 60.0, "max_rounds": 200, "calls": 5, "target_noise": 0.0, "watch": [], "seed": 0,
    "energy": [], "energy_seconds": 1.0, "parts": [],
}  # fmt: skip
NAMING = ("watch", "energy", "parts")


@dataclass(frozen=True)
class BundleResult:
    """What came back.

    Attributes:
        measurement: as :func:`nas.latency.measure.interleave` gives it.
        device: the machine that measured, with the bundle's scenario.
        fused: model → operators that were executed.
        energy: ``{"absent": reason}``, or ``source`` and ``millijoules`` a call by model.
        facts: what was given to :func:`write_bundle`.
        scenario: with all of its defaults.
        date: UTC.
        nas_version: of the bundle.
    """

    measurement: Measurement
    device: Device
    fused: dict[str, dict[str, int]]
    energy: dict[str, Any]
    facts: dict[str, Any]
    scenario: dict[str, Any]
    date: str
    nas_version: str


def write_bundle(
    folder: Path,
    models: Mapping[str, onnx.ModelProto],
    yardstick: onnx.ModelProto,
    scenario: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> None:
    """Write a bundle that any machine with numpy and onnxruntime can measure; the folder appears whole.

    Args:
        folder: must not exist, or be empty.
        models: name → model; a symbolic batch dimension becomes the scenario's batch.
        yardstick: the fixed kernel beside which everything is timed.
        scenario: of :data:`SCENARIO`; ``watch``, ``energy`` and ``parts`` name models. Parts are pieces of networks:
            their inputs and outputs stay in memory that is there already.
        facts: JSON that comes back with the measurements, untouched.

    Raises:
        TableError: the folder is taken, there are no models, or the scenario has an unknown key or model.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise TableError(f"{folder} exists and is not empty.", remedy="name a new folder for the bundle")
    bundle = {
        "schema_version": SCHEMA_VERSION, "nas_version": __version__, "scenario": _scenario(scenario, models),
        "facts": dict(facts),
    }  # fmt: skip
    folder.parent.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        (making / "models").mkdir()
        bundle["yardstick"] = _write_model(making, "models/yardstick.onnx", yardstick)
        bundle["models"] = {
            name: _write_model(making, f"models/{i:04}.onnx", model) for i, (name, model) in enumerate(models.items())
        }
        for path, name in CODE.items():
            (making / name).write_bytes(files("nas").joinpath(path).read_bytes())
        write_sealed(making / "bundle.json", bundle)
        making.chmod(0o755)
        making.replace(folder)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise


def read_measurements(path: Path) -> BundleResult:
    """Read and check what a bundle's script measured.

    Args:
        path: the bundle's folder, or the ``measurements.json`` alone.

    Raises:
        TableError: nothing was measured, or the file is cut, edited, incomplete, of another bundle or schema, or
            holds values that are no times.
    """
    path = Path(path)
    file = path / RESULT if path.is_dir() else path
    raw = _read(file)
    if raw.get("schema_version") != SCHEMA_VERSION:
        raise TableError(f"{file} has schema {raw.get('schema_version')}.", expected=f"schema {SCHEMA_VERSION}")
    if not raw.get("complete") or raw.get("rounds", 0) < MIN_ROUNDS:
        raise TableError(
            f"{file} is of an unfinished measurement: {raw.get('rounds')} rounds.",
            expected=f"at least {MIN_ROUNDS}",
            remedy=f"finish it there with `python {SCRIPT} --resume`",
        )
    if path.is_dir() and raw["bundle"] != _read(path / "bundle.json"):
        raise TableError(f"{file} was measured with another bundle than that of {path}.", remedy="measure again")
    try:
        return _parse(raw)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TableError(f"{file} lacks or garbles a field: {error}.", remedy="measure again") from error


def _scenario(given: Mapping[str, Any], models: Mapping[str, Any]) -> dict[str, Any]:
    if not models:
        raise TableError("A bundle needs at least one model.")
    if unknown := sorted(set(given) - set(SCENARIO)):
        raise TableError(f"A bundle's scenario has no {', '.join(unknown)}.", expected=f"of {', '.join(SCENARIO)}")
    scenario = {**SCENARIO, **given}
    if missing := [name for key in NAMING for name in scenario[key] if name not in models]:
        raise TableError(f"The scenario names {missing[0]!r}, which is none of the bundle's models.")
    return {**scenario, **{key: list(scenario[key]) for key in NAMING}}


def _write_model(folder: Path, name: str, model: onnx.ModelProto) -> dict[str, str]:
    content = model.SerializeToString()
    (folder / name).write_bytes(content)
    return {"file": name, "sha256": hashlib.sha256(content).hexdigest()}


def _read(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = read_sealed(file)
        return content
    except FileNotFoundError:
        partial = file.with_name(PARTIAL).exists()
        raise TableError(
            f"There is no {file.name} in {file.parent}" + (", only an unfinished one." if partial else "."),
            remedy=f"run `python {SCRIPT}{' --resume' if partial else ''}` in the bundle's folder, on the device",
        ) from None
    except (OSError, ValueError) as error:
        raise TableError(f"{file} is cut or was edited: {error}.", remedy="copy it again, or measure again") from error


def _parse(raw: Mapping[str, Any]) -> BundleResult:
    bundle, rounds = raw["bundle"], raw["rounds"]
    if missing := [name for name in bundle["models"] if name not in raw["samples"]]:
        raise ValueError(
            f"{len(missing)} of {len(bundle['models'])} models were not measured, the first {missing[0]!r}"
        )
    samples = {}
    for name in bundle["models"]:
        found = Samples(raw["samples"][name]["calls"], raw["samples"][name]["yardstick"])
        shape = (rounds, bundle["scenario"]["calls"])
        calls, yardstick = np.asarray(found.calls, np.float64), np.asarray(found.yardstick, np.float64)
        if calls.shape != shape or yardstick.shape != shape[:1]:
            raise ValueError(f"{name!r} has {calls.shape} timed calls, not {shape}")
        for times in (calls, yardstick):
            if not (np.isfinite(times).all() and (times > 0).all()):
                raise ValueError(f"{name!r} holds a time that is not finite and positive")
        samples[name] = found
    reference = float(np.median([value for s in samples.values() for value in s.yardstick]))
    return BundleResult(
        measurement=Measurement(samples, reference, raw["seconds"], rounds),
        device=Device.from_facts(raw["device"]),
        fused=raw["fused"],
        energy=raw["energy"],
        facts=bundle["facts"],
        scenario=bundle["scenario"],
        date=raw["date"],
        nas_version=bundle["nas_version"],
    )
