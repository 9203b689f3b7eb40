"""The contract of an evaluator, and the guard that turns anything a candidate does wrong into a record."""

from __future__ import annotations

import abc
import math
import time
from dataclasses import dataclass, field

from nas.errors import NasError
from nas.registry import Registry
from nas.space import Genomes


@dataclass(frozen=True)
class Evaluation:
    """Quality of one candidate, or why it has none.

    Attributes:
        quality: the task's metric on validation data, of the *compressed* candidate; NaN where it failed.
        metrics: every metric of the task.
        reason: empty, or what went wrong.
        seconds: what it took.
    """

    quality: float
    metrics: dict[str, float] = field(default_factory=dict)
    reason: str = ""
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether there is no quality."""
        return not math.isfinite(self.quality)


class Evaluator(abc.ABC):
    """Genome → quality. Implementations must be picklable: executors send them to worker processes."""

    @abc.abstractmethod
    def evaluate(self, genome: Genomes, fidelity: float = 1.0) -> Evaluation:
        """Quality of ``genome [choices]`` after a share ``fidelity`` in (0, 1] of the full training; may raise.

        The cost must follow the share: searches are budgeted by the sum of the fidelities.
        """


evaluators: Registry[type[Evaluator]] = Registry("evaluator")


def guarded(evaluator: Evaluator, genome: Genomes, fidelity: float = 1.0) -> Evaluation:
    """Evaluate; NaN, an exception or running out of time costs the search this candidate and nothing else."""
    start = time.monotonic()
    try:
        result = evaluator.evaluate(genome, fidelity)
    except NasError as error:
        result = Evaluation(math.nan, reason=error.found)
    except Exception as error:
        result = Evaluation(math.nan, reason=f"{type(error).__name__}: {error}")
    if result.failed and not result.reason:
        result = Evaluation(math.nan, reason=f"the quality is {result.quality}")
    quality = math.nan if result.failed else float(result.quality)
    return Evaluation(quality, result.metrics, result.reason, time.monotonic() - start)
