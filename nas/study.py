"""The record of everything that was tried: one Optuna study per arm."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState, create_trial

from nas.errors import StudyError
from nas.locks import file_lock
from nas.space import SearchSpace

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True)
class Trial:
    """One candidate that was evaluated, or that failed.

    Attributes:
        index: its number from the strategy; ``seen`` outcomes had been told when it was asked.
        genome: row of value indices.
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


class _ProcessLock:
    """A lock of the operating system, which a killed process cannot leave behind as Optuna's lock files can."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held: Any = None

    def acquire(self) -> bool:
        self._held = file_lock(self.path)
        self._held.__enter__()
        return True

    def release(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            held.__exit__(None, None, None)


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
        self.repaired = ""
        try:
            self._study = optuna.create_study(
                storage=self._open(storage), study_name=name, direction="maximize", load_if_exists=True
            )
        except StudyError:
            raise
        except Exception as error:
            raise StudyError(
                f"The study {name!r} in {storage} cannot be opened: {error}.",
                remedy="move the file away, or choose another --out",
            ) from error
        self._check_identity(identity, storage)
        self._distributions = {c.name: CategoricalDistribution(c.values) for c in space.choices}

    def _open(self, storage: str | Path) -> Any:
        if isinstance(storage, str) and "://" in storage:
            return storage
        path = Path(storage)
        path.parent.mkdir(parents=True, exist_ok=True)
        cut = cut_torn_tail(path)
        if cut:
            self.repaired = f"{path.name}: a last line torn by a crash ({cut} bytes) was cut off"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return JournalStorage(JournalFileBackend(str(path), _ProcessLock(path.with_name(f".{path.name}.lock"))))  # type: ignore[arg-type]

    def _check_identity(self, identity: dict[str, Any], storage: str | Path) -> None:
        plain = json.loads(json.dumps(identity))
        known = self._study.user_attrs.get("identity")
        if known is None:
            self._study.set_user_attr("identity", plain)
        elif known != plain:
            changed = sorted(k for k in {*known, *plain} if known.get(k) != plain.get(k))
            raise StudyError(
                f"The study in {storage} belongs to another experiment: {', '.join(changed)} changed.",
                remedy="undo the change, or start afresh with another --out",
            )

    def add(self, trial: Trial) -> None:
        """Record one finished trial; it is on disk when this returns."""
        params = {c.name: c.values[g] for c, g in zip(self.space.choices, trial.genome, strict=True)}
        done = trial.status == "complete"
        attributes = {
            "index": trial.index, "genome": list(trial.genome), "seen": trial.seen, "status": trial.status,
            "costs": trial.costs, "violation": trial.violation, "quality": trial.quality if done else None,
            "reason": trial.reason, "seconds": trial.seconds, "elapsed": trial.elapsed,
        }  # fmt: skip
        self._study.add_trial(
            create_trial(
                state=TrialState.COMPLETE if done else TrialState.FAIL,
                value=trial.reward if done else None,
                params=params,
                distributions=dict(self._distributions),
                user_attrs=attributes,
            )
        )

    def __iter__(self) -> Iterator[Trial]:
        """All trials by index."""
        found = (self._read(t) for t in self._study.get_trials(deepcopy=False) if "index" in t.user_attrs)
        return iter(sorted(found, key=lambda trial: trial.index))

    @staticmethod
    def _read(frozen: optuna.trial.FrozenTrial) -> Trial:
        a = frozen.user_attrs
        done = a["status"] == "complete"
        return Trial(
            index=a["index"], genome=tuple(a["genome"]), seen=a["seen"], status=a["status"], costs=a["costs"],
            violation=a["violation"], quality=a["quality"] if done else math.nan,
            reward=float(frozen.value) if done and frozen.value is not None else math.nan,
            reason=a["reason"], seconds=a["seconds"], elapsed=a["elapsed"],
        )  # fmt: skip

    def genomes(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Genomes of all trials, ``[trials, choices]``."""
        rows = [trial.genome for trial in self]
        return np.array(rows, dtype=np.int64).reshape(len(rows), len(self.space.choices))


def cut_torn_tail(journal: Path) -> int:
    """Cut what follows the last whole line of a journal; returns how many bytes went.

    A process killed while it writes leaves half a line. Optuna fails on it at the next open and, once more lines
    follow it, for ever.
    """
    if not journal.exists():
        return 0
    data = journal.read_bytes()
    end = len(data)
    while end:
        start = data.rfind(b"\n", 0, end - 1) + 1
        line = data[start:end]
        if line.endswith(b"\n") and _is_json(line):
            break
        end = start
    if end < len(data):
        with journal.open("r+b") as file:
            file.truncate(end)
    return len(data) - end


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
