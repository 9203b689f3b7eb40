"""The report of a sweep: one HTML file, and the table at the end of the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from nas.errors import StudyError
from nas.report.drawing import Fragments
from nas.report.formats import UNKNOWN, duration
from nas.report.markup import Html, tag
from nas.report.markup import table as html_table
from nas.report.page import page, save_page, section
from nas.sweep import figures
from nas.sweep.figures import Record, number
from nas.sweep.parameter import text
from nas.sweep.result import read_result

_SHOWN = 15  # rows of the table on a terminal


def write_report(folder: Path) -> Path:
    """Writes ``report.html`` from ``sweep.json``, whole or not at all, and returns its path.

    Raises:
        StudyError: there is no sweep, or the page cannot be written.
    """
    target = folder / "report.html"
    content = render(read_result(folder))
    return save_page(target, content, StudyError)


def render(sweep: Record) -> str:
    """The result of a sweep as one HTML document with everything that it needs inside."""
    drawings = Fragments()
    blocks = [_header(sweep), _best(sweep)]
    if figures.complete(sweep):
        blocks += [_history(sweep, drawings), _importances(sweep, drawings), _parallel(sweep, drawings)]
        blocks.append(_slices(sweep, drawings))
    if any(trial["intermediate"] for trial in sweep["trials"]):
        blocks.append(_curves(sweep, drawings))
    return page(f"{sweep['name']}: sweep report", [*blocks, _trials(sweep)])


def _header(sweep: Record) -> Html:
    experiment = sweep["experiment"] if isinstance(sweep["experiment"], str) else ""
    subject = experiment or sweep["function"] or sweep["command"] or "an experiment"
    created = str(sweep["created"])[:16].replace("T", " ")
    facts = [created, f"sweep of {subject}", sweep["sampler"], f"seed {sweep['seed']}", duration(sweep["seconds"])]
    return tag("header", tag("h1", sweep["name"]), tag("p", " · ".join(facts), class_="soft"))


def _best(sweep: Record) -> Html:
    best = sweep["best"]
    if best is None:
        return section("The best trial", lead=["No trial was completed; the reasons are below."], class_="warnings")
    lead = f"Trial {best['index']}: {sweep['metric']} {number(best['value'])}, {_goal(sweep)}."
    rows = [[key, text(value)] for key, value in best["values"].items()]
    blocks = [html_table(["key", "value"], rows, class_="narrow")]
    if best["command"]:
        blocks += [tag("h3", "Run it"), tag("pre", best["command"])]
    return section("The best trial", *blocks, lead=[lead])


def _goal(sweep: Record) -> str:
    way = "highest" if sweep["direction"] == "maximize" else "lowest"
    return f"the {way} of {len(figures.complete(sweep))} complete trials, those within budget first"


def _history(sweep: Record, drawings: Fragments) -> Html:
    lead = f"Every complete trial's {sweep['metric']}, and the best so far among those within budget."
    return section("History", drawings.html(figures.history(sweep)), lead=[lead])


def _importances(sweep: Record, drawings: Fragments) -> Html:
    if not sweep["importances"]:
        return section("What mattered", lead=[f"Not known: {sweep['importances_note']}."])
    lead = (
        "How much of the metric's variance over what was varied each parameter explains, alone and together with the "
        "others (fANOVA). With few trials this is a rough guide."
    )
    return section("What mattered", drawings.html(figures.importances(sweep)), lead=[lead])


def _parallel(sweep: Record, drawings: Fragments) -> Html:
    lead = "One line per complete trial, the better the darker, the best in green."
    return section("All parameters", drawings.html(figures.parallel(sweep)), lead=[lead])


def _slices(sweep: Record, drawings: Fragments) -> Html:
    drawn = (drawings.html(figures.slice_of(sweep, parameter)) for parameter in sweep["parameters"])
    return section("Each parameter", *drawn, lead=["Every complete trial's metric against one parameter at a time."])


def _curves(sweep: Record, drawings: Fragments) -> Html:
    lead = "What the trials reported on their way; those that were pruned end in a cross, the best is green."
    return section("On the way", drawings.html(figures.curves(sweep)), lead=[lead])


def _trials(sweep: Record) -> Html:
    head, rows = table_cells(sweep)
    marked = ["student" if i == 0 and row["value"] is not None else "fails" if row["value"] is None else ""
              for i, row in enumerate(sweep["trials"])]  # fmt: skip
    return section("Every trial", html_table(head, rows, marked=marked, class_="trials"))


def table_cells(sweep: Record) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of the table of trials, best first."""
    keys = [p["key"] for p in sweep["parameters"]]
    names = list(dict.fromkeys(name for t in sweep["trials"] for name in t["figures"]))
    others = [name for name in names if name not in (sweep["metric"], "violation")]
    head = ["trial", sweep["metric"], *keys, *others, "over budget", "took", "status"]
    return head, [_row(trial, keys, others) for trial in sweep["trials"]]


def _row(trial: Record, keys: list[str], others: list[str]) -> list[str]:
    values, measured = trial["values"], trial["figures"]
    status = f"{trial['status']}: {trial['reason']}" if trial["reason"] else str(trial["status"])
    return [
        str(trial["index"]),
        UNKNOWN if trial["value"] is None else number(trial["value"]),
        *(_short(values[key]) if key in values else UNKNOWN for key in keys),
        *(number(measured[name]) if name in measured else UNKNOWN for name in others),
        f"{100 * trial['violation']:.1f} %" if trial["violation"] else "",
        duration(trial["seconds"]) if trial["status"] != "running" else UNKNOWN,
        status,
    ]


def _short(value: Any) -> str:
    return number(value) if isinstance(value, float) else text(value)


def sweep_table(sweep: Record) -> Table:
    """The best trials for a terminal."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("trial", sweep["metric"], "over budget", "took"):
        table.add_column(Text(name.replace(" ", "\n")), justify="right", no_wrap=True)
    table.add_column("values")
    for i, trial in enumerate(sweep["trials"][:_SHOWN]):
        index, value, *_, over, took, status = _row(trial, [], [])
        values = "  ".join(f"{key}={_short(value)}" for key, value in trial["values"].items())
        cells = (index, value, over, took, values if trial["value"] is not None else f"{status} ({values})")
        table.add_row(*map(Text, cells), style="bold green" if i == 0 and sweep["best"] is not None else "")
    return table


def headline(sweep: Record) -> list[str]:
    """Plain sentences about a sweep."""
    counts = {
        status: sum(t["status"] == status for t in sweep["trials"])
        for status in ("complete", "pruned", "failed", "running")
    }
    said = [f"{len(sweep['trials'])} trials: " + ", ".join(f"{n} {status}" for status, n in counts.items() if n)]
    if sweep["importances"]:
        shares = (f"{key} {100 * share:.0f} %" for key, share in sweep["importances"].items())
        said.append("Importances: " + ", ".join(shares))
    else:
        said.append(f"Importances: not known, {sweep['importances_note']}")
    if (best := sweep["best"]) is not None:
        said.append(f"Best: trial {best['index']}, {sweep['metric']} {number(best['value'])}")
        if best["command"]:
            said.append(best["command"])
    return said
