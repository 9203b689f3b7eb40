"""Strategies: the contract for every one, and what each is known for: tournaments, gradients, better than luck."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import TinySpace, domain_of

from nas.errors import ExperimentError
from nas.space import Genomes
from nas.strategies import AgingEvolution, Domain, Outcomes, RandomSearch, Reinforce, Strategy, strategies
from nas.strategies.base import ASKED, COMPLETE, EARLIER, ENQUEUED, FAILED, SCREENED
from nas.testing import check_strategy


def simple_domain(sizes: list[int], ordered: bool = False) -> Domain:
    return Domain(np.array(sizes), np.full(len(sizes), ordered), lambda g: np.ones(np.atleast_2d(g).shape, dtype=bool))


def outcomes(genomes: Genomes, reward: Any, status: str = COMPLETE, source: str = ASKED, first: int = 0) -> Outcomes:
    n = len(genomes)
    reward = np.broadcast_to(np.asarray(reward, dtype=np.float64), n)
    return Outcomes(
        index=np.arange(first, first + n), genomes=genomes, quality=reward, costs=np.ones((n, 1)),
        violation=np.zeros(n), reward=reward, fidelity=np.ones(n), status=np.full(n, status), source=np.full(n, source),
    )  # fmt: skip


def search(strategy: Strategy, reward: Callable[[Genomes], Any], rounds: int, batch: int = 4) -> list[float]:
    seen: list[float] = []
    for _ in range(rounds):
        proposals = strategy.ask(batch)
        values = reward(proposals.genomes)
        seen += values.tolist()
        strategy.tell(outcomes(proposals.genomes, values, first=int(proposals.index[0])))
    return seen


@pytest.mark.parametrize("kind", list(strategies))
def test_every_registered_strategy(kind: str) -> None:
    check_strategy(strategies.get(kind))


@pytest.mark.parametrize("kind", list(strategies))
def test_every_registered_strategy_on_a_real_space(kind: str) -> None:
    space = TinySpace()
    strategy = strategies.get(kind)(domain_of(space), 0)
    for _ in range(30):
        proposals = strategy.ask(4)
        for genome in proposals.genomes:
            space.decode(genome)
        strategy.tell(outcomes(proposals.genomes, proposals.genomes.sum(1) / 8))


# ---- better than luck --------------------------------------------------------------------------------

WEIGHTS = np.random.default_rng(7).normal(size=(12, 5))
BEST = float(WEIGHTS.max(axis=1).sum())


def separable(genomes: Genomes) -> Any:
    return WEIGHTS[np.arange(12), genomes].sum(axis=1) / BEST


@pytest.mark.parametrize(("kind", "late_margin", "best_margin"), [(AgingEvolution, 0.4, 0.1), (Reinforce, 0.4, 0.15)])
def test_learning_beats_random(kind: type[Strategy], late_margin: float, best_margin: float) -> None:
    """A separable function of 12 genes with 5 values each, 200 evaluations, mean over 8 seeds; its best value is 1."""
    late, best = {}, {}
    for one in (kind, RandomSearch):
        runs = [search(one(simple_domain([5] * 12), seed), separable, rounds=50) for seed in range(8)]
        late[one] = np.mean([np.mean(run[-40:]) for run in runs])
        best[one] = np.mean([max(run) for run in runs])
    assert abs(late[RandomSearch] - WEIGHTS.mean(axis=1).sum() / BEST) < 0.05
    assert late[kind] > late[RandomSearch] + late_margin
    assert best[kind] > best[RandomSearch] + best_margin


# ---- random ------------------------------------------------------------------------------------------


def test_random_is_uniform() -> None:
    genomes = RandomSearch(simple_domain([2, 3, 1]), 0).ask(3000).genomes
    for gene, size in enumerate((2, 3, 1)):
        np.testing.assert_allclose(np.bincount(genomes[:, gene], minlength=size) / 3000, 1 / size, atol=0.03)


# ---- REINFORCE ---------------------------------------------------------------------------------------


def test_the_first_policy_is_uniform() -> None:
    strategy = Reinforce(simple_domain([2, 4, 1]), 0)
    np.testing.assert_allclose(strategy.policy, np.array([[0.5, 0.5, 0, 0], [0.25] * 4, [1, 0, 0, 0]]))
    genomes = strategy.ask(3000).genomes
    np.testing.assert_allclose(np.bincount(genomes[:, 1]) / 3000, 0.25, atol=0.03)


def test_the_gradient_points_to_the_better_value() -> None:
    """One gene, two samples: ∇log π of the better rises by (1 − π), of the worse falls, of the unseen stays."""
    strategy = Reinforce(simple_domain([3]), 0, entropy=0.0, lr=0.1)
    strategy.tell(outcomes(np.array([[0], [1]]), [1.0, 0.0]))
    # advantages ±1, mean of ±(onehot − 1/3) over the two: (0.5, −0.5, 0); Adam's first step is lr · sign
    np.testing.assert_allclose(strategy.theta[0], [0.1, -0.1, 0.0], atol=1e-6)
    strategy = Reinforce(simple_domain([3]), 0, entropy=0.0)
    search(strategy, lambda genomes: np.array([0.1, 0.2, 0.9])[genomes[:, 0]], rounds=60)
    assert strategy.policy[0, 2] > 0.9


def test_the_scale_of_the_reward_does_not_matter() -> None:
    policies = []
    for scale, shift in ((1.0, 0.0), (1e-3, 5.0), (1e4, -1e5)):
        strategy = Reinforce(simple_domain([4, 3]), 3)
        # Shared samples: the policies would otherwise drift apart by rounding.
        for i in range(20):
            genomes = np.random.default_rng(i).integers(0, (4, 3), (4, 2))
            strategy.tell(outcomes(genomes, scale * np.sin(genomes.sum(1)) + shift))
        policies.append(strategy.policy)
    np.testing.assert_allclose(policies[1], policies[0], atol=1e-3)
    np.testing.assert_allclose(policies[2], policies[0], atol=1e-3)


def test_dormant_genes_carry_no_gradient() -> None:
    domain = Domain(
        np.array([3, 3]), np.zeros(2, dtype=bool), lambda g: np.array([[True, False]] * len(np.atleast_2d(g)))
    )
    strategy = Reinforce(domain, 0, entropy=0.0)
    strategy.tell(outcomes(np.array([[0, 0], [1, 1]]), [1.0, 0.0]))
    assert strategy.theta[0].any()
    assert not strategy.theta[1].any()


def test_only_own_samples_with_a_reward_teach() -> None:
    strategy = Reinforce(simple_domain([3, 3]), 0)
    genomes = np.array([[0, 1], [2, 2]])
    for status, source in ((COMPLETE, ENQUEUED), (COMPLETE, EARLIER), (FAILED, ASKED), (SCREENED, ASKED)):
        strategy.tell(outcomes(genomes, [1.0, 0.0], status, source))
        assert not strategy.theta.any()
    strategy.tell(outcomes(genomes, [1.0, 0.0]))
    assert strategy.theta.any()


def test_the_entropy_bonus_pulls_back_to_uniform() -> None:
    strategy = Reinforce(simple_domain([4]), 0, entropy=0.5)
    strategy.theta[0, :4] = [2.0, 0.0, 0.0, 0.0]
    before = strategy.policy[0, 0]
    strategy.tell(outcomes(np.array([[1], [2]]), 0.7))  # no advantage: only the bonus acts
    assert strategy.policy[0, 0] < before
    assert strategy.entropy == pytest.approx(0.5 * 0.99)


def test_entropy_gradient_is_the_derivative() -> None:
    strategy = Reinforce(simple_domain([4, 2]), 0)
    strategy.theta[:] = np.random.default_rng(0).normal(size=(2, 4))

    def entropy() -> float:
        p = strategy.policy
        return float(-(p * np.log(np.where(p > 0, p, 1.0))).sum())

    gradient = strategy._entropy_gradient(strategy.policy)
    for gene, value in ((0, 0), (0, 3), (1, 1)):
        theta = strategy.theta[gene, value]
        step = 1e-6
        strategy.theta[gene, value] = theta + step
        up = entropy()
        strategy.theta[gene, value] = theta - step
        down = entropy()
        strategy.theta[gene, value] = theta
        assert gradient[gene, value] == pytest.approx((up - down) / (2 * step), abs=1e-6)


@pytest.mark.parametrize("settings", [{"lr": 0.0}, {"momentum": 1.0}, {"entropy": -0.1}])
def test_reinforce_settings(settings: dict[str, float]) -> None:
    with pytest.raises(ExperimentError, match=next(iter(settings))):
        Reinforce(simple_domain([2]), 0, **settings)
