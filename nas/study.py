"""The record of everything that was tried: one Optuna study per arm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution
from optuna.storages import JournalStorage
from optuna.trial import TrialState, create_trial

from nas.errors import StudyError
from nas.journal import open_journal, open_study, whole_lines
from nas.space import SearchSpace


@dataclass(frozen=True)
class Trial:
    """One candidate that was evaluated, or that failed.

    Attributes:
        index: its number from the strategy (negative where it was enqueued); ``seen`` outcomes had been told when it
            was asked for, as one of ``batch``.
        genome: row of value indices.
        fidelity: the share of the full training that it got.
        source: ``asked`` by the strategy, or ``enqueued``.
        costs: predicted costs by name.
        quality, reward: NaN where it failed; ``reason`` says why.
        status: complete or failed.
        seconds: what its evaluation took; ``elapsed``: of the whole search so far, earlier runs included.
    """

    index: int
    genome: tuple[int, ...]
    seen: int
    status: str
    costs: dict[str, float]
    violation: float
    quality: float = math.nan
    reward: float = math.nan
    reason: str = ""
    seconds: float = 0.0
    elapsed: float = 0.0
    fidelity: float = 1.0
    source: str = "asked"
    batch: int = 0


def trainings(trials: Iterable[Trial]) -> float:
    """How many full trainings the trials are worth: the sum of their fidelities."""
    return math.fsum(trial.fidelity for trial in trials)


class Study:
    """Trials of one arm of a search (``search``, ``random``, …) in a journal file or any Optuna storage.

    Args:
        storage: path of a journal file, or an Optuna storage URL (``sqlite:///…``).
        name: arm.
        space: whose choices become the trials' parameters.
        identity: what must be equal for a resume to be a resume (seed, strategy, data, …).

    Attributes:
        repaired: what opening had to mend, for people; empty mostly.

    Raises:
        StudyError: the storage cannot be opened, or holds another experiment's trials.
    """

    def __init__(self, storage: str | Path, name: str, space: SearchSpace, identity: dict[str, Any]) -> None:
        self.space = space
        self._study, self.repaired = open_study(storage, name, "maximize", identity)
        self._distributions = {c.name: CategoricalDistribution(c.values) for c in space.choices}

    def add(self, trial: Trial) -> None:
        """Record one finished trial; it is on disk when this returns.

        To Optuna a trial of less than the full training is one that was pruned, so that its own tools do not take
        its value for a full one's.
        """
        params = {c.name: c.values[g] for c, g in zip(self.space.choices, trial.genome, strict=True)}
        done = trial.status == "complete"
        attributes = {
            "index": trial.index, "genome": list(trial.genome), "seen": trial.seen, "status": trial.status,
            "costs": trial.costs, "violation": trial.violation, "quality": trial.quality if done else None,
            "reason": trial.reason, "seconds": trial.seconds, "elapsed": trial.elapsed, "fidelity": trial.fidelity,
            "source": trial.source, "batch": trial.batch,
        }  # fmt: skip
        partly = TrialState.PRUNED if trial.fidelity < 1 else TrialState.COMPLETE
        self._study.add_trial(
            create_trial(
                state=partly if done else TrialState.FAIL,
                value=trial.reward if done else None,
                params=params,
                distributions=dict(self._distributions),
                user_attrs=attributes,
            )
        )

    def __iter__(self) -> Iterator[Trial]:
        """All trials by index."""
        found = (_read(t) for t in self._study.get_trials(deepcopy=False) if "index" in t.user_attrs)
        return iter(sorted(found, key=lambda trial: trial.index))

    def genomes(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Genomes of all trials, ``[trials, choices]``."""
        rows = [trial.genome for trial in self]
        return np.array(rows, dtype=np.int64).reshape(len(rows), len(self.space.choices))


def _read(frozen: optuna.trial.FrozenTrial) -> Trial:
    a = frozen.user_attrs
    done = a["status"] == "complete"
    return Trial(
        index=a["index"], genome=tuple(a["genome"]), seen=a["seen"], status=a["status"], costs=a["costs"],
        violation=a["violation"], quality=a["quality"] if done else math.nan,
        reward=float(frozen.value) if done and frozen.value is not None else math.nan,
        reason=a["reason"], seconds=a["seconds"], elapsed=a["elapsed"],
        # Studies that were begun before trials had these are of full trainings that a strategy asked for.
        fidelity=a.get("fidelity", 1.0), source=a.get("source", "asked"), batch=a.get("batch", 0),
    )  # fmt: skip


def read_trials(storage: str | Path, name: str) -> list[tuple[Trial, dict[str, Any]]]:
    """The trials of one arm by index, each with the values of its candidate's choices.

    Changes nothing, not even a torn last line, and needs no space: a search may be writing at the same time.

    Raises:
        StudyError: there is no such arm, or the storage cannot be read.
    """
    studies = _read_studies(storage)
    if name not in studies:
        known = ", ".join(studies) or "none yet"
        raise StudyError(f"{storage} has no trials of {name!r}.", expected=f"one of {known}")
    found = [(_read(trial), trial.params) for trial in studies[name]]
    return sorted(found, key=lambda pair: pair[0].index)


def read_earlier(storage: str | Path, space: SearchSpace, prefix: str = "") -> list[Trial]:
    """All trials of another search's studies over the same space; nothing of it is changed.

    Args:
        storage: path of a journal file, or an Optuna storage URL.
        prefix: read the studies whose names begin so.

    Returns:
        Their genomes are of ``space``, whatever the order of its choices and values was then.

    Raises:
        StudyError: there is no such storage, or its trials are of another space.
    """
    frozen = [t for name, found in _read_studies(storage).items() if name.startswith(prefix) for t in found]
    for trial in frozen:
        _check_choices(trial.distributions, space, storage)
    return [replace(_read(t), genome=tuple(space.encode(t.params).tolist())) for t in frozen]


def _read_studies(storage: str | Path) -> dict[str, list[optuna.trial.FrozenTrial]]:
    """Name of every study in the storage → its trials, without changing anything."""
    with TemporaryDirectory() as folder:
        try:
            opened = storage if isinstance(storage, str) and "://" in storage else _copied(Path(storage), Path(folder))
            return {
                name: [
                    trial
                    for trial in optuna.load_study(study_name=name, storage=opened).get_trials(deepcopy=False)
                    if "index" in trial.user_attrs
                ]
                for name in optuna.get_all_study_names(opened)
            }
        except Exception as error:
            raise StudyError(f"The study in {storage} cannot be read: {error}.", remedy="name another run") from error


def _copied(journal: Path, folder: Path) -> JournalStorage:
    """A journal's whole lines: its last one may be torn, or be written this very moment."""
    data = journal.read_bytes()
    copy = folder / journal.name
    copy.write_bytes(data[: whole_lines(data)])
    return open_journal(copy)[0]


def _check_choices(found: dict[str, Any], space: SearchSpace, storage: str | Path) -> None:
    values = {name: set(getattr(distribution, "choices", ())) for name, distribution in found.items()}
    wanted = {choice.name: set(choice.values) for choice in space.choices}
    if differing := sorted(name for name in {*values, *wanted} if values.get(name) != wanted.get(name)):
        raise StudyError(
            f"The study in {storage} is of another space than {space.name!r}: {', '.join(differing)} differ.",
            expected="the same choices with the same values",
            remedy="leave that run out of search.earlier",
        )
