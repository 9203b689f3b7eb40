"""The protocol on real sessions and on made-up runners whose times are known."""

from __future__ import annotations

import gc
import time

import numpy as np
import pytest

from nas.latency.measure import AGGREGATORS, MIN_ROUNDS, Measurement, Samples, interleave
from nas.latency.runtimes import OnnxRuntime, Runner
from nas.parts import Conv, Part


class Sleeper(Runner):
    """Takes a known time, and notes when it was called."""

    def __init__(self, name: str, seconds: float, log: list[str]) -> None:
        self.name, self.seconds, self.log = name, seconds, log

    def __call__(self) -> None:
        self.log.append(self.name)
        end = time.perf_counter() + self.seconds
        while time.perf_counter() < end:
            pass


def test_real_sessions() -> None:
    runtime = OnnxRuntime()
    small, large = (Part((Conv(c, 3, activation="relu6"),), (c, 16, 16)) for c in (8, 64))
    runners = {p.key: runtime.load(p.to_onnx(), threads=1, batch=1) for p in (small, large)}
    yardstick = runtime.load(small.to_onnx(), threads=1, batch=1)
    seen = interleave(runners, yardstick, seconds=0.2, calls=3)
    assert seen.rounds >= MIN_ROUNDS
    assert set(seen.samples) == set(runners)
    for samples in seen.samples.values():
        assert np.asarray(samples.calls).shape == (seen.rounds, 3)
        assert len(samples.yardstick) == seen.rounds
        assert (np.asarray(samples.calls) > 0).all()
        timing = samples.timing()
        assert timing.n == 3 * seen.rounds
        assert 0 < timing.p50 <= timing.p95
    # 64 times the work takes longer by every aggregator
    for how in AGGREGATORS:
        a, b = seen.values([small.key, large.key], how)
        assert 0 < a < b
    assert seen.best_aggregator(list(runners)) in AGGREGATORS


def test_every_round_visits_everything_in_a_new_order() -> None:
    log: list[str] = []
    runners = {name: Sleeper(name, 0.0, log) for name in "abcdef"}
    seen = interleave(runners, Sleeper("-", 0.0, log), seconds=0.0, calls=2, seed=1)
    assert seen.rounds == MIN_ROUNDS
    # per visit: the yardstick once warm and twice timed, the model once warm and twice timed
    assert len(log) == MIN_ROUNDS * 6 * 6
    visits = [log[i : i + 6] for i in range(0, len(log), 6)]
    assert all(visit == ["-"] * 3 + [visit[3]] * 3 for visit in visits)
    orders = ["".join(visit[3] for visit in visits[i : i + 6]) for i in range(0, len(visits), 6)]
    assert all(sorted(order) == list("abcdef") for order in orders)
    assert len(set(orders)) > 1
    again: list[str] = []
    interleave({n: Sleeper(n, 0.0, again) for n in "abcdef"}, Sleeper("-", 0.0, again), seconds=0.0, calls=2, seed=1)
    assert again == log


def test_it_stops_in_time_or_when_settled() -> None:
    log: list[str] = []
    runners = {"a": Sleeper("a", 0.001, log)}
    yardstick = Sleeper("-", 0.0005, log)
    assert interleave(runners, yardstick, seconds=1e-9, max_rounds=50).rounds == MIN_ROUNDS
    assert interleave(runners, yardstick, seconds=60.0, max_rounds=9).rounds == 9
    assert interleave(runners, yardstick, seconds=60.0, target_noise=10.0, watch=["a"]).rounds == MIN_ROUNDS
    shares: list[float] = []
    interleave(runners, yardstick, seconds=0.05, progress=lambda share, text: shares.append(share))
    assert shares == sorted(shares)
    assert 0 < shares[0] <= shares[-1] == 1.0


def test_the_collector_is_off_while_timing_and_on_again() -> None:
    states: list[bool] = []

    class Watcher(Runner):
        def __call__(self) -> None:
            states.append(gc.isenabled())

    class Failing(Runner):
        def __call__(self) -> None:
            raise RuntimeError("broken model")

    interleave({"a": Watcher()}, Watcher(), seconds=0.0)
    assert not any(states)
    assert gc.isenabled()
    with pytest.raises(RuntimeError, match="broken model"):
        interleave({"a": Failing()}, Watcher(), seconds=0.0)
    assert gc.isenabled()


def made_up() -> Measurement:
    """Six rounds in a slow spell that doubles everything from the third on."""
    spell = np.array([1.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    rng = np.random.default_rng(0)
    samples = {}
    for name, ms in (("a", 1.0), ("b", 3.0)):
        calls = ms * spell[:, None] * (1 + 0.01 * rng.random((6, 5)))
        samples[name] = Samples(calls.tolist(), (0.5 * spell).tolist())
    return Measurement(samples, reference=0.75, seconds=1.0, rounds=6)


def test_aggregators_by_hand() -> None:
    seen = made_up()
    a = seen.samples["a"]
    visits = np.median(a.calls, axis=1)
    assert a.aggregate("min", 0.75) == visits.min()
    assert a.aggregate("median", 0.75) == np.median(visits)
    assert a.aggregate("ratio", 0.75) == pytest.approx(np.median(visits / np.array(a.yardstick)) * 0.75)
    assert a.aggregate("median", 0.75, slice(0, 2)) == np.median(visits[:2])
    # the ratio to the yardstick sees through the spell: 1 ms is 2 yardsticks, all six times
    assert a.aggregate("ratio", 1.0) == pytest.approx(2.0, rel=0.02)
    assert seen.values(["a", "b"], "ratio")[1] / seen.values(["a", "b"], "ratio")[0] == pytest.approx(3.0, rel=0.02)


def test_the_best_aggregator_repeats_best() -> None:
    seen = made_up()
    for name, samples in seen.samples.items():
        # spells that fall on one half of the rounds only spoil the median and the minimum
        slow = np.tile([1.0, 2.0], 3)
        ms = {"a": 1.0, "b": 3.0}[name]
        samples.calls[:] = (ms * slow[:, None] * np.ones((6, 5))).tolist()
        samples.yardstick[:] = (0.5 * slow).tolist()
    assert seen.disagreement(["a", "b"], "ratio") == pytest.approx(0.0, abs=1e-12)
    assert seen.disagreement(["a", "b"], "median") == pytest.approx(2 / 3)
    assert seen.best_aggregator(["a", "b"]) == "ratio"


def test_timing_by_hand() -> None:
    timing = Samples([[1.0, 1.0], [2.0, 2.0], [1.0, 1.0], [2.0, 2.0]], [1.0] * 4).timing()
    assert (timing.p50, timing.mean, timing.n) == (1.5, 1.5, 8)
    assert timing.p95 == 2.0
    assert timing.noise == pytest.approx(1.0 / 1.5)
