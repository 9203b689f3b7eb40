"""How well a latency table predicts whole networks that it never saw, on this machine.

    python benchmarks/latency_fidelity.py --space mobilenet --precision mixed --nets 100 --seed 0 --minutes 20

A family at the scale of a phone (3x224x224 images, 1,000 classes, resolutions from 32 to 224) is profiled as
`nas profile` does it: parts and 30 calibration networks, interleaved with the test networks at random over rounds. Test
networks are none of the calibration networks, and as many come from each tenth of the range of MACs. A network's
measured time is that over all rounds; the aggregator is the one under which the *calibration* networks repeat best.

Prints one JSON line, last:

- ``within_2``, ``within_5``, ``within_10`` (shares 0..1), ``mape``, ``spearman``: predictions of test nets;
- ``noise_within_5``, ``noise_mape``: even against odd rounds of the same networks;
- ``flops_within_5``, ``flops_mape``, ``flops_spearman``: MACs and parts counted, fitted on those nets;
- ``plain_mape``: the plain sum of the parts;
- ``entries``, ``measured``, ``interpolated``: parts; ``seconds``: for everything; ``claimed_mape``: what the table says
  of itself; ``fastest_ms``, ``slowest_ms``: the test networks' range.

``--minutes`` is for loading and timing; exporting the networks comes on top. ``--threads``, ``--batch``, ``--runtime``
and ``--provider`` are the device's. ``--keep FILE`` writes the table.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nas.content import load_space
from nas.errors import NasError
from nas.executors import Processes, cores
from nas.latency import AdditiveEstimator, Device
from nas.latency.fit import error
from nas.latency.plan import Plan, calibration_genomes, choose_keys
from nas.latency.profile import Effort, assemble, measure
from nas.space import Genomes, SearchSpace, TaskInfo
from nas.student.tables import exported_nets

Array = npt.NDArray[np.float64]
TASK = TaskInfo((3, 224, 224), 1000, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (0.0, 1.0))
BITS = {"fp32": [32], "int8": [8], "mixed": [32, 8]}
SPACES: dict[str, dict[str, Any]] = {
    "mobilenet": {
        "resolutions": [32, 64, 96, 128, 160, 192, 224], "stem": [16, 2],
        "widths": [[16, 24], [24, 32], [40, 56], [80, 112], [160, 192]],
        "depths": [[1, 2], [1, 2, 3], [1, 2, 3], [1, 2, 3, 4], [1, 2, 3]], "strides": [1, 2, 2, 2, 2],
        "kernels": [3, 5], "expansions": [3, 6], "prune": [0.0, 0.25, 0.5],
    },
    "resnet": {
        "resolutions": [32, 64, 96, 128, 160, 192, 224], "stem": [16, 2],
        "widths": [[16, 24, 32], [32, 48, 64], [64, 96, 128], [128, 192]],
        "depths": [[1, 2], [1, 2, 3], [1, 2, 3], [1, 2]], "strides": [1, 2, 2, 2], "prune": [0.0, 0.25, 0.5],
    },
    "vit": {
        "resolutions": [32, 64, 96, 128, 160, 192, 224], "patches": [16], "widths": [128, 192, 256],
        "depths": [[1, 2, 3], [1, 2, 3], [1, 2, 3]], "heads": [2, 4, 6], "head_dim": 32, "ratios": [2, 4],
        "prune": [0.0, 0.5],
    },
}  # fmt: skip
CALIBRATION = 30
POOL = 60  # candidates a test network is drawn from


def main() -> int:
    """Profile, predict, compare."""
    options = _options()
    torch.set_num_threads(1)
    try:
        result = run(options)
    except NasError as problem:
        print(problem, file=sys.stderr)
        return 2
    print(json.dumps(result))
    return 0


def run(options: argparse.Namespace) -> dict[str, Any]:
    """One table and its errors."""
    start = time.perf_counter()
    device = Device.local(
        threads=options.threads, batch=options.batch, runtime=options.runtime, provider=options.provider
    )
    space = load_space(options.space, TASK, {**SPACES[options.space], "bits": BITS[options.precision]})
    known = calibration_genomes(space, CALIBRATION)
    unseen = held_out(space, known, options.nets, options.seed)
    with Processes(None, cores()) as executor:
        nets = exported_nets(space, TASK, executor, known, progress=say)
        tests = exported_nets(space, TASK, executor, unseen, progress=say)
    begin = time.perf_counter()
    effort = Effort(60 * options.minutes, noise=0.0, seed=options.seed)
    models = [net.model for net in (*nets, *tests) if net.model is not None]
    keys = choose_keys(space, device, effort.seconds, models, note=lambda text: say(0, text))
    plan = Plan.of(space, nets, keys)
    names = [f"test {i}" for i in range(len(tests))]
    others = dict(zip(names, models[len(nets) :], strict=True))
    seen = measure(plan, device, effort, begin=begin, others=others, progress=say)
    table = assemble(plan, seen, device.as_dict())
    if options.keep:
        table.save(options.keep)
    m, how = seen.measurement, table.protocol["net_aggregator"]
    level = m.level(plan.net_names, how)
    measured = level * m.values(names, how)
    halves = [m.values(names, how, slice(i, None, 2)) for i in (0, 1)]
    predicted = AdditiveEstimator(space, table, ("latency_ms",)).price(unseen)[:, 0]
    flops = by_flops(plan.net_names, nets, level * m.values(plan.net_names, how), tests)
    plain = np.array([sum(p.count * table.entries[p.key].value for p in net.parts) for net in tests])
    right, repeat, naive = error(predicted, measured), noise(*halves), error(flops, measured)
    if options.rows:
        resolutions = [space.decode(row).as_dict().get("resolution") for row in unseen]
        for i in np.argsort(measured):
            off = predicted[i] / measured[i] - 1
            print(f"{resolutions[i]} {measured[i]:.4f} ms, predicted {off:+.2%}", file=sys.stderr)
    return {
        "space": options.space, "precision": options.precision, "nets": len(tests), "seed": options.seed,
        "within_2": float((np.abs(predicted / measured - 1) <= 0.02).mean()), "within_5": right.within_5,
        "within_10": right.within_10, "mape": right.mape, "spearman": right.spearman,
        "noise_within_5": float((repeat <= 0.05).mean()), "noise_mape": float(repeat.mean()),
        "flops_within_5": naive.within_5, "flops_mape": naive.mape, "flops_spearman": naive.spearman,
        "plain_mape": error(plain, measured).mape, "claimed_mape": table.errors["latency_ms"].mape,
        "entries": len(table.entries), "measured": len(plan.measured), "interpolated": len(plan.absent),
        "interpolation": table.interpolation.get("held_out"), "rounds": m.rounds, "aggregator": how,
        "part_aggregator": table.protocol["part_aggregator"], "fastest_ms": float(measured.min()),
        "slowest_ms": float(measured.max()), "seconds": time.perf_counter() - start,
        "parts_per_second": len(plan.measured) / (time.perf_counter() - begin), "device": device.name,
    }  # fmt: skip


def held_out(space: SearchSpace, known: Genomes, count: int, seed: int) -> Genomes:
    """``count`` genomes, as many from each tenth of the range of MACs, whose parts are no calibration network's."""
    rng = np.random.default_rng((seed, 1))
    pool = np.unique(space.canonical(space.sample(rng, POOL * count)), axis=0)
    costs = [sorted((part.key, part.count) for part in space.parts(space.decode(row))) for row in (*known, *pool)]
    taken = {str(cost) for cost in costs[: len(known)]}
    fresh = []
    for row, cost in zip(pool, costs[len(known) :], strict=True):
        if str(cost) not in taken:  # equal parts are equal times: such a network has been seen
            taken.add(str(cost))
            fresh.append(row)
    macs = np.array([sum(part.macs for part in space.parts(space.decode(row))) for row in fresh])
    tenths = np.array_split(np.argsort(macs, kind="stable"), 10)
    chosen = [rng.choice(tenth, count // 10 + (i < count % 10), replace=False) for i, tenth in enumerate(tenths)]
    return np.array(fresh)[np.concatenate(chosen)]


def noise(first: Array, second: Array) -> Array:
    """Relative differences of two independent halves."""
    return np.asarray(np.abs(first - second) / ((first + second) / 2))


def by_flops(names: list[str], known: list[Any], measured: Array, tests: list[Any]) -> Array:
    """The usual substitute for a table: time from MACs and the number of parts, least squares of relative errors."""

    def rows(nets: list[Any]) -> Array:
        return np.array([[sum(p.macs for p in net.parts), sum(p.count for p in net.parts), 1.0] for net in nets])

    scale = rows(known).mean(axis=0)
    weighted = rows(known) / scale / measured[:, None]
    theta, *_ = np.linalg.lstsq(weighted, np.ones(len(measured)), rcond=None)
    return np.asarray(rows(tests) / scale @ theta)


def say(share: float, text: str) -> None:
    """One line of progress, rewritten."""
    print(f"\r{100 * share:3.0f} % {text:<70}", end="", file=sys.stderr, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", choices=sorted(SPACES), default="mobilenet")
    parser.add_argument("--precision", choices=sorted(BITS), default="fp32")
    parser.add_argument("--nets", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--provider", default="")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--rows", action="store_true", help="print every network's error")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
