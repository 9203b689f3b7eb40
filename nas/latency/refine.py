"""The closed loop: what a search measured in the end corrects the table that it began with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from nas.latency.estimator import contribution
from nas.latency.fit import FitError, LinearFit, error
from nas.latency.measure import Timing
from nas.latency.table import Entry, LatencyTable, Net
from nas.latency.whole import counts, fitted, identity
from nas.parts import Part

Array = npt.NDArray[np.float64]
FINALIST = "finalist"
ONE_SIDED = 1.65  # standard errors of the mean that chance exceeds once in twenty
KEPT = 30  # finalists of earlier searches that go on to correct a table, the latest


@dataclass(frozen=True)
class Measured:
    """A whole network that was measured after the table was made.

    Attributes:
        name: of a finalist.
        parts: what it executes.
        timing: as measured.
        size_bytes: of its file.
    """

    name: str
    parts: tuple[Part, ...]
    timing: Timing
    size_bytes: float


@dataclass(frozen=True)
class Refinement:
    """A table before and after it has seen finalists.

    Attributes:
        table: with the finalists' own parts measured, and the fit corrected.
        before, after: errors on the finalists; after, each is predicted by a fit that did not see it.
        noise: relative difference between two halves of the finalists' rounds, mean.
        claim: mean error that the table said it had.
        rows: name, ``measured_ms``, ``before_ms``, ``after_ms`` of every finalist.
        newly_measured: how many of their parts had been interpolated until now.
    """

    table: LatencyTable
    before: FitError
    after: FitError
    noise: float
    claim: float
    rows: tuple[dict[str, Any], ...]
    newly_measured: int

    @property
    def exceeded(self) -> bool:
        """Whether the error on the finalists is more than claim, noise and the chance of so few together explain."""
        wrong = [abs(row["before_ms"] / row["measured_ms"] - 1) for row in self.rows]
        chance = ONE_SIDED * float(np.std(wrong)) / len(wrong) ** 0.5
        return self.before.mape - chance > self.claim + self.noise

    def as_dict(self) -> dict[str, Any]:
        """Plain form for the summary."""
        return {
            "before": asdict(self.before), "after": asdict(self.after), "noise": self.noise, "claim": self.claim,
            "exceeded": self.exceeded, "rows": list(self.rows), "newly_measured": self.newly_measured,
            "sha256": self.table.sha256,
        }  # fmt: skip


def refined(
    table: LatencyTable,
    parts: Mapping[str, Part],
    finalists: Sequence[Measured],
    entries: Mapping[str, Entry],
    yardstick_ms: float,
) -> Refinement:
    """Correct ``table`` by what was measured end to end.

    Args:
        parts: all parts of the space, by key.
        finalists: at least one.
        entries: parts that were interpolated and have now been measured, beside the finalists.
        yardstick_ms: the yardstick of that session. The table's own yardstick may have run faster or slower; times
            enter the fit at the table's speed, and are reported as they were measured.
    """
    measured = np.array([net.timing.p50 for net in finalists])
    before = _predicted(table, [net.parts for net in finalists], "latency_ms")
    speed = float(table.protocol.get("yardstick_ms", yardstick_ms)) / yardstick_ms
    at_table_speed = {key: _scaled(entry, speed) for key, entry in entries.items()}
    improved = replace(table, entries={**table.entries, **at_table_speed})
    new = [
        Net(counts(net.parts), speed * net.timing.p50, speed * net.timing.p95, net.size_bytes, 0.0, 0.0, FINALIST)
        for net in finalists
    ]
    improved = fitted(replace(improved, nets=_joined(table.nets, new, parts)), parts)
    held_out = {identity(net.parts): net.predicted_ms for net in improved.nets}
    after = np.array([held_out[identity(net.parts)] for net in new]) / speed
    rows = [
        {"name": net.name, "measured_ms": net.timing.p50, "before_ms": float(b), "after_ms": float(a)}
        for net, b, a in zip(finalists, before, after, strict=True)
    ]
    claim = table.errors["latency_ms"].mape if "latency_ms" in table.errors else 0.0
    noise = float(np.mean([net.timing.noise for net in finalists]))
    return Refinement(
        improved, error(before, measured), error(after, measured), noise, claim, tuple(rows), len(entries)
    )


def _predicted(table: LatencyTable, nets: Sequence[Sequence[Part]], cost: str) -> Array:
    fit = table.fits.get(cost, LinearFit())
    return np.array([fit.per_net + sum(p.count * contribution(table, fit, p, cost) for p in net) for net in nets])


def _scaled(entry: Entry, factor: float) -> Entry:
    t = entry.timing
    return replace(
        entry, value=factor * entry.value,
        timing=Timing(factor * t.p50, factor * t.p95, factor * t.mean, t.n, t.noise),
    )  # fmt: skip


def _joined(old: Sequence[Net], new: Sequence[Net], parts: Mapping[str, Part]) -> list[Net]:
    """Calibration nets, and the latest finalists; a net that was measured again is there once."""
    again = {identity(net.parts) for net in new}
    known = [net for net in old if identity(net.parts) not in again and set(net.parts) <= set(parts) and net.parts]
    earlier = [net for net in known if net.source == FINALIST]
    return [net for net in known if net.source != FINALIST] + [*earlier, *new][-max(KEPT, len(new)) :]
