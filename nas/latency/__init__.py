"""Latency: devices, tables, the measuring protocol, and the estimator that prices genomes."""

from nas.latency.device import Device
from nas.latency.estimator import (
    AdditiveEstimator,
    CostEstimator,
    FastestRuntime,
    SeveralDevices,
    elsewhere,
    on_device,
)
from nas.latency.table import LatencyTable

__all__ = [
    "AdditiveEstimator",
    "CostEstimator",
    "Device",
    "FastestRuntime",
    "LatencyTable",
    "SeveralDevices",
    "elsewhere",
    "on_device",
]
