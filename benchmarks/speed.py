"""Speed of what is not training and no strategy: pricing, identities, and the controller's own overhead.

    python benchmarks/speed.py

Prints one JSON line each: estimator (candidates per second of processor time, by space and number of costs),
identities (µs of processor time per candidate of dormant genes and of canonical ids, in batches of 1, 4 and 100),
controller (ms per candidate with a free evaluator and a journal). How fast the strategies are is measured by
benchmarks/scaling.py. Needs no device: the table is synthetic, which changes no instruction that is executed.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nas.content import load_space
from nas.controller import Budget, SearchController
from nas.evaluators import Lookup
from nas.executors import Serial
from nas.experiment import load_experiment
from nas.latency import AdditiveEstimator
from nas.reward import Limit, MnasNetSoft
from nas.space import Genomes, SearchSpace, TaskInfo
from nas.strategies import Domain, strategies
from nas.study import Study
from nas.testing import synthetic_table

MOBILE = {
    "resolutions": [160, 192, 224], "stem": [16, 2], "strides": [1, 2, 2, 2], "kernels": [3, 5, 7],
    "widths": [[16, 24], [24, 32], [48, 64], [96, 128]], "depths": [[1, 2], [1, 2, 3], [1, 2, 3], [1, 2, 3]],
    "expansions": [3, 4, 6], "prune": [0.0, 0.25, 0.5],
}  # fmt: skip


def mobile_spaces() -> dict[str, SearchSpace]:
    """The bundled mobile space as the digits example has it, with its defaults, and of a size for phones."""
    digits = load_experiment("digits").space.settings
    phone = TaskInfo((3, 224, 224), 1000, (0.0,) * 3, (1.0,) * 3)
    return {
        "digits example": load_space("mobilenet", TaskInfo((1, 8, 8), 10), digits),
        "mobile defaults": load_space("mobilenet", TaskInfo((1, 28, 28), 10), {}),
        "mobile 224": load_space("mobilenet", phone, MOBILE),
    }


def domain(space: SearchSpace) -> Domain:
    """What a strategy sees of the space."""
    return Domain(space.cardinalities, np.array([c.ordered for c in space.choices]), space.active)


def estimator(name: str, space: SearchSpace, costs: tuple[str, ...]) -> dict[str, object]:
    """Candidates per second, best and median of seven."""
    pricer = AdditiveEstimator(space, synthetic_table(space), costs)
    genomes = space.sample(np.random.default_rng(0), 400_000)
    rates = []
    for _ in range(7):
        start = time.process_time()
        pricer.price(genomes)
        rates.append(len(genomes) / (time.process_time() - start))
    exact = all(
        np.allclose(pricer.price(g)[0], pricer.price_slowly(space.decode(g)), rtol=1e-12) for g in genomes[:200]
    )
    return {
        "estimator": name, "costs": len(costs), "choices": len(space.choices), "keys": len(space.keys()),
        "candidates_per_s_median": round(float(np.median(rates))), "candidates_per_s_best": round(max(rates)),
        "equals_slow_sum": exact,
    }  # fmt: skip


def identities(name: str, space: SearchSpace) -> dict[str, object]:
    """µs per candidate of finding its dormant genes, and of its canonical id, by size of the batch."""
    line: dict[str, object] = {"identities": name, "choices": len(space.choices)}
    for what, function in (("active_us", space.active), ("canonical_id_us", space.canonical_ids)):
        line[what] = {str(n): timed(function, space.sample(np.random.default_rng(0), n)) for n in (1, 4, 100)}
    return line


def timed(function: Callable[[Genomes], object], genomes: Genomes, times: int = 300) -> float:
    """µs per row, median of many calls."""
    spent = []
    for _ in range(times):
        start = time.process_time()
        function(genomes)
        spent.append(time.process_time() - start)
    return round(1e6 * float(np.median(spent)) / len(genomes), 2)


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
    spaces = mobile_spaces()
    for name, space in spaces.items():
        for costs in (("latency_ms",), ("latency_ms", "latency_p95_ms", "size_bytes")):
            print(json.dumps(estimator(name, space, costs)), flush=True)
    for name, space in spaces.items():
        print(json.dumps(identities(name, space)), flush=True)
    print(json.dumps(controller(spaces["digits example"])), flush=True)


if __name__ == "__main__":
    main()
