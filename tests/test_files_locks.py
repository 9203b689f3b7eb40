"""Files are whole or absent; locks die with their process."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nas.errors import StudyError
from nas.files import digest, read_sealed, write_atomic, write_json, write_sealed
from nas.locks import cache_dir, file_lock, run_lock, timing_lock, training_lock

# ---- files -------------------------------------------------------------------------------------------


def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "file.txt"
    write_atomic(path, "one é")
    assert path.read_text(encoding="utf8") == "one é"
    write_atomic(path, b"\x00two")
    assert path.read_bytes() == b"\x00two"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.txt"
    write_atomic(path, "old")

    def full(*args: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        write_atomic(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


WRITER = """
import sys
from pathlib import Path
from nas.files import write_atomic
path = Path(sys.argv[1])
print("ready", flush=True)
for i in range(10**9):
    write_atomic(path, f"{i % 10}" * 200_000)
"""


def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_atomic(path, "0" * 200_000)
    for delay in (0.01, 0.02, 0.05):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.kill()
        process.communicate()
        text = path.read_text()
        assert len(text) == 200_000
        assert len(set(text)) == 1


def test_json_refuses_nan(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"b": [1, 2.5], "a": None})
    assert json.loads(path.read_text()) == {"b": [1, 2.5], "a": None}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"b": math.nan})
    assert json.loads(path.read_text())["b"] == [1, 2.5]


def test_a_sealed_file_knows_when_it_was_edited(tmp_path: Path) -> None:
    path = tmp_path / "sealed.json"
    write_sealed(path, {"b": 1.5, "a": [1, None, "π"], "n": {10: "ten", 9: "nine"}})
    content = read_sealed(path)
    assert (content["b"], content["a"], content["n"]) == (1.5, [1, None, "π"], {"9": "nine", "10": "ten"})
    write_sealed(tmp_path / "again.json", content)  # the old digest is no part of the content
    assert read_sealed(tmp_path / "again.json") == content
    whole = path.read_text()
    for damaged in (whole.replace("1.5", "1.6"), whole[:-10], "", "[1]", '{"a": 1}'):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=r"Expecting|object|sha256|delimiter|Unterminated"):
            read_sealed(path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_sealed(path, {"a": math.nan})
    with pytest.raises(FileNotFoundError):
        read_sealed(tmp_path / "nowhere.json")


def test_digest_knows_content_not_order() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": 1, "b": [1, 2]}) != digest({"a": 1, "b": [2, 1]})
    assert digest(1) != digest("1")
    assert len(digest(None)) == 64


# ---- locks -------------------------------------------------------------------------------------------


def taken(path: Path, *, shared: bool = False) -> bool:
    try:
        with file_lock(path, shared=shared, wait=False):
            return False
    except BlockingIOError:
        return True


def test_exclusive_and_shared(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "lock"
    with file_lock(path):
        assert taken(path)
        assert taken(path, shared=True)
    with file_lock(path, shared=True), file_lock(path, shared=True, wait=False):
        assert taken(path)
        assert not taken(path, shared=True)
    assert not taken(path)


def test_an_error_inside_releases(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="inside"), run_lock(tmp_path):
        raise ValueError("inside")
    with run_lock(tmp_path):
        pass


def test_one_run_per_folder(tmp_path: Path) -> None:
    with run_lock(tmp_path / "a"):
        with (
            pytest.raises(StudyError, match=rf"Another process \({os.getpid()}\) is working in .*a") as caught,
            run_lock(tmp_path / "a"),
        ):
            pass
        assert "--out" in caught.value.remedy
        with run_lock(tmp_path / "b"):
            pass


def test_training_never_beside_timing() -> None:
    machine = cache_dir() / "machine.lock"
    assert str(cache_dir()) == os.environ["NAS_CACHE_DIR"]
    with training_lock(), training_lock():
        assert taken(machine)
        assert not taken(machine, shared=True)
    with timing_lock():
        assert taken(machine, shared=True)
    assert not taken(machine)


HOLDER = """
import sys, time
from pathlib import Path
from nas.locks import run_lock, timing_lock
with run_lock(Path(sys.argv[1])), timing_lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_kill_9_leaves_nothing_locked(tmp_path: Path) -> None:
    machine = cache_dir() / "machine.lock"
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(StudyError, match=str(process.pid)), run_lock(tmp_path):
            pass
        assert taken(machine)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert not taken(machine)
    start = time.monotonic()
    with run_lock(tmp_path), timing_lock():
        assert time.monotonic() - start < 1
    assert not taken(machine)
