"""Reading data: every source on real files, and every mistake in them ends in one clear error."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nas.errors import ContentError, DataError, ExtraError
from nas.tasks import ImageClassification, RawArrays, ReadOptions, read, sources

MNIST = Path(__file__).parents[2] / "shared" / "data" / "mnist.npz"


def images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def npz(tmp_path: Path) -> Callable[..., str]:
    def write(**arrays: Any) -> str:
        np.savez(tmp_path / "data.npz", **arrays)
        return str(tmp_path / "data.npz")

    return write


LABELS = np.arange(12) % 3


# ---- digits, and how a source is found --------------------------------------------------------


def test_digits_are_read_in_raw_units() -> None:
    digits = read("digits")
    assert digits.x.shape == (1797, 1, 8, 8)
    assert digits.x.dtype == np.float32
    assert digits.y.dtype == np.int64
    assert digits.classes == tuple("0123456789")
    assert digits.value_range == (0.0, 16.0)
    assert (digits.x.min(), digits.x.max()) == (0, 16)
    assert digits.test is None


def test_unknown_source_names_the_sources_and_the_working_directory() -> None:
    with pytest.raises(DataError, match="digitz") as caught:
        read("digitz")
    assert "digits" in caught.value.expected
    assert str(Path.cwd()) in str(caught.value)
    assert caught.value.remedy


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("1,2")
    with pytest.raises(DataError, match=r"No source reads files like .*table.csv"):
        read(tmp_path / "table.csv")


@pytest.mark.parametrize("name", ["<folder>", "<dataset>"])
def test_internal_names_are_no_sources(name: str) -> None:
    with pytest.raises(DataError, match="no file, folder or data source"):
        read(name)


def test_a_new_source_is_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_items", dict(sources._items))

    @sources.register("stripes")
    def read_stripes(data: str, options: ReadOptions) -> RawArrays:
        return RawArrays(images(20, 6, 6), np.arange(20) % 2, classes=("across", "down"))

    assert read("stripes").classes == ("across", "down")


# ---- .npz -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((12, 8, 9), (12, 1, 8, 9)),
        ((12, 3, 8, 9), (12, 3, 8, 9)),
        ((12, 8, 9, 3), (12, 3, 8, 9)),
        ((12, 8, 9, 1), (12, 1, 8, 9)),
        ((12, 8, 9, 4), (12, 4, 8, 9)),
        ((12, 3, 8, 3), (12, 3, 8, 3)),  # ambiguous: the second axis, as torch has it
        ((12, 2, 8, 9), (12, 2, 8, 9)),
    ],
)
def test_layouts(npz: Callable[..., str], shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    x = images(*shape)
    data = read(npz(x=x, y=LABELS))
    assert data.x.shape == expected
    assert data.x.flags.c_contiguous
    moved = np.moveaxis(x, -1, 1) if expected[2:] == shape[1:3] and len(shape) == 4 else x.reshape(expected)
    np.testing.assert_array_equal(data.x, moved)


def test_unclear_layout_is_refused(npz: Callable[..., str]) -> None:
    with pytest.raises(DataError, match=r"\[12, 8, 9, 2\], in which the channels cannot be told") as caught:
        read(npz(x=images(12, 8, 9, 2), y=LABELS))
    assert "[n, c, h, w]" in caught.value.remedy


def test_own_test_split_stays_the_test_split(npz: Callable[..., str]) -> None:
    test_x = images(6, 8, 8, seed=1)
    path = npz(x_train=images(12, 8, 8), y_train=LABELS, x_test=test_x, y_test=LABELS[:6])
    data = read(path)
    assert data.test is not None
    np.testing.assert_array_equal(data.test[0][:, 0], test_x)
    task = ImageClassification(path, valid=0.25)
    assert [len(task.split(name)[1]) for name in ("train", "valid", "test")] == [9, 3, 6]
    np.testing.assert_array_equal(task.split("test")[0][:, 0].numpy(), test_x)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float16, np.float64, bool])
def test_dtypes_become_float32(npz: Callable[..., str], dtype: type) -> None:
    x = images(12, 4, 5).astype(dtype)
    data = read(npz(x=x, y=LABELS.astype(np.uint8)))
    assert data.x.dtype == np.float32
    np.testing.assert_array_equal(data.x[:, 0], x.astype(np.float32))
    assert data.value_range == (float(x.min()), float(x.max()))


def test_class_names_of_the_file(npz: Callable[..., str]) -> None:
    assert read(npz(x=images(12, 4, 4), y=LABELS, classes=np.array(["a", "b", "c"]))).classes == ("a", "b", "c")


def test_missing_npz_says_where_it_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"no file 'data/nothing.npz'") as caught:
        read("data/nothing.npz")
    assert str(tmp_path) in caught.value.found


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": images(12, 8, 8), "y": LABELS}, "the file holds images, y"),
        ({"x": images(12, 8, 8), "y": LABELS, "x_test": images(3, 8, 8)}, "the file holds x, y, x_test"),
        ({"x": images(12, 8, 8), "y": LABELS[:10]}, "12 images but 10 labels"),
        ({"x": images(0, 8, 8), "y": LABELS[:0]}, "no images"),
        ({"x": images(12, 64), "y": LABELS}, r"shape \[12, 64\]"),
        ({"x": np.full((12, 8, 8), "a"), "y": LABELS}, "images have dtype <U1"),
        ({"x": np.zeros((12, 8, 8)), "y": LABELS}, "every image is constant"),
        ({"x": images(12, 8, 8), "y": LABELS * 0.5}, "labels have dtype float64"),
        ({"x": images(12, 8, 8), "y": LABELS.astype(str)}, "labels have dtype <U"),
        ({"x": images(12, 8, 8), "y": np.eye(3, dtype=int)[LABELS]}, r"labels have shape \[12, 3\]"),
        ({"x": images(12, 8, 8), "y": LABELS - 1}, "label -1 at index 0 is negative"),
        ({"x": images(12, 8, 8), "y": LABELS * 2}, r"up to 4 but only 3 .* missing: 1, 3\."),
        ({"x": images(12, 8, 8), "y": LABELS * 10**12}, r"missing: 1, 2, 3, 4, 5, …\."),
        ({"x": images(12, 8, 8), "y": LABELS * 0}, "every sample has label 0"),
        ({"x": images(12, 8, 8), "y": LABELS, "classes": np.array(["a", "b"])}, "label 2 but 2 class names"),
        ({"x": images(12, 8, 8), "y": LABELS, "classes": np.array(list("abcd"))}, r"missing: 3\."),
        (
            {"x_train": images(12, 8, 8), "y_train": LABELS, "x_test": images(3, 9, 9), "y_test": LABELS[:3]},
            r"training images have shape \[1, 8, 8\], test images \[1, 9, 9\]",
        ),
        (
            {"x_train": images(12, 8, 8), "y_train": LABELS, "x_test": images(3, 8, 8), "y_test": LABELS[:3] + 1},
            "test split has label 3",
        ),
        (
            {"x_train": images(12, 8, 8), "y_train": LABELS, "x_test": images(3, 8, 8), "y_test": LABELS[:2]},
            r"\(test split\): 3 images but 2 labels",
        ),
    ],
)
def test_malformed_arrays(npz: Callable[..., str], arrays: dict[str, np.ndarray], message: str) -> None:
    path = npz(**arrays)
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert path in caught.value.found
    assert caught.value.expected


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_values_that_are_not_finite(npz: Callable[..., str], value: float) -> None:
    x = images(12, 8, 8).astype(np.float64)
    x[3, 1, 1] = x[5, 0, 0] = value
    with pytest.raises(DataError, match=r"data.npz: 2 images hold NaN.* first at index 3"):
        read(npz(x=x, y=LABELS))


def test_pickles_are_never_opened(npz: Callable[..., str]) -> None:
    with pytest.raises(DataError, match=r"data.npz: cannot be read") as caught:
        read(npz(x=np.array([{"a": 1}] * 12), y=LABELS))
    assert "object" in caught.value.remedy


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04 cut short"])
def test_damaged_npz(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"bad.npz: cannot be read as an .npz file"):
        read(tmp_path / "bad.npz")


def test_a_single_array_under_the_wrong_suffix(tmp_path: Path) -> None:
    with open(tmp_path / "one.npz", "wb") as file:
        np.save(file, images(4, 4))
    with pytest.raises(DataError, match=r"one.npz: cannot be read"):
        read(tmp_path / "one.npz")


def test_memory_limit(npz: Callable[..., str]) -> None:
    with pytest.raises(DataError, match="MiB or more in memory") as caught:
        read(npz(x=images(12, 32, 32), y=LABELS), ReadOptions(max_bytes=4 * 12 * 32 * 32 - 1))
    assert "fewer or smaller" in caught.value.remedy
    assert len(read(npz(x=images(12, 32, 32), y=LABELS), ReadOptions(max_bytes=4 * 12 * 32 * 32)).x) == 12


def test_only_folders_are_resized_or_recoloured() -> None:
    with pytest.raises(DataError, match="images are 8x8, image_size asks for 16x16"):
        read("digits", ReadOptions(image_size=(16, 16)))
    with pytest.raises(DataError, match="1 channels, channels asks for 3"):
        read("digits", ReadOptions(channels=3))
    assert read("digits", ReadOptions(image_size=(8, 8), channels=1)).x.shape == (1797, 1, 8, 8)


@pytest.mark.skipif(not MNIST.exists(), reason="MNIST is not on this machine")
def test_mnist() -> None:
    task = ImageClassification(MNIST, limit=1000, limit_test=500)
    assert task.info.input_shape == (1, 28, 28)
    assert task.info.value_range == (0, 255)
    assert [len(task.split(name)[1]) for name in ("train", "valid", "test")] == [800, 200, 500]
    with np.load(MNIST) as file:
        original = {image.tobytes() for image in file["x_test"]}
    test_x = task.split("test")[0].numpy().astype(np.uint8)
    assert all(image.tobytes() in original for image in test_x)


# ---- the user's own dataset ---------------------------------------------------------------------

USER_MODULE = """
import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

class Squares(Dataset):
    def __init__(self, n=12):
        self.n = n
    def __len__(self):
        return self.n
    def __getitem__(self, i):
        # Like many map-style datasets, no IndexError beyond the end.
        return torch.full((3, 5, 4), float(i)) + torch.arange(4.0), i % 3

class Stream(IterableDataset):
    def __iter__(self):
        return ((np.full((5, 4, 3), i) + np.arange(3), np.int32(i % 2)) for i in range(6))

class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.rand(64, 64), 0

class Broken(Squares):
    def __getitem__(self, i):
        if i == 7:
            raise OSError("disk on fire")
        return super().__getitem__(i)

class NeedsRoot(Dataset):
    def __init__(self, root):
        pass

def make():
    return Squares(9)

def half_precision():
    return [(torch.eye(4, dtype=torch.bfloat16) * i, torch.tensor(i % 2)) for i in range(4)]

instance = Squares(6)
number = 3
def gives_number():
    return 3
empty = []
triples = [(torch.eye(4), 0, "extra")]
no_pairs = [torch.eye(4)]
vectors = [(torch.arange(4.0), 0)]
float_labels = [(torch.eye(4), 0.0)]
one_hot = [(torch.eye(4), torch.tensor([0, 1]))]
uneven = [(torch.eye(4), 0), (torch.eye(5), 1)]
not_finite = [(torch.eye(4), 0), (torch.eye(4) / 0, 1)]
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module in the working directory, as a user has it."""
    (tmp_path / "my_squares.py").write_text(USER_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "my_squares"
    sys.modules.pop("my_squares", None)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("Squares", (12, 3, 5, 4)),
        ("make", (9, 3, 5, 4)),
        ("instance", (6, 3, 5, 4)),
        ("Stream", (6, 3, 5, 4)),
        ("half_precision", (4, 1, 4, 4)),
    ],
)
def test_own_dataset(user_module: str, name: str, shape: tuple[int, ...]) -> None:
    data = read(f"{user_module}:{name}")
    assert data.x.shape == shape
    assert data.x.dtype == np.float32
    assert len(data.y) == shape[0]
    assert str(Path.cwd()) in sys.path, "worker processes inherit the path and must find the module too"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NeedsRoot", "calling it without arguments failed: TypeError"),
        ("number", "is a int"),
        ("gives_number", "gives a int"),
        ("empty", "the dataset is empty"),
        ("triples", "sample 0 is a tuple of 3"),
        ("no_pairs", "sample 0 is a Tensor"),
        ("vectors", r"image of sample 0 has shape \[4\]"),
        ("float_labels", "label of sample 0 has dtype float64"),
        ("one_hot", r"label of sample 0 has dtype int64 and shape \[2\]"),
        ("uneven", r"sample 1 has shape \[5, 5\], sample 0 \[4, 4\]"),
        ("not_finite", "1 images hold NaN, .* first at index 1"),
        ("Broken", "reading sample 7 failed: OSError: disk on fire"),
    ],
)
def test_mistakes_in_own_dataset(user_module: str, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(f"{user_module}:{name}")
    assert f"{user_module}:{name}" in caught.value.found
    assert caught.value.expected


def test_endless_dataset_stops_at_the_memory_limit(user_module: str) -> None:
    with pytest.raises(DataError, match=r"\(65 samples read\).* or more in memory"):
        read(f"{user_module}:Endless", ReadOptions(max_bytes=64 * 64 * 64 * 4))


@pytest.mark.parametrize("data", ["no_such_module:Data", "my_squares:Nothing"])
def test_own_dataset_that_does_not_exist(user_module: str, data: str) -> None:
    with pytest.raises(ContentError, match=data):
        read(data)


# ---- a folder of images -------------------------------------------------------------------------


def test_pillow_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ExtraError, match="needs Pillow") as caught:
        read(tmp_path)
    assert caught.value.remedy == "pip install pillow"


needs_pillow = pytest.mark.skipif(importlib.util.find_spec("PIL") is None, reason="Pillow is not installed")


def write_image(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image_module = pytest.importorskip("PIL.Image")
    image_module.fromarray(array).save(path)
    return path


def write_folder(root: Path, *shape: int, count: int = 4, suffix: str = ".png", seed: int = 0) -> np.ndarray:
    pixels = images(2, count, *shape, seed=seed)
    for label, name in enumerate(("cat", "dog")):
        for i in range(count):
            write_image(root / name / f"{i}{suffix}", pixels[label, i])
    return pixels


@needs_pillow
def test_folder_of_grey_images(tmp_path: Path) -> None:
    pixels = write_folder(tmp_path, 6, 5)
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / ".cache").mkdir()
    data = read(tmp_path)
    assert data.classes == ("cat", "dog")
    assert data.value_range == (0, 255)
    np.testing.assert_array_equal(data.x, pixels.reshape(8, 1, 6, 5))
    assert data.y.tolist() == [0] * 4 + [1] * 4


@needs_pillow
@pytest.mark.parametrize("suffix", [".png", ".BMP", ".jpg", ".jpeg"])
def test_folder_of_colour_images(tmp_path: Path, suffix: str) -> None:
    pixels = write_folder(tmp_path, 6, 5, 3, suffix=suffix)
    data = read(tmp_path)
    assert data.x.shape == (8, 3, 6, 5)
    if "jp" not in suffix:  # JPEG loses detail
        np.testing.assert_array_equal(data.x, pixels.reshape(8, 6, 5, 3).transpose(0, 3, 1, 2))


@needs_pillow
def test_folder_channels_and_size_as_asked(tmp_path: Path) -> None:
    write_folder(tmp_path, 6, 5, 3)
    write_image(tmp_path / "dog" / "large.png", images(20, 30, 3))
    assert read(tmp_path, ReadOptions(image_size=(7, 9), channels=1)).x.shape == (9, 1, 7, 9)
    task = ImageClassification(tmp_path, image_size=[7, 9])
    assert task.info.input_shape == (3, 7, 9)
    assert ImageClassification(tmp_path, image_size=7, channels=1).info.input_shape == (1, 7, 7)


@needs_pillow
def test_folder_with_a_test_split(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", 6, 5)
    pixels = write_folder(tmp_path / "test", 6, 5, count=2, seed=1)
    data = read(tmp_path)
    assert len(data.y) == 8
    assert data.test is not None
    np.testing.assert_array_equal(data.test[0], pixels.reshape(4, 1, 6, 5))
    (tmp_path / "test" / "eel").mkdir()
    write_image(tmp_path / "test" / "eel" / "0.png", images(6, 5))
    with pytest.raises(DataError, match="classes of train and test differ in eel"):
        read(tmp_path)
    (tmp_path / "val").mkdir()
    with pytest.raises(DataError, match="besides train and test there are val"):
        read(tmp_path)


@needs_pillow
def test_folder_of_mixed_sizes(tmp_path: Path) -> None:
    write_folder(tmp_path, 6, 5)
    odd = write_image(tmp_path / "dog" / "odd.png", images(9, 7))
    with pytest.raises(DataError, match=r"is 9x7, .*0.png is 6x5") as caught:
        read(tmp_path)
    assert str(odd) in caught.value.found
    assert "image_size" in caught.value.remedy


@needs_pillow
def test_folder_that_turns_colourful(tmp_path: Path) -> None:
    write_folder(tmp_path, 6, 5, count=8)
    write_image(tmp_path / "dog" / "z.png", images(6, 5, 3))
    with pytest.raises(DataError, match=r"first images are grey, but .*z.png is in colour"):
        read(tmp_path)
    assert read(tmp_path, ReadOptions(channels=3)).x.shape == (17, 3, 6, 5)
    assert read(tmp_path, ReadOptions(channels=1)).x.shape == (17, 1, 6, 5)


@needs_pillow
def test_folder_mistakes(tmp_path: Path) -> None:
    write_folder(tmp_path, 6, 5)
    with pytest.raises(DataError, match="channels is 4"):
        read(tmp_path, ReadOptions(channels=4))
    with pytest.raises(DataError, match="or more in memory"):
        read(tmp_path, ReadOptions(max_bytes=4 * 4 * 30))
    (tmp_path / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"0.png cannot be read as an image"):
        read(tmp_path)
    write_image(tmp_path / "cat" / "0.png", images(6, 5).astype(np.uint16))
    with pytest.raises(DataError, match=r"0.png has pixels of mode I") as caught:
        read(tmp_path)
    assert "8 bits" in caught.value.expected
    (tmp_path / "eel").mkdir()
    with pytest.raises(DataError, match=r"no images in .*eel"):
        read(tmp_path)
    with pytest.raises(DataError, match="has 0 subfolders"):
        read(tmp_path / "eel")
    with pytest.raises(DataError, match="no file, folder or data source"):
        read(tmp_path / "missing")
