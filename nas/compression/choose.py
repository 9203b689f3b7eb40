"""Which layers a pass works on: by patterns for a whole model, by name for one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from nas.compression.base import layers_of, matching
from nas.errors import CompressionError


def chosen(
    model: nn.Module,
    layers: Sequence[str],
    skip: Sequence[str],
    technique: str,
    kinds: tuple[type[nn.Module], ...] = (nn.Conv2d, nn.Linear),
) -> list[str]:
    """Names of the layers of ``kinds`` that a pattern of ``layers`` fits and none of ``skip``.

    Raises:
        CompressionError: a pattern fits no layer, or nothing is left.
    """
    every = [name for name, layer in model.named_modules() if name and isinstance(layer, kinds)]
    what = " or ".join(kind.__name__ for kind in kinds)
    wanted, left = matching(every, layers, technique, what), matching(every, skip, technique, what)
    found = [name for name in every if name in wanted - left]
    if not found:
        raise CompressionError(f"{technique}: skip leaves none of the layers {every[:5]}.")
    return found


def plain_layers_of(model: nn.Module, name: str, technique: str) -> dict[str, nn.Module]:
    """As :func:`~nas.compression.base.layers_of`, of layers whose weights no other pass holds on to.

    Raises:
        CompressionError: there is no such layer, or another pass trains its weights in a form of its own.
    """
    found = layers_of(model, name, technique)
    for piece, layer in found.items():
        if not isinstance(layer._parameters.get("weight"), nn.Parameter) or type(layer) not in (nn.Conv2d, nn.Linear):
            raise CompressionError(
                f"{technique}: {piece!r} is a {type(layer).__name__}, whose weights another pass trains.",
                expected="a layer that is in one of quantize and cluster only",
            )
    return found
