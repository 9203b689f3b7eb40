"""Random noise: what a student learns from a teacher's word on inputs that show nothing."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from nas.datafree.base import Source, sources
from nas.errors import DataError
from nas.space import TaskInfo


@sources.register("noise")
class Noise(Source):
    """Independent pixels with the task's mean and deviation a channel, cut to the value range.

    Args:
        teacher, info, seed, images: see :class:`~nas.datafree.base.Source`; images are not looked at.
        kind: of distribution; uniform ones reach √3 deviations to both sides.

    Raises:
        DataError: there are neither one mean and deviation nor one a channel.
    """

    def __init__(
        self,
        teacher: nn.Module,
        info: TaskInfo,
        seed: int,
        images: Tensor | None = None,
        *,
        kind: Literal["gaussian", "uniform"] = "gaussian",
    ) -> None:
        super().__init__(teacher, info, seed, images)
        self.kind = kind
        for name, values in (("mean", info.mean), ("std", info.std)):
            if len(values) not in (1, info.input_shape[0]):
                raise DataError(
                    f"There are {len(values)} values of {name} for {info.input_shape[0]} channels.",
                    expected="one, or one a channel",
                )
        per_channel = (-1, *(1 for _ in info.input_shape[1:]))
        self.mean, self.std = torch.tensor(info.mean).view(per_channel), torch.tensor(info.std).view(per_channel)

    def batch(self, n: int) -> Tensor:
        shape = (n, *self.info.input_shape)
        if self.kind == "gaussian":
            unit = self.normal(*shape)
        else:
            unit = (2 * torch.rand(*shape, generator=self.generator) - 1) * 3**0.5
        return (self.mean + self.std * unit).clamp(*self.info.value_range)
