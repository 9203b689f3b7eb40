"""Image classification: one label per image; accuracy, recall and F1; shifts and flips as augmentation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from nas.errors import DataError, ExperimentError, TrainingError
from nas.space import TaskInfo
from nas.tasks.base import Task, tasks
from nas.tasks.data import Arrays, Images, ReadOptions, read
from nas.tasks.splits import Index, cut

METRICS = ("accuracy", "macro_recall", "macro_f1")


@tasks.register("classification")
class ImageClassification(Task):
    """Labelled images, split by seed so that every class keeps its share.

    Args:
        data: ``digits``, an .npz file, a folder with a subfolder of images per class, or a dataset's ``module:name``.
        seed: decides the splits and the subsets.
        valid: share of the samples for validation (of the training samples, where the data have a test split).
        test: share of the samples for the test; not used where the data have a test split of their own.
        metric: accuracy, macro_recall or macro_f1: which one is the quality.
        shift: augmentation moves an image by up to this many pixels in each direction.
        flip: augmentation mirrors every other image left to right.
        limit: at most so many samples for training and validation together.
        limit_test: at most so many samples for the test.
        image_size: side, or (height, width), that a folder's images are resized to.
        channels: 1 or 3, for a folder's images.

    Raises:
        ExperimentError: an option is out of range.
        DataError: the data cannot be read or split.
    """

    def __init__(
        self,
        data: str | Path,
        *,
        seed: int = 0,
        valid: float = 0.2,
        test: float = 0.2,
        metric: str = "accuracy",
        shift: int = 0,
        flip: bool = False,
        limit: int | None = None,
        limit_test: int | None = None,
        image_size: int | Sequence[int] | None = None,
        channels: int | None = None,
    ) -> None:
        _check_options(seed, valid, test, metric, limit, limit_test)
        arrays = read(data, ReadOptions(_height_width(image_size), channels))
        if isinstance(shift, bool) or not isinstance(shift, int) or not 0 <= shift < min(arrays.x.shape[2:]):
            raise ExperimentError(
                f"shift is {shift!r}.", expected=f"pixels, 0 to {min(arrays.x.shape[2:]) - 1} for these images"
            )
        train, valid_, test_ = _split(arrays, str(data), seed, valid, test, limit)
        splits = {"train": (arrays.x[train], arrays.y[train]), "valid": (arrays.x[valid_], arrays.y[valid_])}
        test_x, test_y = arrays.test or (arrays.x, arrays.y)
        if limit_test is not None and limit_test < len(test_):
            _check_limit("limit_test", limit_test, len(np.unique(test_y[test_])), str(data))
            test_, _ = cut(test_y, test_, limit_test, _rng(seed, 3))
        splits["test"] = (test_x[test_], test_y[test_])
        x = splits["train"][0]
        mean, std = channel_statistics(x)
        info = TaskInfo(x.shape[1:], len(arrays.classes), mean, std, arrays.value_range)
        tensors = {name: (torch.from_numpy(x), torch.from_numpy(y)) for name, (x, y) in splits.items()}
        super().__init__(tensors, info, metric, arrays.classes)
        self.shift, self.flip = shift, flip
        self._fill = torch.from_numpy(x.min(axis=(0, 2, 3)))

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

    def augment(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Each image of ``x [n, c, h, w]`` moved and mirrored by its own draw; the channel's minimum fills the edge."""
        if self.flip:
            mirrored = torch.rand(len(x), generator=generator, device=generator.device) < 0.5
            x = torch.where(mirrored.to(x.device)[:, None, None, None], x.flip(-1), x)
        if self.shift:
            size = (2, len(x))
            draws = torch.randint(0, 2 * self.shift + 1, size, generator=generator, device=generator.device)
            x = shifted(x, draws.to(x.device) - self.shift, self.shift, self._fill.to(x))
        return x


def shifted(x: Tensor, offsets: Tensor, reach: int, fill: Tensor) -> Tensor:
    """Images moved down and right.

    Args:
        x: ``[n, c, h, w]``.
        offsets: ``[2, n]`` pixels down and right of each image, from ``-reach`` to ``reach``.
        reach: the largest offset.
        fill: ``[c]``, what comes in at the edge.
    """
    n, c, h, w = x.shape
    padded = fill[:, None, None].expand(n, c, h + 2 * reach, w + 2 * reach).clone()
    padded[:, :, reach : reach + h, reach : reach + w] = x
    rows = torch.arange(h, device=x.device) + reach - offsets[0][:, None]
    columns = torch.arange(w, device=x.device) + reach - offsets[1][:, None]
    sample = torch.arange(n, device=x.device)[:, None, None, None]
    channel = torch.arange(c, device=x.device)[:, None, None]
    return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


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


def channel_statistics(x: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of ``x [n, c, h, w]``; a constant channel gets 1, to divide by."""
    mean = x.mean(axis=(0, 2, 3), dtype=np.float64)
    squares = np.zeros(len(mean))
    for start in range(0, len(x), 4096):  # in blocks: the differences in float64 take twice the images' memory
        difference = x[start : start + 4096] - mean[:, None, None]
        squares += np.einsum("nchw,nchw->c", difference, difference)
    std = np.sqrt(squares / (x.size / len(mean)))
    # Rounding leaves a constant channel a deviation of some ulps of its value.
    std[std <= 1e-6 * np.abs(mean)] = 1.0
    return tuple(mean.tolist()), tuple(std.tolist())


def _split(
    arrays: Arrays, where: str, seed: int, valid: float, test: float, limit: int | None
) -> tuple[Index, Index, Index]:
    """Samples of train and valid, and of test (which index the data's own test split where there is one)."""
    everything = np.arange(len(arrays.y))
    needed = 3 if arrays.test is None else 2
    counts = np.bincount(arrays.y)
    if counts.min() < needed:
        rare = int(counts.argmin())
        raise DataError(
            f"{where}: class {arrays.classes[rare]!r} has {int(counts[rare])} samples.",
            expected=f"at least {needed} of every class, one for each of {needed} splits",
            remedy="collect more of it, or leave the class out",
        )
    if arrays.test is None and valid + test >= 1:
        raise ExperimentError(
            f"valid and test are {valid} and {test}: nothing is left to train on.", expected="a sum below 1"
        )
    if arrays.test is None:
        test_, rest = cut(arrays.y, everything, round(test * len(everything)), _rng(seed, 0), reserve=2)
        valid *= len(everything) / len(rest)  # a share of all, now of what the test has left over
    else:
        test_, rest = np.arange(len(arrays.test[1])), everything
    if limit is not None and limit < len(rest):
        _check_limit("limit", limit, 2 * len(counts), where)
        rest, _ = cut(arrays.y, rest, limit, _rng(seed, 1), least=2)
    valid_, train = cut(arrays.y, rest, round(valid * len(rest)), _rng(seed, 2), reserve=1)
    return train, valid_, test_


def _check_limit(name: str, limit: int, least: int, where: str) -> None:
    if limit < least:
        raise DataError(
            f"{where}: {name} is {limit}.", expected=f"at least {least}: one of every class for each split cut from it"
        )


def _rng(seed: int, purpose: int) -> np.random.Generator:
    # One stream per cut: the test split stays the same whatever limit and valid are.
    return np.random.default_rng((seed, purpose))


def _check_options(
    seed: int, valid: float, test: float, metric: str, limit: int | None, limit_test: int | None
) -> None:
    for name, share in (("valid", valid), ("test", test)):
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
            raise ExperimentError(f"{name} is {share!r}.", expected="a share of the samples between 0 and 1")
    if metric not in METRICS:
        raise ExperimentError(f"Unknown metric {metric!r}.", expected=f"one of {', '.join(METRICS)}")
    for name, count, least in (("seed", seed, 0), ("limit", limit, 1), ("limit_test", limit_test, 1)):
        if count is None and name != "seed":
            continue
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            raise ExperimentError(f"{name} is {count!r}.", expected=f"a whole number, {least} or more")


def _height_width(image_size: int | Sequence[int] | None) -> tuple[int, int] | None:
    if image_size is None:
        return None
    sides = [image_size, image_size] if isinstance(image_size, int) else list(image_size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ExperimentError(f"image_size is {image_size!r}.", expected="a number of pixels, or [height, width]")
    return sides[0], sides[1]
