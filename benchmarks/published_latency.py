"""Sums over published op tables against the latencies of the same whole networks, measured on the same phones.

    python benchmarks/published_latency.py --tables FOLDER

FOLDER (or $NAS_TABLES) holds mobilebench_torch_cnn_ops_gpu.csv.gz and mobilebench_torch_cnn_e2e.csv.gz of MobileBench
(MIT): 100 real CNNs at batch 1 in PyTorch Mobile on the GPUs of three phones. An op's column ``PHONE|gpu|float``
corresponds to the networks' ``PHONE|gpu|float|mean``; both are microseconds, and both files have the same networks.

What the data are, and what follows:

- Ops were timed *within* the run of their own network: each network has rows of its own, and equal ops of one network
  differ a little. So nothing has to be corrected for calling parts one by one, and the sum is good as it is.
- Pixel 4 and onefusion (Vulkan): every listed op of all 100 networks is timed. What is not listed (concatenation,
  slicing, shuffling) is missing in the sums of networks that have much of it: HarDNet, GhostNet, SqueezeNet.
- iphonexs (Metal): batch normalisation, ReLU, h-swish, sigmoid and clamp are listed but never timed; they cost
  nothing in the sums. bagnet9, whose convolutions are not timed and which was not measured whole, is left out.

Fitted sums: ``nas.latency.fit`` as it is, on 30 networks drawn at random, judged on all the others, 20 times; the plain
sum is judged on the same ones. Ops are all of one group (``fitted``), or grouped by kind as our parts are by
precision (``by kind``). The terms of a group: own time, number, elements in and out, MACs.

The rows ``of others`` ask what a *table* is worth, where an op is looked up by its key and its time is the median over
other networks, none of them among those that are judged. Networks with an op that none of those has cannot be
judged or fitted to; those that can (``judged``, on average) are mostly of families with several members.

Prints a table, then one JSON line: shares and errors 0..1, mean and standard deviation over the splits.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import csv
import gzip
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from nas.errors import NasError
from nas.latency.fit import TERMS, error, fit, plain_sums
from nas.tabular import find_table

Array = npt.NDArray[np.float64]
PHONES = ("pixel4", "onefusion", "iphonexs")
OPS, WHOLE = "mobilebench_torch_cnn_ops_gpu.csv.gz", "mobilebench_torch_cnn_e2e.csv.gz"
ORIGIN = "MobileBench's repository, under MIT"
KINDS = ("convolution", "pointwise", "depthwise", "linear", "elementwise", "pooling")
NEVER_TIMED = {"aten::relu", "aten::hardswish", "aten::sigmoid", "aten::clamp", "vulkan_prepack::run_batchnorm_context"}
FEW = 5  # networks: fewer are neither fitted to nor judged on
FIGURES = ("within_5", "within_10", "mape", "spearman")


@dataclass(frozen=True)
class Op:
    """An operation of a network: its key, its kind, and its own ms, elements in and out, and MACs."""

    key: str
    kind: str
    ms: float
    elements: float
    macs: float


@dataclass(frozen=True)
class Net:
    """A network: its ops and what it takes whole, ms."""

    name: str
    ops: tuple[Op, ...]
    ms: float


def load(folder: str | None, phone: str) -> list[Net]:
    """The networks of a phone all of whose ops are known, and which were measured whole."""
    ops, broken = defaultdict[str, list[Op]](list), set[str]()
    for row in _rows(folder, OPS):
        value = row[f"{phone}|gpu|float"]
        if value:
            ops[row["model"]].append(_op(row["operation"], row["feature"], float(value) / 1e3))
        elif row["operation"] not in NEVER_TIMED:
            broken.add(row["model"])
    whole = {row["model"]: row[f"{phone}|gpu|float|mean"] for row in _rows(folder, WHOLE)}
    return [Net(name, tuple(ops[name]), float(ms) / 1e3) for name, ms in whole.items() if ms and name not in broken]


def _rows(folder: str | None, name: str) -> Iterable[Mapping[str, str]]:
    with gzip.open(find_table(name, ORIGIN, folder), "rt", newline="") as file:
        yield from csv.DictReader(file)


def _op(operation: str, feature: str, ms: float) -> Op:
    facts = json.loads(feature)
    flops = float(facts.get("flops", 0))
    if "conv2d" in operation:
        kind = "depthwise" if "groups" not in facts else "pointwise" if facts["kernel_size"] == 1 else "convolution"
        return Op(operation + feature, kind, ms, facts["input_size"] + facts["output_size"], flops)
    if "linear" in operation:
        return Op(operation + feature, "linear", ms, facts["input_shape"] + facts["output_shape"], flops)
    if "pool" in operation:
        return Op(operation + feature, "pooling", ms, facts["input_size"] + facts.get("output_size", 0), 0.0)
    return Op(operation + feature, "elementwise", ms, 2 * (flops or facts["input_size"]), 0.0)


def rows(nets: Sequence[Net], grouped: bool) -> Array:
    """What :func:`nas.latency.fit.fit` takes, ``[nets, 4 · groups + 1]``."""
    kinds = KINDS if grouped else ("all",)
    x = np.zeros((len(nets), TERMS * len(kinds) + 1))
    for row, net in zip(x, nets, strict=True):
        for op in net.ops:
            start = TERMS * (KINDS.index(op.kind) if grouped else 0)
            row[start : start + TERMS] += (op.ms, 1.0, op.elements / 1e6, op.macs / 1e9, 0.0)
        row[-1] = 1.0
    return x


def judge(train: Sequence[Net], test: Sequence[Net]) -> dict[str, dict[str, float]]:
    """Errors on ``test`` of the plain sum, and of sums fitted to ``train``."""
    y, truth = (np.array([net.ms for net in nets]) for nets in (train, test))
    predictions = {"plain": plain_sums(rows(test, False))}
    for how, grouped in (("fitted", False), ("by kind", True)):
        predictions[how] = fit(rows(train, grouped), y)[0].predict(rows(test, grouped))
    errors = {how: error(predicted, truth) for how, predicted in predictions.items()}
    return {how: {name: getattr(e, name) for name in (*FIGURES, "nets")} for how, e in errors.items()}


def looked_up(nets: Sequence[Net], known: Sequence[Net]) -> list[Net]:
    """The networks with the times that their ops have in others of ``known``, where all have one."""
    seen = defaultdict[str, list[tuple[str, float]]](list)
    for net in known:
        for op in net.ops:
            seen[op.key].append((net.name, op.ms))
    found = []
    for net in nets:
        times = [[ms for name, ms in seen[op.key] if name != net.name] for op in net.ops]
        if all(times):
            ops = (replace(op, ms=float(np.median(ms))) for op, ms in zip(net.ops, times, strict=True))
            found.append(replace(net, ops=tuple(ops)))
    return found


def splits(nets: Sequence[Net], train: int, count: int) -> Iterable[tuple[list[Net], list[Net]]]:
    """``count`` random divisions into ``train`` networks and the others."""
    for seed in range(count):
        order = np.random.default_rng(seed).permutation(len(nets))
        yield [nets[i] for i in order[:train]], [nets[i] for i in order[train:]]


def study(nets: Sequence[Net], train: int, count: int) -> dict[str, Any]:
    """Both ways of getting at the ops' times, plain and fitted: mean and spread over the splits."""
    found = {"own": _summary([judge(some, others) for some, others in splits(nets, train, count)])}
    names = {net.name for net in looked_up(nets, nets)}
    shared = [net for net in nets if net.name in names]
    if len(shared) <= train + FEW:
        return found
    results = []
    for some, others in splits(shared, train, count):
        hidden = {net.name for net in others}
        known = [net for net in nets if net.name not in hidden]
        results.append(judge(looked_up(some, known), looked_up(others, known)))
    return {**found, "of others": _summary(results)}


def _summary(results: Sequence[dict[str, dict[str, float]]]) -> dict[str, Any]:
    found: dict[str, Any] = {"judged": round(float(np.mean([r["plain"]["nets"] for r in results])), 1)}
    for how in results[0]:
        values = {name: [r[how][name] for r in results] for name in FIGURES}
        found[how] = {name: [round(float(np.mean(v)), 4), round(float(np.std(v)), 4)] for name, v in values.items()}
    return found


def main() -> None:
    """Judge every phone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", metavar="FOLDER", help="default: $NAS_TABLES")
    parser.add_argument("--train", type=int, default=30, help="whole networks that a fit sees")
    parser.add_argument("--splits", type=int, default=20)
    options = parser.parse_args()
    try:
        nets = {phone: load(options.tables, phone) for phone in PHONES}
    except NasError as failure:
        raise SystemExit(str(failure)) from None
    if options.splits < 1 or not FEW <= options.train <= min(map(len, nets.values())) - FEW:
        parser.error(f"--splits is at least 1, --train at least {FEW}, and {FEW} less than there are networks")
    result = {phone: study(some, options.train, options.splits) for phone, some in nets.items()}
    print(f"{'phone':10} {'op times':10} {'judged':>6}  {'sum':8}" + "".join(f"{name:>17}" for name in FIGURES))
    for phone, found in result.items():
        for times, by_sum in found.items():
            for how in ("plain", "fitted", "by kind"):
                cells = "".join(f"{_cell(name, *by_sum[how][name]):>17}" for name in FIGURES)
                print(f"{phone:10} {times:10} {by_sum['judged']:>6}  {how:8}{cells}")
    print(json.dumps({"train": options.train, "splits": options.splits, "phones": result}))


def _cell(name: str, mean: float, spread: float) -> str:
    return f"{mean:.4f} ± {spread:.4f}" if name == "spearman" else f"{100 * mean:.1f} ± {100 * spread:.1f} %"


if __name__ == "__main__":
    main()
