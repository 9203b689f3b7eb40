"""The benchmark of NNI's model space: what NNI samples is what we train, its tables by hand, and a small run of it."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from nas.space import TaskInfo

pytest.importorskip("nni")
ROOT = Path(__file__).parents[1]
SMALL = {
    "base_widths": [8, 8, 8, 16, 16], "width_multipliers": [1.0, 2.0], "stride": [2, 1, 2, 1, 1],
    "activation": ["relu"] * 5, "squeeze_excite": ["none", "none"], "depth_range": [1, 2],
}  # fmt: skip


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """``benchmarks/nni_search.py`` over a small model space of the same kind."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = importlib.import_module("nni_search")
    monkeypatch.setattr(module, "ARGS", SMALL)
    yield module
    for name in ("nni_search", "own_model"):
        sys.modules.pop(name, None)


def asked(benchmark: ModuleType, *given: str) -> argparse.Namespace:
    told: argparse.Namespace = benchmark.arguments(["--data", "mnist.npz", *given])
    return told


def test_an_arm_that_there_is_not_ends_before_anything_is_trained(
    benchmark: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked(benchmark).arms.split(";") == list(benchmark.ARMS)
    with pytest.raises(SystemExit):
        asked(benchmark, "--arms", "ours;NNI, latency")
    assert "NNI, latency" in capsys.readouterr().err
    assert len({benchmark.folder_name(arm) for arm in benchmark.ARMS}) == len(benchmark.ARMS)


def test_what_nni_freezes_is_what_is_trained(benchmark: ModuleType) -> None:
    from nas.nni import NniSpace

    info = TaskInfo((1, 28, 28), 10, mean=(0.0,), std=(1.0,))
    space = NniSpace(info, nni=benchmark.NNI, args=SMALL)
    fixed = {c.name: c.values[0] for c in space.choices if c.technique != "architecture"}
    for seed in range(3):
        sample: dict[str, Any] = {}
        model = space.model_space.random(memo=sample, random_state=np.random.RandomState(seed))
        genome = benchmark.genome_of(space, sample, fixed)
        theirs = sorted(tuple(p.shape) for p in model.parameters())
        ours = sorted(tuple(p.shape) for p in space.build(space.decode(genome)).parameters())
        assert ours == theirs


def test_ratios_are_taken_within_a_seed_and_arms_without_a_student_are_counted(benchmark: ModuleType) -> None:
    spent = {"trained": 8, "repeated": 0, "failed": 0}

    def result(seed: int, ms: float, found: bool) -> dict[str, Any]:
        student = {"test": 0.9, "p50_ms": 0.5, "predicted_ms": 0.4, "size_bytes": 2048}
        arms = {
            "ours": {**spent, "over": 0, "seconds": 10.0, **student},
            "random": {**spent, "over": 4 * seed, "seconds": 20.0, **(student if found else {"test": None})},
        }
        teacher = {"test": 0.95, "p50_ms": ms, "size_bytes": 4096}
        return {"seed": seed, "budget_ms": ms / 2, "teacher": teacher, "arms": arms}

    results = [result(0, 1.0, False), result(1, 3.0, True)]
    ours, random = ([cell.strip() for cell in line.split("|")[1:-1]] for line in benchmark.summary(results)[2:])
    head = [cell.strip() for cell in benchmark.summary(results)[0].split("|")[1:-1]]
    assert dict(zip(head, ours, strict=True)) == {
        "arm": "ours", "students": "2", "test accuracy %": "90.00 ± 0.00", "points lost": "5.00 ± 0.00",
        "p50 ms": "0.5000 ± 0.0000", "% of the budget": "66.7 ± 47.1", "× faster": "4.00 ± 2.83",
        "predicted / measured": "0.800 ± 0.000",
        "KiB": "2 ± 0", "× smaller": "2.0 ± 0.0", "trained": "8.0", "over the budget": "0.0", "repeated": "0.0",
        "seconds of training": "10.0",
    }  # fmt: skip
    assert random[1] == "1"
    assert random[head.index("× faster")] == "6.00"
    assert random[-3:] == ["2.0", "0.0", "20.0"]
    assert benchmark.by_seed(results)[3].startswith("| 0 | random | – |")


@pytest.mark.slow
def test_every_arm_has_its_trainings_and_what_it_found_is_measured(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NAS_CACHE_DIR", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    y = np.tile(np.arange(10), 60)
    x = np.where(rng.random((10, 28, 28))[y] < 0.2, 255, 0) + rng.integers(0, 64, (len(y), 28, 28))
    images = np.minimum(x, 255).astype(np.uint8)
    np.savez(tmp_path / "mnist.npz", x_train=images[:400], y_train=y[:400], x_test=images[400:], y_test=y[400:])
    told = benchmark.arguments(
        ["--data", str(tmp_path / "mnist.npz"), "--out", str(tmp_path / "out"), "--trials", "5", "--images", "400",
         "--epochs", "1", "--finalist-epochs", "2", "--teacher-epochs", "1", "--table-seconds", "3"]
    )  # fmt: skip
    result = benchmark.run(told, benchmark.prepare(told), 0)
    arms = result["arms"]
    assert set(arms) == set(benchmark.ARMS)
    assert {own["trained"] for own in arms.values()} == {5}
    assert {arms[arm]["over"] for arm in ("ours", benchmark.LABELS, "random", benchmark.FILTER)} == {0}
    for own in arms.values():
        assert own["test"] is None or own["p50_ms"] > 0
    assert arms["ours"]["test"] is not None
    compression = [c for c in arms["ours"]["candidate"] if c.endswith((".bits", ".prune"))]
    for arm in (benchmark.LABELS, benchmark.REWARD, benchmark.FILTER, benchmark.ACCURACY):
        found = {arms[arm].get("candidate", {}).get(name) for name in compression}
        assert len(found) <= 2, "one precision, and nothing is pruned"
    assert benchmark.run(told, {}, 0) == result, "a run that is there is read and not repeated"
    assert len(benchmark.by_seed([result])) == 2 + len(arms)
