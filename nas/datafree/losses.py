"""What tells a generator, without any data, that its images are like those the teacher learnt from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.errors import ExperimentError


def one_hot_loss(logits: Tensor) -> Tensor:
    """Cross-entropy of ``logits [n, classes]`` with their own argmax; Chen et al. 2019, equation 3. Real images are
    recognised without doubt."""
    return F.cross_entropy(logits, logits.detach().argmax(dim=1))


def activation_loss(features: Tensor) -> Tensor:
    """−mean |features|, Chen et al. 2019, equation 4 (over the size, so that widths compare). Real images excite the
    filters that were trained on such."""
    return -features.abs().mean()


def balance_loss(logits: Tensor) -> Tensor:
    """−entropy of the mean class probabilities of ``logits [n, classes]``, in units of that of even classes, so −1
    is best; Chen et al. 2019, equation 5 (the paper divides by the number of classes instead)."""
    mean = logits.softmax(dim=1).mean(dim=0)
    return (mean * mean.clamp_min(1e-12).log()).sum() / math.log(logits.shape[1])


def disagreement(teacher: Tensor, student: Tensor) -> Tensor:
    """Jensen-Shannon divergence of two ``logits [n, classes]``, 0 (they agree) to 1; Yin et al. 2020, equation 8.

    The generator looks for images where it is large (Fang et al. 2019 do so with the distance of the logits, which has
    no bound and drowns the other terms).
    """
    p, q = teacher.log_softmax(dim=1), student.log_softmax(dim=1)
    mean = torch.logaddexp(p, q) - math.log(2)
    both = F.kl_div(mean, p, reduction="batchmean", log_target=True)
    both = both + F.kl_div(mean, q, reduction="batchmean", log_target=True)
    return both / (2 * math.log(2))


@dataclass
class Seen:
    """What a teacher said to a batch, and what went on in it.

    Attributes:
        logits: ``[n, classes]``.
        features: what its last layer with weights was given, flattened to ``[n, features]``.
        batchnorm: Σ over layers of ‖μ − running mean‖₂ + ‖σ² − running variance‖₂, of the inputs of its BatchNorm
            layers; Yin et al. 2020, equation 4. Nothing where it has none.
    """

    logits: Tensor
    features: Tensor
    batchnorm: Tensor | None


@dataclass
class _Notes:
    distances: list[Tensor] = field(default_factory=list)
    features: Tensor | None = None


class Witness:
    """A teacher under observation. Its hooks stay: give it a copy.

    Attributes:
        layers: how many BatchNorm layers with running statistics there are.
    """

    def __init__(self, teacher: nn.Module) -> None:
        self.teacher, self._notes, self.layers = teacher, _Notes(), 0
        for module in teacher.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                self.layers += 1
                module.register_forward_pre_hook(self._note_distance)
            elif isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
                module.register_forward_pre_hook(self._note_features)

    def __call__(self, x: Tensor) -> Seen:
        """Logits of ``x [n, *input_shape]``; gradients flow back to ``x``.

        Raises:
            ExperimentError: no Linear or convolution runs in the teacher.
        """
        self._notes = _Notes()
        logits = self.teacher(x)
        notes, self._notes = self._notes, _Notes()
        if notes.features is None:
            raise ExperimentError("The teacher has neither a Linear layer nor a convolution.", remedy="activation: 0")
        return Seen(logits, notes.features.flatten(1), sum(notes.distances, torch.zeros(())) if self.layers else None)

    def _note_distance(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        others = [axis for axis in range(x.ndim) if axis != 1]
        mean, variance = x.mean(dim=others), x.var(dim=others, unbiased=False)
        known_mean, known_variance = module.get_buffer("running_mean"), module.get_buffer("running_var")
        self._notes.distances.append((mean - known_mean).norm() + (variance - known_variance).norm())

    def _note_features(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._notes.features = inputs[0]
