"""The pipeline: settings, penalty epochs, pass, fine-tuning, record; then measuring, the test split, the student.

Every stage lies in a folder of its own, with its weights and its exported model. A stage begins with what lies in the
folder before it, so that a pipeline that goes on after Ctrl-C makes the same model as one that was left alone.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from nas.compression import apply_passes, penalties
from nas.errors import CompressionError, ExperimentError, StudyError
from nas.evaluators.train import SAMPLE, Lessons, Recipe, predict, train
from nas.files import write_json
from nas.latency import Device
from nas.locks import run_lock, training_lock
from nas.pipeline.prepare import prepare
from nas.pipeline.record import write_record
from nas.pipeline.steps import Step, plan_of, settings_by_layer
from nas.progress import Progress, Silent
from nas.space import Training
from nas.student.finalists import Session, exported_facts, measure_models
from nas.student.own import valid_quality
from nas.student.package import SELFTEST_SAMPLES, Deliverable, model_facts, pack, write_samples
from nas.student.teacher import onnx_logits
from nas.tasks import Task


@dataclass(frozen=True)
class Tuning:
    """How the model is trained between the steps and after them.

    Args:
        epochs: after each step.
        final_epochs: after all of them.
        penalty_epochs: before a pass that adds a penalty to the loss; by default as many as ``epochs``.
        lr, batch_size, weight_decay: AdamW, one cosine with a short warm-up per training.
        kd_weight: weight of what the original model says, 0..1; the rest is the labels' loss.
        temperature: softmax temperature of the distillation.
        views: augmented views of the training data; 1 is the data as they are.

    Raises:
        ExperimentError: a value is out of range.
    """

    epochs: int = 3
    final_epochs: int = 0
    penalty_epochs: int | None = None
    lr: float = 1e-3
    batch_size: int = 64
    weight_decay: float = 1e-2
    kd_weight: float = 0.5
    temperature: float = 4.0
    views: int = 1

    def __post_init__(self) -> None:
        for name, least in (("epochs", 0), ("final_epochs", 0), ("penalty_epochs", 0), ("batch_size", 2), ("views", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ExperimentError(f"{name} is {value}.", expected=f"a whole number, {least} or more")
        if not self.lr > 0 or not self.weight_decay >= 0 or not self.temperature > 0 or not 0 <= self.kd_weight <= 1:
            raise ExperimentError(
                f"lr {self.lr}, weight_decay {self.weight_decay}, temperature {self.temperature}, "
                f"kd_weight {self.kd_weight}.",
                expected="lr and temperature above 0, weight_decay 0 or more, kd_weight from 0 to 1",
            )

    def recipe(self, epochs: int) -> Recipe:
        """A training of so many epochs, all of them plain: the passes are applied by the pipeline."""
        return Recipe(epochs, 0, self.batch_size, self.lr, self.weight_decay, float("inf"))


@dataclass
class Pipeline:
    """One model, its steps, and the folder that they are kept in.

    Args:
        model: the user's own, trained, in evaluation mode; it stays as it is.
        name: of the model, for people.
        data: where the task's data come from, for the record.
        steps: checked.
        folder: of this run.
        device: what latencies are measured on.
        seconds: of the interleaved measurement of all stages.
    """

    model: nn.Module
    name: str
    task: Task
    data: str
    steps: Sequence[Step]
    tuning: Tuning
    folder: Path
    device: Device
    seed: int = 0
    seconds: float = 5.0
    progress: Progress = field(default_factory=Silent)

    # ---- what the stages share ------------------------------------------------------------------

    @cached_property
    def sample(self) -> torch.Tensor:
        """Training inputs that passes look at."""
        return self.task.split("train")[0][:SAMPLE]

    @cached_property
    def original(self) -> nn.Module:
        """The user's model as the passes get it."""
        return prepare(copy.deepcopy(self.model).eval(), self.sample, self.progress.note)

    @cached_property
    def lessons(self) -> Lessons:
        """Training data, with what the original model says to them."""
        teacher = self.original if self.tuning.kd_weight > 0 else None
        return Lessons.prepare(self.task, teacher, self.tuning.views, self.seed)

    def loss(self, logits: torch.Tensor) -> torch.Tensor:
        """Loss of the sample's logits, for passes that follow gradients."""
        return self.task.loss(logits, self.task.split("train")[1][:SAMPLE])

    @property
    def stages(self) -> list[str]:
        """Names of the stages' folders, in order."""
        names = ["original", *(step.name.rpartition(":")[2] for step in self.steps)]
        if self.tuning.final_epochs:
            names.append("final")
        return [f"{i:02d}-{name}" for i, name in enumerate(names)]

    def stage_folder(self, i: int) -> Path:
        """Where a stage is kept."""
        return self.folder / "steps" / self.stages[i]

    def facts(self, i: int) -> dict[str, Any] | None:
        """What is known of a stage; nothing where it was not finished."""
        path = self.stage_folder(i) / "facts.json"
        return json.loads(path.read_text()) if path.exists() else None

    def plan(self, i: int) -> dict[str, dict[str, Any]]:
        """The settings by layer of all passes up to a finished stage."""
        done = [(step, (self.facts(k) or {})["settings"]) for k, step in enumerate(self.steps[:i], start=1)]
        return plan_of(done)

    def restored(self, i: int) -> nn.Module:
        """The model of a finished stage, from its settings and its saved state.

        Raises:
            CompressionError: the settings alone do not make the structure that the state belongs to.
        """
        model = apply_passes(copy.deepcopy(self.original), self.plan(i), self.sample)
        try:
            model.load_state_dict(load_file(self.stage_folder(i) / "state.safetensors"))
        except Exception as error:
            raise CompressionError(
                f"The model of {self.stages[i]} cannot be made again: {error}.",
                expected="a pass whose settings by layer decide the structure alone",
            ) from error
        return model.eval()

    # ---- the stages -----------------------------------------------------------------------------

    def run(self) -> None:
        """Do every stage that is not finished."""
        for i, name in enumerate(self.stages):
            if self.facts(i) is not None:
                continue
            self.progress.stage(name)
            start = time.monotonic()
            with training_lock(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed + i)
                facts = self._stage(i)
            facts = {"name": name, **facts, "seconds": time.monotonic() - start}
            write_json(self.stage_folder(i) / "facts.json", facts)
            self.progress.note(
                f"{name}: {self.task.metric} {facts['quality']:.4f} (validation), {facts['size_bytes']} bytes"
            )

    def _stage(self, i: int) -> dict[str, Any]:
        if i == 0:
            valid_quality(self.original, self.task)  # said in words where it does not fit the data
            return self._finish(0, copy.deepcopy(self.original), {})
        model = self.restored(i - 1)
        if i > len(self.steps):
            epochs = self.tuning.final_epochs
            return {"epochs": epochs, **self._finish(i, self._trained(model, i, epochs), self.plan(i - 1))}
        step = self.steps[i - 1]
        settings = settings_by_layer(step, model, self.sample, self.loss)
        one = {step.name: settings}
        model, eased_epochs = self._eased(model, i, one)
        self.progress.update(0.3, "compressing")
        model = apply_passes(model, one, self.sample, self.loss)
        applied = valid_quality(model, self.task)
        self.progress.update(0.4, f"{self.task.metric} {applied:.4f} before fine-tuning")
        model = self._trained(model, i, self.tuning.epochs)
        return {
            **step.plain(), "settings": settings, "penalty_epochs": eased_epochs, "epochs": self.tuning.epochs,
            "quality_applied": applied, **self._finish(i, model, {**self.plan(i - 1), **one}),
        }  # fmt: skip

    def _eased(self, model: nn.Module, i: int, plan: Mapping[str, Mapping[str, Any]]) -> tuple[nn.Module, int]:
        """The model after the epochs in which the pass prepares it, and how many they were."""
        epochs = self.tuning.epochs if self.tuning.penalty_epochs is None else self.tuning.penalty_epochs
        if not epochs or all(penalty() is None for penalty in penalties(model, plan)):
            return model, 0
        # The penalties look at the module that is trained; `train` changes its layout in place.
        return self._trained(model, i, epochs, penalties(model, plan)), epochs

    def _trained(self, model: nn.Module, i: int, epochs: int, eased: Any = ()) -> nn.Module:
        training = Training(self.tuning.kd_weight, self.tuning.temperature)
        recipe = self.tuning.recipe(epochs)
        return train(model, self.task, self.lessons, training, recipe, self.seed + i, eased=eased)

    def _finish(self, i: int, model: nn.Module, plan: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Export and save a stage's model; what is to be said of it."""
        facts = exported_facts(model, plan, self.task, self.stage_folder(i))
        return {"quality": facts.pop("quality_torch"), **facts}

    # ---- the result -----------------------------------------------------------------------------

    def deliver(self) -> Path:
        """Measure all stages side by side, read the test split once, write record and student; the student's folder."""
        self.progress.stage("measuring")
        models = {name: self.stage_folder(i) / "model.onnx" for i, name in enumerate(self.stages)}
        session = measure_models(models, self.device, self.seconds, self.progress.update)
        self.progress.stage("student")
        last = len(self.stages) - 1
        plan, model = self.plan(len(self.steps)), self.restored(last)
        x, y = self.task.split("test")
        write_samples(self.folder / "test.npz", x, y)
        quality = {
            "metric": self.task.metric,
            "teacher": self.task.quality(onnx_logits(models[self.stages[0]], x), y.numpy()),
            "student_torch": self.task.quality(predict(model, x), y.numpy()),
            "student_onnx": self.task.quality(onnx_logits(models[self.stages[last]], x), y.numpy()),
            "split": "test",
            "n": len(y),
        }
        manifest = self._manifest(plan, session, quality)
        student = self.folder / "student"
        deliverable = Deliverable(
            model=model,
            plan=plan,
            onnx=models[self.stages[last]],
            sample=self.task.split("valid")[0][:SELFTEST_SAMPLES],
            manifest=manifest,
            candidate=plan,
            origin=f"Compressed from `{self.name}` by {', '.join(plan)}",
            choices={f"{name} of {layer}": value for name, layers in plan.items() for layer, value in layers.items()},
            files=self.task.student_files(),
        )
        pack(student, deliverable)
        rows = [self.facts(i) or {} for i in range(len(self.stages))]
        write_record(self.folder / "record.json", manifest, rows, session)
        return student

    def _manifest(
        self, plan: Mapping[str, Mapping[str, Any]], session: Session, quality: dict[str, Any]
    ) -> dict[str, Any]:
        info, facts, first = self.task.info, self.facts(len(self.stages) - 1) or {}, self.facts(0) or {}
        timing = session.timings[self.stages[-1]]
        return {
            "schema_version": 1,
            "name": self.name,
            "task": {
                "kind": type(self.task).__name__, "data": self.data, "fingerprint": self.task.fingerprint,
                "classes": list(self.task.classes),
            },
            "candidate": plan,
            "seed": self.seed,
            "quality": quality,
            "latency": [
                {
                    "device": self.device.name, "fingerprint": self.device.fingerprint, "runtime": self.device.runtime,
                    "p50_ms": timing.p50, "p95_ms": timing.p95, "noise": timing.noise,
                    "teacher_p50_ms": session.timings[self.stages[0]].p50, "threads": self.device.threads,
                    "batch": self.device.batch, "measured": True,
                }
            ],
            "size_bytes": {"onnx": facts["size_bytes"], "teacher_onnx": first["size_bytes"]},
            "macs": facts["macs"],
            "params": facts["params"],
            "parity": {"max_abs_diff": facts["max_abs_diff"], "agreement": facts["agreement"]},
            **model_facts(self.stage_folder(len(self.stages) - 1) / "model.onnx", info),
        }  # fmt: skip

    @property
    def identity(self) -> dict[str, Any]:
        """What must stay the same for a pipeline to be gone on with."""
        sha = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            sha.update(name.encode())
            sha.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        plain = {
            "weights": sha.hexdigest()[:16], "data": self.task.fingerprint, "seed": self.seed,
            "steps": [step.plain() for step in self.steps], "tuning": asdict(self.tuning),
        }  # fmt: skip
        known: dict[str, Any] = json.loads(json.dumps(plain))
        return known


def execute(pipeline: Pipeline, *, resume: bool = False) -> Path:
    """Run the whole pipeline in its folder; returns the student folder.

    Raises:
        StudyError: the folder holds a pipeline and ``resume`` was not asked for, or another pipeline.
        CompressionError: a pass cannot do what is asked.
        DataError: the model does not fit the data.
    """
    pipeline.folder.mkdir(parents=True, exist_ok=True)
    with run_lock(pipeline.folder):
        _open(pipeline, resume)
        pipeline.run()
        return pipeline.deliver()


def _open(pipeline: Pipeline, resume: bool) -> None:
    kept, now = pipeline.folder / "pipeline.json", pipeline.identity
    if kept.exists():
        if not resume:
            raise StudyError(
                f"{pipeline.folder} holds a pipeline already.",
                remedy="--resume to go on with it, or another folder with --out",
            )
        before = json.loads(kept.read_text())
        if changed := sorted(key for key in {*before, *now} if before.get(key) != now.get(key)):
            raise StudyError(
                f"The pipeline in {pipeline.folder} is another one: {', '.join(changed)} changed.",
                remedy="undo the change, or start afresh with another --out",
            )
    write_json(kept, now)
