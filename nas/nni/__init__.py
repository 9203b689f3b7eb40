"""What NNI's users bring: model spaces to search, masks to make small, quantised models to export.

The one room that imports ``nni``, an extra (``pip install 'latency-nas[nni]'``), and only when something of it is used.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from nas.errors import ExtraError

if TYPE_CHECKING:
    from nas.nni.masks import load_masks, masked
    from nas.nni.pruners import Layer, Speedup, shrink, sparse_plan, speedup, to_onnx
    from nas.nni.quantizers import QuantizedModel, calibration_json, load_state, quantized_onnx
    from nas.nni.spaces import NniSpace

#: Name → the module of this room that has it.
_HOMES = {
    "NniSpace": "spaces",
    "load_masks": "masks", "masked": "masks",
    "Layer": "pruners", "Speedup": "pruners", "shrink": "pruners", "sparse_plan": "pruners", "speedup": "pruners",
    "to_onnx": "pruners",
    "QuantizedModel": "quantizers", "calibration_json": "quantizers", "load_state": "quantizers",
    "quantized_onnx": "quantizers",
}  # fmt: skip
__all__ = [
    "Layer", "NniSpace", "QuantizedModel", "Speedup", "calibration_json", "load_masks", "load_state", "masked",
    "quantized_onnx", "require", "shrink", "sparse_plan", "speedup", "to_onnx",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "NniSpace":
        require("A model space of NNI")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def require(what: str) -> None:
    """See that NNI is installed.

    Args:
        what: needs it, for the message.

    Raises:
        ExtraError: it is not.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of versions that NNI does not know, which nobody can do anything about
            import nni.nas.nn.pytorch  # noqa: F401
    except ImportError as error:
        raise ExtraError(
            f"{what} needs the package nni and what it imports: {error}.", remedy="pip install 'latency-nas[nni]'"
        ) from error
