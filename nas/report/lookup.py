"""The report of a search that looked everything up: best candidates, front and trace; nothing was measured."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from nas.report import figures, tables
from nas.report.drawing import BLUE, GREY, ORANGE, Figure, Fragments, blank, hover, latency_axis, plottable
from nas.report.formats import UNKNOWN, count, duration, percent, score, text
from nas.report.markup import Html, pairs, table, tag
from nas.report.page import page, section
from nas.report.summary import Record, number, part, records, row
from nas.reward import pareto_front


def is_lookup(summary: Record) -> bool:
    """Whether this is the summary of a search that trained nothing."""
    return summary.get("kind") == "lookup"


def render(summary: dict[str, Any]) -> str:
    """The summary as one HTML document with everything that it needs inside."""
    name, drawings = str(summary.get("name") or "search"), Fragments()
    facts = [
        str(summary.get("created") or "")[:16].replace("T", " "), f"seed {text(summary.get('seed'))}",
        f"strategy {text(summary.get('strategy'))}", duration(number(summary, "seconds")),
    ]  # fmt: skip
    head, rows = rows_as_text(summary)
    best = row(summary, "search")
    found = section(
        "What was found",
        table(head, rows, marked=["student" if item.get("name") == "search" else "" for item in _rows(summary)]),
        tag("h3", "The best candidate"),
        tables.choices(part(best, "candidate")),
        lead=["Qualities and costs as published; nothing was trained or measured."],
    )
    asked = part(summary, "screened")
    screened = (
        f"Candidates proposed: {count(number(asked, 'asked'))}, of which {count(number(asked, 'infeasible'))} were "
        f"turned away because they would break a budget and {count(number(asked, 'duplicates'))} because they had been "
        "looked up."
    )
    cost = str(part(summary, "reward").get("cost") or "cost")
    return page(
        f"{name}: search report",
        [
            tag("header", tag("h1", name), tag("p", " · ".join(fact for fact in facts if fact), class_="soft")),
            found,
            section(f"Quality against {cost}", drawings.html(front(summary, cost)), lead=["Up and left is better."]),
            section("The search", drawings.html(figures.trace(summary)), lead=[screened]),
            section("Budgets", pairs([(name, value) for name, value, _ in budgets(summary)] or [("budget", "none")])),
            _trials(summary),
        ],
    )


def front(summary: Record, cost: str) -> Figure:
    """Every trial by quality and one cost, with the front of the search."""
    figure = blank(cost, "quality")
    arms = {arm: records(part(summary, "baseline_trials"), arm) for arm in part(summary, "baseline_trials")}
    shown: list[float] = []
    for name, items, colour, symbol in (
        *((f"{arm} search", items, ORANGE, "circle-open") for arm, items in arms.items()),
        ("search", records(summary, "trials"), BLUE, "circle"),
    ):
        points = plottable([{**item, "x": part(item, "costs").get(cost)} for item in items], "x", "quality")
        x, y = [number(item, "x") or 0.0 for item in points], [number(item, "quality") or 0.0 for item in points]
        shown += x
        marker = {"color": colour, "symbol": symbol, "size": 6, "opacity": 0.6}
        figure.add_scatter(
            x=x, y=y, mode="markers", name=name, marker=marker, text=[hover(item) for item in points], hoverinfo="text"
        )
        line = {"color": GREY if name != "search" else BLUE, "width": 1.5, "shape": "hv"}
        order = pareto_front(y, x)
        figure.add_scatter(
            x=[x[i] for i in order], y=[y[i] for i in order], mode="lines", name=f"front of {name}", line=line,
            hoverinfo="skip",
        )  # fmt: skip
    latency_axis(figure, shown)
    figure.update_yaxes(tickformat=".1%")
    return figure


def budgets(summary: Record) -> list[tuple[str, str, bool]]:
    """Per budget: its words, the best candidate's cost, and whether that meets it."""
    costs = part(row(summary, "search"), "costs")
    found = []
    for limit in records(summary, "limits"):
        name, bound = str(limit.get("cost")), number(limit, "limit") or 0.0
        value = number(costs, name)
        found.append((f"{name} ≤ {bound:.4g}", _plain(value), value is not None and value <= bound))
    return found


def rows_as_text(summary: Record) -> tuple[list[str], list[list[str]]]:
    """Heading and rows: the best candidate of every arm."""
    items = _rows(summary)
    costs = list(part(items[0], "costs")) if items else []
    tests = list(part(items[0], "tests")) if items else []
    body = [
        [
            str(item.get("label") or item.get("name")),
            percent(number(item, "quality"), 2),
            *(_plain(number(part(item, "costs"), cost)) for cost in costs),
            *(_plain(number(part(item, "tests"), name)) for name in tests),
            score(number(item, "reward")),
            text(item.get("index")),
        ]
        for item in items
    ]
    return ["", "quality", *costs, *tests, "reward", "trial"], body


def summary_table(summary: Record) -> Table:
    """The same for a terminal."""
    head, body = rows_as_text(summary)
    found = Table(box=box.SIMPLE_HEAD, title=None, pad_edge=False, padding=(0, 1, 0, 0))
    for i, name in enumerate(head):
        found.add_column(Text(name), justify="right" if i else "left")
    for cells, item in zip(body, _rows(summary), strict=True):
        style = "bold green" if item.get("name") == "search" else ""
        found.add_row(*(Text(cell) for cell in cells), style=style)
    return found


def headline(summary: Record) -> list[str]:
    """Plain sentences for a terminal."""
    best = row(summary, "search")
    choices = " ".join(f"{key}={value}" for key, value in part(best, "candidate").items())
    met = {True: ", met.", False: ", NOT met."}
    return [
        *(f"Budget {words}: {value}{met[good]}" for words, value, good in budgets(summary)),
        f"Best candidate: {choices}",
        "Looked up, not trained: qualities and costs are those published.",
    ]


def _rows(summary: Record) -> list[dict[str, Any]]:
    return sorted(records(summary, "rows"), key=lambda item: item.get("name") == "search")


def _trials(summary: Record) -> Html:
    arms = {"search": records(summary, "trials")}
    arms |= {str(arm): records(part(summary, "baseline_trials"), arm) for arm in part(summary, "baseline_trials")}
    folded = []
    for arm, items in arms.items():
        costs = list(part(items[0], "costs")) if items else []
        body = (
            [
                text(item.get("index")),
                text(item.get("status")),
                percent(number(item, "quality"), 2),
                score(number(item, "reward")),
                *(_plain(number(part(item, "costs"), cost)) for cost in costs),
                "  ".join(f"{key}={value}" for key, value in part(item, "candidate").items()),
            ]
            for item in items
        )
        head = ["trial", "status", "quality", "reward", *costs, "candidate"]
        title = tag("summary", tables.arm_title(arm, items))
        folded.append(tag("details", title, table(head, body, class_="trials")))
    return section("Every trial", *folded)


def _plain(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.5g}"
