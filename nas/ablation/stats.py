"""Paired differences over seeds, with their interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """A mean of ``n`` paired differences; ``half`` is half the width of its interval, unknown for one pair."""

    mean: float
    half: float | None
    n: int

    @property
    def clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.half is not None and abs(self.mean) > self.half


def paired(first: Sequence[float], second: Sequence[float]) -> Difference | None:
    """``first − second``, pair by pair: mean ± t(0.975, n − 1) · s / √n (Student 1908); None without a pair."""
    from scipy.stats import t

    differences = [a - b for a, b in zip(first, second, strict=True)]
    n = len(differences)
    if n < 2:
        return Difference(differences[0], None, 1) if n else None
    spread = statistics.stdev(differences)
    half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * spread / math.sqrt(n)
    return Difference(statistics.fmean(differences), half, n)
