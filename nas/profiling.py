"""Building latency tables for people: what ``nas profile`` does, on this machine or on one far away."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nas import content
from nas.errors import ExperimentError, SpaceError, TableError
from nas.executors import Processes, cores
from nas.experiment import Experiment, apply_overrides
from nas.job import Job
from nas.latency import Device, LatencyTable
from nas.latency.bundle import read_measurements, write_bundle
from nas.latency.energy import source
from nas.latency.interpolate import grid
from nas.latency.plan import CALLS, YARDSTICK, CalibrationNet, Plan, calibration_genomes
from nas.latency.profile import Effort, Seen, assemble, describe, profile
from nas.latency.remote import run_over_ssh
from nas.latency.runtimes import runtimes
from nas.progress import Progress, Silent
from nas.space import SearchSpace, TaskInfo
from nas.student.tables import cached_path, calibration_nets, partial_of

MINUTES = 10.0
FEWEST_NETS, NETS = 8, 30
FOR_MEASURING = 0.9  # of the time given; fits and interpolation have the rest
AT_LEAST = 0.2  # of the time given, for measuring, however long the exports took
FAR_PARTS = 2.0  # parts that a bundle holds for each second of measuring
FAR_ENERGY_SECONDS = 0.1  # metering of a part, where there is a meter


@dataclass(frozen=True)
class Subject:
    """What is profiled: a space, on data of some shape, on a device.

    Attributes:
        name, settings: of the space, by which it can be made again.
        space, info, device: as in an experiment.
        effort: how long, and how well.
        nets: calibration networks.
        keys: the parts to measure; () is as many as the time allows.
    """

    name: str
    settings: dict[str, Any]
    space: SearchSpace
    info: TaskInfo
    device: Device
    effort: Effort
    nets: int
    keys: tuple[str, ...] = ()

    def narrowed(self, nets: int | None, keys: Path | None) -> Subject:
        """With another number of networks, and those parts alone that a file names, one a line; None changes nothing.

        Raises:
            TableError: too few or too many networks, no such file, or no such part in the space.
        """
        if nets is not None and not FEWEST_NETS <= nets <= NETS:
            raise TableError(f"{nets} calibration networks.", expected=f"{FEWEST_NETS} to {NETS}")
        chosen = self if nets is None else replace(self, nets=nets)
        if keys is None:
            return chosen
        try:
            lines = [line.strip() for line in keys.read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise TableError(f"{keys} cannot be read: {error}.", expected="one part key a line") from error
        parts = self.space.keys()
        if unknown := [line for line in lines if line not in parts]:
            raise TableError(
                f"Space {self.space.name!r} has no part {unknown[0]!r}.", expected="keys as its tables have them"
            )
        return replace(chosen, keys=tuple(lines))


@dataclass(frozen=True)
class Scenario:
    """What the device does while it is measured; None is the experiment's, or else the default."""

    name: str | None = None
    threads: int | None = None
    batch: int | None = None
    runtime: str | None = None
    provider: str | None = None
    graph: str | None = None

    def __post_init__(self) -> None:
        for name in ("threads", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ExperimentError(f"--{name} {value}.", expected="1 or more")

    @property
    def given(self) -> dict[str, Any]:
        """What is not None."""
        return {key: value for key, value in vars(self).items() if value is not None}


def of_experiment(experiment: Experiment, scenario: Scenario, minutes: float | None) -> Subject:
    """An experiment's space and device, and the time that its ``table`` section allows.

    Raises:
        ExperimentError: no time.
        TableError: the runtime does not execute some of the space's precisions.
    """
    _check_minutes(minutes)
    section = experiment.table
    job = Job(experiment, Path("."))
    device = Device.local(**{**experiment.device.scenario, **scenario.given})
    seconds = section.seconds if minutes is None else 60 * minutes
    space, effort = experiment.space, Effort(seconds, section.noise)
    return _executable(Subject(space.name, space.settings, job.space, job.task.info, device, effort, section.nets))


def of_space(
    name: str,
    overrides: Sequence[str],
    shape: tuple[int, ...],
    classes: int,
    scenario: Scenario,
    minutes: float | None,
) -> Subject:
    """A space by name, path or ``module:name``, without any data.

    Args:
        overrides: ``key=value`` settings of the space.
        shape: of one input.
        classes: number of classes.

    Raises:
        ExperimentError: no classes, no time, or an unknown setting.
        TableError: the runtime does not execute some of the space's precisions.
    """
    _check_minutes(minutes)
    if classes < 1:
        raise ExperimentError(f"--classes {classes}.", expected="1 or more")
    settings: dict[str, Any] = {}
    apply_overrides(settings, overrides)
    mean, std = (0.5,) * shape[0], (0.25,) * shape[0]
    info = TaskInfo(shape, classes, mean, std)
    space = content.load_space(name, info, settings)
    effort = Effort(60 * (MINUTES if minutes is None else minutes))
    return _executable(Subject(name, settings, space, info, Device.local(**scenario.given), effort, NETS))


def _check_minutes(minutes: float | None) -> None:
    if minutes is not None and not (0 < minutes < math.inf):
        raise ExperimentError(f"--minutes {minutes:g}.", expected="more than 0")


def _executable(subject: Subject) -> Subject:
    """Refuse now what the runtime would refuse after minutes of exporting."""
    runtime = runtimes.get(subject.device.runtime)
    wanted = {part.precision for part in subject.space.keys().values()}
    if foreign := sorted(wanted - set(runtime.precisions)):
        raise TableError(
            f"Runtime {subject.device.runtime!r} executes no {' and no '.join(foreign)} parts, which space "
            f"{subject.space.name!r} has.",
            expected=f"parts in {', '.join(runtime.precisions)}",
            remedy="--set bits=[32] where the space has such a setting, or another runtime",
        )
    return subject


def parse_shape(text: str) -> tuple[int, ...]:
    """``3x224x224`` as a shape.

    Raises:
        ExperimentError: it is none.
    """
    try:
        shape = tuple(int(side) for side in text.lower().split("x"))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise ExperimentError(f"--input {text!r}.", expected="a shape such as 3x224x224")
    return shape


def profile_here(
    subject: Subject, out: Path | None = None, *, resume: bool = False, progress: Progress | None = None
) -> tuple[Path, LatencyTable]:
    """Measure on this machine; returns the table and its file, by default in the cache, where searches look.

    The effort's seconds are for everything: exports of networks, loading, timing and fits. What was measured when
    Ctrl-C ended it is kept beside the file, and ``resume`` goes on with it.
    """
    progress = progress or Silent()
    torch.set_num_threads(1)
    path = out or cached_path(subject.space, subject.device)
    progress.stage("exporting networks")
    start = time.monotonic()
    with exporter() as executor:
        nets = calibration_nets(subject.space, subject.info, executor, subject.nets, progress=progress.update)
    left = FOR_MEASURING * subject.effort.seconds - (time.monotonic() - start)
    effort = replace(subject.effort, seconds=max(left, AT_LEAST * subject.effort.seconds))
    progress.stage("latency table")
    table = profile(
        subject.space, nets, subject.device, effort, progress=progress.update, note=progress.note,
        partial=partial_of(path), resume=resume, keys=subject.keys,
    )  # fmt: skip
    table.save(path)
    progress.note(describe(table))
    return path, table


def exporter() -> Processes:
    """Workers that export networks."""
    return Processes(None, cores())


# ---- devices far away ------------------------------------------------------------------------------------


def write(subject: Subject, folder: Path, *, progress: Progress | None = None) -> Plan:
    """A bundle of the subject's parts and networks, to be measured on a machine with numpy and onnxruntime.

    How fast that machine is cannot be tried from here: :data:`FAR_PARTS` parts a second are sent.

    Raises:
        TableError: the runtime is not onnxruntime, or the folder is taken.
    """
    progress = progress or Silent()
    if subject.device.runtime != "onnxruntime":
        raise TableError(
            f"A bundle is measured by onnxruntime, not by {subject.device.runtime!r}.", remedy="leave --runtime out"
        )
    torch.set_num_threads(1)
    progress.stage("bundle")
    with exporter() as executor:
        nets = calibration_nets(subject.space, subject.info, executor, subject.nets, progress=progress.update)
    parts = subject.space.keys()
    plan = Plan.of(subject.space, nets, subject.keys or grid(parts, int(FAR_PARTS * subject.effort.seconds)))
    if plan.absent:
        progress.note(f"{len(plan.measured)} of {len(parts)} parts are in the bundle, the others will be interpolated")
    d = subject.device
    scenario = {
        "threads": d.threads, "batch": d.batch, "provider": d.provider, "graph": d.graph,
        "seconds": subject.effort.seconds, "seed": subject.effort.seed, "calls": CALLS,
        "watch": plan.net_names, "target_noise": subject.effort.noise,
        "parts": list(plan.measured), "energy": list(plan.measured), "energy_seconds": FAR_ENERGY_SECONDS,
    }  # fmt: skip
    facts = {
        "space": subject.name, "settings": subject.settings, "info": asdict(subject.info),
        "genomes": calibration_genomes(subject.space, subject.nets).tolist(), "bytes": [n.size_bytes for n in nets],
        "plan": plan.identity,
    }  # fmt: skip
    models = {key: part.to_onnx(d.batch) for key, part in plan.measured.items()} | plan.models
    write_bundle(folder, models, YARDSTICK.to_onnx(d.batch), scenario, facts)
    return plan


def read(
    measured: Path, out: Path | None = None, *, name: str | None = None, progress: Progress | None = None
) -> tuple[Path, LatencyTable]:
    """The table of what a bundle's script measured, and its file.

    Args:
        measured: the bundle's folder, or its ``measurements.json`` alone.
        name: of the device; by default its processor, runtime and threads.

    Raises:
        TableError: the measurements are damaged, unfinished, or not of the space that they name.
    """
    progress = progress or Silent()
    result = read_measurements(measured)
    facts = result.facts
    try:
        plain: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in facts["info"].items()}
        info = TaskInfo(**plain)
        space = content.load_space(facts["space"], info, facts["settings"])
        nets = [
            CalibrationNet(tuple(space.parts(space.decode(np.array(row)))), None, size)
            for row, size in zip(facts["genomes"], facts["bytes"], strict=True)
        ]
    except (KeyError, TypeError, ValueError, SpaceError) as error:
        raise TableError(
            f"{measured} says of no space that is known here what it measured: {error}.",
            remedy="write the bundle again with `nas profile --bundle`, with this version",
        ) from error
    plan = Plan.of(space, nets, list(result.measurement.samples))
    if plan.identity != facts.get("plan"):
        raise TableError(
            f"{measured} was measured of another version of space {space.name!r}.", remedy="write the bundle again"
        )
    device = result.device if name is None else replace(result.device, name=name)
    energy = result.energy
    seen = Seen(result.measurement, result.fused, energy.get("millijoules", {}), source(energy))
    table = assemble(plan, seen, device.as_dict())
    path = out or cached_path(space, device)
    table.save(path)
    progress.note(describe(table))
    return path, table


def profile_over_ssh(
    subject: Subject,
    host: str,
    out: Path | None = None,
    *,
    name: str | None = None,
    python: str = "python3",
    options: Sequence[str] = (),
    progress: Progress | None = None,
) -> tuple[Path, LatencyTable]:
    """Write a bundle, measure it on ``host`` (which needs numpy and onnxruntime), and make the table.

    An interrupted measurement stays on the host; the same command goes on with it.

    Args:
        python: the host's command for Python.
        options: for ssh, such as ``("-p", "2222")``.
    """
    progress = progress or Silent()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "bundle"
        write(subject, folder, progress=progress)
        progress.stage(f"measuring on {host}")
        run_over_ssh(
            host, folder, python=python, ssh_options=options, progress=lambda line: progress.update(0.0, line)
        )
        return read(folder, out, name=name, progress=progress)
