"""Strategies on a published table: regret within a latency budget, over seeds.

    python benchmarks/tabular.py --quality nb201_accuracy.csv.gz:c10_valid_200 \\
        --cost hwnasbench_nb201.csv.gz:c10_pixel3_latency --genome ops --budget-quantile 0.4 --queries 100 --seeds 20 \\
        --strategies random,evolution,reinforce

The budget is the quantile over finite, positive costs. A candidate within it scores quality / quality-scale; over it,
that × (budget / cost); a cost that is missing, NaN or ≤ 0 is infeasible and scores 0. Regret = 100 × (best possible −
best found), mean over seeds. A query is a distinct genome evaluated; repeats are free, up to 20 × queries asks.
What the cost rules out is answered free and uncharged, unless the strategy is written ``plain:NAME``.
Prints one JSON line per strategy.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import time
from pathlib import Path

import numpy as np

import nas.strategies  # noqa: F401 - fills the registry
from nas.strategies.base import ASKED, COMPLETE, DUPLICATE, SCREENED, Domain, Outcomes, Proposals, strategies

CHECKPOINTS = (25, 50, 100, 200, 300, 500, 1000)
BATCH = 1


class Problem:
    """A table as a search problem: digits of the genome column, score and feasibility by genome."""

    def __init__(self, quality: str, cost: str, genome: str, quantile: float, scale: float) -> None:
        keys, q = read(quality, genome)
        cost_by_join = dict(zip(*read(cost, None), strict=True))
        joins, _ = read(quality, None)
        c = np.array([cost_by_join.get(join, np.nan) for join in joins])
        self.usable = np.isfinite(c) & (c > 0)
        self.budget = float(np.quantile(c[self.usable], quantile))
        self.within = self.usable & (c <= self.budget)
        safe = np.where(self.usable, c, np.inf)
        self.score = np.where(self.within, q / scale, q / scale * self.budget / safe)
        self.genomes = np.array([[int(d, 36) for d in key] for key in keys])
        self.row = {tuple(g): i for i, g in enumerate(self.genomes.tolist())}
        self.best = float(self.score[self.within].max())
        self.cardinalities = self.genomes.max(axis=0) + 1

    def domain(self) -> Domain:
        """Nothing is known to be ordered or dormant."""
        n = len(self.cardinalities)
        return Domain(self.cardinalities, np.zeros(n, dtype=bool), lambda g: np.ones(np.shape(g), dtype=bool))


def read(where: str, key: str | None) -> tuple[list[str], np.ndarray]:
    """``FILE:COLUMN`` → values of the key column (``idx``, else the first) and numbers of the column."""
    file, _, column = where.rpartition(":")
    if not Path(file).exists():
        raise SystemExit(f"{file} is missing: bring the published table, or name another with FILE:COLUMN")
    opener = gzip.open if file.endswith(".gz") else open
    with opener(file, "rt") as handle:
        rows = list(csv.DictReader(handle))
    name = key or ("idx" if "idx" in rows[0] else next(iter(rows[0])))
    numbers = [float(r[column]) if r[column] not in ("", "nan", "NaN") else np.nan for r in rows]
    return [r[name] for r in rows], np.array(numbers)


def search(problem: Problem, name: str, queries: int, seed: int) -> tuple[list[float], float]:
    """Best score after each query, and µs of ask + tell per asked candidate."""
    plain = name.startswith("plain:")
    strategy = strategies.get(name.removeprefix("plain:"))(problem.domain(), seed)
    seen: dict[int, float] = {}
    best, curve, asks, spent = -np.inf, [], 0, 0.0
    while len(curve) < queries and asks < 20 * queries:
        start = time.perf_counter()
        asked = strategy.ask(BATCH)
        spent += time.perf_counter() - start
        asks += BATCH
        quality, status = np.full(BATCH, np.nan), np.full(BATCH, SCREENED, dtype="<U9")
        for i, genome in enumerate(asked.genomes.tolist()):
            row = problem.row.get(tuple(genome))
            if row is None or (not plain and not problem.within[row]):
                continue
            status[i] = DUPLICATE if row in seen else COMPLETE
            quality[i] = seen.setdefault(row, float(problem.score[row]))
            if status[i] == COMPLETE:
                best = max(best, quality[i])
                curve.append(best)
        start = time.perf_counter()
        strategy.tell(outcomes(asked, quality, status))
        spent += time.perf_counter() - start
    return (curve + [best] * queries)[:queries], 1e6 * spent / max(1, asks)


def outcomes(asked: Proposals, quality: np.ndarray, status: np.ndarray) -> Outcomes:
    """The reward is the score; costs are not shown to the strategies."""
    n = len(quality)
    return Outcomes(
        asked.index, asked.genomes, quality, np.zeros((n, 0)), np.zeros(n), quality, asked.fidelity, status,
        np.full(n, ASKED),
    )  # fmt: skip


def main() -> None:
    """Run every strategy on every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quality", required=True)
    parser.add_argument("--cost", required=True)
    parser.add_argument("--genome", required=True)
    parser.add_argument("--budget-quantile", type=float, default=0.4)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--strategies", default="random,evolution,reinforce")
    parser.add_argument("--quality-scale", type=float, default=100.0)
    options = parser.parse_args()
    problem = Problem(options.quality, options.cost, options.genome, options.budget_quantile, options.quality_scale)
    for name in options.strategies.split(","):
        runs = [search(problem, name, options.queries, seed) for seed in range(options.seeds)]
        regret = 100 * (problem.best - np.array([curve for curve, _ in runs]))
        marks = sorted({c for c in CHECKPOINTS if c <= options.queries} | {options.queries})
        print(
            json.dumps(
                {
                    "strategy": name,
                    "regret": {str(m): round(float(regret[:, m - 1].mean()), 4) for m in marks},
                    "regret_se": {
                        str(m): round(float(regret[:, m - 1].std(ddof=1) / len(runs) ** 0.5), 4) for m in marks
                    },
                    "ask_tell_us": round(float(np.mean([us for _, us in runs])), 1),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
