"""The few-shot benchmark as a process, on a small table."""

from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files of 243 networks: devices a, b, c; and, for all but the first ten, d (with a gap) and copy (= d)."""
    rng = np.random.default_rng(0)
    genomes = np.array(list(product(range(3), repeat=5)))
    common = rng.gamma(3.0, 1.0, (5, 3))
    columns = {}
    for name in "abcd":
        costs = common * rng.lognormal(0, 0.3, 3)
        columns[name] = costs[np.arange(5), genomes].sum(axis=1) * rng.lognormal(0, 0.01, len(genomes))
    codes = ["".join(map(str, genome)) for genome in genomes]
    with (tmp_path / "one.csv").open("w", newline="") as file:
        rows = zip(range(243), codes, *(columns[name] for name in "abc"), strict=True)
        csv.writer(file).writerows([["idx", "ops", "a", "b", "c"], *rows])
    with gzip.open(tmp_path / "two.csv.gz", "wt", newline="") as file:
        rows = [[i, "" if i == 20 else columns["d"][i], columns["d"][i], "x"] for i in reversed(range(10, 243))]
        csv.writer(file).writerows([["idx", "d", "copy", "note"], *rows])
    return tmp_path


def run(*arguments: str, folder: Path | None = None) -> tuple[int, str, str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("NAS_TABLES", None)
    if folder:
        environment["NAS_TABLES"] = str(folder)
    command = [sys.executable, str(ROOT / "benchmarks" / "few_shot.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    return done.returncode, done.stdout, done.stderr


def last(output: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def test_the_last_line_is_the_result(folder: Path) -> None:
    known = ["--known", "one:*,two:copy,d", "--target", "two:d"]
    code, output, errors = run(*known, "--exclude", "copy", "--samples", "8", "--seeds", "3", folder=folder)
    assert (code, errors) == (0, "")
    result = last(output)
    assert result["known"] == 3  # a, b, c: the target and what is excluded are not known
    assert result["rows"] == 232  # of the 233 that both have, one has no target
    assert result["codes"] is True
    assert (result["samples"], result["seeds"]) == (8, 3)
    assert result["spearman"] > 0.97
    assert 0 < result["within_5"] <= result["within_10"] <= 1
    assert 0 <= result["spearman_std"] < 0.1
    again = run(*known, "--exclude", "two:copy", "--samples", "8", "--seeds", "3", folder=folder)[1]
    assert again == output


def test_the_target_is_unknown_by_whatever_name(folder: Path) -> None:
    path = folder / "two.csv.gz"
    code, output, _ = run("--known", f"one:a,{path}:d", "--target", "two:d", "--seeds", "1", folder=folder)
    assert code == 0
    assert last(output)["known"] == 1
    assert last(run("--known", "two:*", "--target", "two:d", "--seeds", "1", folder=folder)[1])["known"] == 1


def test_without_codes(folder: Path) -> None:
    code, output, _ = run("--known", f"{folder}/one.csv:a,b", "--target", f"{folder}/one.csv:c", "--no-codes")
    assert code == 0
    assert last(output)["codes"] is False


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--known", "nowhere:a", "--target", "one:a"], "The published table 'nowhere' is missing"),
        (["--known", "one:z", "--target", "one:a"], "has no column 'z'"),
        (["--known", "a", "--target", "one:a"], "names no file or no column"),
        (["--known", "one:a", "--target", "one:a"], "No known column is left"),
        (["--known", "one:a", "--target", "two:note"], "0 rows have a finite, positive target"),
        (["--known", "one:a"], "--known and --target go together"),
        (["--suite", "help"], "The published table 'help_nb201' is missing"),
        ([], "either --known and --target, or --suite"),
        (["--known", "one:a", "--target", "one:b", "--samples", "1"], "--samples is at least 2"),
    ],
)
def test_what_is_wrong_is_said(folder: Path, arguments: list[str], text: str) -> None:
    code, output, errors = run(*arguments, folder=folder)
    assert code != 0
    assert text in errors
    assert "Traceback" not in errors
    assert output == ""
