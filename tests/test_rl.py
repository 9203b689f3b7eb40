"""Policy gradients: the gradients themselves, what is drawn, what is learnt from, and better than luck."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from nas.errors import ExperimentError
from nas.reward import MnasNetSoft, TuNASAbsolute
from nas.space import Genomes
from nas.strategies import PPO, Domain, Objective, Outcomes, RandomSearch, Reinforce, ReinforceLstm, Strategy
from nas.strategies.base import ASKED, COMPLETE, DUPLICATE, EARLIER, ENQUEUED, FAILED, SCREENED
from nas.strategies.lstm import Lstm
from nas.strategies.policies import Independent, Policy
from nas.strategies.policy_gradient import KNOWN, PolicyGradient, Samples, utilities

Array = np.ndarray[Any, np.dtype[np.float64]]
SIZES = [3, 2, 1, 4]


def simple_domain(sizes: list[int], **more: Any) -> Domain:
    return Domain(np.array(sizes), np.zeros(len(sizes), dtype=bool), **more)


def ppo_lstm(domain: Domain, seed: int = 0) -> PPO:
    return PPO(domain, seed, policy="lstm", lr=0.02, hidden=16)


def small_lstm(domain: Domain, seed: int = 0) -> ReinforceLstm:
    return ReinforceLstm(domain, seed, hidden=16)


MAKERS: list[Callable[..., PolicyGradient]] = [Reinforce, small_lstm, PPO, ppo_lstm]
make_any = pytest.mark.parametrize("make", MAKERS, ids=["reinforce", "reinforce-lstm", "ppo", "ppo with an LSTM"])


def outcomes(genomes: Genomes, reward: Any, status: str = COMPLETE, source: str = ASKED, index: Any = None) -> Outcomes:
    n = len(genomes)
    reward = np.broadcast_to(np.asarray(reward, dtype=np.float64), n)
    return Outcomes(
        index=np.arange(n) if index is None else index, genomes=genomes, quality=reward, costs=np.ones((n, 1)),
        violation=np.zeros(n), reward=reward, fidelity=np.ones(n), status=np.full(n, status), source=np.full(n, source),
    )  # fmt: skip


def search(strategy: Strategy, reward: Callable[[Genomes], Any], rounds: int, batch: int = 4) -> list[float]:
    seen: list[float] = []
    for _ in range(rounds):
        proposals = strategy.ask(batch)
        values = reward(proposals.genomes)
        seen += values.tolist()
        strategy.tell(outcomes(proposals.genomes, values, index=proposals.index))
    return seen


# ---- policies ----------------------------------------------------------------------------------------


def independent(kinds: Any = None) -> Independent:
    return Independent(simple_domain(SIZES, kinds=kinds), 0.1)


def lstm() -> Lstm:
    return Lstm(simple_domain(SIZES), 0.05, 8, 0)


def moved(policy: Policy, steps: int = 5) -> Policy:
    """The policy after some arbitrary steps."""
    rng = np.random.default_rng(1)
    for _ in range(steps):
        policy.ascend(rng.integers(0, SIZES, (6, 4)), rng.normal(size=(6, 4)), 0.1)
    return policy


def everything() -> Genomes:
    return np.array(list(itertools.product(*(range(size) for size in SIZES))))


each_policy = pytest.mark.parametrize(
    "make", [independent, lambda: independent(np.array([0, 1, 2, 0])), lstm], ids=["independent", "kinds", "lstm"]
)


@each_policy
def test_the_first_policy_is_uniform(make: Callable[[], Policy]) -> None:
    np.testing.assert_allclose(make().logs(everything()), np.tile(-np.log(SIZES), (24, 1)), atol=1e-12)


@each_policy
def test_probabilities_sum_to_one(make: Callable[[], Policy]) -> None:
    policy = moved(make())
    probabilities = np.exp(policy.logs(everything()).sum(axis=1))
    assert probabilities.sum() == pytest.approx(1.0, abs=1e-12)
    assert probabilities.std() > 1e-4


@each_policy
def test_what_is_sampled_has_the_policys_probabilities(make: Callable[[], Policy]) -> None:
    policy = moved(make())
    uniform = np.random.default_rng(0).random((20_000, 4))
    for heat in (1.0, 1e9):
        drawn = policy.sample(uniform, heat)
        share = np.array([(drawn == genome).all(axis=1).mean() for genome in everything()])
        wanted = np.exp(policy.logs(everything()).sum(axis=1)) if heat == 1 else 1 / 24
        np.testing.assert_allclose(share, np.broadcast_to(wanted, 24), atol=0.015)


@each_policy
def test_a_batch_is_its_rows(make: Callable[[], Policy]) -> None:
    policy, uniform = moved(make()), np.random.default_rng(3).random((50, 4))
    rows = [policy.sample(uniform[i : i + 1], 2.0)[0] for i in range(50)]
    np.testing.assert_array_equal(policy.sample(uniform, 2.0), rows)


def test_choices_of_one_kind_share_what_they_learn() -> None:
    policy = Independent(simple_domain([3, 3, 3, 2], kinds=np.array([5, 5, 5, 9])), 0.1)
    policy.ascend(np.array([[0, 1, 1, 1]]), np.array([[1.0, 0.0, 0.0, 0.0]]), 0.0)
    first, second, third, other = policy.probabilities
    assert first[0] > second[0] == third[0] > 1 / 3
    np.testing.assert_allclose(other, [0.5, 0.5, 0])


# ---- gradients ---------------------------------------------------------------------------------------


def some_weights(n: int) -> tuple[Genomes, Array]:
    rng = np.random.default_rng(2)
    return rng.integers(0, SIZES, (n, 4)), rng.normal(size=(n, 4))


@pytest.mark.parametrize("kinds", [None, np.array([0, 1, 2, 0])])
def test_the_gradient_is_the_derivative(kinds: Any) -> None:
    policy = independent(kinds)
    policy.theta[:] = np.random.default_rng(0).normal(size=policy.theta.shape)
    genomes, weights = some_weights(7)

    def objective() -> float:
        p = policy.probabilities
        entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum()
        return float((weights * policy.logs(genomes)).sum() + 0.3 * entropy)

    np.testing.assert_allclose(policy.gradient(genomes, weights, 0.3), differences(policy.theta, objective), atol=1e-6)


def differences(theta: Array, objective: Callable[[], float], step: float = 1e-6) -> Array:
    """Central differences of the objective by every entry of ``theta``, which is moved in place."""
    slopes = np.zeros_like(theta)
    for place in np.ndindex(theta.shape):
        kept = theta[place]
        theta[place] = kept + step
        up = objective()
        theta[place] = kept - step
        slopes[place] = (up - objective()) / (2 * step)
        theta[place] = kept
    return slopes


def test_the_lstms_gradient_is_the_derivative() -> None:
    policy = moved(lstm())
    assert isinstance(policy, Lstm)
    genomes, weights = some_weights(7)
    policy.optimizer.zero_grad()
    policy.objective(genomes, weights, 0.3).backward()
    for name, parameter in policy.controller.named_parameters():
        assert parameter.grad is not None
        flat = parameter.detach().view(-1).numpy()[:40]
        slopes = differences(flat, lambda: policy.objective(genomes, weights, 0.3).item())
        np.testing.assert_allclose(parameter.grad.view(-1).numpy()[:40], slopes, atol=1e-6, err_msg=name)


def test_the_lstms_objective_is_of_its_log_probabilities() -> None:
    policy = moved(lstm())
    assert isinstance(policy, Lstm)
    genomes, weights = some_weights(7)
    wanted = float((weights * policy.logs(genomes)).sum())
    assert policy.objective(genomes, weights, 0.0).item() == pytest.approx(wanted)
    rest = policy.objective(everything(), np.zeros((24, 4)), 1.0).item()
    assert 0 < rest < np.log(SIZES).sum()


def replayed(strategy: PolicyGradient, n: int = 9) -> Samples:
    """Samples of the strategy's policy as it was; it has moved since. One gene is dormant in some."""
    genomes, _ = some_weights(n)
    samples = Samples(genomes, np.arange(4) != (np.arange(n) % 4)[:, None], strategy.policy.logs(genomes), np.zeros(n))
    for _ in range(4):
        strategy.policy.ascend(genomes[:4], np.ones((4, 4)), 0.0)
    return samples


def test_replayed_samples_are_weighted_by_their_truncated_importance() -> None:
    strategy = Reinforce(simple_domain(SIZES), 0)
    samples = replayed(strategy)
    ratio = np.exp(((strategy.policy.logs(samples.genomes) - samples.logs) * samples.active).sum(axis=1))
    assert ratio.min() < 0.9 < 1.1 < ratio.max()
    wanted = np.minimum(ratio, 1.0)
    np.testing.assert_allclose(strategy.weights(samples), wanted / wanted.sum())


def test_ppo_follows_the_clipped_surrogate() -> None:
    strategy = PPO(simple_domain(SIZES), 0, clip=0.2, lr=0.1)
    samples = replayed(strategy)
    policy = strategy.policy
    assert isinstance(policy, Independent)
    advantage = np.random.default_rng(5).normal(size=len(samples))

    def surrogate() -> float:
        ratio = np.exp(policy.logs(samples.genomes) - samples.logs)
        gain = advantage[:, None]
        least = np.minimum(ratio * gain, np.clip(ratio, 0.8, 1.2) * gain)
        return float((least * samples.active).sum() / len(samples))

    weights = strategy.weights(samples, advantage)
    assert (weights[samples.active] == 0).any()
    assert (weights != 0).any()
    np.testing.assert_allclose(
        policy.gradient(samples.genomes, weights, 0.0), differences(policy.theta, surrogate), atol=1e-6
    )


def test_the_entropy_bonus_pulls_back_to_uniform_and_decays() -> None:
    strategy = Reinforce(simple_domain([4]), 0, entropy=0.5, entropy_decay=0.9)
    policy = strategy.policy
    assert isinstance(policy, Independent)
    policy.theta[0, 0] = 2.0
    before = policy.probabilities[0, 0]
    strategy.tell(outcomes(np.array([[1], [2]]), 0.7))  # equal rewards, no advantage: only the bonus acts
    assert policy.probabilities[0, 0] < before
    assert strategy.entropy == pytest.approx(0.5 * 0.9**2)


# ---- utilities ---------------------------------------------------------------------------------------


def test_utilities_are_a_function_of_the_ranks() -> None:
    rewards = np.array([0.1, 0.9, 0.4, 0.4, -3.0, 0.7])
    values = utilities(rewards)
    assert values.mean() == pytest.approx(0.0)
    assert values[1] > values[5] > values[2] == values[3] >= values[0] == values[4] == -1.0
    np.testing.assert_array_equal(values, utilities(1e-6 * rewards - 1e3))
    np.testing.assert_array_equal(values, utilities(np.exp(20 * rewards)))
    np.testing.assert_allclose(utilities(np.full(5, 2.0)), 0.0, atol=1e-12)
    np.testing.assert_allclose(utilities(np.array([3.0])), 0.0)


@make_any
def test_any_scale_and_sign_of_the_reward(make: Callable[..., PolicyGradient]) -> None:
    """The MnasNet reward, the TuNAS reward far below 0, and thousands: the same search."""
    latency = 2.0
    kinds = (
        lambda q: MnasNetSoft(1.0)(q, np.full(len(q), latency)),
        lambda q: TuNASAbsolute(1.0, beta=-50.0)(q, np.full(len(q), latency)),
        lambda q: 1e4 * q - 1e5,
    )
    runs = []
    for reward in kinds:
        strategy = make(simple_domain([4, 3, 3]), 3)
        search(strategy, lambda g, reward=reward: reward(0.5 + 0.1 * np.round(np.sin(g @ [1, 2, 3]), 2)), rounds=5)
        runs.append(strategy.ask(6).genomes)
    np.testing.assert_array_equal(runs[0], runs[1])
    np.testing.assert_array_equal(runs[0], runs[2])


# ---- what is learnt from -----------------------------------------------------------------------------


@make_any
def test_only_own_samples_with_a_reward_teach(make: Callable[..., PolicyGradient]) -> None:
    strategy, genomes = make(simple_domain([3, 3]), 0), np.array([[0, 1], [2, 2]])
    first = strategy.policy.logs(genomes)
    for status, source in (
        (COMPLETE, ENQUEUED), (COMPLETE, EARLIER), (DUPLICATE, EARLIER), (FAILED, ASKED), (SCREENED, ASKED),
    ):  # fmt: skip
        strategy.tell(outcomes(genomes, [1.0, 0.0], status, source))
    strategy.tell(outcomes(genomes, [np.nan, np.nan]))
    np.testing.assert_array_equal(strategy.policy.logs(genomes), first)
    assert not len(strategy.samples)
    asked = strategy.ask(2)
    strategy.tell(outcomes(asked.genomes, [1.0, 0.0], index=asked.index))
    assert len(strategy.samples) == 2
    assert not np.array_equal(strategy.policy.logs(genomes), first)


@make_any
def test_a_late_outcome_keeps_the_probabilities_it_was_asked_under(make: Callable[..., PolicyGradient]) -> None:
    strategy = make(simple_domain(SIZES), 0)
    late = strategy.ask(1)
    then = strategy.policy.logs(late.genomes)
    search(strategy, lambda genomes: genomes.sum(axis=1), rounds=4)
    now = strategy.policy.logs(late.genomes)
    strategy.tell(outcomes(late.genomes, 1.0, index=late.index))
    np.testing.assert_array_equal(strategy.samples.logs[-1:], then)
    assert not np.allclose(now, then)


def test_a_number_that_is_told_another_genome_is_no_own_draw_of_old() -> None:
    strategy = Reinforce(simple_domain(SIZES), 0)
    late = strategy.ask(1)
    search(strategy, lambda genomes: genomes.sum(axis=1), rounds=4)
    other = (late.genomes + 1) % SIZES
    now = strategy.policy.logs(other)
    strategy.tell(outcomes(other, 1.0, index=late.index))
    np.testing.assert_array_equal(strategy.samples.logs[-1:], now)


def test_a_duplicate_teaches_once() -> None:
    strategy = Reinforce(simple_domain([3, 3]), 0)
    asked = strategy.ask(3)
    strategy.tell(outcomes(asked.genomes, [3.0, 1.0, 2.0], index=asked.index))
    strategy.tell(outcomes(asked.genomes, [3.0, 1.0, 2.0], DUPLICATE, index=np.arange(3, 6)))
    assert len(strategy.samples) == 3
    strategy.tell(outcomes(np.array([[0, 0]]), 4.0, DUPLICATE, index=np.array([6])))  # known from elsewhere
    assert len(strategy.samples) == 3 + (not (asked.genomes == 0).all(axis=1).any())


@make_any
def test_dormant_genes_carry_no_gradient(make: Callable[..., PolicyGradient]) -> None:
    """The last gene is dormant; an LSTM's head for it is its own, so it must stay uniform as well."""
    domain = simple_domain([3, 3], active=lambda g: np.tile([True, False], (len(np.atleast_2d(g)), 1)))
    strategy = make(domain, 0)
    strategy.entropy = 0.0
    search(strategy, lambda genomes: genomes[:, 0], rounds=3, batch=1)
    logs = strategy.policy.logs(np.array([[0, 0], [1, 1], [2, 2]]))
    assert logs[:, 0].std() > 0.01
    np.testing.assert_allclose(logs[:, 1], -np.log(3), atol=1e-12)


# ---- what is drawn -----------------------------------------------------------------------------------


def budget(limit: float) -> Objective:
    """The sum of the genes must not exceed the limit."""
    return Objective(
        ("sum",), lambda g: g.sum(axis=1, keepdims=True).astype(np.float64),
        lambda costs: np.maximum(costs[:, 0] - limit, 0.0), lambda quality, costs: quality,
    )  # fmt: skip


@make_any
def test_the_infeasible_is_not_proposed(make: Callable[..., PolicyGradient]) -> None:
    strategy = make(simple_domain([5] * 4, objective=budget(6)), 0)
    for _ in range(4):
        asked = strategy.ask(8)
        assert (asked.genomes.sum(axis=1) <= 6).all()
        strategy.tell(outcomes(asked.genomes, asked.genomes.sum(axis=1), index=asked.index))


def test_where_nothing_is_feasible_the_closest_of_the_draws_is_proposed() -> None:
    asked = Reinforce(simple_domain([5] * 4, objective=budget(-1)), 0).ask(20)
    assert asked.genomes.sum(axis=1).mean() < 3.0  # 8 on average, did they not count
    assert asked.genomes.sum(axis=1).min() >= 0


@make_any
def test_a_converged_policy_still_finds_everything(make: Callable[..., PolicyGradient]) -> None:
    strategy = make(simple_domain([3, 3]), 0)
    for _ in range(60):
        strategy.policy.ascend(np.array([[1, 1]]), np.array([[1.0, 1.0]]), 0.0)
    seen: set[int] = set()
    for _ in range(80):
        asked = strategy.ask(1)
        value = int(asked.genomes[0] @ [3, 1])
        strategy.tell(outcomes(asked.genomes, value, DUPLICATE if value in seen else COMPLETE, index=asked.index))
        seen.add(value)
    assert len(seen) == 9
    assert strategy.ask(4).genomes.shape == (4, 2)


def test_memory_is_bounded() -> None:
    strategy = Reinforce(simple_domain([9] * 6), 0, memory=50)
    for _ in range(KNOWN // 100 + 5):
        asked = strategy.ask(100)
        strategy.tell(outcomes(asked.genomes, asked.genomes.sum(axis=1), index=asked.index))
    assert len(strategy.samples) == 50
    assert len(strategy._known) == KNOWN
    assert not strategy._asked_under


# ---- determinism -------------------------------------------------------------------------------------


@make_any
def test_nothing_global_is_read_or_changed(make: Callable[..., PolicyGradient]) -> None:
    runs, threads = [], torch.get_num_threads()
    for disturbance in (1, 2):
        torch.manual_seed(disturbance)
        np.random.seed(disturbance)  # noqa: NPY002 - the global generator is what must not matter
        before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        strategy = make(simple_domain([4, 3, 5]), 7)
        seen = search(strategy, lambda genomes: np.sin(genomes.sum(axis=1)), rounds=6)
        runs.append((seen, strategy.ask(5).genomes.tolist()))
        assert torch.equal(torch.get_rng_state(), before[0])
        np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert runs[0] == runs[1]
    assert torch.get_num_threads() == threads


@make_any
def test_a_replay_that_only_tells_arrives_at_the_same_state(make: Callable[..., PolicyGradient]) -> None:
    live, told = make(simple_domain([4, 3, 5]), 7), make(simple_domain([4, 3, 5]), 7)
    for _ in range(5):
        asked = live.ask(3)
        found = outcomes(asked.genomes, np.sin(asked.genomes.sum(axis=1)), index=asked.index)
        live.tell(found)
        told.tell(found)
    np.testing.assert_array_equal(live.policy.logs(asked.genomes), told.policy.logs(asked.genomes))


# ---- better than luck --------------------------------------------------------------------------------

WEIGHTS = np.random.default_rng(7).normal(size=(12, 5))
BEST = float(WEIGHTS.max(axis=1).sum())


def separable(genomes: Genomes) -> Any:
    return WEIGHTS[np.arange(12), genomes].sum(axis=1) / BEST


def luck(seeds: int) -> tuple[float, float]:
    runs = [search(RandomSearch(simple_domain([5] * 12), seed), separable, rounds=50) for seed in range(seeds)]
    return float(np.mean([np.mean(run[-40:]) for run in runs])), float(np.mean([max(run) for run in runs]))


@pytest.mark.parametrize(
    ("make", "seeds", "late_margin", "best_margin"),
    [
        pytest.param(Reinforce, 6, 0.6, 0.3, id="reinforce"),
        pytest.param(PPO, 6, 0.6, 0.3, id="ppo"),
        pytest.param(small_lstm, 3, 0.4, 0.2, id="reinforce-lstm", marks=pytest.mark.slow),
        pytest.param(ppo_lstm, 3, 0.4, 0.2, id="ppo with an LSTM", marks=pytest.mark.slow),
    ],
)
def test_learning_beats_random(
    make: Callable[..., PolicyGradient], seeds: int, late_margin: float, best_margin: float
) -> None:
    """A separable function of 12 genes with 5 values each, 200 evaluations, mean over seeds; its best value is 1."""
    runs = [search(make(simple_domain([5] * 12), seed), separable, rounds=50) for seed in range(seeds)]
    late, best = luck(seeds)
    assert np.mean([np.mean(run[-40:]) for run in runs]) > late + late_margin
    assert np.mean([max(run) for run in runs]) > best + best_margin


def test_an_lstm_learns_what_goes_together() -> None:
    """Four genomes whose genes are equal: no independent policy gives them more than a quarter of its draws."""
    policy = Lstm(simple_domain([4, 4]), 0.05, 16, 0)
    equal = np.repeat(np.arange(4), 2).reshape(4, 2)
    for _ in range(100):
        policy.ascend(equal, np.full((4, 2), 0.25), 0.0)
    probabilities = np.exp(policy.logs(equal).sum(axis=1))
    np.testing.assert_allclose(probabilities, 0.25, atol=0.03)


# ---- settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (Reinforce, {"lr": 0.0}, "lr is 0"),
        (Reinforce, {"lr": float("nan")}, "lr is nan"),
        (Reinforce, {"momentum": 1.0}, "momentum 1"),
        (Reinforce, {"entropy": -0.1}, "entropy -0.1"),
        (Reinforce, {"entropy_decay": 1.1}, "entropy_decay 1.1"),
        (Reinforce, {"memory": 1}, "memory 1"),
        (ReinforceLstm, {"hidden": 0}, "hidden is 0"),
        (PPO, {"clip": 1.0}, "clip 1"),
        (PPO, {"epochs": 0}, "epochs 0"),
        (PPO, {"batch": 1}, "1"),
    ],
)
def test_settings_out_of_range(kind: type[PolicyGradient], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        kind(simple_domain([2, 2]), 0, **settings)


def test_the_default_reinforce_serves_rewards_of_a_search() -> None:
    """What a controller's domain offers is used as it is: prices, kinds and dormant genes together."""
    domain = simple_domain(
        [3, 3, 3], kinds=np.array([0, 0, 1]), objective=budget(5),
        active=lambda g: np.atleast_2d(g)[:, [0, 0, 0]] >= np.array([0, 0, 1]),
    )  # fmt: skip
    strategy = Reinforce(domain, 0)
    seen = search(strategy, lambda g: g[:, 0] + 0.1 * g[:, 1], rounds=8, batch=2)
    assert max(seen) == pytest.approx(2.2)
