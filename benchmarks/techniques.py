"""Each compression technique alone on a trained ResNet-8, and a chain of several: quality, bytes, MACs, measured ms.

    python benchmarks/techniques.py --data FOLDER --out runs/techniques                  # 10,000 images of MNIST
    python benchmarks/techniques.py --data FOLDER --out runs/techniques --set cifar --teacher-epochs 16

Every arm is a pipeline as `nas compress` runs it. FOLDER is that of own_model.py. The same command goes on with a run
that was stopped. The pipelines get the test images as their validation data: nothing is chosen by them, so that the
qualities which a pipeline reports, right after a pass and after fine-tuning, in torch and in onnxruntime, are of the
test.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from own_model import MODELS, cifar, mnist, train_teacher
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nas.evaluators.train import Lessons
from nas.latency import Device
from nas.pipeline import Pipeline, Tuning, steps_of
from nas.student.finalists import measure_models
from nas.tasks import Task
from nas.tasks.classification import ImageClassification

CHAIN = "layer_drop:count=1 + channel_prune:ratio=0.5 + quantize:bits=8"
# Steps; fine-tuning is by distillation from the teacher but where the arm says "labels only".
ARMS = (
    "weight_prune:sparsity=0.8",
    *(f"channel_prune:macs=0.5,importance={name}" for name in ("l1", "taylor", "bn", "entropy", "group_lasso")),
    "layer_drop:count=1",
    "low_rank:energy=0.9",
    "low_rank:ratio=0.5,method=tucker",
    "quantize:bits=8",
    "quantize:bits=4",
    "quantize:bits=2",
    "quantize:bits=8,dynamic=true",
    "quantize:bits=4,activations=null",
    "cluster:clusters=16",
    CHAIN,
    "channel_prune:macs=0.5,importance=l1; labels only",
    "quantize:bits=2; labels only",
)
TEACHER = "teacher"


class Judged(ImageClassification):
    """A classification whose validation data are the test images."""

    def split(self, name: str) -> tuple[Tensor, Tensor]:
        return super().split("test" if name == "valid" else name)


def options() -> argparse.ArgumentParser:
    """What both benchmarks of compression are told."""
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets")
    parser.add_argument("--out", type=Path, required=True, help="teachers, models, results; one for each recipe")
    parser.add_argument("--set", choices=sorted(MODELS), default="mnist")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--teacher-epochs", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=2, help="of fine-tuning after each step")
    parser.add_argument("--lr", type=float, default=3e-3, help="of fine-tuning")
    parser.add_argument("--kd-weight", type=float, default=0.5)
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=60.0, help="of the interleaved measurement of a seed's models")
    return parser


def task_of(told: argparse.Namespace, seed: int) -> Task:
    """10,000 images, of which 8,000 are for training, and the test images."""
    path = told.out / f"{told.set}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **(cifar if told.set == "cifar" else mnist)(told.data))
    limit = told.test_images if told.test_images < 10_000 else None
    return Judged(path, seed=seed, shift=2, flip=told.set == "cifar", limit_test=limit)


def teacher_of(told: argparse.Namespace, task: Task, seed: int) -> nn.Module:
    """The trained model of a seed; trained once for both benchmarks in the same folder."""
    path = told.out / f"teacher-{told.set}-{told.teacher_epochs}-{seed}.safetensors"
    torch.manual_seed(seed)
    model = MODELS[told.set]()
    if path.exists():
        model.load_state_dict(load_file(path))
    else:
        start = time.perf_counter()
        quality = train_teacher(model, task, told.teacher_epochs, 1e-2, seed)
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
        print(json.dumps({"teacher": seed, "test": quality, "seconds": time.perf_counter() - start}), flush=True)
    return model.eval()


def folder_name(arm: str) -> str:
    """A folder for an arm."""
    return "".join(c if c.isalnum() or c in ".-=" else "_" for c in arm)


def run_arms(told: argparse.Namespace, seed: int, arms: Sequence[str]) -> list[dict[str, Any]]:
    """Every arm on one seed's teacher, then all models measured side by side; a row each, the teacher's first."""
    task = task_of(told, seed)
    teacher = teacher_of(told, task, seed)
    # What the teacher says, and its own stage, are the same for all arms.
    lessons = Lessons.prepare(task, teacher, 1, seed)
    place = told.out / f"techniques-{told.set}-e{told.epochs}-{seed}"
    rows: dict[str, dict[str, Any]] = {}
    models: dict[str, Path] = {}
    first: Path | None = None
    for arm in arms:
        text, _, remark = arm.partition("; ")
        kd_weight = 0.0 if remark else told.kd_weight
        pipeline = Pipeline(
            model=teacher, name=type(teacher).__name__, task=task, data=told.set,
            steps=steps_of(text.split(" + ")), tuning=Tuning(epochs=told.epochs, lr=told.lr, kd_weight=kd_weight),
            folder=place / folder_name(arm), device=Device.local(), seed=seed,
        )  # fmt: skip
        pipeline.lessons = lessons
        start = pipeline.stage_folder(0)
        if first is not None and not start.exists():
            shutil.copytree(first, start)
        pipeline.run()
        first = start
        last = len(pipeline.stages) - 1
        models.setdefault(TEACHER, start / "model.onnx")
        rows.setdefault(TEACHER, dict(pipeline.facts(0) or {}))
        models[arm] = pipeline.stage_folder(last) / "model.onnx"
        rows[arm] = dict(pipeline.facts(last) or {})
        print(json.dumps({"seed": seed, "arm": arm, **{k: rows[arm][k] for k in SHOWN}}), flush=True)
    timings = measure_models(models, Device.local(), told.seconds).timings
    return [
        {"seed": seed, "arm": arm, **{k: row[k] for k in SHOWN if k in row}, "p50_ms": timings[arm].p50,
         "noise": timings[arm].noise}
        for arm, row in rows.items()
    ]  # fmt: skip


SHOWN = ("quality_applied", "quality", "quality_onnx", "agreement", "size_bytes", "macs", "seconds")


def mean_std(values: Sequence[float], form: Callable[[float], str]) -> str:
    """``mean ± std`` with the sample's standard deviation; a single value has none."""
    mean = form(float(np.mean(values)))
    return f"{mean} ± {form(float(np.std(values, ddof=1)))}" if len(values) > 1 else mean


def by_arm(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Arm → its rows, in the order of the first ones."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["arm"], []).append(row)
    return found


def against(rows: Sequence[Mapping[str, Any]], arm: str, key: str, other: str = TEACHER) -> list[float]:
    """``key`` of ``other`` over that of ``arm``, seed by seed."""
    base = {row["seed"]: row[key] for row in rows if row["arm"] == other}
    return [base[row["seed"]] / row[key] for row in rows if row["arm"] == arm]


def percent(value: float) -> str:
    """A share as percent."""
    return f"{100 * value:.2f}"


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown: a line an arm, mean ± standard deviation over the seeds."""
    lines = [
        "| arm | right after the pass % | fine-tuned, torch % | exported % | largest gap, points | bytes | × smaller "
        "| MACs, millions | p50 ms | × faster |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, found in by_arm(rows).items():
        applied = [row["quality_applied"] for row in found if "quality_applied" in row]
        gap = max(abs(row["quality"] - row["quality_onnx"]) for row in found)
        cells = [
            arm,
            mean_std(applied, percent) if applied else "–",
            mean_std([row["quality"] for row in found], percent),
            mean_std([row["quality_onnx"] for row in found], percent),
            percent(gap),
            f"{np.mean([row['size_bytes'] for row in found]):,.0f}",
            f"{np.mean(against(rows, arm, 'size_bytes')):.2f}",
            f"{np.mean([row['macs'] for row in found]) / 1e6:.2f}",
            mean_std([row["p50_ms"] for row in found], "{:.4f}".format),
            mean_std(against(rows, arm, "p50_ms"), "{:.2f}".format),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Run all seeds; print the table and write it beside the rows."""
    parser = options()
    parser.description = __doc__
    parser.add_argument("--only", default="", help="a part of the names of the arms to run")
    told = parser.parse_args()
    torch.set_num_threads(1)
    arms = [arm for arm in ARMS if told.only in arm]
    rows: list[dict[str, Any]] = []
    for seed in map(int, told.seeds.split(",")):
        rows += run_arms(told, seed, arms)
        lines = table(rows)
        (told.out / "techniques.json").write_text(json.dumps(rows, indent=1))
        (told.out / "techniques.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
