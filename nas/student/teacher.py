"""The teacher: the smallest member of the family that is as good as the largest, or the user's own module."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nas.compression.fold import fold_batchnorm
from nas.evaluators import Distil
from nas.evaluators.distillation import Guide
from nas.evaluators.train import Recipe, predict
from nas.executors import Executor
from nas.files import write_atomic, write_json
from nas.locks import training_lock
from nas.space import Genomes, SearchSpace, Training
from nas.student.export import export_float
from nas.student.own import built, valid_quality, with_weights
from nas.tasks import Task


@dataclass(frozen=True)
class Teacher:
    """A trained teacher.

    Attributes:
        module: raw inputs → logits, in evaluation mode.
        onnx: path of its fp32 export, batch normalisation folded, any batch size.
        genome: its row in the space, or nothing for the user's own.
        quality: on validation data.
        ladder: what was tried: quality of each member, smallest first.
        build: makes the module without its weights, in any process.
    """

    module: nn.Module
    onnx: Path
    genome: Genomes | None
    quality: float
    ladder: list[float]
    build: Callable[[], nn.Module] | None = None

    @property
    def guide(self) -> Guide:
        """The teacher as candidates learn from it, in worker processes too."""
        return Guide(self.module, build=self.build)


def family_teacher(
    space: SearchSpace, task: Task, student: Distil, recipe: Recipe, tolerance: float, folder: Path, executor: Executor
) -> Teacher:
    """Train the space's ladder without a teacher and keep the smallest within ``tolerance`` of the largest.

    Args:
        student: an evaluator without lessons from a teacher; its seed decides.
        folder: cache; what is there is not trained again.
        executor: trains members side by side; its shared object is ``student``.
    """
    facts = folder / "teacher.json"
    ladder = space.ladder()
    if not facts.exists():
        folder.mkdir(parents=True, exist_ok=True)
        items = [(space.encode(member), recipe, folder / f"member{i}.safetensors") for i, member in enumerate(ladder)]
        qualities = [float("nan")] * len(items)
        # Largest first: it takes longest, so that the others fit beside it.
        for position, quality in executor.run(train_member, items[::-1]):
            if isinstance(quality, Exception):
                raise quality
            qualities[len(items) - 1 - position] = quality
        chosen = next(i for i, quality in enumerate(qualities) if quality >= qualities[-1] - tolerance)
        (folder / f"member{chosen}.safetensors").replace(folder / "teacher.safetensors")
        for leftover in folder.glob("member*.safetensors"):
            leftover.unlink()
        write_json(facts, {"rung": chosen, "qualities": qualities})
    known = json.loads(facts.read_text())
    member = ladder[known["rung"]]
    module = space.build(member)
    module.load_state_dict(load_file(folder / "teacher.safetensors"))
    path = _export(module.eval(), task, folder)
    quality, build = known["qualities"][known["rung"]], partial(space.build, member)
    return Teacher(module, path, space.encode(member), quality, known["qualities"], build)


def train_member(student: Distil, item: tuple[Genomes, Recipe, Path]) -> float:
    """Train one plain member in a worker, save its weights, return its validation quality."""
    genome, recipe, path = item
    with training_lock():
        plain = replace(student, space=_Plain(student.space))  # type: ignore[arg-type]
        module = plain.fit(genome, recipe)
    save_file({k: v.contiguous() for k, v in module.state_dict().items()}, path)
    x, y = student.task.split("valid")
    return student.task.quality(predict(module, x), y.numpy())


class _Plain:
    """A space whose members are trained without distillation or compression."""

    def __init__(self, space: SearchSpace) -> None:
        self._space = space

    def __getattr__(self, name: str) -> Any:
        return getattr(self._space, name)

    def training(self, candidate: Any) -> Training:
        return Training()


def own_teacher(model: str, weights: str, task: Task, folder: Path) -> Teacher:
    """The user's module: ``model`` is ``module:build``, a function of no arguments, ``weights`` a safetensors file.

    Raises:
        ContentError: module or weights cannot be loaded.
        DataError: it does not map the task's inputs to its classes.
    """
    module = with_weights(built(model), weights, model)
    quality = valid_quality(module, task)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "teacher.onnx").unlink(missing_ok=True)  # the weights may have changed since it was written
    return Teacher(module, _export(module, task, folder), None, quality, [quality], partial(built, model))


def further_teacher(model: str, weights: str, influence: float, task: Task) -> tuple[Guide, float]:
    """A module of the user's that teaches beside the first teacher, by its influence, and its validation quality.

    Raises:
        ContentError, DataError: as for :func:`own_teacher`.
    """
    module = with_weights(built(model), weights, model)
    return Guide(module, influence, build=partial(built, model)), valid_quality(module, task)


def _export(module: nn.Module, task: Task, folder: Path) -> Path:
    import copy

    path = folder / "teacher.onnx"
    if not path.exists():
        folded = fold_batchnorm(copy.deepcopy(module).eval())
        model = export_float(folded, task.split("valid")[0][:1])
        onnx.checker.check_model(model)
        write_atomic(path, model.SerializeToString())
    return path


def onnx_logits(path: Path | str, x: torch.Tensor, batch: int = 256) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Logits of an exported model in onnxruntime, the way a student's own ``predict.py`` computes them."""
    import onnxruntime as ort

    from nas.latency.sessions import session_options

    session = ort.InferenceSession(str(path), session_options(1), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: x[i : i + batch].numpy()})[0] for i in range(0, len(x), batch)])
