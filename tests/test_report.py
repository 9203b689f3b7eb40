"""The report: everything that was tried is on the page, nothing on it reaches out, and it draws in a browser."""

from __future__ import annotations

import copy
import json
import re
import shutil
import struct
import subprocess
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from nas.errors import StudentError
from nas.report import figures, formats, headline, render, summary_table, tables, words, write_report
from nas.report.calibration import calibration
from nas.report.summary import rows_in_order, winner
from nas.reward import MnasNetSoft

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LIMIT_MS = 0.4


def make_candidate(rng: np.random.Generator) -> dict[str, Any]:
    candidate: dict[str, Any] = {
        "resolution": int(rng.choice([16, 20, 24, 28])),
        "pruning": float(rng.choice([0, 0.3])),
    }
    for stage in range(4):
        candidate |= {
            f"stage{stage}.depth": int(rng.integers(1, 4)),
            f"stage{stage}.width": int(rng.choice([8, 16, 24])),
            f"stage{stage}.kernel": int(rng.choice([3, 5])),
            f"stage{stage}.bits": int(rng.choice([8, 32])),
        }
    return candidate


def make_trials(rng: np.random.Generator, n: int, skill: float) -> list[dict[str, Any]]:
    """Trials whose latency and quality go together; ``skill`` is how much of the noise is learned away by the end."""
    trials = []
    for index in range(n):
        ms = float(np.exp(rng.normal(-1.1, 0.45)))
        luck = abs(rng.normal(0, 0.03)) * (1 - skill * index / n)
        quality = 0.985 - 0.0045 / ms**1.5 - luck
        trial = {"index": index, "status": "complete", "candidate": make_candidate(rng), "quality": float(quality)}
        trial |= {"reward": float(MnasNetSoft(LIMIT_MS)(quality, ms)), "latency_ms": ms, "size_bytes": 2.4e5 * ms}
        trials.append(
            trial | {"violation": max(0.0, ms / LIMIT_MS - 1), "reason": "", "seconds": float(rng.uniform(2, 5))}
        )
    trials[5] |= {"status": "failed", "quality": None, "reward": None, "reason": "loss is not finite"}
    trials[7] |= {"quality": 0.31, "reward": 0.31}
    return trials


def make_finalists(rng: np.random.Generator, trials: list[dict[str, Any]], arm: str, n: int) -> list[dict[str, Any]]:
    able = sorted((t for t in trials if t["reward"] and t["violation"] == 0), key=lambda t: -t["reward"])[:n]
    finalists = []
    for trial in able:
        ms, quality = trial["latency_ms"] * rng.normal(1.01, 0.015), trial["quality"] + 0.006 + rng.normal(0, 0.0015)
        found = {
            "index": trial["index"],
            "arm": arm,
            "candidate": trial["candidate"],
            "quality_search": trial["quality"],
        }
        found |= {"quality_valid": float(quality), "predicted_ms": trial["latency_ms"], "p50_ms": float(ms)}
        found |= {"p95_ms": float(ms * 1.15), "noise": 0.02, "size_bytes": trial["size_bytes"], "winner": False}
        reward = float(MnasNetSoft(LIMIT_MS)(quality, ms))
        finalists.append(found | {"reward": reward, "violation": max(0.0, ms / LIMIT_MS - 1)})
    return finalists


def make_row(name: str, label: str, like: dict[str, Any]) -> dict[str, Any]:
    keys = ("quality_valid", "predicted_ms", "p50_ms", "p95_ms", "size_bytes")
    found = {key: like[key] for key in keys} | {"quality": like["quality_valid"] - 0.003}
    return {"name": name, "label": label, **found, "macs": int(4e6 * like["p50_ms"]), "params": 45678}


def make_summary(seed: int = 0, n: int = 60) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    trials, lottery = make_trials(rng, n, 0.8), make_trials(rng, n, 0.0)
    finalists = make_finalists(rng, trials, "search", 6) + make_finalists(rng, lottery, "random", 2)
    uniform = {"index": None, "arm": "uniform", "candidate": None, "quality_search": None, "quality_valid": 0.968}
    uniform |= {"predicted_ms": 0.44, "p50_ms": 0.45, "p95_ms": 0.5, "noise": 0.02, "size_bytes": 310000}
    finalists.append(uniform | {"reward": 0.95, "violation": 0.125, "winner": False})
    best = max((f for f in finalists if f["violation"] == 0 and f["arm"] == "search"), key=lambda f: f["reward"])
    best["winner"] = True
    second = max((f for f in finalists if f["arm"] == "random"), key=lambda f: f["reward"])
    teacher = {"quality_valid": 0.992, "predicted_ms": 1.46, "p50_ms": 1.49, "p95_ms": 1.71, "size_bytes": 1268736}
    ms = np.exp(rng.uniform(-2, 0.6, 40))
    nets = [{"predicted_ms": float(a), "measured_ms": float(a * rng.normal(1, 0.012))} for a in ms]
    return {
        "schema_version": 1,
        "name": "digits",
        "created": "2025-03-14T10:20:30+00:00",
        "seed": seed,
        "seconds": 291.2,
        "warnings": [
            "The machine's clock speed changed during measurement: latencies may be off by more than the noise."
        ],
        "quality_metric": "accuracy",
        "rows": [
            make_row("student", "student", best),
            make_row("teacher", "teacher (fp32)", teacher),
            make_row("random", "random search", second),
            make_row("uniform", "uniform teacher (int8)", uniform),
        ],
        "trials": trials,
        "baseline_trials": {"random": lottery},
        "finalists": finalists,
        "limits": [{"cost": "latency_ms", "limit": LIMIT_MS}, {"cost": "size_bytes", "limit": 120000}],
        "reward": {"kind": "mnasnet_soft", "target": LIMIT_MS},
        "table": {
            "name": "bench-cpu-1t",
            "device": "x86-64 CPU, 1 thread, batch 1",
            "entries": 293,
            "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
            "noise": 0.012,
            "error": {"mape": 0.01, "within_5": 0.98, "spearman": 0.99},
            "nets": nets,
        },
        "rank_correlation": 0.8,
        "screened": {"asked": 500, "infeasible": 300, "duplicates": 4},
        "student_dir": "runs/digits/student",
    }


class Page(HTMLParser):
    """What a browser would load, and the text that it would show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.shown: list[str] = []
        self._silent = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._silent += tag in ("script", "style")
        self.loads += [
            f"{tag} {key}={value}" for key, value in attrs if key in ("src", "href", "srcset", "data", "action")
        ]

    def handle_endtag(self, tag: str) -> None:
        self._silent -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.shown.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.shown).split())


@pytest.fixture
def summary() -> dict[str, Any]:
    return make_summary()


def blank_summary(**more: Any) -> dict[str, Any]:
    lists: dict[str, Any] = {key: [] for key in ("rows", "trials", "finalists", "limits", "warnings")}
    return {"schema_version": 1, "name": "empty", **lists, **more}


def unknown(
    value: Any,
    keep: frozenset[str] = frozenset({"schema_version", "name", "status", "arm", "cost", "candidate", "warnings"}),
) -> Any:
    """The same summary with every leaf null but for those that name things."""
    if isinstance(value, dict):
        return {key: item if key in keep else unknown(item) for key, item in value.items()}
    return [unknown(item) for item in value] if isinstance(value, list) else None


def printed(summary: dict[str, Any], width: int = 120) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(summary_table(summary))
    return captured.get()


# The page


def test_page_loads_nothing_and_forbids_loading(summary: dict[str, Any]) -> None:
    text = render(summary)
    found = Page(text)
    assert found.loads == []
    assert not {"link", "iframe", "img", "object", "embed", "base"} & set(found.tags)
    assert "default-src 'none'" in text
    assert text.count("* plotly.js v") == 1


def test_figures_offer_no_upload(summary: dict[str, Any]) -> None:
    text = render(summary)
    assert text.count('"showSendToCloud": false') + text.count('"showSendToCloud":false') == 3
    assert not re.search(r'"plotlyServerURL": ?"http', text)


def test_page_shows_every_row_trial_finalist_and_choice(summary: dict[str, Any]) -> None:
    text = render(summary)
    shown = Page(text).text
    for row in summary["rows"]:
        assert row["label"] in shown
        assert formats.percent(row["quality"]) in shown
    for trial in summary["trials"] + summary["baseline_trials"]["random"]:
        assert " ".join(f"{key}={value}" for key, value in trial["candidate"].items()) in shown
        assert formats.score(trial["reward"]) in shown
    for finalist in summary["finalists"]:
        assert formats.score(finalist["reward"]) in shown
    assert shown.count("★ winner") == 1
    assert "failed: loss is not finite" in shown
    assert summary["warnings"][0] in shown
    assert shown.index(summary["warnings"][0]) < shown.index("What you got")
    assert summary["table"]["sha256"] in shown


def test_page_is_the_same_every_time(summary: dict[str, Any]) -> None:
    assert render(summary) == render(copy.deepcopy(summary))


def test_what_came_from_outside_is_escaped_everywhere(summary: dict[str, Any]) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    summary |= {
        "name": evil,
        "warnings": [evil],
        "quality_metric": evil,
        "student_dir": evil,
        "created": evil,
        "seed": evil,
    }
    summary["table"] |= {"name": evil, "device": evil, "sha256": evil}
    summary["reward"]["kind"] = evil
    summary["baseline_trials"][evil] = summary["baseline_trials"]["random"][:3]
    summary["limits"].append({"cost": "latency" + evil, "limit": 0.7})
    summary["rows"][0]["label"] = summary["rows"][1]["name"] = evil
    summary["trials"][0] |= {"reason": evil, "index": evil, "candidate": {evil: evil, f"{evil}.{evil}": evil}}
    winner(summary)["candidate"] = {evil: evil, f"{evil}.{evil}": evil}
    summary["finalists"][-1]["arm"] = evil
    text, clean = render(summary), render(make_summary())
    assert "<script>alert" not in text
    assert "<img" not in re.sub(r"(?s)/\*\*\n\* plotly\.js.*?</script>", "", text)
    assert Page(text).tags.count("script") == Page(clean).tags.count("script")
    assert "img" not in Page(text).tags
    assert "&lt;script&gt;alert(1)" in text


def test_unknown_numbers_are_dashes(summary: dict[str, Any]) -> None:
    shown = Page(render(unknown(summary))).text
    assert "None" not in shown
    assert "nan" not in shown.split()
    assert formats.UNKNOWN in shown
    assert "No student" not in " ".join(headline(unknown(summary)))


@pytest.mark.parametrize("extra", [{}, {"table": None, "baseline_trials": None, "reward": None, "screened": None}])
def test_an_empty_run_still_has_a_page(extra: dict[str, Any]) -> None:
    empty = blank_summary(**extra)
    shown = Page(render(empty)).text
    assert "No finalist was marked as the winner." in shown
    assert "No latency table was used." in shown
    assert headline(empty)[0] == "No student was made."
    assert printed(empty)


def test_wrong_types_and_nan_are_read_as_unknown(summary: dict[str, Any]) -> None:
    summary["trials"][0] |= {"quality": float("nan"), "reward": "high", "latency_ms": float("inf"), "candidate": [1]}
    summary["trials"][1] |= {"latency_ms": 0.0}
    summary["table"]["nets"].append({"predicted_ms": 0.0, "measured_ms": -1.0})
    assert "NaN" not in re.sub(r"(?s)/\*\*\n\* plotly\.js.*?</script>", "", render(summary))


# Figures


def names(figure: Any) -> list[str]:
    return [trace.name for trace in figure.data]


def test_front_shows_every_finished_trial_once(summary: dict[str, Any]) -> None:
    figure = figures.front(summary)
    by_name = {trace.name: trace for trace in figure.data}
    within, over = by_name["search, within budget"], by_name["search, over budget"]
    done = [trial for trial in summary["trials"] if trial["status"] == "complete"]
    assert len(within.x) + len(over.x) == len(done)
    assert all(ms <= LIMIT_MS for ms in within.x)
    front = by_name["Pareto front"]
    assert list(front.x) == sorted(front.x)
    assert list(front.y) == sorted(front.y)
    assert {"teacher (fp32)", "random search", "uniform teacher (int8)", "student", "finalists, measured"} <= set(
        names(figure)
    )
    assert len(by_name["finalists, measured"].x) == len(summary["finalists"]) - 1
    assert "budget: median latency ≤ 0.400 ms" in [note.text for note in figure.layout.annotations]


def test_front_says_how_many_collapsed_trials_are_out_of_view(summary: dict[str, Any]) -> None:
    hidden = figures.below_view(summary)
    low, _ = figures.front(summary).layout.yaxis.range
    arms = summary["trials"] + summary["baseline_trials"]["random"]
    assert hidden >= 2
    assert hidden == sum(trial["quality"] is not None and trial["quality"] < low for trial in arms)
    assert f"below this view: {hidden}" in Page(render(summary)).text


def test_budget_label_sits_on_its_line_on_a_logarithmic_axis(summary: dict[str, Any]) -> None:
    figure = figures.front(summary)
    assert figure.layout.xaxis.type == "log"
    assert 10 ** figure.layout.annotations[0].x == pytest.approx(LIMIT_MS)


def test_best_so_far_counts_only_what_meets_the_budget() -> None:
    trial = {"status": "complete", "latency_ms": 0.3, "quality": 0.9}
    rewards = [(0.99, 0.5), (0.80, 0.0), (None, 0.0), (0.85, 0.0), (0.82, 0.0), (0.98, None)]
    summary = blank_summary(trials=[trial | {"reward": reward, "violation": over} for reward, over in rewards])
    best = next(trace for trace in figures.trace(summary).data if trace.name == "best of the search")
    assert list(best.y) == [None, 0.80, 0.80, 0.85, 0.85, 0.85]


def test_baseline_is_traced_beside_the_search(summary: dict[str, Any]) -> None:
    assert {"best of the search", "best of random search"} <= set(names(figures.trace(summary)))


def test_calibration_shows_points_errors_and_noise(summary: dict[str, Any]) -> None:
    nets, _ = (trace for trace in calibration(summary).data if trace.name == "calibration networks")
    assert len(nets.x) == len(summary["table"]["nets"])
    bands = [trace for trace in calibration(summary).data if trace.fill == "toself"]
    assert len(bands) == 2
    assert set(bands[1].y) == {0.012, -0.012}


# Sentences and the terminal


def test_terminal_table_reads_teacher_baselines_student(summary: dict[str, Any]) -> None:
    assert [row["name"] for row in rows_in_order(summary)] == ["teacher", "random", "uniform", "student"]
    out = printed(summary)
    student, teacher = summary["rows"][0], summary["rows"][1]
    line = next(line for line in out.splitlines() if line.strip().startswith("student"))
    assert formats.percent(student["quality"]) in line
    assert f"{teacher['p50_ms'] / student['p50_ms']:.1f}×" in line
    assert f"{teacher['size_bytes'] / student['size_bytes']:.0f}×" in line


def test_terminal_table_fits_a_hundred_columns_and_reads_no_markup(summary: dict[str, Any]) -> None:
    summary["rows"][0]["label"] = "[red]mine[/nope]"
    out = printed(summary, width=100)
    assert "[red]mine[/nope]" in out
    assert "…" not in out


def test_headline_warns_first_then_says_where_and_how(summary: dict[str, Any]) -> None:
    said = headline(summary)
    assert said[0] == f"Warning: {summary['warnings'][0]}"
    assert any("runs/digits/student" in line and "python predict.py --selftest" in line for line in said)
    assert "off by 1.0 %" in said[-1]
    assert "noise floor 1.2 %" in said[-1]


def test_headline_says_when_a_budget_is_broken(summary: dict[str, Any]) -> None:
    summary["limits"] = [{"cost": "latency_p95_ms", "limit": 0.01}]
    assert any("NOT met" in line for line in headline(summary))
    assert "NOT met" in Page(render(summary)).text


def finalist(index: int, reward: float, ms: float, **more: Any) -> dict[str, Any]:
    shared = {"arm": "search", "candidate": {}, "violation": 0.0, "noise": 0.02, "quality_valid": 0.95, "winner": False}
    return {"index": index, "reward": reward, "p50_ms": ms, **shared, **more}


def test_why_names_the_best_other_and_admits_noise() -> None:
    rivals = [finalist(1, 0.94, 0.303), finalist(2, 0.95, 0.3, winner=True), finalist(3, 0.90, 0.2)]
    text = " ".join(words.why_sentences(blank_summary(finalists=rivals)))
    assert "Trial 2 has the highest measured reward, 0.9500, among the 3 finalists" in text
    assert "Beside trial 1" in text
    assert "the same quality and a latency that the noise cannot tell apart" in text
    assert "Too few finalists" in text


def test_baselines_are_compared_within_the_noise_of_the_table(summary: dict[str, Any]) -> None:
    student, _, random, uniform = summary["rows"]
    random |= {"p50_ms": student["p50_ms"] * 1.01, "quality": student["quality"] - 0.02}
    uniform |= {"p50_ms": student["p50_ms"] * 2, "quality": student["quality"] + 0.01}
    first, second = words.baseline_sentences(summary)
    assert "2.0 points more quality and a latency that the noise cannot tell apart" in first
    assert "1.0 points less quality and 50 % less latency" in second


def test_why_does_not_call_the_winner_best_when_it_is_not() -> None:
    broken = [finalist(1, 0.99, 0.3, violation=0.2), finalist(2, 0.95, 0.3, winner=True)]
    text = " ".join(words.why_sentences(blank_summary(finalists=broken)))
    assert "of those that meet the budget" in text
    assert "1 finalist with a higher reward breaks it" in text
    lucky = [finalist(1, 0.99, 0.3, arm="random"), finalist(2, 0.95, 0.3, winner=True)]
    text = " ".join(words.why_sentences(blank_summary(finalists=lucky)))
    assert "trial 1 of the random search scored higher (0.9900) and meets the budget too" in text


def test_why_says_when_a_baseline_won() -> None:
    text = " ".join(words.why_sentences(blank_summary(finalists=[finalist(4, 0.9, 0.3, arm="random", winner=True)])))
    assert "it was the only finalist" in text
    assert "The winner came from the random search" in text


@pytest.mark.parametrize(("rho", "verdict"), [(0.8, "well"), (0.5, "rough guide"), (-0.2, "say little")])
def test_rank_correlation_is_put_in_words(rho: float, verdict: str) -> None:
    assert verdict in words.rank_sentence(rho)


def test_choices_are_a_grid_of_places() -> None:
    shown = Page(tables.choices({"resolution": 16, "stage0.depth": 2, "stage0.bits": 8, "stage1.depth": 1})).text
    assert shown == "resolution 16 depth bits stage0 2 8 stage1 1"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (formats.percent(0.985), "98.5 %"),
        (formats.points(-0.006), "−0.6 points"),
        (formats.milliseconds(0.31), "0.310"),
        (formats.milliseconds(1234.5), "1234"),
        (formats.milliseconds(99.96), "100"),
        (formats.milliseconds(999.9), "1000"),
        (formats.kib(1234567), "1,206"),
        (formats.kib(2048), "2.0"),
        (formats.count(12345678), "12.3 M"),
        (formats.count(123456789), "123 M"),
        (formats.count(999), "999"),
        (formats.times(1.04), "1.04×"),
        (formats.times(3.72), "3.7×"),
        (formats.times(45.4), "45×"),
        (formats.duration(291.2), "4 min 51 s"),
        (formats.duration(7260), "2 h 1 min"),
        (formats.duration(59.97), "1 min 0 s"),
        (formats.score(-0.5, 2), "−0.50"),
        (formats.percent(None), "–"),
    ],
)
def test_formats(text: str, expected: str) -> None:
    assert text == expected


# Files


def test_report_is_written_beside_its_summary(summary: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "report.html").write_text("an older one")
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html"
    assert path.read_text(encoding="utf-8") == render(summary)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["report.html", "summary.json"]


@pytest.mark.parametrize(
    "content",
    [
        None,
        "{",
        "[]",
        '{"schema_version": 99}',
        json.dumps(blank_summary(trials="many")),
        json.dumps(blank_summary(rows=[{"label": "nameless"}])),
        json.dumps(blank_summary(finalists=[1])),
    ],
)
def test_no_or_broken_summary_ends_in_one_error_with_a_remedy(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    with pytest.raises(StudentError) as caught:
        write_report(tmp_path)
    assert "summary.json" in caught.value.found
    assert caught.value.expected
    assert "nas search" in caught.value.remedy
    assert not (tmp_path / "report.html").exists()


# In a browser


def pixels(path: Path) -> np.ndarray:
    """The rows of an 8-bit PNG as stored, one filter byte and then bytes: enough to tell a drawing from a blank."""
    data, at, packed = path.read_bytes(), 8, b""
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            height = struct.unpack(">II", body[:8])[1]
        packed += body if kind == b"IDAT" else b""
        at += 12 + length
    return np.frombuffer(zlib.decompress(packed), dtype=np.uint8).reshape(height, -1)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no browser is installed")
def test_page_draws_in_a_browser(summary: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    page, shot = write_report(tmp_path), tmp_path / "shot.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    flags += ["--virtual-time-budget=4000", "--window-size=1200,4300", "--enable-logging=stderr"]
    run = [str(CHROMIUM), *flags]
    done = subprocess.run([*run, f"--screenshot={shot}", page.as_uri()], capture_output=True, text=True, timeout=180)
    assert "CONSOLE" not in done.stderr, done.stderr
    rows = pixels(shot)
    assert (rows != rows[:, :1]).any(axis=1).mean() > 0.5
    assert len(np.unique(rows)) > 50
    drawn = subprocess.run([*run, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=180).stdout
    assert drawn.count('class="main-svg"') >= 3
    assert drawn.count('class="point"') > len(summary["trials"])
