"""How long it takes to profile a space, as it has more and more distinct parts.

    python benchmarks/profiling.py --counts 50,200,1000,5000 --minutes 10

A mobile family (3x224x224 images, resolutions 32 to 224 step 16, fp32 and int8) is profiled on this machine. For each
count, that many parts, drawn at random, are loaded and timed beside 30 whole networks until every part has had 12
rounds or the minutes are over. Prints one JSON line, last: per count the seconds to load, a round's seconds, rounds,
seconds in all, and parts per second; and how many parts `nas profile` itself would measure in the minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import numpy as np
import torch
from latency_fidelity import SPACES, TASK, say

from nas.content import load_space
from nas.executors import Processes, cores
from nas.latency import Device
from nas.latency.measure import interleave
from nas.latency.plan import CALLS, ROUNDS, Plan, calibration_genomes, choose_keys, load_yardstick
from nas.locks import timing_lock
from nas.student.tables import exported_nets

NETS = 30


def main() -> int:
    """One row a count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", default="50,200,1000,5000")
    parser.add_argument("--minutes", type=float, default=10.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = {**SPACES["mobilenet"], "resolutions": list(range(32, 225, 16)), "bits": [32, 8]}
    space, device = load_space("mobilenet", TASK, settings), Device.local()
    parts = space.keys()
    with Processes(None, cores()) as executor:
        nets = exported_nets(space, TASK, executor, calibration_genomes(space, NETS), progress=say)
    rows = []
    for count in map(int, options.counts.split(",")):
        keys = list(np.random.default_rng(0).permutation(list(parts))[:count])
        rows.append(measured(Plan.of(space, nets, keys), device, 60 * options.minutes))
        print(f"\n{rows[-1]}", file=sys.stderr)
    models = [net.model for net in nets if net.model is not None]
    own = len(choose_keys(space, device, 60 * options.minutes, models))
    print(json.dumps({"parts": len(parts), "minutes": options.minutes, "would_measure": own, "counts": rows}))
    return 0


def measured(plan: Plan, device: Device, seconds: float) -> dict[str, Any]:
    """Load and time a plan until every part has had its rounds."""
    start = time.perf_counter()
    runners = {key: device.load(part.to_onnx(device.batch), part=True) for key, part in plan.measured.items()}
    runners |= {name: device.load(model) for name, model in plan.models.items()}
    loaded = time.perf_counter() - start
    with timing_lock():
        seen = interleave(
            runners, load_yardstick(device), seconds=seconds - loaded, max_rounds=ROUNDS, calls=CALLS, progress=say
        )
    spent = time.perf_counter() - start
    return {
        "parts": len(plan.measured), "load_seconds": round(loaded, 2),
        "round_seconds": round(seen.seconds / seen.rounds, 3), "rounds": seen.rounds, "seconds": round(spent, 1),
        "parts_per_second": round(len(plan.measured) / spent, 1),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
