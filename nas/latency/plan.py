"""What to measure for a table: which networks, which parts, and how many of them the time allows."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx

from nas.files import digest
from nas.latency.device import Device
from nas.latency.interpolate import grid
from nas.latency.measure import MIN_ROUNDS
from nas.latency.runtimes import Runner
from nas.locks import timing_lock
from nas.parts import PRECISIONS, Conv, Part
from nas.space import Genomes, SearchSpace

YARDSTICK = Part((Conv(32, 3, activation="relu6"),), (32, 12, 12))
CALLS = 5
POOL = 40  # candidates a calibration network is chosen from
ROUNDS = 2 * MIN_ROUNDS  # that every part should get; with less the table says what noise it has
FEWER_ROUNDS = MIN_ROUNDS + 1  # before parts are left out: what is interpolated is further off than what is noisy
PILOTS, PILOT_NETS = 32, 6
MEMORY_SHARE = 0.5  # of what is free, for loaded models


@dataclass(frozen=True)
class CalibrationNet:
    """A whole exported net of the space: what the sums of parts are fitted to.

    Attributes:
        parts: what it executes.
        model: as a student's file is; None where it was measured far away.
        stored_bytes: of the file, where there is no model.
    """

    parts: tuple[Part, ...]
    model: onnx.ModelProto | None
    stored_bytes: int = 0

    @property
    def size_bytes(self) -> int:
        """Of the file."""
        return self.stored_bytes if self.model is None else int(self.model.ByteSize())


@dataclass(frozen=True)
class Plan:
    """Parts that are measured, parts that are interpolated between them, and the networks they are fitted to.

    Attributes:
        space: its name.
        measured, absent: part key → part.
        nets: calibration networks.
    """

    space: str
    measured: Mapping[str, Part]
    absent: Mapping[str, Part]
    nets: Sequence[CalibrationNet]

    @classmethod
    def of(cls, space: SearchSpace, nets: Sequence[CalibrationNet], keys: Sequence[str]) -> Plan:
        """The plan that measures ``keys`` and interpolates the space's others."""
        parts, wanted = space.keys(), set(keys)
        measured = {key: part for key, part in parts.items() if key in wanted}
        return cls(space.name, measured, {k: p for k, p in parts.items() if k not in wanted}, nets)

    @property
    def net_names(self) -> list[str]:
        """Names of the networks in a measurement."""
        return [f"net {i}" for i in range(len(self.nets))]

    @property
    def models(self) -> dict[str, onnx.ModelProto]:
        """The networks that are here, by those names."""
        return {name: net.model for name, net in zip(self.net_names, self.nets, strict=True) if net.model is not None}

    @property
    def identity(self) -> str:
        """Equal for plans whose measurements may be joined."""
        nets = [sorted((part.key, part.count) for part in net.parts) for net in self.nets]
        return digest([self.space, sorted(self.measured), nets])[:16]


def calibration_genomes(space: SearchSpace, n: int, seed: int = 0) -> Genomes:
    """``n`` genomes by rising MACs from which sums of parts can be corrected anywhere in the space.

    Half are spread evenly over its range of MACs. The others are in turn the farthest from all that were taken
    (Gonzalez 1985), in MACs, traffic, weights, number of parts and share of int8: what corrections are made of.
    """
    pool = np.unique(space.canonical(_varied(space, POOL * n, np.random.default_rng(seed))), axis=0)
    where = np.array([_coordinates(space.parts(space.decode(row))) for row in pool])
    order = np.argsort(where[:, 0], kind="stable")
    taken = np.unique(order[np.linspace(0, len(pool) - 1, n - n // 2).round().astype(int)]).tolist()
    spread = np.where(where.std(axis=0) > 1e-9, where.std(axis=0), 1.0)
    where = where / spread
    distance = np.min([((where - where[i]) ** 2).sum(axis=1) for i in taken], axis=0)
    while len(taken) < min(n, len(pool)):
        taken.append(int(distance.argmax()))
        distance = np.minimum(distance, ((where - where[taken[-1]]) ** 2).sum(axis=1))
    return pool[np.array(taken)[np.argsort(where[taken, 0], kind="stable")]]


def _varied(space: SearchSpace, n: int, rng: np.random.Generator) -> Genomes:
    """Genomes by chance, every other one with a share of each technique that is itself by chance, from none to all.

    Where each block has bits of its own, chance alone makes about half of every network int8, and never all or none.
    """
    genomes = space.sample(rng, n)
    mixed = genomes[::2]
    share = {
        technique: np.clip(1.5 * rng.random(len(mixed)) - 0.25, 0, 1)
        for technique in dict.fromkeys(choice.technique for choice in space.choices)
    }
    for column, choice in enumerate(space.choices):
        count = len(choice.values)
        if choice.plain is not None and count > 1:
            plain = choice.index(choice.plain)
            others = (plain + rng.integers(1, count, len(mixed))) % count
            mixed[:, column] = np.where(rng.random(len(mixed)) < share[choice.technique], others, plain)
    return genomes


def _coordinates(parts: Sequence[Part]) -> list[float]:
    macs, int8 = (sum(part.macs for part in parts if part.precision in kinds) for kinds in (PRECISIONS, ("int8",)))
    traffic, weights = sum(p.count * p.traffic for p in parts), sum(p.weight_bytes for p in parts)
    sizes = macs, traffic, weights, sum(p.count for p in parts)
    return [*(math.log(1 + size) for size in sizes), int8 / max(macs, 1)]


def load_yardstick(device: Device) -> Runner:
    """The fixed kernel beside which everything is timed."""
    return device.load(YARDSTICK.to_onnx(device.batch), part=True)


def choose_keys(
    space: SearchSpace,
    device: Device,
    seconds: float,
    models: Sequence[onnx.ModelProto],
    *,
    seed: int = 0,
    note: Callable[[str], None] = lambda _: None,
) -> list[str]:
    """The keys to measure in ``seconds`` of loading and timing: all of them where that is enough, else a grid.

    A few parts and nets are tried first: what they take to load and to run decides how many parts can have
    :data:`ROUNDS` rounds, or else :data:`FEWER_ROUNDS`, beside all of the nets; what they take of memory, how many can
    be loaded at once.
    """
    begin = time.perf_counter()
    parts = space.keys()
    pilots = np.random.default_rng(seed).permutation(list(parts))[:PILOTS]
    before = _resident()
    load, visit = _cost([partial(_load, parts[key], device) for key in pilots], device)
    memory = max(0, _resident() - before) / len(pilots)
    some = [models[i] for i in np.linspace(0, len(models) - 1, min(PILOT_NETS, len(models))).astype(int)]
    load_net, visit_net = _cost([partial(device.load, model) for model in some], device)
    left = seconds - (time.perf_counter() - begin) - len(models) * load_net
    for rounds in (ROUNDS, FEWER_ROUNDS):
        by_time = max(0, int((left - rounds * len(models) * visit_net) / (load + rounds * visit)))
        if by_time >= len(parts):
            break
    by_memory = int(MEMORY_SHARE * _free() / memory) if memory else len(parts)
    keys = grid(parts, min(by_time, by_memory))
    if len(keys) < len(parts):
        reason = f"{seconds:.0f} s" if by_time <= by_memory else "the free memory"
        note(
            f"{len(parts)} parts are more than {reason} allows: {len(keys)} are measured, the others interpolated "
            "between them"
        )
    return keys


def _load(part: Part, device: Device) -> Runner:
    return device.load(part.to_onnx(device.batch), part=True)


def _cost(loaders: Sequence[Callable[[], Runner]], device: Device) -> tuple[float, float]:
    """Mean seconds to load a model, and for one visit of it; nothing where there are none."""
    if not loaders:
        return 0.0, 0.0
    yardstick = load_yardstick(device)
    start = time.perf_counter()
    runners = [load() for load in loaders]
    loading = (time.perf_counter() - start) / len(runners)
    with timing_lock():
        start = time.perf_counter()
        for runner in runners:
            yardstick.time(3)
            runner.time(CALLS + 1)
        return loading, (time.perf_counter() - start) / len(runners)


def _resident() -> int:
    """Bytes of memory that this process holds; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def _free() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return 4e9
