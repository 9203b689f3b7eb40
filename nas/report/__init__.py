"""What a search hands to people: the page ``report.html`` and the summary printed at the end of a run."""

from __future__ import annotations

from nas.report.html import render, write_report
from nas.report.terminal import headline, summary_table

__all__ = ["headline", "render", "summary_table", "write_report"]
