"""A new device's table from other devices' tables and about ten measured parts or networks."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from nas.errors import TableError
from nas.latency.few_shot import Array, FewShot, Ints
from nas.latency.interpolate import family

if TYPE_CHECKING:
    from nas.latency.table import LatencyTable


def values(table: LatencyTable) -> dict[str, float]:
    """Part key → ms of a table: the form that this module takes."""
    return {key: entry.value for key, entry in table.entries.items()}


def suggest(known: Sequence[Mapping[str, float]], k: int, seed: int = 0) -> list[str]:
    """Keys of the ``k`` parts worth measuring on a new device, a function of the seed, the most telling one first.

    Args:
        known: part key → ms, of each known device.

    Raises:
        TableError: the tables share too few parts, or ``k`` is not 2..parts.
    """
    keys, columns = _shared(known)
    return [keys[row] for row in FewShot(columns, _families(keys), samples=k).choose(seed)]


def adapt_parts(known: Sequence[Mapping[str, float]], measured: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Costs on a new device of every part that all known devices have.

    Args:
        known: part key → ms, of each known device.
        measured: part key → ms on the new device, of at least two parts; about ten of :func:`suggest` do.

    Returns:
        Part key → (ms, relative standard deviation of a measurement of it), the measured ones included: what they
        become when the other parts and devices are heard as well.

    Raises:
        TableError: the tables share too few parts, a measured part is not among them, or a time is no time.
    """
    keys, columns = _shared(known)
    rows = _rows(keys, measured)
    adapted = FewShot(columns, _families(keys), samples=len(rows)).adapt(rows, list(measured.values()))
    return _by_key(keys, adapted.predicted, adapted.uncertainty)


def adapt_networks(
    known: Sequence[Mapping[str, float]], measured: Sequence[tuple[Mapping[str, int], float]]
) -> dict[str, tuple[float, float]]:
    """Costs on a new device of every part that all known devices have, where whole networks were measured.

    A network is a row like a part: what it takes on a known device is the sum of its parts' times there, and the model
    is linear, so that it says the same of a sum as of its terms.

    Args:
        known: part key → ms, of each known device.
        measured: (part key → how often the network has it, ms on the new device), of at least two networks.

    Returns:
        Part key → (ms, relative standard deviation).

    Raises:
        TableError: as :func:`adapt_parts`; or a network has no parts, or less than one of a part.
    """
    keys, columns = _shared(known)
    place = {key: row for row, key in enumerate(keys)}
    counts = np.zeros((len(measured), len(keys)))
    for network, (parts, _) in enumerate(measured):
        if not parts or min(parts.values()) < 1:
            raise TableError(
                f"Network {network} of the measured ones has no parts, or less than one of a part.",
                expected="part key → how often the network has it, at least 1",
            )
        _rows(keys, parts)
        for key, count in parts.items():
            counts[network, place[key]] = count
    # What a call costs whatever it runs is a network's and no part's.
    fixed = np.repeat([0.0, 1.0], [len(keys), len(measured)])
    model = FewShot(np.vstack([columns, counts @ columns]), samples=max(2, len(measured)), fixed=fixed)
    adapted = model.adapt(len(keys) + np.arange(len(measured)), [cost for _, cost in measured])
    return _by_key(keys, adapted.predicted[: len(keys)], adapted.uncertainty[: len(keys)])


def _shared(known: Sequence[Mapping[str, float]]) -> tuple[list[str], Array]:
    """Keys that all tables have, sorted, and their costs ``[keys, tables]``."""
    if not known:
        raise TableError("There is no known device.", expected="the table of at least one other device")
    keys = sorted(set.intersection(*(set(table) for table in known)))
    if len(keys) < 2:
        raise TableError(
            f"The tables of the {len(known)} known devices share {len(keys)} parts.",
            expected="tables of one search space",
            remedy="leave out the tables of other spaces",
        )
    return keys, np.array([[table[key] for table in known] for key in keys], dtype=np.float64)


def _families(keys: Sequence[str]) -> Ints:
    """What kind of part each is, ``[keys, 1]``: the same operators at one precision share what is new on a device."""
    kinds = [family(key) for key in keys]
    place = {kind: i for i, kind in enumerate(sorted(set(kinds)))}
    return np.array([[place[kind]] for kind in kinds])


def _rows(keys: Sequence[str], wanted: Mapping[str, float]) -> list[int]:
    place = {key: row for row, key in enumerate(keys)}
    missing = [key for key in wanted if key not in place]
    if missing:
        near = difflib.get_close_matches(missing[0], keys, n=1, cutoff=0.0)
        raise TableError(
            f"The known tables do not all have {len(missing)} of {len(wanted)} parts, the first {missing[0]!r}"
            + (f"; the nearest that they share is {near[0]!r}." if near else "."),
            remedy="measure parts that every known table has, or leave out the tables that lack them",
        )
    return [place[key] for key in wanted]


def _by_key(keys: Sequence[str], predicted: Array, uncertainty: Array) -> dict[str, tuple[float, float]]:
    return {key: (float(value), float(share)) for key, value, share in zip(keys, predicted, uncertainty, strict=True)}
