"""Masks of NNI's nine pruners made small: ours beside NNI's ModelSpeedup, and beside the masked model itself.

    python benchmarks/nni_pruners.py --data PATH/mnist.npz --seeds 0,1,2

Two trained models, convolutions one after the other and a ResNet-8. Every pruner is asked for half of every layer but
the last. Its masks are applied four ways: outputs kept (`keep`), the same with channels left in multiples of 8, tied
layers agreeing by `vote`, and ModelSpeedup as it is called where it runs on this torch:
`ModelSpeedup(model, example, masks, graph_module=torch.fx.symbolic_trace(model))`. Each is exported, its outputs are
compared to the masked model's on the test images by onnxruntime, and all are timed interleaved with the model that was
not pruned. Needs NNI. --out gets the models, `nni_pruners.json` and the tables, `nni_pruners.md`.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nni
import numpy as np
import onnx
import torch
import torch.nn.functional as F
from nni.compression import TorchEvaluator, pruning
from nni.compression.speedup import ModelSpeedup
from own_model import ResNet, mnist, train_teacher
from techniques import mean_std
from torch import fx, nn

from nas.latency import Device
from nas.nni.masks import masked
from nas.nni.pruners import shrink, to_onnx
from nas.student.export import deployable, export_float
from nas.student.finalists import measure_models
from nas.student.teacher import onnx_logits
from nas.tasks import ImageClassification, Task

PRUNERS = ("Level", "L1Norm", "L2Norm", "FPGM", "Taylor", "Slim", "Linear", "AGP", "Movement")
RATIO = 0.5
STEPS = 20  # of the trainings that some pruners want
DENSE, KEEP, ALIGNED, VOTE, NNI = "not pruned", "keep", "keep, align 8", "vote", "ModelSpeedup"
OURS: dict[str, dict[str, Any]] = {KEEP: {}, ALIGNED: {"align": 8}, VOTE: {"conflicts": "vote"}}
Masks = dict[str, dict[str, "torch.Tensor | None"]]


class Plain(nn.Module):
    """Three convolutions with batch normalisation, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for cin, cout, stride in ((1, 32, 1), (32, 64, 2), (64, 64, 2)):
            layers += [nn.Conv2d(cin, cout, 3, stride, 1), nn.BatchNorm2d(cout), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.hidden, self.fc = nn.Linear(64 * 49, 64), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(F.relu(self.hidden(torch.flatten(self.features(x), 1))))


MODELS: dict[str, Callable[[], nn.Module]] = {"plain": Plain, "resnet8": lambda: ResNet(1, 32)}


def evaluator(model: nn.Module, task: Task, seed: int) -> TorchEvaluator:
    """How NNI trains: plain steps of SGD."""
    x, y = task.split("train")
    draw = torch.Generator().manual_seed(seed)

    def training(model: nn.Module, optimizer: Any, step: Any, *given: Any, max_steps: Any = None, **_: Any) -> None:
        model.train()
        for _ in range(max_steps or STEPS):
            rows = torch.randint(len(x), (64,), generator=draw)
            optimizer.zero_grad()
            step((x[rows], y[rows]), model).backward()
            optimizer.step()

    def step(batch: Any, model: nn.Module) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    return TorchEvaluator(training, nni.trace(torch.optim.SGD)(model.parameters(), lr=0.01, momentum=0.9), step)


def masks_of(kind: str, model: nn.Module, task: Task, seed: int) -> Masks:
    """What a pruner masks; the model is unwrapped afterwards, and trained where the pruner trains."""
    torch.manual_seed(seed)
    asked = [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": RATIO, "exclude_op_names": ["fc"]}]
    trains = evaluator(model, task, seed)
    if kind in ("Level", "L1Norm", "L2Norm", "FPGM"):
        pruner: Any = getattr(pruning, f"{kind}Pruner")(model, asked)
        steps = None
    elif kind in ("Taylor", "Slim"):
        pruner, steps = getattr(pruning, f"{kind}Pruner")(model, asked, trains, training_steps=STEPS), None
    elif kind == "Movement":
        pruner = pruning.MovementPruner(model, asked, trains, warmup_step=4, cooldown_begin_step=STEPS - 4)
        steps = STEPS
    else:
        bound = pruning.L1NormPruner(model, asked, trains)
        pruner, steps = getattr(pruning, f"{kind}Pruner")(bound, interval_steps=STEPS // 5, total_times=5), STEPS
    _, masks = pruner.compress(steps, None)
    pruner.unwrap_model()
    return dict(masks)


def nni_speedup(model: nn.Module, sample: torch.Tensor, masks: Masks) -> nn.Module:
    """NNI's own."""
    model = copy.deepcopy(model)
    smaller: nn.Module = ModelSpeedup(
        model, sample, copy.deepcopy(masks), graph_module=fx.symbolic_trace(model)
    ).speedup_model()
    return smaller


def widths(model: nn.Module) -> dict[str, int]:
    """Path → outputs of every convolution and linear layer."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    return {name: len(layer.weight) for name, layer in layers.items()}


def run(
    told: argparse.Namespace, name: str, kind: str, dense: nn.Module, task: Task, seed: int
) -> list[dict[str, Any]]:
    """One pruner's masks, four ways; a row each."""
    model = copy.deepcopy(dense)
    masks = masks_of(kind, model, task, seed)
    sample, (x, y) = task.split("train")[0][:8], task.split("test")
    model.eval()
    with torch.no_grad():
        wanted = masked(model, masks, sample).eval()(x).numpy()
    place = told.out / f"{name}-{kind}-{seed}"
    place.mkdir(parents=True, exist_ok=True)
    onnx.save(export_float(deployable(dense, {}), sample[:1]), place / "dense.onnx")
    files, rows = {DENSE: place / "dense.onnx"}, []
    weights: dict[str, Any] = {layer: own["weight"] for layer, own in masks.items()}
    asked = {layer: int((mask.flatten(1).sum(1) == 0).sum()) for layer, mask in weights.items()}
    whole = {layer: len(mask) for layer, mask in weights.items()}
    common = {"model": name, "pruner": kind, "seed": seed, "asked": asked, "whole": whole}
    for way in (*OURS, NNI):
        row: dict[str, Any] = {**common, "way": way}
        rows.append(row)
        start = time.perf_counter()
        try:
            if way == NNI:
                smaller = nni_speedup(model, sample, masks)
                graph = export_float(deployable(smaller, {}), sample[:1])
            else:
                smaller = shrink(model, sample, masks, **OURS[way]).model
                graph = to_onnx(smaller, sample)
        except Exception as error:  # whatever NNI raises is a result
            row["error"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            continue
        row["seconds"] = time.perf_counter() - start
        file = place / f"{way.replace(', ', '-').replace(' ', '')}.onnx"
        onnx.save(graph, file)
        files[way] = file
        found = onnx_logits(file, x)
        row |= {
            "left": {key: value for key, value in widths(smaller).items() if key in asked},
            "difference": float(np.abs(found - wanted).max() / np.abs(wanted).max()),
            "changed": float((found.argmax(1) != wanted.argmax(1)).mean()),
            "accuracy": float((found.argmax(1) == y.numpy()).mean()),
            "accuracy_masked": float((wanted.argmax(1) == y.numpy()).mean()), "bytes": file.stat().st_size,
        }  # fmt: skip
    timings = measure_models(files, Device.local(), told.seconds).timings
    for row in rows:
        row["bytes_dense"] = files[DENSE].stat().st_size
        if row["way"] in timings:
            row |= {"faster": timings[DENSE].p50 / timings[row["way"]].p50, "noise": timings[row["way"]].noise}
    return rows


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Of one way over the seeds: channels left, largest difference, accuracy, bytes, speed."""
    ran = [row for row in rows if "error" not in row]
    if not ran:
        return dict.fromkeys(("left", "difference", "changed", "accuracy", "smaller", "faster"), str(rows[0]["error"]))
    share = np.mean([sum(row["left"].values()) / sum(row["whole"].values()) for row in ran])
    return {
        "left": f"{100 * share:.0f}", "difference": f"{max(row['difference'] for row in ran):.1e}",
        "changed": f"{100 * np.mean([row['changed'] for row in ran]):.1f}",
        "accuracy": f"{100 * np.mean([row['accuracy'] for row in ran]):.1f}",
        "smaller": f"{np.mean([row['bytes_dense'] / row['bytes'] for row in ran]):.2f}",
        "faster": mean_std([row["faster"] for row in ran], "{:.2f}".format),
    }  # fmt: skip


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown: a line for each model and pruner; what is parted by strokes is keep / keep, align 8 / vote / NNI."""
    lines = [
        "| model | pruner | asked for, % | channels left, % | largest difference | predictions changed, % "
        "| accuracy, % (masked) | × smaller file | × faster |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model, pruner in dict.fromkeys((row["model"], row["pruner"]) for row in rows):
        own = [row for row in rows if (row["model"], row["pruner"]) == (model, pruner)]
        ways = [figures([row for row in own if row["way"] == way]) for way in (*OURS, NNI)]
        asked = np.mean([sum(row["asked"].values()) / sum(row["whole"].values()) for row in own])
        masked_ = 100 * np.mean([row["accuracy_masked"] for row in own if "accuracy_masked" in row])
        told = {key: " / ".join(way[key] for way in ways) for key in ways[0]}
        told["accuracy"] = f"{told['accuracy']} ({masked_:.1f})"
        cells = [told[key] for key in ("left", "difference", "changed", "accuracy", "smaller", "faster")]
        lines.append(f"| {' | '.join([model, pruner, f'{100 * asked:.0f}', *cells])} |")
    return lines


def channels(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown: channels of every layer for the L1 norm, first seed."""
    lines = ["| model | way | channels, layer by layer |", "|---|---|---|"]
    order = {name: [layer for layer in widths(build()) if layer != "fc"] for name, build in MODELS.items()}
    for row in rows:
        if row["pruner"] == "L1Norm" and row["seed"] == rows[0]["seed"] and "left" in row:
            layers = list(order[row["model"]])
            if row["way"] == KEEP:
                for told, key in (("whole", "whole"), ("asked to go", "asked")):
                    lines.append(f"| {row['model']} | {told} | {' '.join(str(row[key][name]) for name in layers)} |")
            lines.append(f"| {row['model']} | {row['way']} | {' '.join(str(row['left'][name]) for name in layers)} |")
    return lines


def main() -> None:
    """Run everything; print the tables and write them beside the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="mnist.npz")
    parser.add_argument("--out", type=Path, default=Path("runs") / "nni-pruners")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--pruners", default=",".join(PRUNERS))
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--seconds", type=float, default=2.0, help="of one pruner's interleaved measurement")
    told = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)  # NNI tells every layer of every step
    told.out.mkdir(parents=True, exist_ok=True)
    path = told.out / "mnist.npz"
    np.savez(path, **mnist(told.data.parent))
    rows: list[dict[str, Any]] = []
    for seed in map(int, told.seeds.split(",")):
        task = ImageClassification(str(path), seed=seed, limit=3000, limit_test=1000)
        for name in told.models.split(","):
            torch.manual_seed(seed)
            dense = MODELS[name]()
            train_teacher(dense, task, 1, 1e-2, seed)
            dense.eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
            for kind in told.pruners.split(","):
                found = run(told, name, kind, dense, task, seed)
                rows += found
                for row in found:
                    print(json.dumps(row), flush=True)
    lines = [*table(rows), "", *channels(rows)]
    (told.out / "nni_pruners.json").write_text(json.dumps(rows, indent=1))
    (told.out / "nni_pruners.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
