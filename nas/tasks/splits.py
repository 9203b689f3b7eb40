"""Stratified, seeded cuts of labelled data."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Index = npt.NDArray[np.int64]


def allocate(counts: npt.NDArray[np.int64], total: int, least: int = 1, reserve: int = 0) -> npt.NDArray[np.int64]:
    """How many of each class to take, ``[classes]``: in proportion, at least ``least``, ``reserve`` of each left over.

    The sum is ``total``, or the nearest that those two bounds allow.
    """
    room = counts - least - reserve
    extra = min(max(total - least * len(counts), 0), int(room.sum()))
    if extra == 0:
        return np.full(len(counts), least, dtype=np.int64)
    quota = room * (extra / room.sum())
    taken = np.floor(quota).astype(np.int64)
    # Largest remainders; a stable sort makes ties go to the smaller label on every machine.
    order = np.argsort(taken - quota, kind="stable")
    open_ = order[taken[order] < room[order]]
    taken[open_[: extra - int(taken.sum())]] += 1
    taken += least
    return taken


def cut(
    y: Index, index: Index, total: int, rng: np.random.Generator, *, least: int = 1, reserve: int = 0
) -> tuple[Index, Index]:
    """Cut about ``total`` of the samples ``index`` off, every class in proportion; (taken, rest), both shuffled.

    Args:
        y: labels ``[n]`` of the whole data.
        index: the samples to choose from, at least ``least + reserve`` of each class that occurs in them.
        total: how many to take.
        rng: decides which.
        least: how many of each class must be taken.
        reserve: how many of each class must be left.
    """
    present, counts = np.unique(y[index], return_counts=True)
    taken, rest = [], []
    for label, count in zip(present, allocate(counts, total, least, reserve), strict=True):
        members = rng.permutation(index[y[index] == label])
        taken.append(members[:count])
        rest.append(members[count:])
    return rng.permutation(np.concatenate(taken)), rng.permutation(np.concatenate(rest))
