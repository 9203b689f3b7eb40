"""The page of an ablation: all fronts in one picture, the table, what was equal; and the table on a terminal."""

from __future__ import annotations

import statistics
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from nas.ablation.result import Record, read_result
from nas.errors import StudyError
from nas.report.drawing import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    Figure,
    Fragments,
    axis_place,
    blank,
    latency_axis,
)
from nas.report.formats import UNKNOWN, duration, kib, milliseconds, percent, points
from nas.report.markup import Html, bullets, pairs, tag
from nas.report.markup import table as html_table
from nas.report.page import page, save_page, section

PAGE = "ablation.html"
#: Arm → colour, marker, and what it is.
LOOKS = {
    "joint": (GREEN, "star", "joint search over all choices"),
    "sequential": (BLUE, "circle", "architecture, then pruning, then quantisation"),
    "uniform": (PURPLE, "diamond", "the family uniformly compressed"),
    "random": (ORANGE, "triangle-up", "random search over all choices"),
}
HEAD = (
    "target", "arm", "test quality", "joint − arm", "95 % interval", "measured ms", "size KiB", "within target",
    "trainings", "training time",
)  # fmt: skip


def write_page(folder: Path) -> Path:
    """Writes ``ablation.html`` from ``ablation.json``, whole or not at all, and returns its path.

    Raises:
        StudyError: there is no ablation, or the page cannot be written.
    """
    target = folder / PAGE
    content = render(read_result(folder))
    return save_page(target, content, StudyError)


def render(result: Record) -> str:
    """The result of an ablation as one HTML document with everything that it needs inside."""
    warnings = result["warnings"]
    blocks = [
        _header(result),
        section("Before you rely on this", bullets(warnings), class_="warnings") if warnings else Html(""),
        _fronts(result),
        _table(result),
        _equal(result),
        _phases(result),
    ]
    return page(f"{result['name']}: joint against one after the other", blocks)


def _header(result: Record) -> Html:
    created = str(result["created"])[:16].replace("T", " ")
    seeds = f"seeds {', '.join(map(str, result['seeds']))}"
    missing = len(result["seeds_asked"]) - len(result["seeds"])
    facts = [created, seeds, *([f"{missing} more to come"] if missing else []), str(result["equal"]["device"])]
    return tag("header", tag("h1", f"{result['name']}: ablation"), tag("p", " · ".join(facts), class_="soft"))


def _fronts(result: Record) -> Html:
    lead = (
        f"Up and left is better: {result['metric']} on the test data against the latency of the exported model, "
        "measured. A mark is one seed's best finalist at one target; open marks missed the target as measured. Lines "
        "join the means over the seeds; dotted lines are the targets."
    )
    return section("Fronts", Fragments().html(figure(result)), lead=[lead])


def figure(result: Record) -> Figure:
    """Test quality against measured latency: every arm's points, the means, the targets and the teacher."""
    drawn = blank("latency (ms), measured", f"test {result['metric']}")
    seen = [teacher["latency_ms"] for teacher in result["teachers"]]
    drawn.add_scatter(
        x=seen, y=[t["quality"] for t in result["teachers"]], mode="markers", name="teacher",
        marker={"color": INK, "symbol": "square", "size": 9}, hoverinfo="text",
        text=[f"teacher, seed {t['seed']}<br>{percent(t['quality'])}, {milliseconds(t['latency_ms'])} ms"
              for t in result["teachers"]],
    )  # fmt: skip
    for arm, rows in result["arms"].items():
        found = [(row["seed"], point) for row in rows for point in row["points"]]
        seen += [point["latency_ms"] for _, point in found]
        _add_arm(drawn, arm, found)
    latency_axis(drawn, seen)
    for target in result["targets"]:
        fixed = [p["target_ms"] for rows in result["arms"].values() for row in rows for p in row["points"]
                 if p["target"] == target]  # fmt: skip
        if fixed:
            where = statistics.fmean(fixed)
            drawn.add_vline(x=where, line={"color": GREY, "width": 1, "dash": "dot"})
            drawn.add_annotation(
                x=axis_place(drawn, where), y=0, yref="paper", yanchor="bottom", text=target, showarrow=False,
                xanchor="left", xshift=3, font={"size": 11, "color": GREY},
            )  # fmt: skip
    return drawn


def _add_arm(drawn: Figure, arm: str, found: list[tuple[int, Record]]) -> None:
    colour, symbol, _ = LOOKS[arm]
    if not found:
        return
    drawn.add_scatter(
        x=[p["latency_ms"] for _, p in found], y=[p["quality"] for _, p in found], mode="markers", name=arm,
        marker={
            "color": colour, "size": 9, "line": {"width": 1, "color": colour},
            "symbol": [symbol if p["feasible"] else f"{symbol}-open" for _, p in found],
        },
        text=[
            f"{arm}, seed {seed}, {p['target']}<br>{percent(p['quality'])}, {milliseconds(p['latency_ms'])} ms of "
            f"{milliseconds(p['target_ms'])}, {kib(p['size_bytes'])} KiB" for seed, p in found
        ],
        hoverinfo="text",
    )  # fmt: skip
    by_target: dict[str, list[Record]] = {}
    for _, point in found:
        by_target.setdefault(point["target"], []).append(point)
    means = sorted(
        (statistics.fmean(p["latency_ms"] for p in group), statistics.fmean(p["quality"] for p in group))
        for group in by_target.values()
    )
    drawn.add_scatter(
        x=[x for x, _ in means], y=[y for _, y in means], mode="lines", name=f"{arm}, mean", showlegend=False,
        line={"color": colour, "width": 2}, hoverinfo="skip",
    )  # fmt: skip


def _table(result: Record) -> Html:
    lead = (
        "Means over the seeds. The difference is joint − arm in percentage points of test quality, paired by seed, "
        "with the 95 % interval of the paired t statistic; in bold where the interval excludes zero. One seed has no "
        "interval."
    )
    rows = []
    for item in result["comparison"]:
        cells: list[object] = list(row_cells(item))
        if item["clear"]:
            cells[3] = tag("b", cells[3])
        rows.append(cells)
    marked = ["student" if item["arm"] == "joint" else "" for item in result["comparison"]]
    return section("Joint against the others", html_table(HEAD, rows, marked=marked), lead=[lead])


def row_cells(item: Record) -> list[str]:
    """One row of the comparison as text, in the order of :data:`HEAD`."""
    difference, half = item["difference"], item["half"]
    return [
        item["target"],
        item["arm"],
        percent(item["quality"], 2),
        UNKNOWN if difference is None else points(difference / 100),
        UNKNOWN if half is None else f"{difference - half:+.1f} to {difference + half:+.1f}".replace("-", "−"),
        milliseconds(item["latency_ms"]),
        kib(item["size_bytes"]),
        f"{item['feasible']} of {item['seeds']}" if item["seeds"] else "no point",
        UNKNOWN if item["evaluations"] is None else f"{item['evaluations']:.0f}",
        duration(item["train_seconds"]),
    ]


def _equal(result: Record) -> Html:
    e = result["equal"]
    spent = duration(result["seconds"]) if result["seconds"] else f"those of the joint search's {e['trials']} trainings"
    error = UNKNOWN if e["table_error"] is None else percent(e["table_error"])
    items = [
        ("training seconds of a search", spent),
        ("training of a candidate", f"{e['epochs']} epochs, compressed before the last of them"),
        ("sent to the long training", f"{e['finalists']} an arm, {e['final_epochs']} epochs"),
        ("screening", f"table {e['table']}, error {error}, by which budgets are tightened"),
        ("reward", e["reward"]),
        ("strategy of joint and sequential", e["strategy"]),
        ("space", e["space"]),
        ("measured", "all arms' finalists and the teacher of a seed and target in one interleaved session"),
    ]
    arms = [f"{arm}: {LOOKS[arm][2]}" for arm in result["arms"]]
    return section("What was equal", pairs(items), tag("h3", "Arms"), bullets(arms), lead=[
        "The targets are shares of each seed's teacher, measured before any search. The test data were read once all "
        "searches of a seed were over, for the points alone."
    ])  # fmt: skip


def _phases(result: Record) -> Html:
    if "sequential" not in result["arms"]:
        return Html("")
    lead = (
        "Each phase searches the choices of its technique and of the distillation; what comes later waits at its plain "
        "value, what came before stays at the best of the phase before. Training seconds are shared out by the number "
        "of combinations (log₂), what a phase leaves goes to the next, and nothing is trained twice. Budgets on the "
        "way: every phase goes the same share of the way that the latency table says is open to it, on a log scale."
    )
    head = ("seed", "target", "phase", "budget ms", "trainings", "training time")
    rows = [
        [str(row["seed"]), point["target"], phase["name"], milliseconds(phase["limits"].get("latency_ms")),
         str(phase["evaluations"]), duration(phase["train_seconds"])]
        for row in result["arms"]["sequential"] for point in row["points"] for phase in point["phases"]
    ]  # fmt: skip
    return section("One after the other", html_table(head, rows), lead=[lead])


def ablation_table(result: Record) -> Table:
    """The comparison for a terminal."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    # Eighty columns: the difference and its interval share one.
    for i, name in enumerate((*HEAD[:3], "joint − arm, points", *HEAD[5:8], "training time")):
        table.add_column(Text(name.replace(" ", "\n")), justify="left" if i < 2 else "right", no_wrap=True)
    for item in result["comparison"]:
        cells = row_cells(item)
        short = [*cells[:3], _difference(item), *cells[5:8], cells[9]]
        table.add_row(*map(Text, short), style="bold green" if item["arm"] == "joint" else "")
    return table


def _difference(item: Record) -> str:
    if item["difference"] is None:
        return UNKNOWN
    half = "" if item["half"] is None else f" ± {item['half']:.1f}"
    return f"{item['difference']:+.1f}".replace("-", "−") + half


def headline(result: Record) -> list[str]:
    """Plain sentences, warnings first."""
    said = [f"Warning: {text}" for text in result["warnings"]]
    teacher = result["teacher"]
    said.append(
        f"Teacher: {percent(teacher['quality'], 2)} {result['metric']}, {milliseconds(teacher['latency_ms'])} ms, "
        f"{kib(teacher['size_bytes'])} KiB (mean of {teacher['seeds']})"
    )
    for item in result["comparison"]:
        if item["arm"] == "sequential" and item["difference"] is not None:
            sure = "clear of zero" if item["clear"] else "not clear of zero"
            interval = "one pair, no interval" if item["half"] is None else f"± {item['half']:.1f}, {sure}"
            said.append(f"{item['target']}: joint − sequential {points(item['difference'] / 100)} ({interval})")
    return said
