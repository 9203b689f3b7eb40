"""What a trial reports while it runs: files in its folder, in the form of NNI's local platform (NNI 3.0).

So the stand-in module of :mod:`nas.sweep.commands` and NNI itself, whichever of them a trial's Python finds, are read
alike; and a trial that is a function reports with :func:`report`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nas.files import write_json
from nas.sweep.parameter import is_number

METRICS, PARAMETERS = ".nni/metrics", "parameter.cfg"
_INTERMEDIATE, _FINAL = "PERIODICAL", "FINAL"
_LENGTH = 6  # digits of a record's length, behind its mark
_MARK = b"ME"


@dataclass
class Reports:
    """What has been reported.

    Attributes:
        intermediate: step → number.
        finals: what was reported as the result, in order, whatever it is.
    """

    intermediate: dict[int, float] = field(default_factory=dict)
    finals: list[Any] = field(default_factory=list)


def report(folder: Path, step: int, value: float) -> None:
    """Report an intermediate value of a trial that is a function, so that the sweep's pruner can judge it.

    Args:
        folder: the trial's own.
        step: how far it is: 0, 1, …
    """
    content = {"type": _INTERMEDIATE, "sequence": step, "value": json.dumps(float(value))}
    line = json.dumps(content).encode() + b"\n"
    path = folder / METRICS
    path.parent.mkdir(exist_ok=True)
    with path.open("ab") as file:
        file.write(b"%b%0*d%b" % (_MARK, _LENGTH, len(line), line))


def read_reports(folder: Path) -> Reports:
    """All reports of a trial so far; a record that is being written is left for the next time."""
    found = Reports()
    try:
        written = (folder / METRICS).read_bytes()
    except FileNotFoundError:
        return found
    place = 0
    while written.startswith(_MARK, place):
        head = place + len(_MARK) + _LENGTH
        length = written[place + len(_MARK) : head]
        if not length.isdigit() or len(written) < (end := head + int(length)):
            break
        _take(found, json.loads(written[head:end]))
        place = end
    return found


def _take(found: Reports, record: dict[str, Any]) -> None:
    metric = json.loads(record["value"])
    if record["type"] == _FINAL:
        found.finals.append(metric)
    elif record["type"] == _INTERMEDIATE and (value := figures_of(metric, "default")):
        found.intermediate[int(record["sequence"])] = value["default"]


def figures_of(metric: Any, name: str) -> dict[str, float]:
    """The numbers in a reported metric: a number is called ``name``, and so is the ``default`` of a dictionary.

    Empty where there is no such number.
    """
    content = metric if isinstance(metric, dict) else {"default": metric}
    found = {str(key): float(value) for key, value in content.items() if is_number(value)}
    if "default" in found:
        found = {name: found.pop("default"), **found}
    return found if name in found else {}


def begin(folder: Path, number: int, parameters: dict[str, Any]) -> None:
    """Put a trial's parameters where NNI looks for them, and forget what an earlier attempt reported."""
    (folder / METRICS).unlink(missing_ok=True)
    write_json(folder / PARAMETERS, {"parameter_id": number, "parameter_source": "algorithm", "parameters": parameters})
