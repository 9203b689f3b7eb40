"""What NNI's quantisers trained, exported with real Q/DQ operators: accuracy, kernels, bytes and time beside NNI's own.

    python benchmarks/nni_quantizers.py --data FOLDER --out runs/nni-quantizers           # 5,000 images of MNIST

A small residual network is trained in floats; each of NNI's quantisers then gets a copy, as NNI's documentation has it:
inputs, weights and outputs of convolutions and linear layers, normalisation fused. "simulated" is NNI's own model in
torch, "onnxruntime" the exported file on the same 10,000 test images, "agreement" the share of images that both give
the same class. "NNI's own export" is torch.onnx.export after `unwrap_model()`, which NNI's documentation asks for; the
wrapped model stops the exporter. Models are timed interleaved, one inference thread, batch 1. FOLDER holds mnist.npz.
Needs NNI.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import logging
import os
import platform
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nni
import numpy as np
import onnx
import torch
from nni.compression.quantization import LsqQuantizer, PtqQuantizer, QATQuantizer
from nni.compression.utils import TorchEvaluator
from own_model import mnist
from techniques import against, by_arm, folder_name, mean_std, percent
from torch import nn
from torch.nn import functional as F

from nas.latency import Device
from nas.latency.runtimes import OnnxRuntime
from nas.nni.quantizers import quantized_onnx
from nas.student.export import deployable, export_float
from nas.student.finalists import measure_models
from nas.student.teacher import onnx_logits

FLOAT = "fp32, not quantised"
INTEGER = ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "QLinearAdd", "QLinearGlobalAveragePool")
PAIRS = ("QuantizeLinear", "DequantizeLinear")
Data = Mapping[str, torch.Tensor]


class Residual(nn.Module):
    """A stem and two stages with a shortcut each, of named modules, which NNI's fusing asks for; raw values 0..1 in."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        shapes = ((1, width, 2), (width, width, 1), (width, width, 1), (width, 2 * width, 2), (2 * width,) * 2 + (1,))
        for i, (cin, cout, stride) in enumerate(shapes):
            setattr(self, f"conv{i}", nn.Conv2d(cin, cout, 3, stride, 1, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(cout))
            setattr(self, f"relu{i}", nn.ReLU())
        self.short, self.short_bn = nn.Conv2d(width, 2 * width, 1, 2, bias=False), nn.BatchNorm2d(2 * width)
        self.average, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(2 * width, 10)

    def unit(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """Convolution and normalisation number ``i``."""
        result: torch.Tensor = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x))
        return result

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu0(self.unit(0, x))
        x = self.relu2(self.unit(2, self.relu1(self.unit(1, x))) + x)
        x = self.relu4(self.unit(4, self.relu3(self.unit(3, x))) + self.short_bn(self.short(x)))
        return self.head(self.average(x).flatten(1))


FUSED = [
    ("conv0", "bn0", "relu0"), ("conv1", "bn1", "relu1"), ("conv2", "bn2"), ("conv3", "bn3", "relu3"),
    ("conv4", "bn4"), ("short", "short_bn"),
]  # fmt: skip


def settings(weights: str, activations: str = "int8", scheme: str = "symmetric") -> list[dict[str, Any]]:
    """A configuration list of NNI."""
    around = {"quant_dtype": activations, "quant_scheme": scheme}
    kernel = {"quant_dtype": weights, "quant_scheme": "symmetric", "granularity": "out_channel"}
    return [
        {
            "op_types": ["Conv2d", "Linear"], "target_names": ["_input_", "weight", "_output_"], "quant_dtype": "int8",
            "target_settings": {"_input_": around, "weight": kernel, "_output_": around}, "fuse_names": FUSED,
        }
    ]  # fmt: skip


ARMS: dict[str, tuple[Any, list[dict[str, Any]]]] = {
    "QAT, int8": (QATQuantizer, settings("int8")),
    "QAT, int8, uint8 affine activations": (QATQuantizer, settings("int8", "uint8", "affine")),
    "QAT, int4 weights": (QATQuantizer, settings("int4")),
    "PTQ, int8": (PtqQuantizer, settings("int8")),
    "PTQ, int8, uint8 affine activations": (PtqQuantizer, settings("int8", "uint8", "affine")),
    "LSQ, int8": (LsqQuantizer, settings("int8")),
}


FASTER = ("QAT, int8", "QAT, int8, uint8 affine activations")  # exported a second time, some roundings left out


def fit(model: nn.Module, data: Data, optimizer: Any, epochs: int, seed: int, steps: int | None = None) -> None:
    """Cross-entropy, batches of 64, the rate falling to zero."""
    generator = torch.Generator().manual_seed(seed)
    model.train()
    parts = [p for _ in range(epochs) for p in torch.randperm(len(data["x_train"]), generator=generator).split(64)]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(parts))
    for rows in parts[:steps]:
        optimizer.zero_grad()
        F.cross_entropy(model(data["x_train"][rows]), data["y_train"][rows]).backward()
        optimizer.step()
        schedule.step()


def quantized(arm: str, model: nn.Module, data: Data, seed: int, epochs: int) -> Any:
    """One of NNI's quantisers after its `compress`."""
    kind, config = ARMS[arm]

    def training(model: nn.Module, optimizer: Any, step: Any, scheduler: Any = None, *most: Any, **limits: Any) -> None:
        if kind is PtqQuantizer:
            return  # it calibrates by evaluating
        found = dict(zip(("max_steps", "max_epochs"), most, strict=False)) | limits
        fit(model, data, optimizer, found["max_epochs"] or 1, seed, found["max_steps"])

    def evaluating(model: nn.Module) -> None:
        predict(model, data["x_train"][:1024])

    torch.manual_seed(seed)
    own = copy.deepcopy(model)
    optimizer = nni.trace(torch.optim.Adam)(own.parameters(), lr=1e-3)
    evaluator = TorchEvaluator(training, optimizer, lambda batch, model: None, evaluating_func=evaluating)
    quantizer = kind(own, config, evaluator)
    if kind is PtqQuantizer:
        quantizer.compress(1, None)
    else:
        quantizer.compress(None, epochs)
    return quantizer


def predict(model: nn.Module, x: torch.Tensor) -> Any:
    """Logits, batches of 500."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(part) for part in x.split(500)]).numpy()


def pairs(model: onnx.ModelProto) -> int:
    """QuantizeLinear and DequantizeLinear nodes."""
    return sum(node.op_type in PAIRS for node in model.graph.node)


def own_export(quantizer: Any, x: torch.Tensor) -> int:
    """Such nodes in what torch.onnx.export makes of NNI's model: unwrapped, because the wrapped one stops it."""
    quantizer.unwrap_model()
    buffer: Any = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(quantizer.bound_model.eval(), (x,), buffer, dynamo=False)
    return pairs(onnx.load_from_string(buffer.getvalue()))


def row(arm: str, simulated: Any, path: Path, data: Data) -> dict[str, Any]:
    """What is told of one model."""
    y, logits = data["y_test"].numpy(), onnx_logits(path, data["x_test"])
    model = onnx.load(path)
    kernels = OnnxRuntime().load(model, threads=1, batch=1).fused()
    return {
        "arm": arm, "simulated": float(np.mean(simulated.argmax(1) == y)),
        "quality_onnx": float(np.mean(logits.argmax(1) == y)),
        "agreement": float(np.mean(logits.argmax(1) == simulated.argmax(1))),
        "difference": float(np.abs(logits - simulated).mean() / np.abs(simulated).max()),
        "pairs": pairs(model), "integer": sum(kernels.get(kind, 0) for kind in INTEGER),
        "floating": sum(kernels.get(kind, 0) for kind in ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul")),
        "size_bytes": path.stat().st_size,
    }  # fmt: skip


def run(told: argparse.Namespace, data: Data, seed: int) -> list[dict[str, Any]]:
    """All arms on one seed's network; a row each."""
    place = told.out / f"seed-{seed}"
    place.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = Residual()
    fit(model, data, torch.optim.Adam(model.parameters(), 2e-3), told.epochs, seed)
    example = data["x_test"][:1]
    files = {FLOAT: place / "fp32.onnx"}
    onnx.save(export_float(deployable(model, {}), example), files[FLOAT])
    rows = [row(FLOAT, predict(model, data["x_test"]), files[FLOAT], data)]
    for arm in ARMS:
        quantizer = quantized(arm, model, data, seed, told.tune_epochs)
        simulated = predict(quantizer.bound_model, data["x_test"])
        for name, exact in ((arm, True), (f"{arm}, exact=False", False))[: 1 + (arm in FASTER)]:
            files[name] = place / f"{folder_name(name)}.onnx"
            quantized_onnx(quantizer, example, exact=exact).save(files[name])
            rows.append(row(name, simulated, files[name], data))
        own = own_export(quantizer, example)
        for found in (found for found in rows if found["arm"].startswith(arm) and "own" not in found):
            found["own"] = own
            print(json.dumps(found), flush=True)
    timings = measure_models(files, Device.local(), told.seconds).timings
    return [{**r, "seed": seed, "p50_ms": timings[r["arm"]].p50, "noise": timings[r["arm"]].noise} for r in rows]


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown: a line an arm, mean ± standard deviation over the seeds."""
    lines = [
        "| arm | simulated in torch % | onnxruntime % | agreement % | mean difference of logits, % of the largest "
        "| Q/DQ nodes | in NNI's own export | integer kernels | float products | bytes | p50 ms | × faster than fp32 |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, found in by_arm(rows).items():

        def mean(key: str, text: Callable[[float], str], found: Sequence[Mapping[str, Any]] = found) -> str:
            return mean_std([r[key] for r in found], text)

        counts = [
            "/".join(sorted({str(r.get(key, "–")) for r in found})) for key in ("pairs", "own", "integer", "floating")
        ]
        cells = [
            arm, mean("simulated", percent), mean("quality_onnx", percent), mean("agreement", percent),
            mean("difference", "{:.3%}".format), *counts, f"{np.mean([r['size_bytes'] for r in found]):,.0f}",
            mean("p50_ms", "{:.4f}".format), mean_std(against(rows, arm, "p50_ms", FLOAT), "{:.2f}".format),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Run all seeds; print the table and write it beside the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of mnist.npz")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--images", type=int, default=5000, help="of training")
    parser.add_argument("--epochs", type=int, default=3, help="in floats")
    parser.add_argument("--tune-epochs", type=int, default=1, help="of QAT and LSQ")
    parser.add_argument("--seconds", type=float, default=20.0, help="of the interleaved measurement of a seed's models")
    told = parser.parse_args()
    logging.disable(logging.WARNING)  # NNI tells every wrapped layer
    torch.set_num_threads(1)
    data = {key: torch.from_numpy(value) for key, value in mnist(told.data).items()}
    data |= {key: data[key][: told.images] for key in ("x_train", "y_train")}
    data |= {key: data[key].long() for key in ("y_train", "y_test")}
    started, rows = time.perf_counter(), []
    for seed in map(int, told.seeds.split(",")):
        rows += run(told, data, seed)
        (told.out / "nni_quantizers.json").write_text(json.dumps(rows, indent=1))
    lines = table(rows)
    (told.out / "nni_quantizers.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    seconds, noise = time.perf_counter() - started, max(r["noise"] for r in rows)
    print(
        f"\n{platform.machine()}, {os.cpu_count()} cores, one thread; {seconds:.0f} s; noise of a p50 up to {noise:.1%}"
    )


if __name__ == "__main__":
    main()
