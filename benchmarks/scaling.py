"""How the cost of a strategy and the number of its queries grow with the space.

    python benchmarks/scaling.py --strategies random,evolution,reinforce --choices 10,30,100,300 --million 1

Prints one JSON line per strategy and synthetic space, then one per strategy and real mobile space. A synthetic space
has stages of ten choices: a depth, and three layers of three choices of 2-8 values each, dormant beyond the depth.
Its quality is a sum of effects of single values and of pairs of values, and is observed with noise; its cost is a sum
too, and the budget admits the cheaper 40 % of random candidates. Everything is seeded.

``ask_tell_us``: µs of processor time of ask + tell per candidate, by size of the batch. ``best``: quality of the best
candidate after so many queries, in standard deviations above the mean of random feasible ones, averaged over seeds;
``random_best``: what that many random feasible ones have on average. ``queries_to``: queries until a candidate of that
percentile of the random feasible ones was found, median over seeds (random search needs about 70 and 700 in the
median); null if it was not. Qualities are counted without their noise. A query is a distinct feasible candidate; what
the budget rules out and what repeats is told for free, up to 20 × queries candidates. ``memory_growth_mb``: how far the
process's memory exceeded, at its peak, what it had after a twentieth of ``--million`` million candidates in batches of
100. Every line is measured by a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from speed import mobile_spaces

from nas.controller import objective
from nas.genes import Candidate, Choice, Dormancy, enumerated
from nas.latency import AdditiveEstimator
from nas.reward import Limit, MnasNetHard
from nas.space import Genomes, SearchSpace
from nas.strategies import Domain, Objective, Outcomes, Proposals, Strategy, strategies
from nas.strategies.base import ASKED, COMPLETE, DUPLICATE, SCREENED
from nas.strategies.draws import Draws
from nas.testing import synthetic_table

LAYERS, ROLES = 3, 3
POOL, CHUNK = 100_000, 10_000
BUDGET_QUANTILE = 0.4
PAIRS, PAIR_EFFECT, NOISE = 1.0, 0.5, 0.1  # pairs per choice; effects of values have deviation 1; of the quality's
BATCH = 4
MARKS = (10, 30, 100, 300, 1000, 3000, 10_000)
PERCENTILES = (99.0, 99.9)
WARM = 0.05


class Problem:
    """A synthetic space of ``count`` choices with its quality, cost and budget."""

    def __init__(self, count: int, seed: int = 0) -> None:
        rng = np.random.default_rng((seed, count))
        self.choices, reads = _stages(count, rng)
        self.sizes = np.array([len(choice.values) for choice in self.choices])
        self.active = Dormancy([enumerated("layer", read, self.choices) for read in reads], self.sizes).active
        most = int(self.sizes.max())
        self.effects = rng.normal(size=(count, most))
        self.pairs = rng.integers(0, count, (2, int(PAIRS * count)))
        self.pair_effects = rng.normal(0, PAIR_EFFECT, (self.pairs.shape[1], most, most))
        self.costs = rng.exponential(size=(count, most))
        self.hash = rng.integers(1, 2**62, count)
        self.seed, self.scale = seed, 1.0
        blocks = [rng.integers(0, self.sizes, (CHUNK, count)) for _ in range(POOL // CHUNK)]
        price = np.concatenate([self.price(block)[:, 0] for block in blocks])
        self.budget = float(np.quantile(price, BUDGET_QUANTILE))
        quality = np.concatenate([self.quality(block) for block in blocks])
        self.random = np.sort(quality[price <= self.budget])
        self.scale = float(self.random.std())

    def domain(self) -> Domain:
        """All that a search lets a strategy know."""
        known = Objective(("cost",), self.price, self.violation, lambda quality, costs: quality)
        return Domain(self.sizes, np.array([c.ordered for c in self.choices]), self.active, None, known)

    def price(self, genomes: Genomes) -> np.ndarray:
        """``[n, 1]``."""
        return (self.costs[np.arange(len(self.sizes)), genomes] * self.active(genomes)).sum(axis=1, keepdims=True)

    def violation(self, costs: np.ndarray) -> np.ndarray:
        """By how much of the budget it is exceeded."""
        return np.maximum(0.0, costs[:, 0] / self.budget - 1)

    def quality(self, genomes: Genomes) -> np.ndarray:
        """Without noise."""
        active = self.active(genomes)
        single = (self.effects[np.arange(len(self.sizes)), genomes] * active).sum(axis=1)
        i, j = self.pairs
        pairs = self.pair_effects[np.arange(len(i)), genomes[:, i], genomes[:, j]] * (active[:, i] & active[:, j])
        return single + pairs.sum(axis=1)

    def observed(self, genomes: Genomes) -> np.ndarray:
        """With noise: a function of the canonical genome, as a training's seed is."""
        number = (np.where(self.active(genomes), genomes, 0) * self.hash).sum(axis=1)
        radius, angle = Draws(self.seed, number).uniform(2).T
        normal = np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * np.pi * angle)
        return self.quality(genomes) + NOISE * self.scale * normal

    def random_best(self, queries: int) -> float:
        """Expected best of that many random feasible candidates."""
        below = (np.arange(len(self.random) + 1) / len(self.random)) ** queries
        return float(self.standard(self.random) @ np.diff(below))

    def standard(self, quality: np.ndarray) -> np.ndarray:
        """In standard deviations above the mean of random feasible candidates."""
        return (quality - self.random.mean()) / self.scale


def _stages(count: int, rng: np.random.Generator) -> tuple[list[Choice], list[Callable[[Candidate], object]]]:
    """Choices, and one function per layer that reads what the layer has."""
    choices: list[Choice] = []
    reads: list[Callable[[Candidate], object]] = []
    while len(choices) < count:
        depth = Choice(f"stage{len(reads) // LAYERS}.depth", range(1, LAYERS + 1))
        choices.append(depth)
        for layer in range(1, LAYERS + 1):
            sizes = rng.integers(2, 9, ROLES)[: count - len(choices)]
            ordered = rng.random(ROLES) < 0.5
            own = [
                Choice(f"{depth.name}.layer{layer}.gene{i}", range(int(size)), bool(ordered[i]))
                for i, size in enumerate(sizes)
            ]
            choices += own
            reads.append(partial(_read, depth=depth.name, layer=layer, genes=[choice.name for choice in own]))
    return choices, reads


def _read(c: Candidate, depth: str, layer: int, genes: list[str]) -> object:
    return [c[gene] for gene in genes] if int(c[depth]) >= layer else None


def told(
    asked: Proposals, quality: np.ndarray, costs: np.ndarray, violation: np.ndarray, status: np.ndarray
) -> Outcomes:
    """The reward is the quality."""
    source = np.full(len(quality), ASKED)
    return Outcomes(asked.index, asked.genomes, quality, costs, violation, quality, asked.fidelity, status, source)


def search(problem: Problem, strategy: Strategy, queries: int) -> np.ndarray:
    """Best quality without noise, standardised, after each query."""
    seen: set[bytes] = set()
    found: list[float] = []
    for _ in range(20 * queries // BATCH):
        asked = strategy.ask(BATCH)
        costs = problem.price(asked.genomes)
        violation, quality = problem.violation(costs), problem.observed(asked.genomes)
        true = problem.standard(problem.quality(asked.genomes))
        status = np.full(BATCH, COMPLETE, dtype="<U9")
        for i, genome in enumerate(strategy.domain.canonical(asked.genomes)):
            if violation[i] > 0:
                status[i], quality[i] = SCREENED, np.nan
            elif genome.tobytes() in seen:
                status[i] = DUPLICATE
            else:
                seen.add(genome.tobytes())
                found.append(float(true[i]))
        strategy.tell(told(asked, quality, costs, violation, status))
        if len(found) >= queries:
            break
    curve = np.full(queries, max(found))
    curve[: len(found)] = np.maximum.accumulate(found)[:queries]
    return curve


def queries_to(goal: float, curves: list[np.ndarray]) -> float | None:
    """Median number of queries; None where half of the searches did not get there."""
    needed = [float(np.argmax(curve >= goal)) + 1 if curve[-1] >= goal else np.inf for curve in curves]
    median = float(np.median(needed))
    return median if np.isfinite(median) else None


def ask_tell(strategy: Strategy, size: int, seconds: float = 10.0) -> float:
    """µs of ask + tell per candidate; every candidate gets a quality and none is ruled out."""
    spent, done = 0.0, 0
    while done < max(2000, 100 * size) and spent < seconds:
        start = time.process_time()
        asked = strategy.ask(size)
        spent += time.process_time() - start
        outcomes = answered(strategy.domain, asked)
        start = time.process_time()
        strategy.tell(outcomes)
        spent += time.process_time() - start
        done += size
    return round(1e6 * spent / done, 1)


def answered(domain: Domain, asked: Proposals) -> Outcomes:
    """Made-up outcomes: the more, the better."""
    n = len(asked.index)
    assert domain.objective is not None
    costs = domain.objective.price(asked.genomes)
    return told(asked, asked.genomes.mean(axis=1) + 1, costs, np.zeros(n), np.full(n, COMPLETE))


def memory_growth(strategy: Strategy, candidates: int) -> float | None:
    """MB by which the peak exceeds what there was when the strategy was warm; None where /proc is missing."""
    first: int | None = None
    peak, done = 0, 0
    while done < candidates:
        strategy.tell(answered(strategy.domain, strategy.ask(100)))
        done += 100
        if done < WARM * candidates or (now := resident()) is None:
            continue
        first = now if first is None else first
        peak = max(peak, now)
    return None if first is None else round((peak - first) / 1e6, 2)


def resident() -> int | None:
    """Bytes of memory that the process holds."""
    status = Path("/proc/self/status")
    found = re.search(r"VmRSS:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return 1024 * int(found[1]) if found else None


def synthetic(name: str, count: int, queries: int, seeds: int, million: float) -> dict[str, object]:
    """The line of one strategy on one synthetic space."""
    problem = Problem(count)
    make = partial(strategies.get(name), problem.domain())
    line: dict[str, object] = {"strategy": name, "choices": count, "seeds": seeds}
    line["ask_tell_us"] = {str(size): ask_tell(make(0), size) for size in (1, 100)}
    curves = [search(problem, make(seed), queries) for seed in range(seeds)]
    marks = [mark for mark in MARKS if mark <= queries]
    line["best"] = {str(mark): round(float(np.mean([curve[mark - 1] for curve in curves])), 2) for mark in marks}
    line["random_best"] = {str(mark): round(problem.random_best(mark), 2) for mark in marks}
    goals = {f"{p:g} %": float(problem.standard(np.percentile(problem.random, p))) for p in PERCENTILES}
    line["queries_to"] = {percentile: queries_to(goal, curves) for percentile, goal in goals.items()}
    if million:
        line["memory_growth_mb"] = memory_growth(make(0), int(million * 1e6))
    return line


def mobile(name: str, which: str, million: float) -> dict[str, object]:
    """The line of one strategy on one real space, priced by a synthetic table."""
    space = mobile_spaces()[which]
    make = partial(strategies.get(name), mobile_domain(space))
    line: dict[str, object] = {"strategy": name, "space": which, "choices": len(space.choices)}
    line["ask_tell_us"] = {str(size): ask_tell(make(0), size) for size in (1, 4, 100)}
    if million:
        line["memory_growth_mb"] = memory_growth(make(0), int(million * 1e6))
    return line


def mobile_domain(space: SearchSpace) -> Domain:
    """As a search makes it, with a budget that half of the space meets."""
    pricer = AdditiveEstimator(space, synthetic_table(space), ("latency_ms",))
    limit = float(np.median(pricer.price(space.sample(np.random.default_rng(0), 2000))))
    known = objective(pricer, (Limit("latency_ms", limit),), MnasNetHard(limit))
    ordered = np.array([choice.ordered for choice in space.choices])
    return Domain(space.cardinalities, ordered, space.active, space.kinds, known)


def main() -> None:
    """Print every line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", default="random,evolution,reinforce")
    parser.add_argument("--choices", default="10,30,100,300", help="sizes of the synthetic spaces")
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--million", type=float, default=0.0, help="millions of candidates for the growth of memory")
    options = parser.parse_args()
    names = options.strategies.split(",")
    counts = [int(count) for count in options.choices.split(",") if count]
    tasks = [
        *(partial(synthetic, n, c, options.queries, options.seeds, options.million) for n in names for c in counts),
        *(partial(mobile, name, which, options.million) for name in names for which in mobile_spaces()),
    ]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nas.controller", "nas.experiment", "nas.testing"])
    with context.Pool(1, maxtasksperchild=1) as pool:
        for task in tasks:
            print(json.dumps(pool.apply(task)), flush=True)


if __name__ == "__main__":
    main()
