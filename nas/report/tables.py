"""The tables of the page: models, finalists, the winner's choices and every trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nas.report.formats import UNKNOWN, change, cost_name, duration, kib, milliseconds, percent, score, text
from nas.report.markup import Html, pairs, safe, table, tag
from nas.report.summary import Record, meets, number, part, ranked, records, rows_in_order, whole
from nas.report.terminal import COLUMNS, row_cells
from nas.report.words import ARMS, metric, who


def models(summary: Record) -> Html:
    """Teacher, baselines and student: the rows of the summary."""
    rows = rows_in_order(summary)
    marked = ["student" if item.get("name") == "student" else "" for item in rows]
    return table(["", f"test {metric(summary)}", *COLUMNS], (row_cells(summary, item) for item in rows), marked=marked)


def finalists(summary: Record) -> Html:
    """Finalists by falling measured reward, the winner marked."""
    items = ranked(records(summary, "finalists"))
    head = ["finalist", "measured reward", f"{metric(summary)} in the search", f"final validation {metric(summary)}"]
    head += ["predicted ms", "p50 ms", "p95 ms", "noise", "size KiB", "budget"]
    marked = ["student" if item.get("winner") else "" for item in items]
    return table(head, map(_finalist, items), marked=marked)


def masks(found: Record) -> Html:
    """Compression forms that no cost in the objective prefers, the most general first."""
    costs = [str(cost) for cost in found.get("costs") or []]

    def place(form: Record) -> tuple[bool, float]:
        return not form.get("everywhere"), -(number(form, "share") or 0.0)

    forms = sorted(records(found, "forms"), key=place)
    head = ["form", "masked", *(f"what it adds: {cost_name(cost)}" for cost in costs), "instead"]
    return table(head, (_mask(form, costs) for form in forms), class_="narrow")


def _mask(form: Record, costs: Sequence[str]) -> list[object]:
    excess = part(form, "excess")
    added = [change(number(excess, cost)) for cost in costs]
    return [text(form.get("name")), text(form.get("scope")), *added, text(form.get("plain"))]


def _finalist(item: Record) -> list[object]:
    noise = number(item, "noise")
    return [
        who(item).removeprefix("the ") + (" ★ winner" if item.get("winner") else ""),
        score(number(item, "reward")),
        percent(number(item, "quality_search")),
        percent(number(item, "quality_valid")),
        *(milliseconds(number(item, key)) for key in ("predicted_ms", "p50_ms", "p95_ms")),
        UNKNOWN if noise is None else f"±{percent(noise)}",
        kib(number(item, "size_bytes")),
        _budget(item),
    ]


def _budget(item: Record) -> Html:
    over = number(item, "violation")
    if over is None:
        return safe(UNKNOWN)
    return tag("span", "met", class_="good") if meets(item) else tag("span", f"over by {percent(over)}", class_="bad")


def corrections(loop: Record) -> Html:
    """Every finalist as it was predicted, as it was measured, and as the corrected table predicts it unseen."""
    head = ["finalist", "measured ms", "predicted ms", "error", "corrected ms", "error"]
    return table(head, map(_correction, records(loop, "rows")))


def _correction(item: Record) -> list[object]:
    measured, before, after = (number(item, key) for key in ("measured_ms", "before_ms", "after_ms"))
    return [
        text(item.get("name")),
        milliseconds(measured),
        milliseconds(before),
        _off(before, measured),
        milliseconds(after),
        _off(after, measured),
    ]


def _off(predicted: float | None, measured: float | None) -> str:
    return UNKNOWN if predicted is None or not measured else f"{100 * (predicted / measured - 1):+.1f} %"


def choices(candidate: Mapping[str, Any]) -> Html:
    """A candidate for people: choices named ``place.what`` as a grid of places and whats, the others as a list."""
    whole = [(key, value) for key, value in candidate.items() if "." not in key]
    places: dict[str, dict[str, Any]] = {}
    for key, value in candidate.items():
        place, dot, what = key.rpartition(".")
        if dot:
            places.setdefault(place, {})[what] = value
    whats = list(dict.fromkeys(what for values in places.values() for what in values))
    grid = ([place, *(values.get(what, "") for what in whats)] for place, values in places.items())
    shown = pairs(whole) if whole else Html("")
    return Html(shown + (table(["", *whats], grid, class_="narrow") if places else ""))


def trials(summary: Record, items: Sequence[dict[str, Any]]) -> Html:
    """Every trial of an arm in the order in which it was asked; failures with their reason."""
    head = ["trial", "status", f"validation {metric(summary)}", "reward", "predicted ms", "predicted KiB", "budget"]
    marked = ["" if meets(item) else "fails" for item in items]
    return table([*head, "took", "candidate"], map(_trial, items), marked=marked, class_="trials")


def _trial(item: Record) -> list[object]:
    status = text(item.get("status"))
    reason = item.get("reason")
    if not whole(item):
        status += f" at {percent(number(item, 'fidelity'))} of the training"
    if item.get("source") == "enqueued":
        status += ", enqueued"
    return [
        text(item.get("index")),
        f"{status}: {reason}" if reason else status,
        percent(number(item, "quality")),
        score(number(item, "reward")),
        milliseconds(number(item, "latency_ms")),
        kib(number(item, "size_bytes")),
        _budget(item),
        duration(number(item, "seconds")),
        "  ".join(f"{key}={value}" for key, value in part(item, "candidate").items()),
    ]


def arm_title(arm: str, items: Sequence[dict[str, Any]]) -> str:
    """``random search: 40 trials, 2 failed``; what they are worth where not all had the full training."""
    failed = sum(item.get("status") == "failed" for item in items)
    plural = "" if len(items) == 1 else "s"
    said = f"{ARMS.get(arm, arm)}: {len(items)} trial{plural}"
    if not all(map(whole, items)):
        said += f" worth {sum(number(item, 'fidelity') or 1.0 for item in items):.1f} full trainings"
    return said + (f", {failed} failed" if failed else "")
