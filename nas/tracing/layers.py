"""What layers do with axes."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from nas.tracing.axes import Axes, output_axis, shaped, used
from nas.tracing.dims import Dim, constant, resolve, tie
from nas.tracing.trace import shape_of

ELEMENTWISE: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.ELU,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Identity, nn.Softmax,
)  # fmt: skip
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def is_depthwise(layer: nn.Module) -> bool:
    """Whether a layer is a convolution of which every channel has outputs of its own."""
    return isinstance(layer, nn.Conv1d | nn.Conv2d) and layer.groups == layer.in_channels > 1


def layer_axes(found: Axes, node: fx.Node, path: str, layer: nn.Module, x: list[Dim]) -> list[Dim]:
    """Axes of a layer's output, by those of its input ``x``; what it has of parameters is noted."""
    if isinstance(layer, ELEMENTWISE):
        return x
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        return _conv(found, node, path, layer, x)
    if isinstance(layer, nn.Linear):
        return [*x[:-1], _weighted(found, path, layer, x[-1], layer.out_features)]
    if isinstance(layer, nn.Embedding):
        dim = output_axis(found, path, layer.embedding_dim)
        used(found, f"{path}.weight", 0, constant(layer.num_embeddings))
        used(found, f"{path}.weight", 1, dim)
        found.layers[path] = (constant(layer.num_embeddings), dim)
        return [*x, dim]
    if isinstance(layer, NORMS):
        for name in ("weight", "bias", "running_mean", "running_var"):
            if getattr(layer, name) is not None:
                used(found, f"{path}.{name}", 0, x[1])
        return x
    if isinstance(layer, nn.LayerNorm):
        if len(layer.normalized_shape) > 1:
            tie(x[-len(layer.normalized_shape) :], f"{path} normalises over several axes")
        else:
            for name in ("weight", "bias"):
                if getattr(layer, name) is not None:
                    used(found, f"{path}.{name}", 0, x[-1])
            found.layers[path] = (x[-1], x[-1])
        return x
    if isinstance(layer, nn.GroupNorm):
        tie([x[1]], f"{path} normalises by groups of channels")
        return x
    if isinstance(layer, nn.AdaptiveAvgPool2d | nn.AvgPool2d | nn.MaxPool2d):
        return [*x[:-2], *(constant(size) for size in shape_of(node)[-2:])]
    if isinstance(layer, nn.Flatten):
        return shaped(found, node, x)
    raise AssertionError(f"{type(layer).__name__} is traced as a layer and not followed as one")


def _weighted(found: Axes, path: str, layer: Any, x: Dim, size: int) -> Dim:
    out = output_axis(found, path, size)
    used(found, f"{path}.weight", 1, x)
    used(found, f"{path}.weight", 0, out)
    if layer.bias is not None:
        used(found, f"{path}.bias", 0, out)
    found.layers[path] = (x, out)
    return out


def _conv(found: Axes, node: fx.Node, path: str, layer: nn.Conv1d | nn.Conv2d, x: list[Dim]) -> list[Dim]:
    sides = [constant(size) for size in shape_of(node)[2:]]
    if layer.groups == 1:
        return [x[0], _weighted(found, path, layer, x[1], layer.out_channels), *sides]
    if is_depthwise(layer):
        each = layer.out_channels // layer.in_channels
        inner = resolve(x[1])
        out = inner
        if each > 1:
            out = Dim(tuple((*term, each) for term in inner.terms))
    else:
        tie([x[1]], f"{path} is a grouped convolution")
        out = constant(layer.out_channels)
    used(found, f"{path}.weight", 0, out)
    if layer.bias is not None:
        used(found, f"{path}.bias", 0, out)
    found.layers[path] = (x[1], out)
    return [x[0], out, *sides]
