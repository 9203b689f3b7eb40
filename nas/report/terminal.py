"""The end of a run on a terminal: the summary table and the sentences around it."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from nas.report.formats import UNKNOWN, count, kib, milliseconds, percent, times
from nas.report.summary import Record, number, ratio, row, rows_in_order
from nas.report.words import budget_lines, metric, student_sentence, table_sentence

COLUMNS = ("predicted ms", "p50 ms", "p95 ms", "speed-up", "size KiB", "× smaller", "MACs")


def summary_table(summary: Record) -> Table:
    """Teacher, baselines and student: test quality, predicted and measured latency, size and MACs."""
    table = Table(box=box.SIMPLE_HEAD, title=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", min_width=15)  # wraps before any number is cut
    for name in (f"test {metric(summary)}", *COLUMNS):
        # One word a line keeps the table within eighty columns or little more.
        table.add_column(Text(name.replace(" ", "\n")), justify="right", no_wrap=True)
    for item in rows_in_order(summary):
        style = "bold green" if item.get("name") == "student" else ""
        # Text, not str: a name from a file is never read as markup.
        table.add_row(*(Text(cell) for cell in row_cells(summary, item)), style=style)
    return table


def row_cells(summary: Record, item: Record) -> list[str]:
    """One row as text: label, quality, then ``COLUMNS``."""
    teacher = row(summary, "teacher")
    itself = item.get("name") == "teacher"
    return [
        str(item.get("label") or item.get("name")),
        percent(number(item, "quality")),
        milliseconds(number(item, "predicted_ms")),
        milliseconds(number(item, "p50_ms")),
        milliseconds(number(item, "p95_ms")),
        UNKNOWN if itself else times(ratio(teacher, item, "p50_ms")),
        kib(number(item, "size_bytes")),
        UNKNOWN if itself else times(ratio(teacher, item, "size_bytes")),
        count(number(item, "macs")),
    ]


def headline(summary: Record) -> list[str]:
    """Plain sentences, warnings first; they are text, so print them with markup off."""
    said = [f"Warning: {text}" for text in summary.get("warnings") or []]
    said.append(student_sentence(summary))
    for words, value, how, met in budget_lines(summary):
        said.append(f"Budget {words}: {how} {value}" + {True: ", met.", False: ", NOT met.", None: "."}[met])
    if row(summary, "student") and summary.get("student_dir"):
        said.append(f"It lies in {summary['student_dir']}; try it there with: python predict.py --selftest")
    return [*said, table_sentence(summary)]
