"""Earlier searches over the same space: what their run folders know, kept in the run that makes use of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from nas.errors import StudyError
from nas.experiment import Experiment
from nas.files import write_json
from nas.space import SearchSpace
from nas.study import Trial, read_earlier

SAME = ("task", "training")


def earlier_trials(experiment: Experiment, space: SearchSpace, run: Path, warn: Callable[[str], None]) -> list[Trial]:
    """Every trial of the runs in ``search.earlier``, arm by arm; a resumed run takes those that it began with.

    Raises:
        StudyError: a folder holds no run, no trials, or a run over another space.
    """
    if not experiment.search.earlier:
        return []
    kept = run / "earlier.json"
    if not kept.exists():
        warnings, found = list[str](), list[Trial]()
        for folder in map(Path, experiment.search.earlier):
            then, trials = _read(space, folder)
            found += trials
            if changed := [name for name in SAME if getattr(then, name) != getattr(experiment, name)]:
                warnings.append(f"the earlier run {folder} had another {' and '.join(changed)}: qualities may differ")
        write_json(kept, {"warnings": warnings, "trials": [_plain(space, trial) for trial in found]})
    known = json.loads(kept.read_text())
    for text in known["warnings"]:
        warn(text)
    return [_trial(space, record) for record in known["trials"]]


def _read(space: SearchSpace, folder: Path) -> tuple[Experiment, list[Trial]]:
    try:
        then = Experiment.model_validate(yaml.safe_load((folder / "experiment.yaml").read_text()))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise StudyError(f"search.earlier: {folder} is no run folder: {error}.", expected="a run folder") from error
    url = then.study.storage
    prefix = f"{then.name}-{folder.resolve().name}-" if url else ""
    trials = read_earlier(url or folder / "study.jsonl", space, prefix)
    if not trials:
        raise StudyError(f"search.earlier: {folder} holds no trials.", remedy="leave it out")
    return then, trials


def _plain(space: SearchSpace, trial: Trial) -> dict[str, Any]:
    return {
        "candidate": space.decode(trial.genome).as_dict(), "fidelity": trial.fidelity, "status": trial.status,
        "quality": trial.quality if math.isfinite(trial.quality) else None,
    }  # fmt: skip


def _trial(space: SearchSpace, record: dict[str, Any]) -> Trial:
    quality = math.nan if record["quality"] is None else float(record["quality"])
    genome = tuple(space.encode(record["candidate"]).tolist())
    return Trial(0, genome, 0, record["status"], {}, 0.0, quality, fidelity=record["fidelity"], source="earlier")
