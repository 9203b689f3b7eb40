"""Clusters: what is priced as one part of a traced model, a layer and the elementwise operators that follow it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx, nn

from nas.tracing.alternatives import is_choice
from nas.tracing.structure import RELUS, WEIGHTED, Structure
from nas.tracing.trace import is_constant, opname

FOLDED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Identity)
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


@dataclass(frozen=True)
class Cluster:
    """Nodes that are priced together, in order; ``layer`` is the path of the one with weights, or ""."""

    name: str
    nodes: tuple[fx.Node, ...]
    layer: str

    @cached_property
    def inputs(self) -> tuple[fx.Node, ...]:
        """Nodes of other clusters that are read, in the order of reading; constants are not among them."""
        own = set(self.nodes)
        found: dict[fx.Node, None] = {}
        for node in self.nodes:
            for n in node.all_input_nodes:
                if n not in own and not is_constant(n) and isinstance(n.meta.get("val"), torch.Tensor):
                    found[n] = None
        return tuple(found)

    @cached_property
    def outputs(self) -> tuple[fx.Node, ...]:
        """Nodes that others read."""
        own = set(self.nodes)
        return tuple(n for n in self.nodes if any(user not in own for user in n.users))


class Clustered(Structure):
    """A traced model whose nodes are all in clusters; arguments as of :class:`~nas.tracing.structure.Structure`."""

    def __init__(self, model: nn.Module, example: torch.Tensor) -> None:
        super().__init__(model, example)
        self.clusters = self._clusters()

    def _clusters(self) -> list[Cluster]:
        joined: dict[fx.Node, list[fx.Node]] = {}
        groups: list[list[fx.Node]] = []
        for node in self.nodes:
            if is_constant(node) or is_choice(node) or _of_sizes(node) or not _has_tensor(node):
                continue
            feeds = [n for n in node.all_input_nodes if n in joined]
            home = joined[feeds[0]] if len(feeds) == 1 and self._joins(node, feeds[0], joined[feeds[0]]) else None
            if home is None:
                home = []
                groups.append(home)
            home.append(node)
            joined[node] = home
        return [Cluster(self._name(nodes), tuple(nodes), self._weights(nodes)) for nodes in groups]

    def _joins(self, node: fx.Node, before: fx.Node, home: list[fx.Node]) -> bool:
        layer, first = self.layer(node), self.layer(home[0])
        if isinstance(layer, WEIGHTED) or any(n.op == "placeholder" for n in node.all_input_nodes):
            return False
        if len(before.users) > 1 and not isinstance(before.meta.get("val"), tuple | list):
            return False  # others read it as it was
        if isinstance(layer, FOLDED):
            return True
        if self.passes_on(home[0]) or isinstance(first, nn.Conv2d | nn.Conv1d):
            return isinstance(layer, RELUS)  # what int8 goes on with; anything else is float
        return True

    def passes_on(self, node: fx.Node) -> bool:
        """Whether the runtime computes a node in integers where its input is: additions and poolings."""
        if isinstance(self.layer(node), POOLS):
            return True
        name = opname(node)
        if name == "add":
            return len(node.all_input_nodes) == 2
        return name in ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d")

    def _weights(self, nodes: Sequence[fx.Node]) -> str:
        return next((str(n.target) for n in nodes if isinstance(self.layer(n), WEIGHTED)), "")

    def _name(self, nodes: Sequence[fx.Node]) -> str:
        return self._weights(nodes) or nodes[0].name


def _of_sizes(node: fx.Node) -> bool:
    """Whether a node reads nothing of the data but the size of the batch: a number, a constant that is repeated."""
    return node.op == "call_method" or not any(_has_tensor(n) and not is_constant(n) for n in node.all_input_nodes)


def _has_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor | tuple | list)
