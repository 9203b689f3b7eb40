"""The process group of a trial: its files, its claim, and how it is ended with all that it has started."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

OUTCOME, LOG = "outcome.json", "log.txt"
GRACE = 5.0  # seconds that a command has to put its things away


def claim_of(folder: Path) -> Path:
    """Lock file that all processes of the trial in ``folder`` hold, shared, while it runs."""
    return folder.with_name(f".{folder.name}.lock")


def lead_group() -> None:
    """Make this process the leader of a group: what it starts is ended with it, and Ctrl-C is not for it.

    It was started with SIGINT blocked, because a Ctrl-C at that moment would have been for it as well.
    """
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # and so forget one that is pending
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGINT, signal.default_int_handler)


def end(processes: Sequence[SpawnProcess]) -> None:
    """End trials' processes and all that they have started: first politely, then not."""
    for process in processes:
        _signal(process, signal.SIGTERM)
    waiting = [process.sentinel for process in processes]
    while waiting and (ready := wait(waiting, 2 * GRACE)):
        waiting = [sentinel for sentinel in waiting if sentinel not in ready]
    for process in processes:
        bury(process)


def bury(process: SpawnProcess) -> None:
    """Kill what a trial's process has left behind, if anything, and the process if it has not ended."""
    _signal(process, signal.SIGKILL)
    process.join()


def _signal(process: SpawnProcess, number: signal.Signals) -> None:
    if process.pid is None:
        return
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:  # it leads no group yet
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
    except PermissionError:  # only what is dead is left of it
        pass
