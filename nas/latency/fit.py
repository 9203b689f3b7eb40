"""From sums of parts to whole nets: a linear correction fitted on measured networks, by precision.

``net ≈ c + Σ_g Σ_parts (s_g · part_ms + f_g + t_g · elements in and out + m_g · MACs + w_g · bytes of weights)`` over
the precision groups g. The scale absorbs what caches save, f the fixed cost of calling a part on its own, t what a part
on its own pays at its borders (changes of memory layout, outputs written out), m what long arithmetic costs within a
net, w that a part alone finds its weights in the cache and a part of a net does not, c the cost of a call.
Ridge regression on relative errors, shrunk towards the plain sum (s = 1, all others 0), keeps it stable on 20-30 nets.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nas.parts import PRECISIONS, Part

Array = npt.NDArray[np.float64]
STRENGTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
GROUPS = len(PRECISIONS)
ZEROS = (0.0,) * GROUPS
TERMS = 5  # of every group: own cost, parts, millions of elements, billions of MACs, megabytes of weights
#: Sets of terms, from the plainest. What each adds is uncertain on 30 nets; their average is better than any choice.
PLAIN = (0, 1)
SETS = (PLAIN, (0, 1, 2), (0, 1, 4), (0, 1, 2, 3), (0, 1, 2, 4), (0, 1, 2, 3, 4))
SHARPNESS = 4  # how much more the fit of a set counts that predicts left-out nets better
EXACT = 1e-6  # relative error of a law that was found, not approximated


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
    """Coefficients by precision group, in the order of :data:`nas.parts.PRECISIONS`.

    Attributes:
        scale: of a part's own cost.
        per_part: for each part.
        per_traffic: for a million elements that parts read from and hand to their neighbours.
        per_gmac: for a billion multiply-accumulates.
        per_weight_mb: for a million bytes of weights.
        per_net: once.
    """

    scale: tuple[float, ...] = (1.0,) * GROUPS
    per_part: tuple[float, ...] = ZEROS
    per_traffic: tuple[float, ...] = ZEROS
    per_gmac: tuple[float, ...] = ZEROS
    per_weight_mb: tuple[float, ...] = ZEROS
    per_net: float = 0.0

    def part(self, value: float, part: Part) -> float:
        """Contribution of one copy of ``part`` whose own cost is ``value``."""
        group = PRECISIONS.index(part.precision)
        terms = zip(self._coefficients(group), _terms(value, part), strict=True)
        return sum(coefficient * term for coefficient, term in terms)

    def net(self, parts: Iterable[tuple[Part, float]]) -> float:
        """Cost of a whole net from its parts and the cost of one copy of each."""
        return self.per_net + sum(part.count * self.part(value, part) for part, value in parts)

    def _coefficients(self, group: int) -> tuple[float, ...]:
        return tuple(getattr(self, name)[group] for name in _NAMES)

    def scaled(self, factor: float) -> LinearFit:
        """The fit of costs that are ``factor`` times as large."""
        times = {name: tuple(factor * v for v in getattr(self, name)) for name in _NAMES}
        return LinearFit(**times, per_net=factor * self.per_net)

    def predict(self, x: Array) -> Array:
        """Costs ``[nets]`` of the rows of :func:`features`, which may have other groups than precisions."""
        theta = np.empty(TERMS * len(self.scale) + 1)
        for i, name in enumerate(_NAMES):
            theta[i:-1:TERMS] = getattr(self, name)
        theta[-1] = self.per_net
        return np.asarray(x @ theta)

    def as_dict(self) -> dict[str, Any]:
        """Plain form for the table file."""
        return asdict(self)


_NAMES = ("scale", "per_part", "per_traffic", "per_gmac", "per_weight_mb")


def _terms(value: float, part: Part) -> tuple[float, float, float, float, float]:
    return value, 1.0, part.traffic / 1e6, part.macs / part.count / 1e9, part.weight_bytes / part.count / 1e6


def features(nets: Iterable[Sequence[tuple[Part, float]]]) -> Array:
    """One row a net, ``[nets, 5 · groups + 1]``: the terms of all parts summed by group, then 1."""
    rows = []
    for net in nets:
        row = np.zeros(TERMS * GROUPS + 1)
        for part, value in net:
            start = TERMS * PRECISIONS.index(part.precision)
            row[start : start + TERMS] += part.count * np.array(_terms(value, part))
        row[-1] = 1.0
        rows.append(row)
    return np.array(rows)


def plain_sums(x: Array) -> Array:
    """Sums of the parts' own costs ``[nets]`` of :func:`features` ``x``."""
    return np.asarray(x[:, 0:-1:TERMS].sum(axis=1))


def fit(
    x: Array, y: Array, sets: Sequence[tuple[int, ...]] = SETS, plain: Collection[int] = ()
) -> tuple[LinearFit, FitError, Array]:
    """Fit measured ``y [nets]`` on :func:`features` ``x``.

    A ridge regression for each set of terms, of the strength that predicts left-out nets best, and their average,
    weighted by that error to the power of -:data:`SHARPNESS`: chance chooses among sets that are about equally good.

    Args:
        x: rows of 5 terms a group, then 1; the groups need not be precisions, and the fit has as many as ``x``.
        sets: sets of terms that may be used, from the plainest.
        plain: groups that have scale and count alone: so small a share of a net that further terms would fit noise.

    Returns the fit, its leave-one-out error, and the leave-one-out predictions.
    """
    trials = [
        min((_held_out(x, y, terms, strength, plain) for strength in STRENGTHS), key=lambda trial: trial.mape)
        for terms in sets
    ]
    weights = _weights([trial.mape for trial in trials])
    theta, predicted = np.zeros(x.shape[1]), np.zeros(len(y))
    for trial, weight in zip(trials, weights, strict=True):
        columns = _columns(trial.terms, x.shape[1], plain)
        theta[columns] += weight * _solve(x[:, columns], y, trial.strength, _prior(columns, x.shape[1]))
        predicted += weight * trial.predicted
    by_term = {name: tuple(theta[i:-1:TERMS].tolist()) for i, name in enumerate(_NAMES)}
    return LinearFit(**by_term, per_net=float(theta[-1])), error(predicted, y), predicted


def _weights(errors: Sequence[float]) -> Array:
    """Of fits by their errors; the plainest alone where it is exact."""
    if errors[0] <= EXACT:
        return np.eye(len(errors))[0]
    known = np.maximum(errors, EXACT)
    weights = (known.min() / known) ** SHARPNESS
    return np.asarray(weights / weights.sum())


@dataclass(frozen=True)
class _Trial:
    terms: tuple[int, ...]
    strength: float
    predicted: Array  # every net by a fit that did not see it
    mape: float


def _held_out(x: Array, y: Array, terms: tuple[int, ...], strength: float, plain: Collection[int]) -> _Trial:
    columns = _columns(terms, x.shape[1], plain)
    used, prior = x[:, columns], _prior(columns, x.shape[1])
    keep = ~np.eye(len(y), dtype=bool)
    predicted = np.array([used[i] @ _solve(used[keep[i]], y[keep[i]], strength, prior) for i in range(len(y))])
    return _Trial(terms, strength, predicted, float(np.abs(predicted / y - 1).mean()))


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


def _columns(terms: tuple[int, ...], width: int, plain: Collection[int]) -> npt.NDArray[np.intp]:
    """Columns of the terms in all groups, and that of the net, of rows of ``width`` numbers."""
    used = [
        TERMS * group + term
        for group in range(width // TERMS) for term in terms if term in PLAIN or group not in plain
    ]  # fmt: skip
    return np.array([*used, width - 1])


def _prior(columns: npt.NDArray[np.intp], width: int) -> Array:
    """The plain sum: 1 for the own costs, 0 for all else."""
    return np.asarray((columns % TERMS == 0) & (columns < width - 1), dtype=np.float64)


def _solve(x: Array, y: Array, strength: float, prior: Array) -> Array:
    weighted = x / y[:, None]
    target = 1.0 - weighted @ prior
    # Columns in shares of a typical net, so that one strength suits milliseconds and bytes alike.
    size = np.maximum(np.abs(weighted).mean(axis=0), 1e-12)
    scaled = weighted / size
    gram = scaled.T @ scaled + strength * len(y) * np.eye(x.shape[1])
    return np.asarray(prior + np.linalg.solve(gram, scaled.T @ target) / size)
