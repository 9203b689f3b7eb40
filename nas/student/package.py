"""Packing the deliverable: a folder that runs with onnxruntime alone and carries its own proof."""

from __future__ import annotations

import io
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nas import __version__
from nas.compression import Plan
from nas.evaluators import Distil
from nas.evaluators.distil import skeleton
from nas.evaluators.train import SAMPLE
from nas.files import write_atomic, write_json
from nas.space import TaskInfo
from nas.student.export import INPUT, deployable
from nas.student.finalists import Finalist
from nas.student.program import save_program
from nas.student.teacher import onnx_logits

PACKAGES = ("torch", "onnx", "onnxruntime", "numpy", "optuna", "torch-pruning")
SELFTEST_SAMPLES = 32


def load_model(student: Distil, finalist: Finalist) -> nn.Module:
    """The trained, simulating torch module of a finalist."""
    candidate = student.space.decode(np.array(finalist.entrant.genome))
    sample = student.task.split("train")[0][:SAMPLE]
    model = skeleton(student.space, candidate, sample)
    model.load_state_dict(load_file(finalist.folder / "state.safetensors"))
    return model.eval()


@dataclass(frozen=True)
class Deliverable:
    """What a student folder is made of.

    Attributes:
        model: trained and simulating, freshly loaded from a saved state: in the contiguous layout that exports expect.
        plan: the passes that were applied to it.
        onnx: its exported file.
        sample: raw inputs ``[n, *input_shape]``, n ≥ 2, for the proof.
        manifest: content of ``manifest.json``.
        candidate: content of ``candidate.json``.
        origin: where it comes from, in one sentence without its full stop.
        choices: what was chosen, name → value, for the model card.
        files: further files that its inputs need, such as a vocabulary, by name.
    """

    model: nn.Module
    plan: Plan
    onnx: Path
    sample: torch.Tensor
    manifest: dict[str, Any]
    candidate: Mapping[str, Any]
    origin: str
    choices: Mapping[str, Any]
    files: Mapping[str, bytes] = field(default_factory=dict)


def pack_finalist(folder: Path, student: Distil, finalist: Finalist, manifest: dict[str, Any]) -> None:
    """Write the student folder of a search's finalist."""
    candidate = student.space.decode(np.array(finalist.entrant.genome))
    deliverable = Deliverable(
        model=load_model(student, finalist),
        plan=student.space.training(candidate).compression,
        onnx=finalist.folder / "model.onnx",
        sample=student.task.split("valid")[0][:SELFTEST_SAMPLES],
        manifest=manifest,
        candidate={"space": student.space.name, "values": candidate.as_dict()},
        origin=f"Found by hardware-aware search in the space `{student.space.name}`",
        choices=candidate.as_dict(),
        files=student.task.student_files(),
    )
    pack(folder, deliverable)


def pack(folder: Path, deliverable: Deliverable) -> None:
    """Write a student folder: models, weights, candidate, manifest, model card, ``predict.py`` and its proof.

    The folder appears whole or not at all.
    """
    making = folder.with_name(f".{folder.name}.making")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    shutil.copyfile(deliverable.onnx, making / "model.onnx")
    save_program(deliverable.model, deliverable.sample, making / "model.pt2")
    plain = deployable(deliverable.model, deliverable.plan)
    save_file({k: v.contiguous() for k, v in plain.state_dict().items()}, making / "weights.safetensors")
    write_json(making / "candidate.json", deliverable.candidate)
    write_json(making / "manifest.json", deliverable.manifest)
    shutil.copyfile(str(files("nas.student").joinpath("templates/predict.py")), making / "predict.py")
    for name, content in deliverable.files.items():
        write_atomic(making / name, content)
    write_atomic(making / "selftest.npz", _selftest(making / "model.onnx", deliverable.sample))
    write_atomic(making / "README.md", model_card(deliverable))
    if folder.exists():
        shutil.rmtree(folder)
    making.rename(folder)


def _selftest(path: Path, x: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    # Integer kernels may round differently on another processor; the class that wins may differ at most rarely.
    np.savez(buffer, x=x.numpy(), logits=onnx_logits(path, x), min_agreement=np.float32(0.9))
    return buffer.getvalue()


def write_samples(path: Path, x: torch.Tensor, y: torch.Tensor) -> None:
    """Inputs and labels as a compressed .npz file, so that every quality can be measured again."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x=x.numpy(), y=y.numpy())
    write_atomic(path, buffer.getvalue())


def model_facts(path: Path, info: TaskInfo) -> dict[str, Any]:
    """What a manifest says of the file itself: versions, input, operators."""
    return {
        "versions": versions(),
        "input": {
            "name": INPUT, "shape": ["batch", *info.input_shape], "dtype": info.dtype, "range": list(info.value_range),
        },
        "onnx": operators(path),
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of everything that had a hand in a student."""
    found = {"nas": __version__, "python": platform.python_version(), "platform": platform.platform()}
    return found | {name: metadata.version(name) for name in PACKAGES}


def operators(path: Path) -> dict[str, Any]:
    """Opset and operator counts of an ONNX file."""
    model = onnx.load(path)
    names = sorted({node.op_type for node in model.graph.node})
    counts = {name: sum(node.op_type == name for node in model.graph.node) for name in names}
    return {"opset": max(o.version for o in model.opset_import if not o.domain), "operators": counts}


def model_card(deliverable: Deliverable) -> str:
    """README.md of the student folder."""
    manifest = deliverable.manifest
    quality, size, parity = manifest["quality"], manifest["size_bytes"], manifest["parity"]
    latency = manifest["latency"][0]
    spec = manifest["input"]
    rows = "\n".join(f"| {name} | {value} |" for name, value in deliverable.choices.items())
    measured = f"{quality['metric']} ({quality['split']}, n = {quality['n']})"
    classes = manifest["task"]["classes"]
    agreement = f"{100 * parity['agreement']:.1f} %"
    if spec["dtype"] == "int64":
        values = f"""numbers of tokens in {spec["range"]}. With
`vocabulary.json` or `tokenizer.json` in this folder, `python predict.py INPUT.txt` reads texts, one a line"""
    else:
        values = f"""raw values in {spec["range"]}; preprocessing is
inside the model"""
    return f"""# {manifest["name"]}: a compressed student

{deliverable.origin} and measured on {latency["device"]}.

| | student | teacher |
|---|---|---|
| {measured} | {quality["student_onnx"]:.4f} | {quality["teacher"]:.4f} |
| latency p50, ms | {latency["p50_ms"]:.4f} | {latency["teacher_p50_ms"]:.4f} |
| file, bytes | {size["onnx"]} | {size["teacher_onnx"]} |

## Use
```
pip install numpy onnxruntime
python predict.py --selftest
python predict.py INPUT.npy
```
Input `{spec["name"]}`: {spec["dtype"]}, shape {spec["shape"]}, {values}.
Output: logits of {len(classes)} classes ({", ".join(map(str, classes))}).

## Files
`model.onnx` is what runs. `model.pt2` is the same model as a torch.export program with the integer arithmetic
simulated (on the validation data logits differ by at most {parity["max_abs_diff"]:.2g}, the class agrees on
{agreement}).
`weights.safetensors` are its float weights, `candidate.json` the choices below, `manifest.json` every figure.

## Choices
| choice | value |
|---|---|
{rows}

## Limits
The figures hold for data like those it was trained and tested on, and for the device named above; measure again
elsewhere (`python predict.py --benchmark`).
"""
