"""One technique after the other: whose choices each phase searches, and which budgets it gets on the way down.

Architecture search, then pruning, then quantisation, as people chain tools (ProxylessNAS, AMC and HAQ in the comparison
of APQ, Wang et al. 2020): the best of each phase goes on, and what the following phases decide is not known to it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nas.errors import ExperimentError
from nas.latency import CostEstimator
from nas.reward import Limit
from nas.space import Genomes, SearchSpace, Value

#: Phase → the techniques whose choices it searches. Those of the distillation are free in all of them.
ORDER = {
    "architecture": ("architecture",),
    "pruning": ("pruning", "low_rank"),
    "quantization": ("quantization", "clustering"),
}
TEACHING = "distillation"
STARTS = 2_000


@dataclass(frozen=True)
class Phase:
    """One search of several in a row.

    Attributes:
        name: of :data:`ORDER`.
        columns: genes that it decides for good.
        bits: log₂ of the number of their combinations that may pay.
    """

    name: str
    columns: tuple[int, ...]
    bits: float


def phases_of(space: SearchSpace, masked: Collection[tuple[str, Value]] = ()) -> list[Phase]:
    """The phases that have something to choose, in their order.

    Args:
        masked: choice and value of what pays nowhere on this device: it does not count in the phases' bits.

    Raises:
        ExperimentError: there are fewer than two, or a compression choice has no plain value to wait at.
    """
    found = []
    for name, techniques in ORDER.items():
        columns = tuple(i for i, c in enumerate(space.choices) if c.technique in techniques and len(c.values) > 1)
        if columns:
            paying = [[v for v in c.values if (c.name, v) not in masked] for c in (space.choices[i] for i in columns)]
            found.append(Phase(name, columns, sum(math.log2(len(values)) for values in paying)))
    if len(found) < 2:
        only = f"only {found[0].name}" if found else "nothing"
        raise ExperimentError(
            f"Space {space.name!r} offers {only} to choose from, so there is no order to search in.",
            expected="choices of at least two of: architecture; pruning or low rank; quantisation or clustering",
            remedy="offer compression in the space, or leave sequential out of --arms",
        )
    waiting = [space.choices[i] for phase in found for i in phase.columns if phase.name != "architecture"]
    if without := [choice for choice in waiting if choice.plain is None]:
        raise ExperimentError(
            f"Choice {without[0].name!r} has no plain value, at which it could wait for its phase.",
            expected=f"its uncompressed value among {list(without[0].values)}",
            remedy="offer that value in the space, or leave sequential out of --arms",
        )
    return found


def teaching_columns(space: SearchSpace) -> tuple[int, ...]:
    """Genes of the distillation: free in every phase, as they are for every candidate of the joint search."""
    return tuple(i for i, choice in enumerate(space.choices) if choice.technique == TEACHING)


def share(seconds: float, left: Sequence[Phase], price: float | None, teaching: float) -> float:
    """Training seconds of the first of the phases that are ``left``: in proportion to their bits.

    A phase gets no more than it takes to train all that it can choose; the others get what it cannot use.

    Args:
        price: mean seconds of a training, where it is known.
        teaching: bits of the distillation's choices, which are free in every phase.
    """
    if not any(phase.bits for phase in left):
        return seconds
    waiting = {phase.name: phase.bits for phase in left}
    given: dict[str, float] = {}
    while True:
        each = {name: seconds * bits / sum(waiting.values()) for name, bits in waiting.items()}
        full = {name: (price or math.inf) * 2 ** (waiting[name] + teaching) for name in waiting}
        if not (served := {name: full[name] for name in waiting if full[name] < each[name]}):
            return (given | each)[left[0].name]
        given |= served
        seconds -= sum(served.values())
        waiting = {name: bits for name, bits in waiting.items() if name not in served}
        if not any(waiting.values()):
            return given.get(left[0].name, seconds)


def plain_genome(space: SearchSpace) -> Genomes:
    """Every compression choice at its plain value, every other at its first, ``[choices]``."""
    return np.array([0 if c.plain is None else c.index(c.plain) for c in space.choices], dtype=np.int64)


def lowest(estimator: CostEstimator, space: SearchSpace, genome: Genomes, columns: Sequence[int], cost: str) -> float:
    """The lowest predicted ``cost`` that ``columns`` can reach while the other genes are those of ``genome``.

    The best of :data:`STARTS` random settings, improved gene by gene until none helps: prices are free.
    """
    sizes, column = space.cardinalities, estimator.costs.index(cost)
    rows = np.tile(np.asarray(genome, dtype=np.int64), (STARTS, 1))
    rng = np.random.default_rng(0)
    rows[1:, list(columns)] = rng.integers(0, sizes[list(columns)], size=(STARTS - 1, len(columns)))
    prices = estimator.price(rows)[:, column]
    best, reached = rows[int(prices.argmin())], float(prices.min())
    improved = True
    while improved:
        improved = False
        for gene in columns:
            tried = np.tile(best, (int(sizes[gene]), 1))
            tried[:, gene] = np.arange(sizes[gene])
            prices = estimator.price(tried)[:, column]
            if float(prices.min()) < reached * (1 - 1e-9):
                best, reached, improved = tried[int(prices.argmin())], float(prices.min()), True
    return reached


def step(limit: float, start: float, after: float, finally_: float) -> float:
    """The budget of a phase on the way from ``start`` to ``limit``.

    On a logarithmic scale every phase goes the same share λ of the way that is open to it:
    t = start · (after / start)^λ with λ = ln(limit / start) / ln(finally / start). So a technique that can save much is
    asked for much, and the last phase ends at the limit.

    Args:
        limit: what the last phase has to meet.
        start: the cost before this phase.
        after: the lowest that can be reached with this phase's choices; ``finally_``: with those of all that are left.
    """
    if limit >= start or finally_ >= start:
        return limit
    share = min(1.0, math.log(limit / start) / math.log(finally_ / start))
    return max(limit, start * (after / start) ** share)


def budgets(
    limits: Sequence[Limit], margins: Mapping[str, float], start: Mapping[str, float], estimator: CostEstimator,
    space: SearchSpace, genome: Genomes, left: Sequence[Phase],
) -> tuple[Limit, ...]:  # fmt: skip
    """The limits of the first of the phases that are ``left``: a :func:`step` for every cost with a limit.

    Args:
        limits: of the last phase.
        margins: by how much limits are tightened for screening, by cost: the lowest limit that a prediction meets is
            that much above it.
        start: cost → what the best so far costs; for the first phase, the teacher.
        genome: the best so far.
    """
    if len(left) == 1:
        return tuple(limits)
    found = []
    for limit in limits:
        meets = 1 - margins[limit.cost]
        every = [column for phase in left for column in phase.columns]
        after = lowest(estimator, space, genome, left[0].columns, limit.cost) / meets
        finally_ = lowest(estimator, space, genome, every, limit.cost) / meets
        begin = start.get(limit.cost, max(after, limit.limit))  # of a device where the teacher was not measured
        found.append(Limit(limit.cost, step(limit.limit, begin, after, finally_)))
    return tuple(found)


def can_go_on(
    screen: Sequence[Limit], estimator: CostEstimator, space: SearchSpace, genome: Genomes, left: Sequence[Phase]
) -> bool:
    """Whether the phases that are left can bring a genome below every limit, by prediction."""
    columns = [column for phase in left for column in phase.columns]
    return all(lowest(estimator, space, genome, columns, limit.cost) <= limit.limit for limit in screen)
