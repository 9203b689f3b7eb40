"""Strategies, and their peers, on a published table: regret within a cost budget, over seeds.

    python benchmarks/tabular.py --quality nb201_accuracy.csv.gz:c10_valid_200 \\
        --cost hwnasbench_nb201.csv.gz:c10_pixel3_latency --genome ops --budget-quantile 0.4 --queries 100 --seeds 20 \\
        --strategies default,optuna:TPESampler,screened:optuna:TPESampler,nni:evolution

The budget is the quantile over finite, positive costs. A candidate within it scores quality / quality-scale; over it,
that × (budget / cost); a cost that is missing, NaN or ≤ 0, or a missing quality, is infeasible and scores 0. Regret =
100 × (best possible score − best found), mean over seeds. A query is a distinct genome evaluated; repeats are free
for everyone, up to 20 × queries asks, one at a time.

Ours (every name of the registry) see the cost column beforehand: what it rules out costs them no query, and tells them
nothing of its quality. ``plain:NAME`` is the same strategy as it comes: prices unknown, answers over the budget
charged. A peer, ``optuna:SAMPLER`` or ``nni:evolution``, comes as it is; to ``screened:PEER`` what the cost column
rules out is answered with its score, free and uncharged. That is more than a search could know without a training: the
benefit of the doubt is the peers'.

``--fidelity FILE:COLUMN --fidelity-cost FILE:COLUMN --seconds S`` simulates time: candidates are judged by the fidelity
column, each query takes its seconds, and the search ends with the last query that fits. Regret and test are then
those of the candidate that the fidelity column puts first. ``--test FILE:COLUMN[,FILE:COLUMN]`` reports that
candidate's columns. ``--cost`` may be left out: no budget.

``hypervolume`` is that of every query's (quality, cost) over the reference point (median quality of what is within the
budget, budget), in units of the area up to the best quality within the budget and no cost.

FILE is .csv or .csv.gz. Files are joined on ``idx`` where both have it, else on the genome, else on their first column.
A genome column is a string of digits (0-9, a-z), one choice each; of several columns named with commas, one whose
values are short and no codes with leading zeros is a choice of its own. A genome that the table lacks is infeasible;
but where it holds less than a twentieth of the combinations, so that 20 asks a query could not find what it holds, it
is read as a sample, and a genome that it lacks is answered with its nearest row (fewest genes that differ).

Prints one JSON line per strategy; the numbers but ``ask_tell_us`` are the same with any ``--jobs``.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one seed per process: threads of their own would only be in the way

import argparse
import contextlib
import json
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import peers
from published import Problem, Setting, load

import nas.strategies  # noqa: F401 - fills the registry
from nas.errors import NasError
from nas.strategies.base import ASKED, COMPLETE, DUPLICATE, SCREENED, Outcomes, Strategy, strategies

Array = npt.NDArray[np.float64]
CHECKPOINTS = (25, 50, 100, 200, 300, 500, 1000, 2000, 5000, 10000)
ASKS_PER_QUERY = 20


class Finished(Exception):
    """The search has used up its queries, its asks or its simulated seconds."""


class Oracle:
    """Answers genomes from the table and keeps the account of one search.

    Args:
        queries: distinct genomes evaluated, at most.
        seconds: simulated seconds of all queries together, at most.
        screened: whether what the cost rules out is answered free.
    """

    def __init__(self, problem: Problem, queries: int, seconds: float, screened: bool) -> None:
        self.problem, self.queries, self.seconds, self.screened = problem, queries, seconds, screened
        self.asks, self.elapsed = 0, 0.0
        self.known: set[int | bytes] = set()
        self.rows: list[int] = []  # of each query, in order; −1: the table has no such genome
        self.answering = 0.0

    @property
    def finished(self) -> bool:
        """Whether nothing more may be asked."""
        return len(self.rows) >= self.queries or self.asks >= ASKS_PER_QUERY * self.queries

    def answer(self, genome: npt.NDArray[np.int64]) -> tuple[str, int]:
        """What becomes of a genome (complete, duplicate or screened) and its row of the table, or −1.

        Raises:
            Finished: it would take more simulated seconds than are left.
        """
        self.asks += 1
        row = int(self.problem.rows(genome[None])[0])
        if self.screened and (row < 0 or not self.problem.within[row]):
            return SCREENED, row
        identity = row if row >= 0 else genome.tobytes()
        if identity in self.known:
            return DUPLICATE, row
        takes = float(self.problem.seconds[row]) if row >= 0 else 0.0
        if self.elapsed + takes > self.seconds:
            raise Finished
        self.elapsed += takes
        self.known.add(identity)
        self.rows.append(row)
        return COMPLETE, row

    def score(self, genome: npt.NDArray[np.int64]) -> float:
        """What a peer is answered: the score, whether it was charged or not.

        Raises:
            Finished: there is nothing left to spend.
        """
        if self.finished:
            raise Finished
        start = time.perf_counter()
        _, row = self.answer(genome)
        self.answering += time.perf_counter() - start
        return 0.0 if row < 0 else float(self.problem.signal[row])


@dataclass(frozen=True)
class Run:
    """What one search found: rows of its queries, and µs of asking and telling per ask."""

    rows: list[int]
    asks: int
    microseconds: float


def search(problem: Problem, name: str, queries: int, seconds: float, seed: int) -> Run:
    """One search by one strategy with one seed."""
    bare = name.removeprefix("plain:").removeprefix("screened:")
    peer = peers.find(bare)
    screened = name.startswith("screened:") or (peer is None and not name.startswith("plain:"))
    oracle = Oracle(problem, queries, seconds, screened)
    if peer is not None:
        peers.check(bare)  # imports its package before the clock starts
        start = time.perf_counter()
        with contextlib.suppress(Finished):
            peer(problem.cardinalities, oracle.score, ASKS_PER_QUERY * queries, seed)
        spent = time.perf_counter() - start - oracle.answering
    else:
        spent = drive(strategies.get(bare)(problem.domain(knows_costs=screened), seed), oracle)
    return Run(oracle.rows, oracle.asks, 1e6 * spent / max(1, oracle.asks))


def drive(strategy: Strategy, oracle: Oracle) -> float:
    """Ask and tell one at a time until finished; seconds spent in the strategy."""
    problem, spent = oracle.problem, 0.0
    while not oracle.finished:
        start = time.perf_counter()
        asked = strategy.ask(1)
        spent += time.perf_counter() - start
        try:
            status, row = oracle.answer(asked.genomes[0])
        except Finished:
            break
        costs = problem.price(asked.genomes)
        quality = np.nan if status == SCREENED else 0.0 if row < 0 else problem.quality[row]
        reward = np.nan if status == SCREENED else 0.0 if row < 0 else problem.signal[row]
        outcomes = Outcomes(
            asked.index, asked.genomes, np.array([quality]), costs, problem.violation(costs), np.array([reward]),
            np.ones(1), np.array([status]), np.array([ASKED]),
        )  # fmt: skip
        start = time.perf_counter()
        strategy.tell(outcomes)
        spent += time.perf_counter() - start
    return spent


# ---- what is reported ---------------------------------------------------------------------------


def chosen(problem: Problem, rows: list[int], after: int) -> int:
    """The row that a search returns after so many queries: the best by what it saw; −1 where it has none."""
    tried = [row for row in rows[:after] if row >= 0]
    return max(tried, key=lambda row: float(problem.signal[row])) if tried else -1


def report(problem: Problem, name: str, runs: list[Run], queries: int) -> dict[str, Any]:
    """The line of one strategy."""
    longest = max(len(run.rows) for run in runs)
    limit = longest if problem.timed else queries
    marks = {str(mark): mark for mark in CHECKPOINTS if mark <= limit}
    marks["end" if problem.timed else str(queries)] = limit
    regret = {key: [problem.regret(chosen(problem, run.rows, mark)) for run in runs] for key, mark in marks.items()}
    winners = [chosen(problem, run.rows, limit) for run in runs]
    tests = [[float(column[row]) if row >= 0 else 0.0 for row in winners] for column in problem.tests]
    volumes = [problem.hypervolume([row for row in run.rows if row >= 0]) for run in runs]
    return {
        "strategy": name,
        "regret": {key: mean(values) for key, values in regret.items()},
        "regret_se": {key: error(values) for key, values in regret.items()},
        "hypervolume": None if problem.budget is None else mean(volumes),
        "test": one_or_all([mean(values) for values in tests]),
        "ask_tell_us": round(float(np.mean([run.microseconds for run in runs])), 1),
        "test_se": one_or_all([error(values) for values in tests]),
        "queries": mean([float(len(run.rows)) for run in runs]),
        "asks": mean([float(run.asks) for run in runs]),
    }


def mean(values: list[float]) -> float:
    """To four digits."""
    return round(float(np.mean(values)), 4)


def error(values: list[float]) -> float | None:
    """Standard error; of one seed there is none."""
    return round(float(np.std(values, ddof=1) / len(values) ** 0.5), 4) if len(values) > 1 else None


def one_or_all(values: list[Any]) -> Any:
    """Nothing for no column, a number for one, a list for several."""
    return values if len(values) > 1 else values[0] if values else None


# ---- one process per seed -----------------------------------------------------------------------

_problem: Problem


def _start(problem: Problem) -> None:
    global _problem
    _problem = problem


def _search(name: str, queries: int, seconds: float, seed: int) -> Run:
    return search(_problem, name, queries, seconds, seed)


def compare(
    problem: Problem, names: list[str], queries: int, seconds: float, seeds: int, jobs: int
) -> Iterator[dict[str, Any]]:
    """The line of each strategy, in order; always in fresh processes, so that their number changes no result."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, seeds), context, initializer=_start, initargs=(problem,)) as pool:
        try:
            for name in names:
                futures = [pool.submit(_search, name, queries, seconds, seed) for seed in range(seeds)]
                yield report(problem, name, [future.result() for future in futures], queries)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def main() -> None:
    """Read the tables, run every strategy on every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quality", required=True, metavar="FILE:COLUMN")
    parser.add_argument("--cost", metavar="FILE:COLUMN")
    parser.add_argument("--genome", required=True, metavar="COLUMN[,COLUMN]")
    parser.add_argument("--budget-quantile", type=float, default=0.4)
    parser.add_argument("--queries", type=int, help="default: 100, or as many as --seconds allow")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--strategies", default="default,optuna:TPESampler,screened:optuna:TPESampler,nni:evolution")
    parser.add_argument("--quality-scale", type=float, default=100.0)
    parser.add_argument("--test", metavar="FILE:COLUMN[,FILE:COLUMN]")
    parser.add_argument("--fidelity", metavar="FILE:COLUMN")
    parser.add_argument("--fidelity-cost", metavar="FILE:COLUMN")
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    timed = [options.fidelity, options.fidelity_cost, options.seconds]
    if any(value is not None for value in timed) and None in timed:
        parser.error("--fidelity, --fidelity-cost and --seconds go together")
    if not options.cost and not options.fidelity:
        parser.error("--cost is missing (it may be left out only with --fidelity)")
    if min(options.seeds, options.jobs) < 1 or (options.queries is not None and options.queries < 1):
        parser.error("--seeds, --queries and --jobs are at least 1")
    setting = Setting(
        options.quality, options.genome, options.cost, options.budget_quantile, options.quality_scale,
        tuple(options.test.split(",")) if options.test else (), options.fidelity, options.fidelity_cost,
    )  # fmt: skip
    names = options.strategies.split(",")
    try:
        for name in names:
            peers.check(name) or strategies.get(name.removeprefix("plain:").removeprefix("screened:"))
        problem = load(setting)
        queries = options.queries or (len(problem.final) if options.fidelity else 100)
        seconds = np.inf if options.seconds is None else options.seconds
        for line in compare(problem, names, queries, seconds, options.seeds, options.jobs):
            print(json.dumps(line), flush=True)
    except NasError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
