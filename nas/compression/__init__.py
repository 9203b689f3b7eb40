"""Compression: one technique per file, each a pass from module to smaller module."""

from nas.compression.base import Pass, apply_passes, passes, restore, rewrite_onnx
from nas.compression.channel_prune import ChannelPrune
from nas.compression.quantize import Quantize

__all__ = ["ChannelPrune", "Pass", "Quantize", "apply_passes", "passes", "restore", "rewrite_onnx"]
