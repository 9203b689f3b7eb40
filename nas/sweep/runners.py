"""What one trial of a sweep does: the contract, and the plain function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from nas.errors import ContentError, ExperimentError
from nas.progress import Progress
from nas.registry import import_object
from nas.sweep.nni_space import effective, nested


class Runner(Protocol):
    """Turns values into figures, in a process of its own; must be picklable."""

    def settle(self, values: dict[str, Any]) -> dict[str, Any]:
        """What of the drawn values takes effect; trials that agree in it are one trial. JSON-able."""

    def run(self, values: dict[str, Any], folder: Path, progress: Progress) -> dict[str, float]:
        """Do the trial of these settled values.

        Args:
            folder: the trial's own. What a killed attempt left there may be gone on with.

        Returns:
            Figures by name, the metric among them; ``violation`` > 0 says by how much a budget is broken.

        Raises:
            NasError: the trial fails for this reason, and the sweep goes on.
        """

    def command(self, values: dict[str, Any], folder: Path) -> str:
        """A command line that does the trial of these settled values again; empty where there is none.

        Args:
            folder: of the trial.
        """

    def forecast(self) -> list[str]:
        """What each trial is, in lines for people."""


@dataclass(frozen=True)
class FunctionRunner:
    """Calls ``module:function`` with the values and the trial's folder.

    Args:
        path: the function returns the metric, or figures by name.
        metric: what a bare number stands for.
        space: what is varied, as the sweep says it.
        fixed: keys and values of every trial.
    """

    path: str
    metric: str
    space: dict[str, Any] = field(default_factory=dict)
    fixed: tuple[tuple[str, Any], ...] = ()

    def load(self) -> Callable[[dict[str, Any], Path], Any]:
        """The function.

        Raises:
            ContentError: it cannot be imported, or is none.
        """
        function = import_object(self.path, "function")
        if not callable(function):
            raise ContentError(f"{self.path} is {type(function).__name__}.", expected="a function of values and folder")
        found: Callable[[dict[str, Any], Path], Any] = function
        return found

    def settle(self, values: dict[str, Any]) -> dict[str, Any]:
        """All of them, but for what lies in branches that were not chosen."""
        return effective(self.space, values)

    def run(self, values: dict[str, Any], folder: Path, progress: Progress) -> dict[str, float]:
        """Call it."""
        result = self.load()({**dict(self.fixed), **nested(self.space, values)}, folder)
        figures = result if isinstance(result, dict) else {self.metric: result}
        try:
            return {str(name): float(value) for name, value in figures.items()}
        except (TypeError, ValueError):
            raise ExperimentError(
                f"{self.path} returned {result!r}.", expected="a number, or numbers by name"
            ) from None

    def command(self, values: dict[str, Any], folder: Path) -> str:
        """None."""
        return ""

    def forecast(self) -> list[str]:
        """Nothing more is known."""
        return []
