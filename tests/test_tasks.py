"""The image classification task: splits, losses, metrics, statistics and augmentation."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, recall_score

from nas.errors import ContentError, DataError, ExperimentError, TrainingError
from nas.tasks import ImageClassification, Task, read, tasks
from nas.tasks.base import SPLITS
from nas.tasks.splits import allocate, cut


@pytest.fixture(scope="module")
def digits() -> ImageClassification:
    return ImageClassification("digits")


def rows(task: Task, split: str) -> list[bytes]:
    return [image.tobytes() for image in task.split(split)[0].numpy()]


def write_npz(path: Path, counts: list[int], **more: Any) -> str:
    """Images that are all different, ``counts`` of each class."""
    y = np.repeat(np.arange(len(counts)), counts)
    x = np.random.default_rng(0).random((len(y), 4, 4))
    np.savez(path / "data.npz", x_train=x, y_train=y, **more)
    return str(path / "data.npz")


# ---- the registry ------------------------------------------------------------------------------


def test_found_by_name() -> None:
    assert tasks.get("classification") is ImageClassification
    with pytest.raises(ContentError, match="Unknown task 'speech'"):
        tasks.get("speech")


# ---- splits ------------------------------------------------------------------------------------


def test_splits_have_their_shares_types_and_units(digits: ImageClassification) -> None:
    assert [len(digits.split(name)[1]) for name in SPLITS] == [1079, 359, 359]
    for name in SPLITS:
        x, y = digits.split(name)
        assert x.shape[1:] == digits.info.input_shape == (1, 8, 8)
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
        assert x.max() == 16


def test_splits_are_disjoint_and_complete(digits: ImageClassification) -> None:
    # All 1,797 digits differ, so their bytes tell them apart.
    parts = [rows(digits, name) for name in SPLITS]
    everything = [image.tobytes() for image in read("digits").x]
    assert len(set(everything)) == len(everything)
    assert sorted([*parts[0], *parts[1], *parts[2]]) == sorted(everything)


def test_splits_are_stratified(digits: ImageClassification) -> None:
    whole = np.bincount(read("digits").y) / 1797
    for name in SPLITS:
        y = digits.split(name)[1].numpy()
        assert np.abs(np.bincount(y) - whole * len(y)).max() < 1.5


def test_splits_follow_the_seed(digits: ImageClassification) -> None:
    again, other = ImageClassification("digits"), ImageClassification("digits", seed=1)
    for name in SPLITS:
        assert rows(again, name) == rows(digits, name)
        assert set(rows(other, name)) != set(rows(digits, name))
    assert again.fingerprint == digits.fingerprint
    assert other.fingerprint != digits.fingerprint


def test_the_test_split_does_not_move_with_the_other_options(digits: ImageClassification) -> None:
    other = ImageClassification("digits", valid=0.1, limit=300)
    assert rows(other, "test") == rows(digits, "test")


def test_limits(digits: ImageClassification) -> None:
    small = ImageClassification("digits", limit=200, limit_test=50)
    # valid is 0.2 of all, so a quarter of what the test leaves over.
    assert [len(small.split(name)[1]) for name in SPLITS] == [150, 50, 50]
    assert set(rows(small, "test")) < set(rows(digits, "test"))
    assert not set(rows(small, "train") + rows(small, "valid")) & set(rows(digits, "test"))
    for name in SPLITS:
        assert np.bincount(small.split(name)[1].numpy(), minlength=10).min() >= 4
    assert rows(ImageClassification("digits", limit=10**6, limit_test=10**6), "train") == rows(digits, "train")


def test_smallest_limit_keeps_every_class_in_both_splits() -> None:
    task = ImageClassification("digits", limit=20)
    for name in ("train", "valid"):
        assert np.bincount(task.split(name)[1].numpy()).tolist() == [1] * 10


def test_rare_classes_are_in_every_split(tmp_path: Path) -> None:
    task = ImageClassification(write_npz(tmp_path, [100, 3, 5]), valid=0.1, test=0.1)
    for name in SPLITS:
        assert np.bincount(task.split(name)[1].numpy()).min() >= 1
    assert sum(len(task.split(name)[1]) for name in SPLITS) == 108


def test_too_few_of_a_class(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.npz: class '1' has 2 samples") as caught:
        ImageClassification(write_npz(tmp_path, [100, 2]))
    assert "at least 3" in caught.value.expected
    own_test = {"x_test": np.random.default_rng(1).random((2, 4, 4)), "y_test": np.array([0, 1])}
    assert len(ImageClassification(write_npz(tmp_path, [100, 2], **own_test)).split("test")[1]) == 2
    with pytest.raises(DataError, match=r"class '1' has 1 samples"):
        ImageClassification(write_npz(tmp_path, [100, 1], **own_test))


def test_reads_of_the_test_split_are_counted() -> None:
    task = ImageClassification("digits")
    assert task.fingerprint
    task.split("train")
    task.split("valid")
    assert task.test_reads == 0
    task.split("test")
    task.split("test")
    assert task.test_reads == 2
    with pytest.raises(DataError, match="no split 'holdout'"):
        task.split("holdout")


def test_survives_a_process_border(digits: ImageClassification) -> None:
    copy = pickle.loads(pickle.dumps(digits))
    assert copy.fingerprint == digits.fingerprint
    assert copy.info == digits.info


@pytest.mark.parametrize("seed", range(20))
def test_allocate_keeps_its_bounds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(3, 60, size=rng.integers(2, 12))
    total = int(rng.integers(1, counts.sum()))
    least, reserve = [(1, 2), (2, 0), (1, 1), (2, 1)][seed % 4]
    taken = allocate(counts, total, least, reserve)
    assert (taken >= least).all()
    assert (counts - taken >= reserve).all()
    assert taken.sum() == min(max(total, least * len(counts)), (counts - reserve).sum())


def test_cut_draws_from_the_index_only() -> None:
    y = np.arange(40) % 4
    index = np.arange(20, 40)
    taken, rest = cut(y, index, 8, np.random.default_rng(0))
    assert np.bincount(y[taken]).tolist() == [2] * 4
    assert sorted([*taken, *rest]) == index.tolist()


# ---- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"valid": 0.0}, "valid is 0.0"),
        ({"valid": 20}, "valid is 20"),
        ({"test": 1.0}, "test is 1.0"),
        ({"test": "0.2"}, "test is '0.2'"),
        ({"valid": float("nan")}, "valid is nan"),
        ({"valid": 0.5, "test": 0.5}, "nothing is left to train on"),
        ({"metric": "auc"}, "Unknown metric 'auc'"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": None}, "seed is None"),
        ({"shift": -1}, "shift is -1"),
        ({"shift": 8}, "shift is 8"),
        ({"shift": 1.5}, "shift is 1.5"),
        ({"limit": 0}, "limit is 0"),
        ({"limit": 0.5}, "limit is 0.5"),
        ({"limit_test": 0}, "limit_test is 0"),
        ({"image_size": 0}, "image_size is 0"),
        ({"image_size": [8, 8, 1]}, "image_size is"),
        ({"image_size": "8"}, "image_size is"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ExperimentError, match=message) as caught:
        ImageClassification("digits", **options)
    assert caught.value.expected


def test_limits_below_the_classes() -> None:
    with pytest.raises(DataError, match="digits: limit is 19"):
        ImageClassification("digits", limit=19)
    with pytest.raises(DataError, match="digits: limit_test is 9"):
        ImageClassification("digits", limit_test=9)


# ---- statistics and fingerprint ------------------------------------------------------------------


def test_statistics_are_those_of_the_training_split(digits: ImageClassification) -> None:
    x = digits.split("train")[0].double()
    assert digits.info.classes == 10
    assert digits.info.mean == pytest.approx([x.mean().item()], rel=1e-9)
    assert digits.info.std == pytest.approx([x.std(correction=0).item()], rel=1e-9)
    assert digits.info.value_range == (0, 16)


def test_statistics_per_channel_and_never_zero(tmp_path: Path) -> None:
    x = np.random.default_rng(0).random((5000, 3, 2, 2)).astype(np.float32)
    x[:, 1] = 0.1
    x[:, 2] = x[:, 2] * 100 + 1000
    np.savez(tmp_path / "x.npz", x=x, y=np.arange(5000) % 2)
    task = ImageClassification(tmp_path / "x.npz")
    train = task.split("train")[0].double()
    assert task.info.mean == pytest.approx(train.mean(dim=(0, 2, 3)).tolist(), rel=1e-9)
    std = train.std(dim=(0, 2, 3), correction=0).tolist()
    assert task.info.std == pytest.approx([std[0], 1.0, std[2]], rel=1e-9)


def test_fingerprint_feels_the_data(tmp_path: Path) -> None:
    path = write_npz(tmp_path, [10, 10])
    first = ImageClassification(path).fingerprint
    with np.load(path) as file:
        x, y = file["x_train"], file["y_train"]
    x[7, 2, 2] += 0.5
    np.savez(path, x_train=x, y_train=y)
    assert ImageClassification(path).fingerprint != first
    assert len(first) == 12


# ---- losses --------------------------------------------------------------------------------------


def test_loss_is_cross_entropy(digits: ImageClassification) -> None:
    logits = torch.tensor([[2.0, 1.0], [0.0, 0.0]])
    by_hand = (np.log(1 + np.exp(-1.0)) + np.log(2)) / 2
    assert digits.loss(logits, torch.tensor([0, 1])).item() == pytest.approx(by_hand, rel=1e-6)


def test_distillation_loss_by_hand(digits: ImageClassification) -> None:
    # Two classes, T = 2. Teacher: softmax(2 ln3 / 2, 0) = (3/4, 1/4); student: (1/2, 1/2) for any T.
    teacher = torch.tensor([[2 * np.log(3.0), 0.0]], dtype=torch.float32)
    student = torch.zeros(1, 2, requires_grad=True)
    kl = 0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.5)
    by_hand = 0.7 * np.log(2) + 0.3 * 2**2 * kl
    loss = digits.distillation_loss(student, teacher, torch.tensor([1]), 0.3, 2.0)
    assert loss.item() == pytest.approx(by_hand, rel=1e-6)
    # d/dlogits: 0.7 (p - onehot) + 0.3 T (p - teacher)
    loss.backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    expected = [0.7 * 0.5 + 0.6 * (0.5 - 0.75), 0.7 * -0.5 + 0.6 * (0.5 - 0.25)]
    assert student.grad[0].tolist() == pytest.approx(expected, rel=1e-5)


def test_distillation_loss_is_a_mean_over_the_batch(digits: ImageClassification) -> None:
    torch.manual_seed(0)
    student, teacher, y = torch.randn(6, 10), torch.randn(6, 10), torch.arange(6)
    whole = digits.distillation_loss(student, teacher, y, 0.5, 3.0)
    each = [digits.distillation_loss(student[i : i + 1], teacher[i : i + 1], y[i : i + 1], 0.5, 3.0) for i in range(6)]
    assert whole.item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-5)
    assert torch.equal(digits.distillation_loss(student, teacher, y, 0.0, 3.0), digits.loss(student, y))
    assert digits.distillation_loss(student, student, y, 1.0, 3.0).item() == pytest.approx(0, abs=1e-6)


def test_no_gradient_reaches_the_teacher(digits: ImageClassification) -> None:
    student, teacher = torch.zeros(2, 10, requires_grad=True), torch.ones(2, 10, requires_grad=True)
    digits.distillation_loss(student, teacher, torch.tensor([0, 1]), 0.5, 2.0).backward()  # type: ignore[no-untyped-call]
    assert teacher.grad is None


@pytest.mark.parametrize(("weight", "temperature"), [(-0.1, 1), (1.1, 1), (0.5, 0), (0.5, -1), (float("nan"), 1)])
def test_distillation_settings_out_of_range(digits: ImageClassification, weight: float, temperature: float) -> None:
    with pytest.raises(ExperimentError, match="Distillation weight"):
        digits.distillation_loss(torch.zeros(1, 10), torch.zeros(1, 10), torch.tensor([1]), weight, temperature)


# ---- metrics -------------------------------------------------------------------------------------


def test_metrics_agree_with_scikit_learn(digits: ImageClassification) -> None:
    rng = np.random.default_rng(0)
    y, logits = rng.integers(0, 10, 500), rng.normal(size=(500, 10))
    logits[np.arange(500), y] += 1
    said = logits.argmax(1)
    metrics = digits.evaluate(logits, y)
    assert metrics["accuracy"] == pytest.approx(accuracy_score(y, said))
    assert metrics["macro_recall"] == pytest.approx(recall_score(y, said, average="macro"))
    assert metrics["macro_f1"] == pytest.approx(f1_score(y, said, average="macro"))
    assert digits.metric in metrics


def test_metrics_where_classes_are_absent(digits: ImageClassification) -> None:
    y, said = np.array([0, 0, 1, 1]), np.array([0, 0, 1, 2])
    metrics = digits.evaluate(np.eye(10)[said], y)
    assert metrics == pytest.approx({"accuracy": 0.75, "macro_recall": 0.75, "macro_f1": (1 + 2 / 3 + 0) / 3})
    assert all(type(value) is float for value in metrics.values())


def test_metrics_take_small_integer_labels(digits: ImageClassification) -> None:
    y = np.arange(10, dtype=np.uint8).repeat(3)
    assert digits.evaluate(np.eye(10)[y], y)["macro_f1"] == 1


def test_metric_names_the_quality() -> None:
    assert ImageClassification("digits", metric="macro_f1").metric == "macro_f1"


def test_logits_of_the_wrong_shape(digits: ImageClassification) -> None:
    for logits, y in [
        (np.zeros((3, 9)), np.zeros(3, int)),
        (np.zeros((3, 10)), np.zeros(2, int)),
        (np.zeros((0, 10)), []),
    ]:
        with pytest.raises(DataError, match="Logits of shape"):
            digits.evaluate(logits, np.array(y))


def test_logits_of_a_diverged_model(digits: ImageClassification) -> None:
    logits = np.zeros((3, 10))
    logits[1, 2] = np.nan
    with pytest.raises(TrainingError, match="diverged"):
        digits.evaluate(logits, np.zeros(3, int))


# ---- augmentation --------------------------------------------------------------------------------


def moved(image: np.ndarray, down: int, right: int, fill: np.ndarray) -> np.ndarray:
    """The plain-loop meaning of a shift."""
    _, h, w = image.shape
    result = np.empty_like(image)
    for row in range(h):
        for column in range(w):
            inside = 0 <= row - down < h and 0 <= column - right < w
            result[:, row, column] = image[:, row - down, column - right] if inside else fill
    return result


def test_no_augmentation_by_default(digits: ImageClassification) -> None:
    x = digits.split("train")[0][:8]
    assert digits.augment(x, torch.Generator()) is x


def test_shift_moves_each_image_by_its_own_offset(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(1, 256, (300, 2, 5, 6)).astype(np.float32)
    x[:, 1] += 1000  # a channel whose minimum is not 0
    np.savez(tmp_path / "x.npz", x=x, y=np.arange(300) % 2)
    task = ImageClassification(tmp_path / "x.npz", shift=2)
    train = task.split("train")[0]
    before = train.clone()
    out = task.augment(train, torch.Generator().manual_seed(3)).numpy()
    assert torch.equal(train, before)
    fill = train.numpy().min(axis=(0, 2, 3))
    seen = set()
    offsets = [(down, right) for down in range(-2, 3) for right in range(-2, 3)]
    for image, result in zip(train.numpy(), out, strict=True):
        match = [offset for offset in offsets if np.array_equal(result, moved(image, *offset, fill))]
        assert len(match) == 1
        seen.add(match[0])
    assert seen == set(offsets)


def test_augmentation_follows_the_generator() -> None:
    task = ImageClassification("digits", shift=1, flip=True)
    x = task.split("train")[0][:64]
    first, again = (task.augment(x, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, task.augment(x, torch.Generator().manual_seed(6)))
    assert (first.shape, first.dtype) == (x.shape, x.dtype)
    assert first.is_contiguous()
    generator = torch.Generator().manual_seed(5)
    assert not torch.equal(task.augment(x, generator), task.augment(x, generator))


def test_flip_mirrors_about_half_of_the_images() -> None:
    task = ImageClassification("digits", flip=True)
    x = task.split("train")[0]
    out = task.augment(x, torch.Generator().manual_seed(0))
    kept = (out == x).flatten(1).all(1)
    mirrored = (out == x.flip(-1)).flatten(1).all(1)
    assert (kept | mirrored).all()
    assert 0.4 < mirrored.float().mean() < 0.6
