"""Published latency tables of other projects, read into ours: one file a format."""

from __future__ import annotations

from nas.latency.importers import ofa, proxyless
from nas.latency.importers.base import Format, importers, price

__all__ = ["Format", "importers", "ofa", "price", "proxyless"]
