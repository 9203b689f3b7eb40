"""The contract of a sample source: images from anywhere but the data that the teacher was trained on."""

from __future__ import annotations

import abc
import copy
import math

import torch
from torch import Tensor, nn

from nas.errors import DataError, TrainingError
from nas.registry import Registry
from nas.space import TaskInfo


class Source(abc.ABC):
    """Where the student's training inputs come from.

    A subclass takes ``(teacher, info, seed, images)`` first and its own options as keywords after them. It draws from
    :attr:`generator` alone, so that a seed says what is drawn.

    Args:
        teacher: raw inputs → logits; copied, never changed.
        info: shape, range and statistics of the inputs.
        seed: decides everything that is drawn.
        images: unlabelled inputs of the user's own ``[n, *input_shape]``, float32 in raw units, where there are any.

    Attributes:
        teacher: the copy, in evaluation mode and without gradients of its own.
        needs_images: whether there is nothing to draw without ``images``.
        learns: whether :meth:`improve` does anything: such a source is as good as its last rounds.

    Raises:
        DataError: the inputs are no floats, the teacher does not map them to the classes, or the images do not fit.
    """

    learns = False
    needs_images = False

    def __init__(self, teacher: nn.Module, info: TaskInfo, seed: int, images: Tensor | None = None) -> None:
        self.teacher, self.info, self.seed = frozen(teacher, info), info, seed
        if self.needs_images:
            self.images = checked_images(images, info)
        self.generator = torch.Generator().manual_seed(seed)

    def improve(self, student: nn.Module) -> None:  # noqa: B027  nothing to do for most
        """One round of the source's own training, against ``student`` as it is now (default: nothing)."""

    @abc.abstractmethod
    def batch(self, n: int) -> Tensor:
        """``[n, *input_shape]`` float32 in raw units, without gradients; other ones at every call."""

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers of the source's own generator."""
        return torch.randn(*shape, generator=self.generator)


sources: Registry[type[Source]] = Registry("sample source")


def frozen(teacher: nn.Module, info: TaskInfo) -> nn.Module:
    """A copy of the teacher in evaluation mode that cannot learn.

    Raises:
        DataError: the inputs are no floats, have no range, or the teacher does not map them to ``[n, classes]``.
    """
    if info.dtype != "float32":
        raise DataError(
            f"Inputs of type {info.dtype} cannot be synthesised.",
            expected="float32 inputs such as images: tokens have no gradient for a generator to follow",
            remedy="distil from unlabelled text of your own instead",
        )
    low, high = info.value_range
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise DataError(f"The value range is {low} to {high}.", expected="two finite values, the lower one first")
    copied = copy.deepcopy(teacher).requires_grad_(False)
    check_output(copied, info, "teacher")
    return copied.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def check_output(model: nn.Module, info: TaskInfo, what: str) -> None:
    """Puts ``model`` into evaluation mode and asks it about two inputs.

    Raises:
        DataError: it does not map them to ``[n, classes]``.
    """
    sample = torch.full((2, *info.input_shape), sum(info.value_range) / 2)
    try:
        with torch.no_grad():
            logits = model.eval()(sample)
    except Exception as error:  # whatever the user's module raises
        raise DataError(
            f"The {what} fails on inputs {list(sample.shape)}: {error}.", expected="raw inputs of the task's shape"
        ) from error
    found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if found != [2, info.classes]:
        raise DataError(f"The {what}'s output for 2 inputs is {found}.", expected=f"logits [2, {info.classes}]")


def image_shape(info: TaskInfo) -> tuple[int, int, int]:
    """Channels, height and width.

    Raises:
        DataError: the inputs are no images.
    """
    if len(info.input_shape) != 3:
        raise DataError(
            f"Inputs of shape {list(info.input_shape)} are no images.", expected="[channels, height, width]"
        )
    channels, height, width = info.input_shape
    return channels, height, width


def checked_images(images: Tensor | None, info: TaskInfo) -> Tensor:
    """The user's unlabelled inputs ``[n, *input_shape]``, float32.

    Raises:
        DataError: there are none, they have another shape or type, or are not finite.
    """
    if images is None:
        raise DataError(
            "This source draws from unlabelled images, and there are none.",
            expected="images: a float32 tensor [n, *input_shape] in raw units",
            remedy="the source 'gan', which needs none",
        )
    found = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
    if (
        not isinstance(images, Tensor)
        or images.dtype != torch.float32
        or images.shape[1:] != torch.Size(info.input_shape)
        or not len(images)
    ):
        raise DataError(
            f"The unlabelled images are {found}.", expected=f"a float32 tensor [n, *{list(info.input_shape)}], n ≥ 1"
        )
    if not torch.isfinite(images).all():
        raise DataError("The unlabelled images hold NaN or infinite values.", expected="finite raw values")
    return images


def finite(loss: Tensor, what: str) -> Tensor:
    """``loss``, unless it diverged.

    Raises:
        TrainingError: it is NaN or infinite.
    """
    if not torch.isfinite(loss):
        raise TrainingError(f"The loss of {what} became {loss.item()}.", remedy="a lower lr")
    return loss
