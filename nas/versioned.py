"""JSON results of ours, read by the version that they say they are of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nas.errors import StudyError


def read_versioned(path: Path, version: int, what: str, command: str) -> dict[str, Any]:
    """The content of a JSON result of ours that says its ``schema_version``.

    Args:
        what: of which it is the result, for messages.
        command: that writes it.

    Raises:
        StudyError: there is none, or it is of another version.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StudyError(f"No readable {what} at {path}: {error}.", remedy=f"run `{command}` first") from error
    if not isinstance(result, dict) or result.get("schema_version") != version:
        raise StudyError(f"{path} is no {what} of schema version {version}.", remedy=f"run `{command}` again")
    return result
