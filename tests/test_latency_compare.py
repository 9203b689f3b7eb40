"""Two tables beside each other: figures that can be worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers import TinySpace

from nas.errors import TableError
from nas.latency import AdditiveEstimator, LatencyTable
from nas.latency.compare import SWAPS, compare
from nas.latency.fit import LinearFit, spearman
from nas.latency.table import Entry, Net
from nas.space import Genomes
from nas.tabular import PublishedSpace
from nas.testing import synthetic_table

SPACE = TinySpace()
ORIGIN = {"source": "elsewhere", "licence": "MIT"}


def times(table: LatencyTable, factor: float) -> LatencyTable:
    entries = {key: replace(entry, value=factor * entry.value) for key, entry in table.entries.items()}
    return replace(table, entries=entries)


def with_nets(table: LatencyTable, measured: list[float]) -> LatencyTable:
    keys = list(table.entries)
    nets = [Net({keys[i]: 1, keys[i + 1]: 2}, ms, ms, 1.0, ms, ms) for i, ms in enumerate(measured)]
    return replace(table, nets=nets)


def test_a_table_beside_itself_twice_as_slow() -> None:
    table = with_nets(synthetic_table(SPACE), [0.3, 0.1, 0.2, 0.4])
    found = compare(table, times(table, 2.0), SPACE)
    assert (found.shared, found.only_a, found.only_b) == (len(table.entries), 0, 0)
    assert found.ratio == pytest.approx((2, 2, 2))
    assert found.spearman == pytest.approx(1)
    sums, measured, candidates = found.rankings
    assert sums.what == "calibration networks, sums of parts"
    assert (sums.nets, measured.nets, candidates.nets) == (4, 4, 1000)
    assert sums.ratio == pytest.approx((2, 2, 2))
    assert measured.ratio == pytest.approx((1, 1, 1))
    assert measured.what == "calibration networks, as measured"
    for ranking in (sums, measured):
        assert ranking.spearman == pytest.approx(1)
        assert ranking.swaps == ()


def test_candidates_are_priced_as_a_search_prices_them() -> None:
    a, b = synthetic_table(SPACE, 1), synthetic_table(SPACE, 2)
    ranking = compare(a, b, SPACE).rankings[-1]
    genomes = SPACE.sample(np.random.default_rng(0), 1000)
    prices = [AdditiveEstimator(SPACE, table).price(genomes)[:, 0] for table in (a, b)]
    assert ranking.spearman == pytest.approx(spearman(*prices))
    assert ranking.ratio[1] == pytest.approx(np.median(prices[1] / prices[0]))
    assert len(ranking.swaps) == SWAPS
    assert len({(swap.rank_a, swap.rank_b) for swap in ranking.swaps}) == SWAPS
    moved = [abs(swap.rank_a - swap.rank_b) for swap in ranking.swaps]
    assert moved == sorted(moved, reverse=True)
    furthest = ranking.swaps[0]
    i = int(furthest.network.removeprefix("candidate "))
    assert (furthest.ms_a, furthest.ms_b) == pytest.approx((prices[0][i], prices[1][i]))


def test_what_only_one_has() -> None:
    a, b = synthetic_table(SPACE, 1), synthetic_table(SPACE, 2)
    gone = [key for key in b.entries if key.startswith("int8")]
    some = replace(b, entries={key: entry for key, entry in b.entries.items() if key not in gone})
    found = compare(a, some, SPACE, n=50)
    assert (found.only_a, found.only_b) == (len(gone), 0)
    ranking = found.rankings[-1]
    assert ranking.what == "random candidates of tiny that both cover"
    assert ranking.nets == 50
    few = replace(b, entries=dict(list(b.entries.items())[:2]))
    with pytest.raises(TableError, match=r"lacks \d+ of \d+ parts"):
        compare(a, few, SPACE, n=50)


def test_nets_whose_parts_one_table_lacks_are_left_out() -> None:
    a = with_nets(synthetic_table(SPACE), [0.1, 0.2, 0.3, 0.4])
    first = next(iter(a.entries))
    b = replace(a, entries={key: entry for key, entry in a.entries.items() if key != first}, nets=[])
    (ranking,) = compare(a, b).rankings
    assert ranking.nets == 3


def test_tables_without_a_fit_are_summed() -> None:
    a = replace(synthetic_table(SPACE), fits={})
    ranking = compare(a, times(a, 3.0), SPACE).rankings[-1]
    assert ranking.ratio == pytest.approx((3, 3, 3))
    assert a.fits == {}
    fitted = replace(a, fits={"latency_ms": LinearFit()})
    assert compare(fitted, fitted, SPACE).rankings[-1].ratio == pytest.approx((1, 1, 1))


def test_imported_tables_are_compared_on_networks_of_their_format() -> None:
    from nas.latency.importers import ofa

    rng = np.random.default_rng(3)
    keys = {key for _ in range(1000) for key in ofa.random_net(rng)}
    one = synthetic_table(SPACE)
    timing = next(iter(one.entries.values())).timing
    tables = [
        replace(one, space=ofa.SPACE, origin=ORIGIN, nets=[], entries={k: Entry(timing, float(v)) for k, v in zip(
            sorted(keys), np.random.default_rng(seed).uniform(1, 2, len(keys)), strict=True)})
        for seed in (0, 1)
    ]  # fmt: skip
    (ranking,) = compare(*tables, n=100).rankings
    assert ranking.what == "random networks of ofa_mbv3, sums of blocks"
    assert ranking.nets == 100
    assert compare(tables[0], replace(tables[1], space="other")).rankings == ()
    assert compare(*(replace(t, space="unknown") for t in tables)).rankings == ()


def test_nothing_in_common() -> None:
    a = synthetic_table(SPACE)
    b = replace(a, entries={f"other {key}": entry for key, entry in a.entries.items()})
    with pytest.raises(TableError, match="share no part"):
        compare(a, b)


class Published(PublishedSpace):
    """No parts at all."""

    name, choices, costs = "published", SPACE.choices, ("latency_ms",)

    def quality(self, genomes: Genomes, fidelity: float = 1.0) -> np.ndarray:
        return np.zeros(len(genomes))

    def price(self, genomes: Genomes) -> np.ndarray:
        return np.zeros((len(genomes), 1))


def test_a_space_without_parts() -> None:
    a = synthetic_table(SPACE)
    with pytest.raises(TableError, match="has no parts"):
        compare(a, a, Published())
