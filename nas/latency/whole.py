"""Whole networks in a table: what they are made of, and the fit of its sums to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from nas.latency.estimator import part_value
from nas.latency.fit import PLAIN, SETS, LinearFit, error, features, fit, plain_sums
from nas.latency.residuals import corrections
from nas.latency.table import LatencyTable
from nas.parts import PRECISIONS, Part

Array = npt.NDArray[np.float64]
Identity = tuple[tuple[str, int], ...]
BOUNDARIES = (PRECISIONS.index("boundary"),)


def counts(parts: Iterable[Part]) -> dict[str, int]:
    """Key → how many of it a network executes."""
    found: dict[str, int] = {}
    for part in parts:
        found[part.key] = found.get(part.key, 0) + part.count
    return found


def sizes(part: Part, batch: int) -> dict[str, Any]:
    """Bytes of one copy: stored weights, and activations at their most."""
    return {"weight_bytes": part.weight_bytes // part.count, "peak_bytes": part.peak_bytes(batch)}


def identity(parts: Mapping[str, int]) -> Identity:
    """Equal for networks that cost the same."""
    return tuple(sorted(parts.items()))


def fitted(table: LatencyTable, parts: Mapping[str, Part]) -> LatencyTable:
    """``table`` with all of its costs fitted to its own ``nets``, each of which is predicted by a fit without it.

    Args:
        parts: every part that a net is made of, by key.
    """
    whole = [[replace(parts[key], count=count) for key, count in net.parts.items()] for net in table.nets]
    measured = {
        "latency_ms": np.array([net.measured_ms for net in table.nets]),
        "latency_p95_ms": np.array([net.p95_ms for net in table.nets]),
        "size_bytes": np.array([net.size_bytes for net in table.nets]),
    }
    fits, errors, held_out, rows = {}, {}, {}, {}
    for cost, y in measured.items():
        rows[cost] = features([[(part, part_value(table, part, cost)) for part in net] for net in whole])
        # Bytes have no borders and no arithmetic.
        sets = (PLAIN,) if cost == "size_bytes" else SETS
        fits[cost], errors[cost], held_out[cost] = fit(rows[cost], y, sets, BOUNDARIES)
    found, held_out["latency_ms"] = _blamed(table, fits["latency_ms"], whole, held_out["latency_ms"], parts)
    errors["latency_ms"] = error(held_out["latency_ms"], measured["latency_ms"])
    pairs = zip(table.nets, held_out["latency_ms"].tolist(), plain_sums(rows["latency_ms"]).tolist(), strict=True)
    nets = [replace(net, predicted_ms=predicted, plain_sum_ms=plain) for net, predicted, plain in pairs]
    entries = {key: replace(entry, correction=found.get(key, 0.0)) for key, entry in table.entries.items()}
    return replace(table, entries=entries, fits=fits, errors=errors, nets=nets)


def _blamed(
    table: LatencyTable, fit: LinearFit, nets: Sequence[Sequence[Part]], predicted: Array, parts: Mapping[str, Part]
) -> tuple[dict[str, float], Array]:
    """Corrections of parts by what the fit leaves of the nets, and each net's latency by the others."""
    shares = []
    for net in nets:
        own = {part.key: part.count * fit.part(part_value(table, part, "latency_ms"), part) for part in net}
        total = fit.per_net + sum(own.values())
        shares.append({key: value / total for key, value in own.items()})
    measured = np.array([net.measured_ms for net in table.nets])
    found = corrections(shares, measured / predicted - 1, {key: parts[key] for key in table.entries if key in parts})
    return found.by_key, predicted * (1 + found.held_out)
