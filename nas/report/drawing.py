"""What every figure shares: its look, its hover text, its axes, and how it becomes a part of the page."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

from plotly.graph_objects import Figure as Figure

from nas.report.formats import milliseconds, percent, score, text
from nas.report.markup import Html, tag
from nas.report.summary import Record, number, part

# Told apart by shape as well as by colour, so that the figures survive colour blindness and grey printing.
INK, GREY, BLUE, ORANGE, GREEN, PURPLE, RED = (
    "#1f2933", "#8794a1", "#2563c9", "#d9770f", "#0b8a5f", "#7a4cc2", "#c43d3d",
)  # fmt: skip
_WIDE = 4.0  # beyond this ratio of longest to shortest, latency reads better on a logarithmic axis
# Off first: by default the library offers a button that sends the figure, and so the run, to its maker's server.
_CONFIG = {
    "showSendToCloud": False,
    "plotlyServerURL": "",
    "displaylogo": False,
    "responsive": True,
    "modeBarButtons": [["toImage", "resetScale2d"]],
}


class Fragments:
    """Turns figures into HTML: the first one brings the plotting library along, the others use it."""

    def __init__(self) -> None:
        self._drawn = 0

    def html(self, figure: Figure) -> Html:
        """The figure as a part of the page, with an id that is the same on every run."""
        fragment = figure.to_html(
            full_html=False, include_plotlyjs=self._drawn == 0, div_id=f"figure-{self._drawn}", config=_CONFIG
        )
        self._drawn += 1
        return tag("div", Html(fragment), class_="figure")


def blank(x: str, y: str) -> Figure:
    """An empty figure in the style of the page with its axis titles."""
    axis = {
        "gridcolor": "#edf0f3",
        "linecolor": "#c3cbd3",
        "ticks": "outside",
        "tickcolor": "#c3cbd3",
        "zeroline": False,
        "automargin": True,
    }
    figure = Figure()
    figure.update_layout(
        template="none",
        font={"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13, "color": INK},
        margin={"l": 64, "r": 16, "t": 12, "b": 52},
        height=440,
        autosize=True,
        hovermode="closest",
        hoverlabel={"bgcolor": "white", "align": "left"},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"size": 12}},
        paper_bgcolor="white",
        plot_bgcolor="white",
    )
    figure.update_xaxes(title={"text": html.escape(x), "standoff": 10}, **axis)
    figure.update_yaxes(title={"text": html.escape(y), "standoff": 10}, **axis)
    return figure


def known(item: Record, *keys: str) -> bool:
    """Whether a record ran to its end and holds all these numbers."""
    return item.get("status", "complete") == "complete" and all(number(item, key) is not None for key in keys)


def plottable(items: Sequence[dict[str, Any]], latency: str, other: str) -> list[dict[str, Any]]:
    """Those with both numbers known and a latency that a logarithmic axis can show."""
    return [item for item in items if known(item, latency, other) and (number(item, latency) or 0.0) > 0]


def hover(item: Record, head: str = "") -> str:
    """What a point is. Escaped here, because the figures read a subset of HTML."""
    lines = [head or f"trial {text(item.get('index'))}"]
    for key, name, form in (
        ("quality", "search quality", percent),
        ("quality_valid", "final validation quality", percent),
        ("predicted_ms", "predicted ms", milliseconds),
        ("latency_ms", "predicted ms", milliseconds),
        ("p50_ms", "measured p50 ms", milliseconds),
        ("reward", "reward", score),
    ):
        if number(item, key) is not None:
            lines.append(f"{name}: {form(number(item, key))}")
    choices = [f"{key} = {value}" for key, value in part(item, "candidate").items()]
    lines += ["  ".join(choices[i : i + 3]) for i in range(0, len(choices), 3)]
    return "<br>".join(html.escape(line) for line in lines)


def axis_place(figure: Figure, value: float) -> float:
    """Annotations on a logarithmic axis are placed by exponent, unlike lines."""
    return math.log10(value) if figure.layout.xaxis.type == "log" else value


def latency_axis(figure: Figure, values: list[float], axis: str = "xaxis") -> None:
    """Logarithmic where the values span a wide range, labelled 1, 2, 5, 10… as whole numbers rather than digits."""
    if values and max(values) / min(values) > _WIDE:
        powers = range(math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))) + 1)
        ticks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
        labels = [f"{tick:g}" for tick in ticks]
        figure.update_layout({axis: {"type": "log", "tickvals": ticks, "ticktext": labels}})


def view_floor(values: list[float]) -> float | None:
    """Where to cut the view so that a few collapsed trainings do not flatten the rest; None: show everything."""
    if len(values) < 8:
        return None
    ordered = sorted(values)
    quarter, half = ordered[len(ordered) // 4], ordered[len(ordered) // 2]
    low = quarter - 3 * max(half - quarter, 1e-3)
    return low if ordered[0] < low else None
