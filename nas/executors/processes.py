"""Worker processes on this machine, one torch thread each."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from nas.errors import TrainingError
from nas.executors.base import Executor

_shared: Any = None


class Processes(Executor):
    """A pool that survives the death of a worker: what it worked on comes back as an error, the rest goes on.

    Args:
        shared: sent to every worker once; must be picklable.
        workers: how many; each uses one thread, so that results do not depend on how many there are.
    """

    def __init__(self, shared: Any, workers: int) -> None:
        self.shared, self.workers = shared, workers
        self._pool: ProcessPoolExecutor | None = None

    def run(self, function: Callable[[Any, Any], Any], items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        waiting = dict(enumerate(items))
        suspects: list[int] = []
        while waiting:
            futures = self._submit(function, waiting)
            for future in as_completed(futures):
                i = futures[future]
                try:
                    result = future.result()
                except BrokenProcessPool:
                    suspects.append(i)
                    continue
                del waiting[i]
                yield i, result
            if not waiting:
                return
            # Some worker died, and the pool cannot say on which item: each is tried once more, alone.
            self.close()
            for i in sorted(set(suspects) & set(waiting)):
                yield i, self._alone(function, waiting.pop(i))

    def _submit(self, function: Callable[[Any, Any], Any], items: dict[int, Any]) -> dict[Future[Any], int]:
        """Hand the items out; what a pool that breaks meanwhile no longer takes is left for the next one."""
        futures: dict[Future[Any], int] = {}
        pool = self._pool or self._start()
        for i, item in items.items():
            try:
                futures[pool.submit(_call, function, item)] = i
            except BrokenProcessPool:
                if not futures:  # a worker died while it had nothing to do
                    self.close()
                    return self._submit(function, items)
                break
        return futures

    def _alone(self, function: Callable[[Any, Any], Any], item: Any) -> Any:
        pool = self._pool or self._start()
        try:
            return pool.submit(_call, function, item).result()
        except BrokenProcessPool:
            self.close()
            return TrainingError("The worker process died (out of memory?).")

    def _start(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(self.workers, context, _initialise, (self.shared, os.getpid()))
        return self._pool

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


def _initialise(shared: Any, parent: int) -> None:
    global _shared
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    die_with(parent)
    torch.set_num_threads(1)
    _shared = shared


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def die_with(parent: int) -> None:
    """End this process soon after its parent is gone, kill -9 included: an orphan would disturb every timing.

    A process that leads a group takes its group along.
    """
    import threading
    import time

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _call(function: Callable[[Any, Any], Any], item: Any) -> Any:
    return function(_shared, item)
