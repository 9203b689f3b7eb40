"""Successive halving: who is promoted, what the wrapped strategy hears, and better candidates for equal training."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import TinySpace, domain_of, latency_limit, plain, tiny_estimator, tiny_quality

from nas.controller import Budget, SearchController, best
from nas.errors import ContentError, ExperimentError
from nas.evaluators import Evaluation, Evaluator
from nas.executors import Serial
from nas.reward import MnasNetHard
from nas.settings import construct
from nas.space import Genomes
from nas.strategies import Domain, Halving, Outcomes, Proposals, Strategy, strategies
from nas.strategies.base import ASKED, COMPLETE, DUPLICATE, EARLIER, ENQUEUED, FAILED, SCREENED
from nas.strategies.halving import layers
from nas.study import Study, Trial, trainings

LOW, MIDDLE, FULL = 1 / 9, 1 / 3, 1.0


def wide(genes: int = 6, values: int = 4) -> Domain:
    return Domain(np.full(genes, values), np.zeros(genes, dtype=bool))


def outcomes(proposals: Proposals, reward: Any, **changes: Any) -> Outcomes:
    n = len(proposals.index)
    reward = np.broadcast_to(np.asarray(reward, dtype=np.float64), n)
    fields: dict[str, Any] = {
        "index": proposals.index, "genomes": proposals.genomes, "quality": reward, "costs": np.ones((n, 1)),
        "violation": np.zeros(n), "reward": reward, "fidelity": proposals.fidelity, "status": np.full(n, COMPLETE),
        "source": np.full(n, ASKED),
    }  # fmt: skip
    return Outcomes(**{**fields, **changes})


def halving(name: str = "random", domain: Domain | None = None, seed: int = 0, **settings: Any) -> Halving:
    made = construct(strategies.get(f"halving:{name}"), settings, domain or wide(), seed, where="strategy")
    assert isinstance(made, Halving)
    return made


class Listening(Strategy):
    """Counts through the genomes, and keeps what it is told."""

    def __init__(self, domain: Domain, seed: int = 0) -> None:
        super().__init__(domain, seed)
        self.told: list[Outcomes] = []

    def propose(self, draws: Any) -> Genomes:
        places = draws.index[:, None] // 4 ** np.arange(len(self.domain.cardinalities))
        return np.asarray(places % 4)

    def learn(self, outcomes: Outcomes) -> None:
        self.told.append(outcomes)


@pytest.fixture
def listening(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(strategies._items, "listening", Listening)
    return "listening"


def heard(strategy: Halving) -> list[tuple[int, str, str, float, float]]:
    """Number, source, status, fidelity and reward of everything that the wrapped strategy was told."""
    assert isinstance(strategy.wrapped, Listening)
    return [
        (int(o.index[i]), str(o.source[i]), str(o.status[i]), float(o.fidelity[i]), float(o.reward[i]))
        for o in strategy.wrapped.told
        for i in range(len(o))
    ]


# ---- the contract ------------------------------------------------------------------------------------


def drive(strategy: Strategy, rounds: int, batch: int) -> list[tuple[bytes, float]]:
    """What is evaluated when feasibility and failure are functions of the genome, as in a search."""
    asked = []
    for _ in range(rounds):
        proposals = strategy.ask(batch)
        total = proposals.genomes.sum(axis=1)
        status = np.where(total % 5 == 0, SCREENED, np.where(total % 7 == 0, FAILED, COMPLETE))
        reward = np.where(status == COMPLETE, np.sin(total * 1.7) + proposals.fidelity, math.nan)
        violation = np.where(status == SCREENED, 0.5, 0.0)
        strategy.tell(outcomes(proposals, reward, status=status, violation=violation))
        asked += [
            (genome.tobytes(), float(share))
            for genome, share, one in zip(proposals.genomes, proposals.fidelity, status, strict=True)
            if one != SCREENED
        ]
    return asked


@pytest.mark.parametrize("name", ["random", "evolution", "reinforce"])
@pytest.mark.parametrize("batch", [1, 4, 32])
def test_nothing_is_evaluated_twice_at_one_fidelity(name: str, batch: int) -> None:
    asked = drive(halving(name, wide(5, 4)), rounds=320 // batch, batch=batch)
    assert max(Counter(asked).values()) == 1
    shares = Counter(round(share, 6) for _, share in asked)
    assert set(shares) == {round(LOW, 6), round(MIDDLE, 6), FULL}
    low, middle, full = (shares[round(share, 6)] for share in (LOW, MIDDLE, FULL))
    # The best third of the moment is promoted: over time a few more, and those of the last batch are still to come.
    assert 0.8 * low / 3 - 2 <= middle <= 1.3 * low / 3
    assert 0.8 * middle / 3 - 2 <= full <= 1.5 * middle / 3


def test_a_function_of_the_seed_and_the_calls() -> None:
    one, two, other = (drive(halving("evolution", seed=seed), 30, 4) for seed in (3, 3, 4))
    assert one == two
    assert one != other


def test_a_wrapped_strategy_that_repeats_itself_is_left_for_chance(listening: str) -> None:
    """Listening proposes 4⁶ genomes in a row; one that knows a single genome must not be evaluated but once."""

    class Stuck(Listening):
        def propose(self, draws: Any) -> Genomes:
            return np.zeros((len(draws), len(self.domain.cardinalities)), dtype=np.int64)

    strategies._items[listening] = Stuck
    strategy = halving(listening)
    asked = drive(strategy, rounds=40, batch=4)
    assert max(Counter(asked).values()) == 1
    assert len(asked) > 80
    own = [row for row in heard(strategy) if row[1] == ASKED and row[2] != SCREENED]
    assert len(own) == 0, "what was drawn by chance is no sample of the wrapped strategy"


def test_memory_grows_with_what_is_evaluated_only() -> None:
    strategy = halving("random", wide(30, 4))
    for _ in range(300):
        proposals = strategy.ask(10)
        nothing = np.full(10, math.nan)
        strategy.tell(outcomes(proposals, nothing, status=np.full(10, SCREENED), violation=np.ones(10)))
    for one in (strategy, strategy.wrapped):
        assert not one._waiting
        assert not one._taken
    assert not strategy._numbers
    assert not strategy._origin
    assert not strategy._reached


# ---- promotions --------------------------------------------------------------------------------------


def test_the_best_third_goes_on() -> None:
    strategy = halving()
    first = strategy.ask(9)
    np.testing.assert_allclose(first.fidelity, LOW)
    reward = np.array([3, 1, 8, 2, 9, 4, 7, 0, 5.0])
    strategy.tell(outcomes(first, reward))
    second = strategy.ask(5)
    np.testing.assert_allclose(second.fidelity, [MIDDLE] * 3 + [LOW] * 2)
    np.testing.assert_array_equal(second.genomes[:3], first.genomes[[4, 2, 6]])
    strategy.tell(outcomes(second, [0.1, 0.2, 0.3, 0, 0]))
    third = strategy.ask(2)
    # Of three on the middle rung one goes on: the best there, whatever it was below.
    np.testing.assert_allclose(third.fidelity, [FULL, LOW])
    np.testing.assert_array_equal(third.genomes[0], first.genomes[6])


def test_what_failed_or_breaks_a_budget_is_never_promoted() -> None:
    strategy = halving()
    first = strategy.ask(6)
    reward = np.array([0.9, math.nan, 0.8, 0.7, 0.1, 0.2])
    status = np.array([COMPLETE, FAILED, COMPLETE, COMPLETE, COMPLETE, COMPLETE])
    violation = np.array([0.1, 0, 0.2, 0, 0, 0])
    strategy.tell(outcomes(first, reward, status=status, violation=violation))
    second = strategy.ask(3)
    np.testing.assert_allclose(second.fidelity, [MIDDLE, MIDDLE, LOW])
    np.testing.assert_array_equal(second.genomes[:2], first.genomes[[3, 5]])
    everything = halving(seed=1)
    for _ in range(10):
        proposals = everything.ask(3)
        np.testing.assert_allclose(proposals.fidelity, LOW)
        everything.tell(outcomes(proposals, 0.5, violation=np.ones(3)))


def test_by_front_several_costs_count() -> None:
    """The best by reward is dominated: another is better and cheaper in everything."""
    quality = np.array([0.9, 0.5, 0.8, 0.4, 0.3, 0.2])
    costs = np.array([[1.0, 5.0], [0.1, 1.0], [2.0, 6.0], [2.0, 7.0], [3.0, 8.0], [4.0, 9.0]])
    reward = np.array([0.5, 0.1, 0.9, 0.2, 0.2, 0.2])
    for by, wanted in (("front", [0, 1]), ("reward", [2, 0])):
        strategy = halving(by=by)
        first = strategy.ask(6)
        strategy.tell(outcomes(first, reward, quality=quality, costs=costs))
        np.testing.assert_array_equal(strategy.ask(2).genomes, first.genomes[wanted])


def test_layers_are_non_dominated_fronts() -> None:
    values = np.random.default_rng(0).integers(0, 6, (60, 3)).astype(float)
    found = layers(values)

    def dominates(a: Any, b: Any) -> bool:
        return bool((a <= b).all() and (a < b).any())

    for i, row in enumerate(values):
        above = [found[j] for j, other in enumerate(values) if dominates(other, row)]
        assert found[i] == max(above, default=-1) + 1
    assert layers(np.empty((0, 2))).shape == (0,)


def test_a_quality_known_at_a_higher_fidelity_is_taken_for_what_it_is() -> None:
    """The controller answers a short proposal with the full training's quality where that is known."""
    strategy = halving()
    first = strategy.ask(6)
    fidelity = np.array([FULL, LOW, LOW, LOW, LOW, LOW])
    status = np.array([DUPLICATE] + [COMPLETE] * 5)
    strategy.tell(outcomes(first, [9.0, 1, 2, 3, 4, 5], fidelity=fidelity, status=status))
    assert [len(rung) for rung in strategy.rungs] == [5, 0, 1]
    second = strategy.ask(2)  # a third of five: only one
    np.testing.assert_allclose(second.fidelity, [MIDDLE, LOW])
    np.testing.assert_array_equal(second.genomes[0], first.genomes[5])


def test_settings() -> None:
    for settings in ({"eta": 1}, {"rungs": 1}):
        with pytest.raises(ExperimentError, match="both at least 2"):
            halving(**settings)
    with pytest.raises(ExperimentError, match="halving wraps halving"):
        halving("halving:random")
    with pytest.raises(ExperimentError, match=r"strategy\.wrapped\.population"):
        halving("evolution", wrapped={"population": "many"})
    with pytest.raises(ExperimentError, match=r"strategy\.by"):
        halving(by="luck")
    with pytest.raises(ContentError, match="Unknown strategy 'chance'"):
        strategies.get("halving:chance")
    four = halving(eta=2, rungs=4)
    assert [rung.fidelity for rung in four.rungs] == pytest.approx([1 / 8, 1 / 4, 1 / 2, 1])
    assert four.rungs[-1].fidelity == 1
    assert [rung.fidelity for rung in halving(rungs=2, shortest=12 / 200).rungs] == [12 / 200, 1]
    for share in (0.0, 1.0):
        with pytest.raises(ExperimentError, match="shortest"):
            halving(shortest=share)
    assert len(halving("evolution", wrapped={"population": 7, "sample": 2}).wrapped.rewards) == 7  # type: ignore[attr-defined]


# ---- what the wrapped strategy hears -----------------------------------------------------------------


def test_ranks_are_on_one_scale(listening: str) -> None:
    strategy = halving(listening)
    first = strategy.ask(9)
    strategy.tell(outcomes(first, np.arange(9.0)))
    assert heard(strategy) == [(i, ASKED, COMPLETE, pytest.approx(LOW), pytest.approx((i + 0.5) / 9)) for i in range(9)]
    second = strategy.ask(3)
    strategy.tell(outcomes(second, [0.01, 0.03, 0.02]))
    # The three best of nine, numbers 8, 7 and 6: places 3, 1 and 2 of three, all within the upper third.
    places = {8: 2.5, 7: 0.5, 6: 1.5}
    wanted = [(n, ENQUEUED, COMPLETE, pytest.approx(MIDDLE), pytest.approx(1 - p / 9)) for n, p in places.items()]
    assert heard(strategy)[9:] == wanted
    assert isinstance(strategy.wrapped, Listening)
    for told in strategy.wrapped.told:
        np.testing.assert_array_equal(told.quality, told.reward)


def test_full_tells_full_trainings_as_they_are(listening: str) -> None:
    strategy = halving(listening, teach="full", rungs=2)
    first = strategy.ask(6)
    status = np.array([COMPLETE] * 4 + [FAILED, SCREENED])
    reward = np.array([1.0, 2, 3, 4, math.nan, math.nan])
    strategy.tell(outcomes(first, reward, status=status, violation=np.array([0, 0, 0, 0, 0, 1.0])))
    assert [row[:3] for row in heard(strategy)] == [(4, ASKED, FAILED), (5, ASKED, SCREENED)]
    second = strategy.ask(2)
    np.testing.assert_allclose(second.fidelity, [FULL, 1 / 3])
    np.testing.assert_array_equal(second.genomes[0], first.genomes[3])
    strategy.tell(outcomes(second, [0.625, 0.5]))
    assert heard(strategy)[2:] == [(3, ASKED, COMPLETE, FULL, 0.625)]
    assert not len(strategy.wrapped.pending)


@pytest.mark.parametrize("teach", ["ranks", "full"])
def test_outcomes_from_elsewhere(listening: str, teach: str) -> None:
    strategy = halving(listening, teach=teach)
    genomes = np.array([[3, 3, 3, 3, 3, g] for g in range(4)])
    fidelity = np.array([FULL, FULL, FULL, LOW])
    foreign = Proposals(np.arange(4), genomes, fidelity)
    strategy.tell(outcomes(foreign, [0.2, 0.6, 0.4, 0.9], source=np.full(4, EARLIER)))
    scale = [0.5 / 3, 2.5 / 3, 1.5 / 3] if teach == "ranks" else [0.2, 0.6, 0.4]
    assert heard(strategy) == [(-1, EARLIER, COMPLETE, FULL, pytest.approx(reward)) for reward in scale]
    # Earlier outcomes are no evaluations of this search; enqueued ones are.
    assert not strategy._reached
    strategy.tell(outcomes(foreign, [0.2, 0.6, 0.4, 0.9], source=np.full(4, ENQUEUED)))
    assert [row[1] for row in heard(strategy)[3:]] == [ENQUEUED] * 3
    assert sorted(strategy._reached.values()) == [0, 2, 2, 2]
    assert [len(rung) for rung in strategy.rungs] == [0, 0, 0]


# ---- searches ----------------------------------------------------------------------------------------

WEIGHTS = np.random.default_rng(7).normal(size=(10, 5))
HIGHEST = float(WEIGHTS.max(axis=1).sum())


def truth(genomes: Genomes) -> Any:
    return WEIGHTS[np.arange(10), genomes].sum(axis=1) / HIGHEST


def short(genomes: Genomes, fidelity: Any) -> Any:
    """Less training is worth less, and says less: noise of about half the spread of the truth at the lowest rung."""
    luck = np.array([np.random.default_rng([*genome, 1]).normal() for genome in genomes])
    return truth(genomes) - 0.5 * (1 - fidelity) + 0.15 * (1 - fidelity) * luck


def found(kind: str, seed: int, budget: float, batch: int = 4) -> float:
    """The best candidate among full trainings, for fidelities that add up to the budget."""
    strategy = strategies.get(kind)(Domain(np.full(10, 5), np.zeros(10, dtype=bool)), seed)
    spent, top = 0.0, -math.inf
    while spent < budget - 1e-9:
        proposals = strategy.ask(min(batch, math.ceil(budget - spent - 1e-9)))
        strategy.tell(outcomes(proposals, short(proposals.genomes, proposals.fidelity)))
        spent += float(proposals.fidelity.sum())
        whole = truth(proposals.genomes)[proposals.fidelity == 1]
        top = max(top, *whole) if len(whole) else top
    return top


@pytest.mark.parametrize(("name", "margin"), [("random", 0.05), ("evolution", 0.1), ("reinforce", 0.05)])
def test_better_than_what_it_wraps_at_equal_training(name: str, margin: float) -> None:
    """40 full trainings' worth, mean over 8 seeds; the best possible is 1."""
    wrapped, halved = (np.mean([found(kind, s, 40) for s in range(8)]) for kind in (name, f"halving:{name}"))
    assert halved > wrapped + margin


SPACE = TinySpace()
ESTIMATOR = tiny_estimator(SPACE)


class Short(Evaluator):
    """A made-up accuracy that a short training underestimates, more so for some; counts what it is given."""

    def __init__(self) -> None:
        self.given: list[float] = []

    def evaluate(self, genome: Genomes, fidelity: float = 1.0) -> Evaluation:
        self.given.append(fidelity)
        if genome[1] == 1 and genome[4] == 1 and fidelity < 0.2:
            return Evaluation(math.nan)
        return Evaluation(tiny_quality(genome) * (0.5 + 0.5 * fidelity ** (1 + genome[2])))


def search(path: Path, kind: str, trials: int, evaluator: Evaluator, batch: int = 4, **settings: Any) -> list[Trial]:
    limit = latency_limit(ESTIMATOR, 0.8)
    return SearchController(
        space=SPACE, strategy=strategies.get(kind)(domain_of(SPACE), 4), estimator=ESTIMATOR,
        executor=Serial(evaluator), reward=MnasNetHard(0.02), limits=(limit,),
        study=Study(path, "search", SPACE, {"seed": 0}), budget=Budget(trials), batch=batch, **settings,
    ).run()  # fmt: skip


def truncated(source: Path, target: Path, trials: int) -> Path:
    """The journal as a crash would leave it after so many trials."""
    lines = source.read_text().splitlines(keepends=True)
    ends = [i for i, line in enumerate(lines) if "index" in json.loads(line).get("user_attrs", {})]
    target.write_text("".join(lines[: ends[trials] if trials < len(ends) else None]))
    return target


@pytest.mark.parametrize("kind", ["halving:random", "halving:evolution", "halving:reinforce"])
def test_a_search_is_budgeted_by_training_and_resumes_exactly(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "study.jsonl"
    evaluator = Short()
    trials = search(path, kind, 7, evaluator)
    assert 7 <= trainings(trials) < 8
    assert trainings(trials) == pytest.approx(sum(evaluator.given))
    assert len(trials) > 20
    assert len({(t.genome, t.fidelity) for t in trials}) == len(trials)
    assert all(t.fidelity == 1 for t in best(trials, 5))
    assert FAILED in {t.status for t in trials}
    for k in (0, 1, 5, 18, len(trials) - 1, len(trials)):
        again = Short()
        cut = truncated(path, tmp_path / f"{k}.jsonl", k)
        assert plain(search(cut, kind, 7, again)) == plain(trials)
        assert len(again.given) == len(trials) - k


@pytest.mark.parametrize("kind", ["halving:random", "halving:evolution"])
def test_a_larger_budget_goes_on_where_it_ended(tmp_path: Path, kind: str) -> None:
    """The last batches of a budget are narrow; a resume asks for them as they were and goes on."""
    path = tmp_path / "study.jsonl"
    first = search(path, kind, 3, Short(), batch=5)
    evaluator = Short()
    more = search(path, kind, 6, evaluator, batch=5)
    assert plain(more[: len(first)]) == plain(first)
    assert 6 <= trainings(more) < 7
    assert len(evaluator.given) == len(more) - len(first)


def test_enqueued_and_earlier_candidates_and_halving(tmp_path: Path) -> None:
    """A candidate that was enqueued is known in full: its short trainings are answered with that, and not made."""
    given = SPACE.decode(np.zeros(8, dtype=np.int64)).as_dict()
    earlier = search(tmp_path / "earlier.jsonl", "random", 6, Short())
    trials = search(tmp_path / "study.jsonl", "halving:random", 5, Short(), enqueue=[given], earlier=earlier)
    assert (trials[0].source, trials[0].fidelity) == (ENQUEUED, 1.0)
    same = [t for t in trials if SPACE.canonical_id(np.array(t.genome)) == SPACE.canonical_id(SPACE.encode(given))]
    assert same == trials[:1]
