"""What a long job says while it works; the command line draws it, a library user may ignore it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives stages, shares done, and notes."""

    def stage(self, name: str) -> None:
        """A new stage begins."""

    def update(self, share: float, message: str = "") -> None:
        """``share`` of the stage is done, 0..1."""

    def note(self, text: str) -> None:
        """Something a user should know."""


class Silent:
    """Says nothing."""

    def stage(self, name: str) -> None:
        pass

    def update(self, share: float, message: str = "") -> None:
        pass

    def note(self, text: str) -> None:
        pass
