"""The two formats that every student folder has: ``model.onnx``, which is measured, and ``model.pt2`` for torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nas.student.formats.base import Format, formats
from nas.student.program import load_program, program_module
from nas.student.teacher import onnx_logits

BATCH = 256


@formats.register("onnx")
class Onnx(Format):
    """The file itself, through onnxruntime."""

    def write(self, student: Path) -> list[Path]:
        return [student / "model.onnx"]

    def logits(self, student: Path, x: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        return onnx_logits(student / "model.onnx", torch.from_numpy(x))


@formats.register("pt2")
class Pt2(Format):
    """A torch.export program, integer arithmetic simulated."""

    def write(self, student: Path) -> list[Path]:
        return [student / "model.pt2"]

    def logits(self, student: Path, x: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        model = program_module(load_program(student / "model.pt2"))
        with torch.no_grad():
            return np.concatenate([model(torch.from_numpy(x[i : i + BATCH])).numpy() for i in range(0, len(x), BATCH)])
