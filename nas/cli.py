"""The command line: search, sweep, ablate, compress, export, … The only place that prints and exits."""

from __future__ import annotations

import argparse
import contextlib
import sys
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nas import (
    __version__,
    commands_ablate,
    commands_compress,
    commands_sweep,
    commands_synthesise,
    commands_tables,
)
from nas.errors import ExperimentError, NasError

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)
USER_ERROR, INTERRUPTED = 2, 130


class Bar:
    """Progress on the terminal: one bar a stage with time left, notes above it."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[message]}"), console=console,
        )  # fmt: skip
        self.task = self.progress.add_task("starting", total=1.0, message="")

    def stage(self, name: str) -> None:
        """Begin a new bar."""
        self.progress.update(self.task, completed=1.0)
        self.task = self.progress.add_task(name, total=1.0, message="")

    def update(self, share: float, message: str = "") -> None:
        """Move the bar."""
        self.progress.update(self.task, completed=share, message=escape(message))

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self.progress.console.print(escape(text), soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``nas``; returns the exit code: 0, 2 for what a user can mend, 130 for Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.function(options) or 0)
    except NasError as error:
        if options.debug:
            traceback.print_exc()
        errors.print(f"[bold red]error[/]: {escape(str(error))}", soft_wrap=True)
        return USER_ERROR
    except KeyboardInterrupt:
        errors.print("stopped; nothing finished is lost, go on with --resume")
        return INTERRUPTED
    except Exception as error:
        if options.debug:
            raise
        errors.print(
            f"[bold red]internal error[/]: {type(error).__name__}: {escape(str(error))}\n"
            "Nothing finished is lost: go on with --resume. --debug shows where it happened.",
            soft_wrap=True,
        )
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("nas", description="Hardware-aware search for compressed students.")
    parser.add_argument("--version", action="version", version=f"nas {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    search = commands.add_parser("search", parents=[common], help="search, and return a measured student")
    search.add_argument("experiment", help="file or bundled name (see `nas list experiments`)")
    search.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the experiment"
    )
    search.add_argument("--out", type=Path, help="run folder (default: runs/NAME)")
    search.add_argument("--resume", action="store_true", help="go on where a run stopped; starts where there is none")
    search.add_argument("--dry-run", action="store_true", help="say what would be done, and how long it would take")
    search.set_defaults(function=_search)

    commands_sweep.add_parser(commands, common).set_defaults(function=_sweep)
    commands_ablate.add_parser(commands, common).set_defaults(function=_ablate)

    profile = commands.add_parser(
        "profile", parents=[common], help="build a latency table for this device, or for one far away"
    )
    profile.add_argument("experiment", nargs="?", help="experiment whose space and device are profiled, or:")
    profile.add_argument("--space", help="search space by name, path or module:name")
    profile.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the experiment or space"
    )
    profile.add_argument("--input", default="3x224x224", help="with --space: shape of an input (default: %(default)s)")
    profile.add_argument("--classes", type=int, default=1000, help="with --space: classes (default: %(default)s)")
    profile.add_argument("--device", choices=["local"], default="local", help="this machine (others: --bundle, --ssh)")
    profile.add_argument("--name", help="the device's name (default: processor, runtime, threads)")
    profile.add_argument("--threads", type=int, help="threads of an inference (default: 1)")
    profile.add_argument("--batch", type=int, help="inputs of an inference (default: 1)")
    profile.add_argument("--runtime", help="see `nas list runtimes` (default: onnxruntime)")
    profile.add_argument("--provider", help="what executes within the runtime: cpu, cuda, …")
    profile.add_argument("--graph", help="how far the runtime may rewrite the graph")
    profile.add_argument("--minutes", type=float, help="in all; parts beyond them are interpolated (default: 10)")
    profile.add_argument("--nets", type=int, metavar="N", help="calibration networks (default: 30)")
    profile.add_argument(
        "--keys", type=Path, metavar="FILE", help="measure the parts in FILE alone, a key a line (nas tables adapt)"
    )
    profile.add_argument("--resume", action="store_true", help="go on with a measurement that Ctrl-C ended")
    profile.add_argument("--out", type=Path, help="table file (default: this machine's cache, where searches look)")
    profile.add_argument("--bundle", type=Path, metavar="DIR", help="write what another machine can measure by itself")
    profile.add_argument(
        "--from-bundle", type=Path, metavar="DIR", help="make the table of a bundle (or its measurements.json)"
    )
    profile.add_argument("--ssh", metavar="HOST", help="measure on a machine with numpy and onnxruntime, over ssh")
    profile.add_argument("--ssh-python", default="python3", metavar="COMMAND", help="its Python (default: %(default)s)")
    profile.add_argument(
        "--ssh-option", action="append", default=[], metavar="OPTION", help="for ssh, as in --ssh-option=-p2222"
    )
    profile.set_defaults(function=_profile)

    commands_tables.add_parser(commands, common).set_defaults(function=_tables)
    commands_synthesise.add_parser(commands, common).set_defaults(function=_tables)

    for command in commands_compress.add_parsers(commands, common):
        command.set_defaults(function=_long)

    front = commands.add_parser(
        "front", parents=[common], help="a run's Pareto front and best candidate under any reward; trains nothing"
    )
    front.add_argument("run", type=Path, help="run folder, of a search that goes on or is over")
    front.add_argument("--reward", metavar="KIND", help="reward by name or module:name (default: the run's own)")
    front.add_argument(
        "--set", action="append", default=[], dest="settings", metavar="KEY=VALUE", help="a key of the reward: w=-0.1"
    )
    front.add_argument(
        "--limit", action="append", default=[], metavar="COST=VALUE", help="instead of the run's budget: latency_ms=3"
    )
    front.add_argument(
        "--cost", action="append", default=[], help="what stands against quality (default: the budget's latency)"
    )
    front.add_argument("--arm", default="search", help="search (default), or a baseline that searches: random")
    front.add_argument("--json", action="store_true", help="print JSON")
    front.set_defaults(function=_front)

    report = commands.add_parser("report", parents=[common], help="write a run's report.html again and print its table")
    report.add_argument("run", type=Path, help="run, sweep or ablation folder")
    report.set_defaults(function=_report)

    listing = commands.add_parser("list", parents=[common], help="what is there: spaces, strategies, runs, …")
    listing.add_argument("what", nargs="?", choices=sorted(_kinds()), help="one kind only")
    listing.set_defaults(function=_list)
    return parser


def _search(options: argparse.Namespace) -> int:
    from nas import job, lookup_job
    from nas.experiment import LookupExperiment, load_any

    experiment = load_any(options.experiment, options.set)
    run = options.out or Path("runs") / experiment.name
    if options.dry_run:
        return _dry_run(experiment)
    bar = Bar()
    with bar.progress:
        if isinstance(experiment, LookupExperiment):
            lookup_job.execute(experiment, run, resume=options.resume, progress=bar)
        else:
            job.execute(experiment, run, resume=options.resume, progress=bar)
    _print_result(run)
    return 0


def _dry_run(experiment: Any) -> int:
    from nas import forecast, lookup_job
    from nas.experiment import LookupExperiment

    looked_up = isinstance(experiment, LookupExperiment)
    for line in lookup_job.forecast(experiment) if looked_up else forecast.forecast(experiment):
        console.print(escape(line), soft_wrap=True)
    return 0


def _sweep(options: argparse.Namespace) -> int:
    from nas.sweep.schedule import forecast_sweep, run_sweep

    sweep, folder, notes = commands_sweep.asked(options)
    for note in notes:
        console.print(escape(note), soft_wrap=True)
    if options.dry_run:
        for line in forecast_sweep(sweep, folder):
            console.print(escape(line), soft_wrap=True)
        return 0
    bar = Bar()
    with bar.progress:
        run_sweep(sweep, folder, resume=options.resume, progress=bar)
    _print_sweep(folder)
    return 0


def _print_sweep(folder: Path) -> None:
    from nas.sweep.page import headline, sweep_table
    from nas.sweep.result import read_result

    result = read_result(folder)
    console.print(sweep_table(result))
    for line in [*headline(result), f"report: {folder / 'report.html'}"]:
        console.print(line, markup=False, soft_wrap=True)


def _ablate(options: argparse.Namespace) -> int:
    ablation, folder = commands_ablate.asked(options)
    if options.dry_run:
        for line in commands_ablate.forecast(ablation):
            console.print(escape(line), soft_wrap=True)
        return 0
    bar = Bar()
    with bar.progress:
        commands_ablate.run(ablation, folder, options.resume, bar)
    _print_ablation(folder)
    return 0


def _print_ablation(folder: Path, again: bool = False) -> None:
    table, lines = commands_ablate.said(folder, again=again)
    console.print(table)
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _profile(options: argparse.Namespace) -> int:
    from nas import profiling

    if sum(way is not None for way in (options.bundle, options.from_bundle, options.ssh)) > 1:
        raise ExperimentError("--bundle, --from-bundle and --ssh exclude each other.", remedy="give one of them")
    subject = None if options.from_bundle else _subject(options)
    bar = Bar()
    with bar.progress:
        if subject is None:
            path, _ = profiling.read(options.from_bundle, options.out, name=options.name, progress=bar)
        elif options.bundle is not None:
            profiling.write(subject, options.bundle, progress=bar)
        elif options.ssh is not None:
            path, _ = profiling.profile_over_ssh(
                subject, options.ssh, options.out, name=options.name, python=options.ssh_python,
                options=options.ssh_option, progress=bar,
            )  # fmt: skip
        else:
            path, _ = profiling.profile_here(subject, options.out, resume=options.resume, progress=bar)
    if options.bundle is not None:
        said = f"bundle written to {options.bundle}: copy it to the device, run `python3 run.py` in it, bring it back, "
        said += f"and `nas profile --from-bundle {options.bundle}`"
    else:
        said = f"table written to {path}"
    console.print(said, markup=False, soft_wrap=True)
    return 0


def _subject(options: argparse.Namespace) -> Any:
    from nas import profiling
    from nas.experiment import load_experiment

    if (options.experiment is None) == (options.space is None):
        raise ExperimentError(
            "nas profile takes either an experiment or --space.", remedy="nas profile --space mobilenet --device local"
        )
    scenario = profiling.Scenario(
        options.name, options.threads, options.batch, options.runtime, options.provider, options.graph
    )
    if options.space is None:
        subject = profiling.of_experiment(load_experiment(options.experiment, options.set), scenario, options.minutes)
    else:
        shape = profiling.parse_shape(options.input)
        subject = profiling.of_space(options.space, options.set, shape, options.classes, scenario, options.minutes)
    return subject.narrowed(options.nets, options.keys)


def _tables(options: argparse.Namespace) -> int:
    answer: commands_tables.Answer = options.answer(options)
    for line in answer.lines:
        console.print(line, markup=False, emoji=False, soft_wrap=True)
    return answer.code


def _long(options: argparse.Namespace) -> int:
    """A command that takes its time: a bar while it works, its answer in the end."""
    bar = Bar()
    with contextlib.nullcontext() if getattr(options, "list", False) else bar.progress:
        answer: commands_tables.Answer = options.answer(options, bar)
    for line in answer.lines:
        console.print(line, markup=False, emoji=False, soft_wrap=True)
    return answer.code


def _front(options: argparse.Namespace) -> int:
    import json

    from nas.fronts import rows, run_front, sentences

    front = run_front(
        options.run, kind=options.reward, settings=options.settings, limits=options.limit, costs=options.cost,
        arm=options.arm,
    )  # fmt: skip
    if options.json:
        print(json.dumps(front.plain(), indent=2, allow_nan=False))
        return 0
    table = rows(front)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    aligned = ("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table)
    for line in (*aligned, "", *sentences(front)):
        console.print(line, markup=False, soft_wrap=True)
    return 0


def _report(options: argparse.Namespace) -> int:
    if (options.run / "sweep.yaml").exists():
        from nas.sweep.page import write_report as write_sweep_report

        write_sweep_report(options.run)
        _print_sweep(options.run)
        return 0
    if commands_ablate.is_ablation(options.run):
        _print_ablation(options.run, again=True)
        return 0
    from nas.report import write_report

    write_report(options.run)
    _print_result(options.run)
    return 0


def _print_result(run: Path) -> None:
    import json

    from nas import report
    from nas.report import lookup

    summary = json.loads((run / "summary.json").read_text())
    words = lookup if lookup.is_lookup(summary) else report
    console.print(words.summary_table(summary))
    for line in words.headline(summary):
        console.print(line, markup=False, soft_wrap=True)
    console.print(f"report: {run / 'report.html'}", markup=False, soft_wrap=True)


def _kinds() -> tuple[str, ...]:
    return (
        "spaces", "experiments", "sweeps", "tables", "tasks", "strategies", "rewards", "passes", "evaluators",
        "runtimes", "formats", "runs",
    )  # fmt: skip


def _list(options: argparse.Namespace) -> int:
    for kind in [options.what] if options.what else _kinds():
        names = _names(kind)
        if options.what:
            for name in names:
                console.print(name, markup=False, soft_wrap=True)
        else:
            console.print(f"[bold]{kind}[/]: {escape(', '.join(names) or 'none')}", soft_wrap=True)
    return 0


def _names(kind: str) -> list[str]:
    from nas import content
    from nas.locks import cache_dir

    bundled = {"spaces": "search_spaces", "experiments": "experiments", "sweeps": "experiments/sweeps"}
    if kind in bundled:
        return list(content.available(bundled[kind]))
    if kind == "tables":
        cached = sorted((cache_dir() / "tables").glob("*.json"))
        return [*content.available("latency_tables"), *map(str, cached)]
    if kind == "runs":
        kept = ("experiment.yaml", "sweep.yaml", "ablation.yaml")
        begun = (path for name in kept for path in Path("runs").glob(f"*/{name}"))
        return sorted({str(path.parent) for path in begun})
    return list(_registries()[kind])


def _registries() -> dict[str, list[str]]:
    from nas.compression import passes
    from nas.evaluators import evaluators
    from nas.latency.runtimes import runtimes
    from nas.reward import rewards
    from nas.strategies import strategies
    from nas.student.formats import formats
    from nas.tasks import tasks

    found: dict[str, Iterable[str]] = {
        "tasks": tasks, "strategies": strategies, "rewards": rewards, "passes": passes, "evaluators": evaluators,
        "runtimes": runtimes, "formats": formats,
    }  # fmt: skip
    return {kind: list(registry) for kind, registry in found.items()}


if __name__ == "__main__":
    sys.exit(main())
