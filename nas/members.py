"""Members of a family that are alike throughout: the teachers on offer, and the teacher shrunk without a search.

For spaces whose choices are named by role after the last dot: ``bits`` and ``prune`` compress, ``kd_weight``,
``temperature``, ``feature_weight`` and ``attention_weight`` teach, all others make a model larger or smaller.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from nas.errors import SpaceError
from nas.genes import Candidate, Choice, Value
from nas.space import Training

TEACHING = ("kd_weight", "temperature", "feature_weight", "attention_weight")
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


def distillation_choices(
    kd_weights: Sequence[float],
    temperatures: Sequence[float],
    *,
    feature_weights: Sequence[float] = (0.0,),
    attention_weights: Sequence[float] = (0.0,),
) -> tuple[Choice, ...]:
    """The genes of the distillation that every family has, read by :func:`distilled`.

    ``kd_weight`` and ``temperature`` always; ``feature_weight`` and ``attention_weight`` where more than 0 is offered.

    Raises:
        SpaceError: a weight of features or attention is negative.
    """
    further = {"feature_weight": feature_weights, "attention_weight": attention_weights}
    for name, weights in further.items():
        if negative := [weight for weight in weights if not weight >= 0]:
            raise SpaceError(f"{name}s has {negative[0]}.", expected="weights of 0 or more")
    offered = {name: weights for name, weights in further.items() if list(weights) != [0]}
    return tuple(
        Choice(name, values, technique="distillation")
        for name, values in {"kd_weight": kd_weights, "temperature": temperatures, **offered}.items()
    )


def distilled(c: Candidate, *, offered: Collection[str]) -> Training:
    """The treatment that goes with :func:`distillation_choices`; the temperature is read where it matters.

    Args:
        offered: names of the space's choices.
    """
    kd_weight = float(c["kd_weight"])
    temperature = float(c["temperature"]) if kd_weight > 0 else 1.0
    features, attention = (float(c[w]) if w in offered else 0.0 for w in ("feature_weight", "attention_weight"))
    return Training(kd_weight, temperature, feature_weight=features, attention_weight=attention)
