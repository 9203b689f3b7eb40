"""The benchmarks of compression: what they search, average and judge by, worked out by hand."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def techniques(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """``benchmarks/techniques.py``, as its sibling imports it."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield importlib.import_module("techniques")
    for name in ("techniques", "pruners", "own_model"):
        sys.modules.pop(name, None)


@pytest.fixture
def pruners(techniques: ModuleType) -> ModuleType:
    return importlib.import_module("pruners")


def test_smallest_ratio_that_leaves_at_most_the_target(pruners: ModuleType) -> None:
    asked = []

    def left(ratio: float) -> float:
        """Of 16 channels, in whole ones."""
        asked.append(ratio)
        return (16 - math.floor(16 * ratio)) / 16

    found = pruners.smallest(left, 0.5)
    assert left(found) <= 0.5 < left(found - 2**-9)
    assert all(0 < ratio < 1 for ratio in asked), "no pruner is asked for nothing or everything"


def test_no_image_is_trained_on_and_judged_by(techniques: ModuleType) -> None:
    task = techniques.Judged("digits", limit_test=50)
    judged, trained = task.split("valid")[0], task.split("train")[0]
    assert torch.equal(judged, task.split("test")[0])
    assert len(judged) == 50
    assert not {x.numpy().tobytes() for x in judged} & {x.numpy().tobytes() for x in trained}


def test_ratios_are_taken_within_a_seed(techniques: ModuleType) -> None:
    same = {"quality": 0.9, "quality_onnx": 0.898, "macs": 10**6}
    rows = [
        {"seed": 0, "arm": "teacher", "size_bytes": 400, "p50_ms": 1.0, **same},
        {"seed": 0, "arm": "a", "size_bytes": 100, "p50_ms": 0.5, **same},
        {"seed": 1, "arm": "teacher", "size_bytes": 400, "p50_ms": 4.0, **same},
        {"seed": 1, "arm": "a", "size_bytes": 100, "p50_ms": 1.0, **same},
    ]
    assert techniques.against(rows, "a", "p50_ms") == [2.0, 4.0]
    cells = techniques.table(rows)[-1].split(" | ")
    assert cells[3:7] == ["89.80 ± 0.00", "0.20", "100", "4.00"]
    assert cells[8:] == ["0.7500 ± 0.3536", "3.00 ± 1.41 |"]


def test_every_arm_is_made_of_passes_and_options_that_there_are(techniques: ModuleType) -> None:
    for arm in techniques.ARMS:
        assert techniques.steps_of(arm.partition("; ")[0].split(" + "))
    assert len({techniques.folder_name(arm) for arm in techniques.ARMS}) == len(techniques.ARMS)
