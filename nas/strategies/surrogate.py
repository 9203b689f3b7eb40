"""Surrogate assistance: another strategy searches a model of the quality between real evaluations."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from nas.errors import ExperimentError
from nas.settings import construct
from nas.space import Genomes
from nas.strategies.base import (
    ASKED,
    COMPLETE,
    EARLIER,
    ENQUEUED,
    FAILED,
    SCREENED,
    Domain,
    Outcomes,
    Proposals,
    Strategy,
    strategies,
)  # fmt: skip
from nas.strategies.draws import Draws
from nas.strategies.quality_model import Archive, Foresight, Pool, QualityModel
from nas.strategies.variation import mutate

Array = npt.NDArray[np.float64]
ENUMERABLE = 20_000
REFIT = 1.15
SAMPLE, BATCH, ELITE, SHORTLIST = 2_000, 100, 50, 300
QUEUE = 0.02
# A model answers thousands: what suits a hundred trainings is small for it.
LARGE: dict[str, dict[str, Any]] = {"evolution": {"population": 100, "sample": 25}}


class Surrogate(Strategy):
    """Bayesian optimisation with a Gaussian process of the quality; costs are known and therefore not modelled.

    The process (:mod:`nas.strategies.gaussian_process`) is fitted to the warped qualities of what was evaluated. At
    its exact cost, a candidate must reach a certain quality to be rewarded as the best so far is; it is worth the
    improvement on that quality that is expected of it (Jones, Schonlau & Welch 1998). So any reward that rises with
    the quality will do. What breaks a budget is out. Proposals of one batch, and what is under way, count as known
    with the quality expected of them while the next is chosen (kriging believer, Ginsbourger et al. 2010).

    Spaces of up to 20,000 genomes are searched exhaustively. In larger ones a fresh instance of the wrapped strategy
    searches: it is told the best candidates so far and then the model's word on thousands. One such search serves
    2 % as many proposals as there are outcomes, so that its cost per proposal falls as they grow.

    Outcomes of earlier searches are modelled by a process of their own; what it predicts is one more thing known of
    a candidate beforehand, which counts as much as the new outcomes bear it out. A failed candidate counts as the
    worst quality seen. Only full trainings are modelled. Without a ``domain.objective`` the reward itself is modelled,
    and what breaks a budget counts as failed.

    Args:
        inner: the strategy that searches the model (``surrogate:NAME`` sets it).
        settings: of the wrapped strategy; by default evolution has Real et al.'s population of 100 and sample of 25,
            because a model answers thousands, and others have their own.
        initial: random candidates to begin with, feasible where prices are known.
        steps: candidates that the wrapped strategy may ask the model about, for each search.
        memory: most outcomes that the process is fitted to: the best half, and the latest.
    """

    def __init__(
        self,
        domain: Domain,
        seed: int = 0,
        *,
        inner: str = "evolution",
        settings: dict[str, Any] | None = None,
        initial: int = 10,
        steps: int = 3_000,
        memory: int = 1_000,
    ) -> None:
        super().__init__(domain, seed)
        if initial < 2 or steps < 1 or memory < 10:
            raise ExperimentError(
                f"strategy: initial {initial}, steps {steps}, memory {memory}.",
                expected="initial ≥ 2, steps ≥ 1, memory ≥ 10",
            )
        self.inner, self.settings = strategies.get(inner), dict(LARGE.get(inner, {}) if settings is None else settings)
        self.initial, self.steps, self.memory = initial, steps, memory
        self._inner(domain, seed)  # settings that it refuses are said at once
        self.archive = Archive(len(domain.cardinalities))
        self._earlier: list[Outcomes] = []
        self._known: Foresight | None = None
        self._whole: Pool | None = None
        self._model: QualityModel | None = None
        self._fitted_at = 0
        self._queue: list[Genomes] = []

    def _inner(self, domain: Domain, seed: int) -> Strategy:
        return construct(self.inner, self.settings, domain, seed, where="strategy.settings")

    # ---- telling ------------------------------------------------------------------------------

    def learn(self, outcomes: Outcomes) -> None:
        earlier = outcomes.source == EARLIER
        if (earlier & outcomes.scored).any():
            self._earlier.append(outcomes.rows(earlier & outcomes.scored))
            self._model = self._known = self._whole = None
        rows = ((outcomes.status == FAILED) | outcomes.scored) & (outcomes.fidelity >= 1)
        values = np.where(outcomes.scored, outcomes.quality, np.nan)
        if self.domain.objective is None:
            # Budgets are as unknown as the rest: what breaks one is as bad as what fails.
            rows |= outcomes.status == SCREENED
            values = np.where(outcomes.scored & (outcomes.violation <= 0), outcomes.reward, np.nan)
        rows &= ~earlier
        if rows.any():
            self.archive.add(self.domain.canonical(outcomes.genomes[rows]), values[rows])

    # ---- asking -------------------------------------------------------------------------------

    def propose(self, draws: Draws) -> Genomes:
        known = len(self.archive) + len(self._waiting)
        random = min(len(draws), max(0, self.initial - known)) if self.archive.succeeded >= 2 else len(draws)
        if draws.attempt:
            random = len(draws)  # repeats something under way: the space may be nearly exhausted
        chosen = [*self._random(draws.generator(), random)]
        if random < len(draws):
            chosen += self._choose(self._updated(), len(draws) - random, draws)
        return np.array(chosen, dtype=np.int64).reshape(len(draws), len(self.domain.cardinalities))

    def _random(self, rng: np.random.Generator, n: int) -> Genomes:
        """``n`` random genomes, feasible ones if any are found; else of the least violation that a walk finds."""
        sizes = self.domain.cardinalities
        if self.domain.objective is None or not n:
            return self.domain.repair(rng.integers(0, sizes, size=(n, len(sizes))))
        found = self.domain.repair(rng.integers(0, sizes, size=(max(SAMPLE, n), len(sizes))))
        violation = self._violation(found)
        for _ in range(len(sizes)):
            if (violation <= 0).sum() >= n:
                break
            moved = mutate(found, Draws(int(rng.integers(2**62)), np.arange(len(found))), self.domain)
            moved = self.domain.repair(moved)
            after = self._violation(moved)
            better = after < violation
            found, violation = np.where(better[:, None], moved, found), np.where(better, after, violation)
        return found[np.argsort(violation, kind="stable")[:n]]

    def _violation(self, genomes: Genomes) -> Array:
        objective = self.domain.objective
        return np.zeros(len(genomes)) if objective is None else objective.violation(objective.price(genomes))

    def _updated(self) -> QualityModel:
        """The model of all outcomes: refitted when they have grown by 15 %, else added to."""
        if self._model is None or len(self.archive) >= REFIT * self._fitted_at:
            rows = self.archive.best_and_latest(self.memory)
            self._model = QualityModel(
                self._foresight, self.archive, rows, before=self._model, everything=self._everything
            )
            self._fitted_at = len(self.archive)
        self._model.catch_up()
        return self._model

    @property
    def _foresight(self) -> Foresight:
        if self._known is None:
            self._known = Foresight(self.domain, self._earlier, self.seed)
        return self._known

    @property
    def _everything(self) -> Pool | None:
        """All feasible canonical genomes of a small space, repaired."""
        if int(np.prod(self.domain.cardinalities, dtype=object)) > ENUMERABLE:
            return None
        if self._whole is None:
            sizes = self.domain.cardinalities
            genomes = np.indices(tuple(sizes.tolist())).reshape(len(sizes), -1).T
            repaired = self.domain.repair(genomes)
            pool = self._foresight.pool(np.unique(self.domain.canonical(repaired), axis=0))
            self._whole = pool.rows(pool.violation <= 0)
        return self._whole if len(self._whole) else None

    def _choose(self, model: QualityModel, n: int, draws: Draws) -> list[Genomes]:
        """The ``n`` most promising genomes that are neither known nor under way."""
        taken = {*self.archive.rows, *(genome.tobytes() for genome in self.pending)}
        chosen: list[Genomes] = []
        while len(chosen) < n:
            if not self._queue:
                wanted = max(n - len(chosen), int(QUEUE * len(self.archive)))
                self._queue = self._search(model, wanted, {*taken}, draws)
                if not self._queue:
                    return [*chosen, *self._random(draws.generator(), n - len(chosen))]
            genome = self._queue.pop(0)
            if genome.tobytes() not in taken:
                taken.add(genome.tobytes())
                chosen.append(genome)
        return chosen

    def _search(self, model: QualityModel, n: int, taken: set[bytes], draws: Draws) -> list[Genomes]:
        """Up to ``n`` genomes of the highest worth that can be found."""
        believed = model.believing(self.pending)
        if model.everything is not None:
            return believed.choose(model.everything, n, taken)
        pool = self._walk(believed, draws.generator())
        pool = pool.rows(pool.open(taken))
        if len(pool) > SHORTLIST:
            order = np.argsort(-believed.worth(pool), kind="stable")
            pool = pool.rows(order[: max(SHORTLIST, 4 * n)])
        return believed.choose(pool, n, taken)

    def _walk(self, model: QualityModel, rng: np.random.Generator) -> Pool:
        """Feasible genomes that a fresh instance of the wrapped strategy visits on the model's word."""
        searcher = self._inner(replace(self.domain, objective=None), int(rng.integers(2**31)))
        # The best come last: what forgets, forgets them last.
        start = np.concatenate([self._random(rng, ELITE), self.archive.best(ELITE)[::-1]])
        visited = [self._answer(searcher, model, start, None)]
        for _ in range(max(1, self.steps // BATCH)):
            asked = searcher.ask(BATCH)
            visited.append(self._answer(searcher, model, asked.genomes, asked))
        return self._foresight.pool(np.unique(np.concatenate(visited), axis=0))

    def _answer(self, searcher: Strategy, model: QualityModel, genomes: Genomes, asked: Proposals | None) -> Genomes:
        """Tell the searcher the model's word; returns the canonical genomes that are feasible."""
        pool = self._foresight.pool(self.domain.canonical(genomes))
        worth = model.worth(pool)
        feasible, n = np.isfinite(worth), len(genomes)
        known = np.where(feasible, worth, np.nan)
        searcher.tell(
            Outcomes(
                index=np.full(n, -1) if asked is None else asked.index,
                genomes=genomes,
                quality=known,
                costs=pool.costs,
                violation=pool.violation,
                reward=known,
                fidelity=np.ones(n),
                status=np.where(feasible, COMPLETE, SCREENED),
                source=np.full(n, ENQUEUED if asked is None else ASKED),
            )
        )
        return pool.genomes[feasible]


def _named(name: str) -> Any:
    """``surrogate:NAME``."""
    strategies.get(name)  # an unknown name is said at once
    return partial(Surrogate, inner=name)


strategies.register("default")(Surrogate)
strategies.family("surrogate", _named)
