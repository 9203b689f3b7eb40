"""A small network from noise to images of any size: DCGAN's idea with upsampling instead of strides."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

START = 8  # longest side that the first feature map may have


class Generator(nn.Module):
    """``z [n, latent]`` → images ``[n, channels, height, width]`` within the value range.

    Radford et al. 2016 in outline: a linear layer to a small map, then double the sides and halve the channels until
    the size is there. Nearest neighbours and a convolution avoid the checkerboards of strided ones (Odena et al. 2016).
    BatchNorm uses the batch's own statistics always: images are drawn as they were trained, in batches.

    Args:
        shape: channels, height, width.
        value_range: smallest and largest raw value.
        latent: length of z.
        width: channels at full size.
    """

    def __init__(
        self, shape: tuple[int, int, int], value_range: tuple[float, float], latent: int = 64, width: int = 16
    ) -> None:
        super().__init__()
        channels, *side = shape
        smallest, *self.sizes = doublings((side[0], side[1]))
        self.sizes = self.sizes or [smallest]
        self.low, self.span = value_range[0], value_range[1] - value_range[0]
        widths = [width * 2**k for k in range(len(self.sizes) + 1)][::-1]
        self.first = (widths[0], *smallest)
        self.start = nn.Linear(latent, self.first[0] * self.first[1] * self.first[2])
        self.norm = _norm(widths[0])
        self.ups = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), _norm(b), nn.LeakyReLU(0.2))
            for a, b in pairwise(widths)
        )
        self.last = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        return self.low + self.span * self.logits(z).sigmoid()

    def logits(self, z: Tensor) -> Tensor:
        """Images before the sigmoid that brings them into the value range."""
        x = F.leaky_relu(self.norm(self.start(z).view(-1, *self.first)), 0.2)
        for size, up in zip(self.sizes, self.ups, strict=True):
            x = up(x if x.shape[2:] == torch.Size(size) else F.interpolate(x, size=size))
        result: Tensor = self.last(x)
        return result


def doublings(side: tuple[int, int]) -> list[tuple[int, int]]:
    """Sizes from the smallest feature map to ``side``, each about twice the one before."""
    sizes = [side]
    while max(sizes[0]) > START:
        height, width = sizes[0]
        sizes.insert(0, ((height + 1) // 2, (width + 1) // 2))
    return sizes


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, track_running_stats=False)
