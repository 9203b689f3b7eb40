"""A Python that has numpy and onnxruntime and nothing else, without a package index."""

from __future__ import annotations

import sys
from importlib.metadata import files
from importlib.util import find_spec
from pathlib import Path


def bare_python(folder: Path) -> Path:
    """A command that starts this Python with links to the two packages on its path, and no site-packages."""
    packages = folder / "packages"
    packages.mkdir()
    for name in ("numpy", "onnxruntime"):
        spec = find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        site = Path(spec.origin).parent.parent
        for top in {path.parts[0] for path in files(name) or () if not path.parts[0].startswith(("..", "__"))}:
            (packages / top).symlink_to(site / top)
    command = folder / "python"
    command.write_text(f'#!/bin/sh\nPYTHONPATH="{packages}" exec "{sys.executable}" -S -s "$@"\n')
    command.chmod(0o755)
    return command
