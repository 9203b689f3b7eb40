"""The benchmark of sums over op tables: a law that made its data is found, and what is missing is said."""

from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
PHONES = ("pixel4", "onefusion", "iphonexs")
CONV = {"input_channel": 8, "output_channel": 8, "input_size": 100, "output_size": 100, "kernel_size": 3, "groups": 1}


def run(*arguments: str) -> tuple[str, str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "published_latency.py"), *arguments]
    unset = {name: value for name, value in os.environ.items() if name != "NAS_TABLES"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=unset, check=False)
    return done.stdout, done.stderr


def write(path: Path, header: list[str], rows: list[list[Any]]) -> None:
    with gzip.open(path, "wt", newline="") as file:
        csv.writer(file).writerows([header, *rows])


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """30 networks that take 0.8 of the sum of their ops on two phones, and on the third as the sum says."""
    rng = np.random.default_rng(0)
    ops, nets = [], []
    for i in range(30):
        times = rng.uniform(100, 5000, rng.integers(5, 20))
        for at, time in enumerate(times):
            feature = json.dumps({**CONV, "flops": float(time * 1e4), "at": at % 3})
            ops.append([f"net{i}", "vulkan_prepack::run_conv2d_context", feature, time, time, time])
        ops.append([f"net{i}", "aten::relu", '{"flops": 10}', 10.0, 10.0, ""])
        nets.append([f"net{i}", 0.8 * (times.sum() + 10), 0.8 * (times.sum() + 10), times.sum()])
    header = ["model", "operation", "feature", *(f"{phone}|gpu|float" for phone in PHONES)]
    write(tmp_path / "mobilebench_torch_cnn_ops_gpu.csv.gz", header, ops)
    write(tmp_path / "mobilebench_torch_cnn_e2e.csv.gz", ["model", *(f"{p}|gpu|float|mean" for p in PHONES)], nets)
    return tmp_path


def test_the_law_of_the_data_is_found(tables: Path) -> None:
    out, error = run("--tables", str(tables), "--train", "12", "--splits", "2")
    assert error == "", error[-900:]
    *table, line = out.splitlines()
    assert len(table) == 1 + 3 * 3
    phones = json.loads(line)["phones"]
    for phone in ("pixel4", "onefusion"):
        own = phones[phone]["own"]
        assert own["judged"] == 18
        assert own["plain"]["mape"] == [0.25, 0.0]
        assert own["plain"]["within_10"] == [0.0, 0.0]
        assert own["fitted"]["mape"][0] < 0.01
        assert own["fitted"]["within_5"] == [1.0, 0.0]
    assert phones["iphonexs"]["own"]["plain"]["mape"] == [0.0, 0.0]


def test_what_is_missing_is_said(tmp_path: Path, tables: Path) -> None:
    _, error = run("--tables", str(tmp_path / "nowhere"))
    assert "mobilebench_torch_cnn_ops_gpu.csv.gz" in error
    _, error = run("--tables", str(tables), "--train", "29")
    assert "--train at least 5, and 5 less than there are networks" in error
