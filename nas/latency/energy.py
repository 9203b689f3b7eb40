"""Energy of an inference, where the machine can say: RAPL of the processor, NVML of an NVIDIA GPU.

Standard library only (``pynvml`` where it is installed), because bundles take this file along.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

POWERCAP = Path("/sys/class/powercap")


class Meter(Protocol):
    """Counts the joules of a whole device, whoever uses it."""

    source: str

    def joules(self) -> float:
        """Energy used since the meter was made; never falls."""


@dataclass(frozen=True)
class Absent:
    """There is no meter, and why."""

    reason: str


class Rapl:
    """Running average power limit: energy of all processor packages, and of memory where it is metered.

    Zones count in microjoules up to a maximum and start again at 0; a zone may do so once between two readings,
    which at 100 W takes about 45 minutes.

    Args:
        zones: folders with ``energy_uj`` and ``max_energy_range_uj``.
    """

    def __init__(self, zones: list[Path]) -> None:
        self.source = f"RAPL ({', '.join(_line(zone / 'name') or zone.name for zone in zones)})"
        self._zones = [(zone / "energy_uj", int(_line(zone / "max_energy_range_uj"))) for zone in zones]
        self._last = [int(_line(counter)) for counter, _ in self._zones]
        self._total = 0

    def joules(self) -> float:
        """Energy used since the meter was made."""
        for i, (counter, highest) in enumerate(self._zones):
            now = int(_line(counter))
            self._total += now - self._last[i] + (highest if now < self._last[i] else 0)
            self._last[i] = now
        return self._total / 1e6


class Nvml:
    """Total energy counter of an NVIDIA GPU (Volta and later), in steps of some milliseconds."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self.source = f"NVML ({_text(nvml.nvmlDeviceGetName(handle))})"
        self._nvml, self._handle = nvml, handle
        self._first = nvml.nvmlDeviceGetTotalEnergyConsumption(handle)

    def joules(self) -> float:
        """Energy used since the meter was made."""
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) - self._first) / 1e3


def rapl(root: Path = POWERCAP) -> Meter | Absent:
    """The processor's meter.

    Args:
        root: where the system keeps its power zones.
    """
    packages = [zone for zone in sorted(root.glob("intel-rapl:*")) if _line(zone / "name").startswith("package")]
    # "psys" counts what packages count already, and a package counts its cores; its memory it does not.
    memories = [zone for package in packages for zone in sorted(package.glob("intel-rapl:*"))]
    zones = packages + [zone for zone in memories if _line(zone / "name") == "dram"]
    if not zones:
        return Absent(f"{root} has no RAPL package: a virtual machine, or a processor or system without RAPL")
    for zone in zones:
        if not os.access(zone / "energy_uj", os.R_OK):
            return Absent(f"{zone / 'energy_uj'} is not readable: it is root's unless its mode is changed")
    try:
        return Rapl(zones)
    except (OSError, ValueError) as error:
        return Absent(f"RAPL cannot be read: {error}")


def nvml(gpu: str = "0", expect: str = "") -> Meter | Absent:
    """An NVIDIA GPU's meter.

    Args:
        gpu: the driver's number of it, or its UUID.
        expect: the name that it must have, because CUDA and the driver may count differently.
    """
    try:
        import pynvml
    except ImportError:
        return Absent("the package nvidia-ml-py is not installed (pip install nvidia-ml-py)")
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(int(gpu)) if gpu.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(gpu)
        name = _text(pynvml.nvmlDeviceGetName(handle))
        if expect and name != expect:
            return Absent(f"the driver's GPU {gpu} is {name}, not {expect}; set CUDA_DEVICE_ORDER=PCI_BUS_ID")
        return Nvml(pynvml, handle)
    except pynvml.NVMLError as error:
        return Absent(f"NVML cannot meter GPU {gpu}: {error}")


def millijoules(meter: Meter, run: Callable[[], object], seconds: float = 1.0, enough: float = 0.0) -> float:
    """Energy of one call of ``run`` in mJ: that of the whole device, idle share included, over many calls.

    Args:
        seconds: how long to repeat; counters move in steps of about a millisecond (RAPL) to 100 ms (NVML).
        enough: repeat on until at least this many joules were counted.

    Raises:
        ValueError: the meter did not move in ten times the seconds.
    """
    run()
    calls, begin, first = 0, time.perf_counter(), meter.joules()
    while True:
        run()
        calls += 1
        spent = time.perf_counter() - begin
        if spent < seconds:
            continue
        used = meter.joules() - first
        if used > enough:
            return 1e3 * used / calls
        if spent > 10 * seconds:
            raise ValueError(f"{meter.source} counted {used} J in {spent:.1f} s")


def metered(meter: Meter | Absent, runs: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, Any]:
    """Plain form for files: millijoules of a call of each, or why there are none.

    What the meter is too coarse for is left out; where that is everything, the reason is the last one's.
    """
    if isinstance(meter, Absent):
        return {"absent": meter.reason}
    used, reason = {}, ""
    for name, run in runs.items():
        try:
            used[name] = millijoules(meter, run, seconds)
        except ValueError as error:
            reason = str(error)
    return {"absent": reason} if reason and not used else {"source": meter.source, "millijoules": used}


def source(energy: Mapping[str, Any]) -> str:
    """What the figures of :func:`metered` come from, or why there are none, for people."""
    return str(energy["source"]) if "source" in energy else f"not measured: {energy.get('absent', 'unknown')}"


def _line(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)
