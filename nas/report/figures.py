"""What the search saw and found: quality against latency, and the reward from trial to trial."""

from __future__ import annotations

import html
from itertools import accumulate
from typing import Any

from nas.report.drawing import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    RED,
    Figure,
    axis_place,
    blank,
    hover,
    known,
    latency_axis,
    plottable,
    view_floor,
)
from nas.report.formats import milliseconds
from nas.report.summary import Record, meets, number, part, records, rows_in_order, whole
from nas.report.words import ARMS, limit_words, metric
from nas.reward import pareto_front

MARKS = {
    "teacher": (INK, "square"),
    "random": (ORANGE, "triangle-up"),
    "uniform": (PURPLE, "diamond"),
    "student": (GREEN, "star"),
}


def front(summary: Record) -> Figure:
    """Quality on the validation data against latency: trials as predicted, models as measured, budgets as lines."""
    figure = blank("latency (ms)", f"validation {metric(summary)}")
    trials = [item for item in plottable(records(summary, "trials"), "latency_ms", "quality") if whole(item)]
    lottery = [item for _, items in _arms(summary) for item in plottable(items, "latency_ms", "quality")]
    finalists = plottable(records(summary, "finalists"), "p50_ms", "quality_valid")
    rows = plottable(rows_in_order(summary), "p50_ms", "quality_valid")
    _add_trials(figure, lottery, "random baseline, predicted", ORANGE, "circle-open")
    _add_trials(figure, [item for item in trials if not meets(item)], "search, over budget", GREY, "x")
    _add_trials(figure, [item for item in trials if meets(item)], "search, within budget", BLUE, "circle")
    _add_front(figure, trials)
    _add_finalists(figure, [item for item in finalists if not item.get("winner")])
    for item in rows:
        _add_row(figure, item)
    seen = [number(item, "latency_ms") or 0.0 for item in (*trials, *lottery)]
    seen += [number(item, "p50_ms") or 0.0 for item in (*finalists, *rows)]
    latency_axis(figure, seen)
    _add_bounds(figure, summary)
    _quality_axis(figure, _searched(summary), [number(item, "quality_valid") or 0.0 for item in (*finalists, *rows)])
    return figure


def trace(summary: Record) -> Figure:
    """Reward of every fully trained trial and the best so far within budget, with each baseline's beside it.

    Across lies what was spent: trials, or full trainings' worth where some had less than a full one.
    """
    trials = records(summary, "trials")
    figure = blank("trial" if all(map(whole, trials)) else "full trainings' worth", "reward")
    judged = [
        (x, item) for x, item in zip(_spent(trials), trials, strict=True) if known(item, "reward") and whole(item)
    ]
    for fits, name, colour, symbol in (
        (False, "over budget", GREY, "x"),
        (True, "within budget", BLUE, "circle"),
    ):
        chosen = [(x, item) for x, item in judged if meets(item) == fits]
        x, y = [x for x, _ in chosen], [number(item, "reward") for _, item in chosen]
        marker = {"color": colour, "symbol": symbol, "size": 6, "opacity": 0.7, "line": {"width": 1, "color": colour}}
        notes = [hover(item) for _, item in chosen]
        if chosen:
            figure.add_scatter(x=x, y=y, mode="markers", name=name, marker=marker, text=notes, hoverinfo="text")
    for arm, items in _arms(summary):
        _add_best(figure, items, f"best of {ARMS.get(arm, arm)}", ORANGE, "dot")
    _add_best(figure, trials, "best of the search", BLUE, "solid")
    rewards = [number(item, "reward") or 0.0 for _, item in judged]
    low = view_floor(rewards)
    if low is not None:
        figure.update_yaxes(range=[low, max(rewards) + 0.08 * (max(rewards) - low)])
    return figure


def _spent(items: list[dict[str, Any]]) -> list[float]:
    """Full trainings that had been spent with each trial."""
    return [round(spent, 3) for spent in accumulate(number(item, "fidelity") or 1.0 for item in items)]


def _arms(summary: Record) -> list[tuple[str, list[dict[str, Any]]]]:
    arms = part(summary, "baseline_trials")
    return [(str(arm), records(arms, arm)) for arm in arms]


def _add_trials(figure: Figure, items: list[dict[str, Any]], name: str, colour: str, symbol: str) -> None:
    if items:
        figure.add_scatter(
            x=[number(item, "latency_ms") for item in items],
            y=[number(item, "quality") for item in items],
            mode="markers",
            name=name,
            marker={
                "color": colour,
                "symbol": symbol,
                "size": 6,
                "opacity": 0.6,
                "line": {"width": 1, "color": colour},
            },
            text=[hover(item) for item in items],
            hoverinfo="text",
        )


def _add_front(figure: Figure, trials: list[dict[str, Any]]) -> None:
    """The Pareto front of the trials as a staircase: between two points, only the cheaper one's quality is had."""
    x = [number(item, "latency_ms") or 0.0 for item in trials]
    y = [number(item, "quality") or 0.0 for item in trials]
    best = pareto_front(y, x)
    if len(best):
        line = {"color": BLUE, "width": 1.5, "shape": "hv"}
        figure.add_scatter(
            x=[x[i] for i in best],
            y=[y[i] for i in best],
            mode="lines",
            name="Pareto front",
            line=line,
            hoverinfo="skip",
        )


def _add_finalists(figure: Figure, finalists: list[dict[str, Any]]) -> None:
    if finalists:
        x = [number(item, "p50_ms") or 0.0 for item in finalists]
        noise = [(number(item, "noise") or 0.0) * ms for item, ms in zip(finalists, x, strict=True)]
        figure.add_scatter(
            x=x,
            y=[number(item, "quality_valid") for item in finalists],
            error_x={"array": noise, "color": GREEN, "thickness": 1, "width": 3},
            mode="markers",
            name="finalists, measured",
            marker={"color": "white", "symbol": "diamond", "size": 9, "line": {"width": 1.8, "color": GREEN}},
            text=[hover(item) for item in finalists],
            hoverinfo="text",
        )


def _add_row(figure: Figure, item: Record) -> None:
    label = str(item.get("label") or item.get("name"))
    colour, symbol = MARKS.get(str(item.get("name")), (INK, "pentagon"))
    size = 17 if item.get("name") == "student" else 11
    figure.add_scatter(
        x=[number(item, "p50_ms")],
        y=[number(item, "quality_valid")],
        mode="markers",
        name=html.escape(label),
        marker={"color": colour, "symbol": symbol, "size": size, "line": {"width": 1.2, "color": "white"}},
        text=[hover({**item, "quality": None}, label)],
        hoverinfo="text",
    )


def _add_bounds(figure: Figure, summary: Record) -> None:
    """Latency budgets, and the reward's target where it is not a budget already."""
    bounds: dict[float, str] = {}
    for limit in records(summary, "limits"):
        bound = number(limit, "limit")
        if bound and str(limit.get("cost")) in ("latency_ms", "latency_p95_ms"):  # this device's, on this axis
            bounds[bound] = f"budget: {limit_words(limit)}"
    target = number(part(summary, "reward"), "target")
    if target and target not in bounds:
        bounds[target] = f"reward target: {milliseconds(target)} ms"
    for i, (bound, text) in enumerate(sorted(bounds.items())):
        # Staggered from the bottom: labels of near bounds would lie on one another, and the front is at the top.
        figure.add_vline(x=bound, line={"color": RED, "width": 1.3, "dash": "dash" if "budget" in text else "dot"})
        figure.add_annotation(
            x=axis_place(figure, bound), y=0.03 + 0.06 * i, yref="paper", text=html.escape(text), showarrow=False,
            xanchor="left", xshift=5, font={"size": 12, "color": RED}, bgcolor="rgba(255,255,255,0.8)",
        )  # fmt: skip


def _add_best(figure: Figure, trials: list[dict[str, Any]], name: str, colour: str, dash: str) -> None:
    """Best reward so far among the fully trained trials that met every budget, from the first that did."""
    rewards = [
        number(item, "reward") if known(item, "reward") and meets(item) and whole(item) else None for item in trials
    ]
    best = list(accumulate(rewards, _better))
    if any(value is not None for value in best):
        line = {"color": colour, "width": 2, "shape": "hv", "dash": dash}
        template = "%{y:.4f} after %{x} " + ("trials" if all(map(whole, trials)) else "trainings")
        figure.add_scatter(
            x=_spent(trials),
            y=best,
            mode="lines",
            name=html.escape(name),
            line=line,
            hovertemplate=template,
        )


def _better(a: float | None, b: float | None) -> float | None:
    known_ones = [value for value in (a, b) if value is not None]
    return max(known_ones, default=None)


def below_view(summary: Record) -> int:
    """How many trials the first view of the front leaves out below, so that the page can say so."""
    searched = _searched(summary)
    low = view_floor(searched)
    return 0 if low is None else sum(value < low for value in searched)


def _searched(summary: Record) -> list[float]:
    """Qualities seen by the search and its baselines."""
    arms = [records(summary, "trials"), *(items for _, items in _arms(summary))]
    found = [item for items in arms for item in plottable(items, "latency_ms", "quality") if whole(item)]
    return [number(item, "quality") or 0.0 for item in found]


def _quality_axis(figure: Figure, searched: list[float], measured: list[float]) -> None:
    figure.update_yaxes(tickformat=".1%")
    low = view_floor(searched)
    if low is not None:
        low, high = min(low, *measured) if measured else low, max(*searched, *measured)
        figure.update_yaxes(range=[low, high + 0.06 * (high - low)])
