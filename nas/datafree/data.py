"""Unlabelled images of the user's own, as they are: what every synthetic source is compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nas.datafree.base import Source, sources
from nas.space import TaskInfo


@sources.register("data")
class Data(Source):
    """Draws from ``images`` without replacement, in a new order each time all were drawn.

    Args:
        teacher, info, seed, images: see :class:`~nas.datafree.base.Source`.
    """

    needs_images = True

    def __init__(self, teacher: nn.Module, info: TaskInfo, seed: int, images: Tensor | None = None) -> None:
        super().__init__(teacher, info, seed, images)
        self._order = torch.empty(0, dtype=torch.long)

    def batch(self, n: int) -> Tensor:
        while len(self._order) < n:
            self._order = torch.cat([self._order, torch.randperm(len(self.images), generator=self.generator)])
        rows, self._order = self._order[:n], self._order[n:]
        return self.images[rows]
