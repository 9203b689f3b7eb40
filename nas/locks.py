"""Locks that die with their process: one run per folder, and training never beside timing on a machine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from nas.errors import StudyError

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing to lock with that a kill -9 would release
    fcntl = None  # type: ignore[assignment]


def cache_dir() -> Path:
    """Where tables and teachers of this machine are kept: ``$NAS_CACHE_DIR`` or ``~/.cache/nas``."""
    return Path(os.environ.get("NAS_CACHE_DIR") or Path.home() / ".cache" / "nas")


@contextlib.contextmanager
def file_lock(path: Path, *, shared: bool = False, wait: bool = True) -> Iterator[IO[str]]:
    """Hold an advisory lock on ``path``; raises BlockingIOError where ``wait`` is off and it is taken."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as handle:
        if fcntl is not None:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(handle, kind if wait else kind | fcntl.LOCK_NB)
        yield handle


@contextlib.contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Only one process works in a run folder; a lock left by a killed process holds nobody up.

    Raises:
        StudyError: another living process works there.
    """
    path = run / ".lock"
    try:
        with file_lock(path, wait=False) as handle:
            handle.seek(0)
            handle.truncate()
            handle.write(str(os.getpid()))
            handle.flush()
            yield
    except BlockingIOError:
        raise StudyError(
            f"Another process ({path.read_text() or 'unknown id'}) is working in {run}.",
            remedy="wait for it, or choose another folder with --out",
        ) from None


def training_lock() -> contextlib.AbstractContextManager[IO[str]]:
    """Held while training; many may train at once, none while something is being timed."""
    return file_lock(cache_dir() / "machine.lock", shared=True)


def timing_lock() -> contextlib.AbstractContextManager[IO[str]]:
    """Held while timing: alone on the machine, as far as this framework can say."""
    return file_lock(cache_dir() / "machine.lock")
