"""Every strategy as a sampler of Optuna, whose whole state is read off the study."""

from __future__ import annotations

import itertools
import json
import math
import threading
import zlib
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from nas.errors import ExperimentError, StudyError
from nas.optuna.genes import Gene, gene
from nas.optuna.workers import is_alive, this_worker
from nas.settings import construct
from nas.strategies import Domain, Objective, Outcomes, Proposals, Strategy, strategies
from nas.strategies.base import ASKED, COMPLETE, ENQUEUED, FAILED, REDRAWS, SCREENED

NUMBER, WORKER, PROPOSED = "nas:number", "nas:worker", "nas:proposed"
MAX_ATTRIBUTE = 2000  # databases hold about so many characters of an attribute


#: Of a study with one objective nothing is known beforehand but that the quality is the reward.
ONLY_QUALITY = Objective(
    costs=(),
    price=lambda genomes: np.zeros((len(genomes), 0)),
    violation=lambda costs: np.zeros(len(costs)),
    reward=lambda quality, costs: quality,
)


class ObjectivesError(StudyError, ValueError):
    """A strategy that follows one reward was given a study of several objectives."""


class StrategySampler(BaseSampler):
    """Lets a strategy propose the parameters of an Optuna study.

    Nothing is kept but what the study holds. Before each proposal the strategy is told every trial that has finished,
    in the order of completion, in this process or another; so a study that goes on after a crash proposes what it
    would have proposed without one. Proposals have numbers of their own, written into the trials: a trial that the
    death of its process left running is proposed again, under its number, by the next trial. On another host than
    this one a process counts as alive, and its trials as under way. Processes that share a study need no seeds of
    their own: they never use a number twice.

    Parameters become genes (:func:`nas.optuna.genes.gene`). Without ``search_space``, the parameters are those that
    the finished trials have had, whether in all of them or not; one that is new, or whose distribution differs between
    trials, is drawn from its own values at random. Where a trial needs only some of the parameters, the strategy
    proposes them all and the rest is dormant.

    A complete trial whose constraints are broken (``Trial.set_constraint``) is told with the sum of the excess and
    without a reward; pruned and failed trials are told as failed. With several objectives the first is the quality
    and the others are costs, as if all were to be maximised, and minimised.

    Args:
        strategy: name of a strategy, as in an experiment file.
        seed: any non-negative integer.
        search_space: every parameter and its distribution, fixed from the first trial on.
        grid: how many values a float without a step, or an integer with more values than that, is reduced to.
        settings: of the strategy, as in an experiment file.

    Raises:
        ContentError: there is no such strategy.
        ExperimentError: a setting is unknown or of the wrong type, or the strategy is a sampler of Optuna itself.
        ObjectivesError: on sampling, if the study has several objectives and the strategy follows one reward.
    """

    def __init__(
        self,
        strategy: str = "evolution",
        *,
        seed: int = 0,
        search_space: Mapping[str, BaseDistribution] | None = None,
        grid: int = 65,
        **settings: Any,
    ) -> None:
        if strategy.startswith("optuna:"):
            raise ExperimentError(f"{strategy} is a sampler already.", remedy="give Optuna the sampler itself")
        if grid < 2 or (search_space is not None and not search_space):
            raise ExperimentError(
                f"StrategySampler: grid {grid}, search_space {search_space}.", expected="grid ≥ 2, some parameters"
            )
        self.strategy, self.seed, self.grid, self.settings = strategy, seed, grid, settings
        self.search_space = None if search_space is None else dict(search_space)
        # A rehearsal: settings are checked here and not in the middle of a study.
        self.multi_objective = self.make([gene(CategoricalDistribution("ab"), grid)] * 2).multi_objective
        self._history: _History | None = None
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        # The history is read off the study again, wherever the copy wakes up.
        return {**self.__dict__, "_history": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    # ---- Optuna's interface -----------------------------------------------------------------------

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Write whose the trial is, and give it a number of the strategy's."""
        study._storage.set_trial_system_attr(trial._trial_id, WORKER, this_worker())
        self._number(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All parameters that the strategy proposes."""
        self._check(study)
        with self._lock:
            history, _ = self._follow(study)
            return dict(history.space)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """One proposal of the strategy; of its values those of ``search_space``."""
        self._check(study)
        with self._lock:
            number = self._number(study, trial)
            history, under_way = self._follow(study)
            if not history.space:
                return {}
            proposed = history.propose(number, [t for t in under_way if t._trial_id != trial._trial_id])
            _write_proposed(study, trial, proposed)
            return {name: history.genes[name].values[i] for name, i in proposed.items() if name in search_space}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """One of the parameter's values, drawn uniformly by the trial's number and the parameter's name."""
        self._check(study)
        values = gene(param_distribution, self.grid).values
        key = (self.seed, self._number(study, trial), zlib.crc32(param_name.encode()))
        return values[int(np.random.default_rng(key).integers(len(values)))]

    # ---- the numbers of proposals ------------------------------------------------------------------

    def _number(self, study: Study, trial: FrozenTrial) -> int:
        """The trial's number: the first that no finished trial and no living process has.

        A trial that was begun before this one and has no number yet will take one: as many free numbers are left
        out. So trials that begin at one time, in several processes, get different numbers.
        """
        with self._lock:
            attributes = study._storage.get_trial_system_attrs(trial._trial_id)
            if NUMBER in attributes:
                return int(attributes[NUMBER])
            if WORKER not in attributes:
                study._storage.set_trial_system_attr(trial._trial_id, WORKER, this_worker())
            history, under_way = self._follow(study)
            others = [other for other in under_way if other._trial_id != trial._trial_id]
            before = sum(NUMBER not in other.system_attrs and other.number < trial.number for other in others)
            taken = {other.system_attrs.get(NUMBER) for other in others}
            free = (n for n in itertools.count() if n not in history.numbers and n not in taken)
            number = next(itertools.islice(free, before, None))
            study._storage.set_trial_system_attr(trial._trial_id, NUMBER, number)
            return number

    # ---- the strategy and what it was told -----------------------------------------------------------

    def _check(self, study: Study) -> None:
        if len(study.directions) > 1 and not self.multi_objective:
            several = [name for name in strategies if strategies.get(name).multi_objective]
            raise ObjectivesError(
                f"The strategy {self.strategy!r} follows one reward; the study has {len(study.directions)} objectives.",
                expected=f"one objective, or a strategy for several: {', '.join(several)}",
            )

    def _follow(self, study: Study) -> tuple[_History, list[FrozenTrial]]:
        """The strategy after all that has finished by now, and the trials that are under way.

        What has finished since the last time is told, or, where that does not suffice, everything afresh.
        """
        trials = _trials(study)
        history = self._history if self._history is not None and self._history.is_of(study) else None
        told = history.told if history is not None else frozenset[int]()
        open_or_new = [trial for trial in trials if trial._trial_id not in told]
        under_way = [trial for trial in open_or_new if _is_under_way(trial)]
        new = sorted((trial for trial in open_or_new if trial.state.is_finished()), key=_completion)
        if history is None or not history.goes_on_with(new):
            finished = sorted((trial for trial in trials if trial.state.is_finished()), key=_completion)
            parameters = dict(self.search_space) if self.search_space is not None else _merge({}, finished)
            history = self._history = _History(self, study, parameters)
            new = finished
        history.tell(new)
        return history, under_way

    def make(self, genes: Iterable[Gene], costs: int = 0) -> Strategy:
        """A fresh strategy over ``genes``, with so many unknown costs beside the quality."""
        genes = list(genes)
        domain = Domain(
            cardinalities=np.array([len(gene.values) for gene in genes], dtype=np.int64),
            ordered=np.array([gene.ordered for gene in genes], dtype=bool),
            objective=None if costs else ONLY_QUALITY,
        )
        return construct(strategies.get(self.strategy), self.settings, domain, self.seed, where="strategy")


class _History:
    """A strategy that was told the finished trials of one study, in the order of their completion.

    Attributes:
        parameters: name → distribution of what the trials have had; None where it differs between them.
        space: the parameters that the strategy proposes.
        told: ids of the trials, ``numbers`` those of their proposals; ``last`` is the completion of the latest.
        tried: columns of the genome that trials have read → what they read there.
    """

    def __init__(
        self, sampler: StrategySampler, study: Study, parameters: Mapping[str, BaseDistribution | None]
    ) -> None:
        self._storage, self._study_id = study._storage, study._study_id
        self.parameters = dict(parameters)
        self.space = _space(parameters)
        self.genes = {name: gene(distribution, sampler.grid) for name, distribution in self.space.items()}
        self.signs = np.array([1.0 if d == StudyDirection.MAXIMIZE else -1.0 for d in study.directions])
        self.fixed = sampler.search_space is not None
        self.told: set[int] = set()
        self.numbers: set[int] = set()
        self.tried: dict[tuple[int, ...], set[bytes]] = {}
        self.last = (datetime.min, -1)
        self.strategy = sampler.make(self.genes.values(), costs=len(self.signs) - 1) if self.space else None

    def is_of(self, study: Study) -> bool:
        return self._storage is study._storage and self._study_id == study._study_id

    def goes_on_with(self, trials: list[FrozenTrial]) -> bool:
        """Whether the trials came after what was told, and leave the space as it is."""
        if trials and _completion(trials[0]) < self.last:
            return False
        return self.fixed or _space(_merge(self.parameters, trials)) == self.space

    def tell(self, trials: list[FrozenTrial]) -> None:
        if not self.fixed:
            self.parameters = _merge(self.parameters, trials)
        for trial in trials:
            self.told.add(trial._trial_id)
            if NUMBER in trial.system_attrs:
                self.numbers.add(trial.system_attrs[NUMBER])
            self.last = _completion(trial)
            if self.strategy is not None:
                outcome = self._outcome(trial)
                self.strategy.tell(outcome)
                # What a complete trial did not ask for is dormant: whatever has the same values elsewhere repeats it.
                complete = trial.state == TrialState.COMPLETE
                read = tuple(i for i, name in enumerate(self.genes) if name in trial.params or not complete)
                if read:
                    self.tried.setdefault(read, set()).add(outcome.genomes[0, read].tobytes())

    def propose(self, number: int, others: list[FrozenTrial]) -> dict[str, int]:
        """Proposal ``number`` by name, while ``others`` are under way."""
        assert self.strategy is not None
        found = [(other.system_attrs[NUMBER], proposed) for other in others if (proposed := _proposed(other))]
        waiting = Proposals(
            np.array([index for index, _ in found], dtype=np.int64),
            np.array([self._row(genes) for _, genes in found], dtype=np.int64).reshape(len(found), len(self.genes)),
            np.ones(len(found)),
        )
        for attempt in range(REDRAWS):
            # What repeats a finished trial is asked again, under a number that no trial will have.
            self.strategy.take_up(number + (attempt << 32), waiting)
            asked = self.strategy.ask()
            if not any(asked.genomes[0, read].tobytes() in tried for read, tried in self.tried.items()):
                break
        if asked.fidelity[0] != 1:
            raise StudyError(
                "The strategy asks for trainings on a part of the budget, which a sampler cannot hand on.",
                remedy="another strategy, or a pruner",
            )
        return dict(zip(self.genes, asked.genomes[0].tolist(), strict=True))

    def _row(self, numbers: Mapping[str, int]) -> list[int]:
        # Clipped because a study may go on with a coarser grid than it began with.
        return [min(numbers.get(name, 0), len(gene.values) - 1) for name, gene in self.genes.items()]

    def _outcome(self, trial: FrozenTrial) -> Outcomes:
        proposed = _proposed(trial)
        found = {n: self.genes[n].index(value) for n, value in trial.params.items() if n in self.genes}
        asked = bool(proposed) and all(proposed.get(name) == i for name, i in found.items())
        values = self.signs * np.array(trial.values) if trial.state == TrialState.COMPLETE else self.signs * math.nan
        excess = sum(max(value, 0.0) for value in trial.constraints.values())
        status = COMPLETE if np.isfinite(values).all() else FAILED
        if excess > 0:
            status = SCREENED
        quality = values[:1] if status == COMPLETE else np.full(1, math.nan)
        return Outcomes(
            index=np.array([trial.system_attrs[NUMBER] if asked else -1], dtype=np.int64),
            genomes=np.array([self._row({**proposed, **found})], dtype=np.int64),
            quality=quality,
            costs=-values[None, 1:],
            violation=np.array([excess]),
            reward=quality.copy(),
            fidelity=np.ones(1),
            status=np.array([status]),
            source=np.array([ASKED if asked else ENQUEUED]),
        )


def _trials(study: Study) -> list[FrozenTrial]:
    # Not study.get_trials: Hyperband shows a sampler only a part of them.
    return study._storage.get_all_trials(study._study_id, deepcopy=False)


def _completion(trial: FrozenTrial) -> tuple[datetime, int]:
    return trial.datetime_complete or datetime.min, trial.number


def _is_under_way(trial: FrozenTrial) -> bool:
    """Whether somebody works on it; a process that writes no name, another sampler's, is taken to be alive."""
    return trial.state == TrialState.RUNNING and is_alive(trial.system_attrs.get(WORKER))


def _merge(
    parameters: Mapping[str, BaseDistribution | None], trials: Iterable[FrozenTrial]
) -> dict[str, BaseDistribution | None]:
    """The parameters with those of further trials; None for one whose distribution differs."""
    merged = dict(parameters)
    for trial in trials:
        for name, distribution in trial.distributions.items():
            if merged.setdefault(name, distribution) != distribution:
                merged[name] = None
    return merged


def _space(parameters: Mapping[str, BaseDistribution | None]) -> dict[str, BaseDistribution]:
    """What there is to choose, by name: storages may give the parameters of a trial in any order."""
    return {name: d for name, d in sorted(parameters.items()) if d is not None and not d.single()}


def _write_proposed(study: Study, trial: FrozenTrial, proposed: Mapping[str, int]) -> None:
    """Keep the whole proposal: the parameters of a trial appear one by one, and some of them never."""
    text = json.dumps(proposed)
    for part, start in enumerate(range(0, len(text), MAX_ATTRIBUTE)):
        study._storage.set_trial_system_attr(trial._trial_id, f"{PROPOSED}:{part}", text[start : start + MAX_ATTRIBUTE])


def _proposed(trial: FrozenTrial) -> dict[str, int]:
    """What was proposed, parameter → number of its value; empty where nothing was, or not all is written yet."""
    parts = (trial.system_attrs.get(f"{PROPOSED}:{part}", "") for part in itertools.count())
    try:
        return dict(json.loads("".join(itertools.takewhile(bool, parts))))
    except json.JSONDecodeError:
        return {}
