"""Hardware-aware search for compressed students: point at a family, data and a device; get a measured student.

>>> import nas
>>> student = nas.search("digits", out="runs/digits")   # doctest: +SKIP
>>> student.quality, student.latency_ms, student.folder  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["NasError", "Student", "__version__", "compress", "derive", "load_student", "search"]

if TYPE_CHECKING:
    from nas.api import Student, compress, derive, load_student, search
    from nas.errors import NasError


def __getattr__(name: str) -> Any:
    # Lazily, so that `import nas` is instant and every floor may read the version.
    if name in ("Student", "compress", "derive", "load_student", "search"):
        from nas import api

        return getattr(api, name)
    if name == "NasError":
        from nas.errors import NasError

        return NasError
    raise AttributeError(f"module 'nas' has no attribute {name!r}")
