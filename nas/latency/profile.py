"""Building a latency table: parts and whole nets, interleaved; the fit; and what was not measured, interpolated."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from nas import __version__
from nas.errors import TableError
from nas.latency import checkpoint
from nas.latency.device import Device
from nas.latency.energy import metered, source
from nas.latency.interpolate import interpolate
from nas.latency.measure import AGGREGATORS, Measurement, Progress, Timing, interleave
from nas.latency.plan import CALLS, YARDSTICK, CalibrationNet, Plan, choose_keys, load_yardstick
from nas.latency.runtimes import Runner
from nas.latency.table import Entry, LatencyTable, Net
from nas.latency.whole import counts, fitted, sizes
from nas.locks import timing_lock
from nas.space import SearchSpace

ENERGY_SHARE = 0.25  # of the measuring time, on top of it, where energy can be metered
LEAST_ENERGY_SECONDS = 0.02  # of a model: counters move in steps


@dataclass(frozen=True)
class Effort:
    """How long to measure, and how well.

    Attributes:
        seconds: for loading and timing, all together.
        noise: stop early when the nets repeat within this relative difference.
        seed: of the order in which everything is visited.
    """

    seconds: float
    noise: float = 0.01
    seed: int = 0


@dataclass(frozen=True)
class Seen:
    """What a device showed of a plan: times, and per model what its runtime executed and the millijoules of a call."""

    measurement: Measurement
    fused: Mapping[str, Mapping[str, int]]
    energy: Mapping[str, float]
    meter: str


def profile(
    space: SearchSpace,
    nets: Sequence[CalibrationNet],
    device: Device,
    effort: Effort,
    *,
    progress: Progress | None = None,
    note: Callable[[str], None] = lambda _: None,
    partial: Path | None = None,
    resume: bool = False,
    keys: Sequence[str] = (),
) -> LatencyTable:
    """Measure the keys of ``space``, or as many as the time allows, and fit their sums to ``nets``.

    Args:
        progress: called with the share of time used and a message.
        note: called with what a user should know.
        partial: where to keep what was seen when Ctrl-C ends the measuring; deleted at the end.
        resume: go on with what ``partial`` holds, if it is there.
        keys: measure these alone.

    Raises:
        TableError: ``partial`` holds something else's measurement.
    """
    begin = time.perf_counter()
    earlier, identity = _earlier(partial) if partial is not None and resume else (None, "")
    if earlier is None:
        keys = keys or choose_keys(
            space, device, effort.seconds, [net.model for net in nets if net.model is not None], seed=effort.seed,
            note=note,
        )  # fmt: skip
    else:
        keys = list(set(space.keys()) & set(earlier.samples))
    plan = Plan.of(space, nets, keys)
    if earlier is not None and identity != _identity(plan, device):
        raise TableError(
            f"{partial} holds what was measured of another space, device or set of networks.", remedy=checkpoint.REMEDY
        )
    seen = measure(plan, device, effort, begin=begin, progress=progress, partial=partial, earlier=earlier)
    table = assemble(plan, seen, device.as_dict())
    if partial is not None:
        partial.unlink(missing_ok=True)
    return table


def _earlier(partial: Path) -> tuple[Measurement | None, str]:
    return checkpoint.load(partial) if partial.exists() else (None, "")


def _identity(plan: Plan, device: Device) -> str:
    return f"{plan.identity}-{device.fingerprint}"


def measure(
    plan: Plan,
    device: Device,
    effort: Effort,
    *,
    begin: float | None = None,
    progress: Progress | None = None,
    partial: Path | None = None,
    earlier: Measurement | None = None,
    others: Mapping[str, onnx.ModelProto] | None = None,
) -> Seen:
    """Load and time everything in the plan on this machine.

    Args:
        begin: when the time that may be spent began, by ``time.perf_counter``; now, by default.
        others: further whole models, by name, to be timed among the rest.
    """
    begin = time.perf_counter() if begin is None else begin
    runners: dict[str, Runner] = {}
    for i, (key, part) in enumerate(plan.measured.items()):
        runners[key] = device.load(part.to_onnx(device.batch), part=True)
        if progress is not None and i % 20 == 0:
            progress(0.0, f"loading part {i} of {len(plan.measured)}")
    for name, model in {**plan.models, **(others or {})}.items():
        runners[name] = device.load(model)

    def keep(seen: Measurement) -> None:
        if partial is not None:
            checkpoint.save(partial, seen, _identity(plan, device))

    with timing_lock():
        measurement = interleave(
            runners, load_yardstick(device), seconds=max(0.0, effort.seconds - (time.perf_counter() - begin)),
            calls=CALLS, target_noise=effort.noise, watch=plan.net_names, seed=effort.seed, progress=progress,
            earlier=earlier, checkpoint=keep,
        )  # fmt: skip
        keep(measurement)
        each = max(LEAST_ENERGY_SECONDS, ENERGY_SHARE * measurement.seconds / len(runners))
        energy = metered(device.energy_meter(), runners, each)
    fused = {name: runner.fused() for name, runner in runners.items()}
    return Seen(measurement, fused, energy.get("millijoules", {}), source(energy))


def assemble(plan: Plan, seen: Seen, device: Mapping[str, object]) -> LatencyTable:
    """The table of a plan that a device has measured."""
    m = seen.measurement
    names = plan.net_names
    net_how = m.best_aggregator(names)
    latency = m.values(names, net_how) * m.level(names, net_how)
    nets = [
        Net(counts(net.parts), float(ms), m.samples[name].timing().p95, float(net.size_bytes), 0.0, 0.0)
        for name, net, ms in zip(names, plan.nets, latency, strict=True)
    ]
    base = LatencyTable(
        space=plan.space,
        device=dict(device),
        entries={},
        fits={},
        errors={},
        noise=m.disagreement(names, net_how),
        nets=nets,
        protocol={
            "method": "interleaved rounds with yardstick", "rounds": m.rounds, "seconds": m.seconds,
            "calls_per_visit": len(m.samples[names[0]].calls[0]), "net_aggregator": net_how,
            "yardstick": YARDSTICK.key, "yardstick_ms": m.reference, "calibration_nets": len(plan.nets),
        },
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        nas_version=__version__,
        energy=seen.meter,
    )  # fmt: skip
    # Nets repeat best under one aggregator; parts are summed by whichever predicts the nets best.
    # (Interpolating takes seconds: then only the two that mostly win are tried.)
    ways = AGGREGATORS if not plan.absent else tuple(dict.fromkeys(("median", net_how)))
    parts = {**plan.measured, **plan.absent}
    tables = [fitted(_with_parts(base, plan, seen, how), parts) for how in ways]
    return min(tables, key=lambda table: table.errors["latency_ms"].mape)


def _with_parts(base: LatencyTable, plan: Plan, seen: Seen, how: str) -> LatencyTable:
    m, batch = seen.measurement, int(base.device["batch"])
    entries: dict[str, Entry] = {}
    for key in plan.measured:
        samples = m.samples[key]
        timing = samples.timing()
        entries[key] = Entry(
            timing, samples.aggregate(how, m.reference), dict(seen.fused.get(key, {})),
            uncertainty=timing.noise, energy_mj=seen.energy.get(key), **sizes(plan.measured[key], batch),
        )  # fmt: skip
    interpolation: dict[str, Any] = {}
    if plan.absent:
        guesses, validation = interpolate(
            {**plan.measured, **plan.absent}, {key: entry.value for key, entry in entries.items()}
        )
        typical = {
            name: float(np.median([getattr(entry.timing, name) / entry.value for entry in entries.values()]))
            for name in ("p50", "p95", "mean")
        }
        for key, guess in guesses.items():
            times = {name: factor * guess.value for name, factor in typical.items()}
            entries[key] = Entry(
                Timing(**times, n=0, noise=0.0), guess.value, measured=False, uncertainty=guess.uncertainty,
                **sizes(plan.absent[key], batch),
            )  # fmt: skip
        interpolation = {"measured": len(plan.measured), "interpolated": len(guesses)}
        interpolation |= {} if validation is None else {"held_out": asdict(validation)}
    protocol = {**base.protocol, "part_aggregator": how}
    return replace(base, entries=entries, interpolation=interpolation, protocol=protocol)


def describe(table: LatencyTable) -> str:
    """One line: what a user should know before trusting the table."""
    guessed = sum(not entry.measured for entry in table.entries.values())
    parts = f"{len(table.entries)} parts" + (f" ({guessed} of them interpolated)" if guessed else "")
    if "latency_ms" not in table.errors:
        return f"{table.name}: {parts}, not compared with whole nets"
    error = table.errors["latency_ms"]
    return (
        f"{table.name}: {parts}, whole nets within {100 * error.mape:.1f} % on average "
        f"(Spearman {error.spearman:.3f}, {error.nets} nets, leave-one-out), "
        f"noise floor {100 * table.noise:.1f} %"
    )
