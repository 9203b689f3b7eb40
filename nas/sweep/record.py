"""The record of a sweep: an Optuna study in a journal, opened under the sweep's lock, every time anew.

Any number of processes may work on one sweep. Whoever decides something, which trial is next, what became of one,
holds ``.sweep.lock`` meanwhile and reads the whole journal first: nobody acts on an old state, and a journal that a
kill has torn is mended before the next line is written.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from nas.errors import ExperimentError
from nas.files import digest
from nas.journal import open_study
from nas.locks import file_lock
from nas.sweep.parameter import Parameter, all_combinations, combinations
from nas.sweep.runners import Runner
from nas.sweep.samplers import check_sampler, distribution, make_pruner, make_sampler, quiet
from nas.sweep.spec import Sweep

JOURNAL, LOCK = "sweep.jsonl", ".sweep.lock"
RETRIES = 1  # of a trial whose process died
_REPEATS = 20
_ENUMERABLE = 2000
_TRIES = 1000
_ENOUGH = 4  # complete trials, below which importances would be noise
_STATUS = {TrialState.RUNNING: "running", TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned"}


@dataclass(frozen=True)
class Entry:
    """One trial as it is recorded.

    Attributes:
        index: its number, and the name of its folder.
        drawn: what the sampler drew, label or value for every parameter.
        values: what takes effect of it, as the experiment gets it.
        status: running, complete, pruned or failed; ``reason`` says why it was pruned or failed.
        value: the metric.
        figures: everything that was measured.
        intermediate: step → what was reported on the way.
        deaths: how many processes died on it.
        seconds: of its last attempt; ``elapsed``: of the sweep when it ended.
    """

    index: int
    drawn: dict[str, Any]
    values: dict[str, Any]
    status: str = "running"
    value: float | None = None
    figures: dict[str, float] = field(default_factory=dict)
    intermediate: dict[int, float] = field(default_factory=dict)
    reason: str = ""
    deaths: int = 0
    seconds: float = 0.0
    elapsed: float = 0.0

    @property
    def violation(self) -> float:
        """By how much a budget is broken; 0 where none is."""
        return self.figures.get("violation", 0.0)


@dataclass(frozen=True)
class Record:
    """Where a sweep is recorded; :meth:`open` is the way to read and write it.

    Raises:
        ExperimentError: the sampler or the pruner is unknown, or does not suit the sweep.
    """

    folder: Path
    sweep: Sweep
    parameters: tuple[Parameter, ...]
    runner: Runner
    identity: dict[str, Any]

    def __post_init__(self) -> None:
        check_sampler(self.sweep, self.parameters)
        make_pruner(self.sweep)

    @contextlib.contextmanager
    def open(self) -> Iterator[Ledger]:
        """The record as it is now, for as long as nobody else changes it.

        Raises:
            StudyError: the journal cannot be opened, or belongs to another sweep.
        """
        with file_lock(self.folder / LOCK):
            study, repaired = open_study(self.folder / JOURNAL, "sweep", self.sweep.goal, self.identity)
            yield Ledger(study, self.sweep, self.parameters, self.runner, repaired)


class Ledger:
    """The trials of a sweep, with the sweep's lock held."""

    def __init__(
        self, study: optuna.Study, sweep: Sweep, parameters: tuple[Parameter, ...], runner: Runner, repaired: str
    ) -> None:
        self.sweep, self.parameters, self.runner, self.repaired = sweep, parameters, runner, repaired
        self._study = study
        for trial in self._frozen(TrialState.RUNNING):
            if "index" not in trial.user_attrs:  # its process died while it was asking
                self._end(trial.number, TrialState.FAIL)

    def _frozen(self, *states: TrialState) -> list[FrozenTrial]:
        return list(self._study.get_trials(deepcopy=False, states=states or None))

    def entries(self) -> list[Entry]:
        """All trials by index."""
        found = [self._entry(trial) for trial in self._frozen() if "index" in trial.user_attrs]
        return sorted(found, key=lambda entry: entry.index)

    def ask(self) -> Entry | None:
        """A new trial, unlike all before it, from now on running; nothing where every combination has been tried."""
        entries = self.entries()
        known = {digest(entry.values) for entry in entries}
        if self._unseen(known, 0) is None:
            return None
        for _ in range(_REPEATS):
            trial = self._ask()
            values = self._settle(trial.params)
            if digest(values) not in known:
                return self._begin(trial, values, len(entries))
            self._end(trial.number, TrialState.FAIL)
        # A sampler that insists on what it knows: any combination that is left.
        drawn = self._unseen(known, len(self._frozen()))
        if drawn is None:
            return None
        self._study.enqueue_trial(drawn)
        trial = self._ask()
        return self._begin(trial, self._settle(trial.params), len(entries))

    def _begin(self, trial: optuna.Trial, values: dict[str, Any], index: int) -> Entry:
        trial.set_user_attr("values", values)
        trial.set_user_attr("index", index)  # last: with it the trial exists
        return Entry(index, self._shown(trial.params), values)

    def _shown(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        return {p.key: p.shown(drawn[p.key]) for p in self.parameters}

    def _entry(self, trial: FrozenTrial) -> Entry:
        a, status = trial.user_attrs, _STATUS.get(trial.state, "failed")
        return Entry(
            a["index"], self._shown(trial.params), a["values"], status, trial.value if status == "complete" else None,
            a.get("figures", {}), dict(sorted(trial.intermediate_values.items())), a.get("reason", ""),
            a.get("deaths", 0), a.get("seconds", 0.0), a.get("elapsed", 0.0),
        )  # fmt: skip

    def _ask(self) -> optuna.Trial:
        number = len(self._frozen())
        self._study.sampler = make_sampler(self.sweep, self.parameters, number)
        distributions = {p.key: distribution(p) for p in self.parameters}
        try:
            with quiet():
                return self._study.ask(distributions)
        except Exception as error:
            raise ExperimentError(
                f"Sampler {self.sweep.sampler!r} cannot go on after {number} draws: {error}", remedy="another sampler"
            ) from error

    def _settle(self, drawn: dict[str, Any]) -> dict[str, Any]:
        return self.runner.settle({p.key: p.value(drawn[p.key]) for p in self.parameters})

    def _unseen(self, known: set[str], number: int) -> dict[str, Any] | None:
        rng = np.random.default_rng((self.sweep.seed, number))
        if combinations(self.parameters) <= _ENUMERABLE:
            fresh = [d for d in all_combinations(self.parameters) if digest(self._settle(d)) not in known]
            return fresh[rng.integers(len(fresh))] if fresh else None
        draws = ({p.key: p.draw(rng) for p in self.parameters} for _ in range(_TRIES))
        return next((drawn for drawn in draws if digest(self._settle(drawn)) not in known), None)

    def complete(self, entry: Entry, figures: dict[str, float], seconds: float, elapsed: float) -> Entry:
        """Record what a trial measured; one whose metric is missing or not finite has failed."""
        value = figures.get(self.sweep.metric)
        if value is None or not math.isfinite(value):
            found = "was not measured" if value is None else f"is {value}"
            return self.fail(entry, f"metric {self.sweep.metric} {found}", seconds, elapsed)
        finite = {name: number for name, number in figures.items() if math.isfinite(number)}
        return self._tell(entry, value, {"figures": finite, "seconds": seconds, "elapsed": elapsed})

    def fail(self, entry: Entry, reason: str, seconds: float, elapsed: float) -> Entry:
        """Record a trial without a result."""
        return self._tell(entry, None, {"reason": reason, "seconds": seconds, "elapsed": elapsed})

    def report(self, entry: Entry, values: Mapping[int, float]) -> bool:
        """Record what a trial has reported on the way, step → value; returns whether the pruner would end it.

        The pruner is asked after every step that is new to the record, as if each had been reported alone.
        """
        pruner, ended = make_pruner(self.sweep), False
        for step, value in sorted(values.items()):
            trial = self._find(entry)
            if trial.intermediate_values.get(step) == value:
                continue
            self._study._storage.set_trial_intermediate_value(trial._trial_id, step, value)
            with quiet():
                ended = pruner.prune(self._study, self._find(entry)) or ended
        return ended

    def prune(self, entry: Entry, seconds: float, elapsed: float) -> Entry:
        """Record that a trial was ended on its way."""
        known = self._find(entry).intermediate_values
        reason = f"at step {max(known)}, with {known[max(known)]:.6g}"
        attributes = {"reason": reason, "seconds": seconds, "elapsed": elapsed}
        return self._tell(entry, None, attributes, TrialState.PRUNED)

    def _tell(
        self, entry: Entry, value: float | None, attributes: dict[str, Any], state: TrialState = TrialState.FAIL
    ) -> Entry:
        trial = self._find(entry)
        storage = self._study._storage
        for name, content in attributes.items():
            storage.set_trial_user_attr(trial._trial_id, name, content)
        # Where Optuna's samplers look for constraints, all versions of it.
        storage.set_trial_system_attr(
            trial._trial_id, "constraints", [attributes.get("figures", {}).get("violation", 0.0)]
        )
        self._end(trial.number, state if value is None else TrialState.COMPLETE, value)
        return self._entry(self._find(entry))

    def _end(self, number: int, state: TrialState, value: float | None = None) -> None:
        self._study.sampler = make_sampler(self.sweep, self.parameters, number)
        try:
            with quiet():
                self._study.tell(number, value, state=state)
        except Exception:
            # GridSampler and BruteForceSampler stop the study's loop when they are through, but the loop is ours.
            if not self._frozen()[number].state.is_finished():
                raise

    def died(self, entry: Entry) -> int:
        """Count a process that died on a trial; returns how many have."""
        trial = self._find(entry)
        deaths = int(trial.user_attrs.get("deaths", 0)) + 1
        self._study._storage.set_trial_user_attr(trial._trial_id, "deaths", deaths)
        return deaths

    def _find(self, entry: Entry) -> FrozenTrial:
        return next(trial for trial in self._frozen() if trial.user_attrs.get("index") == entry.index)

    def importances(self) -> tuple[dict[str, float] | None, str]:
        """Share of the metric's variance that each parameter explains (fANOVA, Hutter et al. 2014), largest first.

        Returns:
            The shares, which add up to 1, or nothing and why.
        """
        values = [trial.value for trial in self._frozen(TrialState.COMPLETE)]
        if len(values) < _ENOUGH:
            return None, f"{len(values)} complete trials; importances need {_ENOUGH}"
        if len(set(values)) == 1:
            return None, "every complete trial has the same value"
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=self.sweep.seed)
        try:
            with quiet():
                found = optuna.importance.get_param_importances(self._study, evaluator=evaluator)
        except (RuntimeError, ValueError) as error:
            return None, str(error)
        return {key: float(share) for key, share in found.items()}, ""
