"""The record: whole trials survive any crash, and another experiment's record is refused. Real Optuna throughout."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from helpers import TinySpace, plain

from nas.errors import StudyError
from nas.journal import cut_torn_tail
from nas.space import Choice
from nas.study import Study, Trial, read_earlier, trainings

IDENTITY = {"seed": 0, "strategy": {"kind": "random"}, "choices": (1, 2)}


def trial(index: int, **changes: Any) -> Trial:
    genome = tuple(int(g) for g in TinySpace().sample(np.random.default_rng(index), 1)[0])
    fields: dict[str, Any] = {
        "index": index, "genome": genome, "seen": max(0, index - 1), "status": "complete",
        "costs": {"latency_ms": 0.1 * (index + 1), "macs": 1e6}, "violation": 0.0, "quality": 1 / (index + 3),
        "reward": 0.3 / (index + 1), "reason": "", "seconds": 0.25,
    }  # fmt: skip
    return Trial(**{**fields, **changes})


def failed(index: int) -> Trial:
    return trial(index, status="failed", quality=math.nan, reward=math.nan, reason="the loss is “nan”\nin epoch 3")


def study(path: Path | str, name: str = "search", **identity: Any) -> Study:
    return Study(path, name, TinySpace(), {**IDENTITY, **identity})


def test_trials_come_back_bit_identical_and_by_index(tmp_path: Path) -> None:
    path = tmp_path / "run" / "study.jsonl"
    first = study(path)
    assert first.repaired == ""
    assert list(first) == []
    assert first.genomes().shape == (0, 8)
    trials = [trial(0), failed(1), trial(5, violation=0.25), trial(3)]
    for one in trials:
        first.add(one)
    ordered = sorted(trials, key=lambda t: t.index)
    for opened in (first, study(path)):
        assert [repr(t) for t in opened] == [repr(t) for t in ordered]
        assert opened.genomes().tolist() == [list(t.genome) for t in ordered]


def test_optuna_reads_it_too(tmp_path: Path) -> None:
    """People may look at the journal with Optuna's own tools: values, states and parameters are where they expect."""
    path = tmp_path / "study.jsonl"
    ours = study(path)
    ours.add(trial(0))
    ours.add(failed(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        backend = optuna.storages.journal.JournalFileBackend(str(path))
        storage = optuna.storages.JournalStorage(backend)
    theirs = optuna.load_study(study_name="search", storage=storage)
    assert [t.state.name for t in theirs.trials] == ["COMPLETE", "FAIL"]
    assert theirs.best_trial.value == 0.3
    assert theirs.best_trial.params == TinySpace().decode(trial(0).genome).as_dict()


def test_a_short_training_is_pruned_to_optuna(tmp_path: Path) -> None:
    """Its value is higher than any full training's here, and must not be taken for the best."""
    path = tmp_path / "study.jsonl"
    ours = study(path)
    ours.add(trial(0))
    ours.add(trial(1, fidelity=1 / 9, reward=5.0, source="enqueued", batch=3))
    ours.add(trial(2, fidelity=1 / 9, status="failed", quality=math.nan, reward=math.nan))
    theirs = ours._study
    assert [t.state.name for t in theirs.trials] == ["COMPLETE", "PRUNED", "FAIL"]
    assert theirs.best_value == 0.3
    again = list(study(path))
    assert [(t.fidelity, t.source, t.batch, t.reward) for t in again[:2]] == [
        (1.0, "asked", 0, 0.3), (1 / 9, "enqueued", 3, 5.0),
    ]  # fmt: skip
    assert trainings(again) == pytest.approx(1 + 2 / 9)


def test_a_study_from_before_fidelities(tmp_path: Path, journal: bytes) -> None:
    """Older journals have no fidelity, source and batch: theirs were full trainings that a strategy asked for."""
    path = tmp_path / "study.jsonl"
    lines = [json.loads(line) for line in journal.splitlines()]
    for line in lines:
        for key in ("fidelity", "source", "batch"):
            line.get("user_attrs", {}).pop(key, None)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "fidelity" not in path.read_text()
    found = list(study(path))
    assert [(t.index, t.fidelity, t.source, t.batch) for t in found] == [(i, 1.0, "asked", 0) for i in range(4)]


# ---- another search's studies ------------------------------------------------------------------------


def test_trials_of_another_search(tmp_path: Path) -> None:
    path = tmp_path / "study.jsonl"
    study(path).add(trial(0))
    study(path, "random", seed=1).add(failed(1))
    with path.open("ab") as file:
        file.write(b'{"op_code": 4, "tor')  # it may be running, or have been killed
    before = path.read_bytes()
    found = read_earlier(path, TinySpace())
    assert plain(found) == plain([trial(0), failed(1)])
    assert path.read_bytes() == before, "mending is up to the run that owns it"
    url = f"sqlite:///{tmp_path}/study.db"
    for name in ("a-run-search", "b-run-search"):
        study(url, name).add(trial(3))
    assert len(read_earlier(url, TinySpace(), "a-run-")) == 1


def test_the_order_of_another_searchs_values_does_not_matter(tmp_path: Path) -> None:
    class Turned(TinySpace):
        def __init__(self) -> None:
            super().__init__()
            self.choices = tuple(Choice(c.name, c.values[::-1], c.ordered) for c in reversed(self.choices))

    study(tmp_path / "study.jsonl").add(trial(0))
    (found,) = read_earlier(tmp_path / "study.jsonl", Turned())
    assert Turned().decode(found.genome).as_dict() == TinySpace().decode(trial(0).genome).as_dict()


def test_another_space_is_refused_by_its_choices(tmp_path: Path) -> None:
    class Other(TinySpace):
        def __init__(self) -> None:
            super().__init__()
            wide = Choice("width", (8, 16, 24))
            self.choices = (wide, Choice("rank", (1, 2)), *(c for c in self.choices if c.name not in ("width", "bits")))

    study(tmp_path / "study.jsonl").add(trial(0))
    with pytest.raises(StudyError, match=r"another space than 'tiny': bits, rank, width differ") as caught:
        read_earlier(tmp_path / "study.jsonl", Other())
    assert "search.earlier" in caught.value.remedy
    with pytest.raises(StudyError, match="cannot be read"):
        read_earlier(tmp_path / "absent.jsonl", TinySpace())


def test_arms_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "study.jsonl"
    search, random = study(path), study(path, "random", seed=10_000)
    search.add(trial(0))
    random.add(trial(1))
    assert [t.index for t in study(path)] == [0]
    assert [t.index for t in study(path, "random", seed=10_000)] == [1]


def test_sqlite_storage(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    study(url).add(trial(0))
    study(url).add(failed(1))
    assert plain(list(study(url))) == plain([trial(0), failed(1)])


@pytest.mark.parametrize(
    ("identity", "keys"),
    [
        ({"seed": 1}, "seed"),
        ({"strategy": {"kind": "evolution"}}, "strategy"),
        ({"seed": 2, "strategy": {}}, "seed, strategy"),
        ({"budget": 3}, "budget"),
    ],
)
def test_another_experiment_is_refused(tmp_path: Path, identity: dict[str, Any], keys: str) -> None:
    path = tmp_path / "study.jsonl"
    study(path).add(trial(0))
    with pytest.raises(StudyError, match=f"belongs to another experiment: {keys} changed") as caught:
        study(path, **identity)
    assert "--out" in caught.value.remedy
    assert len(list(study(path))) == 1


# ---- crashes -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("journal") / "study.jsonl"
    one = study(path)
    for index in range(4):
        one.add(failed(index) if index == 2 else trial(index))
    return path.read_bytes()


def whole(data: bytes) -> list[bytes]:
    """Lines that end and are JSON."""
    return [line for line in data.split(b"\n")[:-1] if line]


def is_trial(line: bytes) -> bool:
    return "index" in json.loads(line).get("user_attrs", {})


def test_any_tear_is_cut_and_whole_trials_stay(journal: bytes, tmp_path: Path) -> None:
    """A kill may stop the last write after any byte; every 31st length, and all lengths near a line's end."""
    ends = [i + 1 for i, byte in enumerate(journal) if byte == 10]
    lengths = sorted(
        {*range(1, len(journal), 31), *(e + d for e in ends for d in (-2, -1, 0, 1, 2))} & set(range(1, len(journal)))
    )
    assert len(lengths) > 50
    path = tmp_path / "study.jsonl"
    for length in lengths:
        path.write_bytes(journal[:length])
        kept = [line for line in whole(journal[:length]) if is_trial(line)]
        torn = length - max((e for e in ends if e <= length), default=0)
        opened = study(path)
        assert (f"({torn} bytes)" in opened.repaired) == (torn > 0)
        assert [t.index for t in opened] == list(range(len(kept)))
        # and goes on from there, for good
        opened.add(trial(len(kept)))
        again = study(path)
        assert again.repaired == ""
        assert [t.index for t in again] == list(range(len(kept) + 1))


@pytest.mark.parametrize("tail", [b"\x00" * 100, b'{"op_code": 4, "worker_id": "x', b"\xff\xfe\n", b"{]\n{}x\n"])
def test_a_garbled_tail_is_cut(journal: bytes, tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "study.jsonl"
    path.write_bytes(journal + tail)
    assert cut_torn_tail(path) == len(tail)
    assert path.read_bytes() == journal
    assert cut_torn_tail(path) == 0
    assert cut_torn_tail(tmp_path / "absent") == 0


def test_damage_in_the_middle_is_an_error_not_a_crash(journal: bytes, tmp_path: Path) -> None:
    path = tmp_path / "study.jsonl"
    lines = journal.splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], b"{garbled\n", *lines[3:]]))
    before = path.read_bytes()
    with pytest.raises(StudyError, match="cannot be opened") as caught:
        study(path)
    assert "move the file away" in caught.value.remedy
    assert path.read_bytes() == before


def test_a_stale_lock_of_optunas_own_stalls_nothing(journal: bytes, tmp_path: Path) -> None:
    """A process killed inside Optuna's symlink lock leaves ``<journal>.lock`` behind, which stalls Optuna for 30 s."""
    path = tmp_path / "study.jsonl"
    path.write_bytes(journal)
    os.symlink(path, f"{path}.lock")
    start = time.monotonic()
    one = study(path)
    one.add(trial(4))
    assert time.monotonic() - start < 5
    assert len(list(one)) == 5


WRITER = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[2]]
from test_study import study, trial
one = study(Path(sys.argv[1]))
for index in range(10**6):
    one.add(trial(index))
    print(index, flush=True)
"""


def test_a_killed_search_loses_nothing_that_was_recorded(tmp_path: Path) -> None:
    """kill -9 at an arbitrary moment of writing: what ``add`` returned from is there, and no lock is left."""
    path = tmp_path / "study.jsonl"
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", WRITER, str(path), here]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(here).parent) as process:
        assert process.stdout is not None
        told = [int(process.stdout.readline()) for _ in range(6)]
        process.kill()
        told += [int(line) for line in process.stdout.read().splitlines() if line]
    start = time.monotonic()
    opened = study(path)
    indices = [t.index for t in opened]
    assert indices[: len(told)] == told
    assert len(indices) - len(told) in (0, 1)
    opened.add(trial(len(indices)))
    assert time.monotonic() - start < 5
