"""The contract of a format: files out of a student folder, and logits out of those files."""

from __future__ import annotations

import abc
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nas.errors import StudentError
from nas.files import write_json
from nas.registry import Registry

MIN_AGREEMENT = 0.9  # of classes: integer kernels round differently, a wrong conversion does not reach it


class Format(abc.ABC):
    """One format; the constructor raises ExtraError where its package is missing."""

    @abc.abstractmethod
    def write(self, student: Path) -> list[Path]:
        """Make the format's files beside ``model.onnx`` and ``model.pt2`` in a student folder; returns them.

        Raises:
            StudentError: this student cannot be expressed in the format.
        """

    @abc.abstractmethod
    def logits(self, student: Path, x: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Logits ``[n, classes]`` of raw inputs ``x [n, *input_shape]``, computed from those files by their runtime."""


formats: Registry[type[Format]] = Registry("format")


def add_format(
    name: str, student: Path, x: npt.NDArray[Any], wanted: npt.NDArray[np.float32]
) -> dict[str, Any]:
    """Write a format into a student folder, run it, and enter what was found in the folder's manifest.

    Args:
        x: raw inputs ``[n, *input_shape]`` on which the format is compared with ``model.onnx`` in onnxruntime.
        wanted: what that gives for them, logits ``[n, classes]``.

    Returns:
        ``files`` and their ``size_bytes``, ``agreement`` (share of equal classes), ``max_abs_diff`` of a logit, ``n``.

    Raises:
        ContentError: there is no such format.
        ExtraError: it needs a package that is not installed.
        StudentError: the student cannot be expressed in it, or answers otherwise there.
    """
    chosen = formats.get(name)()
    files = chosen.write(student)
    found = chosen.logits(student, x)
    facts: dict[str, Any] = {
        "files": [path.name for path in files],
        "size_bytes": sum(path.stat().st_size for path in files),
        "agreement": float((found.argmax(1) == wanted.argmax(1)).mean()),
        "max_abs_diff": float(np.abs(found - wanted).max()),
        "n": len(x),
    }
    if not facts["agreement"] >= MIN_AGREEMENT:
        raise StudentError(
            f"In {name} the student answers {100 * (1 - facts['agreement']):.1f} % of {len(x)} inputs otherwise than "
            "in onnxruntime.",
            expected=f"at most {100 * (1 - MIN_AGREEMENT):.0f} %", remedy="another format",
        )  # fmt: skip
    path = student / "manifest.json"
    manifest = json.loads(path.read_text())
    write_json(path, {**manifest, "formats": {**manifest.get("formats", {}), name: facts}})
    return facts
