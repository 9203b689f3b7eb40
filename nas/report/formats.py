"""Numbers as text: one format per kind of number, an en dash where it is unknown."""

from __future__ import annotations

UNKNOWN = "–"
COSTS = {"latency_ms": "median latency", "latency_p95_ms": "p95 latency", "size_bytes": "size"}


def text(value: object) -> str:
    """Anything that is not a number to be formatted: an index, a seed, a status."""
    return UNKNOWN if value is None else str(value)


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction as a percentage: 0.985 is ``98.5 %``."""
    return UNKNOWN if value is None else f"{100 * value:.{digits}f} %"


def change(value: float | None) -> str:
    """A relative difference with its sign: ``+12.0 %``."""
    return UNKNOWN if value is None else f"{100 * value:+.1f} %".replace("-", "−")


def points(value: float) -> str:
    """A difference of two fractions in percentage points, with its sign."""
    return f"{100 * value:+.1f} points".replace("-", "−")


def milliseconds(value: float | None) -> str:
    """Three significant digits: what a latency measurement can carry."""
    return UNKNOWN if value is None else _three(value)


def _three(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


def kib(value: float | None) -> str:
    """Bytes as KiB with thousands separated."""
    if value is None:
        return UNKNOWN
    return f"{value / 1024:,.0f}" if value >= 10240 else f"{value / 1024:,.1f}"


def count(value: float | None) -> str:
    """A whole number, short from a million on: ``12.3 M``."""
    if value is None:
        return UNKNOWN
    for size, letter in ((1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{_three(value / size)} {letter}"
    return f"{value:,.0f}"


def times(value: float | None) -> str:
    """A factor: ``3.7×``; near 1 with a digit more, so that a small gain is not shown as none."""
    if value is None:
        return UNKNOWN
    return f"{value:.{2 if value < 1.1 else 1 if value < 10 else 0}f}×"


def score(value: float | None, digits: int = 4) -> str:
    """A reward or, with fewer digits, a correlation."""
    return UNKNOWN if value is None else f"{value:.{digits}f}".replace("-", "−")


def duration(seconds: float | None) -> str:
    """Seconds as people say them: ``4 min 51 s``."""
    if seconds is None:
        return UNKNOWN
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def cost_name(cost: str) -> str:
    """A cost in words; ``latency_ms@pixel`` is the ``median latency on pixel``."""
    kind, _, device = cost.partition("@")
    return COSTS.get(kind, kind) + (f" on {device}" if device else "")


def cost_value(cost: str, value: float | None) -> str:
    """A cost with its unit."""
    if value is None:
        return UNKNOWN
    kind = cost.partition("@")[0]
    if kind == "size_bytes":
        return f"{kib(value)} KiB"
    return f"{milliseconds(value)} ms" if kind in COSTS else f"{value:g}"
