"""The frame of the page: style, policy and the order of its sections."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from nas.errors import NasError
from nas.files import write_atomic
from nas.report.markup import Html, paragraphs, safe, tag

# The page may run its own script and style and nothing else: a browser that honours this cannot leak a run.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; base-uri 'none'; form-action 'none'"
)

STYLE = """
:root { color-scheme: light; --ink: #1f2933; --soft: #5c6b7a; --line: #e1e6eb; --paper: #fff; --wash: #f5f7f9;
  --green: #0b8a5f; --red: #b42f2f; }
* { box-sizing: border-box; }
html { background: var(--wash); }
body { margin: 0 auto; max-width: 1120px; padding: 40px 24px 64px; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -.015em; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 20px; line-height: 1.3; letter-spacing: -.01em; margin: 0 0 6px; }
h3 { font-size: 15px; margin: 22px 0 6px; }
p { margin: 6px 0; max-width: 92ch; }
.soft { color: var(--soft); font-size: 14.5px; }
header { margin-bottom: 24px; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 22px 24px;
  margin-top: 18px; }
.warnings { background: #fff8e6; border-color: #efd28a; }
.warnings ul { margin: 4px 0 0; padding-left: 20px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 14px; margin-top: 18px; }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px; }
.card b { display: block; font-size: 32px; line-height: 1.2; letter-spacing: -.02em; font-weight: 650;
  font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: 14px; }
.card .label { display: block; font-weight: 600; }
.good { color: var(--green); } .bad { color: var(--red); }
pre { background: var(--wash); border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; margin: 10px 0 0;
  overflow-x: auto; font: 14px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.scroll { overflow-x: auto; margin-top: 12px; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 12px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 8px; }
thead th { color: var(--soft); font-weight: 600; font-size: 13px; vertical-align: bottom; white-space: normal; }
tbody th { font-weight: 500; }
tbody tr:last-child > * { border-bottom: 0; }
tr.student > * { background: #eaf6f1; font-weight: 650; }
tr.fails > * { color: var(--soft); }
table.narrow { width: auto; }
table.trials { font-size: 13px; } table.trials th, table.trials td { padding: 4px 10px; }
table.trials td:last-child { text-align: left; color: var(--soft); }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 12px 24px; margin: 14px 0 0; }
dt { color: var(--soft); font-size: 13px; } dd { margin: 0; overflow-wrap: anywhere; }
.figure { margin: 12px -8px 0; }
details summary { cursor: pointer; font-weight: 600; font-size: 16px; }
details + details { margin-top: 14px; }
@media (max-width: 640px) { body { padding: 20px 12px 40px; } section { padding: 16px 14px; }
  .card b { font-size: 26px; } }
@media print { html { background: #fff; } section, .card { break-inside: avoid; } }
"""


def page(title: str, content: Iterable[Html]) -> str:
    """A whole document around its sections."""
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{safe(title)}</title><style>{STYLE}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(content) + "\n</body></html>\n"


def section(title: str, *content: Html, lead: Iterable[str] = (), class_: str = "") -> Html:
    """A titled block; ``lead`` says in words how to read what follows."""
    return tag("section", tag("h2", title), paragraphs(lead, "soft"), *content, class_=class_)


def save_page(target: Path, content: str, failure: type[NasError]) -> Path:
    """Write a page, whole or not at all; returns its path. Raises ``failure`` where it cannot be written."""
    try:
        write_atomic(target, content)
    except OSError as error:
        raise failure(f"{target} cannot be written: {error}.", remedy="free space or mend its rights") from error
    return target
