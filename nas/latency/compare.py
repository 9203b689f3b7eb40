"""Two latency tables beside each other: what they share, how much apart they are, and how they rank networks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from nas.errors import TableError
from nas.latency.estimator import AdditiveEstimator
from nas.latency.fit import LinearFit, spearman
from nas.latency.importers import importers
from nas.latency.table import LatencyTable
from nas.space import SearchSpace

T = TypeVar("T")
Array = npt.NDArray[np.float64]
SWAPS = 5
FEW = 3  # fewer networks have no ranking to speak of
TRIES = 20  # candidates drawn for each that is wanted, where the tables cover only some of a space


@dataclass(frozen=True)
class Swap:
    """A network that the two tables rank differently; ranks count from the fastest, 1."""

    network: str
    rank_a: int
    rank_b: int
    ms_a: float
    ms_b: float


@dataclass(frozen=True)
class Ranking:
    """How the two rank a set of networks.

    Attributes:
        what: which networks, and how they were priced.
        nets: how many both cover.
        spearman: rank correlation of the two prices.
        ratio: quartiles of price in b / price in a.
        swaps: the networks that change their places most, the furthest first.
    """

    what: str
    nets: int
    spearman: float
    ratio: tuple[float, float, float]
    swaps: tuple[Swap, ...]


@dataclass(frozen=True)
class Comparison:
    """The whole of it; ``ratio`` and ``spearman`` are of the shared parts' values, b / a."""

    shared: int
    only_a: int
    only_b: int
    ratio: tuple[float, float, float]
    spearman: float
    rankings: tuple[Ranking, ...]


def compare(a: LatencyTable, b: LatencyTable, space: SearchSpace | None = None, n: int = 1000) -> Comparison:
    """Compare two tables part by part and network by network.

    Networks are the calibration networks of both, those of the format that both were imported from, and, with
    ``space``, up to ``n`` random candidates that both cover.

    Raises:
        TableError: the tables share no part.
    """
    shared = [key for key in a.entries if key in b.entries]
    if not shared:
        raise TableError(
            f"Tables {a.name!r} and {b.name!r} share no part: there is nothing to compare.",
            expected="two tables for the same parts, on different devices or of different days",
        )
    values_a, values_b = (np.array([table.entries[key].value for key in shared]) for table in (a, b))
    rankings = [*_calibration(a, b), *_imported(a, b, n)]
    if space is not None:
        rankings.append(_candidates(a, b, space, n))
    return Comparison(
        len(shared), len(a.entries) - len(shared), len(b.entries) - len(shared), _quartiles(values_b / values_a),
        spearman(values_a, values_b), tuple(rankings),
    )  # fmt: skip


def _calibration(a: LatencyTable, b: LatencyTable) -> list[Ranking]:
    """Both tables' own networks, as plain sums; where both measured the same ones, as measured too."""
    nets = {f"net {i} of {name}": net.parts for name, t in (("a", a), ("b", b)) for i, net in enumerate(t.nets)}
    distinct = {frozenset(parts.items()): label for label, parts in reversed(nets.items())}
    covered = {
        label: dict(parts)
        for parts, label in reversed(distinct.items())
        if parts and all(key in a.entries and key in b.entries for key, _ in parts)
    }
    found = []
    if len(covered) >= FEW:
        sums = (_sums(a, covered.values()), _sums(b, covered.values()))
        found.append(_ranking("calibration networks, sums of parts", list(covered), *sums))
    measured = [{frozenset(net.parts.items()): net.measured_ms for net in t.nets if net.parts} for t in (a, b)]
    both = [parts for parts in measured[0] if parts in measured[1]]
    if len(both) >= FEW:
        labels = [distinct[parts] for parts in both]
        times = (np.array([one[parts] for parts in both]) for one in measured)
        found.append(_ranking("calibration networks, as measured", labels, *times))
    return found


def _imported(a: LatencyTable, b: LatencyTable, n: int) -> list[Ranking]:
    """Random networks of the format that both tables come from."""
    if not (a.origin and b.origin and a.space == b.space):
        return []
    drawn = [importers.get(name).random_net for name in importers if importers.get(name).space == a.space]
    if not drawn:
        return []
    rng = np.random.default_rng(0)
    pool = (Counter(drawn[0](rng)) for _ in range(TRIES * n))
    nets = _covered(pool, lambda parts: all(key in a.entries and key in b.entries for key in parts), n)
    if len(nets) < FEW:
        return []
    labels = [f"random net {i}" for i in range(len(nets))]
    return [_ranking(f"random networks of {a.space}, sums of blocks", labels, _sums(a, nets), _sums(b, nets))]


def _candidates(a: LatencyTable, b: LatencyTable, space: SearchSpace, n: int) -> Ranking:
    """Random candidates, priced as a search would price them."""
    keys = list(space.keys())
    if not keys:
        raise TableError(f"Space {space.name!r} has no parts: its costs are published.", expected="a space of parts")
    rng = np.random.default_rng(0)
    lacking = next((table for table in (a, b) if table.missing(keys)), None)
    if lacking is None:
        genomes = space.sample(rng, n)
        whole = [AdditiveEstimator(space, t, ("latency_ms",)).price(genomes)[:, 0] for t in (a, b)]
        return _ranking(f"random candidates of {space.name}", _numbered(n), *whole)
    pool = (space.parts(space.decode(genome)) for genome in space.sample(rng, TRIES * n))
    nets = _covered(pool, lambda parts: all(p.key in a.entries and p.key in b.entries for p in parts), n)
    if len(nets) < FEW:
        raise lacking.lacks(lacking.missing(keys), len(keys), space.name)
    fits = [(table, table.fits.get("latency_ms", LinearFit())) for table in (a, b)]
    some = [np.array([fit.net((p, t.entries[p.key].value) for p in parts) for parts in nets]) for t, fit in fits]
    return _ranking(f"random candidates of {space.name} that both cover", _numbered(len(nets)), *some)


def _covered(drawn: Iterable[T], covers: Callable[[T], bool], n: int) -> list[T]:
    """The first ``n`` that are covered, of networks as they are drawn; gives up where none of the first ``n`` is."""
    found: list[T] = []
    for i, net in enumerate(drawn):
        if covers(net):
            found.append(net)
        if len(found) == n or (not found and i == n):
            break
    return found


def _numbered(n: int) -> list[str]:
    return [f"candidate {i}" for i in range(n)]


def _sums(table: LatencyTable, nets: Iterable[Mapping[str, int]]) -> Array:
    return np.array([sum(count * table.entries[key].value for key, count in parts.items()) for parts in nets])


def _ranking(what: str, labels: Sequence[str], a: Array, b: Array) -> Ranking:
    from scipy.stats import rankdata

    # Equal prices share a place: candidates that differ in nothing but their training are one network here.
    places = np.array([rankdata(values, method="min") for values in (a, b)], dtype=np.int64)
    swaps: dict[tuple[int, int], Swap] = {}
    for i in np.argsort(-np.abs(places[0] - places[1]), kind="stable"):
        at = (int(places[0, i]), int(places[1, i]))
        if at[0] == at[1] or len(swaps) == SWAPS:
            break
        swaps.setdefault(at, Swap(labels[i], *at, float(a[i]), float(b[i])))
    return Ranking(what, len(labels), spearman(a, b), _quartiles(b / a), tuple(swaps.values()))


def _quartiles(values: Array) -> tuple[float, float, float]:
    low, middle, high = np.percentile(values, [25, 50, 75])
    return float(low), float(middle), float(high)
