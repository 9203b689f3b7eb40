"""The built-in sources that need no extra package: bundled digits, .npz files, and the user's own torch dataset."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nas.errors import DataError, NasError
from nas.registry import import_object
from nas.tasks.checks import check_memory
from nas.tasks.data import DATASET, RawArrays, ReadOptions, sources

Array = npt.NDArray[Any]
NPZ_NAMES = "x and y, or x_train and y_train; optionally x_test and y_test, and the names of the classes as classes"


@sources.register("digits")
def read_digits(data: str, options: ReadOptions) -> RawArrays:
    """scikit-learn's bundled 8x8 handwritten digits, values 0..16; nothing is downloaded."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return RawArrays(bunch.images, bunch.target, value_range=(0.0, 16.0))


@sources.register(".npz")
def read_npz(data: str, options: ReadOptions) -> RawArrays:
    """Arrays of an ``.npz`` file: ``x``/``y`` or ``x_train``/``y_train``, and ``x_test``/``y_test`` where present."""
    arrays = npz_arrays(data, lambda found: _npz_names(found, data), NPZ_NAMES)
    train = "_train" if "x_train" in arrays else ""
    test = (arrays["x_test"], arrays["y_test"]) if "x_test" in arrays else None
    classes = tuple(str(name) for name in arrays["classes"].ravel()) if "classes" in arrays else None
    return RawArrays(arrays[f"x{train}"], arrays[f"y{train}"], test, classes)


def npz_arrays(data: str, names: Callable[[list[str]], list[str]], expected: str) -> dict[str, Array]:
    """Those arrays of an ``.npz`` file that ``names`` picks from what is there; nothing else of it is read.

    Raises:
        DataError: there is no such file, or it is no archive of plain arrays. ``expected`` says what it should hold.
    """
    path = Path(data).expanduser()
    if not path.is_file():
        raise DataError(
            f"There is no file {data!r}; the working directory is {Path.cwd()}.",
            remedy="check the spelling and the working directory, or give an absolute path",
        )
    try:
        # numpy leaves a path's file open where the archive is damaged.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {name: file[name] for name in names(file.files)}
    except (ValueError, OSError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{data}: cannot be read as an .npz file of plain arrays: {error}.",
            expected=f"an archive that numpy.savez wrote, with {expected}",
            remedy="write it again with numpy.savez and no arrays of dtype object",
        ) from error


def _npz_names(found: list[str], data: str) -> list[str]:
    """The names to read; images and labels come in pairs."""
    pairs = [pair for pair in (("x_train", "y_train"), ("x", "y")) if set(pair) <= set(found)]
    whole_test = ("x_test" in found) == ("y_test" in found)
    if len(pairs) != 1 or not whole_test:
        raise DataError(f"{data}: the file holds {', '.join(found) or 'nothing'}.", expected=NPZ_NAMES)
    return [*pairs[0], *(name for name in ("x_test", "y_test", "classes") if name in found)]


@sources.register(DATASET)
def read_dataset(data: str, options: ReadOptions) -> RawArrays:
    """The user's own dataset, ``module:name``: an instance, or a class or function that gives one without arguments.

    Every sample is a pair of an image (tensor or array, ``[h, w]``, ``[c, h, w]`` or ``[h, w, c]``) and an integer.
    """
    dataset = _instance(import_object(data, "dataset"), data)
    images: list[Array] = []
    labels: list[int] = []
    values = 0
    for index, sample in enumerate(_samples(dataset, data)):
        image, label = _pair(sample, index, data)
        if images and image.shape != images[0].shape:
            raise DataError(
                f"{data}: sample {index} has shape {list(image.shape)}, sample 0 {list(images[0].shape)}.",
                expected="images of one shape",
                remedy="resize or crop them in the dataset",
            )
        values += image.size
        check_memory(values, options.max_bytes, f"{data} ({index + 1} samples read)")
        images.append(image)
        labels.append(label)
    if not images:
        raise DataError(f"{data}: the dataset is empty.", expected="pairs of an image and a label")
    return RawArrays(np.stack(images), np.array(labels, dtype=np.int64))


def _instance(found: Any, data: str) -> Any:
    iterable = hasattr(found, "__getitem__") or hasattr(found, "__iter__")
    if isinstance(found, type) or not iterable:
        if not callable(found):
            raise DataError(
                f"{data} is a {type(found).__name__}.",
                expected="a torch dataset, or a class or function that gives one when called without arguments",
            )
        try:
            found = found()
        except Exception as error:  # the user's own code may raise anything
            raise DataError(
                f"{data}: calling it without arguments failed: {type(error).__name__}: {error}.",
                expected="a dataset, or a class or function that gives one without arguments",
                remedy="wrap it in a function that fills the arguments in",
            ) from error
    if not hasattr(found, "__getitem__") and not hasattr(found, "__iter__"):
        raise DataError(f"{data} gives a {type(found).__name__}.", expected="a torch dataset of (image, label) pairs")
    return found


def _samples(dataset: Any, data: str) -> Iterator[Any]:
    """Every sample; what the user's code raises names the sample."""
    index = 0
    try:
        # torch's map-style datasets need not raise IndexError, so plain iteration over them might never end.
        mapped = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        for sample in (dataset[i] for i in range(len(dataset))) if mapped else dataset:
            yield sample
            index += 1
    except NasError:
        raise
    except Exception as error:  # the user's own code may raise anything
        raise DataError(
            f"{data}: reading sample {index} failed: {type(error).__name__}: {error}.",
            expected="a pair of an image and an integer label for every sample",
        ) from error


def _pair(sample: Any, index: int, data: str) -> tuple[Array, int]:
    if not isinstance(sample, tuple | list) or len(sample) != 2:
        size = f" of {len(sample)}" if isinstance(sample, tuple | list) else ""
        raise DataError(f"{data}: sample {index} is a {type(sample).__name__}{size}.", expected="a pair (image, label)")
    image, label = (_as_array(value) for value in sample)
    if image.ndim not in (2, 3):
        raise DataError(
            f"{data}: the image of sample {index} has shape {list(image.shape)}.",
            expected="[h, w], [c, h, w] or [h, w, c]",
        )
    if label.ndim != 0 or label.dtype.kind not in "iu":
        raise DataError(
            f"{data}: the label of sample {index} has dtype {label.dtype} and shape {list(label.shape)}.",
            expected="a single integer 0, 1, 2, …",
            remedy="return int(label); of a one-hot label, its argmax",
        )
    return image, int(label)


def _as_array(value: Any) -> Array:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        # numpy has no bfloat16.
        return np.asarray(value.float() if value.is_floating_point() else value)
    return np.asarray(value)
