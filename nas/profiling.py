"""Building latency tables for people: what ``nas profile`` does, on this machine or on one far away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nas import content
from nas.errors import ExperimentError
from nas.executors import Processes, cores
from nas.experiment import Experiment, apply_overrides
from nas.job import Job
from nas.latency import Device, LatencyTable
from nas.latency.profile import Effort, describe
from nas.progress import Progress, Silent
from nas.space import SearchSpace, TaskInfo
from nas.student.tables import build_table, cached_path, partial_of

MINUTES = 10.0
NETS = 30


@dataclass(frozen=True)
class Subject:
    """What is profiled: a space, on data of some shape, on a device.

    Attributes:
        space, info, device: as in an experiment.
        effort: how long, and how well.
        nets: calibration networks.
    """

    space: SearchSpace
    info: TaskInfo
    device: Device
    effort: Effort
    nets: int


@dataclass(frozen=True)
class Scenario:
    """What the device does while it is measured; None is the experiment's, or else the default."""

    name: str | None = None
    threads: int | None = None
    batch: int | None = None
    runtime: str | None = None
    provider: str | None = None
    graph: str | None = None

    @property
    def given(self) -> dict[str, Any]:
        """What is not None."""
        return {key: value for key, value in vars(self).items() if value is not None}


def of_experiment(experiment: Experiment, scenario: Scenario, minutes: float | None) -> Subject:
    """An experiment's space and device, and the time that its ``table`` section allows."""
    section = experiment.table
    job = Job(experiment, Path("."))
    device = Device.local(**{**experiment.device.model_dump(), **scenario.given})
    seconds = section.seconds if minutes is None else 60 * minutes
    return Subject(job.space, job.task.info, device, Effort(seconds, section.noise), section.nets)


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
    """
    settings: dict[str, Any] = {}
    apply_overrides(settings, overrides)
    mean, std = (0.5,) * shape[0], (0.25,) * shape[0]
    info = TaskInfo(shape, classes, mean, std)
    space = content.load_space(name, info, settings)
    return Subject(space, info, Device.local(**scenario.given), Effort(60 * (minutes or MINUTES)), NETS)


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

    What was measured when Ctrl-C ended it is kept beside the file, and ``resume`` goes on with it.
    """
    progress = progress or Silent()
    torch.set_num_threads(1)
    path = out or cached_path(subject.space, subject.device)
    progress.stage("latency table")
    with exporter() as executor:
        table = build_table(
            subject.space, subject.info, subject.device, executor, subject.effort, nets=subject.nets,
            progress=progress.update, note=progress.note, partial=partial_of(path), resume=resume,
        )  # fmt: skip
    table.save(path)
    progress.note(describe(table))
    return path, table


def exporter() -> Processes:
    """Workers that export networks."""
    return Processes(None, cores())
