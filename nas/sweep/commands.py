"""Trials that are commands: a script of anybody's, which gets its parameters from NNI's calls or as options."""

from __future__ import annotations

import json
import os
import select
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from nas.errors import ExperimentError, TrainingError
from nas.locks import file_lock
from nas.progress import Progress
from nas.sweep.nni_space import NAME, effective, nested
from nas.sweep.reports import begin, figures_of, read_reports
from nas.sweep.trials import GRACE, LOG, claim_of

STANDIN = Path(__file__).parent / "standin"  # holds the module `nni` that answers a trial's calls
OPTIONS = "{params}"
_DEADLY = (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
_LINES = 5  # of its output that say why a command failed


@dataclass(frozen=True)
class CommandRunner:
    """Runs a shell command in a process of its own; its result is what it reports last as the final one.

    Args:
        template: the command; ``{params}`` in it stands for ``--key value`` options.
        name: of the sweep.
        metric: what a bare number stands for.
        directory: where it runs.
        space: what is varied, as the sweep says it.
        fixed: keys and values of every trial.
    """

    template: str
    name: str
    metric: str
    directory: Path
    space: dict[str, Any] = field(default_factory=dict)
    fixed: tuple[tuple[str, Any], ...] = ()

    def check(self) -> None:
        """Raises ExperimentError where the command cannot be run at all."""
        if not self.template.strip():
            raise ExperimentError("The command is empty.", expected="one such as python train.py")
        if not self.directory.is_dir():
            raise ExperimentError(f"The command is to run in {self.directory}, which is no folder.")

    def settle(self, values: dict[str, Any]) -> dict[str, Any]:
        """All of them, but for what lies in branches that were not chosen."""
        return effective(self.space, values)

    def run(self, values: dict[str, Any], folder: Path, progress: Progress) -> dict[str, float]:
        """Run the command to its end, and return what it reported."""
        folder = folder.resolve()
        begin(folder, int(folder.name), self._parameters(values))
        command, log = self.command(values, folder) or self.template, folder / LOG
        progress.note(command)
        begun = log.stat().st_size if log.exists() else 0
        # The command holds the trial's claim as well: should it outlive whoever started it, nobody begins a second one.
        with file_lock(claim_of(folder), shared=True) as claim:
            sys.stdout.flush()
            code = self._wait(command, folder, claim.fileno())
        if code:
            raise TrainingError(f"the command ended with code {code}{_last_lines(log, begun)}")
        reports = read_reports(folder)
        if not reports.finals:
            raise TrainingError(
                "the command ended without nni.report_final_result "
                f"({len(reports.intermediate)} intermediate results){_last_lines(log, begun)}"
            )
        figures = figures_of(reports.finals[-1], self.metric)
        if not figures:
            raise TrainingError(f"the command reported {reports.finals[-1]!r}, in which {self.metric} is no number")
        return figures

    def _wait(self, command: str, folder: Path, claim: int) -> int:
        """Run the command; returns its exit code.

        Whoever ends a trial signals its whole group, and kills what is left when this process has gone. So this one
        stays while the command puts its things away: until the last of its processes has let go of a pipe, because
        the shell between does not wait for the script.
        """
        held, given = os.pipe()
        before = signal.signal(signal.SIGTERM, _leave)
        try:
            process = subprocess.Popen(
                command, shell=True, cwd=self.directory, env=self._environment(folder), pass_fds=[claim, given],
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
            os.close(given)
            code = process.wait()
        except SystemExit:
            select.select([held], [], [], GRACE)
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
            os.close(held)
        if killed := _killed_by(code):  # as if it had been this process: a sweep tries such a trial once more
            sys.stdout.write(f"the command was killed by signal {killed}\n")
            sys.stdout.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return code

    def _environment(self, folder: Path) -> dict[str, str]:
        paths = [str(STANDIN), os.environ.get("PYTHONPATH", "")]
        # Last on the path: where the shell knows no python, it is the one that runs the sweep.
        programs = [os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)]
        return {
            **os.environ, "PATH": os.pathsep.join(programs), "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "NNI_PLATFORM": "local", "NNI_EXP_ID": self.name, "NNI_TRIAL_JOB_ID": f"{self.name}-{folder.name}",
            "NNI_TRIAL_SEQ_ID": str(int(folder.name)), "NNI_SYS_DIR": str(folder), "NNI_OUTPUT_DIR": str(folder),
            "NNI_CODE_DIR": str(self.directory.resolve()),
        }  # fmt: skip

    def _parameters(self, values: dict[str, Any]) -> dict[str, Any]:
        return {**dict(self.fixed), **nested(self.space, values)}

    def command(self, values: dict[str, Any], folder: Path) -> str:
        """The command with its options; empty where it takes none."""
        if OPTIONS not in self.template:
            return ""
        options = (f"--{key} {shlex.quote(value)}" for key, value in _flat(self._parameters(values)))
        return self.template.replace(OPTIONS, " ".join(options))

    def forecast(self) -> list[str]:
        """The command."""
        return [f"each trial runs this in {self.directory}: {self.template}"]


def _flat(parameters: dict[str, Any], within: str = "") -> Iterator[tuple[str, str]]:
    """Names and values of options: a branch is the value of its choice, and what is in it is named behind a dot."""
    for key, value in parameters.items():
        name = f"{within}{key}"
        if isinstance(value, dict) and NAME in value:
            yield name, str(value[NAME])
            yield from _flat({k: v for k, v in value.items() if k != NAME}, f"{name}.")
        else:
            yield name, value if isinstance(value, str) else json.dumps(value)


def _killed_by(code: int) -> int:
    """The signal that killed a command, 0 for none; a shell says 128 more for what it has started."""
    return -code if code < 0 else code - 128 if code - 128 in _DEADLY else 0


def _last_lines(log: Path, begun: int) -> str:
    """The end of what a command has said, as part of a sentence."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(begun)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return "; its last lines: " + " | ".join(lines[-_LINES:]) if lines else ""


def _leave(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)
