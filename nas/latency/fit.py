"""From sums of parts to whole nets: a linear correction fitted on measured networks, by precision.

``net ≈ c + Σ_g (s_g · Σ part_ms + f_g · number of parts)`` over the precision groups g. The scale absorbs what
fusion and caches save, the per-part term the fixed cost of calling a part on its own, c that of a call. Ridge
regression on relative errors, shrunk towards the plain sum (s = 1, f = 0, c = 0), keeps it stable on 20-30 nets.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nas.parts import PRECISIONS, Part

Array = npt.NDArray[np.float64]
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class FitError:
    """How well a fit predicts nets that it did not see (leave one out): shares and errors 0..1."""

    mape: float
    within_5: float
    within_10: float
    spearman: float
    nets: int


@dataclass(frozen=True)
class LinearFit:
    """Coefficients by precision group, in the order of :data:`nas.parts.PRECISIONS`."""

    scale: tuple[float, ...] = (1.0,) * len(PRECISIONS)
    per_part: tuple[float, ...] = (0.0,) * len(PRECISIONS)
    per_net: float = 0.0

    def part(self, value: float, part: Part) -> float:
        """Contribution of one copy of ``part`` whose own cost is ``value``."""
        group = PRECISIONS.index(part.precision)
        return self.scale[group] * value + self.per_part[group]

    def as_dict(self) -> dict[str, Any]:
        """Plain form for the table file."""
        return asdict(self)


def features(nets: Iterable[Sequence[tuple[Part, float]]]) -> Array:
    """One row a net: sums by group, part counts by group, 1."""
    rows = []
    for net in nets:
        row = np.zeros(2 * len(PRECISIONS) + 1)
        for part, value in net:
            group = PRECISIONS.index(part.precision)
            row[group] += value * part.count
            row[len(PRECISIONS) + group] += part.count
        row[-1] = 1.0
        rows.append(row)
    return np.array(rows)


def fit(x: Array, y: Array) -> tuple[LinearFit, FitError, Array]:
    """Fit measured ``y [nets]`` on :func:`features` ``x``; the strength of the ridge is chosen by leave-one-out.

    Returns the fit, its leave-one-out error, and the leave-one-out predictions.
    """
    best = min(STRENGTHS, key=lambda strength: _mape(_leave_one_out(x, y, strength), y))
    held_out = _leave_one_out(x, y, best)
    groups = len(PRECISIONS)
    theta = _solve(x, y, best)
    result = LinearFit(tuple(theta[:groups].tolist()), tuple(theta[groups:-1].tolist()), float(theta[-1]))
    return result, error(held_out, y), held_out


def error(predicted: Array, measured: Array) -> FitError:
    """Errors of predictions against measurements."""
    relative = np.abs(predicted / measured - 1)
    return FitError(
        mape=float(relative.mean()),
        within_5=float((relative <= 0.05).mean()),
        within_10=float((relative <= 0.10).mean()),
        spearman=spearman(predicted, measured),
        nets=len(measured),
    )


def spearman(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Rank correlation, ties sharing their mean rank; 0 where one side is constant."""
    from scipy.stats import rankdata

    ranks = [rankdata(np.asarray(v, dtype=np.float64)) for v in (a, b)]
    if min(float(np.std(r)) for r in ranks) == 0:
        return 0.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _solve(x: Array, y: Array, strength: float) -> Array:
    groups = len(PRECISIONS)
    prior = np.zeros(x.shape[1])
    prior[:groups] = 1.0
    weighted = x / y[:, None]
    target = 1.0 - weighted @ prior
    # Columns in shares of a typical net, so that one strength suits milliseconds and bytes alike.
    size = np.maximum(np.abs(weighted).mean(axis=0), 1e-12)
    scaled = weighted / size
    gram = scaled.T @ scaled + strength * len(y) * np.eye(x.shape[1])
    return np.asarray(prior + np.linalg.solve(gram, scaled.T @ target) / size)


def _leave_one_out(x: Array, y: Array, strength: float) -> Array:
    keep = ~np.eye(len(y), dtype=bool)
    return np.array([x[i] @ _solve(x[keep[i]], y[keep[i]], strength) for i in range(len(y))])


def _mape(predicted: Array, measured: Array) -> float:
    return float(np.abs(predicted / measured - 1).mean())
