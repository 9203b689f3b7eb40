"""Mutation, crossover and screening of genome matrices: what every evolutionary strategy shares."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from nas.space import Genomes
from nas.strategies.base import Domain
from nas.strategies.draws import Draws

NEIGHBOUR = 0.5
AGAIN = 0.3
TRIES = 8


def vary(first: Genomes, second: Genomes, draws: Draws, domain: Domain, mating: float) -> Genomes:
    """Children ``[n, choices]``: with probability ``mating`` a crossover of both parents, else the first, mutated.

    One gene is mutated, and three times in ten another: a single change cannot leave where every neighbour is known.
    Children are repaired; one that a repair turns back into a parent is mutated again, up to eight times.
    """
    children = first
    if mating > 0:
        mated = draws.uniform(1) < mating
        children = np.where(mated, crossover(first, second, draws, domain), first)
    children = mutate(children, draws, domain)
    again = np.flatnonzero(draws.uniform(1)[:, 0] < AGAIN)
    children[again] = mutate(children[again], draws.rows(again), domain)
    return _unlike(first, second, domain.repair(children), draws, domain) if domain.repairs else children


def _unlike(first: Genomes, second: Genomes, children: Genomes, draws: Draws, domain: Domain) -> Genomes:
    """The repaired ``children``, those that equal a parent mutated anew."""
    left = np.arange(len(children))
    for _ in range(TRIES):
        same = (children[left] == first[left]).all(axis=1) | (children[left] == second[left]).all(axis=1)
        left, draws = left[same], draws.rows(np.flatnonzero(same))
        if not len(left):
            break
        children[left] = domain.repair(mutate(children[left], draws, domain))
    return children


def mutate(parents: Genomes, draws: Draws, domain: Domain) -> Genomes:
    """Children ``[n, choices]`` that differ from their parents in exactly one gene, one that is not dormant.

    An ordered choice moves to a neighbouring value half of the time; any other value is as likely as the next.
    Where every choice has one value, the children are their parents.
    """
    n, sizes = len(parents), domain.cardinalities
    movable = np.broadcast_to(sizes > 1, parents.shape)
    eligible = movable & domain.active(parents)
    eligible = np.where(eligible.any(axis=1, keepdims=True), eligible, movable)
    gene = pick_true(eligible, draws.uniform(1)[:, 0])
    rows = np.arange(n)
    value, size = parents[rows, gene], sizes[gene]
    how, near, far = draws.uniform(3).T
    # Any other value: a jump of 1..size−1 around the circle. A neighbour: up or down, inwards at the ends.
    anywhere = (value + 1 + (far * (size - 1)).astype(np.int64)) % size
    step = np.where(near < 0.5, -1, 1)
    step = np.where(value == 0, 1, np.where(value == size - 1, -1, step))
    nearby = domain.ordered[gene] & (size > 1) & (how < NEIGHBOUR)
    children = parents.copy()
    children[rows, gene] = np.where(nearby, value + step, anywhere)
    return children


def crossover(first: Genomes, second: Genomes, draws: Draws, domain: Domain) -> Genomes:
    """Uniform crossover: each gene from either parent; an ordered one lies anywhere between them half of the time."""
    d = first.shape[1]
    child = np.where(draws.uniform(d) < 0.5, first, second)
    if domain.ordered.any():
        low, high = np.minimum(first, second), np.maximum(first, second)
        between = low + (draws.uniform(d) * (high - low + 1)).astype(np.int64)
        child = np.where(domain.ordered & (draws.uniform(d) < 0.5), between, child)
    return child


def affordable(draw: Callable[[Draws], Genomes], draws: Draws, domain: Domain) -> Genomes:
    """What ``draw`` gives, repaired, drawn again up to eight times where the known costs break a budget.

    Where nothing is known beforehand, or where no try is feasible, the least violating one is returned: whoever
    evaluates rules it out, which costs no training either.
    """
    genomes, objective = domain.repair(draw(draws)), domain.objective
    if objective is None:
        return genomes
    genomes = genomes.copy()
    violation = objective.violation(objective.price(genomes))
    left = np.flatnonzero(violation > 0)
    draws = draws.rows(left)
    for _ in range(TRIES):
        if not len(left):
            break
        tried = domain.repair(draw(draws))
        found = objective.violation(objective.price(tried))
        better = found < violation[left]
        genomes[left[better]], violation[left[better]] = tried[better], found[better]
        still = np.flatnonzero(violation[left] > 0)
        left, draws = left[still], draws.rows(still)
    return genomes


def uniform(domain: Domain) -> Callable[[Draws], Genomes]:
    """Draws every gene uniformly."""
    return lambda draws: draws.integers(domain.cardinalities)


def pick_true(mask: npt.NDArray[np.bool_], uniform: npt.NDArray[np.float64]) -> Genomes:
    """Column of a uniformly chosen true entry of each row of ``mask [n, d]``, by numbers ``uniform [n]`` in [0, 1)."""
    ranks = np.cumsum(mask, axis=1)
    wanted = (uniform * ranks[:, -1]).astype(np.int64) + 1
    return np.asarray((ranks >= wanted[:, None]).argmax(axis=1))
