"""Models of an NNI model space: the space made, its models frozen, given raw inputs, and counted."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from nni.nas.nn.pytorch import ModelSpace
from torch import nn

from nas.errors import ContentError, NasError, SpaceError
from nas.registry import import_object
from nas.space import TaskInfo

HUB = "nni_hub"  # short for the module of NNI's own spaces
SHOWN = 8  # labels in a message


class Preprocessed(nn.Module):
    """Raw inputs → normalised, grey images as three channels where the model wants those → logits."""

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, net: nn.Module, task: TaskInfo, colours: int) -> None:
        super().__init__()
        self.net, self.colours = net, colours
        self.images = len(task.input_shape) == 3
        sides = (1, -1, 1, 1) if self.images else (1, -1)
        self.register_buffer("mean", torch.tensor(task.mean).view(sides))
        self.register_buffer("scale", 1 / torch.tensor(task.std).view(sides))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.images:
            x = (x - self.mean) * self.scale
            if self.colours > x.shape[1]:
                x = torch.cat([x] * self.colours, 1)
        logits: torch.Tensor = self.net(x)
        return logits


def model_space(path: str, args: Mapping[str, Any], task: TaskInfo) -> ModelSpace:
    """The model space that ``module:name`` means; ``nni_hub:NAME`` is one of NNI's hub.

    Raises:
        ContentError: it cannot be imported or made, or is no model space.
    """
    module, _, name = path.partition(":")
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what has no labels starts alike in every process
        factory = import_object(f"nni.nas.hub.pytorch:{name}" if module == HUB else path, "model space")
        if isinstance(factory, ModelSpace):
            return factory
        try:
            known = inspect.signature(getattr(factory, "_init_wrapped", factory)).parameters
            own = {"num_labels": task.classes} if "num_labels" in known and "num_labels" not in args else {}
            space = factory(**own, **args)
        except NasError:
            raise
        except Exception as error:  # whatever the user's class raises
            raise ContentError(
                f"{path} cannot be made: {type(error).__name__}: {error}.", expected="a ModelSpace with labels for all "
                "its choices", remedy="check space.args",
            ) from error  # fmt: skip
    if not isinstance(space, ModelSpace):
        raise ContentError(
            f"{path} is a {type(space).__name__}.", expected="a subclass of nni.nas.nn.pytorch.ModelSpace, or a "
            "function that makes one",
        )  # fmt: skip
    return space


def frozen(space: ModelSpace, sample: Mapping[str, Any]) -> nn.Module:
    """The model that NNI makes of the labels' values. It has modules without labels in common with the space.

    Raises:
        SpaceError: NNI cannot make it.
    """
    with quiet():
        try:
            model: nn.Module = space.freeze(dict(sample))
        except Exception as error:  # whatever the user's modules raise
            raise SpaceError(
                f"{type(space).__name__} does not freeze with {shown(sample)}: {type(error).__name__}: {error}.",
                expected="models for all values of the labels",
            ) from error
    return model


def layer_macs(model: nn.Module, x: torch.Tensor) -> dict[str, int]:
    """Path of a convolution or linear layer → its multiplications for one sample, as ``model`` runs them on ``x``."""
    found: dict[str, int] = {}

    def count(layer: Any, args: Any, out: torch.Tensor, path: str) -> None:
        outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        found[path] = found.get(path, 0) + out[0].numel() * layer.weight.numel() // outputs

    for path, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(partial(count, path=path))
    with torch.no_grad():
        model(x)
    return found


def wanted_colours(space: nn.Module, task: TaskInfo) -> int:
    """Channels that the model wants: the data's, or three where those are grey and the model takes no grey."""
    channels = task.input_shape[0]
    if len(task.input_shape) != 3 or channels != 1:
        return channels
    first = next((m for m in space.modules() if isinstance(m, nn.Conv2d)), None)
    return 3 if first is not None and first.in_channels == 3 else channels


def shown(values: Mapping[str, Any]) -> str:
    """The first few labels and their values, for messages."""
    text = ", ".join(f"{label}={value!r}" for label, value in list(values.items())[:SHOWN])
    return text + (f" and {len(values) - SHOWN} more" if len(values) > SHOWN else "")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of NNI about the versions of others, which nobody can do anything about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
