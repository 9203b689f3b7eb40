"""Stratified, seeded cuts of labelled data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nas.errors import DataError, ExperimentError

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


@dataclass(frozen=True)
class Shares:
    """How labelled data are cut.

    Attributes:
        seed: decides which samples go where.
        valid: share for validation, of all samples or, where the data bring a test split, of the others.
        test: share for the test.
        limit: at most so many samples for training and validation together.
    """

    seed: int
    valid: float
    test: float
    limit: int | None = None


def three_way(
    y: Index, classes: Sequence[str], where: str, shares: Shares, *, own_valid: bool = False, own_test: bool = False
) -> tuple[Index, Index, Index]:
    """Samples of train, valid and test, every class in proportion; none for a split that the data bring themselves.

    Args:
        y: labels ``[n]`` of the samples that are to be cut.
        where: names the data in errors.

    Raises:
        DataError: a class has too few samples.
        ExperimentError: the shares leave nothing to train on.
    """
    everything, nothing = np.arange(len(y)), np.arange(0)
    needed = 3 - own_valid - own_test
    counts = np.bincount(y, minlength=len(classes))
    if counts.min() < needed:
        rare = int(counts.argmin())
        raise DataError(
            f"{where}: class {classes[rare]!r} has {int(counts[rare])} samples.",
            expected=f"at least {needed} of every class, one for each of {needed} splits",
            remedy="collect more of it, or leave the class out",
        )
    if needed == 3 and shares.valid + shares.test >= 1:
        raise ExperimentError(
            f"valid and test are {shares.valid} and {shares.test}: nothing is left to train on.",
            expected="a sum below 1",
        )
    valid = shares.valid
    if own_test:
        test, rest = nothing, everything
    else:
        total = round(shares.test * len(everything))
        test, rest = cut(y, everything, total, _rng(shares.seed, 0), reserve=2 - own_valid)
        valid *= len(everything) / len(rest)  # a share of all, now of what the test has left over
    if shares.limit is not None and shares.limit < len(rest):
        least = 2 - own_valid
        _check_limit("limit", shares.limit, least * len(counts), where)
        rest, _ = cut(y, rest, shares.limit, _rng(shares.seed, 1), least=least)
    if own_valid:
        return rest, nothing, test
    valid_, train = cut(y, rest, round(valid * len(rest)), _rng(shares.seed, 2), reserve=1)
    return train, valid_, test


def limited(y: Index, test: Index, limit: int | None, where: str, seed: int) -> Index:
    """At most ``limit`` of the samples ``test``, every class of theirs in proportion."""
    if limit is None or limit >= len(test):
        return test
    _check_limit("limit_test", limit, len(np.unique(y[test])), where)
    taken, _ = cut(y, test, limit, _rng(seed, 3))
    return taken


def _check_limit(name: str, limit: int, least: int, where: str) -> None:
    if limit < least:
        raise DataError(
            f"{where}: {name} is {limit}.", expected=f"at least {least}: one of every class for each split cut from it"
        )


def _rng(seed: int, purpose: int) -> np.random.Generator:
    # One stream per cut: the test split stays the same whatever limit and valid are.
    return np.random.default_rng((seed, purpose))
