"""Finalists: distilled long, compressed for real, exported, verified, and measured end to end side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from safetensors.torch import save_file
from torch import nn

from nas.compression import Plan
from nas.evaluators import Distil
from nas.evaluators.train import Recipe, predict
from nas.executors import Executor
from nas.files import write_atomic, write_json
from nas.latency import Device, elsewhere
from nas.latency.energy import metered
from nas.latency.measure import Progress, Timing, interleave
from nas.latency.plan import load_yardstick
from nas.latency.table import Entry
from nas.latency.whole import sizes
from nas.locks import timing_lock, training_lock
from nas.parts import Part
from nas.reward import Limit, Reward, violation
from nas.space import Genomes
from nas.student.export import onnx_macs_params, to_onnx
from nas.student.teacher import onnx_logits
from nas.tasks import Task

CALIBRATION = 512  # training samples for activation ranges
ENERGY_SECONDS = 0.5  # metering of a model, where there is a meter


@dataclass(frozen=True)
class Entrant:
    """A candidate chosen for the long training.

    Attributes:
        arm: search, random or uniform.
        index: its number in that arm.
        quality_search: as the search saw it, NaN-free; nothing for arms without a search.
        costs: predicted, by name.
    """

    arm: str
    index: int
    genome: tuple[int, ...]
    quality_search: float | None
    costs: dict[str, float]

    @property
    def name(self) -> str:
        """Folder name, unique within a run."""
        return f"{self.arm}-{self.index}"


@dataclass(frozen=True)
class Finalist:
    """What became of an entrant: real files, real qualities, and the measurement.

    Attributes:
        folder: holds ``model.onnx`` and ``state.safetensors``.
        quality_torch, quality_onnx: on validation data.
        timing: measured end to end, in its runtime; ``reward`` and ``violation`` follow from it.
        runtime: the alternative that it is fastest in; "" is the device's own runtime.
    """

    entrant: Entrant
    folder: Path
    quality_torch: float
    quality_onnx: float
    max_abs_diff: float
    agreement: float
    size_bytes: int
    macs: int
    params: int
    timing: Timing
    runtime: str
    reward: float
    violation: float

    @property
    def feasible(self) -> bool:
        """Whether it meets every budget as measured."""
        return self.violation == 0


def train_finalists(
    entrants: Sequence[Entrant], recipe: Recipe, folder: Path, executor: Executor, on_done: Any = None
) -> dict[str, dict[str, Any]]:
    """Train and export all entrants; returns name → facts. What a former run finished is not repeated.

    An entrant that fails has a ``reason`` and no qualities; it is tried again by the next run.
    """
    todo = [e for e in entrants if not finished(folder / e.name / "facts.json", e, recipe)]
    items = [(np.array(e.genome), recipe, folder / e.name) for e in todo]
    for position, result in executor.run(realise, items):
        if isinstance(result, Exception):
            write_json(folder / todo[position].name / "facts.json", {"asked": {}, "reason": str(result)})
        if on_done is not None:
            on_done(todo[position].name)
    return {e.name: json.loads((folder / e.name / "facts.json").read_text()) for e in entrants}


def _asked(genome: Sequence[int], recipe: Recipe) -> dict[str, Any]:
    return {"genome": [int(g) for g in genome], "recipe": asdict(recipe)}


def finished(facts: Path, entrant: Entrant, recipe: Recipe) -> bool:
    """Whether the entrant was trained so before, and is on disk."""
    if not facts.exists():
        return False
    known = json.loads(facts.read_text())
    return "reason" not in known and known["asked"] == json.loads(json.dumps(_asked(entrant.genome, recipe)))


def realise(student: Distil, item: tuple[Genomes, Recipe, Path]) -> None:
    """Train one genome long, export it, verify torch against ONNX on validation data; writes into the folder."""
    genome, recipe, folder = item
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with training_lock():
            facts = _realise(student, genome, recipe, folder)
    except Exception as error:
        facts = {"reason": f"{type(error).__name__}: {error}"}
    write_json(folder / "facts.json", {"asked": _asked(genome.tolist(), recipe), **facts})


def _realise(student: Distil, genome: Genomes, recipe: Recipe, folder: Path) -> dict[str, Any]:
    model = student.fit(genome, recipe)
    return exported_facts(model, student.space.training(student.space.decode(genome)).compression, student.task, folder)


def exported_facts(model: nn.Module, plan: Plan, task: Task, folder: Path) -> dict[str, Any]:
    """Write ``model.onnx`` and ``state.safetensors`` into a folder; what is to be said of them, on validation data.

    Args:
        model: trained and simulating, with the passes of ``plan`` applied.
    """
    train_x = task.split("train")[0]
    exported = to_onnx(model, plan, train_x[:1], train_x[:: max(1, len(train_x) // CALIBRATION)].numpy())
    onnx.checker.check_model(exported)
    write_atomic(folder / "model.onnx", exported.SerializeToString())
    # Cloned: layers may share one tensor, which the file does not know.
    state = model.state_dict().items()
    save_file({k: v.clone(memory_format=torch.contiguous_format) for k, v in state}, folder / "state.safetensors")
    x, y = task.split("valid")
    in_torch, in_onnx = predict(model, x), onnx_logits(folder / "model.onnx", x)
    macs, params = onnx_macs_params(exported)
    return {
        "quality_torch": task.quality(in_torch, y.numpy()),
        "quality_onnx": task.quality(in_onnx, y.numpy()),
        "max_abs_diff": float(np.abs(in_torch - in_onnx).max()),
        "agreement": float((in_torch.argmax(1) == in_onnx.argmax(1)).mean()),
        "size_bytes": (folder / "model.onnx").stat().st_size,
        "macs": macs,
        "params": params,
    }


@dataclass(frozen=True)
class Session:
    """One interleaved measurement of whole models, and of parts that a table had only interpolated.

    Attributes:
        timings: model name → timing.
        entries: part key → entry, measured beside them.
        yardstick_ms: median of the yardstick.
        alternatives: other runtime → model name → timing in it, from the same rounds.
        energy: ``source`` and ``millijoules`` of a call by model, or ``absent`` and why.
    """

    timings: dict[str, Timing]
    entries: dict[str, Entry]
    yardstick_ms: float
    alternatives: dict[str, dict[str, Timing]] = field(default_factory=dict)
    energy: dict[str, Any] = field(default_factory=dict)

    def fastest(self, name: str) -> tuple[str, Timing]:
        """The runtime in which a model is fastest, "" for the device's own, and its timing there."""
        found = {"": self.timings[name], **{runtime: t[name] for runtime, t in self.alternatives.items()}}
        return min(found.items(), key=lambda item: item[1].p50)


def measure_models(
    models: Mapping[str, Path],
    device: Device,
    seconds: float,
    progress: Progress | None = None,
    parts: Mapping[str, Part] | None = None,
    alternatives: Mapping[str, Device] | None = None,
) -> Session:
    """Measure exported models end to end, and some parts, interleaved, with nothing of ours training beside them.

    Args:
        parts: to be measured on ``device`` beside the models.
        alternatives: the same machine with other runtimes, in which the models are measured too.
    """
    parts, alternatives = parts or {}, alternatives or {}
    runners = {name: device.load(onnx.load(path)) for name, path in models.items()}
    runners |= {key: device.load(part.to_onnx(device.batch), part=True) for key, part in parts.items()}
    for runtime, other in alternatives.items():
        runners |= {f"{name} in {runtime}": other.load(onnx.load(path)) for name, path in models.items()}
    with timing_lock():
        seen = interleave(
            runners, load_yardstick(device), seconds=seconds, max_rounds=2000, calls=10, progress=progress
        )
        energy = metered(device.energy_meter(), {name: runners[name] for name in models}, ENERGY_SECONDS)
    timings = {name: samples.timing() for name, samples in seen.samples.items()}
    entries = {
        key: Entry(
            timings[key], timings[key].p50, runners[key].fused(), uncertainty=timings[key].noise,
            **sizes(parts[key], device.batch),
        )
        for key in parts
    }  # fmt: skip
    elsewhere = {runtime: {name: timings[f"{name} in {runtime}"] for name in models} for runtime in alternatives}
    return Session({name: timings[name] for name in models}, entries, seen.reference, elsewhere, energy)


def judge(
    entrants: Sequence[Entrant],
    facts: Mapping[str, Mapping[str, Any]],
    session: Session,
    folder: Path,
    reward: Reward,
    limits: tuple[Limit, ...],
) -> list[Finalist]:
    """Finalists with measured rewards, best first: feasible ones before others, failed ones left out.

    Nothing is measured on other devices: the costs there are those that were predicted.
    """
    finalists = []
    for entrant in entrants:
        known = facts[entrant.name]
        if "reason" in known:
            continue
        runtime, timing = session.fastest(entrant.name)
        costs = {"latency_ms": timing.p50, "latency_p95_ms": timing.p95, "size_bytes": float(known["size_bytes"])}
        costs |= elsewhere(entrant.costs)
        names, row = tuple(costs), [list(costs.values())]
        finalists.append(
            Finalist(
                entrant=entrant,
                folder=folder / entrant.name,
                timing=timing,
                runtime=runtime,
                reward=float(reward.score([known["quality_onnx"]], row, names)[0]),
                violation=float(violation(row, names, limits)[0]),
                **{key: value for key, value in known.items() if key != "asked"},
            )
        )
    return sorted(finalists, key=lambda f: (f.violation, -f.reward, f.timing.p50))
