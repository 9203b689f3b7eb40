"""The user's own module: made, given its weights, and tried on the task's data."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import nn

from nas.errors import ContentError, DataError
from nas.evaluators.train import predict
from nas.registry import import_object
from nas.tasks import Task


def built(model: str) -> nn.Module:
    """What the function ``module:build`` returns, without any weights of its own.

    Raises:
        ContentError: it cannot be imported, or returns no module.
    """
    module = import_object(model, "model")()
    if not isinstance(module, nn.Module):
        raise ContentError(f"{model} returned {type(module).__name__}.", expected="a torch.nn.Module")
    return module.eval()


def with_weights(module: nn.Module, weights: str | Path, name: str) -> nn.Module:
    """``module``, called ``name``, with the weights of a safetensors file, in evaluation mode.

    Raises:
        ContentError: there is no such file, or it does not fit.
    """
    path = Path(weights)
    if not path.is_file():
        raise ContentError(f"There are no weights at {path}.", expected="a .safetensors file", remedy="check the path")
    try:
        module.load_state_dict(load_file(path))
    except Exception as error:
        raise ContentError(f"{path} does not fit {name}: {error}.", expected="the module's own state_dict") from error
    return module.eval()


def valid_quality(module: nn.Module, task: Task) -> float:
    """Quality of a module on validation data.

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
    return task.quality(logits, y.numpy())
