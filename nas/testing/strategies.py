"""The contract of a strategy: numbered, repeatable and distinct proposals, and a state that outcomes cannot break."""

from __future__ import annotations

import copy
import gc
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from nas.space import Genomes
from nas.strategies.base import (
    ASKED,
    COMPLETE,
    DUPLICATE,
    EARLIER,
    ENQUEUED,
    FAILED,
    SCREENED,
    Domain,
    Objective,
    Outcomes,
    Proposals,
    Strategy,
)
from nas.testing.require import require

Make = Callable[[Domain, int], Strategy]
EVERY = (COMPLETE, COMPLETE, FAILED, COMPLETE, SCREENED, COMPLETE, DUPLICATE)
BYTES_PER_ASK = 8.0


def check_strategy(make: Make, *, asks: int = 20_000) -> None:
    """Check a strategy on domains with ordered, dormant, single-valued and masked genes, with and without known prices.

    Proposals are numbered, in range and repaired; they are a function of the seed and of the calls before; those of a
    batch differ, as canonical genomes or in fidelity, from each other and from all that is under way, and telling
    releases them; outcomes without a reward, from elsewhere, or none at all are taken, and left as they are; memory
    does not grow.

    Args:
        make: ``(domain, seed)`` → a fresh strategy.
        asks: candidates asked for, all of them ruled out by their costs, while memory is watched; 0 leaves it out.

    Raises:
        AssertionError: names the clause that is broken and the domain.
    """
    for name, world in _worlds().items():
        where = f"domain with {name}"
        _check_proposals(make, world, where)
        _check_repeatable(make, world, where)
        _check_distinct(make, world, where)
        _check_tolerance(make, world, where)
    if asks:
        _check_memory(make, asks)


@dataclass(frozen=True)
class _World:
    """A domain, the costs that outcomes show there, and made-up qualities, a function of the genomes alone."""

    domain: Domain
    costs: Callable[[Genomes], npt.NDArray[np.float64]]
    dormant: bool

    def judge(self, proposals: Proposals, statuses: tuple[str, ...] = EVERY, source: str = ASKED) -> Outcomes:
        """Outcomes whose statuses take turns by number."""
        n = len(proposals.index)
        status = np.array([statuses[int(i) % len(statuses)] for i in proposals.index], dtype="U10")
        scored = np.isin(status, (COMPLETE, DUPLICATE))
        used = self.domain.canonical(proposals.genomes)
        quality = np.where(scored, 0.5 + 0.5 * np.sin(used @ (1 / np.arange(1, used.shape[1] + 1))), np.nan)
        return Outcomes(
            index=proposals.index.copy(),
            genomes=proposals.genomes.copy(),
            quality=quality,
            costs=self.costs(proposals.genomes),
            violation=np.where(status == SCREENED, 0.3, 0.0),
            reward=np.where(scored, quality - 0.001 * used.sum(axis=1), np.nan),
            fidelity=proposals.fidelity.copy(),
            status=status,
            source=np.full(n, source),
        )


def _worlds() -> dict[str, _World]:
    def by_depth(genomes: Genomes) -> npt.NDArray[np.bool_]:
        mask = np.arange(genomes.shape[1])[None] <= 2 * genomes[:, :1] + 1
        mask[:, 0] = True
        return np.asarray(mask)

    def masked(genomes: Genomes) -> Genomes:
        """The third gene is 0 wherever the first is odd; the fifth keeps its lower values only."""
        repaired = np.array(genomes, dtype=np.int64)
        repaired[:, 2] *= repaired[:, 0] % 2 == 0
        repaired[:, 4] *= repaired[:, 4] < 2
        return repaired

    def world(
        sizes: list[int], shown: int, budget: float | None = None, dormant: bool = False, repaired: bool = False
    ) -> _World:
        cardinalities = np.array(sizes, dtype=np.int64)
        ordered = np.arange(len(sizes)) % 2 == 0
        plain = Domain(cardinalities, ordered, by_depth) if dormant else Domain(cardinalities, ordered)

        def costs(genomes: Genomes) -> npt.NDArray[np.float64]:
            total = 1.0 + plain.canonical(genomes).sum(axis=1, keepdims=True).astype(np.float64)
            return np.tile(total, (1, shown))

        if budget is None:
            return _World(plain, costs, dormant)
        limit = 1.0 + budget * float((cardinalities - 1).sum())
        objective = Objective(
            costs=tuple(f"cost{i}" for i in range(shown)),
            price=costs,
            violation=lambda c: np.maximum(c[:, 0] / limit - 1.0, 0.0),
            reward=lambda quality, c: quality - 0.001 * c[:, 0],
        )
        known = Domain(cardinalities, ordered, plain.active, np.arange(len(sizes)), objective)
        return _World(replace(known, repair=masked) if repaired else known, costs, dormant)

    return {
        "all genes active": world([4, 3, 5, 2, 4, 3, 6, 2], shown=1),
        "single-valued genes and no costs": world([1, 6, 1, 1, 5, 7, 4, 1], shown=0),
        "one gene": world([400], shown=2),
        "dormant genes": world([4, 3, 5, 2, 4, 1, 6, 3], shown=1, dormant=True),
        "known prices and dormant genes": world([4, 3, 5, 2, 4, 1, 6, 3], shown=2, budget=0.6, dormant=True),
        "masked values": world([4, 3, 5, 2, 4, 1, 6, 3], shown=2, budget=0.6, dormant=True, repaired=True),
    }


def _same(a: Proposals, b: Proposals) -> bool:
    return all(np.array_equal(getattr(a, part), getattr(b, part)) for part in ("index", "genomes", "fidelity"))


def _check_proposals(make: Make, world: _World, where: str) -> None:
    strategy, asked = make(world.domain, 0), 0
    for n in (1, 4, 0, 3, 8, 12, 4):
        proposals = strategy.ask(n)
        _require_valid(proposals, asked, n, world.domain, where)
        strategy.tell(world.judge(proposals))
        asked += n


def _require_valid(proposals: Proposals, first: int, n: int, domain: Domain, where: str) -> None:
    genomes, fidelity = proposals.genomes, proposals.fidelity
    require(
        np.array_equal(proposals.index, np.arange(first, first + n)),
        f"{where}: ask({n}) after {first} numbers its proposals {proposals.index}.",
    )
    shape = (n, len(domain.cardinalities))
    require(genomes.shape == shape, f"{where}: genomes of shape {genomes.shape} instead of {shape}.")
    require(np.issubdtype(genomes.dtype, np.integer), f"{where}: genomes of type {genomes.dtype}, not integers.")
    require(
        bool(((genomes >= 0) & (genomes < domain.cardinalities)).all()), f"{where}: a gene is out of range: {genomes}."
    )
    repaired = domain.repair(genomes)
    require(
        np.array_equal(repaired, genomes),
        f"{where}: {genomes.tolist()} is proposed, whose repair is {repaired.tolist()}.",
    )
    require(
        fidelity.shape == (n,) and bool(((fidelity > 0) & (fidelity <= 1)).all()),
        f"{where}: fidelity {fidelity}, not in (0, 1].",
    )


def _check_repeatable(make: Make, world: _World, where: str) -> None:
    """The same calls give the same proposals: side by side, and once more from the start as a resumed search does."""
    first, second = make(world.domain, 5), make(world.domain, 5)
    history: list[tuple[Proposals, Outcomes]] = []
    for n in (4, 1, 8, 16, 8, 4):  # beyond the random beginnings of most strategies
        asked = first.ask(n)
        np.random.seed(int(asked.index[0]))  # noqa: NPY002 - the global generator is what must not matter
        twin = second.ask(n)
        require(
            _same(asked, twin), f"{where}: told the same, two instances propose {asked.genomes} and {twin.genomes}."
        )
        outcomes = world.judge(asked)
        kept = copy.deepcopy(outcomes)
        history.append((copy.deepcopy(asked), kept))
        for strategy in (first, second):
            strategy.tell(outcomes)
        for part in vars(kept):
            same = np.array_equal(getattr(kept, part), getattr(outcomes, part), equal_nan=part in ("quality", "reward"))
            require(same, f"{where}: tell changes the outcomes' {part!r} in place.")
        asked.genomes[:] = 0  # both are the caller's, to do with as it likes
        outcomes.genomes[:] = 0
    resumed = make(world.domain, 5)
    for asked, outcomes in history:
        again = resumed.ask(len(asked.index))
        require(
            _same(asked, again),
            f"{where}: a fresh instance with the same history proposes {again.genomes}, not {asked.genomes}.",
        )
        resumed.tell(outcomes)
    other = make(world.domain, 6).ask(12).genomes
    require(
        not np.array_equal(make(world.domain, 5).ask(12).genomes, other),
        f"{where}: two seeds propose the same genomes.",
    )


def _check_distinct(make: Make, world: _World, where: str) -> None:
    """Nothing is proposed twice while it is under way; what is told, whatever became of it, is under way no more."""
    strategy = make(world.domain, 9)
    for lessons in (0, 6):
        for _ in range(lessons):
            strategy.tell(world.judge(strategy.ask(4)))
        waiting = [strategy.ask(4) for _ in range(3)]
        genomes = world.domain.canonical(np.concatenate([p.genomes for p in waiting]))
        told_apart = np.column_stack([genomes, np.concatenate([p.fidelity for p in waiting])])
        # A policy that has settled on few layers has few genomes left, so that is asked of a fresh one only.
        require(
            len(np.unique(told_apart, axis=0)) == len(genomes) or bool(lessons and world.dormant),
            f"{where}, after {4 * lessons} outcomes: a genome is proposed while it is under way: {genomes.tolist()}.",
        )
        require(
            _rows(strategy.pending) == _rows(genomes), f"{where}: pending is {strategy.pending}, asked for {genomes}."
        )
        strategy.tell(world.judge(waiting[1], (SCREENED, COMPLETE, FAILED)))
        left = np.concatenate([waiting[0].genomes, waiting[2].genomes])
        require(
            _rows(strategy.pending) == _rows(world.domain.canonical(left)),
            f"{where}: pending is {strategy.pending} after the second of three batches was told.",
        )
        for proposals in (waiting[2], waiting[0]):
            strategy.tell(world.judge(proposals))
        require(not len(strategy.pending), f"{where}: pending is {strategy.pending} when everything was told.")


def _rows(genomes: Genomes) -> list[list[int]]:
    return sorted(genomes.tolist())


def _check_tolerance(make: Make, world: _World, where: str) -> None:
    """Outcomes without a reward, and outcomes that this strategy never asked for."""
    strategy = make(world.domain, 7)
    foreign = make(world.domain, 8).ask(6)
    strategy.tell(world.judge(foreign, (COMPLETE, FAILED), EARLIER))
    for status in (FAILED, SCREENED, DUPLICATE):
        strategy.tell(world.judge(strategy.ask(4), (status,)))
    strategy.tell(world.judge(foreign, (COMPLETE, SCREENED), ENQUEUED))
    strategy.tell(world.judge(Proposals(foreign.index[:0], foreign.genomes[:0], foreign.fidelity[:0])))
    for _ in range(4):
        strategy.tell(world.judge(strategy.ask(8), (FAILED, SCREENED)))
    where = f"{where}, after outcomes without a reward and from elsewhere"
    _require_valid(strategy.ask(4), 44, 4, world.domain, where)


def _check_memory(make: Make, asks: int) -> None:
    """What is ruled out by its costs is forgotten: a search asks for millions of candidates and trains few."""
    batch = 100
    world = _worlds()["known prices and dormant genes"]  # where prices are unknown, budgets may have to be learnt
    strategy = make(world.domain, 1)

    def grow(until: int) -> int:
        for _ in range(until // batch):
            strategy.tell(world.judge(strategy.ask(batch), (SCREENED,)))
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracing = tracemalloc.is_tracing()
    tracemalloc.start()
    try:
        before = grow(asks // 4)
        grown = grow(asks - asks // 4) - before
    finally:
        if not tracing:
            tracemalloc.stop()
    limit = BYTES_PER_ASK * asks
    require(grown <= limit, f"{asks} candidates, all screened, leave {grown} bytes behind; memory must not grow.")
