"""Strategies as samplers: Optuna's own contract, restarts after a real kill, several processes, spaces that change."""

from __future__ import annotations

import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.testing import pytest_samplers as contract
from optuna.trial import FrozenTrial, TrialState, create_trial

import nas.optuna
from nas.errors import ContentError, ExperimentError, SpaceError, StudyError
from nas.optuna import StrategySampler
from nas.optuna.genes import gene
from nas.optuna.sampler import NUMBER, WORKER, ObjectivesError
from nas.optuna.workers import is_alive, this_worker
from nas.strategies import Outcomes, Strategy, strategies
from nas.strategies.base import ASKED, COMPLETE, ENQUEUED, FAILED, SCREENED

ROOT = Path(__file__).resolve().parent.parent
QUICK = "evolution"
SEVERAL = [name for name in strategies if strategies.get(name).multi_objective]
ALL = [pytest.param(name, marks=[] if name == QUICK else pytest.mark.slow) for name in strategies]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


# ---- Optuna's contract for samplers -------------------------------------------------------------------


class TestContract(contract.BasicSamplerTestCase, contract.RelativeSamplerTestCase):
    @pytest.fixture(params=ALL)
    def sampler(self, request: pytest.FixtureRequest) -> Callable[[], BaseSampler]:
        return lambda: StrategySampler(request.param)


class TestSeveralObjectives(contract.MultiObjectiveSamplerTestCase):
    @pytest.fixture(params=SEVERAL)
    def sampler(self, request: pytest.FixtureRequest) -> Callable[[], BaseSampler]:
        return lambda: StrategySampler(request.param)


class TestOneObjective(contract.SingleOnlySamplerTestCase):
    @pytest.fixture(params=[name for name in strategies if name not in SEVERAL])
    def sampler(self, request: pytest.FixtureRequest) -> Callable[[], BaseSampler]:
        return lambda: StrategySampler(request.param)


# ---- restarts and several processes --------------------------------------------------------------------

TOGETHER = -2  # wait for the others before beginning
WORKER_SCRIPT = """
import os, sys, time, warnings
from pathlib import Path
import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from nas.optuna import StrategySampler

warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
optuna.logging.set_verbosity(optuna.logging.WARNING)
journal, strategy, until, hang = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
settings = {"population": 8, "sample": 3} if strategy == "evolution" else {}

def objective(trial):
    x = trial.suggest_float("x", -5, 5)
    y = trial.suggest_int("y", 0, 40)
    if hang == len(study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])):
        Path(journal + ".ready").touch()
        time.sleep(600)
    kind = trial.suggest_categorical("kind", ["flat", "steep"])
    if kind == "steep":
        return x * x + y + trial.suggest_float("slope", 1e-3, 10, log=True)
    if y == 13:
        raise ArithmeticError
    return x * x + y + 1

study = optuna.create_study(
    storage=JournalStorage(JournalFileBackend(journal)), study_name="s", load_if_exists=True,
    sampler=StrategySampler(strategy, seed=3, **settings),
)
Path(f"{journal}.{os.getpid()}").touch()
while hang == -2 and not Path(journal + ".go").exists():
    time.sleep(0.01)
finished = lambda: len([t for t in study.get_trials(deepcopy=False) if t.state.is_finished()])
while finished() < until:
    study.optimize(objective, n_trials=1, catch=ArithmeticError)
"""


def begin(tmp_path: Path, journal: Path, strategy: str, until: int, hang: int = -1) -> subprocess.Popen[bytes]:
    script = tmp_path / "worker.py"
    if not script.exists():  # another process may just be reading it
        script.write_text(WORKER_SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(journal), strategy, str(until), str(hang)]
    return subprocess.Popen(command, env=environment)


def run(tmp_path: Path, journal: Path, strategy: str, until: int) -> None:
    assert begin(tmp_path, journal, strategy, until).wait(120) == 0


def run_and_kill(tmp_path: Path, journal: Path, strategy: str, hang: int) -> None:
    """Kill the process while its objective runs, with ``hang`` trials complete."""
    ready = Path(f"{journal}.ready")
    ready.unlink(missing_ok=True)
    process = begin(tmp_path, journal, strategy, 10_000, hang)
    while not ready.exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(60)


def trials_of(journal: Path) -> list[FrozenTrial]:
    storage = JournalStorage(JournalFileBackend(str(journal)))
    return optuna.load_study(study_name="s", storage=storage).get_trials()


def finished(trials: list[FrozenTrial]) -> list[Any]:
    return [(t.state, t.params, t.values, t.system_attrs[NUMBER]) for t in trials if t.state.is_finished()]


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("strategy", ALL)
def test_a_killed_study_goes_on_as_if_it_had_not_been(strategy: str, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    run(tmp_path, whole, strategy, 40)
    kills = (9, 9)  # the second dies over the candidate that killed the first
    for hang in kills:
        run_and_kill(tmp_path, killed, strategy, hang)
    run(tmp_path, killed, strategy, 40)
    orphans = [trial for trial in trials_of(killed) if trial.state == TrialState.RUNNING]
    assert len(orphans) == len(kills)
    assert finished(trials_of(killed)) == finished(trials_of(whole))


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_processes_with_one_seed_share_the_numbers(tmp_path: Path) -> None:
    journal = tmp_path / "shared.jsonl"
    run(tmp_path, journal, QUICK, 2)
    processes = [begin(tmp_path, journal, QUICK, 24, TOGETHER) for _ in range(3)]
    while not all(Path(f"{journal}.{process.pid}").exists() for process in processes):
        assert [process.poll() for process in processes] == [None] * 3
        time.sleep(0.02)
    Path(f"{journal}.go").touch()
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    trials = trials_of(journal)
    assert sorted(trial.system_attrs[NUMBER] for trial in trials) == list(range(len(trials)))
    assert len({trial.system_attrs[WORKER] for trial in trials}) > 2
    assert len({str(trial.params) for trial in trials}) > 0.9 * len(trials)


def test_threads_share_the_numbers() -> None:
    study = optuna.create_study(sampler=StrategySampler(seed=1))
    study.optimize(bowl, n_trials=60, n_jobs=4)
    assert sorted(trial.system_attrs[NUMBER] for trial in study.trials) == list(range(60))
    assert len({str(trial.params) for trial in study.trials}) == 60


def test_no_trial_repeats_another_while_there_is_something_new() -> None:
    def objective(trial: optuna.Trial) -> float:
        if trial.suggest_categorical("kind", ["flat", "steep"]) == "steep":
            return 1.0
        return float(trial.suggest_int("height", 1, 30))

    study = optuna.create_study(sampler=StrategySampler("random", seed=2))
    study.optimize(objective, n_trials=15)
    assert len({str(trial.params) for trial in study.trials}) == 15
    study.optimize(objective, n_trials=30)  # there are 31: from here on it may repeat itself
    assert len({str(trial.params) for trial in study.trials}) > 20


def test_a_trial_that_is_under_way_keeps_its_number_and_its_parameters() -> None:
    study = optuna.create_study(sampler=StrategySampler(seed=1, search_space=SPACE))
    trials = [study.ask(SPACE) for _ in range(30)]
    assert [trial.system_attrs[NUMBER] for trial in study.trials] == list(range(30))
    assert len({str(trial.params) for trial in trials}) == 30


def test_a_process_is_known_by_more_than_its_number() -> None:
    me = this_worker()
    assert is_alive(me)
    host, pid, start = me.rsplit(":", 2)
    assert not start or not is_alive(f"{host}:{pid}:{int(start) - 1}")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert not is_alive(f"{host}:{gone.pid}:1")
    assert is_alive(f"elsewhere:{gone.pid}:1")  # nobody can tell from here
    assert is_alive(None)


# ---- what the strategy is told ------------------------------------------------------------------------

SPACE: dict[str, BaseDistribution] = {
    "x": FloatDistribution(-4, 4), "y": IntDistribution(0, 20), "c": CategoricalDistribution(("a", "b", "c")),
}  # fmt: skip


def bowl(trial: optuna.Trial) -> float:
    x, y = trial.suggest_float("x", -4, 4), trial.suggest_int("y", 0, 20)
    return x**2 + abs(y - 7) + ("abc".index(trial.suggest_categorical("c", ["a", "b", "c"])))


def told(study: optuna.Study, **settings: Any) -> Outcomes:
    """What a strategy would be told of the study's trials, joined."""
    sampler = StrategySampler("random", **settings)
    history, _ = sampler._follow(study)
    rows = [history._outcome(trial) for trial in study.trials if trial.state.is_finished()]
    return Outcomes(*(np.concatenate([getattr(row, part) for row in rows]) for part in Outcomes.__annotations__))


@pytest.mark.parametrize(("direction", "reward"), [("maximize", 2.5), ("minimize", -2.5)])
def test_states_and_constraints_become_statuses(direction: str, reward: float) -> None:
    study = optuna.create_study(direction=direction, sampler=StrategySampler(seed=1, search_space=SPACE))
    good, bad, pruned, broken, endless = (study.ask(SPACE) for _ in range(5))
    good.set_constraint("size", -1.0)
    bad.set_constraint("size", 0.25)
    bad.set_constraint("time", 0.5)
    for trial in (good, bad):
        study.tell(trial, 2.5)
    study.tell(pruned, state=TrialState.PRUNED)
    study.tell(broken, state=TrialState.FAIL)
    study.tell(endless, float("inf"))
    outcomes = told(study, search_space=SPACE)
    assert outcomes.status.tolist() == [COMPLETE, SCREENED, FAILED, FAILED, FAILED]
    assert outcomes.violation.tolist() == [0, 0.75, 0, 0, 0]
    np.testing.assert_array_equal(outcomes.reward, [reward, *[np.nan] * 4])
    assert outcomes.index.tolist() == list(range(5))
    assert set(outcomes.source) == {ASKED}


def test_only_the_strategys_own_proposals_are_told_as_asked() -> None:
    study = optuna.create_study(sampler=StrategySampler(seed=1, search_space=SPACE))
    study.enqueue_trial({"x": 4.0, "y": 20, "c": "c"})
    study.optimize(bowl, n_trials=2)
    study.add_trial(create_trial(value=1.0, params={"x": 0.1, "y": 3, "c": "b"}, distributions=SPACE))
    outcomes = told(study, search_space=SPACE)
    assert outcomes.source.tolist() == [ENQUEUED, ASKED, ENQUEUED]
    assert outcomes.genomes[0].tolist() == [2, 64, 20]  # by name: c, x, y
    assert outcomes.genomes[2].tolist() == [1, 33, 3]  # 0.1 is nearest to 0.125


def test_several_objectives_are_quality_and_costs() -> None:
    study = optuna.create_study(directions=["minimize", "minimize", "maximize"], sampler=StrategySampler("random"))
    study.optimize(lambda trial: (trial.suggest_int("x", 0, 5), 2.0, 3.0), n_trials=3)
    outcomes = told(study)
    assert outcomes.quality.tolist() == [-trial.params["x"] for trial in study.trials]
    assert outcomes.costs.tolist() == [[2.0, -3.0]] * 3


def test_a_strategy_for_one_reward_refuses_several_objectives() -> None:
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=StrategySampler("evolution"))
    with pytest.raises(ObjectivesError, match=r"follows one reward; the study has 2(.|\n)*random"):
        study.optimize(lambda trial: (trial.suggest_int("x", 0, 5), 1.0), n_trials=1)
    assert issubclass(ObjectivesError, StudyError)


class _Forgetful(Strategy):
    """Proposes what it last learnt of, whatever the number: the order of telling is its whole state."""

    last = 0

    def propose(self, draws: Any) -> Any:
        return np.full((len(draws), len(self.domain.cardinalities)), self.last)

    def learn(self, outcomes: Outcomes) -> None:
        self.last = int(outcomes.genomes[-1, 0])


def test_trials_are_told_as_they_finish_and_late_news_are_put_in_order() -> None:
    sampler = StrategySampler(f"{__name__}:_Forgetful", search_space={"x": IntDistribution(0, 9)})
    study = optuna.create_study(sampler=sampler)
    for x in (5, 3):
        study.enqueue_trial({"x": x})
    first, second = study.ask(sampler.search_space), study.ask(sampler.search_space)
    study.tell(second, 1.0)
    assert sampler._follow(study)[0].strategy.last == 3  # type: ignore[union-attr]
    study.tell(first, 1.0)
    assert sampler._follow(study)[0].strategy.last == 5  # type: ignore[union-attr]
    early = create_trial(value=1.0, params={"x": 8}, distributions=dict(sampler.search_space or {}))
    early.datetime_complete = early.datetime_start = study.trials[1].datetime_start
    study.add_trial(early)
    assert sampler._follow(study)[0].strategy.last == 5  # type: ignore[union-attr]


def test_a_copy_goes_on_where_the_sampler_is() -> None:
    study = optuna.create_study(sampler=StrategySampler(seed=4))
    study.optimize(bowl, n_trials=20)
    proposals = []
    for sampler in (study.sampler, pickle.loads(pickle.dumps(study.sampler)), StrategySampler(seed=4)):
        twin = optuna.create_study(sampler=sampler)
        twin.add_trials(study.trials)
        proposals.append(twin.ask(SPACE).params)
    assert proposals[0] == proposals[1] == proposals[2]


def test_one_sampler_serves_two_studies() -> None:
    sampler = StrategySampler(seed=4)
    together = [optuna.create_study(sampler=sampler) for _ in range(2)]
    for _ in range(15):
        for study in together:
            study.optimize(bowl, n_trials=1)
    alone = optuna.create_study(sampler=StrategySampler(seed=4))
    alone.optimize(bowl, n_trials=15)
    assert [[t.params for t in study.trials] for study in together] == [[t.params for t in alone.trials]] * 2


# ---- spaces --------------------------------------------------------------------------------------------


def test_dormant_parameters_are_proposed_all_the_same() -> None:
    def objective(trial: optuna.Trial) -> float:
        if trial.suggest_categorical("kind", ["flat", "steep"]) == "steep":
            return trial.suggest_float("slope", 1e-3, 10, log=True)
        return float(trial.suggest_int("height", 1, 50))

    study = optuna.create_study(sampler=StrategySampler(seed=2, population=8, sample=3))
    study.optimize(objective, n_trials=60)
    space = study.sampler.infer_relative_search_space(study, study.trials[0])
    assert list(space) == ["height", "kind", "slope"]
    assert all(set(t.params) < set(space) for t in study.trials)
    assert study.best_value < 2e-3  # the lowest values of a grid of 65, from 1e-3 to 10


def test_a_parameter_whose_range_changes_is_drawn_at_random() -> None:
    study = optuna.create_study(sampler=StrategySampler(seed=2))
    for high in (10, 20):
        study.optimize(lambda t, high=high: t.suggest_int("y", 0, high) + t.suggest_float("x", 0, 1), n_trials=6)
    assert list(study.sampler.infer_relative_search_space(study, study.trials[0])) == ["x"]
    assert len({trial.params["y"] for trial in study.trials}) > 4


def test_a_fixed_space_needs_no_random_trials() -> None:
    study = optuna.create_study(sampler=StrategySampler(seed=2, search_space=SPACE))
    assert "nas:proposed:0" in study.ask(SPACE)._get_latest_trial().system_attrs
    assert told_is_fixed(study)


def told_is_fixed(study: optuna.Study) -> bool:
    study.optimize(lambda trial: trial.suggest_float("other", 0, 1), n_trials=2)
    return set(study.sampler.infer_relative_search_space(study, study.trials[0])) == set(SPACE)


def test_hyperbands_brackets_share_one_history() -> None:
    def objective(trial: optuna.Trial) -> float:
        value = bowl(trial)
        for step in range(9):
            trial.report(value + 9 - step, step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return value

    pruner = optuna.pruners.HyperbandPruner(min_resource=1, max_resource=9, reduction_factor=3)
    study = optuna.create_study(sampler=StrategySampler(seed=2, population=5, sample=2), pruner=pruner)
    study.optimize(objective, n_trials=40)
    assert {trial.state for trial in study.trials} == {TrialState.COMPLETE, TrialState.PRUNED}
    assert [trial.system_attrs[NUMBER] for trial in study.trials] == list(range(40))


def test_long_proposals_fit_the_attributes_of_a_database(tmp_path: Path) -> None:
    names = [f"a_parameter_of_a_long_{'long_' * 15}name_{i}" for i in range(24)]

    def objective(trial: optuna.Trial) -> float:
        return float(sum(trial.suggest_int(name, 0, 9) for name in names))

    storage = f"sqlite:///{tmp_path / 'study.db'}"
    study = optuna.create_study(storage=storage, sampler=StrategySampler(seed=2))
    study.optimize(objective, n_trials=3)
    assert all(len(str(v)) <= 2045 for trial in study.trials for v in trial.system_attrs.values())
    assert told(study).source.tolist() == [ENQUEUED, ASKED, ASKED]


# ---- genes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("distribution", "values"),
    [
        (IntDistribution(2, 10, step=4), (2, 6, 10)),
        (IntDistribution(0, 100), (0, 25, 50, 75, 100)),
        (IntDistribution(0, 2**62), (0, 2**60, 2**61, 3 * 2**60, 2**62)),
        (IntDistribution(1, 10_000, log=True), (1, 10, 100, 1000, 10_000)),
        (IntDistribution(1, 4, log=True), (1, 2, 3, 4)),
        (FloatDistribution(0, 1), (0, 0.25, 0.5, 0.75, 1)),
        (FloatDistribution(0, 0.5, step=0.25), (0, 0.25, 0.5)),
        (FloatDistribution(0, 1, step=0.125), (0, 0.25, 0.5, 0.75, 1)),
        (FloatDistribution(1e-4, 1, log=True), (1e-4, 1e-3, 1e-2, 1e-1, 1)),
        (CategoricalDistribution(("b", "a", None)), ("b", "a", None)),
    ],
    ids=str,
)
def test_the_values_of_a_parameter(distribution: BaseDistribution, values: tuple[Any, ...]) -> None:
    found = gene(distribution, 5)
    assert found.values == (values if isinstance(values[0], str) else pytest.approx(values))
    assert all(type(value) is not np.float64 for value in found.values)
    assert all(distribution._contains(distribution.to_internal_repr(value)) for value in found.values)
    assert [found.index(value) for value in found.values] == list(range(len(values)))


def test_a_value_between_two_counts_as_the_nearest() -> None:
    assert gene(FloatDistribution(0, 1), 5).index(0.4) == 2
    assert gene(FloatDistribution(1e-4, 1, log=True), 5).index(0.02) == 2
    assert gene(IntDistribution(0, 100), 5).index(60) == 2


@pytest.mark.parametrize(
    ("choices", "ordered"),
    [((1, 2, 4), True), ((4.0, 1), True), ((1, 4, 2), False), ((False, True), False), (("1", "2"), False)],
)
def test_choices_are_ordered_where_they_are_rising_numbers(choices: tuple[Any, ...], ordered: bool) -> None:
    assert gene(CategoricalDistribution(choices), 5).ordered is ordered


def test_an_unknown_kind_of_parameter_is_refused() -> None:
    class Strange(BaseDistribution):
        def to_internal_repr(self, param_value_in_external_repr: Any) -> float:
            return 0.0

        def single(self) -> bool:
            return False

        def _contains(self, param_value_in_internal_repr: float) -> bool:
            return True

    with pytest.raises(SpaceError, match="Strange"):
        gene(Strange(), 5)


# ---- errors, and better than luck -----------------------------------------------------------------------


def test_mistakes_are_refused_at_the_door() -> None:
    with pytest.raises(ContentError, match="Unknown strategy 'evolutoin'"):
        StrategySampler("evolutoin")
    with pytest.raises(ExperimentError, match=r"strategy\.population_size(.|\n)*population, sample"):
        StrategySampler("evolution", population_size=3)
    with pytest.raises(ExperimentError, match="1 ≤ sample ≤ population"):
        StrategySampler("evolution", population=3, sample=4)
    with pytest.raises(ExperimentError, match="grid ≥ 2"):
        StrategySampler(grid=1)
    with pytest.raises(ExperimentError, match="is a sampler already"):
        StrategySampler("optuna:TPESampler")


class _Halving(_Forgetful):
    def ask(self, n: int = 1) -> Any:
        proposals = super().ask(n)
        return type(proposals)(proposals.index, proposals.genomes, proposals.fidelity / 2)


def test_a_strategy_that_trains_by_halves_is_refused() -> None:
    study = optuna.create_study(sampler=StrategySampler(f"{__name__}:_Halving", search_space=SPACE))
    with pytest.raises(StudyError, match="part of the budget"):
        study.ask(SPACE)


def test_evolution_beats_random_sampling() -> None:
    def best(sampler: BaseSampler) -> float:
        study = optuna.create_study(sampler=sampler)
        study.optimize(bowl, n_trials=100)
        return study.best_value

    ours = [best(StrategySampler("evolution", seed=seed, population=20, sample=6)) for seed in range(5)]
    luck = [best(optuna.samplers.RandomSampler(seed=seed)) for seed in range(5)]
    assert np.mean(ours) < 0.5 * np.mean(luck)


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "optuna.md").read_text()
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)):
        exec(compile(block, f"optuna.md, block {number}", "exec"), {"__name__": "snippet"})


def test_the_room_lends_its_names() -> None:
    assert nas.optuna.StrategySampler is StrategySampler
    assert nas.optuna.OptunaStrategy.__name__ == "OptunaStrategy"
    with pytest.raises(AttributeError, match="no attribute 'Sampler'"):
        _ = nas.optuna.Sampler
