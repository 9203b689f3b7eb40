"""The contract of an executor, and the one that runs everything here and now."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self


class Executor(abc.ABC):
    """Runs ``function(shared, item)`` for many items; used as a context manager.

    ``shared`` is sent to a worker once, not with every item.
    """

    @abc.abstractmethod
    def run(self, function: Callable[[Any, Any], Any], items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Yield ``(position, result)`` as results arrive; an exception object stands for a worker that died."""

    def close(self) -> None:  # noqa: B027 - an executor without workers has nothing to stop
        """Stop the workers."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Serial(Executor):
    """One after the other in this process."""

    def __init__(self, shared: Any) -> None:
        self.shared = shared

    def run(self, function: Callable[[Any, Any], Any], items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        for i, item in enumerate(items):
            yield i, function(self.shared, item)
