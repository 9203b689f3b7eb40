"""Channel pruning to half of the MACs, ours beside torch-pruning's uniform pruner and NNI's, in one run.

    python benchmarks/pruners.py --data FOLDER --out runs/techniques                     # 10,000 images of MNIST

The same teacher, the same fine-tuning (epochs, rate, distillation, order of the data) and the same export for all; all
models are measured side by side. Each peer is as it comes, with the smallest ratio that leaves at most half of the
teacher's MACs. Needs NNI (`pip install nni`). FOLDER and --out as of techniques.py, whose teachers are used.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
import torch_pruning as tp
from techniques import TEACHER, against, by_arm, folder_name, mean_std, options, percent, task_of, teacher_of
from torch import fx, nn

from nas.compression import passes
from nas.evaluators.train import SAMPLE, Lessons, predict, train
from nas.latency import Device
from nas.pipeline import Tuning
from nas.space import Training
from nas.student.export import deployable, export_float, onnx_macs_params
from nas.student.finalists import measure_models
from nas.student.teacher import onnx_logits
from nas.tasks import Task

HALF = 0.5
Pruner = Callable[[nn.Module, Task], nn.Module]


def exported(model: nn.Module, sample: torch.Tensor) -> onnx.ModelProto:
    """The plain model as ONNX."""
    return export_float(deployable(model, {}), sample)


def smallest(left: Callable[[float], float], target: float, rounds: int = 9) -> float:
    """The smallest ratio in (0, 1), to 2⁻⁹, that leaves at most ``target``, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(rounds):
        middle = (low + high) / 2
        low, high = (low, middle) if left(middle) <= target else (middle, high)
    return high


def searched(prune: Callable[[nn.Module, float], nn.Module], model: nn.Module, sample: torch.Tensor) -> nn.Module:
    """What ``prune`` makes of the model at the smallest ratio that leaves half of the MACs."""
    whole = onnx_macs_params(exported(model, sample))[0]

    def left(ratio: float) -> float:
        return onnx_macs_params(exported(prune(copy.deepcopy(model), ratio), sample))[0] / whole

    return prune(copy.deepcopy(model), smallest(left, HALF))


def ours(importance: str) -> Pruner:
    """`channel_prune:macs=0.5`, rounded to multiples of 8 as it is by default."""

    def pruned(model: nn.Module, task: Task) -> nn.Module:
        x, y = task.split("train")
        sample = x[:SAMPLE]

        def loss(logits: torch.Tensor) -> torch.Tensor:
            return task.loss(logits, y[:SAMPLE])

        kind = passes.get("channel_prune")
        settings = kind.settings_for(model, sample, loss, macs=HALF, importance=importance)
        return kind(settings).apply(copy.deepcopy(model), sample, loss)

    return pruned


def torch_pruning(model: nn.Module, task: Task) -> nn.Module:
    """torch-pruning's own pruner: one ratio for every group, by magnitude, its defaults otherwise."""
    sample = task.split("train")[0][:1]

    def prune(model: nn.Module, ratio: float) -> nn.Module:
        pruner = tp.pruner.BasePruner(
            model, sample, importance=tp.importance.MagnitudeImportance(), pruning_ratio=ratio,
            ignored_layers=[layer for layer in model.modules() if isinstance(layer, nn.Linear)],
        )  # fmt: skip
        pruner.step()
        return model

    return searched(prune, model, sample)


def nni(model: nn.Module, task: Task) -> nn.Module:
    """NNI's L1 masks and its speed-up. Layers that an addition ties lose the channels that all of them have masked."""
    from nni.compression.pruning import L1NormPruner
    from nni.compression.speedup import ModelSpeedup

    logging.disable(logging.ERROR)  # its loggers set levels of their own, and tell every layer of every attempt
    sample = task.split("train")[0][:1]

    def prune(model: nn.Module, ratio: float) -> nn.Module:
        pruner = L1NormPruner(model, [{"op_types": ["Conv2d"], "sparse_ratio": ratio}])
        _, masks = pruner.compress()
        pruner.unwrap_model()
        smaller: nn.Module = ModelSpeedup(model, sample, masks, graph_module=fx.symbolic_trace(model)).speedup_model()
        return smaller

    try:
        return searched(prune, model, sample)
    finally:
        logging.disable(logging.NOTSET)


OURS = "channel_prune, l1"
PRUNERS: dict[str, Pruner] = {
    OURS: ours("l1"),
    "channel_prune, taylor": ours("taylor"),
    "torch-pruning BasePruner": torch_pruning,
    "NNI L1NormPruner + ModelSpeedup": nni,
}


def widths(model: nn.Module) -> list[int]:
    """Channels of every convolution."""
    return [layer.out_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)]


def run(told: Any, seed: int) -> list[dict[str, Any]]:
    """All pruners on one seed's teacher; a row each."""
    task = task_of(told, seed)
    teacher = teacher_of(told, task, seed)
    sample = task.split("train")[0][:1]
    x, y = task.split("test")
    lessons = Lessons.prepare(task, teacher if told.kd_weight else None, 1, seed)
    recipe = Tuning(lr=told.lr).recipe(told.epochs)
    place = told.out / f"pruners-{told.set}-e{told.epochs}-{seed}"
    place.mkdir(parents=True, exist_ok=True)
    rows, files = [], {}
    for name, pruner in {TEACHER: None, **PRUNERS}.items():
        files[name] = place / f"{folder_name(name)}.onnx"
        facts = files[name].with_suffix(".json")
        if not facts.exists():
            model, applied = copy.deepcopy(teacher), None
            if pruner is not None:
                torch.manual_seed(seed)
                model = pruner(model, task)
                applied = _quality(task, predict(model, x), y)
                model = train(model, task, lessons, Training(told.kd_weight, 4.0), recipe, seed)
            graph = exported(model, sample)
            onnx.save(graph, files[name])
            row = {
                "seed": seed, "arm": name, "applied": applied, "quality": _quality(task, predict(model, x), y),
                "quality_onnx": _quality(task, onnx_logits(files[name], x), y), "macs": onnx_macs_params(graph)[0],
                "size_bytes": files[name].stat().st_size, "widths": widths(model),
            }  # fmt: skip
            facts.write_text(json.dumps(row))
        rows.append(json.loads(facts.read_text()))
        print(json.dumps(rows[-1]), flush=True)
    timings = measure_models(files, Device.local(), told.seconds).timings
    return [{**row, "p50_ms": timings[row["arm"]].p50, "noise": timings[row["arm"]].noise} for row in rows]


def _quality(task: Task, logits: Any, y: torch.Tensor) -> float:
    return task.evaluate(logits, y.numpy())[task.metric]


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown: a line an arm, mean ± standard deviation over the seeds."""
    lines = [
        "| arm | right after pruning % | fine-tuned, exported % | MACs % | bytes | p50 ms | × faster than the teacher "
        "| its ms / ms of ours (l1) | accuracy of ours (l1) − its, points | channels (first seed) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    exact = {row["seed"]: row["quality_onnx"] for row in rows if row["arm"] == OURS}
    for arm, found in by_arm(rows).items():
        applied = [row["applied"] for row in found if row["applied"] is not None]
        ahead = [exact[row["seed"]] - row["quality_onnx"] for row in found]
        cells = [
            arm,
            mean_std(applied, percent) if applied else "–",
            mean_std([row["quality_onnx"] for row in found], percent),
            f"{100 / np.mean(against(rows, arm, 'macs')):.1f}",
            f"{np.mean([row['size_bytes'] for row in found]):,.0f}",
            mean_std([row["p50_ms"] for row in found], "{:.4f}".format),
            mean_std(against(rows, arm, "p50_ms"), "{:.2f}".format),
            mean_std([1 / ratio for ratio in against(rows, arm, "p50_ms", OURS)], "{:.2f}".format),
            mean_std(ahead, percent),
            " ".join(map(str, found[0]["widths"])),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Run all seeds; print the table and write it beside the rows."""
    parser = options()
    parser.description = __doc__
    told = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for seed in map(int, told.seeds.split(",")):
        rows += run(told, seed)
        lines = table(rows)
        (told.out / "pruners.json").write_text(json.dumps(rows, indent=1))
        (told.out / "pruners.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
