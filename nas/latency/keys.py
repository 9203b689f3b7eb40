"""Keys of latency tables: which one is most like another, quickly among thousands."""

from __future__ import annotations

import difflib
import heapq
import math
import re
from collections.abc import Iterable

SHORT_LIST = 24


def nearest(key: str, among: Iterable[str]) -> str | None:
    """The key of ``among`` that is most like ``key``; None where there is none.

    Of keys with the same words, the one whose numbers (sizes, channels, kernels) have the smallest ratios to those
    asked for. Where no key has the same words, the most similar text; difflib only sees the keys that share most
    words, because on thousands of long ones it takes seconds.
    """
    among = list(among)
    words, numbers = _parts(key)
    alike = [(other, found[1]) for other in among if (found := _parts(other))[0] == words]
    if alike:
        return min(alike, key=lambda pair: _distance(numbers, pair[1]))[0]
    wanted = frozenset(words)

    def likeness(other: str) -> tuple[float, float]:
        its_words, its_numbers = _parts(other)
        return _shared(wanted, frozenset(its_words)), -_distance(numbers, its_numbers)

    close = heapq.nlargest(SHORT_LIST, among, key=likeness)
    return max(close, key=lambda other: difflib.SequenceMatcher(None, other, key, autojunk=False).ratio(), default=None)


def _parts(key: str) -> tuple[list[str], list[int]]:
    """The words of a key and, apart, its numbers, both in order."""
    return re.findall(r"[^\W\d]+", key), [int(n) for n in re.findall(r"\d+", key)]


def _distance(a: list[int], b: list[int]) -> float:
    missing = abs(len(a) - len(b)) * math.log(10)
    return missing + sum(abs(math.log((x + 1) / (y + 1))) for x, y in zip(a, b, strict=False))


def _shared(wanted: frozenset[str], other: frozenset[str]) -> float:
    return len(wanted & other) / len(wanted | other) if wanted or other else 0.0
