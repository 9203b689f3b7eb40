"""The figures of a sweep: its history, what mattered, all parameters side by side, and each of them alone."""

from __future__ import annotations

import html
import math
from itertools import accumulate
from typing import Any

from nas.report.drawing import BLUE, GREEN, GREY, INK, Figure, blank
from nas.sweep.parameter import text

Record = dict[str, Any]
_FADED = "rgba(135,148,161,0.35)"


def complete(sweep: Record) -> list[Record]:
    """The trials that have a value, in the order in which they were asked."""
    return sorted((t for t in sweep["trials"] if t["value"] is not None), key=lambda t: int(t["index"]))


def number(value: float) -> str:
    """A figure of any size with four significant digits."""
    return f"{value:.4g}".replace("-", "−")


def history(sweep: Record) -> Figure:
    """The metric of every trial, and the best so far within budget."""
    figure = blank("trial", sweep["metric"])
    trials = complete(sweep)
    for fits, name, colour, symbol in ((True, "within budget", BLUE, "circle"), (False, "over budget", GREY, "x")):
        chosen = [t for t in trials if (t["violation"] == 0) == fits]
        if chosen:
            _points(figure, [t["index"] for t in chosen], chosen, name, colour, symbol)
    better = max if sweep["direction"] == "maximize" else min
    fitting = [t for t in trials if t["violation"] == 0]
    best = list(accumulate((t["value"] for t in fitting), better))
    line = {"color": GREEN, "width": 2, "shape": "hv"}
    x = [t["index"] for t in fitting]
    figure.add_scatter(x=x, y=best, mode="lines", name="best so far", line=line, hoverinfo="skip")
    return figure


def importances(sweep: Record) -> Figure:
    """Share of the metric's variance that each parameter explains."""
    shares = list(sweep["importances"].items())[::-1]
    figure = blank("share of the variance explained", "")
    figure.add_bar(
        x=[share for _, share in shares], y=[html.escape(key) for key, _ in shares], orientation="h",
        marker={"color": BLUE}, hovertemplate="%{y}: %{x:.0%}<extra></extra>",
    )  # fmt: skip
    figure.update_layout(height=120 + 34 * len(shares), xaxis={"tickformat": ".0%", "range": [0, 1]})
    return figure


def parallel(sweep: Record) -> Figure:
    """One line per trial over all parameters and the metric, the better the darker; the best in green."""
    axes = [*(_Axis(p, sweep) for p in sweep["parameters"]), _Axis.of_metric(sweep)]
    figure = blank("", "")
    trials = sorted(complete(sweep), key=lambda t: axes[-1].place(t["value"]))
    if sweep["direction"] == "minimize":
        trials.reverse()
    best = (sweep["best"] or {}).get("index")
    for i, trial in enumerate(trials):
        values = [*(trial["drawn"][axis.key] for axis in axes[:-1]), trial["value"]]
        places = [axis.place(value) for axis, value in zip(axes, values, strict=True)]
        line = (
            {"color": GREEN, "width": 3} if trial["index"] == best else {"color": _shade(i, len(trials)), "width": 1.5}
        )
        figure.add_scatter(
            x=list(range(len(axes))), y=places, mode="lines+markers", line=line, showlegend=False,
            marker={"size": 5, "color": line["color"]}, text=[_hover(trial)] * len(axes), hoverinfo="text",
        )  # fmt: skip
    for x, axis in enumerate(axes):
        figure.add_vline(x=x, line={"color": _FADED, "width": 1})
        for place, label in axis.ticks():
            figure.add_annotation(
                x=x, y=place, text=html.escape(label), showarrow=False, xanchor="left", xshift=6,
                font={"size": 11, "color": INK}, bgcolor="rgba(255,255,255,0.75)",
            )  # fmt: skip
    names = [html.escape(axis.key) for axis in axes]
    figure.update_xaxes(
        tickvals=list(range(len(axes))), ticktext=names, range=[-0.15, len(axes) - 0.45], showgrid=False
    )
    figure.update_yaxes(visible=False, range=[-0.08, 1.08])
    return figure


def slice_of(sweep: Record, parameter: Record) -> Figure:
    """The metric against one parameter; grey where the trial's plug-ins did not use it."""
    axis = _Axis(parameter, sweep)
    figure = blank(axis.key, sweep["metric"])
    for used, name, colour in ((True, "used", BLUE), (False, "not used", GREY)):
        chosen = [t for t in complete(sweep) if (axis.key in t["values"]) == used]
        if chosen:
            x = [t["drawn"][axis.key] if not axis.labels else html.escape(t["drawn"][axis.key]) for t in chosen]
            _points(figure, x, chosen, name, colour, "circle")
    if axis.labels:
        order = [html.escape(label) for label in axis.labels]
        figure.update_xaxes(type="category", categoryorder="array", categoryarray=order)
    elif axis.log:
        figure.update_xaxes(type="log", exponentformat="e")
    figure.update_layout(height=300)
    return figure


def curves(sweep: Record) -> Figure:
    """What each trial reported on its way, over the number of the report."""
    figure = blank("report", sweep["metric"])
    best = (sweep["best"] or {}).get("index")
    for trial in sorted(sweep["trials"], key=lambda t: t["index"] == best):  # the best lies on top
        colour = GREEN if trial["index"] == best else _FADED if trial["status"] == "pruned" else BLUE
        steps, values = zip(*trial["intermediate"], strict=True) if trial["intermediate"] else ((), ())
        symbols = ["circle"] * (len(steps) - 1) + ["x" if trial["status"] == "pruned" else "circle"]
        figure.add_scatter(
            x=list(steps), y=list(values), mode="lines+markers", showlegend=False, hoverinfo="text",
            line={"color": colour, "width": 3 if colour == GREEN else 1.2}, marker={"size": 6, "symbol": symbols},
            text=[_hover(trial)] * len(steps),
        )  # fmt: skip
    return figure


def _points(figure: Figure, x: list[Any], trials: list[Record], name: str, colour: str, symbol: str) -> None:
    figure.add_scatter(
        x=x, y=[t["value"] for t in trials], mode="markers", name=name, hoverinfo="text",
        marker={"color": colour, "symbol": symbol, "size": 8, "opacity": 0.75, "line": {"width": 1, "color": "white"}},
        text=[_hover(t) for t in trials],
    )  # fmt: skip


def _hover(trial: Record) -> str:
    lines = [f"trial {trial['index']}", *(f"{key} = {text(value)}" for key, value in trial["values"].items())]
    lines += [f"{name}: {number(value)}" for name, value in trial["figures"].items()]
    return "<br>".join(map(html.escape, lines))


def _shade(rank: int, of: int) -> str:
    """From pale to blue."""
    share = rank / max(1, of - 1)
    pale, full = (214, 222, 235), (37, 99, 201)
    mixed = (round(a + share * (b - a)) for a, b in zip(pale, full, strict=True))
    return f"rgb({','.join(map(str, mixed))})"


class _Axis:
    """One upright axis of the parallel view: where a value lies on it, 0..1, and its labels."""

    def __init__(self, parameter: Record, sweep: Record) -> None:
        self.key = str(parameter["key"])
        self.labels = [text(value) for value in parameter.get("values", [])]
        low, high = parameter.get("low"), parameter.get("high")
        if (low is None or high is None) and not self.labels:  # a distribution without ends: those of what was drawn
            drawn = [trial["drawn"][self.key] for trial in complete(sweep)]
            low, high = min(drawn), max(drawn)
        self.low, self.high = float(low or 0.0), float(high or 0.0)
        self.log = bool(parameter.get("log"))

    @classmethod
    def of_metric(cls, sweep: Record) -> _Axis:
        values = [t["value"] for t in complete(sweep)]
        return cls({"key": sweep["metric"], "low": min(values), "high": max(values)}, sweep)

    def place(self, value: Any) -> float:
        if self.labels:
            return self.labels.index(value) / max(1, len(self.labels) - 1)
        low, high, here = self.low, self.high, float(value)
        if self.log:
            low, high, here = math.log(low), math.log(high), math.log(here)
        return (here - low) / (high - low) if high > low else 0.5

    def ticks(self) -> list[tuple[float, str]]:
        if self.labels:
            return [(self.place(label), label) for label in self.labels]
        return [(self.place(end), number(end)) for end in dict.fromkeys((self.low, self.high))]
