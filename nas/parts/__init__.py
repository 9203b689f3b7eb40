"""Parts: pure descriptions of what the runtime executes, each with its key, its costs and an ONNX to profile."""

from nas.parts.base import OPSET, PRECISIONS, GraphWriter, Op, Part, Shape, Weightless
from nas.parts.transformer import Attention, LayerNorm, Linear, Mlp, PatchEmbed, TokenMean
from nas.parts.vision import (
    AddInput,
    AddProjected,
    Boundary,
    Conv,
    GlobalAveragePool,
    MaxPool,
    Normalize,
    Resize,
    resize_scales,
)

__all__ = [
    "OPSET",
    "PRECISIONS",
    "AddInput",
    "AddProjected",
    "Attention",
    "Boundary",
    "Conv",
    "GlobalAveragePool",
    "GraphWriter",
    "LayerNorm",
    "Linear",
    "MaxPool",
    "Mlp",
    "Normalize",
    "Op",
    "Part",
    "PatchEmbed",
    "Resize",
    "Shape",
    "TokenMean",
    "Weightless",
    "resize_scales",
]
