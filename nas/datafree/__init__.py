"""Distillation without the data that the teacher learnt from: one source of synthetic inputs per file."""

from nas.datafree.base import Source, sources
from nas.datafree.data import Data
from nas.datafree.distil import Recipe, distil_without_data, synthesise
from nas.datafree.gan import Gan
from nas.datafree.noise import Noise
from nas.datafree.vae import Vae

__all__ = ["Data", "Gan", "Noise", "Recipe", "Source", "Vae", "distil_without_data", "sources", "synthesise"]
