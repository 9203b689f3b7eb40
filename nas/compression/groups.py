"""Groups: channels, units or heads that go together, and which slices of which weights each of them owns.

Whatever finds them (:mod:`nas.compression.dependency`, :mod:`nas.compression.traced`), a score looks at slices only.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from nas.errors import CompressionError


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@dataclass(frozen=True)
class Slices:
    """The part of one tensor that belongs to a group, one row a place along one of its axes.

    Attributes:
        layer, attribute: where the tensor is looked up each time, since training and pruning replace it.
        rows: from the whole tensor to ``[places, weights of one place]``.
        here, root: numbers of rows, and of the group's channels that they belong to, ``[k]`` each.
        reads: whether the layer takes the channels in, rather than gives them out or scales them.
    """

    layer: nn.Module
    attribute: str
    rows: Callable[[torch.Tensor], torch.Tensor]
    here: torch.Tensor
    root: torch.Tensor
    reads: bool

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rows of ``tensor`` that belong to the group, ``[k, n]``."""
        return self.rows(tensor)[self.here]

    @property
    def parameter(self) -> torch.Tensor:
        found: torch.Tensor = getattr(self.layer, self.attribute)
        return found

    @property
    def is_bias(self) -> bool:
        """Whether it is an offset, which says nothing of how much a channel is used."""
        return self.attribute.endswith("bias")


@dataclass(frozen=True)
class Group:
    """Channels that go together.

    Attributes:
        name: that settings call it by.
        size: how many there are.
        slices: all weights that they own.
        makers: names of all layers whose outputs they are.
        role: "heads", "head_dim", or "" for channels and units.
    """

    name: str
    size: int
    slices: tuple[Slices, ...]
    makers: tuple[str, ...]
    role: str = ""

    @property
    def normalised(self) -> bool:
        """Whether a batch normalisation scales them."""
        return any(isinstance(part.layer, nn.BatchNorm1d | nn.BatchNorm2d) for part in self.slices)

    def multiple(self, round_to: int) -> int:
        """What the number that is kept is rounded to: heads are counted one by one."""
        return 1 if self.role == "heads" else round_to


class Groups(abc.ABC):
    """All groups of a model.

    Attributes:
        model: that the slices are of.
    """

    model: nn.Module

    @abc.abstractmethod
    def all(self, leave_out: bool = False) -> list[Group]:
        """Those that may be pruned, each once, in the order of the model.

        Args:
            leave_out: whether those that cannot be followed are left out.

        Raises:
            UnprunableError: one cannot be followed.
        """

    @abc.abstractmethod
    def named(self, name: str) -> Group:
        """The group that a setting means.

        Raises:
            CompressionError: there is none of that name, or it cannot be pruned.
        """

    @abc.abstractmethod
    def without(self, lost: Mapping[str, Sequence[int]], sample: torch.Tensor) -> nn.Module:
        """The model without the named groups' channels of these numbers. These groups are used up by it.

        Raises:
            UnprunableError: the model does not work without them.
        """

    @abc.abstractmethod
    def apart(self, sample: torch.Tensor) -> Groups:
        """Groups that may be used up without loss to these."""

    def trial(self, keep: Mapping[str, int], sample: torch.Tensor) -> nn.Module:
        """A model as :meth:`without` makes it, with so many channels of the named groups, whichever they are."""
        groups, lost = self.apart(sample), dict[str, range]()
        for name, count in keep.items():
            group = groups.named(name)
            check_keep(count, group, name)
            lost[name] = range(count, group.size)
        return groups.without(lost, sample)


class UnprunableError(CompressionError):
    """Pruning a group breaks the model; ``layer`` names it."""

    layer = ""


def unprunable(name: str, reason: str) -> UnprunableError:
    """The error for the group called ``name``."""
    error = UnprunableError(f"channel_prune: {name!r} cannot be pruned: {reason}.", remedy="leave it out (skip it)")
    error.layer = name
    return error


def check_keep(keep: int, group: Group, name: str) -> None:
    """Raise a CompressionError where a group does not have as many channels as are to be kept."""
    if not 1 <= keep <= group.size:
        what = group.role or "channels"
        raise CompressionError(
            f"channel_prune: keep {keep} of {group.size} {what} of {name!r}.", expected=f"1..{group.size}"
        )


def shape_of_output(model: nn.Module, sample: torch.Tensor) -> tuple[int, ...]:
    """Shape of what the model makes of the sample.

    Raises:
        CompressionError: it makes more than one tensor.
    """
    with evaluating(model), torch.no_grad():
        output = model(sample)
    if not isinstance(output, torch.Tensor):
        raise CompressionError(
            f"channel_prune: the model returns a {type(output).__name__}.", expected="a model that returns one tensor"
        )
    return tuple(output.shape)


def squared_norms(parts: Sequence[Slices], channels: int) -> torch.Tensor:
    """Sum of squares of everything that each channel owns, ``[channels]``; has gradients."""
    first = parts[0].parameter
    total = torch.zeros(channels, dtype=first.dtype, device=first.device)
    for part in parts:
        total = total.index_add(0, part.root.to(first.device), part.of(part.parameter).square().sum(dim=1))
    return total
