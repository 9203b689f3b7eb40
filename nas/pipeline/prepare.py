"""What is done to a user's own model before its first step: it becomes a graph of its own layers, where it can."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from nas.errors import CompressionError
from nas.tracing import trace

FEW = 8  # samples that show whether the graph computes what the model does


def prepare(model: nn.Module, sample: torch.Tensor, note: Callable[[str], None] = lambda text: None) -> nn.Module:
    """The model as the passes get it; it computes the same.

    As a graph, all that the forward does is in sight, whatever it is written like: heads of attention and residual
    branches can be pruned, and functional layers be folded and quantised. Layers and weights keep their names; of
    ``nn.MultiheadAttention``, ``in_proj_weight`` becomes that of a linear layer ``in_proj``. Dropout that the forward
    calls as a function is gone, since the model is traced as it predicts; dropout layers stay.

    Args:
        model: the user's own, in evaluation mode.
        sample: raw inputs ``[n, *input_shape]``.
        note: is told why a model is left as it is.
    """
    few = sample[:FEW]
    try:
        graph = trace(model, few)
        with torch.no_grad():
            same = torch.allclose(graph(few), model(few), rtol=1e-3, atol=1e-4)
    except CompressionError as error:
        note(f"The model is compressed module by module, without its heads and branches: {error.found}")
        return model
    if not same:
        note("The model is compressed module by module, without its heads and branches: its graph computes otherwise.")
        return model
    return graph
