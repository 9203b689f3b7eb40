"""A table for this space on this device: given, bundled, cached, or built now from parts and real exported nets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch

from nas import content
from nas.errors import TableError
from nas.evaluators.distil import skeleton
from nas.executors import Executor
from nas.files import digest
from nas.latency import Device, LatencyTable
from nas.latency.check import rebuild
from nas.latency.measure import Progress
from nas.latency.plan import CalibrationNet, calibration_genomes
from nas.latency.profile import Effort, profile
from nas.locks import cache_dir
from nas.space import Genomes, SearchSpace, TaskInfo
from nas.student.export import to_onnx

BATCH = 5  # networks that a worker exports at a time
SAMPLE = 8  # random inputs: enough for activation ranges that no time depends on


def cached_path(space: SearchSpace, device: Device) -> Path:
    """Where this machine keeps its table for a space: equal keys and equal device mean equal table."""
    keys = digest(sorted(space.keys()))[:8]
    return cache_dir() / "tables" / f"{space.name}-{keys}-{device.fingerprint}.json"


def partial_of(table: Path) -> Path:
    """Where an interrupted measurement of a table is kept."""
    return table.with_name(f"{table.stem}.partial.npz")


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
    space: SearchSpace,
    info: TaskInfo,
    device: Device,
    executor: Executor,
    effort: Effort,
    *,
    nets: int,
    progress: Progress | None = None,
    note: Callable[[str], None] = lambda _: None,
    partial: Path | None = None,
    resume: bool = False,
) -> LatencyTable:
    """Profile ``space`` on this machine and fit it to ``nets`` exported networks.

    Args:
        info: shapes of the data.
        executor: exports the networks side by side.
        note: called with what a user should know.
        partial, resume: where what was measured is kept when Ctrl-C ends it, and whether to go on with it.
    """
    whole = calibration_nets(space, info, executor, nets, progress=progress)
    return profile(space, whole, device, effort, progress=progress, note=note, partial=partial, resume=resume)


def calibration_nets(
    space: SearchSpace, info: TaskInfo, executor: Executor, count: int, *, progress: Progress | None = None
) -> list[CalibrationNet]:
    """``count`` networks of the space, small ones and large ones, exported."""
    return exported_nets(space, info, executor, calibration_genomes(space, count), progress=progress)


def exported_nets(
    space: SearchSpace, info: TaskInfo, executor: Executor, genomes: Genomes, *, progress: Progress | None = None
) -> list[CalibrationNet]:
    """The genomes' networks, compressed and exported as students are, with random weights."""
    exported: dict[int, onnx.ModelProto] = {}
    # A few at a time: a worker makes the space anew for every item, which takes seconds where a model is traced.
    batches = [range(i, min(i + BATCH, len(genomes))) for i in range(0, len(genomes), BATCH)]
    for position, result in executor.run(untrained_nets, [(space, info, genomes[list(rows)]) for rows in batches]):
        if isinstance(result, Exception):
            raise result
        exported |= {i: onnx.load_from_string(data) for i, data in zip(batches[position], result, strict=True)}
        if progress is not None:
            progress(0.0, f"exporting network {len(exported)}/{len(genomes)}")
    return [CalibrationNet(tuple(space.parts(space.decode(row))), exported[i]) for i, row in enumerate(genomes)]


def untrained_nets(_shared: Any, item: tuple[SearchSpace, TaskInfo, Genomes]) -> list[bytes]:
    """The exported, compressed networks of genomes with random weights; time does not depend on them."""
    space, info, genomes = item
    return [untrained_onnx(space, info, genome) for genome in genomes]


def untrained_onnx(space: SearchSpace, info: TaskInfo, genome: Genomes) -> bytes:
    """The exported, compressed network of a genome with random weights, as bytes."""
    candidate = space.decode(genome)
    x = info.random(SAMPLE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = skeleton(space, candidate, x)
    plan = space.training(candidate).compression
    return to_onnx(model, plan, x[:1], x.numpy()).SerializeToString()
