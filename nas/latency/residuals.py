"""What a linear correction leaves of whole networks, blamed on the parts that they have in common.

Networks of one resolution are mostly off in one direction: some of their parts do other than alone, by more or less
than parts of other shapes. A Gaussian process says which: the residual of a network is the sum of its parts' own
relative corrections, weighted by their shares of its time, and corrections are a priori small, independent, and in part
common to parts of one precision on maps of one size. In closed form (Rasmussen and Williams 2006, eq. 2.23 and 5.12).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nas.parts import Part

Array = npt.NDArray[np.float64]
SPREADS = (0.01, 0.03, 0.1, 0.3)  # of a part's own relative correction, one standard deviation
NOISES = (0.005, 0.01, 0.02)  # of a network
COMMON = 0.5  # variance that parts of one shape have in common, as a share of their own
WORTH = 0.97  # of the error on left-out networks: corrections that help less are chance


@dataclass(frozen=True)
class Corrections:
    """Relative corrections of parts.

    Attributes:
        by_key: part key → what its contribution is multiplied with, less 1; empty where none helps.
        held_out: relative residual of each network as the others predict it, ``[nets]``.
    """

    by_key: dict[str, float]
    held_out: Array


def corrections(
    nets: Sequence[Mapping[str, float]], residual: Array, parts: Mapping[str, Part]
) -> Corrections:
    """Blame ``residual [nets]``, measured over predicted less 1, on parts.

    Args:
        nets: of each network, part key → share of the predicted time.
        parts: those that get a correction: of the nets, and others of the same shapes.
    """
    keys = list(parts)
    shapes = [(part.precision, part.shape[1:]) for part in parts.values()]
    place = {shape: i for i, shape in enumerate(dict.fromkeys(shapes))}
    group = np.array([place[shape] for shape in shapes])
    row = {key: i for i, key in enumerate(keys)}
    shares = np.zeros((len(nets), len(keys)))
    for i, net in enumerate(nets):
        for key, share in net.items():
            shares[i, row[key]] += share
    together = np.zeros((len(nets), len(place)))
    np.add.at(together.T, group, shares.T)
    kernel = shares @ shares.T + COMMON * together @ together.T
    best = min((_tried(kernel, residual, s, n) for s in SPREADS for n in NOISES), key=lambda trial: trial.error)
    if best.error >= WORTH * float(np.abs(residual).mean()):
        return Corrections({}, np.zeros_like(residual))
    own, common = best.alpha @ shares, best.alpha @ together
    found = best.spread**2 * (own + COMMON * common[group])
    return Corrections(dict(zip(keys, found.tolist(), strict=True)), best.held_out)


@dataclass(frozen=True)
class _Trial:
    spread: float
    alpha: Array
    held_out: Array
    error: float


def _tried(kernel: Array, residual: Array, spread: float, noise: float) -> _Trial:
    inverse = np.linalg.inv(spread**2 * kernel + noise**2 * np.eye(len(residual)))
    alpha = inverse @ residual
    held_out = residual - alpha / np.diag(inverse)
    return _Trial(spread, alpha, held_out, float(np.abs(residual - held_out).mean()))
