"""Tasks of one label per sample, whatever the samples are: cross-entropy, and accuracy, recall and F1."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F
from torch import Tensor

from nas.errors import DataError, ExperimentError, TrainingError
from nas.tasks.base import Task

METRICS = ("accuracy", "macro_recall", "macro_f1")


class LabelledTask(Task):
    """Loss and metrics of a classification; a subclass reads the data and says how they are augmented."""

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy."""
        return F.cross_entropy(logits, y)

    def evaluate(self, logits: npt.NDArray[Any], y: npt.NDArray[Any]) -> dict[str, float]:
        """Accuracy, macro recall and macro F1, each 0..1.

        Raises:
            DataError: the shapes do not fit.
            TrainingError: a logit is not finite: the model diverged.
        """
        logits, y = np.asarray(logits), np.asarray(y)
        if logits.shape != (len(y), self.info.classes) or not len(y):
            raise DataError(
                f"Logits of shape {list(logits.shape)} for {len(y)} labels.",
                expected=f"[n, {self.info.classes}] for n labels, at least one",
            )
        if not np.isfinite(logits).all():
            raise TrainingError(
                "The model's logits are not finite: the training diverged.", remedy="lower the learning rate"
            )
        return class_metrics(logits.argmax(axis=1), y, self.info.classes)


def class_metrics(predicted: npt.NDArray[Any], y: npt.NDArray[Any], classes: int) -> dict[str, float]:
    """Accuracy; recall averaged over the classes of ``y``; F1 averaged over those of ``y`` and of ``predicted``."""
    confusion = np.bincount(y * classes + predicted, minlength=classes * classes).reshape(classes, classes)
    hits, actual, said = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    seen, either = actual > 0, actual + said > 0
    return {
        "accuracy": float(hits.sum() / len(y)),
        "macro_recall": float((hits[seen] / actual[seen]).mean()),
        "macro_f1": float((2 * hits[either] / (actual + said)[either]).mean()),
    }


def check_options(seed: int, valid: float, test: float, metric: str, limit: int | None, limit_test: int | None) -> None:
    """The options that every such task has are in range; raises ExperimentError where one is not."""
    for name, share in (("valid", valid), ("test", test)):
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
            raise ExperimentError(f"{name} is {share!r}.", expected="a share of the samples between 0 and 1")
    if metric not in METRICS:
        raise ExperimentError(f"Unknown metric {metric!r}.", expected=f"one of {', '.join(METRICS)}")
    for name, count, least in (("seed", seed, 0), ("limit", limit, 1), ("limit_test", limit_test, 1)):
        if count is not None or name == "seed":
            check_count(name, count, least)


def check_count(name: str, count: Any, least: int) -> None:
    """``count`` is a whole number of at least ``least``; raises ExperimentError where it is not."""
    if isinstance(count, bool) or not isinstance(count, int) or count < least:
        raise ExperimentError(f"{name} is {count!r}.", expected=f"a whole number, {least} or more")
