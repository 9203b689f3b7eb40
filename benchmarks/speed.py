"""Speed of what is not training: pricing, asking and telling, and the controller's own overhead.

    python benchmarks/speed.py

Prints one JSON line each: estimator (candidates per second on one core, mobile space and the digits example),
strategies (µs per ask + tell in batches of 100), controller (ms per candidate with a free evaluator and a journal).
Needs no device: the table is synthetic, which changes no instruction that is executed.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import numpy as np

from nas.content import load_space
from nas.controller import Budget, SearchController
from nas.evaluators import Lookup
from nas.executors import Serial
from nas.experiment import load_experiment
from nas.latency import AdditiveEstimator
from nas.reward import Limit, MnasNetSoft
from nas.space import SearchSpace, TaskInfo
from nas.strategies import Domain, Outcomes, strategies
from nas.strategies.base import ASKED, COMPLETE
from nas.study import Study
from nas.testing import synthetic_table

MOBILE = {
    "resolutions": [160, 192, 224], "stem": [16, 2], "strides": [1, 2, 2, 2], "kernels": [3, 5, 7],
    "widths": [[16, 24], [24, 32], [48, 64], [96, 128]], "depths": [[1, 2], [1, 2, 3], [1, 2, 3], [1, 2, 3]],
    "expansions": [3, 4, 6], "prune": [0.0, 0.25, 0.5],
}  # fmt: skip


def domain(space: SearchSpace) -> Domain:
    """What a strategy sees of the space."""
    return Domain(space.cardinalities, np.array([c.ordered for c in space.choices]), space.active)


def estimator(name: str, space: SearchSpace, costs: tuple[str, ...]) -> dict[str, object]:
    """Candidates per second, best and median of seven."""
    pricer = AdditiveEstimator(space, synthetic_table(space), costs)
    genomes = space.sample(np.random.default_rng(0), 400_000)
    rates = []
    for _ in range(7):
        start = time.perf_counter()
        pricer.price(genomes)
        rates.append(len(genomes) / (time.perf_counter() - start))
    exact = all(
        np.allclose(pricer.price(g)[0], pricer.price_slowly(space.decode(g)), rtol=1e-12) for g in genomes[:200]
    )
    return {
        "estimator": name, "costs": len(costs), "choices": len(space.choices), "keys": len(space.keys()),
        "candidates_per_s_median": round(float(np.median(rates))), "candidates_per_s_best": round(max(rates)),
        "equals_slow_sum": exact,
    }  # fmt: skip


def ask_tell(name: str, space: SearchSpace, batches: int = 100, size: int = 100) -> dict[str, object]:
    """µs per candidate of ask + tell."""
    strategy = strategies.get(name)(domain(space), 0)
    start = time.perf_counter()
    for _ in range(batches):
        asked = strategy.ask(size)
        quality = asked.genomes.mean(axis=1)
        zeros = np.zeros(size)
        source, status = np.full(size, ASKED), np.full(size, COMPLETE)
        strategy.tell(
            Outcomes(
                asked.index, asked.genomes, quality, zeros[:, None], zeros, quality, asked.fidelity, status, source
            )
        )
    return {"strategy": name, "us_per_candidate": round(1e6 * (time.perf_counter() - start) / (batches * size), 1)}


def controller(space: SearchSpace, trials: int = 300) -> dict[str, object]:
    """ms per evaluated candidate, screening of half the space and a journal on disk included."""
    costs = ("latency_ms", "size_bytes")
    pricer = AdditiveEstimator(space, synthetic_table(space), costs)
    limit = float(np.median(pricer.price(space.sample(np.random.default_rng(0), 2000))[:, 0]))
    with tempfile.TemporaryDirectory() as folder, Serial(Lookup(lambda g: 0.5 + 0.01 * float(g.sum()))) as executor:
        study = Study(Path(folder) / "study.jsonl", "search", space, {})
        loop = SearchController(
            space, strategies.get("evolution")(domain(space), 0), pricer, executor, MnasNetSoft(limit),
            (Limit("latency_ms", limit),), study, Budget(trials),
        )  # fmt: skip
        start = time.perf_counter()
        loop.run()
        return {
            "controller_ms_per_candidate": round(1e3 * (time.perf_counter() - start) / trials, 2),
            "asked": loop.counts.asked,
            "trials": trials,
        }


def main() -> None:
    """Print all of it."""
    digits = load_experiment("digits")
    example = load_space("mobilenet", TaskInfo((1, 8, 8), 10), digits.space.settings)
    mobile = load_space("mobilenet", TaskInfo((3, 224, 224), 1000, (0.0,) * 3, (1.0,) * 3), MOBILE)
    for name, space in (("digits example", example), ("mobile 224", mobile)):
        for costs in (("latency_ms",), ("latency_ms", "latency_p95_ms", "size_bytes")):
            print(json.dumps(estimator(name, space, costs)), flush=True)
    for name in ("random", "evolution", "reinforce"):
        print(json.dumps(ask_tell(name, mobile)), flush=True)
    print(json.dumps(controller(example)), flush=True)


if __name__ == "__main__":
    main()
