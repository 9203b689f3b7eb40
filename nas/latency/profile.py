"""Building a latency table: every part and the calibration nets, interleaved, then the fit."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import onnx

from nas import __version__
from nas.latency.device import Device
from nas.latency.estimator import part_value
from nas.latency.fit import features, fit, plain_sums
from nas.latency.measure import AGGREGATORS, Measurement, Progress, interleave
from nas.latency.runtimes import Runner, runtimes
from nas.latency.table import Entry, LatencyTable, Net
from nas.locks import timing_lock
from nas.parts import Conv, Part
from nas.space import Genomes, SearchSpace

YARDSTICK = Part((Conv(32, 3, activation="relu6"),), (32, 12, 12))


@dataclass(frozen=True)
class CalibrationNet:
    """A whole exported net of the space: what the sums of parts are fitted to."""

    parts: tuple[Part, ...]
    model: onnx.ModelProto


def calibration_genomes(space: SearchSpace, n: int, seed: int = 0) -> Genomes:
    """``n`` genomes spread evenly over the space's range of MACs, so that fits see small and large nets."""
    rng = np.random.default_rng(seed)
    pool = space.canonical(space.sample(rng, 40 * n))
    macs = np.array([sum(part.macs for part in space.parts(space.decode(row))) for row in pool])
    order = np.argsort(macs, kind="stable")
    return pool[order[np.linspace(0, len(pool) - 1, n).round().astype(int)]]


def load_yardstick(device: Device) -> Runner:
    """The fixed kernel beside which everything is timed."""
    return runtimes.get(device.runtime)().load(
        YARDSTICK.to_onnx(device.batch), threads=device.threads, batch=device.batch
    )


def profile(
    space: SearchSpace,
    nets: Sequence[CalibrationNet],
    device: Device,
    *,
    seconds: float,
    target_noise: float = 0.01,
    seed: int = 0,
    progress: Progress | None = None,
) -> LatencyTable:
    """Measure all keys of ``space`` and fit their sums to ``nets``.

    Args:
        seconds: time for measuring (loading comes on top).
        target_noise: stop early when the nets repeat within this relative difference.
    """
    runtime = runtimes.get(device.runtime)()
    keys = space.keys()
    runners: dict[str, Runner] = {}
    for i, (key, part) in enumerate(keys.items()):
        runners[key] = runtime.load(part.to_onnx(device.batch), threads=device.threads, batch=device.batch)
        if progress is not None and i % 20 == 0:
            progress(0.0, f"loading parts {i}/{len(keys)}")
    names = [f"net {i}" for i in range(len(nets))]
    for name, net in zip(names, nets, strict=True):
        runners[name] = runtime.load(net.model, threads=device.threads, batch=device.batch)
    with timing_lock():
        seen = interleave(
            runners, load_yardstick(device), seconds=seconds, target_noise=target_noise, watch=names, seed=seed,
            progress=progress,
        )  # fmt: skip
    return _assemble(space, list(keys), nets, names, runners, seen, device)


def _assemble(
    space: SearchSpace,
    keys: list[str],
    nets: Sequence[CalibrationNet],
    names: list[str],
    runners: dict[str, Runner],
    seen: Measurement,
    device: Device,
) -> LatencyTable:
    # Nets are judged by an honest middle (not a minimum); parts by whatever predicts the nets best.
    net_how = seen.best_aggregator(names, ("median", "ratio"))
    measured = {
        "latency_ms": seen.values(names, net_how),
        "latency_p95_ms": np.array([seen.samples[name].timing().p95 for name in names]),
        "size_bytes": np.array([float(net.model.ByteSize()) for net in nets]),
    }
    tables = []
    for how in AGGREGATORS:
        entries = {
            key: Entry(
                seen.samples[key].timing(), seen.samples[key].aggregate(how, seen.reference), runners[key].fused()
            )
            for key in keys
        }
        table = LatencyTable(
            space=space.name,
            device=device.as_dict(),
            entries=entries,
            fits={},
            errors={},
            noise=seen.disagreement(names, net_how),
            nets=[],
            protocol={
                "method": "interleaved rounds with yardstick", "rounds": seen.rounds, "seconds": seen.seconds,
                "calls_per_visit": len(seen.samples[keys[0]].calls[0]), "part_aggregator": how,
                "net_aggregator": net_how, "yardstick": YARDSTICK.key, "yardstick_ms": seen.reference,
                "calibration_nets": len(nets),
            },
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            nas_version=__version__,
        )  # fmt: skip
        for cost, y in measured.items():
            x = features([[(part, part_value(table, part, cost)) for part in net.parts] for net in nets])
            table.fits[cost], table.errors[cost], predicted = fit(x, y)
            if cost == "latency_ms":
                sums = plain_sums(x)
                table.nets.extend(
                    Net(
                        _counts(net.parts), float(y[i]), float(measured["latency_p95_ms"][i]),
                        float(measured["size_bytes"][i]), float(predicted[i]), float(sums[i]),
                    )
                    for i, net in enumerate(nets)
                )  # fmt: skip
        tables.append(table)
    return min(tables, key=lambda t: t.errors["latency_ms"].mape)


def _counts(parts: Iterable[Part]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for part in parts:
        counts[part.key] = counts.get(part.key, 0) + part.count
    return counts


def describe(table: LatencyTable) -> str:
    """One line: what a user should know before trusting the table."""
    if "latency_ms" not in table.errors:
        return f"{table.name}: {len(table.entries)} parts, whose sums were never compared with whole nets"
    error = asdict(table.errors["latency_ms"])
    return (
        f"{table.name}: {len(table.entries)} parts, whole nets within {100 * error['mape']:.1f} % on average "
        f"(Spearman {error['spearman']:.3f}, {error['nets']} nets, leave-one-out), "
        f"noise floor {100 * table.noise:.1f} %"
    )
