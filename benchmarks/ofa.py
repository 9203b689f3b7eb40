"""Strategies, and their peers, on once-for-all MobileNetV3 within a latency budget on a Galaxy Note10.

    python benchmarks/ofa.py --tables FOLDER --budget 25 --evaluations 1000 --seeds 20 \\
        --strategies default,evolution,screened:optuna:TPESampler

FOLDER (or $NAS_TABLES) holds ofa_note10_lut.csv.gz and ofa_acc_predictor.npz. Accuracy is ImageNet top-1 in % as the
authors' predictor says, latency the sum over their block table (``search_spaces/ofa_mbv3.py``). An evaluation is a
distinct net whose accuracy is asked for: genomes that differ only in blocks beyond the depth are one net, and repeats
are free. Ours know the latencies: what is over the budget is screened and costs no evaluation. Names are those of
``benchmarks/tabular.py``: ``plain:NAME``, ``optuna:SAMPLER`` and ``nni:evolution`` are charged for what is over the
budget, which scores accuracy × (budget / latency); ``screened:PEER`` is answered the same, uncharged. A search
ends early after 20,000 asks in a row that were free.

Prints one JSON line per strategy: best accuracy within the budget after so many evaluations (mean, standard error and
minimum over seeds), and seconds of a search. The numbers but the times are the same with any ``--jobs``.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one seed per process: threads of their own would only be in the way

import argparse
import contextlib
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import peers

import nas.strategies  # noqa: F401 - fills the registry
from nas import content
from nas.errors import NasError
from nas.strategies.base import ASKED, COMPLETE, DUPLICATE, SCREENED, Domain, Objective, Outcomes, Strategy, strategies
from nas.tabular import PublishedSpace

Array = npt.NDArray[np.float64]
CHECKPOINTS = (100, 300, 1000, 3000, 10000, 30000, 50000, 100000)
MAX_FREE_ASKS = 20_000


class Finished(Exception):
    """The search has used up its evaluations."""


class Problem:
    """The space within a budget in ms."""

    def __init__(self, folder: str | None, budget: float) -> None:
        space = content.load_space_class("ofa_mbv3")(folder=folder)  # type: ignore[call-arg]
        assert isinstance(space, PublishedSpace)
        self.space, self.budget = space, budget

    def violation(self, costs: Array) -> Array:
        """By how much of the budget it is exceeded, ``[n]``."""
        return np.maximum(0.0, costs[:, 0] / self.budget - 1)

    def reward(self, quality: Array, costs: Array) -> Array:
        """The score, ``[n]``."""
        return np.asarray(quality * np.minimum(1.0, self.budget / costs[:, 0]))

    def domain(self, knows_costs: bool) -> Domain:
        """What a strategy is told of the space, the prices among it or not."""
        space = self.space
        objective = Objective(space.costs, space.price, self.violation, self.reward) if knows_costs else None
        ordered = np.array([choice.ordered for choice in space.choices])
        return Domain(space.cardinalities, ordered, space.active, space.kinds, objective)


class Oracle:
    """Answers genomes and keeps the account of one search."""

    def __init__(self, problem: Problem, evaluations: int, screened: bool) -> None:
        self.problem, self.evaluations, self.screened = problem, evaluations, screened
        self.known: dict[bytes, float] = {}
        self.curve: list[float] = []  # best accuracy in % within the budget after each evaluation
        self.asks = self.free = 0
        self.answering = 0.0

    @property
    def finished(self) -> bool:
        """Whether nothing more may be asked."""
        return len(self.curve) >= self.evaluations or self.free >= MAX_FREE_ASKS

    def answer(self, genomes: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.str_], Array, Array]:
        """Status ``[n]`` (complete, duplicate or screened), quality ``[n]`` and costs ``[n, 1]``."""
        problem = self.problem
        costs = problem.space.price(genomes)
        within = problem.violation(costs) == 0
        status, quality = np.full(len(genomes), SCREENED, dtype="<U9"), np.full(len(genomes), np.nan)
        wanted = np.flatnonzero(within) if self.screened else np.arange(len(genomes))
        keys = [row.astype(np.uint8).tobytes() for row in problem.space.canonical(genomes[wanted])]
        new = {key: int(i) for i, key in zip(wanted[::-1], keys[::-1], strict=True) if key not in self.known}
        fresh = np.array(sorted(new.values()), dtype=np.int64)
        measured = dict(zip(fresh.tolist(), problem.space.quality(genomes[fresh]), strict=True)) if len(fresh) else {}
        for i, key in zip(wanted.tolist(), keys, strict=True):
            status[i] = COMPLETE if i in measured else DUPLICATE
            if i in measured:
                self.known[key] = float(measured[i])
                best = self.curve[-1] if self.curve else 0.0
                self.curve.append(max(best, 100 * self.known[key]) if within[i] else best)
            quality[i] = self.known[key]
        self.asks += len(genomes)
        self.free = 0 if measured else self.free + len(genomes)
        return status, quality, costs

    def score(self, genome: npt.NDArray[np.int64]) -> float:
        """What a peer is answered: the score, whether it was charged or not.

        Raises:
            Finished: there is nothing left to spend.
        """
        if self.finished:
            raise Finished
        start = time.perf_counter()
        status, quality, costs = self.answer(genome[None])
        if status[0] == SCREENED:
            quality = self.problem.space.quality(genome[None])
        self.answering += time.perf_counter() - start
        return float(self.problem.reward(quality, costs)[0])


@dataclass(frozen=True)
class Run:
    """What one search found, and how long it and its strategy took."""

    curve: list[float]
    asks: int
    seconds: float
    microseconds: float


def search(problem: Problem, name: str, evaluations: int, batch: int, seed: int) -> Run:
    """One search by one strategy with one seed."""
    bare = name.removeprefix("plain:").removeprefix("screened:")
    peer = peers.find(bare)
    screened = name.startswith("screened:") or (peer is None and not name.startswith("plain:"))
    oracle = Oracle(problem, evaluations, screened)
    if peer is not None:
        peers.check(bare)  # imports its package before the clock starts
    start = time.perf_counter()
    if peer is not None:
        with contextlib.suppress(Finished):
            peer(problem.space.cardinalities, oracle.score, MAX_FREE_ASKS * evaluations, seed)
    else:
        drive(strategies.get(bare)(problem.domain(knows_costs=screened), seed), oracle, batch)
    seconds = time.perf_counter() - start
    return Run(oracle.curve, oracle.asks, seconds, 1e6 * (seconds - oracle.answering) / max(1, oracle.asks))


def drive(strategy: Strategy, oracle: Oracle, batch: int) -> None:
    """Ask and tell batches until finished."""
    while not oracle.finished:
        asked = strategy.ask(min(batch, oracle.evaluations - len(oracle.curve)))
        start = time.perf_counter()
        status, quality, costs = oracle.answer(asked.genomes)
        oracle.answering += time.perf_counter() - start
        violation, reward = oracle.problem.violation(costs), oracle.problem.reward(quality, costs)
        source = np.full(len(status), ASKED)
        strategy.tell(
            Outcomes(
                asked.index, asked.genomes, quality, costs, violation, reward, np.ones(len(status)), status, source
            )
        )


def report(name: str, budget: float, evaluations: int, runs: list[Run]) -> dict[str, Any]:
    """The line of one strategy."""
    marks = sorted({mark for mark in CHECKPOINTS if mark < evaluations} | {evaluations})
    curves = np.array([(run.curve + [max(run.curve, default=0.0)] * evaluations)[:evaluations] for run in runs])
    at = {str(mark): curves[:, mark - 1] for mark in marks}
    return {
        "strategy": name,
        "budget_ms": budget,
        "accuracy": {mark: round(float(values.mean()), 4) for mark, values in at.items()},
        "accuracy_se": {
            mark: round(float(values.std(ddof=1) / len(runs) ** 0.5), 4) if len(runs) > 1 else None
            for mark, values in at.items()
        },
        "accuracy_min": {mark: round(float(values.min()), 4) for mark, values in at.items()},
        "evaluations": round(float(np.mean([len(run.curve) for run in runs])), 1),
        "asks": round(float(np.mean([run.asks for run in runs])), 1),
        "seconds": round(float(np.mean([run.seconds for run in runs])), 1),
        "ask_tell_us": round(float(np.mean([run.microseconds for run in runs])), 1),
    }


_problem: Problem


def _start(folder: str | None, budget: float) -> None:
    global _problem
    _problem = Problem(folder, budget)


def _search(name: str, evaluations: int, batch: int, seed: int) -> Run:
    return search(_problem, name, evaluations, batch, seed)


def main() -> None:
    """Run every strategy on every seed, one process each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", metavar="FOLDER", help="default: $NAS_TABLES")
    parser.add_argument("--budget", type=float, default=25.0, help="milliseconds")
    parser.add_argument("--evaluations", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--strategies", default="default")
    parser.add_argument("--batch", type=int, help="asked at a time by ours; default: a thousandth of the evaluations")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    if min(options.seeds, options.jobs, options.evaluations) < 1 or options.budget <= 0:
        parser.error("--seeds, --jobs and --evaluations are at least 1, --budget is above 0")
    batch = options.batch or max(1, options.evaluations // 1000)
    names = options.strategies.split(",")
    try:
        for name in names:
            peers.check(name) or strategies.get(name.removeprefix("plain:").removeprefix("screened:"))
        Problem(options.tables, options.budget)
        context = multiprocessing.get_context("spawn")
        setting = (options.tables, options.budget)
        with ProcessPoolExecutor(min(options.jobs, options.seeds), context, _start, setting) as pool:
            for name in names:
                futures = [
                    pool.submit(_search, name, options.evaluations, batch, seed) for seed in range(options.seeds)
                ]
                runs = [future.result() for future in futures]
                print(json.dumps(report(name, options.budget, options.evaluations, runs)), flush=True)
    except NasError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
