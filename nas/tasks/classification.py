"""Image classification: one label per image; accuracy, recall and F1; shifts and flips as augmentation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nas.errors import ExperimentError
from nas.space import TaskInfo
from nas.tasks.base import tasks
from nas.tasks.data import Images, ReadOptions, read
from nas.tasks.labelled import LabelledTask, check_options
from nas.tasks.splits import Shares, limited, three_way


@tasks.register("classification")
class ImageClassification(LabelledTask):
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
        check_options(seed, valid, test, metric, limit, limit_test)
        arrays = read(data, ReadOptions(_height_width(image_size), channels))
        if isinstance(shift, bool) or not isinstance(shift, int) or not 0 <= shift < min(arrays.x.shape[2:]):
            raise ExperimentError(
                f"shift is {shift!r}.", expected=f"pixels, 0 to {min(arrays.x.shape[2:]) - 1} for these images"
            )
        own_test = arrays.test is not None
        train, valid_, test_ = three_way(
            arrays.y, arrays.classes, str(data), Shares(seed, valid, test, limit), own_test=own_test
        )
        splits = {"train": (arrays.x[train], arrays.y[train]), "valid": (arrays.x[valid_], arrays.y[valid_])}
        test_x, test_y = arrays.test or (arrays.x, arrays.y)
        if own_test:
            test_ = np.arange(len(test_y))
        test_ = limited(test_y, test_, limit_test, str(data), seed)
        splits["test"] = (test_x[test_], test_y[test_])
        x = splits["train"][0]
        mean, std = channel_statistics(x)
        info = TaskInfo(x.shape[1:], len(arrays.classes), mean, std, arrays.value_range)
        tensors = {name: (torch.from_numpy(x), torch.from_numpy(y)) for name, (x, y) in splits.items()}
        super().__init__(tensors, info, metric, arrays.classes)
        self.shift, self.flip = shift, flip
        self._fill = torch.from_numpy(x.min(axis=(0, 2, 3)))

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


def _height_width(image_size: int | Sequence[int] | None) -> tuple[int, int] | None:
    if image_size is None:
        return None
    sides = [image_size, image_size] if isinstance(image_size, int) else list(image_size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ExperimentError(f"image_size is {image_size!r}.", expected="a number of pixels, or [height, width]")
    return sides[0], sides[1]
