"""What of a traced model may be chosen: groups of channels, units and heads, and blocks that can be left out.

A *group* is a variable that may shrink. A *block* is a branch that is added to its own input: without it the input
goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx, nn

from nas.tracing.axes import Axes
from nas.tracing.dims import Var
from nas.tracing.follow import axes
from nas.tracing.trace import FUNCTIONAL, is_constant, opname, shape_of, trace

WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Linear, nn.Embedding)
RELUS = (nn.ReLU, nn.ReLU6)


@dataclass(frozen=True)
class Group:
    """Channels, units, heads or dimensions that shrink together.

    Attributes:
        name: of the first layer that has them, with ``.heads`` or ``.head_dim`` in attention; ``/2`` follows where
            the outputs of one layer are several such groups.
        variable: in the axes of the model.
        layers: paths of all layers that have them as inputs or outputs.
    """

    name: str
    variable: Var
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """A residual branch.

    Attributes:
        name: of the module that holds it, or of its last layer.
        output: the node that is read from outside: the addition, or the ReLU after it.
        shortcut: the node that is read instead where the block is left out.
        branch: nodes that are not needed then.
    """

    name: str
    output: fx.Node
    shortcut: fx.Node
    branch: frozenset[fx.Node]


class Structure:
    """A traced model, its axes, and what may be chosen.

    Args:
        model: the user's.
        example: samples, ``[n, *input_shape]``.

    Raises:
        CompressionError: the forward cannot be followed.
    """

    def __init__(self, model: nn.Module, example: torch.Tensor) -> None:
        self.model = trace(model, example)
        self.axes: Axes = axes(self.model)
        self.modules = dict(self.model.named_modules())
        self.nodes: list[fx.Node] = [n for n in self.model.graph.nodes if n.op not in ("placeholder", "output")]
        self.input = next(n for n in self.model.graph.nodes if n.op == "placeholder")
        self.output = next(iter(next(n for n in self.model.graph.nodes if n.op == "output").all_input_nodes))
        self.rank = {node: i for i, node in enumerate(self.model.graph.nodes)}
        self.groups = _groups(self.axes, self.modules)

    def layer(self, node: fx.Node) -> nn.Module | None:
        """The layer that a node calls, or nothing."""
        return self.modules[str(node.target)] if node.op == "call_module" else None

    @cached_property
    def layers(self) -> list[str]:
        """Paths of convolutions and linear layers in the order of the forward."""
        return [path for path in self.calls if isinstance(self.modules[path], nn.Conv2d | nn.Linear)]

    @cached_property
    def calls(self) -> dict[str, list[fx.Node]]:
        """Path of a layer → the nodes that call it, in the order of the forward; constants are not among them."""
        found: dict[str, list[fx.Node]] = {}
        for node in self.nodes:
            if node.op == "call_module" and not is_constant(node):
                found.setdefault(str(node.target), []).append(node)
        return found

    # ---- blocks ----------------------------------------------------------------------------------

    @cached_property
    def blocks(self) -> list[Block]:
        """Residual branches, in the order of the forward."""
        found: list[Block] = []
        for node in self.nodes:
            if opname(node) != "add" or len(node.all_input_nodes) != 2:
                continue
            a, b = node.all_input_nodes
            for shortcut, end in ((a, b), (b, a)):
                branch = self._branch(shortcut, end, node)
                if branch is not None and any(isinstance(self.layer(n), WEIGHTED) for n in branch):
                    found.append(self._block(node, shortcut, branch))
                    break
        names = [block.name for block in found]
        return [
            block if names.count(block.name) == 1 else
            Block(self._last_layer(block.branch), block.output, block.shortcut, block.branch)
            for block in found
        ]  # fmt: skip

    def _branch(self, shortcut: fx.Node, end: fx.Node, join: fx.Node) -> frozenset[fx.Node] | None:
        """Nodes between ``shortcut`` and ``end`` that nothing but ``join`` needs; nothing where there is more to it."""
        if end is shortcut or is_constant(shortcut) or shape_of(shortcut) != shape_of(join):
            return None
        found: set[fx.Node] = set()
        queue = [end]
        while queue:
            node = queue.pop()
            if node in found or node is shortcut:
                continue
            if is_constant(node):
                continue
            if node.op == "placeholder" or self.rank[node] < self.rank[shortcut]:
                return None
            found.add(node)
            queue += node.all_input_nodes
        if any(user not in found and user is not join for node in found for user in node.users):
            return None
        return frozenset(found)

    def _block(self, join: fx.Node, shortcut: fx.Node, branch: frozenset[fx.Node]) -> Block:
        output, gone = join, {*branch, join}
        users = list(join.users)
        # A ReLU of what a ReLU gave is nothing.
        same = len(users) == 1 and type(self.layer(users[0])) is type(self.layer(shortcut))
        if same and isinstance(self.layer(shortcut), RELUS):
            output = users[0]
            gone.add(output)
        return Block(_home(branch) or self._last_layer(branch), output, shortcut, frozenset(gone))

    def _last_layer(self, branch: frozenset[fx.Node]) -> str:
        own = [n for n in branch if isinstance(self.layer(n), WEIGHTED)]
        return str(max(own, key=self.rank.__getitem__).target)


def _home(branch: frozenset[fx.Node]) -> str:
    """Path of the innermost module that all layers of a branch belong to.

    The layers' own names decide, and nothing that only the first tracing of a model knows.
    """
    layers = [n for n in branch if n.op == "call_module" and not str(n.target).startswith(f"{FUNCTIONAL}.")]
    paths = [str(node.target).split(".") for node in layers]
    common = paths[0]
    for path in paths[1:]:
        common = [a for i, a in enumerate(common[: len(path)]) if common[: i + 1] == path[: i + 1]]
    return ".".join(common)


def _groups(axes_: Axes, modules: dict[str, nn.Module]) -> list[Group]:
    """Variables that may shrink: those that some layer makes, in the order of the forward."""
    makers: dict[Var, str] = {}
    touched: dict[Var, dict[str, None]] = {}
    for path, (x, out) in axes_.layers.items():
        for variable in out.variables:
            if isinstance(modules[path], WEIGHTED):
                makers.setdefault(variable, path)
        for variable in (*x.variables, *out.variables):
            touched.setdefault(variable, {})[path] = None
    found: list[Group] = []
    for variable, path in makers.items():
        if not variable.tied and variable.size > 1:
            name = f"{path}.{variable.role}" if variable.role else path
            twins = sum(group.name.partition("/")[0] == name for group in found)
            found.append(Group(f"{name}/{twins + 1}" if twins else name, variable, tuple(touched[variable])))
    return found
