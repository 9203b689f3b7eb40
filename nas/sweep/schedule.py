"""The sweep itself: claim a trial, start its process, take down what became of it, until the budget is spent.

Every trial has a lock file that its process and the process that started it hold. A trial that is recorded as
running and whose lock is free has lost both, and whoever finds it goes on with it. So any number of commands may
work on one sweep, and none does what another does.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import yaml

from nas.errors import StudyError
from nas.files import write_atomic
from nas.locks import file_lock
from nas.progress import Progress, Silent
from nas.sweep.commands import CommandRunner
from nas.sweep.experiments import bind
from nas.sweep.page import write_report
from nas.sweep.parameter import Parameter, combinations
from nas.sweep.record import RETRIES, Entry, Ledger, Record
from nas.sweep.reports import read_reports
from nas.sweep.result import write_result
from nas.sweep.runners import FunctionRunner, Runner
from nas.sweep.spec import Sweep, parameters
from nas.sweep.trials import bury, claim_of, end
from nas.sweep.worker import Order, read_outcome, work

_POLL = 1.0  # seconds between two looks at the record, while another command may leave something to do
_LOOK = 0.2  # seconds between two looks at what trials report, where a pruner judges it
_REFRESH = 10.0  # seconds between two writings of sweep.json


def run_sweep(sweep: Sweep, folder: Path, *, resume: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Run a sweep in its folder; returns what ``sweep.json`` says.

    Trials are processes: in a script, call this under ``if __name__ == "__main__":``. With ``resume``, a sweep that
    is there is gone on with, or worked on beside another process that does so already.

    Raises:
        NasError: something is wrong with the sweep, before anything runs; or every trial failed.
    """
    record = prepare(sweep, folder)
    progress = progress or Silent()
    _open_folder(record, resume, progress)
    return Scheduler(record, progress).run()


def forecast_sweep(sweep: Sweep, folder: Path) -> list[str]:
    """Lines for people about what a sweep would do. Writes nothing; raises all that the sweep would refuse at once."""
    record = prepare(sweep, folder)
    size = combinations(record.parameters)
    subject = sweep.experiment or sweep.function or sweep.command
    said = [f"sweep {sweep.name} of {subject}, {sweep.goal} {sweep.metric}, {sweep.sampler}"]
    said += [f"  {p.key}: {p.describe()}" for p in record.parameters]
    if sweep.pruner:
        said.append(f"trials are ended on their way by {sweep.pruner}")
    bounds = [f"{sweep.trials} trials" if sweep.trials else "", f"{sweep.seconds:g} s" if sweep.seconds else ""]
    every = "combinations without end" if math.isinf(size) else f"{size:,.0f} combinations"
    said.append(f"{every}; at most {' or '.join(filter(None, bounds))}, {sweep.workers} at a time")
    return said + record.runner.forecast()


def prepare(sweep: Sweep, folder: Path) -> Record:
    """Check everything that can be checked without running; writes nothing.

    Raises:
        NasError: names the key that is wrong, and the value.
    """
    runner, varied, subject = _subject(sweep, parameters(sweep))
    plain = sweep.model_dump(mode="python")
    identity = {key: plain[key] for key in ("set", "sampler", "sampler_settings", "seed", "metric")}
    identity |= {"subject": subject, "direction": sweep.goal, "vary": [p.plain() for p in varied]}
    if sweep.pruner:
        identity |= {key: plain[key] for key in ("pruner", "pruner_settings")}
    return Record(folder, sweep, varied, runner, identity)


def _subject(sweep: Sweep, varied: tuple[Parameter, ...]) -> tuple[Runner, tuple[Parameter, ...], Any]:
    """What runs a trial, the parameters as it takes them, and what tells this subject from another."""
    fixed = tuple(sweep.set.items())
    if sweep.function is not None:
        function = FunctionRunner(sweep.function, sweep.metric, sweep.vary, fixed)
        function.load()
        return function, varied, sweep.function
    if sweep.command is not None:
        place = Path(sweep.directory or ".")
        command = CommandRunner(sweep.command, sweep.name, sweep.metric, place, sweep.vary, fixed)
        command.check()
        return command, varied, [sweep.command, str(place)]
    experiment, bound = bind(sweep, varied)
    subject = experiment.base.plain()
    subject["search"].pop("workers", None)
    return experiment, bound, subject


def _open_folder(record: Record, resume: bool, progress: Progress) -> None:
    kept = record.folder / "sweep.yaml"
    if kept.exists() and not resume:
        raise StudyError(
            f"{record.folder} holds a sweep already.",
            remedy="--resume to go on with it, or another folder with --out",
        )
    if (record.folder / "experiment.yaml").exists():
        raise StudyError(f"{record.folder} holds the run of a search.", remedy="another folder with --out")
    record.folder.mkdir(parents=True, exist_ok=True)
    with record.open() as ledger:  # another sweep's record is refused before anything is overwritten
        write_atomic(kept, yaml.safe_dump(record.sweep.model_dump(mode="json"), sort_keys=False))
        if ledger.repaired:
            progress.note(ledger.repaired)


@dataclass
class _Child:
    """A trial that runs: its process, and the claim that is held with it."""

    entry: Entry
    process: SpawnProcess
    claim: contextlib.ExitStack
    start: float = field(default_factory=time.monotonic)
    reported: int = 0


@dataclass
class Scheduler:
    """Works on a sweep with as many processes at a time as its ``workers`` say."""

    record: Record
    progress: Progress
    _running: dict[int, _Child] = field(default_factory=dict)
    _start: float = field(default_factory=time.monotonic)
    _before: float = 0.0  # seconds of earlier commands
    _written: float = 0.0
    _exhausted: bool = False

    def run(self) -> dict[str, Any]:
        """Until the budget is spent and no trial runs any more, not even another command's."""
        self.progress.stage(f"sweep {self.record.sweep.name}")
        with self.record.open() as ledger:
            self._before = max((entry.elapsed for entry in ledger.entries()), default=0.0)
        try:
            while self._fill():
                self._wait()
                self._reap()
                self._judge()
        finally:
            self._stop()
        return self._finish()

    @property
    def elapsed(self) -> float:
        """Seconds of this sweep, those of earlier commands included."""
        return self._before + time.monotonic() - self._start

    # ---- claims --------------------------------------------------------------------------------

    def _fill(self) -> bool:
        """Start trials while there are workers and trials; returns whether any trial is still running, here or not."""
        with self.record.open() as ledger:
            while len(self._running) < self.record.sweep.workers:
                entry = self._lost(ledger) or self._new(ledger)
                if entry is None:
                    break
                self._begin(entry)
            entries = ledger.entries()
        self._show(entries)
        return any(entry.status == "running" for entry in entries)

    def _lost(self, ledger: Ledger) -> Entry | None:
        """A trial that is recorded as running, and nobody runs it."""
        for entry in ledger.entries():
            if entry.status == "running" and self._is_free(entry) and not self._take_down(ledger, entry):
                return entry
        return None

    def _new(self, ledger: Ledger) -> Entry | None:
        sweep = self.record.sweep
        begun = len(ledger.entries())
        if self._exhausted or (sweep.trials is not None and begun >= sweep.trials):
            return None
        if sweep.seconds is not None and begun and self.elapsed >= sweep.seconds:
            return None
        entry = ledger.ask()
        if entry is None:
            self._exhausted = True
            self.progress.note("every combination has been tried")
        return entry

    def _begin(self, entry: Entry) -> None:
        claim = contextlib.ExitStack()
        claim.enter_context(file_lock(claim_of(self._folder(entry)), shared=True))
        order = Order(self.record.runner, entry.values, self._folder(entry), os.getpid())
        process = multiprocessing.get_context("spawn").Process(target=work, args=(order,), name=f"trial {entry.index}")
        self._running[entry.index] = _Child(entry, process, claim)  # first: an interrupt may come at any moment
        with _no_interrupts():
            process.start()

    def _wait(self) -> None:
        """Until a process ends; with a worker to spare, not for long, because another command may lose a trial; and
        shorter where trials are judged on their way."""
        sweep = self.record.sweep
        full = len(self._running) == sweep.workers
        if self._running:
            wait([child.process.sentinel for child in self._running.values()],
                 _LOOK if sweep.pruner else None if full else _POLL)  # fmt: skip
        else:
            time.sleep(_POLL)

    def _folder(self, entry: Entry) -> Path:
        return self.record.folder / "trials" / f"{entry.index:04d}"

    def _is_free(self, entry: Entry) -> bool:
        try:
            with file_lock(claim_of(self._folder(entry)), wait=False):
                return True
        except BlockingIOError:
            return False

    # ---- outcomes ------------------------------------------------------------------------------

    def _reap(self) -> None:
        """Take down what became of the processes that have ended."""
        ended = wait([child.process.sentinel for child in self._running.values()], 0)
        for child in [c for c in self._running.values() if c.process.sentinel in ended]:
            bury(child.process)
            with self.record.open() as ledger:
                if not self._take_down(ledger, child.entry):
                    self._mourn(ledger, child)
            self._release(child)

    def _release(self, child: _Child) -> None:
        """Not before its end is recorded: a free claim means that nobody knows what became of the trial."""
        child.claim.close()
        del self._running[child.entry.index]

    def _judge(self) -> None:
        """Record what the running trials have reported, and end those that the pruner would."""
        if self.record.sweep.pruner is None:
            return
        for child in list(self._running.values()):
            values = read_reports(self._folder(child.entry)).intermediate
            if len(values) <= child.reported:
                continue
            child.reported = len(values)
            with self.record.open() as ledger:
                ended = ledger.report(child.entry, values)
            if ended:
                self._prune(child)

    def _prune(self, child: _Child) -> None:
        end([child.process])
        with self.record.open() as ledger:
            if not self._take_down(ledger, child.entry):  # it may have come to its end meanwhile
                told = ledger.prune(child.entry, time.monotonic() - child.start, self.elapsed)
                self.progress.note(f"trial {told.index}: pruned {told.reason}  ({_words(told.values)})")
        self._release(child)

    def _take_down(self, ledger: Ledger, entry: Entry) -> bool:
        """Record a trial's outcome; returns whether there is one."""
        outcome = read_outcome(self._folder(entry))
        if outcome is None:
            return False
        ledger.report(entry, read_reports(self._folder(entry)).intermediate)
        if outcome["reason"]:
            told = ledger.fail(entry, outcome["reason"], outcome["seconds"], self.elapsed)
        else:
            told = ledger.complete(entry, outcome["figures"], outcome["seconds"], self.elapsed)
        metric = self.record.sweep.metric
        ended = f"failed: {told.reason}" if told.value is None else f"{metric} {told.value:.6g}"
        self.progress.note(f"trial {told.index}: {ended}  ({_words(told.values)})")
        return True

    def _mourn(self, ledger: Ledger, child: _Child) -> None:
        """A process that ended without an outcome: the trial is tried once more, in its own folder, or has failed."""
        code = child.process.exitcode or 0
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        if ledger.died(child.entry) > RETRIES:
            reason = f"its process {how}, after a first one had died too (out of memory?)"
            ledger.fail(child.entry, reason, 0.0, self.elapsed)
            self.progress.note(f"trial {child.entry.index}: failed: {reason}")
        else:
            self.progress.note(f"trial {child.entry.index}: its process {how}; it is tried once more")

    # ---- the end -------------------------------------------------------------------------------

    def _stop(self) -> None:
        """Interrupted: the processes end, and their trials stay recorded as running, for a resume to go on with."""
        end([child.process for child in self._running.values() if child.process.pid is not None])
        for child in self._running.values():
            child.claim.close()

    def _show(self, entries: list[Entry]) -> None:
        sweep, ended = self.record.sweep, sum(entry.status != "running" for entry in entries)
        shares = [ended / sweep.trials if sweep.trials else 0.0, self.elapsed / sweep.seconds if sweep.seconds else 0.0]
        values = [entry.value for entry in entries if entry.value is not None]
        best = (max if sweep.goal == "maximize" else min)(values, default=None)
        so_far = "nothing yet" if best is None else f"best {sweep.metric} {best:.6g}"
        self.progress.update(min(1.0, max(shares)), f"{ended}/{sweep.trials or '?'} trials, {so_far}")
        if ended and time.monotonic() - self._written > _REFRESH:
            self._write()

    def _write(self) -> dict[str, Any]:
        with self.record.open() as ledger:
            result = write_result(self.record, ledger, self.elapsed)
        self._written = time.monotonic()
        return result

    def _finish(self) -> dict[str, Any]:
        result = self._write()
        write_report(self.record.folder)
        if result["best"] is None:
            reasons = sorted({trial["reason"] for trial in result["trials"]})
            raise StudyError(
                f"All {len(result['trials'])} trials failed: {'; '.join(reasons[:3])}.",
                remedy="see trials/*/log.txt",
            )
        return result


def _words(values: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """Ctrl-C goes to every process of a terminal; a trial's process is born deaf to it, because its parent ends it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
