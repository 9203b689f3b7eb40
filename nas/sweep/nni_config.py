"""What NNI's users have, a search space or a whole experiment (``config.yml`` of NNI 2 and 3), as a sweep."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nas.errors import ExperimentError
from nas.sweep.nni_space import check_space, is_nni, read_file, read_space
from nas.sweep.parameter import is_number

TUNERS = {"TPE": "TPESampler", "Random": "RandomSampler", "GridSearch": "GridSampler", "GP": "GPSampler"}
METRIC = "result"
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
# What a sweep does not need to know: it runs on this machine, and has no manager.
_MOOT = (
    "trialGpuNumber", "trainingService", "nniManagerIp", "debug", "logLevel", "experimentWorkingDirectory",
    "tunerGpuIndices", "sharedStorage", "experimentType", "useAnnotation", "maxTrialDuration",
)  # fmt: skip
_KEYS = (
    "experimentName", "name", "searchSpaceFile", "searchSpace", "trialCommand", "trialCodeDirectory",
    "trialConcurrency", "maxTrialNumber", "maxExperimentDuration", "tuner", "assessor",
)  # fmt: skip
_FIRST_VERSION = ("searchSpacePath", "trial", "maxTrialNum", "maxExecDuration", "trainingServicePlatform")

Keys = dict[str, Any]


def load_nni(path: Path) -> tuple[Keys, list[str]]:
    """A search space of NNI's, or a whole experiment, as keys of a sweep.

    Returns:
        The keys that it says something about, and notes about what has no counterpart here.

    Raises:
        ContentError: a file cannot be read.
        ExperimentError: names the key that is wrong, unknown, or impossible here.
    """
    found = read_file(path, "search space")
    keys: Keys = {"name": _name(path.stem), "metric": METRIC}
    if not any(key in found and not is_nni(found[key]) for key in (*_KEYS, *_FIRST_VERSION)):
        check_space(found)
        return {**keys, "vary": found}, []
    if old := [key for key in _FIRST_VERSION if key in found]:
        raise ExperimentError(
            f"{path} has the key {old[0]!r}, which is of NNI's first version.",
            remedy="--nni with its search space, and --command with its trial's command",
        )
    if unknown := [key for key in found if key not in (*_KEYS, *_MOOT)]:
        raise ExperimentError(f"Unknown key {unknown[0]!r} in {path}.", expected=f"one of {', '.join(_KEYS)}")
    notes = [f"{key} is left out: it has no meaning here" for key in found if key in _MOOT and found[key]]
    keys |= _plain(path, found) | {"vary": _space(path, found)}
    for section, read in (("tuner", _tuner), ("assessor", _assessor)):
        if found.get(section) is not None:
            keys |= read(_algorithm(found, section), notes)
    return keys, notes


def _plain(path: Path, found: Keys) -> Keys:
    """What is only called by another name."""
    name = found.get("experimentName") or found.get("name") or path.stem
    keys: Keys = {"name": _name(str(name))}
    for theirs, ours in (("trialCommand", "command"), ("trialConcurrency", "workers"), ("maxTrialNumber", "trials")):
        if found.get(theirs) is not None:
            keys[ours] = found[theirs]
    if (duration := found.get("maxExperimentDuration")) is not None:
        keys["seconds"] = _seconds(duration)
        keys.setdefault("trials", None)
    if "command" in keys:
        keys["directory"] = str(path.parent / str(found.get("trialCodeDirectory") or "."))
    return keys


def _space(path: Path, found: Keys) -> Keys:
    inside, file = found.get("searchSpace"), found.get("searchSpaceFile")
    if (inside is None) == (file is None):
        raise ExperimentError(f"{path} has no search space, or two.", expected="searchSpace or searchSpaceFile")
    if file is not None:
        return read_space(path.parent / str(file))
    check_space(inside)
    return dict(inside or {})


def _algorithm(found: Keys, section: str) -> tuple[str, Keys]:
    """The name and the arguments of a tuner or an assessor."""
    algorithm = found[section]
    name = algorithm.get("name") if isinstance(algorithm, Mapping) else None
    arguments = (algorithm.get("classArgs") if name else None) or {}
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ExperimentError(f"{section} is {algorithm!r}.", expected="the name of one of NNI's, with its classArgs")
    return name, dict(arguments)


def _tuner(tuner: tuple[str, Keys], notes: list[str]) -> Keys:
    name, arguments = tuner
    if name not in TUNERS:
        raise ExperimentError(
            f"Tuner {name!r} has no counterpart here.",
            expected=f"one of {', '.join(TUNERS)}",
            remedy="one of these in the file, and any sampler of Optuna with --sampler",
        )
    keys: Keys = {"sampler": TUNERS[name]}
    for theirs, ours in (("optimize_mode", "direction"), ("seed", "seed")):
        if (value := arguments.pop(theirs, None)) is not None:
            keys[ours] = value
    notes += [f"tuner.classArgs.{key} is left out: {TUNERS[name]} has no such setting" for key in arguments]
    return keys


def _assessor(assessor: tuple[str, Keys], notes: list[str]) -> Keys:
    name, arguments = assessor
    if name != "Medianstop":
        notes.append(f"assessor {name} has no counterpart here, and no trial is ended early; see --pruner")
        return {}
    step = arguments.get("start_step", 0)
    if not isinstance(step, int):
        raise ExperimentError(f"assessor.classArgs.start_step is {step!r}.", expected="a whole number of reports")
    # Theirs judges as soon as one trial is complete, and from the report of that number on, the first being 1.
    warmup = max(0, step - 1)
    return {"pruner": "MedianPruner", "pruner_settings": {"n_startup_trials": 1, "n_warmup_steps": warmup}}


def _seconds(duration: Any) -> float:
    if is_number(duration):
        return float(duration)
    if match := re.fullmatch(r"(\d+(?:\.\d*)?)([smhd])", str(duration).strip().lower()):
        return float(match[1]) * _UNITS[match[2]]
    raise ExperimentError(f"maxExperimentDuration is {duration!r}.", expected="seconds, or a time such as 30m or 2h")


def _name(words: str) -> str:
    """Words as the name of a sweep, and of its folder."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", words).strip("-._") or "nni"
