"""Estimators price matrices of genomes by array operations; the additive one is compiled from a space's sites."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from nas.errors import TableError
from nas.genes import Compiled
from nas.latency.fit import LinearFit
from nas.latency.table import LatencyTable
from nas.parts import Part
from nas.space import Candidate, Genomes, SearchSpace

Array = npt.NDArray[np.float64]
COSTS = ("latency_ms", "latency_p95_ms", "size_bytes", "macs", "params")
PEAK, ENERGY = "peak_bytes", "energy_mj"
FURTHER = (PEAK, ENERGY)  # priced where they are asked for: activations at their most, millijoules of a call
LATENCIES = ("latency_ms", "latency_p95_ms")  # the costs that differ from device to device
LEAST = 0.1
CHUNK = 8192  # rows whose index and sum stay in the processor's cache


class CostEstimator(Protocol):
    """Prices genomes: latency is never a black box to the search."""

    costs: tuple[str, ...]

    def price(self, genomes: Genomes) -> Array:
        """Costs of ``genomes [n, choices]`` → ``[n, len(costs)]``."""


class SiteCosts(NamedTuple):
    """A site as a table over the genes that it reads, and what each entry adds to the costs, ``[entries, k]``."""

    site: Compiled[Any]
    costs: Array


@runtime_checkable
class Additive(Protocol):
    """An estimator whose prices are a constant and a sum over sites."""

    costs: tuple[str, ...]

    def by_site(self) -> list[SiteCosts]:
        """What every site adds; columns are those of ``price``."""


class AdditiveEstimator:
    """Sum over parts from a latency table, corrected by the table's fit, compiled to one gather per site.

    Args:
        space: the space whose sites are compiled.
        table: has an entry for every key of the space.
        costs: columns to price, from :data:`COSTS` and :data:`FURTHER`.

    Prices of ``peak_bytes`` are the largest part's and not a sum; those of ``energy_mj`` are plain sums. A latency is
    at least :data:`LEAST` of the fastest network that was measured: a correction may not run through zero.

    Raises:
        TableError: a key of the space is missing, or energies are asked for and were not metered.
    """

    def __init__(self, space: SearchSpace, table: LatencyTable, costs: tuple[str, ...] = COSTS) -> None:
        self.space, self.table, self.costs = space, table, costs
        keys = space.keys()
        if missing := table.missing(list(keys)):
            raise table.lacks(missing, len(keys), space.name)
        if ENERGY in costs and any(table.entries[key].energy_mj is None for key in keys):
            raise TableError(
                f"Table {table.name!r} has no energies: {table.energy or 'they were not metered'}.",
                remedy="profile where RAPL or NVML can be read, or leave energy out of the objective",
            )
        self._floor = _floor(table)
        self._peaks = np.array([cost == PEAK for cost in costs])
        self._sites = [
            (site.genes, site.strides, np.array([self._value(parts) for parts in site.values]))
            for site in space.compiled
        ]
        self._constant = np.array([self._per_net(cost) for cost in costs])

    def price(self, genomes: Genomes) -> Array:
        """Costs ``[n, len(self.costs)]`` of ``genomes [n, choices]``; no Python work per candidate."""
        genomes = np.atleast_2d(genomes)
        out = np.empty((len(genomes), len(self.costs)))
        for start in range(0, len(genomes), CHUNK):
            block = np.ascontiguousarray(genomes[start : start + CHUNK].T)
            total = np.repeat(self._constant[:, None], block.shape[1], axis=1)
            index = np.empty(block.shape[1], dtype=np.int64)
            term = np.empty_like(index)
            for genes, strides, values in self._sites:
                index[:] = 0
                for gene, stride in zip(genes, strides, strict=True):
                    np.multiply(block[gene], stride, out=term)
                    index += term
                for row in range(len(self.costs)):
                    if self._peaks[row]:
                        np.maximum(total[row], values[:, row].take(index), out=total[row])
                    else:
                        total[row] += values[:, row].take(index)
            out[start : start + CHUNK] = total.T
        return self._floored(out)

    def by_site(self) -> list[SiteCosts]:
        """What every site adds to the costs, a table each; a peak is no sum, and adds nothing."""
        return [
            SiteCosts(site, np.where(self._peaks, 0.0, values))
            for site, (_, _, values) in zip(self.space.compiled, self._sites, strict=True)
        ]

    def price_slowly(self, candidate: Candidate) -> Array:
        """The same by definition, part by part: what :meth:`price` must equal to float precision."""
        return self._floored(self._constant + self._value(tuple(self.space.parts(candidate))))

    def _floored(self, costs: Array) -> Array:
        for column, cost in enumerate(self.costs):
            if cost in LATENCIES:
                costs[..., column] = np.maximum(costs[..., column], self._floor)
        return costs

    def _value(self, parts: tuple[Part, ...]) -> Array:
        together = [max if cost == PEAK else sum for cost in self.costs]
        return np.array(
            [
                f([self._part_cost(part, cost) for part in parts] or [0.0])
                for f, cost in zip(together, self.costs, strict=True)
            ],
            dtype=np.float64,
        )

    def _part_cost(self, part: Part, cost: str) -> float:
        if cost == "macs":
            return float(part.macs)
        if cost == "params":
            return float(part.params)
        if cost == PEAK:
            return float(part.peak_bytes(int(self.table.device.get("batch") or 1)))
        if cost == ENERGY:
            return part.count * float(self.table.entry(part.key).energy_mj or 0.0)
        fit = self.table.fits.get(cost, LinearFit())
        return part.count * contribution(self.table, fit, part, cost)

    def _per_net(self, cost: str) -> float:
        return self.table.fits[cost].per_net if cost in self.table.fits else 0.0


class FastestRuntime:
    """One device with several runtimes: every candidate has the latencies of the runtime that is fastest for it.

    Args:
        own: prices in the device's first runtime; gives all costs that are no latencies.
        alternatives: by runtime → prices in it, at least latencies.
    """

    def __init__(self, own: CostEstimator, alternatives: Mapping[str, CostEstimator]) -> None:
        self.costs = own.costs
        self.runtimes = ("", *alternatives)
        self._own, self._alternatives = own, tuple(alternatives.values())

    def price(self, genomes: Genomes) -> Array:
        """Costs ``[n, len(self.costs)]`` of ``genomes [n, choices]``."""
        costs = self._own.price(genomes)
        fastest, all_of = self._compared(genomes, costs)
        columns = [self.costs.index(cost) for cost in LATENCIES]
        costs[:, columns] = all_of[fastest, np.arange(len(costs))]
        return costs

    def fastest(self, genomes: Genomes) -> list[str]:
        """By prediction: the alternative of every genome, or "" for the device's own runtime."""
        chosen, _ = self._compared(genomes, self._own.price(genomes))
        return [self.runtimes[i] for i in chosen]

    def _compared(self, genomes: Genomes, own: Array) -> tuple[npt.NDArray[np.intp], Array]:
        """Which runtime is fastest ``[n]``, and the latencies in all of them, ``[runtimes, n, 2]``."""
        priced = [(self._own.costs, own), *((other.costs, other.price(genomes)) for other in self._alternatives)]
        all_of = np.stack([costs[:, [names.index(cost) for cost in LATENCIES]] for names, costs in priced])
        return all_of[:, :, 0].argmin(axis=0), all_of


def _floor(table: LatencyTable) -> float:
    return LEAST * min((net.measured_ms for net in table.nets if net.measured_ms > 0), default=0.0)


class SeveralDevices:
    """This device's costs, and behind them other devices' under names of their own: ``latency_ms@pixel``.

    Args:
        own: prices for this device.
        others: name of a device → what prices the same genomes for it.
    """

    def __init__(self, own: CostEstimator, others: Mapping[str, CostEstimator]) -> None:
        self._estimators = (own, *others.values())
        elsewhere = [on_device(cost, name) for name, other in others.items() for cost in other.costs]
        self.costs = (*own.costs, *elsewhere)

    def price(self, genomes: Genomes) -> Array:
        """Costs ``[n, len(self.costs)]`` of ``genomes [n, choices]``."""
        return np.concatenate([estimator.price(genomes) for estimator in self._estimators], axis=1)

    def by_site(self) -> list[SiteCosts]:
        """What every site adds to the costs on all devices; nothing where one of them is no sum over sites."""
        tables = [estimator.by_site() for estimator in self._estimators if isinstance(estimator, Additive)]
        if len(tables) < len(self._estimators):
            return []
        return [
            SiteCosts(same[0].site, np.concatenate([one.costs for one in same], axis=1))
            for same in zip(*tables, strict=True)
        ]


def on_device(cost: str, name: str) -> str:
    """The name of a cost on another device."""
    return f"{cost}@{name}"


def elsewhere(costs: Mapping[str, float]) -> dict[str, float]:
    """Those of the named costs that are another device's."""
    return {name: value for name, value in costs.items() if "@" in name}


def contribution(table: LatencyTable, fit: LinearFit, part: Part, cost: str) -> float:
    """What one copy of ``part`` adds to a whole network's ``cost``."""
    own = fit.part(part_value(table, part, cost), part)
    return own * (1 + table.entry(part.key).correction) if cost == "latency_ms" else own


def part_value(table: LatencyTable, part: Part, cost: str) -> float:
    """Cost of one copy of ``part`` on its own: aggregated ms, p95 ms, or bytes of weights."""
    if cost == "size_bytes":
        return part.weight_bytes / part.count
    entry = table.entry(part.key)
    return entry.timing.p95 if cost == "latency_p95_ms" else entry.value
