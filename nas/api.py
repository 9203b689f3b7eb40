"""The Python face: ``nas.search``, ``nas.derive``, ``nas.compress`` and ``nas.load_student``."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from nas.errors import ExperimentError, StudentError
from nas.experiment import LookupExperiment, load_any
from nas.job import execute
from nas.latency import Device
from nas.pipeline import Pipeline, Step, Tuning, steps_of
from nas.pipeline import execute as run_pipeline
from nas.progress import Progress, Silent
from nas.settings import check, construct
from nas.space import TaskInfo
from nas.student.own import built, with_weights
from nas.tasks import Task, tasks

if TYPE_CHECKING:
    from nas.derived import DerivedSpace


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

    def torch_program(self) -> torch.nn.Module:
        """``model.pt2`` as a torch module: raw inputs → logits, integer arithmetic simulated.

        Nothing is unpickled, and nothing but torch's own operators is called, whatever the file says.

        Raises:
            StudentError: the file is missing, damaged, or holds more than a plain program.
        """
        from nas.student.program import load_program, program_module

        return program_module(load_program(self.folder / "model.pt2"))


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


def derive(model: torch.nn.Module, example_input: torch.Tensor, **options: Any) -> DerivedSpace:
    """A search space of a trained model: what of it may be pruned, split, quantised or left out.

    Args:
        model: in evaluation or training mode; one tensor in, logits ``[n, classes]`` out. It is copied.
        example_input: raw inputs ``[n, *input_shape]``, n ≥ 1.
        options: of :class:`nas.derived.DerivedSpace`: ``prune``, ``bits``, ``ranks``, ``drop``, ``skip``, …

    Raises:
        CompressionError: the forward cannot be followed.
        SpaceError: an option is out of range, or nothing can be chosen.
    """
    from nas.derived import DerivedSpace

    with torch.no_grad():
        classes = int(model.eval()(example_input[:1]).shape[-1])
    integers = not example_input.dtype.is_floating_point
    info = TaskInfo(
        tuple(example_input.shape[1:]), classes, value_range=(float(example_input.min()), float(example_input.max())),
        dtype="int64" if integers else "float32",
    )  # fmt: skip
    return DerivedSpace(info, **check(DerivedSpace, {"model": model, **options}, 1, where="space"))


def compress(
    model: torch.nn.Module | str,
    data: Task | str | Path,
    steps: Iterable[str | tuple[str, Mapping[str, Any]] | Step] = (),
    *,
    weights: str | Path | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    task: Mapping[str, Any] | None = None,
    tuning: Tuning | None = None,
    seed: int = 0,
    threads: int = 1,
    seconds: float = 5.0,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Student:
    """Compress your own trained model step by step, fine-tuned by distillation from itself between the steps.

    Args:
        model: a module in plain torch, raw inputs ``[n, *input_shape]`` → logits ``[n, classes]``; it stays as it is.
            Or ``module:build``, a function of no arguments that makes it.
        data: a task, or what its ``data`` would be in an experiment: ``digits``, a file, a folder, ``module:name``.
        steps: passes in their order, as ``"low_rank:energy=0.9"`` or ``("low_rank", {"energy": 0.9})``.
        weights: a safetensors file of the model's state.
        settings: pass → layer → setting, of passes that are asked for without options; without ``steps``, all of them.
        task: ``kind`` and further keys of the task, where ``data`` is not one.
        tuning: how long and how the model is trained between the steps and after them.
        seed: of the task's splits and of all trainings.
        threads: of a measured inference.
        seconds: of the measurement of all stages.
        out: folder; ``runs/compressed`` by default. ``record.json`` in it says what each step did.
        resume: go on with what is there.
        progress: hears stages and notes; silent by default.

    Raises:
        NasError: whatever a user can mend, with the remedy.
    """
    checked = steps_of(steps, settings)
    section = {"kind": "classification", **(task or {})}
    if not isinstance(data, Task):
        kind = section.pop("kind")
        told, data = str(data), construct(tasks.get(kind), {"seed": seed, **section}, str(data), where="task")
    else:
        told = "given"
    if isinstance(model, str):
        name = model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # what has no weights is the same after a resume
            model = built(model)
    else:
        name = type(model).__name__
    if weights is not None:
        model = with_weights(copy.deepcopy(model), weights, name)
    pipeline = Pipeline(
        model=model, name=name, task=data, data=told, steps=checked, tuning=tuning or Tuning(),
        folder=Path(out) if out is not None else Path("runs") / "compressed", device=Device.local(threads=threads),
        seed=seed, seconds=seconds, progress=progress or Silent(),
    )  # fmt: skip
    return load_student(run_pipeline(pipeline, resume=resume))


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
