"""Reading data into memory: a name, a file, a folder or the user's own dataset becomes checked arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nas.errors import DataError
from nas.registry import Registry
from nas.tasks import checks

Images = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Arrays:
    """Checked data in memory.

    Attributes:
        x: ``[n, channels, height, width]`` in raw units (nothing is normalised).
        y: ``[n]`` labels, every one of ``0..len(classes)-1`` occurs.
        classes: names of the classes, in the order of the labels.
        value_range: smallest and largest raw value: of the format where it has one, else as observed in ``x``.
        test: ``(x, y)`` of the source's own test split, where it has one.
    """

    x: Images
    y: Labels
    classes: tuple[str, ...]
    value_range: tuple[float, float]
    test: tuple[Images, Labels] | None = None


@dataclass(frozen=True)
class RawArrays:
    """What a source returns, before the checks: any dtype, any accepted layout.

    Attributes:
        x: ``[n, h, w]``, ``[n, c, h, w]`` or ``[n, h, w, c]`` (see :func:`nas.tasks.checks.as_images`).
        y: ``[n]`` integer labels.
        test: ``(x, y)`` of the source's own test split, where it has one.
        classes: names of the classes; the labels themselves where they have none.
        value_range: where the format says it; otherwise it is observed.
    """

    x: npt.NDArray[Any]
    y: npt.NDArray[Any]
    test: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None = None
    classes: tuple[str, ...] | None = None
    value_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class ReadOptions:
    """How to read.

    Attributes:
        image_size: ``(height, width)`` that a folder's images are resized to; None: they must agree.
        channels: 1 for grey, 3 for colour; None: decided by a folder's first images.
        max_bytes: largest size of the images in memory, as float32.
    """

    image_size: tuple[int, int] | None = None
    channels: int | None = None
    max_bytes: int = 8 * 2**30


Source = Callable[[str, ReadOptions], RawArrays]

# A source is entered under a name ("digits") or a file suffix (".npz"); `find_source` gives FOLDER every other folder,
# and DATASET every "module:name".
FOLDER, DATASET = "<folder>", "<dataset>"
sources: Registry[Source] = Registry("data source")


def read(data: str | Path, options: ReadOptions | None = None) -> Arrays:
    """Read ``data`` into memory and check it.

    Args:
        data: the name of a source, a path, or ``module:name`` of a dataset.
        options: how to read.

    Raises:
        DataError: the data are missing, malformed, or cannot be learned from.
        ContentError: the module of ``module:name`` cannot be imported.
        ExtraError: reading this source needs an optional package.
    """
    options = options or ReadOptions()
    where = str(data)
    raw = find_source(where)(where, options)
    x, y = _checked(raw.x, raw.y, where, options)
    classes = checks.class_names(y, raw.classes, where)
    checks.check_contrast(x, where)
    test = None
    if raw.test is not None:
        test = _checked(*raw.test, f"{where} (test split)", options)
        checks.check_test_fits(test, x, len(classes), where)
    value_range = raw.value_range or (float(x.min()), float(x.max()))
    return Arrays(x, y, classes, value_range, test)


def _checked(x: npt.NDArray[Any], y: npt.NDArray[Any], where: str, options: ReadOptions) -> tuple[Images, Labels]:
    images = checks.as_images(x, where)
    labels = checks.as_labels(y, where)
    checks.check_lengths(images, labels, where)
    checks.check_options(images, options.image_size, options.channels, where)
    checks.check_memory(images.size, options.max_bytes, where)
    return checks.as_float32(images, where), labels


def find_source(data: str) -> Source:
    """The source that reads ``data``: by its name, by the file's suffix, as a folder, or as ``module:name``."""
    path = Path(data).expanduser()
    if data in sources and data not in (FOLDER, DATASET):
        return sources.get(data)
    if path.suffix.lower() in sources:
        return sources.get(path.suffix.lower())
    if path.is_dir():
        return sources.get(FOLDER)
    if ":" in data and not path.is_file():
        return sources.get(DATASET)
    if path.is_file():
        found = f"No source reads files like {data!r}."
    else:
        found = f"There is no file, folder or data source {data!r}; the working directory is {Path.cwd()}."
    names = ", ".join(name for name in sources if name not in (FOLDER, DATASET))
    raise DataError(
        found,
        expected=f"{names}, a folder with one subfolder of images per class, or 'module:name' of a torch dataset",
        remedy="check the spelling and the working directory, or give an absolute path",
    )
