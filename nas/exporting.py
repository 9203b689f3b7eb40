"""Any point of a run as a student folder: a finalist as it lies there, a trial after the run's own long training."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from nas.arms import recorded_in
from nas.errors import StudentError, StudyError
from nas.evaluators.train import predict
from nas.experiment import Experiment, load_any
from nas.fronts import run_front
from nas.job import Job, teacher_costs
from nas.latency import LatencyTable
from nas.locks import run_lock
from nas.progress import Progress, Silent
from nas.result import candidate_facts
from nas.student.finalists import Entrant, Finalist, finished, judge, measure_models, train_finalists
from nas.student.formats import add_format, formats
from nas.student.package import load_model, pack_finalist
from nas.student.teacher import onnx_logits
from nas.study import read_trials

STUDENT = "student"
NAME = re.compile(r"(search|random|uniform)-(-?\d+)")


@dataclass(frozen=True)
class Exported:
    """What an export made.

    Attributes:
        folder: the student folder.
        name: of the candidate, such as ``search-17``.
        manifest: every figure of it.
        formats: format → how it was verified.
    """

    folder: Path
    name: str
    manifest: dict[str, Any]
    formats: dict[str, dict[str, Any]]


def export(
    run: Path,
    out: Path,
    *,
    candidate: str = STUDENT,
    kinds: Sequence[str] = ("onnx",),
    progress: Progress | None = None,
) -> Exported:
    """Make a student folder of any candidate of a finished run, with further formats in it.

    Args:
        run: folder of a search or of ``nas compress``, or a student folder.
        out: the student folder to make; it appears whole or not at all.
        candidate: ``student``; a finalist such as ``search-17`` or ``uniform-3``; or the index of a trial of the
            search, ``17``. A trial that was no finalist is trained as the run's finalists were, and kept among them.
        kinds: names of formats.

    Raises:
        StudyError: there is no such run or candidate, or the run is not finished.
        StudentError: ``out`` exists, or the student cannot be expressed in a format.
        ContentError: there is no such format.
        ExtraError: a format needs a package that is not installed.
    """
    progress = progress or Silent()
    for kind in kinds:
        formats.get(kind)()  # what is missing is said before anything trains
    if out.exists() and any(out.iterdir()):
        raise StudentError(f"{out} exists already.", remedy="another folder with --out")
    source, name = _student_folder(run), _full_name(candidate)
    making = out.with_name(f".{out.name}.export")
    shutil.rmtree(making, ignore_errors=True)
    try:
        if name == STUDENT:
            shutil.copytree(source, making)
        else:
            with run_lock(run):
                _pack(run, name, source, making, progress)
        progress.stage("formats")
        x = _inputs(run, making)
        wanted = onnx_logits(making / "model.onnx", torch.from_numpy(x))
        found = {kind: add_format(kind, making, x, wanted) for kind in kinds}
        if out.exists():
            out.rmdir()  # an empty one
        making.rename(out)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return Exported(out, name, json.loads((out / "manifest.json").read_text()), found)


def _student_folder(run: Path) -> Path:
    for folder in (run / STUDENT, run):
        if (folder / "manifest.json").exists() and (folder / "model.onnx").exists():
            return folder
    raise StudyError(
        f"{run} holds no student.", expected="the folder of a finished `nas search` or `nas compress`",
        remedy="finish it with --resume",
    )  # fmt: skip


def _full_name(candidate: str) -> str:
    """``17`` is the search's trial 17."""
    candidate = candidate.strip()
    name = f"search-{candidate}" if re.fullmatch(r"-?\d+", candidate) else candidate
    if name != STUDENT and not NAME.fullmatch(name):
        raise StudyError(
            f"There is no candidate {candidate!r}.", expected="student, 17, search-17, random-17 or uniform-3",
            remedy="nas export RUN --list",
        )  # fmt: skip
    return name


def _inputs(run: Path, student: Path) -> Any:
    """Raw inputs to compare formats on: of the run's test split, or those that a student folder has of its own."""
    path = run / "test.npz" if (run / "test.npz").exists() else student / "selftest.npz"
    with np.load(path, allow_pickle=False) as file:
        return file["x"]


# ---- a candidate that is not the student --------------------------------------------------------------


def _job(run: Path, progress: Progress) -> Job:
    kept = run / "experiment.yaml"
    if not kept.exists():
        raise StudyError(
            f"{run} is no folder of a search: its student is all there is.", expected="--candidate student"
        )
    experiment = load_any(kept)
    if not isinstance(experiment, Experiment):
        raise StudyError(f"The run in {run} looked everything up: there is nothing to export.")
    return Job(experiment, run, progress)


def _pack(run: Path, name: str, source: Path, out: Path, progress: Progress) -> None:
    job = _job(run, progress)
    torch.set_num_threads(1)
    entrant = _entrant(job, name)
    facts = _realised(job, entrant)
    progress.stage("measuring")
    models = {name: run / "finalists" / name / "model.onnx", "teacher": run / "teacher.onnx"}
    seconds = job.experiment.finalists.seconds
    session = measure_models(models, job.device, seconds, progress.update, alternatives=job.alternatives)
    whole = teacher_costs(run)
    limits = job.limits(whole)
    (finalist,) = judge([entrant], {name: facts}, session, run / "finalists", job.reward(limits, whole), limits)
    manifest = json.loads((source / "manifest.json").read_text())
    manifest |= candidate_facts(job, finalist, session)
    manifest["quality"] = {**manifest["quality"], **_test_quality(job, finalist)}
    pack_finalist(out, job.untaught, finalist, manifest)


def _entrant(job: Job, name: str) -> Entrant:
    """The candidate with its genome, and its costs as the run's tables predict them."""
    arm, index = _parsed(name)
    if arm != "uniform":
        trials = {trial.index: trial for trial, _ in read_trials(*recorded_in(job.experiment, job.run, arm))}
        if index not in trials:
            raise StudyError(
                f"The run trained no candidate {index} of {arm!r}.",
                expected=f"one of {', '.join(map(str, sorted(trials)))}",
                remedy="nas export RUN --list shows the front",
            )  # fmt: skip
        trial = trials[index]
        return Entrant(arm, index, trial.genome, trial.quality if trial.status == "complete" else None, trial.costs)
    members = job.space.uniform()
    if not 0 <= index < len(members):
        raise StudyError(f"There is no candidate {name!r}.", expected=f"uniform-0 to uniform-{len(members) - 1}")
    table = LatencyTable.load(job.run / "table.json")
    runtimes = {
        runtime: LatencyTable.load(job.run / f"table-{device.name}.json")
        for runtime, device in job.alternatives.items()
    }
    estimator, genome = job.estimator(table, runtimes), job.space.encode(members[index])
    costs = estimator.price(genome[None])[0].tolist()
    return Entrant(arm, index, tuple(int(g) for g in genome), None, dict(zip(estimator.costs, costs, strict=True)))


def _parsed(name: str) -> tuple[str, int]:
    match = NAME.fullmatch(name)
    assert match is not None  # checked at the door
    return match[1], int(match[2])


def _realised(job: Job, entrant: Entrant) -> dict[str, Any]:
    """Facts of the trained, exported candidate: those on disk, or of a training by the run's own recipe."""
    folder = job.run / "finalists"
    if not finished(folder / entrant.name / "facts.json", entrant, job.long_recipe):
        with TemporaryDirectory() as own, job.executor(job.untaught) as workers:
            job.progress.stage("teacher")
            teacher = job.trained_teacher(workers, Path(own))
        job.progress.stage(f"training {entrant.name}")
        with job.executor(job.student(teacher)) as workers:
            train_finalists([entrant], job.long_recipe, folder, workers)
    facts: dict[str, Any] = json.loads((folder / entrant.name / "facts.json").read_text())
    if "reason" in facts:
        raise StudyError(f"The training of {entrant.name} failed: {facts['reason']}", remedy="another candidate")
    return facts


def _test_quality(job: Job, finalist: Finalist) -> dict[str, Any]:
    """On the run's own test file."""
    with np.load(job.run / "test.npz", allow_pickle=False) as file:
        x, y = torch.from_numpy(file["x"]), file["y"]
    in_torch, in_onnx = predict(load_model(job.untaught, finalist), x), onnx_logits(finalist.folder / "model.onnx", x)
    return {
        "student_torch": job.task.quality(in_torch, y),
        "student_onnx": job.task.quality(in_onnx, y),
        "n": len(y),
    }


# ---- what there is ------------------------------------------------------------------------------------


def candidates(run: Path) -> list[list[str]]:
    """What can be exported, as a table for people, header first: the student, the finalists, the search's front.

    Raises:
        StudyError: there is no finished run.
    """
    manifest = json.loads((_student_folder(run) / "manifest.json").read_text())
    rows = [["candidate", "quality", "p50 ms", "bytes", ""]]
    quality, latency = manifest["quality"], manifest["latency"][0]
    rows.append(
        [
            STUDENT, f"{quality['student_onnx']:.4f}", f"{latency['p50_ms']:.4f}", f"{manifest['size_bytes']['onnx']}",
            f"{quality['metric']} on test data, measured",
        ]
    )  # fmt: skip
    if not (run / "experiment.yaml").exists():
        return rows
    measured = {
        f"{f['arm']}-{f['index']}": f"{f['p50_ms']:.4f}"
        for f in json.loads((run / "summary.json").read_text())["finalists"]
    }
    trained = {}
    for path in sorted((run / "finalists").glob("*/facts.json")):
        facts = json.loads(path.read_text())
        if "reason" not in facts:
            trained[path.parent.name] = facts
    rows += [
        [name, f"{facts['quality_onnx']:.4f}", measured.get(name, "–"), f"{facts['size_bytes']}",
         "finalist: validation, trained long"]
        for name, facts in trained.items()
    ]  # fmt: skip
    rows += [
        [
            str(point.index), f"{point.quality:.4f}", f"{point.costs['latency_ms']:.4f}",
            f"{point.costs['size_bytes']:.0f}", "front: validation, trained short; predicted",
        ]
        for point in run_front(run).points if f"search-{point.index}" not in trained
    ]  # fmt: skip
    return rows


def note_of(name: str, facts: dict[str, Any]) -> str:
    """How a format was verified, in words."""
    return (
        f"{name}: {', '.join(facts['files'])}, {facts['size_bytes']} bytes; the class agrees with onnxruntime on "
        f"{100 * facts['agreement']:.2f} % of {facts['n']} inputs, logits within {facts['max_abs_diff']:.2g}"
    )
