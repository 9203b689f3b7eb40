"""How much each channel, unit or head matters, from the weights alone."""

from __future__ import annotations

import torch
from torch import nn

from nas.tracing.dims import Var
from nas.tracing.structure import Structure


def importance(structure: Structure, variable: Var) -> torch.Tensor:
    """Importance of every place of a variable, ``[size]``.

    The sum over all layers that the group runs through of the mean magnitude of the weights at that place, each layer's
    divided by its own mean (Li et al. 2017, "Pruning Filters for Efficient ConvNets", summed over a group as in Fang et
    al. 2023, "DepGraph", section 3.3). Weights before a batch normalisation are taken as it scales them.
    """
    total = torch.zeros(variable.size)
    for use in structure.axes.uses:
        path, _, leaf = use.tensor.rpartition(".")
        if variable not in use.dim.variables or leaf != "weight":
            continue
        layer = structure.modules.get(path)
        if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Linear | nn.Embedding):
            continue
        weight = _scaled(structure, path, layer.weight)
        per_place = weight.abs().movedim(use.axis, 0).flatten(1).mean(dim=1)
        places = use.dim.place(variable)
        own = torch.zeros(variable.size)
        inside = places >= 0
        own.index_add_(0, places[inside], per_place[inside])
        total += own / own.mean().clamp(min=1e-12)
    return total


def _scaled(structure: Structure, path: str, weight: torch.Tensor) -> torch.Tensor:
    weight = weight.detach()
    for node in structure.nodes:
        if node.op == "call_module" and node.target == path and len(node.users) == 1:
            norm = structure.layer(next(iter(node.users)))
            if isinstance(norm, nn.BatchNorm2d) and norm.running_var is not None and norm.weight is not None:
                scale = norm.weight.detach() / torch.sqrt(norm.running_var + norm.eps)
                return weight * scale.view(-1, *[1] * (weight.ndim - 1))
    return weight
