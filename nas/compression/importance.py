"""How much a channel matters: one function per criterion, each from a dependency group to a score per channel."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from nas.compression.base import Loss
from nas.compression.groups import CONSUMERS, evaluating, slices, squared_norms
from nas.errors import CompressionError

BINS = 32


@dataclass(frozen=True)
class Evidence:
    """What a score may look at.

    Attributes:
        model: as it is now, with gradients where :func:`gradients` was called.
        name: of the group's first layer.
        sample: raw inputs ``[n, *input_shape]``.
        slopes: whether there are gradients.
    """

    model: nn.Module
    name: str
    sample: torch.Tensor
    slopes: bool = False


def gradients(model: nn.Module, sample: torch.Tensor, loss: Loss) -> None:
    """One backward of ``loss`` on the sample, in evaluation mode; leaves ``grad`` on the parameters."""
    model.zero_grad(set_to_none=True)
    with evaluating(model), torch.enable_grad():
        loss(model(sample)).backward()


def l1(group: Any, evidence: Evidence) -> torch.Tensor:
    """Sum of magnitudes in every layer that the channel runs through (Li et al. 2017, "Pruning Filters for Efficient
    ConvNets")."""
    return _known(tp.importance.GroupMagnitudeImportance(p=1)(group), evidence)


def l2(group: Any, evidence: Evidence) -> torch.Tensor:
    """Sum of squares in every layer that the channel runs through."""
    return _known(tp.importance.GroupMagnitudeImportance(p=2)(group), evidence)


def taylor(group: Any, evidence: Evidence) -> torch.Tensor:
    """Squared change of the loss when the channel becomes zero, to first order: (Σ g·w)², summed over the layers that
    it runs through (Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", eq. 8). Without
    gradients: L1."""
    if not evidence.slopes:
        return l1(group, evidence)
    channels = len(group[0].idxs)
    score = torch.zeros(channels)
    for part in slices(group):
        if part.parameter.grad is not None:
            change = part.of(part.parameter.detach() * part.parameter.grad).sum(dim=1)
            score.index_add_(0, part.root, change.square().cpu().float())
    return score


def entropy(group: Any, evidence: Evidence) -> torch.Tensor:
    """Entropy −Σ p·log p of the channel's mean activation over the sample (Luo & Wu 2017, "An Entropy-based Pruning
    Method for CNN Compression", eq. 2), as the layers that read the channel see it, in a histogram whose 32 bins span
    the widest channel's range. A channel that says the same about every input has none."""
    readers = [i for i, (dep, _) in enumerate(group) if dep.handler in CONSUMERS]
    seen: dict[nn.Module, torch.Tensor] = {}

    def note(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen[module] = _pooled(args[0], module)

    hooks = [group[i].dep.layer.register_forward_pre_hook(note) for i in readers]
    try:
        with evaluating(evidence.model), torch.no_grad():
            evidence.model(evidence.sample)
    finally:
        for hook in hooks:
            hook.remove()
    channels = len(group[0].idxs)
    score, count = torch.zeros(channels), torch.zeros(channels)
    for i in readers:
        dep, idxs = group[i]
        if dep.layer in seen:
            bits = _entropies(seen[dep.layer])[torch.tensor(idxs)]
            root = torch.tensor(group[i].root_idxs)
            score.index_add_(0, root, bits)
            count.index_add_(0, root, torch.ones(len(root)))
    return score / count.clamp(min=1)


def _pooled(x: torch.Tensor, reader: nn.Module) -> torch.Tensor:
    """Mean activation per sample and channel, ``[n, channels]``: pixels or tokens are averaged."""
    x = x.detach().cpu().float()
    if isinstance(reader, nn.Linear):
        return x.reshape(len(x), -1, x.shape[-1]).mean(dim=1)
    return x.flatten(2).mean(dim=2)


def _entropies(values: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of each column of ``[n, channels]``, in bins as wide as the widest column needs."""
    above = values - values.amin(dim=0)
    bins = (above / above.max().clamp(min=1e-12) * BINS).long().clamp(0, BINS - 1)
    shares = nn.functional.one_hot(bins, BINS).float().mean(dim=0)
    return torch.special.entr(shares).sum(dim=1)


def bn(group: Any, evidence: Evidence) -> torch.Tensor:
    """Magnitude of the batch normalisation's scale γ (Liu et al. 2017, "Learning Efficient Convolutional Networks
    through Network Slimming").

    Raises:
        CompressionError: no batch normalisation follows the layer.
    """
    return _known(tp.importance.BNScaleImportance()(group), evidence, "no batch normalisation follows it")


def random(group: Any, evidence: Evidence) -> torch.Tensor:
    """Nothing is known: the baseline of every other score. The layer's name is the seed."""
    generator = torch.Generator().manual_seed(zlib.crc32(evidence.name.encode()))
    return torch.rand(len(group[0].idxs), generator=generator)


def group_lasso(group: Any, evidence: Evidence) -> torch.Tensor:
    """Norm ‖w‖₂ of everything that the channel owns: what the penalty of the plain epochs drives to zero (Wen et al.
    2016, "Learning Structured Sparsity in Deep Neural Networks", eq. 3)."""
    return squared_norms(slices(group), len(group[0].idxs)).sqrt().detach()


def _known(score: torch.Tensor | None, evidence: Evidence, reason: str = "it has no weights") -> torch.Tensor:
    if score is None:
        raise CompressionError(
            f"channel_prune: {evidence.name!r} cannot be scored by this importance: {reason}.",
            expected=f"another importance: {', '.join(IMPORTANCES)}",
        )
    return score


Importance = Callable[[Any, Evidence], torch.Tensor]
IMPORTANCES: dict[str, Importance] = {
    "l1": l1, "l2": l2, "taylor": taylor, "entropy": entropy, "bn": bn, "random": random, "group_lasso": group_lasso,
}  # fmt: skip
