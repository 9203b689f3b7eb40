"""OpenVINO's intermediate representation, made of the ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nas.errors import ExtraError, StudentError
from nas.student.formats.base import Format, formats

BATCH = 256


@formats.register("openvino")
class OpenVino(Format):
    """``model.xml`` with the graph and ``model.bin`` with the weights, in the precision of the ONNX file.

    It runs in fp32 where it is not int8: left alone, OpenVINO takes bf16 on processors that have it.
    """

    def __init__(self) -> None:
        try:
            import openvino
        except ImportError as error:
            raise ExtraError(
                "The format openvino needs the package openvino.", remedy="pip install 'latency-nas[openvino]'"
            ) from error
        self.openvino: Any = openvino

    def write(self, student: Path) -> list[Path]:
        try:
            model = self.openvino.convert_model(str(student / "model.onnx"))
        except Exception as error:
            raise StudentError(f"OpenVINO does not read {student / 'model.onnx'}: {error}.") from error
        # Rounding weights to fp16 is its default, and would be another model.
        self.openvino.save_model(model, str(student / "model.xml"), compress_to_fp16=False)
        return [student / "model.xml", student / "model.bin"]

    def logits(self, student: Path, x: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        core = self.openvino.Core()
        compiled = core.compile_model(str(student / "model.xml"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        batches = [compiled(x[i : i + BATCH])[0] for i in range(0, len(x), BATCH)]
        return np.concatenate(batches)
