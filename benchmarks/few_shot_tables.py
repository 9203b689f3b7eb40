"""A new device's table from other devices' and ten of its parts, judged by the table that was really measured.

    python benchmarks/few_shot_tables.py --known t1.json --target t2.json --samples 10 --seeds 20

All tables are of one space (`nas profile --out`). As `nas tables adapt` does it, ten parts are chosen by the known
tables alone and "measured" by looking them up in the target; every other part is predicted. The peer scales the first
known table by the median ratio of ten parts drawn at random. Whole networks are the target's calibration networks, as
plain sums of parts at one scale. Prints one JSON line, last: means over seeds of ``spearman``, ``within_5``,
``within_10`` and ``mape`` over the parts that were not measured, ``net_spearman`` and ``net_within_10`` over networks,
the same of the peer, and standard deviations over seeds (0 where all seeds choose the same parts).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from nas.errors import NasError
from nas.latency import LatencyTable
from nas.latency.adapt import adapt_parts, suggest, values
from nas.latency.fit import error


def main() -> int:
    """Adapt once a seed, ours and the peer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--known", required=True, help="table files, with commas")
    parser.add_argument("--target", required=True, type=Path, help="table file")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=20)
    options = parser.parse_args()
    try:
        known = [values(LatencyTable.load(Path(path))) for path in options.known.split(",")]
        target = LatencyTable.load(options.target)
        shared = sorted(set(values(target)).intersection(*known))
        known = [{key: table[key] for key in shared} for table in known]
        truth = {key: target.entries[key].value for key in shared}
        rows = [one(known, truth, target, options.samples, seed) for seed in range(options.seeds)]
    except NasError as problem:
        print(problem, file=sys.stderr)
        return 2
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    spread = {f"{name}_std": float(np.std([row[name] for row in rows])) for name in ("spearman", "mape")}
    print(json.dumps({"parts": len(shared), "samples": options.samples, "seeds": options.seeds, **means, **spread}))
    return 0


def one(
    known: list[dict[str, float]], truth: Mapping[str, float], target: LatencyTable, samples: int, seed: int
) -> dict[str, float]:
    """Figures of one choice of parts."""
    chosen = suggest(known, samples, seed)
    ours = {key: value for key, (value, _) in adapt_parts(known, {key: truth[key] for key in chosen}).items()}
    drawn = list(np.random.default_rng(seed).choice(list(truth), samples, replace=False))
    ratio = float(np.median([truth[key] / known[0][key] for key in drawn]))
    peer = {key: ratio * value for key, value in known[0].items()}
    return judged("", ours, truth, chosen, target) | judged("peer_", peer, truth, drawn, target)


def judged(
    name: str, predicted: Mapping[str, float], truth: Mapping[str, float], measured: list[str], target: LatencyTable
) -> dict[str, float]:
    """Errors on parts that were not measured, and on whole networks."""
    rest = [key for key in truth if key not in set(measured)]
    parts = error(np.array([predicted[key] for key in rest]), np.array([truth[key] for key in rest]))
    nets = [net for net in target.nets if set(net.parts) <= set(predicted)]
    sums = np.array([sum(n * predicted[key] for key, n in net.parts.items()) for net in nets])
    whole = np.array([net.measured_ms for net in nets])
    together = error(sums * float(np.median(whole / sums)), whole)
    return {
        f"{name}spearman": parts.spearman, f"{name}within_5": parts.within_5, f"{name}within_10": parts.within_10,
        f"{name}mape": parts.mape, f"{name}net_spearman": together.spearman, f"{name}net_within_10": together.within_10,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
