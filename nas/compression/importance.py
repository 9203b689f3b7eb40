"""How much a channel matters: one function per criterion, each from a group to a score per channel, ``[size]``."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from nas.compression.base import Loss
from nas.compression.groups import Group, Slices, evaluating, squared_norms
from nas.errors import CompressionError

BINS = 32


@dataclass(frozen=True)
class Evidence:
    """What a score may look at.

    Attributes:
        model: as it is now, with gradients where :func:`gradients` was called.
        name: of the group.
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


def l1(group: Group, evidence: Evidence) -> torch.Tensor:
    """Sum of magnitudes in every layer that the channel runs through (Li et al. 2017, "Pruning Filters for Efficient
    ConvNets")."""
    return _magnitudes(group, evidence, torch.abs)


def l2(group: Group, evidence: Evidence) -> torch.Tensor:
    """Sum of squares in every layer that the channel runs through."""
    return _magnitudes(group, evidence, torch.square)


def _magnitudes(group: Group, evidence: Evidence, of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return _summed([part for part in group.slices if not part.is_bias], group, evidence, of)


def _summed(
    parts: Sequence[Slices], group: Group, evidence: Evidence, of: Callable[[torch.Tensor], torch.Tensor],
    reason: str = "it has no weights",
) -> torch.Tensor:  # fmt: skip
    """Per channel the sum of ``of`` all its weights in ``parts``."""
    if not parts:
        raise CompressionError(
            f"channel_prune: {evidence.name!r} cannot be scored by this importance: {reason}.",
            expected=f"another importance: {', '.join(IMPORTANCES)}",
        )
    score = torch.zeros(group.size)
    for part in parts:
        score.index_add_(0, part.root, of(part.of(part.parameter.detach())).sum(dim=1).cpu().float())
    return score


def taylor(group: Group, evidence: Evidence) -> torch.Tensor:
    """Squared change of the loss when the channel becomes zero, to first order: (Σ g·w)², summed over the layers that
    it runs through (Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", eq. 8). Without
    gradients: L1."""
    if not evidence.slopes:
        return l1(group, evidence)
    score = torch.zeros(group.size)
    for part in group.slices:
        if part.parameter.grad is not None:
            change = part.of(part.parameter.detach() * part.parameter.grad).sum(dim=1)
            score.index_add_(0, part.root, change.square().cpu().float())
    return score


def entropy(group: Group, evidence: Evidence) -> torch.Tensor:
    """Entropy −Σ p·log p of the channel's mean activation over the sample (Luo & Wu 2017, "An Entropy-based Pruning
    Method for CNN Compression", eq. 2), as the layers that read the channel see it, in a histogram whose 32 bins span
    the widest channel's range. A channel that says the same about every input has none."""
    readers = [part for part in group.slices if part.reads]
    seen: dict[nn.Module, torch.Tensor] = {}

    def note(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen[module] = _pooled(args[0], module)

    hooks = [part.layer.register_forward_pre_hook(note) for part in readers]
    try:
        with evaluating(evidence.model), torch.no_grad():
            evidence.model(evidence.sample)
    finally:
        for hook in hooks:
            hook.remove()
    score, count = torch.zeros(group.size), torch.zeros(group.size)
    for part in readers:
        if part.layer in seen:
            score.index_add_(0, part.root, _entropies(seen[part.layer])[part.here])
            count.index_add_(0, part.root, torch.ones(len(part.root)))
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


def bn(group: Group, evidence: Evidence) -> torch.Tensor:
    """Magnitude of the batch normalisation's scale γ (Liu et al. 2017, "Learning Efficient Convolutional Networks
    through Network Slimming").

    Raises:
        CompressionError: no batch normalisation follows the layer.
    """
    norms = [part for part in group.slices if isinstance(part.layer, nn.BatchNorm1d | nn.BatchNorm2d)]
    scales = [part for part in norms if not part.is_bias]
    return _summed(scales, group, evidence, torch.abs, "no batch normalisation follows it")


def random(group: Group, evidence: Evidence) -> torch.Tensor:
    """Nothing is known: the baseline of every other score. The layer's name is the seed."""
    generator = torch.Generator().manual_seed(zlib.crc32(evidence.name.encode()))
    return torch.rand(group.size, generator=generator)


def group_lasso(group: Group, evidence: Evidence) -> torch.Tensor:
    """Norm ‖w‖₂ of everything that the channel owns: what the penalty of the plain epochs drives to zero (Wen et al.
    2016, "Learning Structured Sparsity in Deep Neural Networks", eq. 3)."""
    return squared_norms(group.slices, group.size).sqrt().detach()


Importance = Callable[[Group, Evidence], torch.Tensor]
IMPORTANCES: dict[str, Importance] = {
    "l1": l1, "l2": l2, "taylor": taylor, "entropy": entropy, "bn": bn, "random": random, "group_lasso": group_lasso,
}  # fmt: skip
