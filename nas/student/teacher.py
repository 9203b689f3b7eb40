"""The teacher: the smallest member of the family that is as good as the largest, or the user's own module."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nas.compression.fold import fold_batchnorm
from nas.errors import ContentError, DataError
from nas.evaluators import Distil
from nas.evaluators.train import Recipe, predict
from nas.executors import Executor
from nas.files import write_atomic, write_json
from nas.locks import training_lock
from nas.registry import import_object
from nas.space import Genomes, SearchSpace, Training
from nas.student.export import export_float
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
    """

    module: nn.Module
    onnx: Path
    genome: Genomes | None
    quality: float
    ladder: list[float]


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
    return Teacher(module, path, space.encode(member), known["qualities"][known["rung"]], known["qualities"])


def train_member(student: Distil, item: tuple[Genomes, Recipe, Path]) -> float:
    """Train one plain member in a worker, save its weights, return its validation quality."""
    genome, recipe, path = item
    with training_lock():
        plain = replace(student, space=_Plain(student.space))  # type: ignore[arg-type]
        module = plain.fit(genome, recipe)
    save_file({k: v.contiguous() for k, v in module.state_dict().items()}, path)
    x, y = student.task.split("valid")
    return student.task.evaluate(predict(module, x), y.numpy())[student.task.metric]


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
    module = own_module(model, weights)
    quality = valid_quality(module, task)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "teacher.onnx").unlink(missing_ok=True)  # the weights may have changed since it was written
    return Teacher(module.eval(), _export(module, task, folder), None, quality, [quality])


def own_module(model: str, weights: str | None) -> nn.Module:
    """What the function ``module:build`` returns, with the weights of a safetensors file, in evaluation mode.

    Raises:
        ContentError: module or weights cannot be loaded.
    """
    module = import_object(model, "teacher")()
    if not isinstance(module, nn.Module):
        raise ContentError(f"{model} returned {type(module).__name__}.", expected="a torch.nn.Module")
    return module.eval() if weights is None else with_weights(module, weights, model)


def with_weights(module: nn.Module, weights: str | Path, name: str) -> nn.Module:
    """``module`` with the weights of a safetensors file, in evaluation mode; raises as :func:`own_module` does."""
    path = Path(weights)
    if not path.is_file():
        raise ContentError(f"There are no weights at {path}.", expected="a .safetensors file", remedy="check the path")
    try:
        module.load_state_dict(load_file(path))
    except Exception as error:
        raise ContentError(f"{path} does not fit {name}: {error}.", expected="the module's own state_dict") from error
    return module.eval()


def valid_quality(module: nn.Module, task: Task) -> float:
    """Quality of the user's module on validation data.

    Raises:
        DataError: it does not map the task's inputs to its classes.
    """
    x, y = task.split("valid")
    try:
        logits = predict(module, x)
    except Exception as error:
        raise DataError(f"The model fails on inputs {tuple(x.shape)}: {error}.", expected="raw task inputs") from error
    if logits.shape != (len(x), task.info.classes):
        raise DataError(f"The model's output has shape {logits.shape}.", expected=f"{(len(x), task.info.classes)}")
    return task.evaluate(logits, y.numpy())[task.metric]


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
