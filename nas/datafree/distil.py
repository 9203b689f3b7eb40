"""Teaching a student what a teacher knows on synthetic inputs, and keeping such inputs for later."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.datafree.base import Source, check_output, finite, image_shape, sources
from nas.errors import ExperimentError, TrainingError
from nas.settings import construct
from nas.space import TaskInfo


@dataclass(frozen=True)
class Recipe:
    """How a student learns from a source.

    In a round the source improves, one fresh batch is drawn and shown to the teacher, and the student takes its steps
    on batches that are half fresh, half drawn from the images of earlier rounds: a generator that wanders off, as those
    trained against a student do, cannot make it forget.

    Args:
        rounds: how many.
        steps: of the student in a round.
        batch_size: images in a step, and fresh images in a round.
        replay: how many images of earlier rounds are kept.
        lr: of Adam; one cosine to nearly nothing.
        temperature: of the distillation.
        seconds: give up beyond this much time.

    Raises:
        ExperimentError: a value is out of range.
    """

    rounds: int = 600
    steps: int = 4
    batch_size: int = 128
    replay: int = 8192
    lr: float = 2e-3
    temperature: float = 4.0
    seconds: float = 3600.0

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("steps", 1), ("batch_size", 2), ("replay", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ExperimentError(f"{name} is {value!r}.", expected=f"an integer of {least} or more")
        for name in ("lr", "temperature", "seconds"):
            if not getattr(self, name) > 0:
                raise ExperimentError(f"{name} is {getattr(self, name)!r}.", expected="a number above 0")


def distil_without_data(
    teacher: nn.Module,
    student: nn.Module,
    info: TaskInfo,
    source: str | Source = "gan",
    settings: Mapping[str, Any] | None = None,
    *,
    images: Tensor | None = None,
    recipe: Recipe | None = None,
    seed: int = 0,
) -> nn.Module:
    """Train ``student`` on what ``source`` draws and ``teacher`` says to it; original training data are not needed.

    The loss is T²·KL(teacher ‖ student) at temperature T (Hinton et al. 2015, section 2).

    Args:
        teacher: raw inputs → logits; stays as it is.
        student: the same; trained in place.
        info: shape, range and statistics of the inputs.
        source: name of a source ("gan", "vae", "noise", "data", or ``module:name``), or one that is ready.
        settings: options of a source that is given by its name.
        images: unlabelled inputs ``[n, *input_shape]`` for the sources that need some ("vae", "data").
        recipe: how long and how (default: :class:`Recipe`).
        seed: decides the result, together with the student's initial weights.

    Returns:
        The student, in evaluation mode.

    Raises:
        ContentError: there is no such source.
        ExperimentError: a setting is unknown or out of range.
        DataError: teacher, student or images do not fit the inputs.
        TrainingError: a loss is not finite, or the time is up.
    """
    ready = make_source(source, teacher, info, seed, settings, images)
    check_output(student, info, "student")
    for _ in lessons(ready, student, recipe or Recipe(), seed):
        pass
    return student.eval()


def synthesise(
    source: str | Source,
    teacher: nn.Module,
    info: TaskInfo,
    n: int,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    *,
    images: Tensor | None = None,
    recipe: Recipe | None = None,
) -> Tensor:
    """``n`` synthetic inputs to keep, so that anything which wants a data set can learn from the teacher alone.

    A source that learns does so against a small network of this function's own, for ``recipe.rounds`` rounds. The
    inputs are then those of the second half of the rounds, which are more varied than the last generator's.

    Args:
        source, teacher, info, settings, images, recipe, seed: see :func:`distil_without_data`.

    Returns:
        ``[n, *input_shape]`` float32 in raw units.

    Raises:
        What :func:`distil_without_data` does.
    """
    if n < 1:
        raise ExperimentError(f"{n} inputs were asked for.", expected="at least one")
    ready, recipe = make_source(source, teacher, info, seed, settings, images), recipe or Recipe()
    if not ready.learns:
        return ready.batch(n)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = opponent(info)
    late = recipe.rounds - recipe.rounds // 2
    share = -(-n // late)
    kept = [fresh[:share] for i, fresh in enumerate(lessons(ready, student, recipe, seed)) if i >= recipe.rounds - late]
    found = torch.cat(kept)[-n:]
    return found if len(found) == n else torch.cat([found, ready.batch(n - len(found))])


def make_source(
    source: str | Source,
    teacher: nn.Module,
    info: TaskInfo,
    seed: int,
    settings: Mapping[str, Any] | None = None,
    images: Tensor | None = None,
) -> Source:
    """The source that a name and settings mean; one that is ready is returned as it is.

    Raises:
        ContentError: there is no such source.
        ExperimentError: a setting is unknown or of the wrong type, or there are settings for a source that is ready.
    """
    if isinstance(source, Source):
        if settings:
            raise ExperimentError("There are settings for a source that is ready.", expected="the name of a source")
        return source
    return construct(sources.get(source), settings or {}, teacher, info, seed, images, where=source)


def lessons(source: Source, student: nn.Module, recipe: Recipe, seed: int) -> Iterator[Tensor]:
    """Train ``student`` round by round; yields the fresh inputs ``[batch, *input_shape]`` of each.

    Raises:
        TrainingError: a loss is not finite, or the time is up.
    """
    deadline = time.monotonic() + recipe.seconds
    student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a quarter faster on a CPU
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(student.parameters(), lr=recipe.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, recipe.rounds * recipe.steps, recipe.lr / 100)
    replay = _Replay(recipe.replay, generator)
    for i in range(recipe.rounds):
        source.improve(student)
        x = source.batch(recipe.batch_size)
        with torch.no_grad():
            said = source.teacher(x)
        student.train()
        for _ in range(recipe.steps):
            inputs, targets = replay.mixed(x, said)
            # Dropout and the like draw from the global generator: from a seed, and without a trace.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
                loss = finite(soft_loss(student(inputs), targets, recipe.temperature), "the student")
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
        replay.add(x, said)
        if time.monotonic() > deadline:
            raise TrainingError(f"Out of time in round {i + 1} of {recipe.rounds} after {recipe.seconds:g} s.")
        yield x


def soft_loss(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """T²·KL(softmax(targets / T) ‖ softmax(logits / T)) of ``[n, classes]`` each; Hinton et al. 2015, section 2."""
    student, teacher = (F.log_softmax(values / temperature, dim=1) for values in (logits, targets))
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


class _Replay:
    """The latest inputs with the teacher's word on them, oldest overwritten first."""

    def __init__(self, size: int, generator: torch.Generator) -> None:
        self.size, self.generator, self.added = size, generator, 0
        self.x: Tensor | None = None
        self.said: Tensor | None = None

    def add(self, x: Tensor, said: Tensor) -> None:
        if not self.size:
            return
        if self.x is None or self.said is None:
            self.x, self.said = x.new_empty(self.size, *x.shape[1:]), said.new_empty(self.size, *said.shape[1:])
        rows = (self.added + torch.arange(len(x))) % self.size
        self.x[rows], self.said[rows] = x, said
        self.added += len(x)

    def mixed(self, x: Tensor, said: Tensor) -> tuple[Tensor, Tensor]:
        """Half of the fresh ones and as many old ones; the fresh ones alone as long as there are no old ones."""
        if self.x is None or self.said is None:
            return x, said
        half = len(x) // 2
        new = torch.randperm(len(x), generator=self.generator)[:half]
        old = torch.randint(min(self.added, self.size), (len(x) - half,), generator=self.generator)
        return torch.cat([x[new], self.x[old]]), torch.cat([said[new], self.said[old]])


def opponent(info: TaskInfo) -> nn.Module:
    """A small network for a generator to compete with where there is no student: images → logits."""
    channels = image_shape(info)[0]
    layers: list[nn.Module] = [nn.BatchNorm2d(channels)]
    for width in (16, 32, 64):
        layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, info.classes))
