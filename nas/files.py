"""Writing files so that a kill at any moment leaves the old one or the new one, never half of one.

This file travels to devices in a bundle (:mod:`nas.latency.bundle`): it needs the standard library only.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write next to ``path``, then rename over it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(temporary).chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Indented JSON, atomically; NaN is refused because other readers refuse it."""
    write_atomic(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def digest(content: Any) -> str:
    """sha256 of a JSON-able value in canonical form."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def write_sealed(path: Path, content: Any) -> None:
    """A JSON object that carries its own sha256, atomically."""
    # Through JSON once: keys that are numbers become text, and sort as text.
    body = json.loads(json.dumps({key: value for key, value in content.items() if key != "sha256"}, allow_nan=False))
    write_atomic(path, json.dumps({**body, "sha256": digest(body)}, allow_nan=False) + "\n")


def read_sealed(path: Path) -> Any:
    """What :func:`write_sealed` wrote.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is cut, is no JSON object, or does not match its own sha256.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or "sha256" not in content:
        raise ValueError("it is no JSON object with a sha256")
    if content["sha256"] != digest({key: value for key, value in content.items() if key != "sha256"}):
        raise ValueError("it does not match its own sha256")
    return content
