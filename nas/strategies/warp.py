"""Qualities on a scale that a Gaussian process can model."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
CREST = 0.1


class Warp:
    """``z ∝ −log((b − q)/s + ε)``: what separates the good is stretched, what separates the bad is squeezed.

    Qualities of networks have a long lower tail (those that hardly train) and a crowd near the best, b; the scale s
    is the median distance from the best, ε = 0.1. Standardised to mean 0 and spread 1.

    Args:
        quality: ``[n]``, finite.
    """

    def __init__(self, quality: Array) -> None:
        self.best = float(quality.max())
        gaps = self.best - quality
        # Where most equal the best, any other scale is better than none.
        self.scale = float(np.median(gaps)) or float(gaps.mean()) or 1.0
        self.centre, self.spread = 0.0, 1.0
        z = self(quality)
        self.centre, self.spread = float(z.mean()), float(z.std()) or 1.0

    def __call__(self, quality: Array) -> Array:
        """Warped qualities ``[n]``; beyond the best the scale goes on as a straight line."""
        gap = (self.best - quality) / self.scale
        bent = -np.log(np.maximum(gap, 0.0) + CREST) - np.minimum(gap, 0.0) / CREST
        return np.asarray((bent - self.centre) / self.spread)

    def inverse(self, z: Array) -> Array:
        """Qualities of warped ones ``[n]``."""
        bent = z * self.spread + self.centre
        crest = -np.log(CREST)
        gap = np.where(bent < crest, np.exp(-np.clip(bent, -700.0, crest)) - CREST, (crest - bent) * CREST)
        return np.asarray(self.best - self.scale * gap)
