"""The measuring protocol: everything interleaved at random over rounds, a yardstick kernel beside each timing.

Machines have fast and slow spells of seconds. Timing one thing to its end and then the next puts the spell into
the difference between them; visiting everything in random order in every round puts it into all of them alike.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # bundles take this file along to devices that have nothing of ours
    from nas.latency.runtimes import Runner

Array = npt.NDArray[np.float64]
Progress = Callable[[float, str], None]
AGGREGATORS = ("median", "ratio", "quartile", "min")
MIN_ROUNDS = 6
CHECKPOINT_SECONDS = 30.0


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one inference.

    Attributes:
        p50, p95, mean: over all timed calls.
        n: number of timed calls.
        noise: relative difference of the medians of two interleaved halves of the rounds.
    """

    p50: float
    p95: float
    mean: float
    n: int
    noise: float


@dataclass
class Samples:
    """Raw timings of one model: ``calls`` [visits, calls per visit] and ``yardstick`` [visits], in ms."""

    calls: list[list[float]] = field(default_factory=list)
    yardstick: list[float] = field(default_factory=list)

    def aggregate(self, how: str, reference: float, part: slice = slice(None)) -> float:
        """One number in ms; ``reference`` is the yardstick's own median over everything."""
        calls = np.asarray(self.calls)[part]
        if how == "quartile":  # the lower one: what the model takes while nothing else is in its way
            return float(np.percentile(calls, 25))
        visits = np.median(calls, axis=1)
        if how == "ratio":
            return float(np.median(visits / np.asarray(self.yardstick)[part]) * reference)
        return float(visits.min() if how == "min" else np.median(visits))

    def timing(self) -> Timing:
        """Summary of all calls."""
        calls = np.asarray(self.calls)
        halves = [float(np.median(calls[i::2])) for i in (0, 1)] if len(calls) > 1 else [1.0, 1.0]
        noise = abs(halves[0] - halves[1]) / float(np.mean(halves))
        p50, p95 = np.percentile(calls, [50, 95])
        return Timing(float(p50), float(p95), float(calls.mean()), calls.size, noise)


@dataclass(frozen=True)
class Measurement:
    """What one interleaved session saw.

    Attributes:
        samples: model name → its raw timings, one visit a round.
        reference: median of the yardstick, ms.
        seconds, rounds: what it took.
    """

    samples: Mapping[str, Samples]
    reference: float
    seconds: float
    rounds: int

    def values(self, names: Sequence[str], how: str, part: slice = slice(None)) -> Array:
        """Aggregated ms of several models."""
        return np.array([self.samples[name].aggregate(how, self.reference, part) for name in names])

    def level(self, names: Sequence[str], how: str) -> float:
        """What aggregated values have to be multiplied with to be at the level of medians.

        A minimum repeats best where something else runs now and then, but it says too little by what usually runs: by
        one factor for all models, the median one of ``names``.
        """
        if how in ("median", "ratio"):
            return 1.0
        return float(np.median(self.values(names, "median") / self.values(names, how)))

    def disagreement(self, names: Sequence[str], how: str) -> float:
        """Mean relative difference between two interleaved halves of the rounds: the noise floor."""
        first, second = self.values(names, how, slice(0, None, 2)), self.values(names, how, slice(1, None, 2))
        return float(np.mean(np.abs(first - second) / ((first + second) / 2)))

    def best_aggregator(self, names: Sequence[str], among: Sequence[str] = AGGREGATORS) -> str:
        """The aggregator under which repeated measurements of ``names`` agree best."""
        return min(among, key=lambda how: self.disagreement(names, how))


def interleave(
    runners: Mapping[str, Runner],
    yardstick: Runner,
    *,
    seconds: float,
    max_rounds: int = 200,
    calls: int = 5,
    target_noise: float = 0.0,
    watch: Sequence[str] = (),
    seed: int = 0,
    progress: Progress | None = None,
    earlier: Measurement | None = None,
    checkpoint: Callable[[Measurement], None] | None = None,
) -> Measurement:
    """Time all runners in random order, round after round.

    Args:
        seconds: stop after the round in which this much time has passed (at least six rounds are done).
        calls: timed calls a visit, after one that warms caches up.
        target_noise: stop early once the ``watch`` models repeat within this relative difference.
        progress: called with the share of time used and a message.
        earlier: what an interrupted session saw of the same models; its rounds count.
        checkpoint: is given what was seen so far, every half minute and when Ctrl-C ends the session; rounds that
            were not finished are left out.
    """
    names = list(runners)
    seen = _begun(names, earlier)
    start = saved = time.perf_counter()

    def so_far() -> Measurement:
        spent = time.perf_counter() - start + (earlier.seconds if earlier else 0.0)
        for samples in seen.samples.values():
            del samples.calls[seen.rounds :], samples.yardstick[seen.rounds :]
        reference = float(np.median([value for s in seen.samples.values() for value in s.yardstick]))
        return Measurement(seen.samples, reference, spent, seen.rounds)

    collecting = gc.isenabled()
    gc.disable()  # a collection inside a 20 µs timing would be the timing
    try:
        while seen.rounds < max_rounds:
            for i in np.random.default_rng((seed, seen.rounds)).permutation(len(names)):
                samples = seen.samples[names[i]]
                samples.yardstick.append(float(np.median(_visit(yardstick, 2))))
                samples.calls.append(_visit(runners[names[i]], calls))
            seen.rounds += 1
            spent = time.perf_counter() - start
            if progress is not None:
                progress(min(1.0, spent / max(seconds, 1e-9)), f"round {seen.rounds}")
            if checkpoint is not None and time.perf_counter() - saved > CHECKPOINT_SECONDS:
                checkpoint(so_far())
                saved = time.perf_counter()
            if seen.rounds < MIN_ROUNDS:
                continue
            if spent > seconds or (target_noise and _settled(seen.samples, watch, target_noise)):
                break
    except KeyboardInterrupt:
        if checkpoint is not None and seen.rounds:
            checkpoint(so_far())
        raise
    finally:
        if collecting:
            gc.enable()
    return so_far()


@dataclass
class _Begun:
    samples: dict[str, Samples]
    rounds: int


def _begun(names: Sequence[str], earlier: Measurement | None) -> _Begun:
    if earlier is None:
        return _Begun({name: Samples() for name in names}, 0)
    kept = {name: earlier.samples[name] for name in names}
    return _Begun({name: Samples(list(s.calls), list(s.yardstick)) for name, s in kept.items()}, earlier.rounds)


def _visit(runner: Runner, calls: int) -> list[float]:
    runner()
    return runner.time(calls)


def _settled(samples: Mapping[str, Samples], watch: Sequence[str], target: float) -> bool:
    return bool(watch) and float(np.mean([samples[name].timing().noise for name in watch])) <= target
