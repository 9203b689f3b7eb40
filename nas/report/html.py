"""The report of a run: one HTML file that needs no network, no server and no other file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nas.errors import StudentError
from nas.report import figures, lookup, tables
from nas.report.calibration import calibration
from nas.report.drawing import Fragments
from nas.report.formats import UNKNOWN, count, duration, kib, milliseconds, percent, points, score, text, times
from nas.report.markup import Html, bullets, pairs, paragraphs, tag
from nas.report.page import page, save_page, section
from nas.report.summary import Record, number, part, ratio, read_summary, records, row, whole, winner
from nas.report.words import (
    baseline_sentences,
    budget_lines,
    limit_words,
    loop_sentence,
    mask_sentences,
    metric,
    table_sentence,
    why_sentences,
)


def render(summary: dict[str, Any]) -> str:
    """The summary of a run as one HTML document with everything that it needs inside."""
    name = str(summary.get("name") or "search")
    drawings = Fragments()
    return page(
        f"{name}: search report",
        [
            _header(summary, name),
            _warnings(summary),
            _cards(summary),
            _result(summary),
            _front(summary, drawings),
            _why(summary),
            _trace(summary, drawings),
            _calibration(summary, drawings),
            _masks(summary),
            _provenance(summary),
            _trials(summary),
        ],
    )


def write_report(run: Path) -> Path:
    """Writes ``run/report.html`` from ``run/summary.json``, whole or not at all, and returns its path.

    Raises:
        StudentError: the summary is missing or malformed, or the page cannot be written.
    """
    target = run / "report.html"
    summary = read_summary(run)
    content = lookup.render(summary) if lookup.is_lookup(summary) else render(summary)
    return save_page(target, content, StudentError)


def _header(summary: Record, name: str) -> Html:
    created = str(summary.get("created") or "")[:16].replace("T", " ")
    facts = [created, f"seed {text(summary.get('seed'))}", duration(number(summary, "seconds"))]
    return tag("header", tag("h1", name), tag("p", " · ".join(fact for fact in facts if fact), class_="soft"))


def _warnings(summary: Record) -> Html:
    warnings = summary.get("warnings") or []
    return section("Before you rely on this", bullets(warnings), class_="warnings") if warnings else Html("")


def _cards(summary: Record) -> Html:
    student, teacher = row(summary, "student"), row(summary, "teacher")
    quality, base = number(student, "quality"), number(teacher, "quality")
    beside = f"{points(quality - base)} against the teacher" if quality is not None and base is not None else ""
    speed, small = ratio(teacher, student, "p50_ms"), ratio(teacher, student, "size_bytes")
    cards = [
        _card(f"test {metric(summary)}", percent(quality), beside),
        _factor_card(speed, ("faster, measured", "slower, measured"), _before_after(teacher, student, "p50_ms")),
        _factor_card(small, ("smaller", "larger"), _before_after(teacher, student, "size_bytes")),
    ]
    for words, value, how, met in budget_lines(summary):
        mark = {True: "good", False: "bad", None: ""}[met]
        verdict = {True: ", met", False: ", NOT met", None: ""}[met]
        cards.append(_card("budget" if how == "measured" else f"budget, {how}", value, f"{words}{verdict}", mark))
    return tag("div", *cards, class_="cards")


def _card(label: str, figure: str, note: str, mark: str = "") -> Html:
    return tag(
        "div", tag("span", label, class_="label"), tag("b", figure, class_=mark), tag("span", note), class_="card"
    )


def _factor_card(factor: float | None, ways: tuple[str, str], note: str) -> Html:
    """A factor in the direction in which it is above 1."""
    if factor is None:
        return _card(ways[0], UNKNOWN, note)
    return _card(ways[0] if factor >= 1 else ways[1], times(max(factor, 1 / factor)), note)


def _before_after(teacher: Record, student: Record, key: str) -> str:
    before, after = number(teacher, key), number(student, key)
    form, unit = (kib, "KiB") if key == "size_bytes" else (milliseconds, "ms")
    return f"{form(before)} → {form(after)} {unit}" if before is not None or after is not None else ""


def _result(summary: Record) -> Html:
    lead = (
        "Quality on the test data, which neither training nor search has seen. p50 and p95 are the median and the 95th "
        "percentile of the latency of the exported model, measured on the device; predicted is what its latency table "
        "said before."
    )
    blocks = [tables.models(summary), paragraphs(baseline_sentences(summary))]
    if row(summary, "student") and summary.get("student_dir"):
        where = f"cd {summary['student_dir']}\npython predict.py --selftest"
        blocks += [tag("h3", "Run the student"), tag("pre", where)]
    return section("What you got", *blocks, lead=[lead])


def _front(summary: Record, drawings: Fragments) -> Html:
    lead = (
        f"Up and left is better. Small marks are what the search saw: {metric(summary)} after a short training, "
        "latency as predicted. Large marks are models trained in full, exported and measured; their bars are the noise "
        "of the measurement."
    )
    below = figures.below_view(summary)
    missing = f"Trials that collapsed and lie below this view: {below}; double-click to see them." if below else ""
    return section("Quality against latency", drawings.html(figures.front(summary)), lead=filter(None, [lead, missing]))


def _why(summary: Record) -> Html:
    best = winner(summary)
    blocks = [paragraphs(why_sentences(summary)), tables.finalists(summary)]
    if part(best, "candidate"):
        blocks += [tag("h3", "What the search chose"), tables.choices(best["candidate"])]
    return section("Why this model won", *blocks)


def _trace(summary: Record, drawings: Fragments) -> Html:
    reward = part(summary, "reward")
    target = number(reward, "target")
    aim = f" with a target of {milliseconds(target)} ms" if target else ""
    asked = part(summary, "screened")
    trained = "" if all(map(whole, records(summary, "trials"))) else "fully trained "
    lead = (
        f"Every {trained}trial's reward ({reward.get('kind') or 'kind unknown'}{aim}), and the best so far among those "
        "within budget. A search is worth its time where its line lies above that of random search."
    )
    screened = ""
    if number(asked, "asked") is not None:
        screened = (
            f"Candidates proposed: {count(number(asked, 'asked'))}, of which {count(number(asked, 'infeasible'))} were "
            f"turned away untrained because they would break a budget and {count(number(asked, 'duplicates'))} because "
            "they had been tried."
        )
    return section("The search", drawings.html(figures.trace(summary)), lead=filter(None, [lead, screened]))


def _calibration(summary: Record, drawings: Fragments) -> Html:
    lead = (
        "Each point is a network that was priced from the latency table and then measured whole. The band is the noise "
        "floor: two measurements of one network differ by that much, so no prediction can do better. Below, the same "
        "points as errors of the prediction."
    )
    loop = part(part(summary, "table"), "finalists")
    checked = [paragraphs([loop_sentence(summary)]), tables.corrections(loop)] if loop else []
    return section("Can the latency table be trusted?", drawings.html(calibration(summary)), *checked, lead=[lead])


def _masks(summary: Record) -> Html:
    found = part(summary, "masks")
    if not found:
        return Html("")
    forms = records(found, "forms")
    return section(
        "Compression that does not pay on this device", *([tables.masks(found)] if forms else []),
        lead=mask_sentences(summary),
    )  # fmt: skip


def _provenance(summary: Record) -> Html:
    made, error = part(summary, "table"), part(part(summary, "table"), "error")
    if not made:
        return section("The latency table", lead=[table_sentence(summary)])
    items = [
        ("table", made.get("name") or UNKNOWN),
        ("device", made.get("device") or UNKNOWN),
        ("entries", count(number(made, "entries"))),
        ("noise floor", percent(number(made, "noise"))),
        ("mean error (MAPE)", percent(number(error, "mape"))),
        ("predictions within 5 %", percent(number(error, "within_5"), 0)),
        ("rank correlation with measurements", score(number(error, "spearman"), 2)),
        ("budgets", "; ".join(map(limit_words, records(summary, "limits"))) or "none"),
        ("SHA-256", made.get("sha256") or UNKNOWN),
    ]
    return section("The latency table", pairs(items))


def _trials(summary: Record) -> Html:
    arms = {"search": records(summary, "trials")}
    arms |= {str(arm): records(part(summary, "baseline_trials"), arm) for arm in part(summary, "baseline_trials")}
    folded = [
        tag("details", tag("summary", tables.arm_title(arm, items)), tables.trials(summary, items))
        for arm, items in arms.items()
    ]
    return section("Every trial", *folded)
