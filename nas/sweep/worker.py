"""The process of one trial: it runs, writes its outcome whole or not at all, and ends with whoever started it."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from nas.errors import NasError
from nas.executors import die_with
from nas.files import write_json
from nas.locks import file_lock
from nas.sweep.runners import Runner
from nas.sweep.trials import LOG, OUTCOME, claim_of, lead_group


@dataclass(frozen=True)
class Order:
    """What a trial's process is told.

    Attributes:
        parent: id of the process that started it.
    """

    runner: Runner
    values: dict[str, Any]
    folder: Path
    parent: int


def work(order: Order) -> None:
    """Run the trial; its output and its progress go to its ``log.txt``."""
    lead_group()
    die_with(order.parent)
    with file_lock(claim_of(order.folder), shared=True):
        if os.getppid() != order.parent:
            return  # too late: somebody else may have claimed the trial
        order.folder.mkdir(parents=True, exist_ok=True)
        with (order.folder / LOG).open("a", buffering=1) as log:
            sys.stdout.flush()
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            write_json(order.folder / OUTCOME, _attempt(order, log))


def _attempt(order: Order, log: TextIO) -> dict[str, Any]:
    start = time.monotonic()
    outcome: dict[str, Any] = {"figures": {}, "reason": ""}
    try:
        figures = order.runner.run(order.values, order.folder, _Log(log))
        # Text, because JSON has no NaN: whether a figure is one is for the record to judge.
        outcome["figures"] = {name: repr(float(value)) for name, value in figures.items()}
    except NasError as error:
        outcome["reason"] = error.found
        log.write(f"{error}\n")
    except Exception as error:
        outcome["reason"] = f"{type(error).__name__}: {error} (traceback in {LOG})"
        log.write(traceback.format_exc())
    return {**outcome, "seconds": time.monotonic() - start}


def read_outcome(folder: Path) -> dict[str, Any] | None:
    """What became of a trial; nothing while it has not ended."""
    try:
        outcome: dict[str, Any] = json.loads((folder / OUTCOME).read_text())
    except FileNotFoundError:
        return None
    return {**outcome, "figures": {name: float(value) for name, value in outcome["figures"].items()}}


class _Log:
    """Progress as lines of a file."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def stage(self, name: str) -> None:
        """A new stage begins."""
        self._file.write(f"{time.strftime('%H:%M:%S')} {name}\n")

    def update(self, share: float, message: str = "") -> None:
        """Only for those who watch."""

    def note(self, text: str) -> None:
        """Something a user should know."""
        self._file.write(f"         {text}\n")
