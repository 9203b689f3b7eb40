"""Compression: one technique per file, each a pass from module to smaller module."""

from nas.compression.base import Loss, Pass, Plan, apply_passes, passes, penalties, restore, rewrite_onnx
from nas.compression.channel_prune import ChannelPrune
from nas.compression.cluster import Cluster
from nas.compression.layer_drop import LayerDrop
from nas.compression.low_rank import LowRank
from nas.compression.quantize import Quantize
from nas.compression.weight_prune import WeightPrune

__all__ = [
    "ChannelPrune", "Cluster", "LayerDrop", "Loss", "LowRank", "Pass", "Plan", "Quantize", "WeightPrune",
    "apply_passes", "passes", "penalties", "restore", "rewrite_onnx",
]  # fmt: skip
