"""Packing the deliverable: a folder that runs with onnxruntime alone and carries its own proof."""

from __future__ import annotations

import io
import platform
import shutil
import warnings
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
from nas.evaluators import Distil
from nas.evaluators.distil import skeleton
from nas.evaluators.train import SAMPLE
from nas.files import write_atomic, write_json
from nas.space import Candidate, SearchSpace
from nas.student.export import deployable
from nas.student.finalists import Finalist
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


def pack(folder: Path, student: Distil, finalist: Finalist, manifest: dict[str, Any]) -> None:
    """Write the student folder: models, weights, candidate, manifest, model card, ``predict.py`` and its proof.

    The folder appears whole or not at all.
    """
    making = folder.with_name(f".{folder.name}.making")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    model = load_model(student, finalist)  # freshly loaded, so in the contiguous layout that exports expect
    candidate = student.space.decode(np.array(finalist.entrant.genome))
    plan = student.space.training(candidate).compression
    sample = student.task.split("valid")[0][:SELFTEST_SAMPLES]
    shutil.copyfile(finalist.folder / "model.onnx", making / "model.onnx")
    _save_program(model, sample, making / "model.pt2")
    plain = deployable(model, plan)
    save_file({k: v.contiguous() for k, v in plain.state_dict().items()}, making / "weights.safetensors")
    write_json(making / "candidate.json", {"space": student.space.name, "values": candidate.as_dict()})
    write_json(making / "manifest.json", manifest)
    shutil.copyfile(str(files("nas.student").joinpath("templates/predict.py")), making / "predict.py")
    for name, content in student.task.student_files().items():
        write_atomic(making / name, content)
    write_atomic(making / "selftest.npz", _selftest(making / "model.onnx", sample))
    write_atomic(making / "README.md", model_card(manifest, candidate, student.space))
    if folder.exists():
        shutil.rmtree(folder)
    making.rename(folder)


def _save_program(model: nn.Module, sample: torch.Tensor, path: Path) -> None:
    """A torch.export program, which loads without this framework."""
    batch = torch.export.Dim("batch", min=1, max=65536)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own notes on its serialiser, nothing a user could act on
        program = torch.export.export(model, (sample[:2],), dynamic_shapes=({0: batch},))
        torch.export.save(program, path)


def _selftest(path: Path, x: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    # Integer kernels may round differently on another processor; the class that wins may differ at most rarely.
    np.savez(buffer, x=x.numpy(), logits=onnx_logits(path, x), min_agreement=np.float32(0.9))
    return buffer.getvalue()


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


def model_card(manifest: dict[str, Any], candidate: Candidate, space: SearchSpace) -> str:
    """README.md of the student folder."""
    quality, size, parity = manifest["quality"], manifest["size_bytes"], manifest["parity"]
    latency = manifest["latency"][0]
    spec = manifest["input"]
    rows = "\n".join(f"| {name} | {value} |" for name, value in candidate.as_dict().items())
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

Found by hardware-aware search in the space `{space.name}` and measured on {latency["device"]}.

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
