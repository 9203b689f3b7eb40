"""What this machine is, read from the operating system; standard library only, because bundles take this file along."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """The facts of this machine under the names that latency tables have for them."""
    return {
        "cpu": cpu_model(), "cores": os.cpu_count() or 1, "memory_bytes": memory_bytes(),
        "system": f"{platform.system()} {platform.release()}".strip(), "governor": governor(),
    }  # fmt: skip


def cpu_model() -> str:
    """The processor's name and, where it can be read, its model number (virtual machines share names).

    Boards whose processor has no name of its own are named by their device tree (``Raspberry Pi 5 Model B Rev 1.0``).
    """
    info = _read(Path("/proc/cpuinfo"))
    if not info:
        brand = _said("sysctl", "-n", "machdep.cpu.brand_string") if platform.system() == "Darwin" else ""
        return brand or platform.processor() or platform.machine()
    fields = dict(re.findall(r"^(model name|model)\s*:\s*(.+)$", info, re.MULTILINE))
    if "model name" in fields:
        name = fields["model name"]
        return f"{name} model {fields['model']}" if "model" in fields else name
    board = _read(Path("/proc/device-tree/model")).strip("\0 \n")
    return f"{board} {platform.machine()}" if board else platform.machine()


def memory_bytes() -> int:
    """Main memory, 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0


def governor(root: Path = Path("/sys/devices/system/cpu")) -> str:
    """The frequency governor of the first processor (``performance``, ``powersave``), "" where there is none."""
    return _read(root / "cpu0" / "cpufreq" / "scaling_governor").strip()


def nvidia_gpu(index: int = 0) -> str:
    """Name of an NVIDIA GPU as its driver's own tool gives it, "" where there is no driver or no such GPU.

    Args:
        index: as CUDA counts, that is among the devices of ``CUDA_VISIBLE_DEVICES`` where that is set.
    """
    return _said("nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "-i", visible_gpu(index))


def visible_gpu(index: int) -> str:
    """What the driver calls the GPU that CUDA calls ``index``: a number or a UUID."""
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return visible[index] if index < len(visible) else str(index)


def _said(*command: str) -> str:
    """The first line that a command prints, "" where it fails or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().partition("\n")[0] if done.returncode == 0 else ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
