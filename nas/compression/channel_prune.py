"""Structured channel pruning: whole channels removed by importance, through torch-pruning's dependency groups."""

from __future__ import annotations

from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from nas.compression.base import Loss, Pass, named_module, passes
from nas.errors import CompressionError


@passes.register("channel_prune")
class ChannelPrune(Pass):
    """Keeps the most important output channels of named convolutions or linear layers.

    ``settings`` maps a layer name to the number of output channels to keep. Importance is the group's L1
    magnitude (Li et al. 2017, "Pruning Filters for Efficient ConvNets"), summed over every layer that the
    channel runs through. The module becomes physically smaller; nothing is masked.
    """

    def apply(self, model: nn.Module, sample: torch.Tensor, loss: Loss | None = None) -> nn.Module:
        graph: Any = tp.DependencyGraph().build_dependency(model, example_inputs=sample[:1])
        importance = tp.importance.GroupMagnitudeImportance(p=1)
        for name, keep in self.settings.items():
            layer = named_module(model, name, "channel_prune")
            prune, channels = _pruner(layer, name)
            if not 1 <= keep <= channels:
                raise CompressionError(
                    f"channel_prune: keep {keep} of {channels} channels of {name!r}.", expected=f"1..{channels}"
                )
            if keep == channels:
                continue
            everything = graph.get_pruning_group(layer, prune, idxs=list(range(channels)))
            order = torch.argsort(importance(everything), stable=True)
            graph.get_pruning_group(layer, prune, idxs=sorted(order[: channels - keep].tolist())).prune()
        return model


def _pruner(layer: nn.Module, name: str) -> tuple[Any, int]:
    if isinstance(layer, nn.Conv2d):
        return tp.prune_conv_out_channels, layer.out_channels
    if isinstance(layer, nn.Linear):
        return tp.prune_linear_out_channels, layer.out_features
    raise CompressionError(f"channel_prune: {name!r} is a {type(layer).__name__}.", expected="a Conv2d or Linear layer")
