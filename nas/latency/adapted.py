"""A new device's table out of other devices' tables and a few measurements of its own."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from nas import __version__
from nas.errors import TableError
from nas.latency.adapt import adapt_networks, adapt_parts, values
from nas.latency.fit import LinearFit
from nas.latency.measure import Timing
from nas.latency.table import Entry, LatencyTable, Net
from nas.latency.whole import fitted
from nas.parts import Part

FORM = '{"parts": {"part key": ms, …}, "networks": [{"parts": {"part key": 2, …}, "ms": 1.5}, …]}'
ENOUGH = 8  # networks, for a fit of their own
COSTS = ("latency_ms", "latency_p95_ms")


@dataclass(frozen=True)
class Few:
    """What was measured on the new device.

    Attributes:
        parts: part key → entry.
        nets: whole networks.
        device: facts, as a table has them.
    """

    parts: dict[str, Entry]
    nets: list[Net]
    device: dict[str, Any] = field(default_factory=dict)


def read_few(path: Path) -> Few:
    """A latency table, of which what was measured counts, or a short JSON of parts and networks.

    Raises:
        TableError: it is neither.
    """
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as problem:
        raise TableError(f"{path} cannot be read: {problem}.", expected=f"a table, or {FORM}") from problem
    if isinstance(raw, dict) and "entries" in raw:
        table = LatencyTable.load(path)
        return Few({key: e for key, e in table.entries.items() if e.measured}, table.nets, table.device)
    try:
        parts = {key: _entry(float(ms)) for key, ms in raw.get("parts", {}).items()}
        nets = [
            Net({key: int(n) for key, n in net["parts"].items()}, float(net["ms"]), float(net["ms"]), 0.0, 0.0, 0.0)
            for net in raw.get("networks", [])
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as problem:
        raise TableError(f"{path} lacks or garbles a field: {problem!r}.", expected=FORM) from problem
    return Few(parts, nets)


def _entry(ms: float) -> Entry:
    return Entry(Timing(ms, ms, ms, 1, 0.0), ms)


def adapted_table(
    known: Sequence[LatencyTable], few: Few, name: str, parts: Mapping[str, Part] | None = None
) -> LatencyTable:
    """Predict every part that all ``known`` tables have on the device of which a ``few`` parts or networks are known.

    Where parts were measured, they are what is learnt from, and the known devices' corrections of sums are carried over
    or, where ``parts`` and eight networks are at hand, fitted anew. Where only networks were measured, parts are
    predicted such that their sums are networks.

    Args:
        parts: the space's, by key.

    Raises:
        TableError: nothing that the known tables share was measured, or too little of it.
    """
    columns = [values(table) for table in known]
    if len(few.parts) >= 2:
        found = adapt_parts(columns, {key: entry.value for key, entry in few.parts.items()})
        ratio = [float(np.median([found[key][0] / column[key] for key in found])) for column in columns]
        fits = {cost: _carried([table.fits.get(cost, LinearFit()) for table in known], ratio) for cost in COSTS}
    else:
        found = adapt_networks(columns, [(net.parts, net.measured_ms) for net in few.nets])
        fits = {cost: LinearFit() for cost in COSTS}
    if "size_bytes" in known[0].fits:
        fits["size_bytes"] = known[0].fits["size_bytes"]  # a file is as large everywhere
    entries = {key: few.parts.get(key) or _guessed(known, key, *guess) for key, guess in found.items()}
    table = LatencyTable(
        space=known[0].space,
        device={**few.device, "name": name},
        entries=entries,
        fits=fits,
        errors={},
        noise=0.0,
        nets=[],
        protocol={
            "method": "adapted from other devices", "known": [other.name for other in known],
            "measured_parts": len(few.parts), "measured_networks": len(few.nets),
        },
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        nas_version=__version__,
        interpolation={"measured": len(few.parts), "interpolated": len(entries) - len(few.parts)},
        energy="not measured: adapted from other devices",
        origin={"source": f"adapted from {', '.join(other.name for other in known)}", "licence": "theirs"},
    )  # fmt: skip
    nets = [net for net in few.nets if set(net.parts) <= set(entries) and net.size_bytes]
    if parts is None or len(few.parts) < 2 or len(nets) < ENOUGH:
        return table
    return fitted(replace(table, nets=nets), parts)


def _guessed(known: Sequence[LatencyTable], key: str, value: float, uncertainty: float) -> Entry:
    """With the spread of calls that the part has elsewhere."""
    timings = [(table.entries[key].timing, table.entries[key].value) for table in known]
    p50, p95, mean = (
        value * float(np.median([getattr(timing, what) / own for timing, own in timings]))
        for what in ("p50", "p95", "mean")
    )
    return Entry(Timing(p50, p95, mean, 0, 0.0), value, measured=False, uncertainty=min(uncertainty, 10.0))


def _carried(fits: Sequence[LinearFit], ratio: Sequence[float]) -> LinearFit:
    """The known devices' corrections, at the new device's pace: scales as they are, times by how long parts take."""
    scaled = [replace(fit.scaled(r), scale=fit.scale) for fit, r in zip(fits, ratio, strict=True)]
    mean = {
        name: tuple(np.mean([getattr(fit, name) for fit in scaled], axis=0).tolist())
        for name in scaled[0].as_dict() if name != "per_net"
    }  # fmt: skip
    return LinearFit(**mean, per_net=float(np.mean([fit.per_net for fit in scaled])))
