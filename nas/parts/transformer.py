"""Operators of transformer parts: tokens × width in, tokens × width out, normalisation before, residual after.

Tokens are the rows of one matrix, whatever sample they are of, so that every linear layer is one Gemm with its bias.
On ``[batch, tokens, width]`` it is a product and an addition, which onnxruntime joins only where the batch is fixed.

In an int8 part only the matrix products with weights are integers: the stream between the parts, the normalisation,
the softmax and GELU stay float, which is how onnxruntime executes such a network.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nas.errors import SpaceError
from nas.parts.base import GraphWriter, Shape, Weightless


@dataclass(frozen=True)
class PatchEmbed:
    """Image (channels, height, width) → tokens × ``width``: a convolution of patches, and a learnt position added."""

    width: int
    patch: int

    @property
    def text(self) -> str:
        return f"patch{self.width}k{self.patch}"

    def out_shape(self, shape: Shape) -> Shape:
        return ((shape[1] // self.patch) * (shape[2] // self.patch), self.width)

    def _weights(self, shape: Shape) -> int:
        return self.width * shape[0] * self.patch**2

    def macs(self, shape: Shape) -> int:
        return self.out_shape(shape)[0] * self._weights(shape)

    def params(self, shape: Shape) -> int:
        return self._weights(shape) + self.width + int(np.prod(self.out_shape(shape)))

    def emit(self, graph: GraphWriter, x: str, shape: Shape) -> str:
        tokens, width = self.out_shape(shape)
        weight, bias = graph.weights((width, shape[0], self.patch, self.patch))
        sides = [self.patch] * 2
        maps = graph.node("Conv", [x, weight, bias], kernel_shape=sides, strides=sides)
        rows = graph.node("Transpose", [graph.reshaped(maps, (width, tokens))], perm=[0, 2, 1])
        position = graph.rng.normal(0, 0.02, (tokens, width)).astype(np.float32)
        return graph.reshaped(graph.node("Add", [rows, graph.constant(position)]), (width,))


@dataclass(frozen=True)
class LayerNorm(Weightless):
    """Normalisation over the last axis, with scale and offset (Ba et al. 2016)."""

    text: str = "ln"
    float_stream = True

    def params(self, shape: Shape) -> int:
        return 2 * shape[-1]

    def emit(self, graph: GraphWriter, x: str, shape: Shape) -> str:
        scale, offset = (graph.rng.normal(mean, 0.1, shape[-1:]).astype(np.float32) for mean in (1.0, 0.0))
        return graph.node("LayerNormalization", [x, graph.constant(scale), graph.constant(offset)], axis=-1)


@dataclass(frozen=True)
class Attention:
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2) with projections of its own for q, k, v.

    Its two products of activations count as multiply-accumulates, though they have no weights.
    """

    heads: int
    head_dim: int
    float_stream = True

    @property
    def text(self) -> str:
        return f"att{self.heads}x{self.head_dim}"

    def out_shape(self, shape: Shape) -> Shape:
        return shape

    def macs(self, shape: Shape) -> int:
        tokens, width = shape
        inner = self.heads * self.head_dim
        return 4 * tokens * width * inner + 2 * tokens * tokens * inner

    def params(self, shape: Shape) -> int:
        width, inner = shape[1], self.heads * self.head_dim
        return 3 * (width * inner + inner) + inner * width + width

    def emit(self, graph: GraphWriter, x: str, shape: Shape) -> str:
        tokens, width = shape
        inner = self.heads * self.head_dim

        def split(perm: list[int]) -> str:
            rows = graph.linear(x, width, inner)
            return graph.node("Transpose", [graph.reshaped(rows, (tokens, self.heads, self.head_dim))], perm=perm)

        q, k, v = split([0, 2, 1, 3]), split([0, 2, 3, 1]), split([0, 2, 1, 3])
        scale = graph.constant(np.array(self.head_dim**-0.5, np.float32))
        scores = graph.node("Softmax", [graph.node("Mul", [graph.node("MatMul", [q, k]), scale])], axis=-1)
        mixed = graph.node("Transpose", [graph.node("MatMul", [scores, v])], perm=[0, 2, 1, 3])
        return graph.linear(graph.reshaped(mixed, (inner,)), inner, width)


@dataclass(frozen=True)
class Mlp:
    """Two linear layers with an activation between: width → ``hidden`` → width."""

    hidden: int
    activation: str = "gelu"
    float_stream = True

    def __post_init__(self) -> None:
        if self.activation not in ("gelu", "relu"):
            raise SpaceError(f"Activation {self.activation!r} of an Mlp.", expected="gelu or relu")

    @property
    def text(self) -> str:
        return f"mlp{self.hidden}.{self.activation}"

    def out_shape(self, shape: Shape) -> Shape:
        return shape

    def macs(self, shape: Shape) -> int:
        return 2 * shape[0] * shape[1] * self.hidden

    def params(self, shape: Shape) -> int:
        return 2 * shape[1] * self.hidden + self.hidden + shape[1]

    def emit(self, graph: GraphWriter, x: str, shape: Shape) -> str:
        y = graph.linear(x, shape[1], self.hidden)
        y = graph.node("Relu", [y]) if self.activation == "relu" else _gelu(graph, y)
        return graph.linear(y, self.hidden, shape[1])


def _gelu(graph: GraphWriter, x: str) -> str:
    """``x · (1 + erf(x / √2)) / 2``, written as PyTorch exports it: the pattern that runtimes look for."""
    root, one, half = (graph.constant(np.array(value, np.float32)) for value in (2**0.5, 1.0, 0.5))
    erf = graph.node("Erf", [graph.node("Div", [x, root])])
    return graph.node("Mul", [graph.node("Mul", [x, graph.node("Add", [erf, one])]), half])


@dataclass(frozen=True)
class TokenMean(Weightless):
    """Mean over the tokens: tokens × width → width."""

    text: str = "mean"

    def out_shape(self, shape: Shape) -> Shape:
        return shape[1:]

    def emit(self, graph: GraphWriter, x: str, shape: Shape) -> str:
        tokens = graph.reshaped(x, shape)
        return graph.node("ReduceMean", [tokens, graph.constant(np.array([1], np.int64))], keepdims=0)


@dataclass(frozen=True)
class Linear:
    """Linear layer on the last axis: width → ``out_features``."""

    out_features: int
    float_stream = True

    @property
    def text(self) -> str:
        return f"linear{self.out_features}"

    def out_shape(self, shape: Shape) -> Shape:
        return (*shape[:-1], self.out_features)

    def macs(self, shape: Shape) -> int:
        return int(np.prod(shape)) * self.out_features

    def params(self, shape: Shape) -> int:
        return (shape[-1] + 1) * self.out_features

    def emit(self, graph: GraphWriter, x: str, shape: Shape) -> str:
        return graph.linear(x, shape[-1], self.out_features)
