"""Executors: every result arrives once, and a worker that dies takes only its own item with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from nas.errors import TrainingError
from nas.executors import Executor, Processes, Serial


def scaled(shared: float, item: float) -> float:
    return shared * item


def deadly(shared: Any, item: int) -> int:
    if item < 0:
        os._exit(3)
    return item * item


def slow(shared: Any, item: float) -> float:
    time.sleep(item)
    return item


def setting(shared: Any, item: str) -> Any:
    return {
        "threads": torch.get_num_threads(),
        "pid": os.getpid(),
        "SIGINT": signal.getsignal(signal.SIGINT) == signal.SIG_IGN,
    }[item]


def failing(shared: Any, item: int) -> int:
    if item == 1:
        raise ValueError("item 1")
    return item


@pytest.fixture(scope="module")
def processes() -> Any:
    with Processes(2.0, 2) as pool:
        yield pool


def test_serial_runs_in_order() -> None:
    with Serial(2.0) as executor:
        assert list(executor.run(scaled, [3, 1, 2])) == [(0, 6.0), (1, 2.0), (2, 4.0)]
        assert list(executor.run(scaled, [])) == []


def test_processes_give_every_result_once(processes: Executor) -> None:
    assert sorted(processes.run(scaled, [3.0, 1.0, 2.0, 5.0])) == [(0, 6.0), (1, 2.0), (2, 4.0), (3, 10.0)]
    assert list(processes.run(scaled, [])) == []


def test_results_arrive_as_they_are_done(processes: Executor) -> None:
    assert [position for position, _ in processes.run(slow, [0.6, 0.0, 0.1])] == [1, 2, 0]


def test_workers_use_one_thread_and_leave_ctrl_c_to_the_parent(processes: Executor) -> None:
    found = dict(processes.run(setting, ["threads", "pid", "SIGINT"]))
    assert found[0] == 1
    assert found[1] != os.getpid()
    assert found[2] is True


def test_an_ordinary_exception_is_raised(processes: Executor) -> None:
    for executor in (processes, Serial(0)):
        with pytest.raises(ValueError, match="item 1"):
            list(executor.run(failing, [0, 1]))


def test_a_dead_worker_is_reported_and_the_rest_finish(processes: Executor) -> None:
    found = dict(processes.run(deadly, [1, 2, -1, 3, 4]))
    assert isinstance(found[2], TrainingError)
    assert "worker process died" in str(found[2])
    assert {i: found[i] for i in (0, 1, 3, 4)} == {0: 1, 1: 4, 3: 9, 4: 16}
    # and the pool is as good as new
    assert dict(processes.run(deadly, [5])) == {0: 25}


def test_several_deaths(processes: Executor) -> None:
    found = dict(processes.run(deadly, [-1, 2, -3, 3]))
    assert sorted(found) == [0, 1, 2, 3]
    assert [isinstance(found[i], TrainingError) for i in range(4)] == [True, False, True, False]


def test_a_worker_that_dies_between_two_runs(processes: Executor) -> None:
    """Killed for memory while idle: the next run must not suffer for it."""
    _, pid = next(iter(processes.run(setting, ["pid"])))
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.5)
    assert dict(processes.run(deadly, [2, 3])) == {0: 4, 1: 9}


def test_close_stops_the_workers() -> None:
    with Processes(None, 1) as pool:
        ((_, pid),) = pool.run(setting, ["pid"])
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert list(Processes(None, 1).run(deadly, [])) == []


PARENT = """
import sys, time
sys.path[:0] = [sys.argv[1]]
from nas.executors import Processes
from test_executors import setting, slow
if __name__ == "__main__":
    pool = Processes(None, 1)
    print(list(pool.run(setting, ["pid"]))[0][1], flush=True)
    list(pool.run(slow, [60.0]))
"""


def test_workers_die_with_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": str(here.parent)}
    with subprocess.Popen(
        [sys.executable, str(script), str(here)], stdout=subprocess.PIPE, cwd=here.parent, env=environment
    ) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        process.kill()
        deadline = time.monotonic() + 10
        while alive(worker) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not alive(worker)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
