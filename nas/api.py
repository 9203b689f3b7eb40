"""The Python face: ``nas.search`` and ``nas.load_student``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nas.errors import ExperimentError, StudentError
from nas.experiment import LookupExperiment, load_any
from nas.job import execute
from nas.progress import Progress


@dataclass(frozen=True)
class Student:
    """A student folder.

    Attributes:
        folder: holds ``model.onnx`` and its proof.
        manifest: every figure, as in ``manifest.json``.
    """

    folder: Path
    manifest: dict[str, Any]

    @property
    def quality(self) -> float:
        """The metric on test data, as onnxruntime computes it."""
        return float(self.manifest["quality"]["student_onnx"])

    @property
    def latency_ms(self) -> float:
        """Measured median latency on the device."""
        return float(self.manifest["latency"][0]["p50_ms"])

    @property
    def size_bytes(self) -> int:
        """Size of ``model.onnx``."""
        return int(self.manifest["size_bytes"]["onnx"])

    def predict(self, x: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Logits ``[n, classes]`` of raw inputs ``[n, *input_shape]``, by onnxruntime; of a text student, of tokens.

        Raises:
            StudentError: the shape is not the student's, or there are no such tokens.
        """
        import torch

        from nas.student.teacher import onnx_logits

        spec = self.manifest["input"]
        given, shape = np.asarray(x), tuple(spec["shape"][1:])
        if given.shape[1:] != shape:
            raise StudentError(f"Input of shape {given.shape}.", expected=f"(n, {', '.join(map(str, shape))})")
        if np.dtype(spec["dtype"]).kind == "i":
            low, high = (int(value) for value in spec["range"])
            if given.dtype.kind not in "iu" or (given.size and (given.min() < low or given.max() > high)):
                what = f"{given.min()} to {given.max()}" if given.size else "nothing"
                raise StudentError(
                    f"Input of dtype {given.dtype}, {what}.", expected=f"numbers of tokens, whole, {low}..{high}"
                )
        array = np.ascontiguousarray(given, dtype=spec["dtype"])
        return onnx_logits(self.folder / "model.onnx", torch.from_numpy(array))

    def torch_program(self) -> Any:
        """``model.pt2`` as a torch module: raw inputs → logits, integer arithmetic simulated."""
        import torch

        return torch.export.load(self.folder / "model.pt2").module()


def search(
    experiment: str | Path | dict[str, Any],
    *,
    out: str | Path | None = None,
    overrides: list[str] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Student:
    """Run an experiment to its student.

    Workers are processes: in a script, call this under ``if __name__ == "__main__":``.

    Args:
        experiment: a file, a bundled name, or the file's content as a dictionary.
        out: run folder; ``runs/NAME`` by default.
        overrides: ``"key=value"`` strings on top of the file.
        resume: go on with a run that is there.
        progress: hears stages and notes; silent by default.

    Raises:
        NasError: whatever a user can mend, with the remedy.
    """
    checked = load_any(experiment, overrides)
    if isinstance(checked, LookupExperiment):
        raise ExperimentError(
            f"Experiment {checked.name!r} looks everything up: there is no student.",
            remedy="nas.lookup_job.execute, which returns the run folder",
        )
    run = Path(out) if out is not None else Path("runs") / checked.name
    return load_student(execute(checked, run, resume=resume, progress=progress))


def load_student(folder: str | Path) -> Student:
    """Read a student folder; needs neither the space nor the teacher, and unpickles nothing.

    Raises:
        StudentError: it is no student folder.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise StudentError(
            f"{folder} is no student folder: {error}.", expected="a folder with manifest.json and model.onnx"
        ) from error
    if not (folder / "model.onnx").exists():
        raise StudentError(f"{folder} has no model.onnx.", remedy="copy the whole student folder")
    return Student(folder, manifest)
