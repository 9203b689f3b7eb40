"""What data must satisfy before anything learns from it; each check fails with one error that names the source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nas.errors import DataError

CHANNELS = (1, 3, 4)


def as_images(x: npt.NDArray[Any], where: str) -> npt.NDArray[Any]:
    """``x`` as ``[n, channels, height, width]``, its dtype unchanged.

    ``[n, h, w]`` is one channel. Of four axes, the channels are the one that is 1, 3 or 4 long; where both
    the second and the last are, the second is taken, as torch does. Where neither is, the second is taken if
    it is shorter than both others; anything else is refused rather than guessed.
    """
    x = np.asarray(x)
    if x.dtype.kind not in "uifb":
        raise DataError(f"{where}: the images have dtype {x.dtype}.", expected="numbers, uint8 or float")
    if x.size == 0:
        raise DataError(
            f"{where}: there are no images (shape {list(x.shape)}).",
            expected="at least one image of at least one pixel",
        )
    if x.ndim == 3:
        return x[:, None]
    if x.ndim == 4:
        _, a, b, c = x.shape
        if a in CHANNELS:
            return x
        if c in CHANNELS:
            return x.transpose(0, 3, 1, 2)
        if a < min(b, c):
            return x
    raise DataError(
        f"{where}: the images have shape {list(x.shape)}, in which the channels cannot be told.",
        expected="[n, h, w], [n, c, h, w] or [n, h, w, c] with 1, 3 or 4 channels",
        remedy="store the images as [n, c, h, w]",
    )


def as_labels(y: npt.NDArray[Any], where: str) -> npt.NDArray[np.int64]:
    """``y`` as ``[n]`` int64."""
    y = np.asarray(y)
    if y.ndim != 1:
        raise DataError(
            f"{where}: the labels have shape {list(y.shape)}.",
            expected="one integer per sample, shape [n]",
            remedy="store y.argmax(1) of one-hot labels, or y.ravel() of a column",
        )
    if y.dtype.kind not in "iu":
        raise DataError(
            f"{where}: the labels have dtype {y.dtype}.",
            expected="integers 0, 1, 2, … one per class",
            remedy="number the classes, e.g. classes, y = numpy.unique(y, return_inverse=True)",
        )
    if len(y) and y.min() < 0:
        raise DataError(
            f"{where}: label {int(y.min())} at index {int(y.argmin())} is negative.",
            expected="integers 0, 1, 2, … one per class",
            remedy="leave unlabelled samples out",
        )
    return y.astype(np.int64)


def as_float32(x: npt.NDArray[Any], where: str) -> npt.NDArray[np.float32]:
    """``x`` as contiguous float32, every value finite after the conversion."""
    with np.errstate(over="ignore", invalid="ignore"):
        result = np.ascontiguousarray(x, dtype=np.float32)
    if x.dtype.kind == "f":
        bad = ~np.isfinite(result).reshape(len(result), -1).all(axis=1)
        if bad.any():
            raise DataError(
                f"{where}: {int(bad.sum())} images hold NaN, infinite or too large values, "
                f"the first at index {int(bad.argmax())}.",
                expected="finite float32 values",
                remedy="leave these images out, or replace the values",
            )
    return result


def check_lengths(x: npt.NDArray[Any], y: npt.NDArray[Any], where: str, what: str = "images") -> None:
    """As many labels as samples."""
    if len(x) != len(y):
        raise DataError(
            f"{where}: {len(x)} {what} but {len(y)} labels.", expected=f"one label for each of the {what}"
        )


def check_options(x: npt.NDArray[Any], image_size: tuple[int, int] | None, channels: int | None, where: str) -> None:
    """The images are what was asked for; only folders are resized or recoloured."""
    if image_size is not None and x.shape[2:] != image_size:
        raise DataError(
            f"{where}: the images are {x.shape[2]}x{x.shape[3]}, image_size asks for {image_size[0]}x{image_size[1]}.",
            expected="only the images of a folder are resized",
            remedy="leave image_size out, or store the data at that size",
        )
    if channels is not None and x.shape[1] != channels:
        raise DataError(
            f"{where}: the images have {x.shape[1]} channels, channels asks for {channels}.",
            expected="only the images of a folder are converted",
            remedy="leave channels out, or store the data with that many channels",
        )


def check_memory(values: int, max_bytes: int, where: str, what: str = "images", width: int = 4) -> None:
    """``values`` numbers fit the memory limit as float32, or as numbers of ``width`` bytes."""
    if values * width > max_bytes:
        raise DataError(
            f"{where}: the {what} take {_size(values * width)} or more in memory.",
            expected=f"at most {_size(max_bytes)}",
            remedy=f"use fewer or smaller {what}",
        )


def class_names(y: npt.NDArray[np.int64], names: Sequence[str] | None, where: str) -> tuple[str, ...]:
    """Names of the classes of ``y``; every class must occur, and there must be two."""
    present = np.unique(y)
    count = int(present[-1]) + 1 if names is None else len(names)
    if present[-1] >= count:
        raise DataError(
            f"{where}: label {int(present[-1])} but {count} class names.", expected=f"labels 0..{count - 1}"
        )
    if len(present) < 2:
        raise DataError(
            f"{where}: every sample has label {int(present[0])}.", expected="at least 2 classes to tell apart"
        )
    if len(present) < count:
        # Labels may be huge; stop at the first few holes.
        missing = np.setdiff1d(np.arange(min(count, len(present) + 5)), present)[:5]
        listed = ", ".join(str(int(label)) for label in missing) + ", …" * (count - len(present) > len(missing))
        raise DataError(
            f"{where}: labels go up to {count - 1} but only {len(present)} different ones occur; missing: {listed}.",
            expected="every label 0, 1, 2, … occurs",
            remedy="number the classes without gaps, e.g. _, y = numpy.unique(y, return_inverse=True)",
        )
    return tuple(str(name) for name in names) if names is not None else tuple(str(i) for i in range(count))


def check_contrast(x: npt.NDArray[np.float32], where: str) -> None:
    """At least one image shows something."""
    flat = x.reshape(len(x), -1)
    if (flat.min(axis=1) == flat.max(axis=1)).all():
        raise DataError(
            f"{where}: every image is constant: all its values are the same.",
            expected="images whose pixels differ",
            remedy="check how the data were written; a wrong scale cast to integers gives this",
        )


def check_test_fits(
    test: tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]],
    x: npt.NDArray[np.float32],
    classes: int,
    where: str,
) -> None:
    """The source's own test split has the shape and the classes of its training split."""
    test_x, test_y = test
    if test_x.shape[1:] != x.shape[1:]:
        raise DataError(
            f"{where}: training images have shape {list(x.shape[1:])}, test images {list(test_x.shape[1:])}.",
            expected="the same [channels, height, width]",
        )
    if test_y.max() >= classes:
        raise DataError(
            f"{where}: the test split has label {int(test_y.max())}, which the training split lacks.",
            expected=f"labels 0..{classes - 1}",
        )


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.2f} MiB"
