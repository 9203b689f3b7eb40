"""Alternatives within a traced forward: values of which a candidate takes one.

A model that computes all of them and hands them to :func:`choose` is traced like any other; which one is taken is
decided later, by whoever reads the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

CHOOSE = "choose"
#: Layers that are done once for each alternative instead of once for the one that is taken, so that they belong to
#: what is computed before them: normalisations are folded into it, activations are computed with it.
FOLLOWERS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.ReLU, nn.ReLU6, nn.Hardswish,
    nn.Hardsigmoid, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.ELU,
)  # fmt: skip


@torch.library.custom_op("nas::choose", mutates_args=())
def _choose(options: Sequence[torch.Tensor], which: int) -> torch.Tensor:
    return options[0].clone()


@_choose.register_fake
def _(options: Sequence[torch.Tensor], which: int) -> torch.Tensor:
    return torch.empty_like(options[0])


def choose(options: Sequence[torch.Tensor], which: int) -> torch.Tensor:
    """One of several tensors of one shape; the first, wherever this is really executed.

    Args:
        which: number of the decision, for whoever reads the graph.
    """
    taken: torch.Tensor = torch.ops.nas.choose(list(options), which)
    return taken


def is_choice(node: fx.Node) -> bool:
    """Whether a node takes one of several values."""
    return getattr(node.target, "_opname", "") == CHOOSE


def options_of(node: fx.Node) -> list[fx.Node]:
    """What a choice takes one of; a value may be there several times."""
    return list(node.args[0])  # type: ignore[arg-type]


def decision_of(node: fx.Node) -> int:
    """The ``which`` of :func:`choose`."""
    which: Any = node.args[1]
    return int(which)


def sink(module: fx.GraphModule) -> None:
    """Move choices behind the normalisations and activations that follow them, in place; the result is the same."""
    layers: dict[str, Any] = dict(module.named_modules())
    for node in list(module.graph.nodes):
        while is_choice(node) and (user := _follower(node, layers)) is not None:
            _swap(module.graph, node, user, layers)


def _swap(graph: fx.Graph, node: fx.Node, user: fx.Node, layers: dict[str, Any]) -> None:
    copies: dict[fx.Node, fx.Node] = {}
    for option in dict.fromkeys(options_of(node)):
        with graph.inserting_before(node):
            copies[option] = graph.call_module(str(user.target), (option,))
        copies[option].meta = dict(user.meta)
    node.args = ([copies[option] for option in options_of(node)], node.args[1])
    node.meta = dict(user.meta)
    user.replace_all_uses_with(node)
    graph.erase_node(user)
    for option, copy in copies.items():  # an alternative may be a choice itself
        if is_choice(option) and _follower(option, layers) is copy:
            _swap(graph, option, copy, layers)


def _follower(node: fx.Node, layers: dict[str, Any]) -> fx.Node | None:
    users = list(node.users)
    alone = len(users) == 1 and users[0].op == "call_module"
    return users[0] if alone and isinstance(layers[str(users[0].target)], FOLLOWERS) else None
