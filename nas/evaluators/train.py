"""Training one candidate: distilled, compressed before its last epochs, fine-tuned compressed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from nas.compression import apply_passes, penalties
from nas.errors import TrainingError
from nas.evaluators.distillation import Guide, Hints, guides_of, mixed_logits
from nas.space import Training
from nas.tasks import Task

FINE_TUNE_LR = 0.3  # of the learning rate: enough to recover from compression, too little to forget
SAMPLE = 256


@dataclass(frozen=True)
class Recipe:
    """How long and how a model is trained.

    Args:
        epochs: in all, compressed ones included.
        compressed_epochs: the last of them, after the compression passes.
        batch_size, lr, weight_decay: AdamW, one cosine per phase with a short warm-up.
        seconds: give up beyond this much time.
    """

    epochs: int
    compressed_epochs: int
    batch_size: int = 64
    lr: float = 1e-2
    weight_decay: float = 5e-2
    seconds: float = 600.0


@dataclass(frozen=True)
class Lessons:
    """Training inputs in a few augmented views, and what the teacher says to each.

    Attributes:
        x: ``[views, n, *input_shape]``; view 0 is not augmented.
        y: ``[n]``.
        teacher: teacher logits ``[views, n, classes]``, of several teachers ``[teachers, views, n, classes]``, or
            nothing for training without a teacher.
        guides: the teachers themselves, for what is learnt beside their logits; their weights are those of the logits.
            Where there are none, several teachers count alike.
    """

    x: torch.Tensor
    y: torch.Tensor
    teacher: torch.Tensor | None
    guides: tuple[Guide, ...] = ()

    @classmethod
    def prepare(
        cls, task: Task, teacher: nn.Module | Guide | Sequence[nn.Module | Guide] | None, views: int, seed: int
    ) -> Lessons:
        """Augment the training split ``views - 1`` times and ask each teacher once about every view."""
        x, y = task.split("train")
        generator = torch.Generator().manual_seed(seed)
        stack = torch.stack([x, *(task.augment(x, generator) for _ in range(views - 1))])
        guides = guides_of(teacher)
        if not guides:
            return cls(stack, y, None)
        logits = [torch.stack([torch.from_numpy(predict(guide.module, view)) for view in stack]) for guide in guides]
        return cls(stack, y, torch.stack(logits) if len(logits) > 1 else logits[0], guides)

    def soft_targets(self, view: int, rows: torch.Tensor, temperature: float) -> torch.Tensor | None:
        """Logits ``[len(rows), classes]`` whose softmax at ``temperature`` is the teachers' (mean) word on samples."""
        if self.teacher is None or self.teacher.dim() == 3:
            return None if self.teacher is None else self.teacher[view, rows]
        weights = [guide.weight for guide in self.guides] or [1.0] * len(self.teacher)
        return mixed_logits(self.teacher[:, view, rows], [w / sum(weights) for w in weights], temperature)


def predict(model: nn.Module, x: torch.Tensor, batch: int = 512) -> npt.NDArray[np.float32]:
    """Logits ``[n, classes]`` in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return np.concatenate([model(x[i : i + batch]).numpy() for i in range(0, len(x), batch)])


def train(
    model: nn.Module,
    task: Task,
    lessons: Lessons,
    training: Training,
    recipe: Recipe,
    seed: int,
    share: float = 1.0,
    eased: Sequence[Callable[[], torch.Tensor | None]] = (),
) -> nn.Module:
    """Train ``model`` and return it compressed (pruned for good, bits simulated), in evaluation mode.

    Args:
        share: of the recipe's steps that are made, before the compression and after it alike, with the learning rate's
            whole schedule in them; at least one step each.
        eased: added to the loss of the plain epochs, for passes that come after this training.

    Raises:
        TrainingError: the loss is not finite, or the time is up.
        CompressionError: a pass cannot do what the candidate asks.
        ExperimentError: a weight of the distillation is out of range, or pairs of layers name one that is not there.
    """
    deadline = time.monotonic() + recipe.seconds
    generator = torch.Generator().manual_seed(seed)
    compressed = recipe.compressed_epochs if training.compression else 0
    plain = recipe.epochs - compressed
    eased = [*eased, *penalties(model, training.compression)]
    # Whoever trains without a teacher is not asked for its features either.
    weights = (training.feature_weight, training.attention_weight) if lessons.teacher is not None else (0.0, 0.0)
    hints = Hints(lessons.guides, lessons.x, *weights, seed)
    # Depthwise convolutions train about twice as fast on a CPU with channels last.
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    _fit(model, task, lessons, training, recipe, recipe.lr, range(plain), generator, deadline, share, hints, eased)
    if training.compression:
        labels = lessons.y[:SAMPLE]
        model = apply_passes(model, training.compression, lessons.x[0, :SAMPLE], lambda out: task.loss(out, labels))
        epochs = range(plain, recipe.epochs)
        lr = recipe.lr * FINE_TUNE_LR
        _fit(model, task, lessons, training, recipe, lr, epochs, generator, deadline, share, hints)
    return model.eval()


def _fit(
    model: nn.Module,
    task: Task,
    lessons: Lessons,
    training: Training,
    recipe: Recipe,
    lr: float,
    epochs: range,
    generator: torch.Generator,
    deadline: float,
    share: float,
    hints: Hints,
    eased: Sequence[Callable[[], torch.Tensor | None]] = (),
) -> None:
    n, batch = len(lessons.y), min(recipe.batch_size, len(lessons.y))
    steps = max(1, round(share * len(epochs) * (n // batch)))
    with hints.on(model) as watch:
        parameters = [*model.parameters(), *hints.parameters()]
        optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=recipe.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _one_cycle(step / steps))
        model.train()
        for epoch, view, rows in islice(_batches(epochs, len(lessons.x), n, batch, generator), steps):
            logits = model(lessons.x[view, rows])
            loss = _taught(task, lessons, training, logits, view, rows)
            extras = (watch.loss(view, rows), *(penalty() for penalty in eased))
            loss = sum((extra for extra in extras if extra is not None), start=loss)
            if not torch.isfinite(loss):
                found = f"The loss became {loss.item()} in epoch {epoch + 1}."
                raise TrainingError(found, remedy="a lower training.lr")
            if time.monotonic() > deadline:
                raise TrainingError(f"Out of time in epoch {epoch + 1} after {recipe.seconds:g} s.")
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()


def _taught(
    task: Task, lessons: Lessons, training: Training, logits: torch.Tensor, view: int, rows: torch.Tensor
) -> torch.Tensor:
    """The task's loss, or the distillation's where there is a teacher whose word has a weight."""
    soft = lessons.soft_targets(view, rows, training.temperature) if training.kd_weight else None
    if soft is None:
        return task.loss(logits, lessons.y[rows])
    return task.distillation_loss(logits, soft, lessons.y[rows], training.kd_weight, training.temperature)


def _batches(
    epochs: range, views: int, n: int, batch: int, generator: torch.Generator
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Epoch, view and rows of every step, in a new order each epoch."""
    for epoch in epochs:
        order = torch.randperm(n, generator=generator)
        for i in range(0, n - batch + 1, batch):  # a last, smaller batch would upset batch normalisation
            yield epoch, epoch % views, order[i : i + batch]


def _one_cycle(progress: float) -> float:
    """Factor of the learning rate: a tenth of the way up, the rest down a cosine to nearly nothing."""
    if progress < 0.1:
        return 0.1 + 9 * progress
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (progress - 0.1) / 0.9))
