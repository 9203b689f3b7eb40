"""Reading a folder of images, one subfolder per class, with Pillow."""

from __future__ import annotations

import importlib
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nas.errors import DataError, ExtraError
from nas.tasks.checks import check_memory
from nas.tasks.data import FOLDER, RawArrays, ReadOptions, sources

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
GREY_MODES = ("1", "L", "LA")
COLOUR_MODES = ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
FIRST_IMAGES = 8

Files = list[tuple[Path, int]]


@sources.register(FOLDER)
def read_folder(data: str, options: ReadOptions) -> RawArrays:
    """Images of 8 bits per channel, ``folder/<class>/<image>``; transparency is dropped.

    A folder with the two subfolders ``train`` and ``test``, each with the classes in it, brings its own test split.
    Images are grey where the first of every class are, else RGB; resizing does not keep proportions.
    """
    image_module = _pillow()
    root = Path(data).expanduser()
    names = [folder.name for folder in _subfolders(root)]
    if "train" in names and "test" in names:
        if len(names) > 2:
            raise DataError(
                f"{data}: besides train and test there are {', '.join(sorted({*names} - {'train', 'test'}))}.",
                expected="train and test only; the validation split is cut from train",
                remedy="move those images into train",
            )
        train, classes = _list_files(root / "train", data)
        test_files, test_classes = _list_files(root / "test", data)
        if classes != test_classes:
            odd = sorted(set(classes) ^ set(test_classes))
            raise DataError(
                f"{data}: the classes of train and test differ in {', '.join(odd)}.", expected="the same subfolders"
            )
    else:
        train, classes = _list_files(root, data)
        test_files = []
    reader = _Reader(image_module, data, options, train)
    x, y = reader.read(train)
    return RawArrays(x, y, reader.read(test_files) if test_files else None, classes, (0.0, 255.0))


def _pillow() -> Any:
    try:
        return importlib.import_module("PIL.Image")
    except ImportError as error:
        raise ExtraError("Reading images from a folder needs Pillow.", remedy="pip install pillow") from error


def _subfolders(root: Path) -> list[Path]:
    return sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _list_files(root: Path, data: str) -> tuple[Files, tuple[str, ...]]:
    """Every image with its label, and the classes; in the order of the names, so that it is the same everywhere."""
    folders = _subfolders(root)
    if len(folders) < 2:
        raise DataError(
            f"{data}: {root} has {len(folders)} subfolders.", expected="one subfolder of images per class, at least 2"
        )
    files: Files = []
    for label, folder in enumerate(folders):
        images = sorted(entry for entry in folder.iterdir() if _is_image(entry))
        if not images:
            raise DataError(
                f"{data}: there are no images in {folder}.",
                expected=f"files ending in {', '.join(SUFFIXES)}",
                remedy="remove the subfolder if it is not a class",
            )
        files += [(image, label) for image in images]
    return files, tuple(folder.name for folder in folders)


def _is_image(entry: Path) -> bool:
    return entry.is_file() and entry.suffix.lower() in SUFFIXES and not entry.name.startswith(".")


class _Reader:
    """Reads files to the one size and number of channels that the options or the first images decide."""

    def __init__(self, image_module: Any, data: str, options: ReadOptions, files: Files) -> None:
        self.module, self.data, self.options = image_module, data, options
        if options.channels not in (None, 1, 3):
            raise DataError(f"{data}: channels is {options.channels}.", expected="1 for grey or 3 for colour")
        self.channels = options.channels or self._decide_channels(files)
        self.first, self.size = files[0][0], options.image_size

    def read(self, files: Files) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """Images ``[n, channels, height, width]`` and labels ``[n]``."""
        first = self._pixels(files[0][0])
        check_memory(len(files) * first.size, self.options.max_bytes, self.data)
        images = np.empty((len(files), *first.shape), dtype=np.uint8)
        for i, (path, _) in enumerate(files):
            images[i] = self._pixels(path)
        return images, np.array([label for _, label in files], dtype=np.int64)

    def _decide_channels(self, files: Files) -> int:
        for _, of_class in groupby(files, key=lambda file: file[1]):
            if any(self._open(path).mode in COLOUR_MODES for path, _ in islice(of_class, FIRST_IMAGES)):
                return 3
        return 1

    def _pixels(self, path: Path) -> npt.NDArray[np.uint8]:
        image = self._open(path)
        if self.channels == 1 and image.mode in COLOUR_MODES and self.options.channels is None:
            raise DataError(
                f"{self.data}: the first images are grey, but {path} is in colour.",
                remedy="set channels to 3 for colour, or to 1 to turn all to grey",
            )
        image = image.convert("L" if self.channels == 1 else "RGB")
        if self.options.image_size is not None:
            height, width = self.options.image_size
            image = image.resize((width, height), self.module.Resampling.BILINEAR)
        self.size = self.size or (image.height, image.width)
        if (image.height, image.width) != self.size:
            raise DataError(
                f"{self.data}: {path} is {image.height}x{image.width}, "
                f"{self.first} is {self.size[0]}x{self.size[1]} (height x width).",
                expected="images of one size",
                remedy="set image_size, and all are resized",
            )
        pixels = np.asarray(image, dtype=np.uint8).reshape(image.height, image.width, self.channels)
        return pixels.transpose(2, 0, 1)

    def _open(self, path: Path) -> Any:
        try:
            with self.module.open(path) as image:
                image.load()
        except (OSError, SyntaxError, ValueError, self.module.DecompressionBombError) as error:
            raise DataError(
                f"{self.data}: {path} cannot be read as an image: {error}.", remedy="repair or remove the file"
            ) from error
        if image.mode not in GREY_MODES + COLOUR_MODES:
            raise DataError(
                f"{self.data}: {path} has pixels of mode {image.mode}.",
                expected="8 bits per channel, grey or colour",
                remedy="convert the images, or store their values in an .npz file",
            )
        return image
