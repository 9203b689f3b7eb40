"""What NNI's users bring: model spaces to search, masks to make small, quantised models to export.

The one room that imports ``nni``, an extra (``pip install 'latency-nas[nni]'``), and only when something of it is used.
"""

from __future__ import annotations

from nas.errors import ExtraError

__all__ = ["require"]


def require(what: str) -> None:
    """See that NNI is installed.

    Args:
        what: needs it, for the message.

    Raises:
        ExtraError: it is not.
    """
    try:
        import nni.mutable  # noqa: F401
    except ImportError as error:
        raise ExtraError(f"{what} needs the package nni.", remedy="pip install 'latency-nas[nni]'") from error
