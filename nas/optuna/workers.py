"""Which process a running trial belongs to, and whether that process is still there."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def this_worker() -> str:
    """``host:pid:start`` of this process; ``start`` is empty where the system does not tell it."""
    return f"{socket.gethostname()}:{os.getpid()}:{_start(os.getpid())}"


def is_alive(worker: str | None) -> bool:
    """Whether the process is there; on another host, or if it gave no name, it is taken to be."""
    if worker is None:
        return True
    host, pid, start = worker.rsplit(":", 2)
    if host != socket.gethostname():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's process, and alive
    return _start(int(pid)) == start  # a number is given to another process in time


def _start(pid: int) -> str:
    """When a process was started, in clock ticks since the machine was (proc(5), field 22 of stat)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
