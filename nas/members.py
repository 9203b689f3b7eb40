"""Members of a family that are alike throughout: the teachers on offer, and the teacher shrunk without a search.

For spaces whose choices are named by role after the last dot: ``bits`` and ``prune`` compress, ``kd_weight`` and
``temperature`` teach, all others make a model larger or smaller.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from nas.genes import Candidate, Choice, Value

TEACHING = ("kd_weight", "temperature")
LEVELS, STEPS = (0.0, 0.5, 1.0), 12


def ladder(choices: Sequence[Choice], falling: Collection[str] = ()) -> list[Candidate]:
    """The plain members with every size choice at its smallest, middle and largest value.

    Args:
        falling: names of choices whose larger values make smaller models.
    """
    plain: dict[str, Value] = {"bits": max(_offered(choices, "bits")), "prune": min(_offered(choices, "prune"))}
    return _distinct(_member(choices, level, plain, falling) for level in LEVELS)


def uniform(choices: Sequence[Choice], falling: Collection[str] = ()) -> list[Candidate]:
    """Every uniform level with the fewest bits, pruned or not: what people do to a teacher by hand."""
    bits, levels = min(_offered(choices, "bits")), [i / STEPS for i in range(STEPS + 1)]
    return _distinct(
        _member(choices, level, {"bits": bits, "prune": prune}, falling)
        for level in levels for prune in _offered(choices, "prune")
    )  # fmt: skip


def _offered(choices: Sequence[Choice], role: str) -> list[Any]:
    """The values of the first choice in that role: all of one role offer the same."""
    return list(next(choice.values for choice in choices if choice.name.endswith(f".{role}")))


def _member(
    choices: Sequence[Choice], level: float, compression: Mapping[str, Value], falling: Collection[str]
) -> Candidate:
    values: dict[str, Value] = {}
    for choice in choices:
        role, last = choice.name.rpartition(".")[2], len(choice.values) - 1
        if role in compression:
            values[choice.name] = compression[role]
        elif role in TEACHING:
            values[choice.name] = choice.values[len(choice.values) // 2]
        else:
            place = 1 - level if choice.name in falling else level
            values[choice.name] = choice.values[int(place * last + 0.5)]
    return Candidate(values)


def _distinct(candidates: Iterable[Candidate]) -> list[Candidate]:
    return list({tuple(c.as_dict().items()): c for c in candidates}.values())


def distillation_choices(kd_weights: Sequence[float], temperatures: Sequence[float]) -> tuple[Choice, Choice]:
    """The genes of the distillation that every family has: ``kd_weight`` and ``temperature``."""
    return (
        Choice("kd_weight", kd_weights, technique="distillation"),
        Choice("temperature", temperatures, technique="distillation"),
    )
