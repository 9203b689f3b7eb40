"""The record of everything that was tried: one Optuna study per arm."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState, create_trial

from nas.journal import open_study
from nas.space import SearchSpace


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
