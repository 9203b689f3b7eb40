"""Data-free distillation: the terms of a generator's loss, the sources, students from samples alone, the command."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import TinyModel
from safetensors.torch import save_file
from torch import Tensor, nn

from nas.cli import main
from nas.datafree import Gan, Noise, Recipe, Source, Vae, distil_without_data, sources, synthesise
from nas.datafree.base import check_output
from nas.datafree.distil import make_source
from nas.datafree.generator import Generator
from nas.datafree.losses import Witness, activation_loss, balance_loss, disagreement, one_hot_loss
from nas.errors import ContentError, DataError, ExperimentError, TrainingError
from nas.space import TaskInfo
from nas.tasks import ImageClassification

DIGITS = ImageClassification("digits", seed=0)
INFO = DIGITS.info
QUICK = Recipe(rounds=3, steps=1, batch_size=16, replay=32)


def network(width: int, seed: int, info: TaskInfo = INFO) -> TinyModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TinyModel(info, width, 3)


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    """Trained on digits for a second or two."""
    (x, y), model = DIGITS.split("train"), network(16, 0)
    generator, steps = torch.Generator().manual_seed(0), 150
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-2, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (64,), generator=generator)
        loss = F.cross_entropy(model(x[rows]), y[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    x, y = DIGITS.split("valid")
    return float((model(x).argmax(1) == y).float().mean())


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


# ---- losses -------------------------------------------------------------------------------------------


def test_real_images_satisfy_the_terms_better_than_noise(teacher: nn.Module) -> None:
    witness = Witness(copy.deepcopy(teacher))
    real, noise = witness(DIGITS.split("train")[0][:256]), witness(Noise(teacher, INFO, 0).batch(256))
    assert witness.layers == 2
    assert one_hot_loss(real.logits) < one_hot_loss(noise.logits)
    assert balance_loss(real.logits) < balance_loss(noise.logits)
    assert real.batchnorm is not None
    assert noise.batchnorm is not None
    assert 3 * real.batchnorm < noise.batchnorm


def test_the_batchnorm_distance_is_that_of_the_definition() -> None:
    layer = nn.BatchNorm1d(3)
    layer.running_mean, layer.running_var = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    seen = Witness(nn.Sequential(layer, nn.Linear(3, 2)).eval())(x)
    mean, variance = x.mean(0), ((x - x.mean(0)) ** 2).mean(0)
    expected = (mean - layer.running_mean).norm() + (variance - layer.running_var).norm()
    assert seen.batchnorm is not None
    torch.testing.assert_close(seen.batchnorm, expected)
    torch.testing.assert_close(seen.features, layer(x))


def test_balance_is_best_for_even_classes_and_disagreement_is_bounded() -> None:
    even, one = 50 * torch.eye(4), 50 * torch.eye(4)[[0, 0, 0, 0]]
    assert balance_loss(even) == pytest.approx(-1, abs=1e-5)
    assert balance_loss(one) == pytest.approx(0, abs=1e-5)
    assert disagreement(even, even) == pytest.approx(0, abs=1e-5)
    assert disagreement(even, even.roll(1, 1)) == pytest.approx(1, abs=1e-4)
    assert one_hot_loss(even) < one_hot_loss(0.1 * even)
    assert activation_loss(torch.full((2, 3), -2.0)) == -2


def test_training_brings_the_batchnorm_statistics_closer(teacher: nn.Module) -> None:
    gan, student = Gan(teacher, INFO, 0, adversarial=0, batch_size=64), network(8, 1)
    known = []
    for _ in range(40):
        gan.improve(student)
        known.append(gan.terms["batchnorm"])
    assert set(gan.terms) == {"one_hot", "activation", "balance", "batchnorm"}
    assert np.mean(known[-5:]) < 0.7 * np.mean(known[:5])


def test_the_entropy_term_makes_the_classes_even(teacher: nn.Module) -> None:
    entropy = {}
    for weight in (0.0, 10.0):
        gan = Gan(teacher, INFO, 0, balance=weight, batchnorm=0, adversarial=0, batch_size=64)
        for _ in range(40):
            gan.improve(nn.Identity())
        counts = torch.bincount(teacher(gan.batch(512)).argmax(1), minlength=10) / 512
        entropy[weight] = float(-(counts * counts.clamp_min(1e-9).log()).sum())
    assert entropy[10.0] > entropy[0.0] + 0.5


def test_the_adversary_looks_for_what_the_student_does_not_know(teacher: nn.Module) -> None:
    others = dict.fromkeys(("one_hot", "activation", "balance", "batchnorm"), 0.0)
    gan, student = Gan(teacher, INFO, 0, **others, batch_size=64), network(8, 1)  # type: ignore[arg-type]
    before = copy.deepcopy(student)
    gan.improve(student)
    first = gan.terms["adversarial"]
    for _ in range(30):
        gan.improve(student)
    assert gan.terms["adversarial"] < first
    assert student.training
    assert same(student, before)
    assert all(parameter.grad is None for parameter in student.parameters())


# ---- sources ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7), (2, 33, 20), (1, 1, 1)])
def test_a_generator_makes_images_of_any_side_within_the_range(shape: tuple[int, int, int]) -> None:
    images = Generator(shape, (-3.0, 5.0), latent=4, width=4)(torch.randn(6, 4))
    assert images.shape == (6, *shape)
    assert images.min() >= -3
    assert images.max() <= 5


@pytest.mark.parametrize("name", ["gan", "vae", "noise", "data"])
def test_a_source_draws_new_images_by_its_seed_and_leaves_no_trace(name: str, teacher: nn.Module) -> None:
    settings = {"steps": 2} if name == "vae" else {}
    images, before = DIGITS.split("train")[0][:100], copy.deepcopy(teacher)
    state, grad = torch.get_rng_state(), [p.requires_grad for p in teacher.parameters()]
    one, two, other = (make_source(name, teacher, INFO, seed, settings, images) for seed in (3, 3, 4))
    first = one.batch(50)
    assert first.shape == (50, 1, 8, 8)
    assert first.dtype == torch.float32
    assert not first.requires_grad
    assert first.min() >= 0
    assert first.max() <= 16
    assert torch.equal(first, two.batch(50))
    assert not torch.equal(first, one.batch(50))
    assert not torch.equal(first, other.batch(50))
    assert torch.equal(state, torch.get_rng_state())
    assert same(teacher, before)
    assert [p.requires_grad for p in teacher.parameters()] == grad
    assert not any(module._forward_pre_hooks for module in teacher.modules())


def test_the_data_source_draws_every_image_once_before_it_repeats_one(teacher: nn.Module) -> None:
    images = DIGITS.split("train")[0][:30]
    source = make_source("data", teacher, INFO, 0, images=images)
    drawn = torch.cat([source.batch(20), source.batch(10)])
    assert sorted(map(float, drawn.sum((1, 2, 3)))) == sorted(map(float, images.sum((1, 2, 3))))


@pytest.mark.parametrize("kind", ["gaussian", "uniform"])
def test_noise_has_the_statistics_of_the_task(kind: str) -> None:
    info = TaskInfo((2, 6, 6), 10, (0.2, -0.4), (0.1, 0.3), (-10.0, 10.0))
    x = make_source("noise", TinyModel(info, 8, 3), info, 0, {"kind": kind}).batch(2000)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.tensor(info.mean), atol=0.01, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.tensor(info.std), atol=0.01, rtol=0)


def test_a_vae_learns_the_images_and_draws_others_like_them(teacher: nn.Module) -> None:
    x = DIGITS.split("train")[0]
    vae = Vae(teacher, INFO, 0, images=x, steps=120, batch_size=64, lr=5e-3)
    assert np.mean(vae.losses[-10:]) < 0.9 * np.mean(vae.losses[:10])
    drawn, noise = vae.batch(300).flatten(1), Noise(teacher, INFO, 0).batch(300).flatten(1)
    nearest = torch.cdist(drawn, x.flatten(1)).amin(1)
    assert nearest.min() > 0
    assert nearest.mean() < 0.7 * torch.cdist(noise, x.flatten(1)).amin(1).mean()


class Stripes(Source):
    """A source of the user's own, as a file of theirs would define it."""

    def __init__(
        self, teacher: nn.Module, info: TaskInfo, seed: int, images: Tensor | None = None, *, gap: int = 2
    ) -> None:
        super().__init__(teacher, info, seed, images)
        self.gap = gap

    def batch(self, n: int) -> Tensor:
        x = torch.zeros(n, *self.info.input_shape)
        x[..., :: self.gap] = self.normal(n, 1, 1, 1).abs()
        return x


def test_a_source_can_be_the_users_own(teacher: nn.Module) -> None:
    x = synthesise(f"{__name__}:Stripes", teacher, INFO, 5, settings={"gap": 4})
    assert (x[..., 1:4] == 0).all()
    assert (x[..., ::4] > 0).all()
    assert sorted(sources) == ["data", "gan", "noise", "vae"]


# ---- students -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gan", "noise"])
def test_a_student_is_decided_by_the_seed(name: str, teacher: nn.Module) -> None:
    class Forgetful(nn.Sequential):
        """With dropout, which draws from torch's global generator."""

    def student(seed: int) -> nn.Module:
        model = Forgetful(network(8, 1), nn.Dropout(0.2))
        state = torch.get_rng_state()
        taught = distil_without_data(teacher, model, INFO, name, recipe=QUICK, seed=seed)
        assert taught is model
        assert not taught.training
        assert torch.equal(state, torch.get_rng_state())
        return taught

    assert same(student(1), student(1))
    assert not same(student(1), student(2))


def test_synthesised_images_are_decided_by_the_seed_and_as_many_as_asked(teacher: nn.Module) -> None:
    draws = [synthesise("gan", teacher, INFO, n, seed, recipe=QUICK) for n, seed in ((70, 1), (70, 1), (70, 2), (5, 1))]
    assert [len(x) for x in draws] == [70, 70, 70, 5]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_real_images_without_labels_teach_a_student(teacher: nn.Module) -> None:
    recipe = Recipe(rounds=60, steps=2, batch_size=64, lr=1e-2)
    student, images = network(16, 1), DIGITS.split("train")[0]
    assert accuracy(distil_without_data(teacher, student, INFO, "data", images=images, recipe=recipe)) > 0.6


@pytest.mark.slow
def test_a_generator_teaches_far_better_than_noise(teacher: nn.Module) -> None:
    recipe = Recipe(rounds=300, steps=2, batch_size=64, lr=5e-3)
    taught = {
        name: accuracy(distil_without_data(teacher, network(16, 1), INFO, name, recipe=recipe))
        for name in ("gan", "noise")
    }
    assert taught["gan"] > taught["noise"] + 0.2


@pytest.mark.slow
def test_a_data_set_of_the_generators_images_teaches_an_ordinary_training(teacher: nn.Module) -> None:
    x = synthesise("gan", teacher, INFO, 2000, recipe=Recipe(rounds=300, steps=2, batch_size=64, lr=5e-3))
    counts = torch.bincount(teacher(x).argmax(1), minlength=10)
    assert counts.min() > 20
    recipe = Recipe(rounds=300, steps=2, batch_size=64, lr=5e-3)
    taught, noise = (
        distil_without_data(teacher, network(16, 1), INFO, name, images=x, recipe=recipe) for name in ("data", "noise")
    )
    assert accuracy(taught) > accuracy(noise) + 0.2


# ---- what a user can get wrong ------------------------------------------------------------------------


def test_batchnorm_statistics_need_batchnorm() -> None:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(ExperimentError, match="no BatchNorm layer"):
        distil_without_data(plain, network(8, 1), INFO, "gan", {"batchnorm": 1.0})
    gan = make_source("gan", plain, INFO, 0)
    gan.improve(network(8, 1))
    assert isinstance(gan, Gan)
    assert "batchnorm" not in gan.terms


def test_a_teacher_without_weights_has_no_features() -> None:
    class Pixels(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :10]

    with pytest.raises(ExperimentError, match="neither a Linear"):
        distil_without_data(Pixels(), network(8, 1), INFO, "gan", recipe=QUICK)


@pytest.mark.parametrize(
    ("info", "words"),
    [
        (TaskInfo((16,), 10, dtype="int64"), "int64 cannot be synthesised"),
        (TaskInfo((3, 8, 8), 10), "teacher fails on inputs"),
        (TaskInfo((1, 8, 8), 7), r"output for 2 inputs is \[2, 10\]"),
        (TaskInfo((1, 8, 8), 10, value_range=(1.0, 1.0)), "value range is 1.0 to 1.0"),
    ],
)
def test_inputs_that_do_not_fit_the_teacher(info: TaskInfo, words: str, teacher: nn.Module) -> None:
    with pytest.raises(DataError, match=words):
        synthesise("gan", teacher, info, 5)


def test_a_student_that_does_not_fit(teacher: nn.Module) -> None:
    with pytest.raises(DataError, match="student's output"):
        distil_without_data(teacher, nn.Flatten(), INFO, "noise")
    with pytest.raises(DataError, match="thing's output for 2 inputs is str"):
        check_output(_Says(), INFO, "thing")


class _Says(nn.Module):
    def forward(self, x: Tensor) -> str:
        return "a seven"


def test_only_images_have_a_generator() -> None:
    info, flat = TaskInfo((6,), 3), nn.Linear(6, 3)
    with pytest.raises(DataError, match="no images"):
        synthesise("gan", flat, info, 5)
    assert synthesise("noise", flat, TaskInfo((6,), 3, (0.0,) * 6, (1.0,) * 6, (-5.0, 5.0)), 5).shape == (5, 6)


@pytest.mark.parametrize("name", ["vae", "data"])
@pytest.mark.parametrize(
    "images",
    [
        None,
        torch.zeros(0, 1, 8, 8),
        torch.zeros(4, 8, 8),
        torch.zeros(4, 1, 8, 8).double(),
        torch.full((4, 1, 8, 8), float("nan")),
        [1],
    ],
)
def test_unlabelled_images_that_do_not_fit(name: str, images: Tensor | None, teacher: nn.Module) -> None:
    with pytest.raises(DataError, match="images"):
        synthesise(name, teacher, INFO, 5, images=images)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gan", {"one_hot": -1.0}),
        ("gan", {"lr": 0.0}),
        ("gan", {"latent": 0}),
        ("gan", dict.fromkeys(("one_hot", "activation", "balance", "batchnorm", "adversarial"), 0.0)),
        ("gan", {"colour": "red"}),
        ("gan", {"steps": "many"}),
        ("vae", {"steps": 0}),
        ("vae", {"reconstructions": 1.5}),
        ("noise", {"kind": "pink"}),
        (Stripes, {"gap": 3}),
    ],
)
def test_settings_out_of_range(name: str | type[Stripes], settings: dict[str, object], teacher: nn.Module) -> None:
    source = name if isinstance(name, str) else name(teacher, INFO, 0)
    with pytest.raises(ExperimentError):
        synthesise(source, teacher, INFO, 5, settings=settings, images=DIGITS.split("train")[0][:20])


@pytest.mark.parametrize(
    "values",
    [{"rounds": 0}, {"steps": 1.5}, {"batch_size": 1}, {"replay": -1}, {"lr": 0.0}, {"temperature": -1.0}],
)
def test_recipes_out_of_range(values: dict[str, float]) -> None:
    with pytest.raises(ExperimentError, match=next(iter(values))):
        Recipe(**values)  # type: ignore[arg-type]


def test_other_mistakes(teacher: nn.Module) -> None:
    with pytest.raises(ContentError, match="sample source"):
        synthesise("dreams", teacher, INFO, 5)
    with pytest.raises(ExperimentError, match="0 inputs"):
        synthesise("noise", teacher, INFO, 0)
    with pytest.raises(DataError, match="3 values of mean"):
        synthesise("noise", teacher, TaskInfo((1, 8, 8), 10, (0.0, 0.0, 0.0)), 5)
    with pytest.raises(TrainingError, match="Out of time"):
        distil_without_data(teacher, network(8, 1), INFO, "noise", recipe=Recipe(rounds=2, seconds=1e-9))
    broken = network(8, 1)
    nn.init.constant_(broken.head.weight, float("nan"))
    with pytest.raises(TrainingError, match="student became nan"):
        distil_without_data(teacher, broken, INFO, "noise", recipe=QUICK)


# ---- the command --------------------------------------------------------------------------------------


def digits_model() -> nn.Module:
    return TinyModel(INFO, 16, 3)


@pytest.fixture
def weights(teacher: nn.Module, tmp_path: Path) -> Path:
    path = tmp_path / "teacher.safetensors"
    save_file({key: value.contiguous() for key, value in teacher.state_dict().items()}, path)
    return path


def command(weights: Path, out: Path, *more: str) -> list[str]:
    model = [
        "synthesise",
        f"{__name__}:digits_model",
        "--weights",
        str(weights),
        "--input",
        "1x8x8",
        "--range",
        "0",
        "16",
    ]
    return [*model, "--classes", "10", "--out", str(out), *more]


def test_the_command_writes_a_data_set_that_a_task_reads(
    teacher: nn.Module, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, images = tmp_path / "new" / "data.npz", tmp_path / "mine.npz"
    # Labels that cannot be read: numpy refuses arrays of objects.
    unreadable = np.array([object()] * 500, dtype=object)
    np.savez(images, x=DIGITS.split("train")[0][:500].numpy(), y=unreadable)
    with np.load(images, allow_pickle=False) as file, pytest.raises(ValueError, match="pickle"):
        file["y"]
    more = ["--source", "vae", "--images", str(images), "--n", "400"]
    more += ["--set", "steps=150", "--set", "lr=0.005", "--set", "reconstructions=1"]
    assert main(command(weights, out, *more)) == 0
    assert "400 images of 1x8x8 from vae" in capsys.readouterr().out
    with np.load(out, allow_pickle=False) as file:
        x, y = torch.from_numpy(file["x"]), torch.from_numpy(file["y"])
    assert x.shape == (400, 1, 8, 8)
    assert torch.equal(teacher(x).argmax(1), y)
    task = ImageClassification(out, seed=0)
    assert task.info.input_shape == (1, 8, 8)
    assert task.info.classes == 10
    again = tmp_path / "again.npz"
    assert main(command(weights, again, *more)) == 0
    with np.load(again, allow_pickle=False) as file:
        assert np.array_equal(file["x"], x.numpy())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--source", "noise", "--n", "1"], "sees no image of class"),
        (["--source", "noise", "--set", "kind"], "--set"),
        (["--source", "noise", "--set", "hue=1"], "hue"),
        (["--source", "vae"], "unlabelled images"),
        (["--source", "vae", "--images", "nowhere.npz"], "nowhere.npz"),
        (["--source", "noise", "--classes", "1"], "--classes 1"),
        (["--source", "noise", "--input", "8by8"], "8by8"),
        (["--source", "noise", "--weights", "nowhere.safetensors"], "no weights"),
    ],
)
def test_the_command_says_what_is_wrong(
    more: list[str], words: str, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "data.npz"
    assert main(command(weights, out, *more)) == 2
    assert words in capsys.readouterr().err
    assert not out.exists()


def test_a_file_of_images_without_images(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = tmp_path / "mine.npz"
    np.savez(images, y=np.zeros(3))
    assert main(command(weights, tmp_path / "data.npz", "--source", "data", "--images", str(images))) == 2
    assert "images as x or x_train" in capsys.readouterr().err
