"""Meters: real readers of real files laid out as the kernel does, and what is said where there are none."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from nas.latency import Device
from nas.latency.energy import Absent, Meter, Rapl, millijoules, nvml, rapl


def zone(folder: Path, name: str, microjoules: int, highest: int = 262_143_328_850) -> Path:
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{highest}\n")
    return folder


def advance(folder: Path, microjoules: int) -> None:
    counter = folder / "energy_uj"
    highest = int((folder / "max_energy_range_uj").read_text())
    counter.write_text(f"{(int(counter.read_text()) + microjoules) % highest}\n")


def metered(found: Meter | Absent) -> Meter:
    assert not isinstance(found, Absent), found
    return found


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Path]:
    """Two sockets with cores and memory, and the platform's own counter, as ``/sys/class/powercap`` shows them."""
    zones = {}
    for i in (0, 1):
        package = tmp_path / f"intel-rapl:{i}"
        zones[f"package-{i}"] = zone(package, f"package-{i}", 1_000 * i)
        for j, name in enumerate(("core", "dram")):
            zones[f"{name}-{i}"] = zone(package / f"intel-rapl:{i}:{j}", name, 7)
    zones["psys"] = zone(tmp_path / "intel-rapl:2", "psys", 0)
    (tmp_path / "intel-rapl").mkdir()
    return zones


def test_packages_and_memory_are_counted_once(tree: dict[str, Path], tmp_path: Path) -> None:
    meter = metered(rapl(tmp_path))
    assert meter.joules() == 0
    for name in ("package-0", "package-1"):
        advance(tree[name], 3_000_000)
    for name in ("core-0", "core-1", "psys"):  # within the packages, and above them
        advance(tree[name], 50_000_000)
    advance(tree["dram-1"], 500_000)
    assert meter.joules() == pytest.approx(6.5)
    assert meter.joules() == pytest.approx(6.5)
    assert meter.source == "RAPL (package-0, package-1, dram, dram)"


def test_zones_listed_flat_are_the_same_zones(tmp_path: Path) -> None:
    """``/sys/class/powercap`` lists subzones beside their packages too, as links."""
    package = zone(tmp_path / "devices" / "intel-rapl:0", "package-0", 0)
    memory = zone(package / "intel-rapl:0:0", "dram", 0)
    shown = tmp_path / "powercap"
    shown.mkdir()
    (shown / "intel-rapl:0").symlink_to(package)
    (shown / "intel-rapl:0:0").symlink_to(memory)
    meter = metered(rapl(shown))
    advance(package, 1_000_000)
    advance(memory, 1_000_000)
    assert meter.joules() == pytest.approx(2.0)


def test_a_counter_that_starts_again(tmp_path: Path) -> None:
    package = zone(tmp_path / "intel-rapl:0", "package-0", 9_000_000, highest=10_000_000)
    meter = metered(rapl(tmp_path))
    totals = []
    for _ in range(5):
        advance(package, 3_000_000)
        totals.append(meter.joules())
    assert totals == pytest.approx([3.0, 6.0, 9.0, 12.0, 15.0])


def test_why_there_is_no_meter(tmp_path: Path) -> None:
    assert rapl(tmp_path) == Absent(
        f"{tmp_path} has no RAPL package: a virtual machine, or a processor or system without RAPL"
    )
    zone(tmp_path / "intel-rapl:0", "psys", 0)
    assert isinstance(rapl(tmp_path), Absent)
    package = zone(tmp_path / "intel-rapl:1", "package-0", 0)
    assert isinstance(rapl(tmp_path), Rapl)
    (package / "energy_uj").unlink()
    assert "not readable" in rapl(tmp_path).reason  # type: ignore[union-attr]
    (package / "energy_uj").write_text("rubbish")
    assert "cannot be read" in rapl(tmp_path).reason  # type: ignore[union-attr]


def test_this_machine_meters_or_says_why_not() -> None:
    found = Device.local().energy_meter()
    if isinstance(found, Absent):
        assert found.reason
    else:
        assert found.joules() >= 0


def test_a_gpu_that_is_not_there() -> None:
    pytest.importorskip("pynvml")
    found = replace(Device.local(), provider="cuda:7", accelerator="No Such GPU").energy_meter()
    assert isinstance(found, Absent)
    assert "GPU 7" in found.reason


def test_without_the_package_of_nvml() -> None:
    script = "import sys; sys.modules['pynvml'] = None; from nas.latency.energy import nvml; print(nvml().reason)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "nvidia-ml-py" in done.stdout
    assert isinstance(nvml("999"), Absent)


def test_millijoules_of_a_call(tmp_path: Path) -> None:
    """A call that uses 5 mJ, on a counter that a file holds."""
    package = zone(tmp_path / "intel-rapl:0", "package-0", 0)
    meter = metered(rapl(tmp_path))
    begin = time.perf_counter()
    assert millijoules(meter, lambda: advance(package, 5_000), seconds=0.05) == pytest.approx(5.0)
    assert time.perf_counter() - begin >= 0.05


def test_it_repeats_until_enough_was_counted(tmp_path: Path) -> None:
    package = zone(tmp_path / "intel-rapl:0", "package-0", 0)
    meter = metered(rapl(tmp_path))
    calls = []

    def call() -> None:
        calls.append(1)
        time.sleep(0.001)
        if len(calls) % 40 == 0:  # the counter moves in coarse steps
            advance(package, 200_000)

    assert millijoules(meter, call, seconds=0.01, enough=0.1) == pytest.approx(5.0, rel=0.1)
    assert len(calls) == 40


def test_a_counter_that_stands_still(tmp_path: Path) -> None:
    zone(tmp_path / "intel-rapl:0", "package-0", 0)
    with pytest.raises(ValueError, match=r"RAPL \(package-0\) counted 0.0 J"):
        millijoules(metered(rapl(tmp_path)), lambda: None, seconds=0.001)
