"""Runtimes: one small interface, one file each."""

from __future__ import annotations

from nas.latency.runtimes.base import Runner, Runtime, is_int8, random_inputs, runtimes
from nas.latency.runtimes.onnx_runtime import OnnxRuntime
from nas.latency.runtimes.open_vino import OpenVino
from nas.latency.runtimes.pytorch import Torch, TorchCompiled

__all__ = [
    "OnnxRuntime", "OpenVino", "Runner", "Runtime", "Torch", "TorchCompiled", "is_int8", "random_inputs", "runtimes",
]  # fmt: skip
