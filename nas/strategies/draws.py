"""Random numbers by number: what proposal *n* draws depends on the seed and on *n*, and on nothing else.

A generator per proposal would cost more than a proposal, so the numbers come from a counter-based generator
(Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3"): a mixing function of (key, counter), computed
for a whole batch in one array operation. The function is the finaliser of SplitMix64 (Steele, Lea & Flood 2014).
"""

from __future__ import annotations

import copy

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX1, _MIX2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31, _S11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)


class Draws:
    """The random numbers of the proposals ``index [n]``; successive calls give fresh columns.

    Args:
        seed: of the strategy, any non-negative integer.
        index: numbers of the proposals.
        attempt: which try: a proposal that repeats one still under way is drawn again under its own number.
    """

    def __init__(self, seed: int, index: Ints, attempt: int = 0) -> None:
        self.seed, self.index, self.attempt = seed, index, attempt
        start = np.random.SeedSequence((seed, attempt)).generate_state(1, np.uint64)
        self._keys = _mix(_mix(index.astype(np.uint64) * _STEP + start) + _STEP)
        self._used = 0

    def __len__(self) -> int:
        return len(self.index)

    def rows(self, which: Ints) -> Draws:
        """The same proposals' next numbers, for some of them, by position; it and this one go on independently."""
        some = copy.copy(self)
        some.index, some._keys = self.index[which], self._keys[which]
        return some

    def uniform(self, columns: int) -> Array:
        """``[n, columns]`` in [0, 1)."""
        counters = np.arange(self._used + 1, self._used + columns + 1, dtype=np.uint64) * _STEP
        self._used += columns
        return np.asarray((_mix(self._keys[:, None] + counters) >> _S11) * 2.0**-53)

    def integers(self, high: npt.ArrayLike) -> Ints:
        """``[n, len(high)]``, column j uniform over ``0..high[j]−1``; a scalar gives ``[n]``."""
        bounds = np.atleast_1d(np.asarray(high, dtype=np.int64))
        drawn = (self.uniform(len(bounds)) * bounds).astype(np.int64)
        return drawn[:, 0] if np.ndim(high) == 0 else drawn

    def generator(self) -> np.random.Generator:
        """An ordinary generator for the batch as a whole: a function of the seed, its first number and its length."""
        first = int(self.index[0]) if len(self.index) else 0
        return np.random.default_rng((self.seed, first, len(self.index), self.attempt))


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> _S30)) * _MIX1
    x = (x ^ (x >> _S27)) * _MIX2
    return np.asarray(x ^ (x >> _S31))
