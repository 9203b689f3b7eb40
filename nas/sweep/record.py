"""The record of a sweep: an Optuna study in a journal, opened under the sweep's lock, every time anew.

Any number of processes may work on one sweep. Whoever decides something, which trial is next, what became of one,
holds ``.sweep.lock`` meanwhile and reads the whole journal first: nobody acts on an old state, and a journal that a
kill has torn is mended before the next line is written.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from nas.errors import ContentError, ExperimentError, NasError
from nas.files import digest
from nas.journal import open_study
from nas.locks import file_lock
from nas.registry import import_object
from nas.settings import construct, keys_of
from nas.sweep.runners import Runner
from nas.sweep.spec import Parameter, Sweep, all_combinations, combinations

JOURNAL, LOCK = "sweep.jsonl", ".sweep.lock"
RETRIES = 1  # of a trial whose process died
# These draw one sequence from their seed and count along it in the record; the others draw anew from each seed.
_ONE_SEQUENCE = ("GridSampler", "QMCSampler")
_REPEATS = 20
_ENUMERABLE = 2000
_TRIES = 1000
_ENOUGH = 4  # complete trials, below which importances would be noise


@dataclass(frozen=True)
class Entry:
    """One trial as it is recorded.

    Attributes:
        index: its number, and the name of its folder.
        drawn: what the sampler drew, label or number for every parameter.
        values: what takes effect of it, as the experiment gets it.
        status: running, complete or failed; ``reason`` says why it failed.
        value: the metric.
        figures: everything that was measured.
        deaths: how many processes died on it.
        seconds: of its last attempt; ``elapsed``: of the sweep when it ended.
    """

    index: int
    drawn: dict[str, Any]
    values: dict[str, Any]
    status: str = "running"
    value: float | None = None
    figures: dict[str, float] = field(default_factory=dict)
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
        ExperimentError: the sampler is unknown, or does not suit what is varied.
    """

    folder: Path
    sweep: Sweep
    parameters: tuple[Parameter, ...]
    runner: Runner
    identity: dict[str, Any]

    def __post_init__(self) -> None:
        check_sampler(self.sweep, self.parameters)

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
                self._end(trial.number, None)

    def _frozen(self, *states: TrialState) -> list[FrozenTrial]:
        return list(self._study.get_trials(deepcopy=False, states=states or None))

    def entries(self) -> list[Entry]:
        """All trials by index."""
        found = [_entry(trial) for trial in self._frozen() if "index" in trial.user_attrs]
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
            self._end(trial.number, None)
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
        return Entry(index, dict(trial.params), values)

    def _ask(self) -> optuna.Trial:
        number = len(self._frozen())
        self._study.sampler = make_sampler(self.sweep, self.parameters, number)
        distributions = {p.key: distribution(p) for p in self.parameters}
        try:
            with _quiet():
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

    def _tell(self, entry: Entry, value: float | None, attributes: dict[str, Any]) -> Entry:
        trial = self._find(entry)
        storage = self._study._storage
        for name, content in attributes.items():
            storage.set_trial_user_attr(trial._trial_id, name, content)
        # Where Optuna's samplers look for constraints, all versions of it.
        storage.set_trial_system_attr(
            trial._trial_id, "constraints", [attributes.get("figures", {}).get("violation", 0.0)]
        )
        self._end(trial.number, value)
        return _entry(self._find(entry))

    def _end(self, number: int, value: float | None) -> None:
        self._study.sampler = make_sampler(self.sweep, self.parameters, number)
        state = TrialState.FAIL if value is None else TrialState.COMPLETE
        try:
            with _quiet():
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
            with _quiet():
                found = optuna.importance.get_param_importances(self._study, evaluator=evaluator)
        except (RuntimeError, ValueError) as error:
            return None, str(error)
        return {key: float(share) for key, share in found.items()}, ""


def _entry(trial: FrozenTrial) -> Entry:
    a = trial.user_attrs
    status = {TrialState.RUNNING: "running", TrialState.COMPLETE: "complete"}.get(trial.state, "failed")
    return Entry(
        a["index"], dict(trial.params), a["values"], status, trial.value if status == "complete" else None,
        a.get("figures", {}), a.get("reason", ""), a.get("deaths", 0), a.get("seconds", 0.0), a.get("elapsed", 0.0),
    )  # fmt: skip


def distribution(parameter: Parameter) -> BaseDistribution:
    """What Optuna draws a parameter from; the values of a list stand in it as text."""
    p = parameter
    if p.values:
        return CategoricalDistribution(p.labels)
    if p.whole:
        return IntDistribution(int(p.low), int(p.high), log=p.log, step=int(p.step or 1))
    return FloatDistribution(p.low, p.high, log=p.log, step=p.step)


def make_sampler(sweep: Sweep, parameters: Sequence[Parameter], number: int) -> optuna.samplers.BaseSampler:
    """The sampler for draw ``number``: made anew for each, so that a resumed sweep goes on as it would have.

    Raises:
        ExperimentError: it is unknown, or a setting of it is wrong.
    """
    kind = _sampler_class(sweep.sampler)
    names, settings = keys_of(kind, 0), dict(sweep.sampler_settings)
    if "seed" in names:
        spawned = (sweep.seed,) if sweep.sampler in _ONE_SEQUENCE else (sweep.seed, number)
        settings.setdefault("seed", int(np.random.SeedSequence(spawned).generate_state(1)[0]))
    if "search_space" in names:
        settings.setdefault("search_space", _grid(sweep, parameters))
    with _quiet():
        return construct(kind, settings, where="sampler_settings")


def _sampler_class(name: str) -> Any:
    found = import_object(name, "sampler") if ":" in name else getattr(optuna.samplers, name, None)
    if not (isinstance(found, type) and issubclass(found, optuna.samplers.BaseSampler)):
        offered = [
            n for n in optuna.samplers.__all__ if n.endswith("Sampler") and not n.startswith(("Base", "Partial"))
        ]
        raise ExperimentError(
            f"Unknown sampler {name!r}.", expected=f"one of Optuna's: {', '.join(offered)}, or 'module:Name'"
        )
    return found


def _grid(sweep: Sweep, parameters: Sequence[Parameter]) -> dict[str, list[Any]]:
    for p in parameters:
        if p.options is None:
            raise ExperimentError(
                f"Sampler {sweep.sampler!r} needs finite choices, and vary.{p.key} is a continuous range.",
                remedy=f"a list of values, or a step, for {p.key}",
            )
    return {p.key: list(p.options or ()) for p in parameters}


def check_sampler(sweep: Sweep, parameters: Sequence[Parameter]) -> None:
    """Draw a few times in memory, so that what a sampler cannot do is said before anything runs.

    Raises:
        ExperimentError: the sampler is unknown, lacks a package, or does not suit what is varied.
    """
    study = optuna.create_study(direction=sweep.goal)
    distributions = {p.key: distribution(p) for p in parameters}
    for number in range(int(min(3, combinations(parameters)))):
        study.sampler = make_sampler(sweep, parameters, number)
        try:
            with _quiet():
                trial = study.ask(distributions)
                with contextlib.suppress(RuntimeError, KeyError):  # the end of a small grid, see Ledger._end
                    study.tell(trial, float(number))
        except (NasError, KeyboardInterrupt):
            raise
        except ImportError as error:
            raise ContentError(f"Sampler {sweep.sampler!r} needs a package: {error}", remedy="install it") from error
        except Exception as error:
            raise ExperimentError(
                f"Sampler {sweep.sampler!r} cannot draw what is varied: {error}",
                remedy="another sampler, or other sampler_settings",
            ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Samplers warn of what is experimental in them; that is for those who chose them to know."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
