"""Parts that are not measured: which ones to measure instead, and a Gaussian process between them.

Parts whose keys differ in numbers alone are a *family*: the same operators on other channels, sides, kernels. Within
a family the logarithm of the time is smooth in the logarithms of these numbers, of the work and of the traffic, but
for one thing: runtimes work on blocks of channels, so how many times two divides a number, and the number rounded up
to blocks, are coordinates too. All of it is read off a part's key, so anybody's own operators are interpolated alike.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nas.parts import Part

Array = npt.NDArray[np.float64]
BLOCKS = (16, 64)  # channels that vectors and matrix tiles hold
FEWEST = 8  # measured parts of a family, before it is interpolated
FOLDS = 5
TUNED_ON = 300  # parts; kernels are tuned on no more of them, which is what takes time
BEYOND = 0.5  # how far, in logarithms, a guess may lie outside what was measured: corners are measured first
NUMBER = re.compile(r"\d+")


def family(key: str) -> str:
    """What a key is without its numbers (those of the precision are no sizes)."""
    precision, _, rest = key.partition(" ")
    return f"{precision} {NUMBER.sub('#', rest)}"


def families(keys: Sequence[str]) -> dict[str, list[str]]:
    """Keys by family, in the order in which they come."""
    found: dict[str, list[str]] = {}
    for key in keys:
        found.setdefault(family(key), []).append(key)
    return found


def coordinates(parts: Sequence[Part]) -> Array:
    """Where the parts of one family lie, ``[parts, coordinates]``: standardised, constant ones left out."""
    numbers = np.array([[float(n) for n in NUMBER.findall(part.key.partition(" ")[2])] for part in parts])
    numbers = np.maximum(numbers.reshape(len(parts), -1), 1.0)
    divisor = np.minimum(np.gcd(numbers.astype(np.int64), BLOCKS[-1]), BLOCKS[-1])
    padded = [np.ceil(numbers / block) * block for block in BLOCKS]
    work = np.array([[part.macs / part.count + 1, part.params / part.count + 1, part.traffic] for part in parts])
    x = np.log(np.concatenate([numbers, divisor, *padded, work], axis=1))
    x = np.unique(x[:, x.std(axis=0) > 1e-9].round(9), axis=1)  # and columns that say the same, once
    return np.asarray((x - x.mean(axis=0)) / np.maximum(x.std(axis=0), 1e-9))


def grid(parts: Mapping[str, Part], count: int) -> list[str]:
    """Which ``count`` keys to measure so that the others lie close to them.

    Families get shares by their size, small ones are measured whole; within one, the next part is always the one that
    is farthest from all that were taken (Gonzalez 1985), so corners come first. May exceed ``count`` by small families.
    """
    if count >= len(parts):
        return list(parts)
    share = count / len(parts)
    chosen: list[str] = []
    for keys in families(list(parts)).values():
        wanted = min(len(keys), max(FEWEST, round(share * len(keys))))
        chosen += keys if wanted == len(keys) else _spread([parts[key] for key in keys], keys, wanted)
    return chosen


def _spread(parts: Sequence[Part], keys: Sequence[str], count: int) -> list[str]:
    x = coordinates(parts)
    taken = [int(np.argmin((x**2).sum(axis=1)))]
    distance = np.full(len(x), np.inf)
    while len(taken) < count:
        distance = np.minimum(distance, ((x - x[taken[-1]]) ** 2).sum(axis=1))
        taken.append(int(distance.argmax()))
    return [keys[i] for i in taken]


@dataclass(frozen=True)
class Guess:
    """A time that was not measured: ms, and its relative standard deviation."""

    value: float
    uncertainty: float


@dataclass(frozen=True)
class Validation:
    """How well parts are predicted from the others: every measured part of the interpolated families, held out once.

    Attributes:
        parts: how many were held out.
        mape, within_5, within_10: relative errors, shares 0..1.
    """

    parts: int
    mape: float
    within_5: float
    within_10: float


def interpolate(
    parts: Mapping[str, Part], measured: Mapping[str, float]
) -> tuple[dict[str, Guess], Validation | None]:
    """Times of those of ``parts`` that are not ``measured`` (ms), and how far such guesses can be trusted.

    The uncertainty of a family is stretched to what its held-out parts show. A family of which too little is measured
    is guessed from all parts together, by their work and traffic.

    Raises:
        ValueError: nothing is measured.
    """
    if not measured:
        raise ValueError("nothing is measured")
    guesses: dict[str, Guess] = {}
    errors: list[Array] = []
    for keys in families(list(parts)).values():
        known = [key for key in keys if key in measured]
        wanted = [key for key in keys if key not in measured]
        if not wanted:
            continue
        if len(known) < min(FEWEST, 3):
            guesses |= _roughly(parts, measured, wanted)
            continue
        x = coordinates([parts[key] for key in (*known, *wanted)])
        y = np.log([measured[key] for key in known])
        model = _Process.tuned(x[: len(known)], y)
        held_out, deviation = model.held_out()
        errors.append(np.abs(np.exp(held_out - y) - 1))
        stretch = max(1.0, float(np.sqrt(np.mean(((held_out - y) / deviation) ** 2))))
        mean, deviation = model.predict(x[len(known) :])
        mean = np.clip(mean, y.min() - BEYOND, y.max() + BEYOND)
        guesses |= {
            key: Guess(float(np.exp(m)), float(stretch * d)) for key, m, d in zip(wanted, mean, deviation, strict=True)
        }
    if not errors:
        return guesses, None
    error = np.concatenate(errors)
    return guesses, Validation(
        len(error), float(error.mean()), float((error <= 0.05).mean()), float((error <= 0.1).mean())
    )


class _Process:
    """A linear trend and, on what it leaves, a Gaussian process with a Matérn-5/2 kernel (one length a coordinate)."""

    def __init__(self, x: Array, y: Array, kernel: object) -> None:
        self.x, self.y, self.kernel = x, y, kernel
        self._trend = _ridge(x, y)
        residual = y - _line(x) @ self._trend
        self._size = max(float(residual.std()), 1e-4)
        from sklearn.gaussian_process import GaussianProcessRegressor

        self._model = GaussianProcessRegressor(kernel, optimizer=None).fit(x, residual / self._size)

    @classmethod
    def tuned(cls, x: Array, y: Array) -> _Process:
        """With the kernel of highest marginal likelihood."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

        kernel = ConstantKernel(1.0, (1e-2, 1e2)) * Matern(np.full(x.shape[1], 2.0), (0.3, 1e3), nu=2.5)
        some = np.linspace(0, len(x) - 1, min(len(x), TUNED_ON)).astype(int)
        residual = y - _line(x) @ _ridge(x, y)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a length at its bound is a coordinate without a say
            model = GaussianProcessRegressor(kernel + WhiteKernel(1e-3, (1e-5, 1e-1))).fit(
                x[some], residual[some] / max(float(residual.std()), 1e-4)
            )
        return cls(x, y, model.kernel_)

    def predict(self, x: Array) -> tuple[Array, Array]:
        """Mean and standard deviation of the logarithm."""
        mean, deviation = self._model.predict(x, return_std=True)
        return _line(x) @ self._trend + mean * self._size, np.maximum(deviation * self._size, 1e-3)

    def held_out(self) -> tuple[Array, Array]:
        """The same of every part by the others, a fold at a time."""
        mean, deviation = np.empty_like(self.y), np.empty_like(self.y)
        folds = np.arange(len(self.y)) % min(FOLDS, len(self.y))
        for fold in range(folds.max() + 1):
            out = folds == fold
            mean[out], deviation[out] = _Process(self.x[~out], self.y[~out], self.kernel).predict(self.x[out])
        return mean, deviation


def _line(x: Array) -> Array:
    return np.concatenate([np.ones((len(x), 1)), x], axis=1)


def _ridge(x: Array, y: Array) -> Array:
    design = _line(x)
    penalty = 1e-3 * np.eye(design.shape[1])
    penalty[0, 0] = 0
    return np.asarray(np.linalg.solve(design.T @ design + penalty, design.T @ y))


def _roughly(parts: Mapping[str, Part], measured: Mapping[str, float], wanted: Sequence[str]) -> dict[str, Guess]:
    known = [key for key in parts if key in measured]
    work = np.log(
        [[parts[k].macs / parts[k].count + 1, parts[k].traffic, parts[k].precision == "int8" or 0.5]
         for k in (*known, *wanted)]
    )  # fmt: skip
    y = np.log([measured[key] for key in known])
    trend = _ridge(work[: len(known)], y)
    deviation = max(0.3, float((y - _line(work[: len(known)]) @ trend).std()))
    return {
        key: Guess(float(np.exp(m)), deviation)
        for key, m in zip(wanted, _line(work[len(known) :]) @ trend, strict=True)
    }
