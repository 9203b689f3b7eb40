"""The contract of a task: data in three splits, a loss, a distillation loss and metrics, one of them the quality."""

from __future__ import annotations

import abc
import hashlib
from functools import cached_property
from typing import Any

import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from nas.errors import DataError, ExperimentError
from nas.registry import Registry
from nas.space import TaskInfo

SPLITS = ("train", "valid", "test")


class Task(abc.ABC):
    """What a student must learn, and how well it did.

    A subclass calls this constructor with its splits and implements :meth:`loss` and :meth:`evaluate`.

    Args:
        splits: ``(x, y)`` for each of train, valid and test; ``x [n, *input_shape]`` in raw units, of ``info.dtype``,
            ``y [n]`` int64.
        info: shapes and statistics of the training split.
        metric: name of the metric that is the quality; more is better.
        classes: names of the classes.

    Attributes:
        test_reads: how often the test split was read; a search leaves it at 0.
    """

    def __init__(
        self, splits: dict[str, tuple[Tensor, Tensor]], info: TaskInfo, metric: str, classes: tuple[str, ...]
    ) -> None:
        self._splits = splits
        self.info = info
        self.metric = metric
        self.classes = classes
        self.test_reads = 0

    def split(self, name: str) -> tuple[Tensor, Tensor]:
        """``(x, y)`` of "train", "valid" or "test"; not to be changed in place. Reading "test" is counted.

        Raises:
            DataError: there is no such split.
        """
        if name not in self._splits:
            raise DataError(f"There is no split {name!r}.", expected=f"one of {', '.join(SPLITS)}")
        if name == "test":
            self.test_reads += 1
        return self._splits[name]

    @abc.abstractmethod
    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Mean loss of ``logits [n, classes]`` against the labels ``y [n]``; a scalar."""

    @abc.abstractmethod
    def evaluate(self, logits: npt.NDArray[Any], y: npt.NDArray[Any]) -> dict[str, float]:
        """Every metric of ``logits [n, classes]`` against ``y [n]``, :attr:`metric` among them."""

    def quality(self, logits: npt.NDArray[Any], y: npt.NDArray[Any]) -> float:
        """The metric that counts, of :meth:`evaluate`."""
        return self.evaluate(logits, y)[self.metric]

    def distillation_loss(
        self, logits: Tensor, teacher_logits: Tensor, y: Tensor, weight: float, temperature: float
    ) -> Tensor:
        """(1 - w) loss + w T² KL(softmax(teacher / T) ‖ softmax(student / T)); Hinton et al. 2015, section 2.

        T² keeps the gradients of the soft targets as large as those of the labels whatever T is.

        Args:
            logits, teacher_logits: ``[n, classes]``.
            y: labels ``[n]``.
            weight: w, 0..1; 0 needs no teacher.
            temperature: T, above 0.

        Raises:
            ExperimentError: weight or temperature is out of range.
        """
        if not 0 <= weight <= 1 or not temperature > 0:
            raise ExperimentError(
                f"Distillation weight {weight} and temperature {temperature}.",
                expected="a weight from 0 to 1 and a temperature above 0",
            )
        if weight == 0:
            return self.loss(logits, y)
        soft = F.kl_div(
            F.log_softmax(logits / temperature, dim=-1),
            F.log_softmax(teacher_logits.detach() / temperature, dim=-1),
            reduction="batchmean",
            log_target=True,
        )
        return (1 - weight) * self.loss(logits, y) + weight * temperature**2 * soft

    def augment(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """A random variant of the training batch ``x [n, *input_shape]``, drawn from ``generator`` (default: as is)."""
        return x

    def student_files(self) -> dict[str, bytes]:
        """File name → content of what a student needs to read raw data, such as a vocabulary (default: nothing)."""
        return {}

    @cached_property
    def fingerprint(self) -> str:
        """Short hash of the data and how they are split; augmentation and metric are not part of it."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for name in SPLITS:
            for tensor in self._splits[name]:
                digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
                digest.update(tensor.numpy().reshape(-1).data)
        return digest.hexdigest()[:12]


tasks: Registry[type[Task]] = Registry("task")
