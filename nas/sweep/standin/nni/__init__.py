"""The calls that a trial makes of NNI, answered by the sweep that started it; needs the standard library only.

This package stands first on the module path of a sweep's trials. Parameters come from, and metrics go to, the files of
NNI's local platform. Whatever else a script wants of ``nni`` is NNI's own, where that is installed.
"""

# Runs in the trial's Python, which may be an older one.
from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import sys
from typing import Any

__all__ = [
    "get_current_parameter",
    "get_experiment_id",
    "get_next_parameter",
    "get_next_parameters",
    "get_sequence_id",
    "get_trial_id",
    "report_final_result",
    "report_intermediate_result",
]

_folder = os.environ.get("NNI_SYS_DIR", "")
_parameters: Any = None
_sequence = 0
_whole: Any = None


def get_next_parameter() -> Any:
    """The trial's parameters; none of them where no sweep started it."""
    global _parameters
    if not _folder:
        return {}
    with open(os.path.join(_folder, "parameter.cfg"), encoding="utf-8") as file:
        _parameters = json.load(file)["parameters"]
    return _parameters


def get_next_parameters() -> Any:
    """The same."""
    return get_next_parameter()


def get_current_parameter(tag: str | None = None) -> Any:
    """What :func:`get_next_parameter` returned, or one key of it."""
    return _parameters if tag is None or _parameters is None else _parameters[tag]


def get_experiment_id() -> str:
    """Name of the sweep."""
    return os.environ.get("NNI_EXP_ID", "STANDALONE")


def get_trial_id() -> str:
    """Name of the trial, unlike that of any other of the sweep."""
    return os.environ.get("NNI_TRIAL_JOB_ID", "STANDALONE")


def get_sequence_id() -> int:
    """Number of the trial: 0, 1, …"""
    return int(os.environ.get("NNI_TRIAL_SEQ_ID", "0"))


def report_intermediate_result(metric: Any) -> None:
    """Report how a trial is doing: a number, or a dictionary with a number under ``default``."""
    global _sequence
    _send("PERIODICAL", _sequence, metric)
    _sequence += 1


def report_final_result(metric: Any) -> None:
    """Report what came of a trial: a number, or a dictionary with a number under ``default``."""
    _send("FINAL", 0, metric)


def overwrite_intermediate_seq(value: int) -> None:
    """The number of the next intermediate result."""
    global _sequence
    _sequence = value


def _send(kind: str, sequence: int, metric: Any) -> None:
    if not _folder:
        return
    content = {
        "parameter_id": None if _parameters is None else get_sequence_id(),
        "trial_job_id": get_trial_id(), "type": kind, "sequence": sequence,
        "value": json.dumps(metric, default=_plain),
    }  # fmt: skip
    line = json.dumps(content).encode() + b"\n"
    if len(line) >= 1_000_000:
        raise ValueError("this metric is longer than a million characters")
    os.makedirs(os.path.join(_folder, ".nni"), exist_ok=True)
    with open(os.path.join(_folder, ".nni", "metrics"), "ab") as file:
        file.write(b"ME%06d%b" % (len(line), line))


def _plain(value: Any) -> Any:
    """Numbers of numpy and tensors of torch with one element."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{value!r} cannot be reported; a number can, or a dictionary of numbers")


def _installed() -> Any:
    """Where NNI itself is, if it is anywhere."""
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    elsewhere = [place for place in sys.path if os.path.abspath(place) != here]
    spec = importlib.machinery.PathFinder.find_spec("nni", elsewhere)
    return spec if spec is not None and spec.origin is not None else None


_nni = _installed()
if _nni is not None:
    __path__.append(os.path.dirname(_nni.origin))
    # One channel, whichever way a script or NNI itself comes to these calls.
    sys.modules[f"{__name__}.trial"] = sys.modules[__name__]


def __getattr__(name: str) -> Any:
    """Everything else is looked up in NNI, which is run when it is first needed, under the name that it has."""
    global _whole
    if _nni is None or (name.startswith("__") and name != "__version__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}: only the calls of a trial are answered"
                             " without NNI (pip install nni)")  # fmt: skip
    if _whole is None:
        _whole = importlib.util.module_from_spec(_nni)
        try:
            _nni.loader.exec_module(_whole)
        except BaseException:
            _whole = None
            raise
    return getattr(_whole, name)
