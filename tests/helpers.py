"""A tiny but complete search space, and small tools that several test modules use."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import nn

from nas.latency import AdditiveEstimator
from nas.latency.runtimes import OnnxRuntime
from nas.parts import Boundary, Conv, GlobalAveragePool, Normalize, Part
from nas.reward import Limit
from nas.space import Candidate, Choice, Genomes, SearchSpace, TaskInfo, Training
from nas.strategies import Domain
from nas.student.export import INPUT
from nas.study import Trial
from nas.testing import synthetic_table

IMAGES = TaskInfo((1, 8, 8), 10, (0.4,), (0.25,), (0.0, 1.0))


class Unit(nn.Sequential):
    """Convolution, normalisation, ReLU6."""

    def __init__(self, cin: int, cout: int, kernel: int) -> None:
        super().__init__()
        self.add_module("conv", nn.Conv2d(cin, cout, kernel, padding=kernel // 2, bias=False))
        self.add_module("norm", nn.BatchNorm2d(cout))
        self.add_module("act", nn.ReLU6())


class TinyModel(nn.Module):
    """Two or three convolutions, pooled: raw images → logits."""

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, task: TaskInfo, width: int, kernel: int | None) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(task.mean).view(1, -1, 1, 1))
        self.register_buffer("scale", 1.0 / torch.tensor(task.std).view(1, -1, 1, 1))
        self.stem = Unit(task.input_shape[0], width, 3)
        self.body = nn.Identity() if kernel is None else Unit(width, width, kernel)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Conv2d(width, task.classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x - self.mean) * self.scale
        return self.head(self.pool(self.body(self.stem(x)))).flatten(1)


class TinySpace(SearchSpace):
    """128 genomes: the kernel is dormant at depth 1, the temperature without distillation, ``fixed`` always."""

    name = "tiny"

    def __init__(self, task: TaskInfo = IMAGES) -> None:
        self.task = task
        self.choices = (
            Choice("depth", (1, 2)),
            Choice("width", (8, 16)),
            Choice("kernel", (3, 5)),
            Choice("bits", (32, 8)),
            Choice("prune", (0.0, 0.5)),
            Choice("fixed", ("only",)),
            Choice("kd_weight", (0.0, 0.5)),
            Choice("temperature", (2.0, 4.0)),
        )
        self.sites = {"input": self._input, "stem": self._stem, "body": self._body, "head": self._head}
        self.recipe = (type(self), (task,))

    def _precision(self, c: Candidate) -> str:
        return "int8" if c["bits"] == 8 else "fp32"

    def _kept(self, c: Candidate) -> int:
        width = int(c["width"])
        return max(8, round(width * (1 - float(c["prune"]))))

    def _input(self, c: Candidate) -> list[Part]:
        parts = [Part((Normalize(),), self.task.input_shape)]
        if self._precision(c) == "int8":
            parts.append(Part((Boundary("quantize"),), self.task.input_shape, "boundary"))
        return parts

    def _stem(self, c: Candidate) -> Part:
        return Part((Conv(self._kept(c), 3, activation="relu6"),), self.task.input_shape, self._precision(c))

    def _body(self, c: Candidate) -> Part | None:
        if c["depth"] == 1:
            return None
        conv = Conv(int(c["width"]), int(c["kernel"]), activation="relu6")
        return Part((conv,), (self._kept(c), *self.task.input_shape[1:]), self._precision(c))

    def _head(self, c: Candidate) -> list[Part]:
        channels = self._kept(c) if c["depth"] == 1 else int(c["width"])
        head = (GlobalAveragePool(), Conv(self.task.classes, 1))
        parts = [Part(head, (channels, *self.task.input_shape[1:]), self._precision(c))]
        if self._precision(c) == "int8":
            parts.append(Part((Boundary("dequantize"),), (self.task.classes, 1, 1), "boundary"))
        return parts

    def build(self, candidate: Candidate) -> nn.Module:
        kernel = int(candidate["kernel"]) if candidate["depth"] == 2 else None
        return TinyModel(self.task, int(candidate["width"]), kernel)

    def training(self, candidate: Candidate) -> Training:
        c = candidate
        compression: dict[str, dict[str, Any]] = {}
        if self._kept(c) < int(c["width"]):
            compression["channel_prune"] = {"stem.conv": self._kept(c)}
        if c["bits"] == 8:
            layers = ["stem.conv", *(["body.conv"] if c["depth"] == 2 else []), "head"]
            compression["quantize"] = dict.fromkeys(layers, 8)
        weight = float(c["kd_weight"])
        return Training(weight, float(c["temperature"]) if weight else 1.0, compression)


def tiny_quality(genome: Genomes) -> float:
    """A made-up accuracy of a TinySpace genome; better where it is larger, so that latency binds."""
    depth, width, kernel, bits, prune, _, kd, temperature = (int(g) for g in genome)
    body = 0.06 + 0.03 * kernel if depth else 0.0
    return 0.6 + body + 0.1 * width - 0.02 * bits - 0.05 * prune * width + kd * (0.02 + 0.01 * temperature)


def domain_of(space: SearchSpace) -> Domain:
    return Domain(space.cardinalities, np.array([c.ordered for c in space.choices]), space.active)


def tiny_estimator(space: SearchSpace, seed: int = 0) -> AdditiveEstimator:
    return AdditiveEstimator(space, synthetic_table(space, seed))


def latency_limit(estimator: AdditiveEstimator, share: float) -> Limit:
    """A budget that about ``share`` of the space meets."""
    genomes = estimator.space.sample(np.random.default_rng(99), 2000)
    return Limit("latency_ms", float(np.quantile(estimator.price(genomes)[:, 0], share)))


def plain(trials: list[Trial]) -> list[str]:
    """Comparable form, NaN included: everything about a trial but the clock."""
    return [repr(dataclasses.replace(trial, seconds=0.0, elapsed=0.0)) for trial in trials]


def run_onnx(model: onnx.ModelProto, x: torch.Tensor) -> np.ndarray[Any, Any]:
    """What onnxruntime makes of raw inputs, on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {INPUT: x.numpy()})[0]


def fused(model: onnx.ModelProto) -> dict[str, int]:
    """Kernel → how many of them onnxruntime runs."""
    return OnnxRuntime().load(model, threads=1, batch=1).fused()


def snippet(tmp_path: Path, text: str, name: str = "snippet.py") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


# An experiment that a laptop finishes in half a minute.
SMALL = {
    "name": "small",
    "task": {"data": "digits", "limit": 240},
    "space": {
        "name": "mobilenet", "resolutions": [8], "stem": [8, 2], "widths": [[8, 16], [16, 24]], "depths": [[1, 2], [1]],
        "strides": [1, 2], "kernels": [3], "expansions": [2, 3], "bits": [32, 8], "prune": [0.0, 0.5],
        "kd_weights": [0.0, 0.5], "temperatures": [2.0, 4.0],
    },
    "table": {"seconds": 1.0, "nets": 10},
    "teacher": {"epochs": 3},
    "strategy": {"kind": "evolution", "population": 4, "sample": 2},
    "reward": {"kind": "mnasnet_soft"},
    "budget": {"latency": "400%"},
    "search": {"trials": 10, "batch": 3, "workers": 2},
    "training": {"epochs": 3, "compressed_epochs": 1, "views": 1},
    "finalists": {"count": 1, "epochs": 3, "compressed_epochs": 1, "seconds": 1.0},
    "baselines": ["random"],
}  # fmt: skip


class TextLayer(nn.Module):
    """Attention and MLP, each after a normalisation; ``mask [n, 1, 1, length]`` is added to the scores."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        n, length, width = x.shape
        y = self.norm1(x)
        q, k, v = (p(y).view(n, length, self.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        scores = q @ k.transpose(2, 3) * (width // self.heads) ** -0.5 + mask
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, length, width))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class TextTransformer(nn.Module):
    """Tokens ``[n, length]``, 0 is padding → logits: embeddings of tokens and positions, layers, mean over words."""

    def __init__(
        self, vocabulary: int, length: int, classes: int, width: int = 32, heads: int = 2, depth: int = 2
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.02)
        self.layers = nn.ModuleList(TextLayer(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        known = (tokens != 0).float()
        mask = (1 - known)[:, None, None, :] * -1e4
        x = self.tokens(tokens) + self.positions
        for layer in self.layers:
            x = layer(x, mask)
        weights = known / known.sum(1, keepdim=True)
        return self.head((self.norm(x) * weights[:, :, None]).sum(1))


def until(true: Callable[[], Any], seconds: float = 60.0) -> Any:
    """What it returns as soon as that is something."""
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)
    return found


def alive(pid: int) -> bool:
    """Whether a process runs; one that waits to be buried does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def start_sweep(place: Path, *arguments: str) -> subprocess.Popen[str]:
    """``nas sweep`` in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "nas", "sweep", *arguments], cwd=place, env={**os.environ, "COLUMNS": "200"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
