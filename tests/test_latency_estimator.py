"""The compiled estimator is the sum over the parts, corrected by the fit; nothing else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers import TinySpace, tiny_estimator

from nas.errors import TableError
from nas.latency import AdditiveEstimator, SeveralDevices, elsewhere
from nas.latency.estimator import CHUNK, COSTS, part_value
from nas.latency.fit import LinearFit
from nas.parts import PRECISIONS
from nas.testing import synthetic_table


def test_price_equals_the_slow_sum() -> None:
    space = TinySpace()
    estimator = tiny_estimator(space)
    genomes = space.sample(np.random.default_rng(0), 1000)
    prices = estimator.price(genomes)
    assert prices.shape == (1000, len(COSTS))
    np.testing.assert_allclose(prices, [estimator.price_slowly(space.decode(g)) for g in genomes], rtol=1e-12)


def test_price_by_hand() -> None:
    """c + Σ over the parts of count · (s_g · value + f_g + t_g · traffic + m_g · MACs), from the definition alone."""
    space = TinySpace()
    table = synthetic_table(space, 4)
    estimator = AdditiveEstimator(space, table)
    genome = np.array([1, 1, 1, 1, 1, 0, 0, 0])  # deep, wide, int8, pruned
    parts = space.parts(space.decode(genome))
    assert {part.precision for part in parts} == set(PRECISIONS)
    for column, cost in enumerate(COSTS[:3]):
        fit = table.fits[cost]
        total = fit.per_net
        for part in parts:
            entry, group = table.entries[part.key], PRECISIONS.index(part.precision)
            value = {"latency_ms": entry.value, "latency_p95_ms": entry.timing.p95}.get(
                cost, part.weight_bytes / part.count
            )
            borders = fit.per_traffic[group] * part.traffic / 1e6 + fit.per_gmac[group] * part.macs / part.count / 1e9
            borders += fit.per_weight_mb[group] * part.weight_bytes / part.count / 1e6
            total += part.count * (fit.scale[group] * value + fit.per_part[group] + borders)
        assert estimator.price(genome)[0, column] == pytest.approx(total, rel=1e-12)
    assert estimator.price(genome)[0, 3:].tolist() == [sum(p.macs for p in parts), sum(p.params for p in parts)]


def test_without_a_correction_it_is_the_plain_sum() -> None:
    space = TinySpace()
    table = replace(synthetic_table(space), fits={"latency_ms": LinearFit()}, nets=[])
    estimator = AdditiveEstimator(space, table, ("latency_ms",))
    genomes = space.sample(np.random.default_rng(1), 50)
    for genome, price in zip(genomes, estimator.price(genomes), strict=True):
        parts = space.parts(space.decode(genome))
        assert price[0] == pytest.approx(sum(p.count * table.entries[p.key].value for p in parts), rel=1e-12)


def test_batches_do_not_matter() -> None:
    space = TinySpace()
    estimator = tiny_estimator(space)
    genomes = space.sample(np.random.default_rng(0), CHUNK + 5)
    together = estimator.price(genomes)
    np.testing.assert_array_equal(together[:3], np.concatenate([estimator.price(g) for g in genomes[:3]]))
    np.testing.assert_array_equal(together[CHUNK - 2 :], estimator.price(genomes[CHUNK - 2 :]))
    assert estimator.price(genomes[:0]).shape == (0, len(COSTS))


def test_costs_are_chosen_and_ordered_by_name() -> None:
    space = TinySpace()
    table = synthetic_table(space)
    genomes = space.sample(np.random.default_rng(0), 7)
    some = AdditiveEstimator(space, table, ("params", "latency_ms")).price(genomes)
    everything = AdditiveEstimator(space, table).price(genomes)
    np.testing.assert_array_equal(some, everything[:, [4, 0]])


def test_other_devices_are_further_costs() -> None:
    """This device's columns stay first and as they are; the others' follow under their own names."""
    space = TinySpace()
    own = AdditiveEstimator(space, synthetic_table(space, 0), ("latency_ms", "size_bytes"))
    pixel = AdditiveEstimator(space, synthetic_table(space, 1), ("latency_ms", "latency_p95_ms"))
    hub = AdditiveEstimator(space, synthetic_table(space, 2), ("latency_ms",))
    several = SeveralDevices(own, {"pixel": pixel, "hub-2": hub})
    assert several.costs == ("latency_ms", "size_bytes", "latency_ms@pixel", "latency_p95_ms@pixel", "latency_ms@hub-2")
    genomes = space.sample(np.random.default_rng(0), 20)
    parts = [estimator.price(genomes) for estimator in (own, pixel, hub)]
    np.testing.assert_array_equal(several.price(genomes), np.concatenate(parts, axis=1))
    assert several.price(genomes[0]).shape == (1, 5)
    named = dict(zip(several.costs, several.price(genomes[0])[0].tolist(), strict=True))
    assert elsewhere(named) == {name: value for name, value in named.items() if name not in own.costs}


def test_a_part_that_the_table_lacks() -> None:
    space = TinySpace()
    table = synthetic_table(space)
    key = sorted(table.entries)[0]
    poorer = replace(table, entries={k: e for k, e in table.entries.items() if k != key})
    with pytest.raises(
        TableError, match=f"lacks 1 of {len(table.entries)} parts, the first '{key}'; the nearest"
    ) as caught:
        AdditiveEstimator(space, poorer)
    assert "nas profile" in caught.value.remedy


def test_part_values() -> None:
    space = TinySpace()
    table = synthetic_table(space)
    part = space.parts(space.decode([0] * 8))[1]
    many = replace(part, count=5)
    for cost in COSTS[:3]:
        assert part_value(table, many, cost) == part_value(table, part, cost)
    assert part_value(table, many, "size_bytes") == 4 * part.params


def test_pricing_is_fast() -> None:
    """A generous bound; the figure that is claimed is measured by the benchmarks."""
    import time

    space = TinySpace()
    estimator = tiny_estimator(space)
    genomes = space.sample(np.random.default_rng(0), 100_000)
    start = time.perf_counter()
    estimator.price(genomes)
    assert time.perf_counter() - start < 2.0


def test_a_peak_is_the_largest_parts_and_no_sum() -> None:
    space = TinySpace()
    estimator = AdditiveEstimator(space, synthetic_table(space), ("latency_ms", "peak_bytes"))
    genomes = space.sample(np.random.default_rng(0), 100)
    prices = estimator.price(genomes)
    for genome, price in zip(genomes, prices, strict=True):
        parts = space.parts(space.decode(genome))
        assert price[1] == max(part.peak_bytes() for part in parts)
        np.testing.assert_allclose(price, estimator.price_slowly(space.decode(genome)), rtol=1e-12)
    assert all((site.costs[:, 1] == 0).all() for site in estimator.by_site())


def test_energy_is_summed_where_it_was_metered_and_refused_where_it_was_not() -> None:
    space = TinySpace()
    table = synthetic_table(space)
    with pytest.raises(TableError, match=r"has no energies: no meter here"):
        AdditiveEstimator(space, replace(table, energy="no meter here"), ("energy_mj",))
    metered = replace(table, entries={k: replace(e, energy_mj=2.0) for k, e in table.entries.items()})
    estimator = AdditiveEstimator(space, metered, ("energy_mj",))
    for genome in space.sample(np.random.default_rng(0), 20):
        parts = space.parts(space.decode(genome))
        assert estimator.price(genome)[0, 0] == 2.0 * sum(part.count for part in parts)


def test_no_correction_runs_through_zero() -> None:
    """A fit from large networks may take more from a small one than it has."""
    space = TinySpace()
    table = synthetic_table(space)
    absurd = replace(table, fits={**table.fits, "latency_ms": LinearFit(per_net=-100.0)})
    prices = AdditiveEstimator(space, absurd).price(space.sample(np.random.default_rng(0), 50))
    np.testing.assert_allclose(prices[:, 0], 0.1 * table.nets[0].measured_ms)
    assert (prices[:, :3] > 0).all()
