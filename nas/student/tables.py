"""A table for this space on this device: given, bundled, cached, or built now from parts and real exported nets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from nas import content
from nas.errors import TableError
from nas.evaluators import Distil
from nas.evaluators.distil import skeleton
from nas.evaluators.train import SAMPLE
from nas.executors import Executor
from nas.files import digest
from nas.latency import Device, LatencyTable
from nas.latency.check import rebuild
from nas.latency.measure import Progress
from nas.latency.profile import CalibrationNet, calibration_genomes, profile
from nas.locks import cache_dir
from nas.space import Genomes, SearchSpace
from nas.student.export import to_onnx


def cached_path(space: SearchSpace, device: Device) -> Path:
    """Where this machine keeps its table for a space: equal keys and equal device mean equal table."""
    keys = digest(sorted(space.keys()))[:8]
    return cache_dir() / "tables" / f"{space.name}-{keys}-{device.fingerprint}.json"


def find_table(path: str, space: SearchSpace, device: Device, note: Callable[[str], None]) -> LatencyTable | None:
    """The table that ``path`` means, or for ``auto`` a cached or bundled one that fits; nothing where none does.

    Raises:
        TableError: the table asked for by name does not fit the space, was never fitted, or is damaged.
    """
    if path != "auto":
        table = LatencyTable.load(content.find("latency_tables", path))
        keys = list(space.keys())
        if missing := table.missing(keys):
            raise table.lacks(missing, len(keys), space.name)
        table.error("latency_ms")
        if table.device.get("fingerprint") != device.fingerprint:
            note(elsewhere(table, device))
        return table
    for found in (cached_path(space, device), *content.available("latency_tables").values()):
        if found.suffix != ".json" or not found.exists():
            continue
        try:
            table = LatencyTable.load(found)
        except TableError as error:
            note(f"ignored: {error.found}")
            continue
        if table.device.get("fingerprint") == device.fingerprint and not table.missing(list(space.keys())):
            return table
    return None


def elsewhere(table: LatencyTable, device: Device) -> str:
    """What to know of a table that was asked for and comes from another device."""
    apart = "; ".join(device.differences(table.device))
    return (
        f"table {table.name} was measured on another device ({apart}); predictions may be off, measurements are not: "
        + rebuild(table.space)
    )


def build_table(
    student: Distil,
    device: Device,
    executor: Executor,
    *,
    seconds: float,
    nets: int,
    noise: float,
    progress: Progress | None = None,
) -> LatencyTable:
    """Profile the space of ``student`` on this machine and fit it to ``nets`` exported networks.

    Args:
        executor: exports the networks side by side; its shared object is ``student``.
    """
    space = student.space
    genomes = calibration_genomes(space, nets)
    exported: dict[int, onnx.ModelProto] = {}
    for i, data in executor.run(untrained_onnx, list(genomes)):
        if isinstance(data, Exception):
            raise data
        exported[i] = onnx.load_from_string(data)
        if progress is not None:
            progress(0.0, f"exporting network {len(exported)}/{nets}")
    whole = [CalibrationNet(tuple(space.parts(space.decode(row))), exported[i]) for i, row in enumerate(genomes)]
    return profile(space, whole, device, seconds=seconds, target_noise=noise, progress=progress)


def untrained_onnx(student: Distil, genome: Genomes) -> bytes:
    """The exported, compressed network of a genome with random weights; time does not depend on them."""
    candidate = student.space.decode(genome)
    x: Any = student.task.split("train")[0][:SAMPLE]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = skeleton(student.space, candidate, x)
    plan = student.space.training(candidate).compression
    return to_onnx(model, plan, x[:1], np.asarray(x)).SerializeToString()
