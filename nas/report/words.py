"""Findings as plain sentences, shared by the page and the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from nas.report.formats import cost_name, cost_value, percent, score, times
from nas.report.summary import Record, meets, number, part, ranked, ratio, records, row, winner

ARMS = {"search": "search", "random": "random search", "uniform": "uniform teacher", "teacher": "teacher"}
_MEASURED = {"latency_ms": "p50_ms", "latency_p95_ms": "p95_ms", "size_bytes": "size_bytes"}


def metric(summary: Record) -> str:
    """The name of the quality."""
    return str(summary.get("quality_metric") or "quality")


def limit_words(limit: Mapping[str, Any]) -> str:
    """``median latency ≤ 0.400 ms``."""
    cost = str(limit.get("cost"))
    return f"{cost_name(cost)} ≤ {cost_value(cost, number(limit, 'limit'))}"


class BudgetLine(NamedTuple):
    """A budget in words, the student's value, how that is known, and whether it meets the budget (None: unknown)."""

    words: str
    value: str
    how: str
    met: bool | None


def budget_lines(summary: Record) -> list[BudgetLine]:
    """Every budget; on other devices nothing is measured, so that there it is judged by what was predicted."""
    student, found = row(summary, "student"), []
    for limit in records(summary, "limits"):
        cost = str(limit.get("cost"))
        predicted = number(part(student, "predicted_elsewhere"), cost)
        value = number(student, _MEASURED.get(cost, cost)) if predicted is None else predicted
        bound = number(limit, "limit")
        met = None if bound is None or value is None else value <= bound
        how = "measured" if predicted is None else "predicted"
        found.append(BudgetLine(limit_words(limit), cost_value(cost, value), how, met))
    return found


def who(finalist: Record) -> str:
    """A finalist by name: ``trial 12``, or its arm where it is not the search's own."""
    index, arm = number(finalist, "index"), str(finalist.get("arm") or "search")
    if arm in ("teacher", "uniform"):
        return f"the {ARMS[arm]}"
    name = "an unnumbered trial" if index is None else f"trial {index:.0f}"
    return name if arm == "search" else f"{name} of the {ARMS.get(arm, arm)}"


def student_sentence(summary: Record) -> str:
    """Quality, speed and size of the student beside the teacher's, in one sentence."""
    student, teacher = row(summary, "student"), row(summary, "teacher")
    if not student:
        return "No student was made."
    quality, base = number(student, "quality"), number(teacher, "quality")
    said = [f"{metric(summary)} {percent(quality)}" + (f" (teacher {percent(base)})" if base is not None else "")]
    speed, small = ratio(teacher, student, "p50_ms"), ratio(teacher, student, "size_bytes")
    if speed is not None:
        said.append(comparison(speed, "faster", "slower") + " as measured")
    if small is not None:
        said.append(comparison(small, "smaller", "larger"))
    return "Student: " + ", ".join(said) + "."


def comparison(factor: float, better: str, worse: str) -> str:
    """``3.7× faster``, or ``1.2× slower`` when the factor is below 1."""
    return f"{times(factor)} {better}" if factor >= 1 else f"{times(1 / factor)} {worse}"


def table_sentence(summary: Record) -> str:
    """The latency table that priced the search, its error and the noise it cannot go below."""
    table = part(summary, "table")
    if not table:
        return "No latency table was used."
    error, entries = part(table, "error"), number(table, "entries")
    where = ", ".join(str(item) for item in (table.get("device"), _entries(entries)) if item)
    wrong, noise = number(error, "mape"), number(table, "noise")
    tail = f"its error was not checked, noise floor {percent(noise)}."
    if wrong is not None:
        tail = f"predictions are off by {percent(wrong)} on average, noise floor {percent(noise)}."
    return f"Latency table {table.get('name') or 'without a name'}{f' ({where})' if where else ''}: {tail}"


def loop_sentence(summary: Record) -> str:
    """How far the table was off on what was measured in the end, and how far it is now; "" where nothing was."""
    loop = part(part(summary, "table"), "finalists")
    before, after = number(part(loop, "before"), "mape"), number(part(loop, "after"), "mape")
    if before is None:
        return ""
    claim, noise = percent(number(loop, "claim")), percent(number(loop, "noise"))
    verdict = "more than" if loop.get("exceeded") else "within"
    said = (
        f"The finalists, measured end to end, were predicted {percent(before)} off on average: {verdict} what the "
        f"table claims ({claim}) and their own noise ({noise}). Corrected by the other finalists, the table is "
        f"{percent(after)} off."
    )
    new = number(loop, "newly_measured")
    return said + (f" {new:.0f} of their parts had only been interpolated and were measured with them." if new else "")


def _entries(entries: float | None) -> str:
    return "" if entries is None else f"{entries:.0f} entries"


def why_sentences(summary: Record) -> list[str]:
    """Why the winner won: among whom, against whom, under which budget, and how far the search can be trusted."""
    best, finalists = winner(summary), ranked(records(summary, "finalists"))
    if not best:
        return ["No finalist was marked as the winner."]
    rivals = [item for item in finalists if item is not best]
    said = [_selection(best, rivals)]
    able = [item for item in rivals if meets(item)]
    if able:
        said.append(_runner_up(best, able[0]))
    said += [
        f"Budget: {words}; the student's is {value}, {how}{_met(met)}."
        for words, value, how, met in budget_lines(summary)
    ]
    arm = str(best.get("arm") or "search")
    if arm != "search":
        said.append(
            f"The winner came from the {ARMS.get(arm, arm)}: the search found nothing better under this budget."
        )
    return [*said, rank_sentence(number(summary, "rank_correlation"))]


def _met(met: bool | None) -> str:
    return "" if met is None else ", which meets it" if met else ", which breaks it"


def _selection(best: Record, rivals: list[dict[str, Any]]) -> str:
    mine = number(best, "reward")
    name = _capital(who(best))
    if mine is None or not rivals:
        return f"{name} became the student{'' if rivals else '; it was the only finalist'}."
    higher = [item for item in rivals if (reward := number(item, "reward")) is not None and reward > mine]
    among = f"among the {len(rivals) + 1} finalists that were trained in full, exported and measured"
    if not higher:
        return f"{name} has the highest measured reward, {score(mine)}, {among}."
    if not any(meets(item) for item in higher) and meets(best):
        these = (
            "1 finalist with a higher reward breaks"
            if len(higher) == 1
            else f"{len(higher)} finalists with a higher reward break"
        )
        return (
            f"{name} has the highest measured reward, {score(mine)}, of those that meet the budget {among}; {these} it."
        )
    best_other = higher[0]
    also = " and meets the budget too" if meets(best_other) else ""
    return (
        f"{name} became the student with a measured reward of {score(mine)}, {among}; "
        f"{who(best_other)} scored higher ({score(number(best_other, 'reward'))}){also}."
    )


def _runner_up(best: Record, next_best: Record) -> str:
    reward = score(number(next_best, "reward"))
    return f"Beside {who(next_best)}, the best of the others (reward {reward}), the winner has {_gap(best, next_best)}."


def baseline_sentences(summary: Record) -> list[str]:
    """The student beside each baseline, on the test data."""
    # Rows carry no noise of their own; the table's is that of the same device.
    student = {"noise": part(summary, "table").get("noise"), **row(summary, "student")}
    names = {"random": "the best of random search", "uniform": "the uniformly compressed teacher"}
    return [
        f"Beside {text}, the student has {_gap(student, row(summary, name), 'quality')}."
        for name, text in names.items()
        if row(summary, "student") and row(summary, name)
    ]


def _gap(ours: Record, theirs: Record, quality: str = "quality_valid") -> str:
    """How two measured models differ, saying so where the difference in latency is within the noise."""
    said = []
    a, b = number(ours, quality), number(theirs, quality)
    if a is not None and b is not None:
        amount = f"{100 * abs(a - b):.1f} points"
        said.append("the same quality" if abs(a - b) < 0.0005 else _more_or_less(a - b, amount, "quality"))
    a, b = number(ours, "p50_ms"), number(theirs, "p50_ms")
    if a and b:
        noise = max(number(ours, "noise") or 0.0, number(theirs, "noise") or 0.0)
        change = a / b - 1
        same = "a latency that the noise cannot tell apart"
        said.append(same if abs(change) <= noise else _more_or_less(change, percent(abs(change), 0), "latency"))
    return " and ".join(said) or "no measured figures to compare"


def _more_or_less(change: float, amount: str, what: str) -> str:
    return f"{amount} {'more' if change > 0 else 'less'} {what}"


def rank_sentence(value: float | None) -> str:
    """What the rank correlation of the search's estimate with the final quality says."""
    if value is None:
        return "Too few finalists to tell how well the search's short trainings predict the final quality."
    verdict = (
        "its short trainings order candidates well"
        if value >= 0.7
        else "its short trainings are a rough guide"
        if value >= 0.3
        else "its short trainings say little about the final order, so longer ones would be worth their time"
    )
    found = f"a rank correlation of {score(value, 2)}"
    return f"Over the finalists, search quality and final quality have {found}: {verdict}."


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def mask_sentences(summary: Record) -> list[str]:
    """What was masked before the search, and by what measure."""
    found = part(summary, "masks")
    costs = " or ".join(cost_name(str(cost)) for cost in found.get("costs") or [])
    if found.get("on") is False:
        return ["Nothing was masked: search.mask is false."]
    if not records(found, "forms"):
        why = f": by the latency table every compression form lowers {costs} wherever it is offered" if costs else ""
        return [f"Nothing was masked{why}."]
    return [
        f"By the latency table these forms do not lower {costs or 'any cost'}, all else equal, so the search put the "
        "uncompressed form in their place before anything was trained. What they add is the average over the "
        "candidates where they were masked. Candidates keep their identity: what was evaluated here serves other "
        "devices too."
    ]
