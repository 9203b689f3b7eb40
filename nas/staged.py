"""The shell of staged image classifiers: what search spaces of stages of blocks have in common but their blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from nas.space import TaskInfo


class StagedClassifier(nn.Module):
    """Preprocessing, stem, stages, pooled 1×1-convolution classifier: raw images ``[n, c, h, w]`` → logits.

    Args:
        task: shapes, classes and preprocessing of the data.
        resolution: side that images are resized to.
        stem: the first layers.
        stages: modules whose children are run one after the other.
        width: channels of the last stage's output.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, task: TaskInfo, resolution: int, stem: nn.Module, stages: nn.ModuleList, width: int) -> None:
        super().__init__()
        channels = task.input_shape[0]
        self.register_buffer("mean", torch.tensor(task.mean).view(1, channels, 1, 1))
        self.register_buffer("scale", 1.0 / torch.tensor(task.std).view(1, channels, 1, 1))
        self.resolution = resolution
        self.resize = tuple(task.input_shape[1:]) != (resolution, resolution)
        self.stem = stem
        self.stages = stages
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Conv2d(width, task.classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x - self.mean) * self.scale
        if self.resize:
            x = F.interpolate(x, size=(self.resolution, self.resolution), mode="bilinear", align_corners=False)
        x = self.stem(x)
        for stage in self.stages:
            for block in stage.children():
                x = block(x)
        return self.head(self.pool(x)).flatten(1)
