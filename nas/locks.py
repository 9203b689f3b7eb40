"""Locks that die with their process: one run per folder, one builder of what is cached, no training beside timing."""

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


def cache_lock(path: Path) -> contextlib.AbstractContextManager[IO[str]]:
    """Held while ``path`` in the cache is built: another run that wants it waits, and then finds it."""
    return file_lock(path.with_name(f".{path.name}.lock"))


@contextlib.contextmanager
def training_lock() -> Iterator[None]:
    """Held while training; many may train at once, none while something is being timed."""
    with contextlib.ExitStack() as held:
        with _turnstile():
            held.enter_context(file_lock(cache_dir() / "machine.lock", shared=True))
        yield


@contextlib.contextmanager
def timing_lock() -> Iterator[None]:
    """Held while timing: alone on the machine, as far as this framework can say."""
    with contextlib.ExitStack() as held:
        with _turnstile():
            held.enter_context(file_lock(cache_dir() / "machine.lock"))
        yield


def _turnstile() -> contextlib.AbstractContextManager[IO[str]]:
    """Whoever waits for the machine waits in here: trainings that overlap for ever would never let a timing begin."""
    return file_lock(cache_dir() / "machine.queue.lock")
