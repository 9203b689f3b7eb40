"""What the known devices teach about a device nobody has measured yet: the basis and the hyperparameters of its prior.

A cost column ``z`` (in units of its median) is modelled linearly, because a network's time is the sum of its parts':

    z = b + s·m(x) + Σ_d u_d (S_d(x) − m(x)) + Σ_d r_d R_d(x) + genes(x) + ε,    ε ~ N(0, (σ m(x)^γ)²)

``S_d`` is known device d without its noise (a regression on the genes where they are given, else the column itself),
``R_d = z_d − S_d`` its rest, ``m`` the mean of the S_d. ``genes`` is what a known device may not have shown: a cost
per gene and place, a cost per symbol wherever it stands, and a mix of the known devices that differs from symbol to
symbol. Every weight is N(0, θ_block), but s is N(1, θ_mean); integrating them out leaves a Gaussian process whose
kernel comes from the known devices (Rasmussen and Williams 2006, eq. 2.12).

Which θ, σ, γ a new device has is learnt by treating every known device as a new one (:mod:`nas.latency.evidence`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from nas.errors import TableError
from nas.latency.evidence import Settings, evidence, maximise

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

TASKS = 3  # draws of rows per known device
ROWS = 16  # in a draw, at most: evidence is cubic in it
CELLS = 8  # rows that a gene pair's cost wants, at least, to be estimated
SMALLEST = 1e-3  # of a median network; below, a device's time is its clock's


class Devices:
    """The known devices, cleaned and split into what genes explain and a rest.

    Args:
        known: costs ``[n, d]`` in any positive unit; NaN, infinite and ≤ 0 mean unknown.
        genomes: integers ``[n, places]``, the same symbol for the same operation everywhere; or none.
        fixed: how often each row bears a new device's fixed cost b, ``[n]``; 1 without it.

    Attributes:
        usable: columns that tell networks apart, ``[d]``.
        mean: the mean profile in medians, ``[n]``, positive.
        seen: rows that some usable device or the genes say something about, ``[n]``.

    Raises:
        TableError: the arrays have wrong shapes or no column is usable.
    """

    def __init__(
        self, known: npt.ArrayLike, genomes: npt.ArrayLike | None = None, fixed: npt.ArrayLike | None = None
    ) -> None:
        values = np.array(known, dtype=np.float64)
        if values.ndim != 2 or values.shape[0] < 2 or values.shape[1] < 1:
            raise TableError(
                f"The known devices' costs have shape {values.shape}.",
                expected="[n, d]: at least two rows (networks or parts) and one column per device",
            )
        values = np.where(np.isfinite(values) & (values > 0), values, np.nan)
        self.usable = np.array([_varies(column) for column in values.T])
        if not self.usable.any():
            raise TableError(
                "No known device tells the rows apart: every column is constant or unknown.",
                expected="at least one device with two different finite, positive costs",
            )
        scaled = values[:, self.usable] / np.nanmedian(values[:, self.usable], axis=0)
        self.seen = np.asarray(np.isfinite(scaled).any(axis=1))
        self.genes: Genes | None = None
        if genomes is None:
            self._smooth = _filled(scaled)
            self._rest = np.zeros_like(self._smooth)
        else:
            self.genes = Genes.of(genomes, len(values))
            self._smooth, self._costs = self.genes.explain(scaled)
            self._rest = np.nan_to_num(scaled - self._smooth)
            self.seen[:] = True
        self._scaled = scaled
        self._fixed = np.ones(len(values)) if fixed is None else np.asarray(fixed, dtype=np.float64)
        if self._fixed.shape != (len(values),):
            raise TableError(f"Fixed costs have shape {self._fixed.shape}.", expected=f"one per row: [{len(values)}]")
        self.mean = self._profile(self._all)

    @property
    def _all(self) -> Ints:
        return np.arange(self._smooth.shape[1])

    def _profile(self, columns: Ints) -> Array:
        return np.maximum(self._smooth[:, columns].mean(axis=1), SMALLEST)

    def basis(self, rows: Ints | slice = slice(None), columns: Ints | None = None) -> list[Array]:
        """The blocks of the basis, one array ``[rows, its weights]`` each, of all devices or of some columns."""
        columns = self._all if columns is None else columns
        smooth = self._smooth[rows][:, columns]
        mean, share = smooth.mean(axis=1, keepdims=True), len(columns) ** -0.5
        found = [self._fixed[rows][:, None], mean, (smooth - mean) * share, self._rest[rows][:, columns] * share]
        if self.genes is not None:
            found += self.genes.basis(rows, self._costs[:, columns])
        return found

    @cached_property
    def _twins(self) -> npt.NDArray[np.bool_]:
        """Pairs of columns that are one device: it would teach that every new device has a twin."""
        return np.asarray(np.corrcoef(_filled(self._scaled), rowvar=False).reshape(2 * (len(self._all),)) > 0.999)

    def learn(self, samples: int, settings: Settings) -> Array:
        """Probability of each setting, ``[H]``, from every known device in turn as the new one."""
        found = []
        for device in self._all:
            others = np.flatnonzero(~self._twins[device])
            others = others[others != device]
            valid = np.flatnonzero(np.isfinite(self._scaled[:, device]))
            size = min(samples, ROWS, len(valid))
            if not len(others) or size < 2:
                continue
            rng = np.random.default_rng(int(device))
            profile = self._profile(others)
            logs = np.zeros(len(settings.sigma))
            for _ in range(TASKS):
                rows = rng.choice(valid, size, replace=False)
                values = self._scaled[rows, device] / scale(self._scaled[rows, device], profile[rows])
                grams = [block @ block.T for block in self.basis(rows, others)]
                logs += evidence(grams, values - profile[rows], profile[rows], settings).log / TASKS
            found.append(logs)
        return maximise(np.array(found)) if found else np.full(len(settings.sigma), 1 / len(settings.sigma))


@dataclass(frozen=True)
class Genes:
    """Genomes as indicators of (place, symbol).

    Attributes:
        flags: centred indicators, ``[n, f]``.
        place, symbol: of each indicator, ``[f]``.
        counts: centred number of each symbol, ``[n, symbols]``.
        pairs: centred indicators of two places' symbols, ``[n, g]``; none where there are too few rows for them.
    """

    flags: Array
    place: Ints
    symbol: Ints
    counts: Array
    pairs: Array

    @classmethod
    def of(cls, genomes: npt.ArrayLike, rows: int) -> Genes:
        """Read genomes; raises TableError where they are no ``[rows, places]`` integers."""
        codes = np.asarray(genomes)
        if codes.ndim != 2 or codes.shape[0] != rows or codes.shape[1] < 1 or codes.dtype.kind not in "iu":
            raise TableError(
                f"Genomes have shape {codes.shape} and type {codes.dtype}.", expected=f"integers [{rows}, places]"
            )
        pairs = [(place, int(symbol)) for place in range(codes.shape[1]) for symbol in np.unique(codes[:, place])]
        place, symbol = (np.array(column, dtype=np.int64) for column in zip(*pairs, strict=True))
        flags = (codes[:, place] == symbol).astype(np.float64)
        counts = np.column_stack([flags[:, symbol == value].sum(axis=1) for value in np.unique(symbol)])
        first, second = np.nonzero(place[:, None] < place)
        if len(first) * CELLS > rows:
            first = second = first[:0]
        both = flags[:, first] * flags[:, second]
        return cls(_centred(flags), place, symbol, _centred(counts), _centred(both))

    def explain(self, columns: Array) -> tuple[Array, Array]:
        """Columns without their noise ``[n, d]``, and cost per indicator ``[f, d]``; NaN are filled."""
        smooth, _ = _ridge(np.hstack([self.flags, self.pairs]), columns)
        return smooth, _ridge(self.flags, columns)[1]

    def basis(self, rows: Ints | slice, costs: Array) -> list[Array]:
        """The three blocks that are of genes, for devices whose costs per indicator are ``costs [f, d]``."""
        flags, size = self.flags[rows], (costs**2).mean(axis=1)
        # A place that matters on the known devices may matter otherwise on the new one; one that never did, will not.
        by_place = np.bincount(self.place, size) / np.bincount(self.place)
        mixes = [flags[:, self.symbol == value] @ costs[self.symbol == value] for value in np.unique(self.symbol)]
        return [
            flags * np.sqrt(by_place[self.place]),
            self.counts[rows] * np.sqrt(size.mean()),
            np.hstack(mixes) * costs.shape[1] ** -0.5,
        ]


def scale(measured: Array, mean: Array) -> float:
    """What a median network takes, judged by networks whose mean profile is ``mean``; robust to an outlier."""
    return float(np.median(measured / mean))


def _varies(column: Array) -> bool:
    finite = column[np.isfinite(column)]
    return len(finite) > 1 and bool(np.ptp(finite) > 1e-9 * np.abs(finite).max())


def _centred(matrix: Array) -> Array:
    return matrix - matrix.mean(axis=0) if matrix.size else matrix


def _filled(columns: Array) -> Array:
    """NaN filled with what the other devices take on average, or with a median network."""
    known = np.isfinite(columns)
    count = known.sum(axis=1)
    mean = np.where(count > 0, np.where(known, columns, 0.0).sum(axis=1) / np.maximum(count, 1), 1.0)
    return np.where(known, columns, mean[:, None])


def _ridge(flags: Array, columns: Array) -> tuple[Array, Array]:
    """Fitted columns and coefficients; a ridge of one row, since indicators of a place add up to nothing."""
    costs = np.empty((flags.shape[1], columns.shape[1]))
    known = np.asarray(np.isfinite(columns))
    level = np.array([column[mask].mean() for column, mask in zip(columns.T, known.T, strict=True)])
    centred = np.where(known, columns - level, 0.0)
    whole = np.asarray(known.all(axis=0))
    for group in [np.flatnonzero(whole), *np.flatnonzero(~whole)[:, None]]:  # columns with the same rows at once
        if len(group):
            seen = flags if whole[group[0]] else flags[known[:, group[0]]]
            gram = seen.T @ seen + np.eye(flags.shape[1])
            costs[:, group] = np.linalg.solve(gram, flags.T @ centred[:, group])
    return level + flags @ costs, costs
