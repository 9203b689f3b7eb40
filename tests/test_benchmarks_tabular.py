"""The benchmarks on published tables: their definitions, worked out by hand, and their command lines as processes."""

from __future__ import annotations

import csv
import importlib
import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nas.strategies import RandomSearch
from nas.tabular import Index

ROOT = Path(__file__).parents[1]
CODES = ["".join(digits) for digits in product("0123", repeat=3)]


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``benchmarks/tabular.py`` and its reader of tables, as the script imports them."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield importlib.import_module("tabular"), importlib.import_module("published")
    for name in ("tabular", "published", "peers"):
        sys.modules.pop(name, None)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """64 genomes; quality is 50 + 10 × digits that are 3, cost 1 + the sum of digits; 12 seconds each."""
    path = tmp_path / "t.csv"
    rows = [
        [i, code, 50 + 10 * code.count("3"), 1 + sum(map(int, code)), 12, 40 + 10 * code.count("2"), i]
        for i, code in enumerate(CODES)
    ]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["idx", "ops", "valid", "ms", "seconds", "early", "test"], *rows])
    return path


def load(published: Any, table: Path, **changes: Any) -> Any:
    settings = {"quality": f"{table}:valid", "genome": "ops", "cost": f"{table}:ms", "quantile": 0.5, **changes}
    return published.load(published.Setting(**settings))


def row(code: str) -> int:
    return CODES.index(code)


def run(*arguments: str, script: str = "tabular.py") -> tuple[list[dict[str, Any]], str]:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


# ---- the definitions -----------------------------------------------------------------------------------


def test_score_budget_and_regret(modules: Any, table: Path) -> None:
    problem = load(modules[1], table)
    assert problem.budget == 5.5  # the median of 1 + the sum of three digits 0..3
    assert problem.final[row("300")] == pytest.approx(0.60)
    assert problem.final[row("333")] == pytest.approx(0.80 * 5.5 / 10)
    assert problem.final.max() == pytest.approx(0.60)
    assert problem.regret(row("000")) == pytest.approx(10)
    assert problem.regret(row("300")) == 0
    assert problem.regret(-1) == pytest.approx(60)


def test_infeasible_costs_and_qualities_score_nothing(modules: Any, table: Path) -> None:
    lines = table.read_text().splitlines()
    head, body = lines[0], [line.split(",") for line in lines[1:]]
    for code, column, value in (("000", 3, ""), ("001", 3, "nan"), ("002", 3, "0"), ("003", 3, "-1"), ("010", 2, "")):
        body[row(code)][column] = value
    table.write_text("\n".join([head, *map(",".join, body[:-1])]) + "\n")  # and "333" is not there at all
    problem = load(modules[1], table)
    bad = [row(code) for code in ("000", "001", "002", "003", "010")]
    assert (problem.final[bad] == 0).all()
    assert not problem.within[bad].any()
    assert np.isinf(problem.price(np.array([[0, 0, 0], [3, 3, 3]]))).all()
    assert np.isinf(problem.violation(problem.price(np.array([[3, 3, 3]])))).all()
    usable = [1 + sum(map(int, code)) for code in CODES if code not in ("000", "001", "002", "003", "333")]
    assert problem.budget == np.quantile(usable, 0.5)


def test_hypervolume_is_1_for_the_best_at_no_cost(modules: Any, table: Path) -> None:
    problem = load(modules[1], table)
    low, best = np.median(problem.quality[problem.within]), problem.quality[problem.within].max()
    assert (low, best) == (50, 60)
    assert problem.hypervolume([row("300")]) == pytest.approx(1 - 4 / 5.5)
    assert problem.hypervolume([row("300"), row("301"), row("000")]) == pytest.approx(1 - 4 / 5.5)
    assert problem.hypervolume([]) == 0


def test_strategies_know_prices_unless_plain(modules: Any, table: Path) -> None:
    problem = load(modules[1], table)
    domain = problem.domain(knows_costs=True)
    assert domain.kinds.tolist() == [0, 0, 0]
    genomes = np.array([[3, 0, 0], [3, 3, 3]])
    costs = domain.objective.price(genomes)
    assert costs.tolist() == [[4], [10]]
    assert domain.objective.violation(costs) == pytest.approx([0, 10 / 5.5 - 1])
    assert domain.objective.reward(np.array([60.0, 80.0]), costs) == pytest.approx([0.6, 0.8 * 5.5 / 10])
    assert problem.domain(knows_costs=False).objective is None


def test_screened_pays_for_feasible_genomes_only(modules: Any, table: Path) -> None:
    tabular, published = modules
    problem = load(published, table)
    screened = tabular.Oracle(problem, 20, np.inf, screened=True)
    tabular.drive(RandomSearch(problem.domain(True), 0), screened)
    assert problem.within[screened.rows].all()
    assert len(set(screened.rows)) == 20
    assert screened.asks > 30
    plain = tabular.Oracle(problem, 20, np.inf, screened=False)
    tabular.drive(RandomSearch(problem.domain(False), 0), plain)
    assert not problem.within[plain.rows].all()
    assert len(set(plain.rows)) == 20


def test_a_screened_peer_is_answered_free(modules: Any, table: Path) -> None:
    tabular, published = modules
    oracle = tabular.Oracle(load(published, table), 3, np.inf, screened=True)
    assert oracle.score(np.array([3, 3, 3])) == pytest.approx(0.8 * 5.5 / 10)
    assert oracle.rows == []
    assert oracle.score(np.array([3, 0, 0])) == pytest.approx(0.6)
    assert oracle.rows == [row("300")]


def test_repeats_are_free_up_to_20_asks_a_query(modules: Any, table: Path) -> None:
    tabular, published = modules
    oracle = tabular.Oracle(load(published, table), 3, np.inf, screened=False)
    for _ in range(60):
        assert oracle.score(np.array([1, 1, 1])) == pytest.approx(0.5)
    assert len(oracle.rows) == 1
    with pytest.raises(tabular.Finished):
        oracle.score(np.array([1, 1, 2]))


def test_simulated_seconds_end_with_the_last_query_that_fits(modules: Any, table: Path) -> None:
    tabular, published = modules
    timed = {"cost": None, "fidelity": f"{table}:early", "fidelity_cost": f"{table}:seconds"}
    problem = load(published, table, **timed, tests=(f"{table}:test",))
    oracle = tabular.Oracle(problem, 64, 100.0, screened=True)
    for code in ("000", "020", "000", "300", "220", "001", "002", "003", "010"):
        oracle.score(np.array([int(digit) for digit in code]))
    assert len(oracle.rows) == 8  # of 12 seconds each
    with pytest.raises(tabular.Finished):
        oracle.score(np.array([0, 1, 1]))
    assert tabular.chosen(problem, oracle.rows, 2) == row("020")  # by the early column
    assert tabular.chosen(problem, oracle.rows, 64) == row("220")
    line = tabular.report(problem, "x", [tabular.Run(oracle.rows, oracle.asks, 1.0)] * 2, 64)
    assert line["test"] == row("220")
    assert line["regret"]["end"] == pytest.approx(80 - 50)  # of the quality column


def test_a_sample_is_searched_by_its_nearest_rows(modules: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "sample.csv"
    codes = sorted({"".join(map(str, rng.integers(0, 4, 12))) for _ in range(200)})
    rows = [[code, 60 + sum(map(int, code)), 1 + code.count("3")] for code in codes]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["ops", "q", "ms"], *rows])
    problem = load(modules[1], path, quality=f"{path}:q", cost=f"{path}:ms")
    assert isinstance(problem.index, Index)
    oracle = modules[0].Oracle(problem, 40, np.inf, screened=True)
    modules[0].drive(RandomSearch(problem.domain(True), 1), oracle)
    assert len(oracle.rows) == 40


# ---- the command lines -----------------------------------------------------------------------------------


def options(table: Path, strategies: str, *more: str) -> list[str]:
    command = ["--quality", f"{table}:valid", "--cost", f"{table}:ms", "--genome", "ops", "--budget-quantile", "0.5"]
    return [*command, "--queries", "12", "--seeds", "2", "--strategies", strategies, *more]


@pytest.mark.parametrize(
    "names",
    [
        "random,plain:random,optuna:RandomSampler",
        pytest.param(
            "evolution,screened:optuna:TPESampler,nni:evolution,screened:nni:evolution", marks=pytest.mark.slow
        ),
    ],
)
def test_any_number_of_processes_gives_the_same_lines(table: Path, names: str) -> None:
    lines, _ = run(*options(table, names, "--jobs", "1", "--test", f"{table}:test"))
    again, _ = run(*options(table, names, "--jobs", "2", "--test", f"{table}:test"))
    assert [line["strategy"] for line in lines] == names.split(",")
    for line, twin in zip(lines, again, strict=True):
        assert line.pop("ask_tell_us") > 0
        twin.pop("ask_tell_us")
        assert line == twin
        assert line["queries"] == 12
        assert line["regret"].keys() == line["regret_se"].keys() == {"12"}
        assert 0 <= line["regret"]["12"] <= 100
    asks = [line["asks"] for line in lines]
    assert asks[0] > asks[1] if names.startswith("random") else asks[3] > asks[2]  # screening is free, and takes asks


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--strategies", "nothing"], "Unknown strategy 'nothing'"),
        (["--strategies", "optuna:Nothing"], "TPESampler"),
        (["--strategies", "nni:other"], "nni:evolution"),
        (["--strategies", "plain:optuna:TPESampler"], "as it comes"),
        (["--quality", "nowhere.csv:valid"], "nowhere.csv"),
        (["--cost", "COST:nothing"], "nothing"),
        (["--fidelity", "f.csv:x"], "go together"),
        (["--seeds", "0"], "at least 1"),
    ],
)
def test_what_is_wrong_is_one_clear_line(table: Path, arguments: list[str], words: str) -> None:
    arguments = [text.replace("COST", str(table)) for text in arguments]
    lines, error = run(*options(table, "random"), *arguments)
    assert lines == []
    assert words in error
    assert "Traceback" not in error


def test_ofa_without_its_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NAS_TABLES", raising=False)
    lines, error = run("--strategies", "random", script="ofa.py")
    assert lines == []
    assert "ofa_note10_lut.csv.gz" in error
    assert "Traceback" not in error
