"""What a surrogate knows: outcomes, what is known beforehand of any genome, and the model that joins the two."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from nas.space import Genomes
from nas.strategies.base import Domain, Outcomes
from nas.strategies.gaussian_process import Embedded, GaussianProcess, Posterior
from nas.strategies.warp import Warp

Array = npt.NDArray[np.float64]
SAMPLE = 2_000
FIRST_STEPS, STEPS = 80, 10
EARLIER_ROWS = 500
FAR, BISECTIONS = 60.0, 30


class Archive:
    """What was evaluated: one row per canonical genome, in the order of arrival.

    Args:
        choices: genes of a genome.
    """

    def __init__(self, choices: int) -> None:
        self.rows: dict[bytes, int] = {}
        self._genomes = np.zeros((0, choices), dtype=np.int64)
        self._values = np.zeros(0)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def genomes(self) -> Genomes:
        """``[n, choices]``, canonical."""
        return self._genomes[: len(self)]

    @property
    def values(self) -> Array:
        """``[n]``; the worst one in place of failures. Only where anything succeeded."""
        values = self._values[: len(self)]
        return np.where(np.isfinite(values), values, np.nanmin(values))

    @property
    def succeeded(self) -> int:
        """How many rows have a value of their own."""
        return int(np.isfinite(self._values[: len(self)]).sum())

    def add(self, genomes: Genomes, values: Array) -> None:
        """Enter canonical genomes and their values, NaN for failures; what is there already gets the latest value."""
        for genome, value in zip(genomes, values, strict=True):
            row = self.rows.setdefault(genome.tobytes(), len(self.rows))
            if row == len(self._values):
                room = max(16, row)
                self._genomes = np.concatenate([self._genomes, np.zeros((room, len(genome)), dtype=np.int64)])
                self._values = np.concatenate([self._values, np.zeros(room)])
            self._genomes[row], self._values[row] = genome, value

    def best(self, n: int) -> Genomes:
        """The ``n`` genomes of highest value."""
        return self.genomes[np.argsort(-self.values, kind="stable")[:n]]

    def best_and_latest(self, n: int) -> list[int]:
        """Rows: all, or the best half of ``n`` and the latest others, in the order of arrival."""
        if len(self) <= n:
            return list(range(len(self)))
        best = np.argsort(-self.values, kind="stable")[: n // 2]
        others = np.setdiff1d(np.arange(len(self)), best)
        return sorted([*best.tolist(), *others[len(best) - n :].tolist()])


@dataclass
class Pool:
    """Genomes that may be chosen and what is known of them.

    Attributes:
        genomes: canonical, ``[n, choices]``.
        costs: ``[n, k]``; violation: ``[n]``.
        known: standardised numbers that are known beforehand, ``[n, features]``.
    """

    genomes: Genomes
    costs: Array
    violation: Array
    known: Array

    def __len__(self) -> int:
        return len(self.genomes)

    @cached_property
    def index(self) -> dict[bytes, int]:
        """Row of each genome."""
        return {genome.tobytes(): row for row, genome in enumerate(self.genomes)}

    def rows(self, which: npt.NDArray[np.intp] | npt.NDArray[np.bool_]) -> Pool:
        """Some of them."""
        return Pool(self.genomes[which], self.costs[which], self.violation[which], self.known[which])

    def open(self, taken: set[bytes]) -> npt.NDArray[np.bool_]:
        """Which of them are not among the taken, ``[n]``."""
        mask = np.ones(len(self), dtype=bool)
        mask[[self.index[key] for key in taken if key in self.index]] = False
        return mask


class Foresight:
    """What is known of any genome before it is trained: costs, budgets, and the word of earlier searches.

    Costs say more than whether a budget is met: within one family the dearer are mostly the better, and how much so is
    learnt. They enter by their logarithms, standardised over feasible random genomes.

    Args:
        domain: with its objective, if there is one.
        earlier: outcomes of earlier searches, of full trainings.
        seed: of the random genomes.
    """

    def __init__(self, domain: Domain, earlier: list[Outcomes], seed: int) -> None:
        self.domain = domain
        self._earlier = _earlier_model(domain, earlier, seed) if earlier else None
        self._centre, self._spread = np.zeros(0), np.ones(0)
        self._ceiling = np.zeros(0)
        if domain.objective is not None:
            rng = np.random.default_rng(seed)
            costs = domain.objective.price(rng.integers(0, domain.cardinalities, (SAMPLE, len(domain.cardinalities))))
            feasible = domain.objective.violation(costs) <= 0
            costs = costs[feasible] if feasible.sum() >= 50 else costs
            usable = np.where(np.isfinite(costs) & (costs > 0), costs, np.nan)
            self._ceiling = np.array([np.nanmax(c) if np.isfinite(c).any() else 1.0 for c in usable.T])
            logs = self._logs(costs)
            self._centre, self._spread = logs.mean(axis=0), logs.std(axis=0)

    @property
    def features(self) -> int:
        """How many numbers are known of a genome; a cost that never varies says nothing."""
        return int((self._spread > 1e-9).sum()) + (self._earlier is not None)

    def _logs(self, costs: Array) -> Array:
        return np.log(np.where(np.isfinite(costs) & (costs > 0), np.minimum(costs, self._ceiling), self._ceiling))

    def pool(self, genomes: Genomes) -> Pool:
        """The canonical genomes ``[n, choices]`` with all that is known of them."""
        objective, n = self.domain.objective, len(genomes)
        if objective is None:
            costs, violation = np.zeros((n, 0)), np.zeros(n)
            known = np.zeros((n, 0))
        else:
            costs = objective.price(genomes)
            violation = objective.violation(costs)
            telling = self._spread > 1e-9
            known = (self._logs(costs) - self._centre)[:, telling] / self._spread[telling]
        if self._earlier is not None:
            known = np.column_stack([known, self._earlier.mean(genomes)])
        return Pool(genomes, costs, violation, known)

    def reward(self, pool: Pool, quality: Array) -> Array:
        """Reward of the genomes if they had these qualities; −∞ for what breaks a budget."""
        objective = self.domain.objective
        reward = quality if objective is None else objective.reward(quality, pool.costs)
        return np.where((pool.violation <= 0) & np.isfinite(reward), reward, -np.inf)


class QualityModel:
    """A Gaussian process of the warped qualities of an archive.

    Args:
        foresight: what is known beforehand.
        archive: outcomes; at least one of them with a value.
        rows: of the archive, which are fitted.
        before: the model before this one, whose parameters are the start of the fit.
        everything: a pool whose predictions are kept up to date.
    """

    def __init__(
        self,
        foresight: Foresight,
        archive: Archive,
        rows: list[int],
        before: QualityModel | None = None,
        everything: Pool | None = None,
    ) -> None:
        self.foresight, self.archive, self.everything = foresight, archive, everything
        self.process: GaussianProcess = (
            GaussianProcess(foresight.domain, foresight.features) if before is None else before.process
        )
        self.rows, self._arrived = list(rows), len(archive)
        self._believed = np.zeros(0)
        data = foresight.pool(archive.genomes[self.rows])
        encoded = self.process.encode(data.genomes)
        self.process.fit(encoded, data.known, self._y(), FIRST_STEPS if before is None else STEPS)
        self.posterior = Posterior(
            self.process,
            self.process.embed(encoded, data.known),
            None if everything is None else self._embed(everything),
        )

    def _embed(self, pool: Pool) -> Embedded:
        return self.process.embed(self.process.encode(pool.genomes), pool.known)

    def _y(self) -> Array:
        """Warped values of the data, and what is believed of candidates under way."""
        values = self.archive.values[self.rows]
        self.warp = Warp(values)
        return np.concatenate([self.warp(values), self._believed])

    def catch_up(self) -> None:
        """Take in what the archive has got since, without fitting again."""
        for row in range(self._arrived, len(self.archive)):
            self.posterior.add(self._embed(self.foresight.pool(self.archive.genomes[row : row + 1])))
            self.rows.append(row)
        self._arrived = len(self.archive)

    def believing(self, genomes: Genomes) -> QualityModel:
        """A copy for which these genomes are as good as it expects them to be."""
        other = copy.copy(self)
        other.posterior = self.posterior.copy()
        for row in range(len(genomes)):
            other._believe(other._embed(other.foresight.pool(genomes[row : row + 1])))
        return other

    def _believe(self, embedded: Embedded) -> None:
        mean, _ = self.posterior.predict(embedded, self._y())
        self.posterior.add(embedded)
        self._believed = np.append(self._believed, mean)

    def mean(self, genomes: Genomes) -> Array:
        """Expected warped quality, ``[n]``."""
        return self.posterior.predict(self._embed(self.foresight.pool(genomes)), self._y())[0]

    def worth(self, pool: Pool) -> Array:
        """Logarithm of the improvement expected of each of the pool's genomes; −∞ where it breaks a budget."""
        return self._improvement(pool, *self.posterior.predict(self._embed(pool), self._y()))

    def _improvement(self, pool: Pool, mean: Array, spread: Array) -> Array:
        log = math.log(1e-300) + np.zeros(len(pool))
        open_rows = pool.violation <= 0
        wanted = self._wanted(pool.rows(open_rows))
        log[open_rows] = log_expected_improvement((mean[open_rows] - wanted) / spread[open_rows]) + np.log(
            spread[open_rows]
        )
        return np.where(open_rows, log, -np.inf)

    def _wanted(self, pool: Pool) -> Array:
        """The warped quality at which each genome would be rewarded as the best one so far is, by bisection."""
        known = self.foresight.pool(self.archive.genomes[self.rows])
        best = self.foresight.reward(known, self.archive.values[self.rows]).max()
        low, high = np.full(len(pool), -FAR), np.full(len(pool), FAR)
        if not np.isfinite(best):
            return low  # nothing feasible is known: whatever is best improves
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            enough = self.foresight.reward(pool, self.warp.inverse(middle)) >= best
            low, high = np.where(enough, low, middle), np.where(enough, middle, high)
        return high

    def choose(self, pool: Pool, n: int, taken: set[bytes]) -> list[Genomes]:
        """Up to ``n`` genomes of the pool, one after the other, each the best when those before are believed in.

        Args:
            taken: canonical genomes that are known or under way; what is chosen is added to them.
        """
        believer = copy.copy(self)
        if pool is self.everything:
            believer.posterior = self.posterior.copy()
        else:
            believer.posterior = Posterior(self.process, self.posterior.data, self._embed(pool))
        places = believer.posterior.pool
        assert places is not None
        open_rows = pool.open(taken)
        chosen: list[Genomes] = []
        while len(chosen) < n:
            mean, spread = believer.posterior.predict_pool(believer._y())
            worth = self._improvement(pool, mean, spread)
            worth[~open_rows] = -np.inf
            row = int(worth.argmax())
            if not np.isfinite(worth[row]):
                break
            chosen.append(pool.genomes[row])
            open_rows[row] = False
            taken.add(pool.genomes[row].tobytes())
            if len(chosen) < n:
                believer._believe((places[0][[row]], places[1][[row]], places[2][[row]]))
        return chosen


def _earlier_model(domain: Domain, earlier: list[Outcomes], seed: int) -> QualityModel:
    """A model of earlier searches' outcomes; what they cost then is left out."""
    archive = Archive(len(domain.cardinalities))
    for outcomes in earlier:
        archive.add(domain.canonical(outcomes.genomes), outcomes.quality)
    bare = Foresight(Domain(domain.cardinalities, domain.ordered, domain.active, domain.kinds), [], seed)
    return QualityModel(bare, archive, archive.best_and_latest(EARLIER_ROWS))


def log_expected_improvement(u: Array) -> Array:
    """``log(φ(u) + u·Φ(u))``: the improvement expected of a standard normal above ``−u``, exact far down its tail.

    Expected improvement: Jones, Schonlau & Welch 1998; its logarithm: Ament et al. 2023, equation 9.
    """
    t = torch.from_numpy(np.asarray(u, dtype=np.float64))
    density = -0.5 * t**2 - 0.5 * math.log(2 * math.pi)
    near = torch.log(torch.exp(density) + t.clamp(min=-1.0) * torch.special.ndtr(t.clamp(min=-1.0)))
    below = t.clamp(max=-1.0)
    mills = math.sqrt(math.pi / 2) * torch.special.erfcx(-below / math.sqrt(2))
    # Beyond a million standard deviations 1 + u·Mills(u) cancels to nothing; its limit is 1/u².
    far = torch.where(below > -1e3, torch.log1p((below * mills).clamp(min=-1 + 1e-16)), -2 * torch.log(-below))
    return np.asarray(torch.where(t > -1.0, near, density + far))
