"""What the policy-gradient strategies share: drawing what may win, a bounded memory, utilities and their baseline."""

from __future__ import annotations

import abc
import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nas.errors import ExperimentError
from nas.space import Genomes
from nas.strategies.base import ASKED, DUPLICATE, REDRAWS, Domain, Outcomes, Proposals, Strategy
from nas.strategies.draws import Draws
from nas.strategies.policies import Policy

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
ROUNDS = ((1, 1.0), (2, 1.1), (4, 1.25), (8, 1.6), (16, 2.5))  # of redrawing: how many, what divides the logits
FLATTER = 1.1  # divides them further for every outcome that was known beyond those that were new
MOST_REPEATS = 30
KNOWN = 4096  # genomes remembered as told
WAITING = 100_000  # proposals remembered until they are told
STEPS = 4  # gradient steps per tell, at most


@dataclass(frozen=True)
class Samples:
    """Outcomes of the strategy's own proposals.

    Attributes:
        genomes: ``[n, choices]``.
        active: which genes are not dormant, ``[n, choices]``.
        logs: log-probabilities of the genes under the policy when the genome was asked, ``[n, choices]``.
        rewards: ``[n]``.
    """

    genomes: Genomes
    active: Mask
    logs: Array
    rewards: Array

    def __len__(self) -> int:
        return len(self.rewards)

    def plus(self, other: Samples, most: int) -> Samples:
        """The latest ``most`` of these and the ``other`` ones."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Samples(*(np.concatenate(pair)[-most:] for pair in pairs))

    def holds(self, genomes: Genomes, active: Mask) -> Mask:
        """Which of the ``genomes [n, choices]`` equal a sample in every gene that is not dormant, ``[n]``."""
        mine = np.where(self.active, self.genomes, -1)
        return np.array([(mine == row).all(axis=1).any() for row in np.where(active, genomes, -1)], dtype=bool)


class PolicyGradient(Strategy):
    """Moves a policy towards its best samples.

    **Drawing.** A draw that breaks a budget by its exact costs, or that was told before, cannot win: it is replaced
    by one of up to 31 more, in five rounds from ever flatter policies (logits divided by 1 to 2.5, and by more for as
    long as most outcomes are known ones), so that a policy which has converged still finds something new, near to
    where it is at first. Where all are ruled out, what was told already or breaks the budgets least
    is proposed. So what is sampled is π conditioned on being able to win, π'. Its gradient is
    ∇log π' = ∇log π − ∇log Z, and the second term, the same for every sample, is cancelled in expectation by the
    baseline: E[(U − b) ∇log Z] = 0 where b = E[U]. So it is left out, and what is ruled out carries no gradient.

    **Repairs.** A draw is repaired first, and what was evaluated is what is credited, under its own probability: log π
    of the plain value, not of the masked one that was drawn. That is biased, because plain values are then met more
    often than π draws them. But it moves the policy by what was really tried, the baseline cancels the bias in the
    mean, and where a masked value is not masked it keeps its own record. (Crediting what was drawn would be unbiased,
    and would need what no record holds: a replay knows only what was evaluated.)

    **Utilities.** Rewards enter by rank only, ``u ∝ max(0, log(n/2 + 1) − log(rank))`` with mean 0 over the
    memory, equal rewards sharing their mean (fitness shaping: Wierstra et al. 2014, "Natural Evolution Strategies",
    section 3.1). So rewards may be of any scale and sign, a few disasters do not hide the differences between good
    candidates, and the policy is drawn to the best rather than to the best average, which is what a search is for
    (cf. the risk-seeking gradient of Petersen et al. 2021).

    **Off-policy.** Each sample keeps the log-probabilities of its genes under π when it was asked, and a subclass
    weights it by them, however late it is told. (The flatness of a redraw is left out of them, so that what
    exploring finds counts in full.) An asked outcome whose number this instance did not give, as in a replay, counts
    as asked by the policy that it is told to. Enqueued and earlier outcomes are left out of the gradient and only
    remembered as told.

    Dormant genes carry no gradient.

    Args:
        policy: what is sampled and moved.
        momentum: of the exponential moving average of the mean utility, the baseline.
        entropy: initial weight of the entropy bonus; every step multiplies it by ``entropy_decay``.
        memory: samples kept, the latest.
    """

    def __init__(
        self, domain: Domain, seed: int, policy: Policy, *, momentum: float, entropy: float, entropy_decay: float,
        memory: int,
    ) -> None:  # fmt: skip
        super().__init__(domain, seed)
        if not 0 <= momentum < 1 or not entropy >= 0 or not 0 <= entropy_decay <= 1 or memory < 2:
            raise ExperimentError(
                f"strategy: momentum {momentum}, entropy {entropy}, entropy_decay {entropy_decay}, memory {memory}.",
                expected="0 ≤ momentum < 1, entropy ≥ 0, 0 ≤ entropy_decay ≤ 1, memory ≥ 2",
            )
        self.policy, self.momentum = policy, momentum
        self.entropy, self.entropy_decay = entropy, entropy_decay
        self.memory = memory
        self.baseline = math.nan
        none = np.zeros((0, len(domain.cardinalities)))
        self.samples = Samples(none.astype(np.int64), none.astype(bool), none, np.zeros(0))
        self._asked_under: dict[int, tuple[bytes, Array]] = {}  # number → genome and log-probabilities, until told
        self._repeats = 0  # outcomes that were known less those that were new, lately
        self._known: dict[bytes, None] = {}  # canonical genomes, the oldest first

    # ---- drawing ---------------------------------------------------------------------------------

    def ask(self, n: int = 1) -> Proposals:
        proposals = super().ask(n)
        if n:
            logs = self.policy.logs(proposals.genomes)
            for number, genome, log in zip(proposals.index.tolist(), proposals.genomes, logs, strict=True):
                self._asked_under[number] = (genome.tobytes(), log)
            _forget(self._asked_under, WAITING)
        return proposals

    def propose(self, draws: Draws) -> Genomes:
        d, flatter = len(self.domain.cardinalities), FLATTER ** (4 * draws.attempt)
        genomes = self.domain.repair(self.policy.sample(draws.uniform(d), flatter))
        flatter *= FLATTER**self._repeats
        violation, hopeless = self._judge(genomes)
        left = np.flatnonzero(hopeless)
        for more, heat in ROUNDS:
            if not len(left):
                break
            # Attempts from REDRAWS on are not the contract's: numbers that are drawn nowhere else.
            fresh = Draws(draws.seed, draws.index[left], REDRAWS * 2 * more + draws.attempt)
            flat = self.domain.repair(self.policy.sample(fresh.uniform(more * d).reshape(-1, d), heat * flatter))
            broken, hopeless = self._judge(flat)
            broken, hopeless = broken.reshape(-1, more), hopeless.reshape(-1, more)
            chosen = np.where(hopeless.all(axis=1), broken.argmin(axis=1), hopeless.argmin(axis=1))
            each = np.arange(len(left))
            better = ~hopeless[each, chosen] | (broken[each, chosen] < violation[left])
            genomes[left[better]] = flat.reshape(len(left), more, d)[each, chosen][better]
            violation[left] = np.minimum(violation[left], broken[each, chosen])
            left = left[hopeless.all(axis=1)]
        return genomes

    def _judge(self, genomes: Genomes) -> tuple[Array, Mask]:
        """By how much the budgets are broken ``[n]``, and which genomes cannot win: those, and what was told."""
        objective = self.domain.objective
        violation = np.zeros(len(genomes))
        if objective is not None:
            violation = objective.violation(objective.price(genomes))
        hopeless = violation > 0
        if self._known and not hopeless.all():
            hopeless[~hopeless] = self._told(genomes[~hopeless])
        return violation, hopeless

    def _told(self, genomes: Genomes) -> Mask:
        return np.array([row.tobytes() in self._known for row in self.domain.canonical(genomes)], dtype=bool)

    # ---- learning ---------------------------------------------------------------------------------

    def learn(self, outcomes: Outcomes) -> None:
        active = self.domain.active(outcomes.genomes)
        new = self._own(outcomes, active)
        keys = [row.tobytes() for row in np.where(active, outcomes.genomes, 0)]
        known = sum(key in self._known for key in keys)
        self._repeats = max(0, min(MOST_REPEATS, self._repeats + 2 * known - len(keys)))
        self._known.update(dict.fromkeys(keys))
        _forget(self._known, KNOWN)
        if len(new):
            self.samples = self.samples.plus(new, self.memory)
            for _ in range(min(len(new), STEPS)):
                self.improve(self.samples, utilities(self.samples.rewards))
                self.entropy *= self.entropy_decay

    @abc.abstractmethod
    def improve(self, samples: Samples, utility: Array) -> None:
        """One gradient step on all ``samples``, whose utilities are ``utility [n]``."""

    def advantage(self, utility: Array, weights: Array) -> Array:
        """``u − b`` with b the moving average of the mean utility, weighted by ``weights [n]`` that sum to 1."""
        mean = float(weights @ utility)
        start = math.isnan(self.baseline)
        self.baseline = mean if start else self.momentum * self.baseline + (1 - self.momentum) * mean
        return utility - self.baseline

    def _own(self, outcomes: Outcomes, active: Mask) -> Samples:
        """The strategy's own samples that have a reward and are not held by the memory already."""
        asked = outcomes.source == ASKED
        logs = np.full(active.shape, np.nan)
        for i in np.flatnonzero(asked):
            genome, log = self._asked_under.pop(int(outcomes.index[i]), (b"", None))
            if log is not None and genome == outcomes.genomes[i].tobytes():
                logs[i] = log
        own = asked & outcomes.scored & np.isfinite(outcomes.reward)
        again = np.flatnonzero(own & (outcomes.status == DUPLICATE))
        own[again] = ~self.samples.holds(outcomes.genomes[again], active[again])
        replayed = own & np.isnan(logs[:, 0])
        if replayed.any():
            logs[replayed] = self.policy.logs(outcomes.genomes[replayed])
        return Samples(outcomes.genomes[own], active[own], logs[own], outcomes.reward[own])


def _forget(items: dict[Any, Any], most: int) -> None:
    """Drop the oldest ones beyond ``most``."""
    for key in list(itertools.islice(items, max(0, len(items) - most))):
        del items[key]


def utilities(rewards: Array) -> Array:
    """Rank-based utilities ``[n]``, mean 0: log(n/2 + 1) − log(rank), none below the upper half; ties share."""
    n = len(rewards)
    _, tie, count = np.unique(-rewards, return_inverse=True, return_counts=True)
    raw = np.maximum(0.0, np.log(n / 2 + 1) - np.log(np.arange(1, n + 1)))
    shared = np.add.reduceat(raw, np.cumsum(count) - count) / count
    return np.asarray(shared[tie] / raw.mean() - 1.0)


def positive(name: str, value: float) -> float:
    """The value; ExperimentError where it is not above 0 and finite."""
    if not 0 < value < math.inf:
        raise ExperimentError(f"strategy.{name} is {value}.", expected=f"{name} > 0")
    return value
