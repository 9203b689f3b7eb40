"""Predicted against measured: whether the latency table can be trusted, with its noise floor beside its error."""

from __future__ import annotations

from typing import Any

from nas.report.drawing import BLUE, GREEN, INK, Figure, blank, latency_axis, plottable
from nas.report.formats import percent
from nas.report.summary import Record, number, part, records

_BAND = "rgba(37,99,201,0.13)"
_UPPER, _LOWER = (0.4, 1.0), (0.0, 0.29)  # the share of the height that the two panels take


def calibration(summary: Record) -> Figure:
    """Above, measured against predicted with y = x; below, the error in percent, where a good table shows its grain.

    Calibration networks and finalists are points; the noise floor of the table is a band in both panels.
    """
    figure = blank("predicted (ms)", "measured (ms)")
    table = part(summary, "table")
    series = [("calibration networks", _pairs(records(table, "nets"), "measured_ms"), BLUE, "circle", 6)]
    for win, name, symbol, size in ((False, "finalists", "diamond", 9), (True, "student", "star", 14)):
        chosen = [item for item in records(summary, "finalists") if bool(item.get("winner")) == win]
        series.append((name, _pairs(chosen, "p50_ms"), GREEN, symbol, size))
    values = [value for _, found, *_ in series for pair in found for value in pair]
    if values:
        _add_ideal(figure, (0.85 * min(values), 1.15 * max(values)), number(table, "noise"))
    for name, found, colour, symbol, size in series:
        marker = {"color": colour, "symbol": symbol, "size": size, "opacity": 0.75}
        marker["line"] = {"width": 1, "color": "white"}
        _add_points(figure, found, name, marker)
    latency_axis(figure, values)
    latency_axis(figure, values, "yaxis")
    figure.update_layout(
        height=560,
        xaxis_anchor="y2",
        yaxis_domain=_UPPER,
        yaxis2={**figure.layout.yaxis.to_plotly_json(), "type": "linear", "domain": _LOWER, "tickformat": "+.0%"},
    )
    figure.update_layout(yaxis2={"title": {"text": "error"}, "tickmode": "auto", "tickvals": None, "ticktext": None})
    return figure


def _pairs(items: list[dict[str, Any]], measured: str) -> list[tuple[float, float]]:
    """Predicted and measured latency where both are known and above 0."""
    known = plottable(plottable(items, "predicted_ms", measured), measured, "predicted_ms")
    return [(number(item, "predicted_ms") or 0.0, number(item, measured) or 0.0) for item in known]


def _add_ideal(figure: Figure, ends: tuple[float, float], noise: float | None) -> None:
    """The line of perfect prediction and the noise around it, in both panels."""
    low, high = ends
    if noise:
        up, down = 1 + noise, 1 - noise
        band: dict[str, Any] = {"x": [low, high, high, low], "fill": "toself", "fillcolor": _BAND, "mode": "lines"}
        band |= {"line": {"width": 0}, "hoverinfo": "skip", "legendgroup": "noise"}
        figure.add_scatter(y=[low * up, high * up, high * down, low * down], name=f"noise ±{percent(noise)}", **band)
        figure.add_scatter(y=[noise, noise, -noise, -noise], yaxis="y2", showlegend=False, **band)
    line = {"mode": "lines", "line": {"color": INK, "width": 1, "dash": "dot"}, "hoverinfo": "skip"}
    figure.add_scatter(x=[low, high], y=[low, high], name="predicted = measured", **line)
    figure.add_scatter(x=[low, high], y=[0, 0], yaxis="y2", showlegend=False, **line)


def _add_points(figure: Figure, found: list[tuple[float, float]], name: str, marker: dict[str, Any]) -> None:
    if not found:
        return
    predicted, measured = [a for a, _ in found], [b for _, b in found]
    error = [a / b - 1 for a, b in found]
    shared = {
        "x": predicted,
        "mode": "markers",
        "marker": marker,
        "legendgroup": name,
        "name": name,
        "customdata": error,
    }
    hint = "%{x:.4g} ms predicted"
    tail = "<br>%{customdata:+.1%} error<extra></extra>"
    figure.add_scatter(y=measured, hovertemplate=f"{hint}<br>%{{y:.4g}} ms measured{tail}", **shared)
    figure.add_scatter(y=error, yaxis="y2", showlegend=False, hovertemplate=f"{hint}{tail}", **shared)
