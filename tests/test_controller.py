"""The loop: what is ruled out costs nothing, what fails is recorded, and a resume is bit-identical."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import TinySpace, domain_of, latency_limit, plain, tiny_estimator, tiny_quality

from nas.controller import Budget, SearchController, best, evaluate_one
from nas.errors import BudgetError, RewardError, SpaceError, StudyError, TrainingError
from nas.evaluators import Evaluation, Evaluator, Lookup
from nas.executors import Executor, Processes, Serial
from nas.reward import Limit, MnasNetHard, Reward, TuNASAbsolute, WeightedProduct
from nas.space import Genomes
from nas.strategies import Domain, Draws, Outcomes, Proposals, RandomSearch, Strategy, strategies
from nas.strategies.base import ASKED, COMPLETE, DUPLICATE, EARLIER, ENQUEUED, FAILED, SCREENED
from nas.study import Study, Trial, trainings

SPACE = TinySpace()
ESTIMATOR = tiny_estimator(SPACE)


class Recording(Evaluator):
    """Remembers which genomes it was given; the quality comes from a function that may raise."""

    def __init__(self, quality: Callable[[Genomes], float] = tiny_quality) -> None:
        self.quality, self.genomes = quality, list[Genomes]()

    def evaluate(self, genome: Genomes, fidelity: float = 1.0) -> Evaluation:
        self.genomes.append(genome.copy())
        return Evaluation(self.quality(genome))


class Listening(RandomSearch):
    """Random search that keeps what it was told."""

    def __init__(self, domain: Domain, seed: int = 0) -> None:
        super().__init__(domain, seed)
        self.told: list[Outcomes] = []

    def learn(self, outcomes: Outcomes) -> None:
        self.told.append(outcomes)


def controller(
    path: Path,
    *,
    strategy: Strategy | None = None,
    evaluator: Evaluator | None = None,
    executor: Executor | None = None,
    limits: Sequence[Limit] = (),
    reward: Reward | None = None,
    trials: int = 12,
    **settings: Any,
) -> SearchController:
    settings.setdefault("budget", Budget(trials))
    return SearchController(
        space=SPACE,
        strategy=strategy or RandomSearch(domain_of(SPACE), 0),
        estimator=ESTIMATOR,
        executor=executor or Serial(evaluator or Recording()),
        reward=reward or MnasNetHard(0.02),
        limits=tuple(limits),
        study=Study(path, "search", SPACE, {"seed": 0}),
        **settings,
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "study.jsonl"


# ---- the fast loop -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(strategies))
def test_what_breaks_the_budget_is_never_trained(path: Path, kind: str) -> None:
    limit = latency_limit(ESTIMATOR, 0.3)
    evaluator = Recording()
    one = controller(
        path, strategy=strategies.get(kind)(domain_of(SPACE), 1), evaluator=evaluator, limits=[limit], trials=10
    )
    trials = one.run()
    assert len(trials) == len(evaluator.genomes) == 10
    assert (ESTIMATOR.price(np.array(evaluator.genomes))[:, 0] <= limit.limit).all()
    assert all(t.violation == 0 and t.costs["latency_ms"] <= limit.limit for t in trials)
    assert one.counts.infeasible > 0
    assert one.counts.asked == 10 + one.counts.infeasible + one.counts.duplicates


def test_several_budgets_at_once(path: Path) -> None:
    limits = [latency_limit(ESTIMATOR, 0.6), Limit("params", 1500.0)]
    trials = controller(path, limits=limits, trials=6).run()
    assert all(t.costs["params"] <= 1500 and t.costs["latency_ms"] <= limits[0].limit for t in trials)


def test_nothing_is_evaluated_twice_and_duplicates_cost_nothing(path: Path) -> None:
    """40 of the space's 72 distinct candidates: random search must have met many twice."""
    evaluator = Recording()
    one = controller(path, evaluator=evaluator, trials=40)
    assert len(one.run()) == 40
    ids = [SPACE.canonical_id(genome) for genome in evaluator.genomes]
    assert len(set(ids)) == 40
    assert one.counts.duplicates > 5
    assert len(list(one.study)) == 40


def test_an_exhausted_space_ends_the_search(path: Path) -> None:
    one = controller(path, trials=500)
    one.strategy = RandomSearch(domain_of(SPACE), 2)
    assert len(one.run()) == (8 + 16) * 3  # all distinct candidates, see test_space


def test_nothing_feasible(path: Path) -> None:
    evaluator = Recording()
    limits = [Limit("latency_ms", 1e-6), Limit("params", 1e9)]
    with pytest.raises(BudgetError, match=r"None of \d+ candidates meets the budget") as caught:
        controller(path, evaluator=evaluator, limits=limits).run()
    lowest = ESTIMATOR.price(SPACE.sample(np.random.default_rng(0), 5000))[:, 0].min()
    assert f"latency_ms 1e-06 asked, lowest in the space {lowest:.4g}" in caught.value.expected
    assert "larger budget" in caught.value.remedy
    assert not evaluator.genomes


def test_what_the_strategy_is_told(path: Path) -> None:
    strategy = Listening(domain_of(SPACE), 0)
    limit = latency_limit(ESTIMATOR, 0.7)

    def quality(genome: Genomes) -> float:
        return math.nan if genome[3] == 1 and genome[0] == 0 else tiny_quality(genome)

    one = controller(path, strategy=strategy, evaluator=Lookup(quality), limits=[limit], trials=30)
    trials = {t.index: t for t in one.run()}
    known: dict[str, float] = {}
    statuses: list[str] = []
    for outcomes in strategy.told:
        costs = ESTIMATOR.price(outcomes.genomes)
        np.testing.assert_array_equal(outcomes.costs, costs)
        np.testing.assert_allclose(outcomes.violation, np.maximum(costs[:, 0] / limit.limit - 1, 0))
        assert (outcomes.source == ASKED).all()
        for i, status in enumerate(outcomes.status):
            statuses.append(str(status))
            identity = SPACE.canonical_id(outcomes.genomes[i])
            index = int(outcomes.index[i])
            if status == SCREENED:
                assert outcomes.violation[i] > 0
                assert math.isnan(outcomes.quality[i])
                assert index not in trials
            elif index in trials:
                assert tuple(outcomes.genomes[i]) == trials[index].genome
                np.testing.assert_equal(outcomes.quality[i], trials[index].quality)
                known[identity] = trials[index].quality
            else:
                np.testing.assert_equal(outcomes.quality[i], known[identity])
            if status in (COMPLETE, DUPLICATE):
                wanted = MnasNetHard(0.02)(outcomes.quality[i], costs[i, 0])
                assert outcomes.reward[i] == pytest.approx(float(wanted), rel=1e-12)
            else:
                assert math.isnan(outcomes.reward[i])
    assert {COMPLETE, FAILED, SCREENED, DUPLICATE} <= set(statuses)
    # Numbers are never used twice, and batches are told in the order of the numbers.
    indices = np.concatenate([outcomes.index for outcomes in strategy.told])
    assert len(set(indices.tolist())) == len(indices)


# ---- the slow loop -----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3, 5])
def test_budget_and_numbers(path: Path, batch: int) -> None:
    seen: list[Trial] = []
    one = controller(path, trials=11, batch=batch, on_trial=seen.append)
    trials = one.run()
    assert len(trials) == 11
    assert plain(trials) == plain(list(one.study)) == plain(seen)
    assert [t.index for t in trials] == sorted(t.index for t in trials)
    for t in trials:
        assert t.quality == tiny_quality(np.array(t.genome))
        assert t.reward == float(MnasNetHard(0.02)(t.quality, t.costs["latency_ms"]))
        assert t.costs == dict(zip(ESTIMATOR.costs, ESTIMATOR.price(np.array(t.genome))[0].tolist(), strict=True))
        assert t.status == COMPLETE


def test_trials_say_what_had_been_told(path: Path) -> None:
    trials = controller(path, trials=12, batch=4).run()
    seen = [t.seen for t in trials]
    assert seen == sorted(seen)
    assert seen[:4] == [0] * 4
    assert len({tuple(seen[i : i + 4]) for i in (0, 4, 8)}) == 3
    assert all(len(set(seen[i : i + 4])) == 1 for i in (0, 4, 8))


def test_time_is_a_budget_too(path: Path) -> None:
    assert controller(path, budget=Budget(1000, seconds=0.0)).run() == []

    def slowly(genome: Genomes) -> float:
        end = time.monotonic() + 0.1
        while time.monotonic() < end:
            pass
        return tiny_quality(genome)

    import time

    trials = controller(path, evaluator=Recording(slowly), budget=Budget(1000, seconds=0.35), batch=1).run()
    assert 2 <= len(trials) <= 4


def test_a_search_whose_time_is_spent_still_has_its_trials(path: Path) -> None:
    def slowly(genome: Genomes) -> float:
        time.sleep(0.1)
        return tiny_quality(genome)

    import time

    budget = Budget(1000, seconds=0.35)
    trials = controller(path, evaluator=Recording(slowly), budget=budget, batch=1).run()
    evaluator = Recording()
    again = controller(path, evaluator=evaluator, budget=budget, batch=1).run()
    assert plain(again) == plain(trials)
    assert not evaluator.genomes


def moody(genome: Genomes) -> float:
    if genome[1] == 1 and genome[0] == 0:
        raise TrainingError("The loss became nan in epoch 2.", remedy="a lower rate")
    if genome[1] == 1 and genome[6] == 1:
        raise ZeroDivisionError("division by zero")
    return math.nan if genome[4] == 1 else tiny_quality(genome)


REASONS = {
    "", "The loss became nan in epoch 2.", "ZeroDivisionError: division by zero", "the quality is nan",
}  # fmt: skip


@pytest.mark.parametrize("kind", list(strategies))
def test_failures_are_recorded_and_the_search_goes_on(path: Path, kind: str) -> None:
    evaluator = Recording(moody)
    one = controller(path, strategy=strategies.get(kind)(domain_of(SPACE), 0), evaluator=evaluator, trials=24)
    trials = one.run()
    assert len(trials) == 24
    assert {t.reason for t in trials} == REASONS
    for t in trials:
        assert (t.status == FAILED) == bool(t.reason) == math.isnan(t.quality) == math.isnan(t.reward)
    assert plain(list(one.study)) == plain(trials)
    # What failed once is not tried again.
    assert len({SPACE.canonical_id(genome) for genome in evaluator.genomes}) == 24


def test_a_search_in_which_everything_fails(path: Path) -> None:
    trials = controller(path, evaluator=Recording(lambda genome: math.nan), trials=8).run()
    assert [t.reason for t in trials] == ["the quality is nan"] * 8
    assert best(trials, 3) == []


class Dying(Executor):
    """An executor some of whose workers die: the contract says that an exception object stands for them."""

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator

    def run(self, function: Callable[[Any, Any], Any], items: Sequence[Any]) -> Any:
        for i in reversed(range(len(items))):  # results arrive in any order
            dead = items[i][0][1] == 1
            yield i, TrainingError("The worker process died.") if dead else function(self.evaluator, items[i])


def test_a_dead_worker_costs_its_candidate(path: Path) -> None:
    trials = controller(path, executor=Dying(Recording()), trials=12).run()
    dead = [t for t in trials if t.genome[1] == 1]
    assert 0 < len(dead) < 12
    assert all(t.reason == "The worker process died." and t.status == FAILED for t in dead)
    assert all(t.status == COMPLETE for t in trials if t not in dead)
    assert [t.index for t in trials] == sorted(t.index for t in trials)


def test_the_order_of_arrival_does_not_matter(path: Path, tmp_path: Path) -> None:
    class Backwards(Dying):
        def run(self, function: Callable[[Any, Any], Any], items: Sequence[Any]) -> Any:
            for i in reversed(range(len(items))):
                yield i, function(self.evaluator, items[i])

    def run(path: Path, executor: Executor) -> list[Trial]:
        return controller(path, executor=executor, strategy=strategies.get("evolution")(domain_of(SPACE), 0)).run()

    assert plain(run(path, Serial(Recording()))) == plain(run(tmp_path / "other.jsonl", Backwards(Recording())))


def test_worker_processes_give_the_same_search(path: Path, tmp_path: Path) -> None:
    here = controller(
        path, evaluator=Lookup(tiny_quality), strategy=strategies.get("reinforce")(domain_of(SPACE), 0)
    ).run()
    with Processes(Lookup(tiny_quality), 2) as pool:
        there = controller(
            tmp_path / "other.jsonl", executor=pool, strategy=strategies.get("reinforce")(domain_of(SPACE), 0)
        ).run()
    assert plain(here) == plain(there)


def test_rewards_that_add_take_qualities_below_zero(path: Path) -> None:
    reward = TuNASAbsolute(0.02)
    trials = controller(path, evaluator=Recording(lambda g: tiny_quality(g) - 5), reward=reward, trials=6).run()
    assert all(t.reward == float(reward(t.quality, t.costs["latency_ms"])) for t in trials)
    assert all(t.reward < 0 for t in trials)


def test_a_reward_of_several_costs(path: Path) -> None:
    weights = {"size_bytes": -0.1, "latency_ms": -0.2}
    reward = WeightedProduct({"latency_ms": 0.02, "size_bytes": 5000.0}, weights)
    listening = Listening(domain_of(SPACE), 0)
    trials = controller(path, strategy=listening, reward=reward, trials=6).run()
    for t in trials:
        factors = [(t.costs[name] / reward.targets[name]) ** weight for name, weight in weights.items()]
        assert t.reward == pytest.approx(t.quality * math.prod(factors), rel=1e-12)
    told = np.concatenate([outcomes.reward[outcomes.status == COMPLETE] for outcomes in listening.told])
    assert told.tolist() == [t.reward for t in trials]


def test_a_reward_of_a_cost_that_nothing_prices(path: Path) -> None:
    """Said before the first training, not once for every candidate."""
    evaluator = Recording()
    with pytest.raises(RewardError, match=r"reads the cost 'energy_mj'[^$]*one of latency_ms"):
        controller(path, evaluator=evaluator, reward=MnasNetHard({"energy_mj": 1.0})).run()
    assert evaluator.genomes == []


def test_a_quality_that_the_reward_refuses(path: Path) -> None:
    """An accuracy of 0 is rare, but it is no reason to lose a search."""
    trials = controller(path, evaluator=Recording(lambda g: 0.0 if g[1] else tiny_quality(g)), trials=8).run()
    assert {t.status for t in trials} == {COMPLETE, FAILED}


def test_qualities_of_any_float_type(path: Path) -> None:
    class Single(Recording):
        def evaluate(self, genome: Genomes, fidelity: float = 1.0) -> Evaluation:
            return Evaluation(np.float32(0.5))  # type: ignore[arg-type]

    assert [t.quality for t in controller(path, evaluator=Single(), trials=2).run()] == [0.5, 0.5]


# ---- fidelity ----------------------------------------------------------------------------------------


class Ladder(RandomSearch):
    """Asks for every genome of a list at the fidelities that stand beside it, then for random ones in full."""

    def __init__(self, domain: Domain, script: Sequence[tuple[int, float]]) -> None:
        super().__init__(domain, 0)
        self.script, self.told = list(script), list[Outcomes]()

    def propose_at(self, draws: Draws) -> tuple[Genomes, Any]:
        genomes, fidelity = super().propose_at(draws)
        for row, number in enumerate(draws.index.tolist()):
            if number < len(self.script):
                which, fidelity[row] = self.script[number]
                genomes[row] = SPACE.sample(np.random.default_rng(which), 1)[0]
        return genomes, fidelity

    def learn(self, outcomes: Outcomes) -> None:
        self.told.append(outcomes)

    def heard(self) -> list[tuple[int, str, float, float]]:
        """Number, status, fidelity and quality of everything told, in the order of telling."""
        return [
            (int(o.index[i]), str(o.status[i]), float(o.fidelity[i]), float(o.quality[i]))
            for o in self.told
            for i in range(len(o))
        ]


class Slow(Evaluator):
    """Quality grows with the training."""

    def __init__(self) -> None:
        self.given: list[float] = []

    def evaluate(self, genome: Genomes, fidelity: float = 1.0) -> Evaluation:
        self.given.append(fidelity)
        return Evaluation(tiny_quality(genome) * fidelity)


def test_a_lower_fidelity_never_stands_in_for_a_higher_one(path: Path) -> None:
    evaluator = Slow()
    strategy = Ladder(domain_of(SPACE), [(0, 0.25), (0, 0.5), (0, 0.25), (0, 0.5), (0, 1.0), (0, 0.25), (0, 1.0)])
    trials = controller(path, strategy=strategy, evaluator=evaluator, budget=Budget(2), batch=1).run()
    assert evaluator.given[:3] == [0.25, 0.5, 1.0]
    quality = tiny_quality(np.array(trials[0].genome))
    assert strategy.heard()[:7] == [
        (0, COMPLETE, 0.25, 0.25 * quality),
        (1, COMPLETE, 0.5, 0.5 * quality),
        (2, DUPLICATE, 0.5, 0.5 * quality),
        (3, DUPLICATE, 0.5, 0.5 * quality),
        (4, COMPLETE, 1.0, quality),
        (5, DUPLICATE, 1.0, quality),
        (6, DUPLICATE, 1.0, quality),
    ]
    for t in trials:
        assert t.reward == float(MnasNetHard(0.02)(t.quality, t.costs["latency_ms"]))
    assert [(t.index, t.fidelity) for t in list(controller(path).study)[:3]] == [(0, 0.25), (1, 0.5), (4, 1.0)]


def test_the_budget_counts_full_trainings(path: Path) -> None:
    script = [(i, 1 / 9) for i in range(18)]
    strategy = Ladder(domain_of(SPACE), script)
    trials = controller(path, strategy=strategy, evaluator=Slow(), budget=Budget(5), batch=4).run()
    assert 5 - 1e-9 <= trainings(trials) < 6
    assert len(trials) > 5
    assert [t.fidelity for t in best(trials, 9)] == [1.0] * sum(t.fidelity == 1 for t in trials)
    assert {t.fidelity for t in best(trials[:4], 9)} == {1 / 9}, "where none was trained in full, the next best"


def test_a_failure_at_a_low_fidelity_is_no_failure_at_a_higher_one(path: Path) -> None:
    class Late(Slow):
        def evaluate(self, genome: Genomes, fidelity: float = 1.0) -> Evaluation:
            return Evaluation(math.nan if fidelity < 1 else tiny_quality(genome))

    strategy = Ladder(domain_of(SPACE), [(0, 0.5), (0, 0.25), (0, 1.0), (0, 0.5)])
    controller(path, strategy=strategy, evaluator=Late(), budget=Budget(2), batch=1).run()
    heard = strategy.heard()[:4]
    assert [h[1] for h in heard] == [FAILED, FAILED, COMPLETE, DUPLICATE]
    assert [h[2] for h in heard] == [0.5, 0.5, 1.0, 1.0]


def test_a_resume_at_another_fidelity_is_refused(path: Path) -> None:
    for fidelity, wanted in ((0.5, True), (0.5, True), (0.25, False)):
        one = controller(path, strategy=Ladder(domain_of(SPACE), [(0, fidelity)]), budget=Budget(1), batch=1)
        if wanted:
            one.run()
        else:
            with pytest.raises(StudyError, match="another candidate"):
                one.run()


# ---- twins -------------------------------------------------------------------------------------------


class Repeating(Ladder):
    """Does not look whether it repeats itself: what others' strategies may do."""

    def ask(self, n: int = 1) -> Proposals:
        asked = super().ask(n)
        genomes, fidelity = asked.genomes.copy(), asked.fidelity.copy()
        for row, number in enumerate(asked.index.tolist()):
            if number < len(self.script):
                which, fidelity[row] = self.script[number]
                genomes[row] = SPACE.sample(np.random.default_rng(which), 1)[0]
        return Proposals(asked.index, genomes, fidelity)


def test_twins_are_told_with_the_batch(path: Path) -> None:
    """Nothing stays under way for ever: a proposal of what waits in the batch gets the quality that is found."""
    evaluator = Slow()
    strategy = Repeating(domain_of(SPACE), [(0, 1.0), (0, 1.0), (0, 0.5), (1, 0.5), (1, 1.0), (1, 0.5), (2, 1.0)])
    one = controller(path, strategy=strategy, evaluator=evaluator, trials=3, batch=3)
    trials = one.run()
    assert [t.index for t in trials][:3] == [0, 3, 4]
    assert not len(strategy.pending)
    (first, *_) = strategy.told
    assert first.index.tolist() == [0, 1, 2, 3, 4]
    assert first.status.tolist() == [COMPLETE, DUPLICATE, DUPLICATE, COMPLETE, COMPLETE]
    assert first.fidelity.tolist() == [1.0, 1.0, 1.0, 0.5, 1.0]
    assert len(set(first.quality[:3])) == 1
    assert np.isfinite(first.reward).all()
    assert one.counts.asked == len(trials) + one.counts.infeasible + one.counts.duplicates


def test_twins_of_a_failure_failed(path: Path) -> None:
    strategy = Repeating(domain_of(SPACE), [(0, 1.0), (0, 1.0)])
    evaluator = Recording(lambda genome: math.nan)
    controller(path, strategy=strategy, evaluator=evaluator, trials=2, batch=2).run()
    assert strategy.told[0].status.tolist() == [FAILED, FAILED, FAILED]
    assert len(evaluator.genomes) == 2


# ---- from elsewhere ----------------------------------------------------------------------------------


def test_enqueued_candidates_come_first(path: Path, tmp_path: Path) -> None:
    limit = latency_limit(ESTIMATOR, 0.6)
    whole = SPACE.decode(np.zeros(8, dtype=np.int64)).as_dict()
    wanted = [whole, {"width": 8, "kd_weight": 0.5}, {}, dict(whole)]
    strategy = Listening(domain_of(SPACE), 3)

    def run(path: Path, evaluator: Evaluator, strategy: Strategy) -> list[Trial]:
        return controller(
            path, strategy=strategy, evaluator=evaluator, limits=[limit], trials=8, enqueue=wanted, batch=2
        ).run()

    evaluator = Recording()
    trials = run(path, evaluator, strategy)
    assert len(trials) == len(evaluator.genomes) == 8, "they are paid for like any other"
    assert [(t.index, t.source) for t in trials[:3]] == [(-4, ENQUEUED), (-3, ENQUEUED), (-2, ENQUEUED)]
    assert {t.source for t in trials[3:]} == {ASKED}
    assert SPACE.decode(trials[0].genome).as_dict() == whole
    second = SPACE.decode(trials[1].genome)
    assert (second["width"], second["kd_weight"]) == (8, 0.5)
    assert all(t.violation == 0 and t.fidelity == 1 for t in trials)
    told = [(int(o.index[i]), str(o.status[i]), str(o.source[i])) for o in strategy.told for i in range(len(o))]
    # The fourth repeats the first, which is known when its turn comes.
    assert told[:4] == [
        (-4, COMPLETE, ENQUEUED), (-3, COMPLETE, ENQUEUED), (-1, DUPLICATE, ENQUEUED), (-2, COMPLETE, ENQUEUED),
    ]  # fmt: skip
    assert not len(strategy.pending)
    for k in (0, 1, 3, 5):
        again = Recording()
        cut = truncated(path, tmp_path / f"{k}.jsonl", k)
        assert plain(run(cut, again, Listening(domain_of(SPACE), 3))) == plain(trials)
        assert len(again.genomes) == 8 - k


def test_an_enqueued_candidate_that_breaks_the_budget(path: Path) -> None:
    limit = latency_limit(ESTIMATOR, 0.2)
    heavy = {"depth": 2, "width": 16, "bits": 32, "prune": 0.0, "kernel": 5}
    one = controller(path, limits=[limit], trials=3, enqueue=[heavy, {"width": 8}])
    trials = one.run()
    assert one.ruled_out == [heavy]
    assert [t.source for t in trials] == [ENQUEUED, ASKED, ASKED]


@pytest.mark.parametrize(
    ("candidate", "said"), [({"colour": 1}, "no choice 'colour'"), ({"width": 9}, "9 is no value of choice 'width'")]
)
def test_an_enqueued_candidate_of_another_space(path: Path, candidate: dict[str, Any], said: str) -> None:
    with pytest.raises(SpaceError, match=said):
        controller(path, enqueue=[candidate]).run()


def test_earlier_outcomes_cost_nothing_and_are_believed(path: Path, tmp_path: Path) -> None:
    """Their qualities are another search's; costs and rewards are this one's, and they may be evaluated again."""
    limit = latency_limit(ESTIMATOR, 0.5)
    earlier = controller(tmp_path / "then.jsonl", evaluator=Recording(moody), reward=MnasNetHard(1.0), trials=20).run()
    strategy = Listening(domain_of(SPACE), 9)
    evaluator = Recording()
    trials = controller(path, strategy=strategy, evaluator=evaluator, limits=[limit], trials=30, earlier=earlier).run()
    assert len(trials) == len(evaluator.genomes) == 30
    assert trials[0].seen >= 20
    first, *_ = strategy.told
    assert (first.source == EARLIER).all()
    np.testing.assert_array_equal(first.genomes, [t.genome for t in earlier])
    np.testing.assert_array_equal(first.quality, [t.quality for t in earlier])
    costs = ESTIMATOR.price(first.genomes)
    np.testing.assert_array_equal(first.costs, costs)
    np.testing.assert_array_equal(first.violation > 0, costs[:, 0] > limit.limit)
    scored = first.status == COMPLETE
    np.testing.assert_array_equal(first.reward[scored], MnasNetHard(0.02)(first.quality[scored], costs[scored, 0]))
    assert np.isnan(first.reward[~scored]).all()
    assert not all((o.source == EARLIER).any() for o in strategy.told[1:])
    ids = {SPACE.canonical_id(np.array(t.genome)) for t in earlier}
    assert ids & {SPACE.canonical_id(np.array(t.genome)) for t in trials}, "they are no known qualities"


def test_an_earlier_quality_that_the_reward_refuses(path: Path, tmp_path: Path) -> None:
    reward = TuNASAbsolute(0.02)
    earlier = controller(tmp_path / "then.jsonl", evaluator=Recording(lambda g: -1.0), reward=reward, trials=2).run()
    strategy = Listening(domain_of(SPACE), 9)
    controller(path, strategy=strategy, trials=2, earlier=earlier).run()
    assert strategy.told[0].status.tolist() == [FAILED, FAILED]


def test_earlier_outcomes_help(path: Path, tmp_path: Path) -> None:
    """A population that an earlier search has filled is mutated from the first proposal on."""
    earlier = controller(tmp_path / "then.jsonl", trials=50).run()

    def run(path: Path, known: list[Trial]) -> list[Trial]:
        strategy = strategies.get("evolution")(domain_of(SPACE), 1)
        return controller(path, strategy=strategy, trials=6, earlier=known).run()

    assert np.mean([t.reward for t in run(path, earlier)]) > np.mean([t.reward for t in run(tmp_path / "b.jsonl", [])])


# ---- retries -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("retries", [0, 1])
def test_a_failure_may_be_tried_again(path: Path, retries: int) -> None:
    class Flaky(Recording):
        def evaluate(self, genome: Genomes, fidelity: float = 1.0) -> Evaluation:
            before = sum(np.array_equal(genome, other) for other in self.genomes)
            self.genomes.append(genome.copy())
            if genome[1] == 1 and before == 0:
                raise TrainingError("Out of time in epoch 2 after 3 s.")
            return Evaluation(math.nan if genome[4] == 1 else tiny_quality(genome))

    evaluator = Flaky()
    trials = controller(path, evaluator=evaluator, trials=16, retries=retries).run()
    assert len(trials) == len(list(controller(path).study)) == 16
    late = [t for t in trials if t.genome[1] == 1 and t.genome[4] == 0]
    assert late
    assert {t.status for t in late} == {COMPLETE if retries else FAILED}
    assert all(t.reason == "the quality is nan" for t in trials if t.genome[4] == 1 and (retries or t.genome[1] == 0))
    failures = sum(t.genome[1] == 1 or t.genome[4] == 1 for t in trials)
    assert len(evaluator.genomes) == 16 + retries * failures


# ---- resuming ----------------------------------------------------------------------------------------


def truncated(source: Path, target: Path, trials: int) -> Path:
    """The journal as a crash would leave it after so many trials."""
    kept, count = [], 0
    for line in source.read_text().splitlines(keepends=True):
        count += "index" in json.loads(line).get("user_attrs", {})
        if count > trials:
            break
        kept.append(line)
    target.write_text("".join(kept))
    return target


@pytest.mark.parametrize("kind", list(strategies))
def test_resuming_after_any_trial_is_bit_identical(path: Path, tmp_path: Path, kind: str) -> None:
    limit = latency_limit(ESTIMATOR, 0.8)

    def run(path: Path, evaluator: Recording) -> SearchController:
        strategy = strategies.get(kind)(domain_of(SPACE), 4)
        one = controller(path, strategy=strategy, evaluator=evaluator, limits=[limit], trials=26)
        one.trials = one.run()  # type: ignore[attr-defined]
        return one

    whole = run(path, Recording(moody))
    trials = whole.trials  # type: ignore[attr-defined]
    assert len({t.reason for t in trials}) > 2
    for k in (0, 1, 3, 4, 10, 21, 25, 26):
        evaluator = Recording(moody)
        resumed = run(truncated(path, tmp_path / f"cut{k}.jsonl", k), evaluator)
        assert plain(resumed.trials) == plain(trials), k  # type: ignore[attr-defined]
        assert plain(list(resumed.study)) == plain(trials)
        assert resumed.counts == whole.counts
        assert len(evaluator.genomes) == 26 - k


@pytest.mark.parametrize("kind", list(strategies))
def test_a_larger_budget_goes_on_where_it_ended(path: Path, tmp_path: Path, kind: str) -> None:
    def run(path: Path, trials: int) -> list[Trial]:
        return controller(path, strategy=strategies.get(kind)(domain_of(SPACE), 4), trials=trials).run()

    first = run(path, 8)
    assert plain(run(path, 16)[:8]) == plain(first)
    assert plain(run(path, 16)) == plain(run(tmp_path / "at-once.jsonl", 16))
    assert plain(run(path, 8)) == plain(first)


def test_a_torn_journal_is_resumed(path: Path, tmp_path: Path) -> None:
    trials = controller(path, trials=12).run()
    for length in (path.stat().st_size - 1, path.stat().st_size - 300, path.stat().st_size // 2):
        torn = tmp_path / "torn.jsonl"
        shutil.copy(path, torn)
        with torn.open("r+b") as file:
            file.truncate(length)
        assert plain(controller(torn, trials=12).run()) == plain(trials)


def test_a_study_of_other_candidates_is_refused(path: Path) -> None:
    controller(path, trials=6).run()
    with pytest.raises(StudyError, match="another candidate than this experiment asks for"):
        controller(path, trials=6, strategy=RandomSearch(domain_of(SPACE), 99)).run()


# ---- helpers -----------------------------------------------------------------------------------------


def test_the_best_are_feasible_and_complete() -> None:
    def trial(index: int, reward: float, **changes: Any) -> Trial:
        fields: dict[str, Any] = {
            "index": index, "genome": (0,), "seen": 0, "status": COMPLETE, "costs": {}, "violation": 0.0,
            "reward": reward,
        }  # fmt: skip
        return Trial(**{**fields, **changes})

    trials = [
        trial(0, 0.5), trial(1, 0.9, violation=0.1), trial(2, math.nan, status=FAILED), trial(3, 0.7), trial(4, 0.5),
    ]  # fmt: skip
    assert [t.index for t in best(trials, 2)] == [3, 0]
    assert [t.index for t in best(trials, 9)] == [3, 0, 4]


def test_evaluating_holds_the_training_lock() -> None:
    from nas.locks import cache_dir, file_lock

    class Looking(Evaluator):
        def evaluate(self, genome: Genomes, fidelity: float = 1.0) -> Evaluation:
            try:
                with file_lock(cache_dir() / "machine.lock", wait=False):
                    return Evaluation(0.0)
            except BlockingIOError:
                return Evaluation(fidelity)

    assert evaluate_one(Looking(), (np.zeros(2, dtype=np.int64), 0.25)).quality == 0.25
