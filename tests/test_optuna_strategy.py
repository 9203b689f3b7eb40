"""Optuna's samplers as strategies: the contract, what a study is told, settings, and what cannot be had."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from helpers import TinySpace, domain_of, latency_limit, plain, tiny_estimator, tiny_quality
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.trial import TrialState

from nas.controller import Budget, SearchController, objective
from nas.errors import ContentError, ExperimentError, ExtraError
from nas.evaluators import Lookup
from nas.executors import Serial
from nas.optuna.strategy import NEEDS, OptunaStrategy, named, samplers
from nas.reward import MnasNetHard
from nas.settings import construct
from nas.space import Genomes
from nas.strategies import Domain, Objective, Outcomes, Proposals, Strategy, strategies
from nas.strategies.base import ASKED, COMPLETE, DUPLICATE, EARLIER, FAILED, SCREENED
from nas.study import Study

STATUSES = (COMPLETE, COMPLETE, FAILED, COMPLETE, SCREENED, COMPLETE, DUPLICATE)


def available(name: str) -> bool:
    try:
        named(name)
    except ExtraError:
        return False
    return True


HERE = [name for name in samplers() if available(name)]
SLOW = ("GPSampler",)  # half a second a proposal
every = pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in HERE])
LEARNING = [n for n in HERE if n not in ("RandomSampler", "QMCSampler", "BruteForceSampler")]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def objective_of(domain: Domain, limit: float) -> Objective:
    """The cost is the sum of the genes, and a budget on it."""
    return Objective(
        costs=("latency_ms",),
        price=lambda genomes: 1.0 + genomes.sum(axis=1, keepdims=True).astype(np.float64),
        violation=lambda costs: np.maximum(costs[:, 0] / limit - 1, 0),
        reward=lambda quality, costs: quality,
    )


def domain(limit: float | None = 12.0) -> Domain:
    plain = Domain(np.array([4, 3, 5, 1, 4, 3]), np.array([True, False, True, False, False, True]))
    if limit is None:
        return plain
    return Domain(plain.cardinalities, plain.ordered, objective=objective_of(plain, limit))


def judge(proposals: Proposals, statuses: tuple[str, ...] = STATUSES, source: str = ASKED) -> Outcomes:
    """Outcomes that are a function of the genomes; statuses take turns."""
    genomes, n = proposals.genomes, len(proposals.index)
    status = np.array([statuses[int(i) % len(statuses)] for i in proposals.index], dtype="U10")
    quality = np.where(
        np.isin(status, (COMPLETE, DUPLICATE)), np.sin(genomes @ np.arange(1, genomes.shape[1] + 1)), np.nan
    )
    costs = 1.0 + genomes.sum(axis=1, keepdims=True).astype(np.float64)
    return Outcomes(
        proposals.index, genomes, quality, costs, np.where(status == SCREENED, costs[:, 0] / 10, 0.0), quality,
        proposals.fidelity, status, np.full(n, source),
    )  # fmt: skip


def make(name: str, where: Domain | None = None, seed: int = 0, **settings: Any) -> OptunaStrategy:
    return construct(named(name), settings, where or domain(), seed, where="strategy")


# ---- the contract of strategies ---------------------------------------------------------------------------


@every
def test_proposals_are_numbered_in_range_and_repeatable(name: str) -> None:
    first, second, asked = make(name, seed=5), make(name, seed=5), 0
    for n in (1, 4, 3, *[4] * 8):
        a, b = first.ask(n), second.ask(n)
        assert a.index.tolist() == list(range(asked, asked + n))
        assert a.genomes.dtype == np.int64
        assert ((a.genomes >= 0) & (a.genomes < domain().cardinalities)).all()
        np.testing.assert_array_equal(a.genomes, b.genomes)
        for strategy in (first, second):
            strategy.tell(judge(a))
        asked += n
    assert not np.array_equal(make(name, seed=0).ask(12).genomes, make(name, seed=1).ask(12).genomes)


@every
def test_a_batch_is_asked_as_one_by_one(name: str) -> None:
    together, apart = make(name), make(name)
    for _ in range(5):
        batch = together.ask(4)
        singles = np.concatenate([apart.ask().genomes for _ in range(4)])
        np.testing.assert_array_equal(batch.genomes, singles)
        for strategy in (together, apart):
            strategy.tell(judge(batch))


@every
def test_what_is_under_way_is_not_proposed_again(name: str) -> None:
    strategy = make(name, Domain(np.array([30, 20]), np.array([True, True])))
    for _ in range(6):
        strategy.tell(judge(strategy.ask(4), (COMPLETE,)))
    genomes = strategy.ask(12).genomes
    assert len({row.tobytes() for row in genomes}) == 12
    assert len(strategy.pending) == 12


@every
def test_outcomes_that_were_not_asked_for_are_learnt(name: str) -> None:
    strategy = make(name)
    foreign = Proposals(np.arange(6), np.zeros((6, 6), dtype=np.int64), np.ones(6))
    strategy.tell(judge(foreign, (COMPLETE, FAILED), EARLIER))
    strategy.tell(judge(strategy.ask(2), (FAILED,)))
    states = [trial.state for trial in strategy.study.trials]
    assert states == [TrialState.COMPLETE] * 3 + [TrialState.FAIL] * 2
    strategy.tell(judge(strategy.ask(4)))
    strategy.ask(0)


@every
def test_every_sampler_searches_a_real_space_to_its_end(name: str) -> None:
    space = TinySpace()
    strategy = make(name, domain_of(space))
    for _ in range(10):
        proposals = strategy.ask(4)
        for genome in proposals.genomes:
            space.decode(genome)
        strategy.tell(judge(proposals, (COMPLETE,)))


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in LEARNING])
def test_samplers_learn(name: str) -> None:
    """The distance to a goal, after 60 trials, is smaller than luck's."""
    where = Domain(np.full(8, 5), np.ones(8, dtype=bool))
    goal = np.array([0, 1, 2, 3, 4, 3, 2, 1])

    def mean_of_last(strategy: Strategy) -> float:
        rewards: list[float] = []
        for _ in range(15):
            proposals = strategy.ask(4)
            reward = -np.abs(proposals.genomes - goal).sum(axis=1).astype(float)
            rewards += reward.tolist()
            n = len(reward)
            strategy.tell(
                Outcomes(
                    proposals.index, proposals.genomes, reward, np.ones((n, 1)), np.zeros(n), reward,
                    proposals.fidelity, np.full(n, COMPLETE), np.full(n, ASKED),
                )
            )  # fmt: skip
        return float(np.mean(rewards[-20:]))

    settings = {"population_size": 10} if name.startswith("NSGA") else {}
    assert mean_of_last(make(name, where, 1, **settings)) > mean_of_last(make("RandomSampler", where, 1)) + 1


def test_a_search_is_resumed_without_training_anything_again(tmp_path: Path) -> None:
    space = TinySpace()
    estimator = tiny_estimator(space)
    reward, limit = MnasNetHard(0.02), latency_limit(estimator, 0.5)
    known = objective(estimator, (limit,), reward)
    trained: list[Genomes] = []

    def search(trials: int) -> list[str]:
        plain_domain = domain_of(space)
        where = Domain(plain_domain.cardinalities, plain_domain.ordered, space.active, objective=known)
        strategy = make("TPESampler", where, 3, n_startup_trials=4)
        study = Study(tmp_path / "study.jsonl", "search", space, {})

        def quality(genome: Genomes) -> float:
            trained.append(genome)
            return tiny_quality(genome)

        with Serial(Lookup(quality)) as executor:
            budget = Budget(trials)
            return plain(SearchController(space, strategy, estimator, executor, reward, (limit,), study, budget).run())

    first, longer = search(8), search(14)
    assert longer[:8] == first
    assert len(trained) == len(longer)


# ---- what the study is told ----------------------------------------------------------------------------------


def test_ordered_choices_are_integers_and_others_categories() -> None:
    strategy = make("TPESampler")
    strategy.ask()
    kinds = [type(d) for d in strategy.study.trials[0].distributions.values()]
    assert kinds == [IntDistribution, CategoricalDistribution, IntDistribution] + [CategoricalDistribution] * 2 + [
        IntDistribution
    ]
    numbers = make("QMCSampler")
    numbers.ask()
    assert {type(d) for d in numbers.study.trials[0].distributions.values()} == {IntDistribution}


@pytest.mark.parametrize("name", ["TPESampler", "GPSampler", "NSGAIISampler", "NSGAIIISampler"])
def test_broken_budgets_are_constraints_where_the_sampler_knows_them(name: str) -> None:
    strategy = make(name)
    strategy.tell(judge(strategy.ask(7)))
    trials = strategy.study.trials
    assert [t.state for t in trials] == [TrialState.FAIL if s == FAILED else TrialState.COMPLETE for s in STATUSES]
    (screened,) = (t for t, status in zip(trials, STATUSES, strict=True) if status == SCREENED)
    cost = 1 + sum(screened.params.values())
    assert screened.constraints == {"budget": pytest.approx(np.log1p(cost / 10))}
    told = [t.value for t, status in zip(trials, STATUSES, strict=True) if status == COMPLETE][:3]
    assert screened.value == min(told)
    assert all(t.constraints == {"budget": 0.0} for t in trials if t.state == TrialState.COMPLETE and t is not screened)


def test_broken_budgets_are_failures_where_it_does_not() -> None:
    strategy = make("RandomSampler")
    strategy.tell(judge(strategy.ask(7)))
    states = [TrialState.FAIL if s in (FAILED, SCREENED) else TrialState.COMPLETE for s in STATUSES]
    assert [t.state for t in strategy.study.trials] == states


def test_no_constraint_is_set_where_no_budget_binds() -> None:
    strategy = make("GPSampler", domain(limit=100.0))
    strategy.tell(judge(strategy.ask(7)))
    assert not any(t.constraints for t in strategy.study.trials)


def test_an_infinite_violation_is_told_as_a_number() -> None:
    strategy = make("GPSampler", n_startup_trials=2)
    outcomes = judge(strategy.ask(4), (COMPLETE, SCREENED))
    outcomes.violation[1::2] = np.inf
    strategy.tell(outcomes)
    assert all(np.isfinite(t.constraints["budget"]) for t in strategy.study.trials)
    strategy.ask(2)


@pytest.mark.parametrize(
    "name", ["TPESampler", pytest.param("GPSampler", marks=pytest.mark.slow), "NSGAIISampler", "NSGAIIISampler"]
)
def test_several_objectives(name: str) -> None:
    small = {"population_size": 4} if name.startswith("NSGA") else {"n_startup_trials": 4}
    strategy = make(name, objectives=["quality", "latency_ms"], **small)
    for _ in range(4):
        outcomes = judge(strategy.ask(4))
        strategy.tell(outcomes)
    assert [d.name for d in strategy.study.directions] == ["MAXIMIZE", "MINIMIZE"]
    complete = [t for t in strategy.study.trials if t.state == TrialState.COMPLETE]
    assert all(t.values[1] == 1 + sum(t.params.values()) for t in complete)


def test_a_missing_cost_is_told_as_the_worst() -> None:
    strategy = make("NSGAIISampler", objectives=["quality", "latency_ms"])
    outcomes = judge(strategy.ask(3), (COMPLETE, COMPLETE, SCREENED))
    outcomes.costs[2], outcomes.violation[2] = np.nan, np.inf
    strategy.tell(outcomes)
    assert strategy.study.trials[2].values == [outcomes.quality[:2].min(), outcomes.costs[:2].max()]


# ---- settings, and what cannot be had ------------------------------------------------------------------------


def test_the_family_is_loaded_by_name_only() -> None:
    assert isinstance(construct(strategies.get("optuna:TPESampler"), {}, domain(), 0, where="strategy"), Strategy)
    with pytest.raises(ContentError, match=r"(.|\n)*optuna:NAME"):
        strategies.get("optuna")


def test_settings_are_the_samplers_own() -> None:
    strategy = make("TPESampler", n_startup_trials=3, multivariate=False)
    assert strategy.study.sampler._n_startup_trials == 3  # type: ignore[attr-defined]
    offered = set(inspect.signature(named("TPESampler")).parameters)
    assert {"objectives", "n_startup_trials", "constant_liar"} <= offered
    assert not offered & {"gamma", "weights", "constraints_func"}  # functions, which no file can hold


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("TPESampler", {"startup": 3}, r"Unknown key strategy\.startup(.|\n)*objectives(.|\n)*n_startup_trials"),
        ("TPESampler", {"n_startup_trials": "ten"}, r"strategy\.n_startup_trials is 'ten'(.|\n)*int"),
        ("TPESampler", {"gamma": 3}, r"Unknown key strategy\.gamma"),
        ("NSGAIISampler", {"population_size": 1}, r"optuna:NSGAIISampler refuses(.|\n)*greater than or equal to 2"),
        ("TPESampler", {"objectives": ["accuracy"]}, r"\['accuracy'\](.|\n)*reward, quality, latency_ms"),
        ("TPESampler", {"objectives": []}, r"one or several of"),
        ("TPESampler", {"objectives": ["quality", "quality"]}, r"once each"),
    ],
)
def test_wrong_settings_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        make(name, **settings)


def test_costs_are_no_objectives_where_they_are_unknown() -> None:
    with pytest.raises(ExperimentError, match=r"latency_ms(.|\n)*one or several of reward, quality, once"):
        make("NSGAIISampler", domain(None), objectives=["quality", "latency_ms"])


def test_an_unknown_sampler_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ContentError, match=r"optuna:TPE'(.|\n)*GPSampler, QMCSampler, TPESampler|TPESampler"):
        named("TPE")
    with pytest.raises(ContentError, match="Unknown strategy 'optuna:GridSampler'"):
        named("GridSampler")  # it wants the values of a grid


def test_a_missing_package_is_named_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NEEDS, "RandomSampler", ("a_package_that_does_not_exist",))
    with pytest.raises(ExtraError, match=r"RandomSampler needs a_package(.|\n)*pip install a_package"):
        named("RandomSampler")


def test_seeds_of_any_size() -> None:
    assert make("RandomSampler", seed=2**40 + 1).ask(3).genomes.shape == (3, 6)
