"""Runtimes: one small interface, one file each."""

from __future__ import annotations

from nas.latency.runtimes.base import Runner, Runtime, runtimes
from nas.latency.runtimes.onnxruntime_cpu import OnnxRuntimeCpu

__all__ = ["OnnxRuntimeCpu", "Runner", "Runtime", "runtimes"]
