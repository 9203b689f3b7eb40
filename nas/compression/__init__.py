"""Compression: one technique per file, each a pass from module to smaller module."""

from nas.compression.base import Loss, Pass, Plan, apply_passes, passes, penalties, restore, rewrite_onnx
from nas.compression.channel_prune import ChannelPrune
from nas.compression.low_rank import LowRank
from nas.compression.quantize import Quantize

__all__ = [
    "ChannelPrune", "Loss", "LowRank", "Pass", "Plan", "Quantize", "apply_passes", "passes", "penalties", "restore",
    "rewrite_onnx",
]  # fmt: skip
