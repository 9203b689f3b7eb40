"""What of a traced model may be chosen and priced: groups of channels, blocks that can be left out, clusters.

A *group* is a variable that may shrink. A *block* is a branch that is added to its own input: without it the input
goes on. A *cluster* is what is priced as one part: a layer and the elementwise operators that follow it alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx, nn

from nas.derived.dims import Axes, Var, axes
from nas.derived.trace import is_constant, shape_of, trace

WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Linear, nn.Embedding)
FOLDED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Identity)
RELUS = (nn.ReLU, nn.ReLU6)
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


@dataclass(frozen=True)
class Group:
    """Channels, units, heads or dimensions that shrink together.

    Attributes:
        name: of the first layer that has them, with ``.heads`` or ``.head_dim`` in attention.
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
        self.blocks = self._blocks()
        self.clusters = self._clusters()

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

    def _blocks(self) -> list[Block]:
        found: list[Block] = []
        for node in self.nodes:
            if getattr(node.target, "_opname", "") != "add" or len(node.all_input_nodes) != 2:
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

    # ---- clusters ----------------------------------------------------------------------------------

    def _clusters(self) -> list[Cluster]:
        joined: dict[fx.Node, list[fx.Node]] = {}
        groups: list[list[fx.Node]] = []
        for node in self.nodes:
            if is_constant(node) or _of_sizes(node) or not _has_tensor(node):
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
        name = getattr(node.target, "_opname", "")
        if name == "add":
            return len(node.all_input_nodes) == 2
        return name in ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d")

    def _weights(self, nodes: Sequence[fx.Node]) -> str:
        return next((str(n.target) for n in nodes if isinstance(self.layer(n), WEIGHTED)), "")

    def _name(self, nodes: Sequence[fx.Node]) -> str:
        return self._weights(nodes) or nodes[0].name


def _of_sizes(node: fx.Node) -> bool:
    """Whether a node reads nothing of the data but the size of the batch: a number, a constant that is repeated."""
    return node.op == "call_method" or not any(
        _has_tensor(n) and not is_constant(n) for n in node.all_input_nodes
    )  # fmt: skip


def _has_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor | tuple | list)


def _home(branch: frozenset[fx.Node]) -> str:
    """Path of the innermost module that all of a branch belongs to."""
    paths = []
    for node in branch:
        stack = node.meta.get("nn_module_stack")
        if stack:
            paths.append(list(stack.values())[-1][0].split("@")[0].split("."))
    if not paths:
        return ""
    common = paths[0]
    for path in paths[1:]:
        common = [a for i, a in enumerate(common[: len(path)]) if common[: i + 1] == path[: i + 1]]
    return ".".join(common)


def _groups(found: Axes, modules: dict[str, nn.Module]) -> list[Group]:
    """Variables that may shrink: those that some layer makes, in the order of the forward."""
    makers: dict[Var, str] = {}
    touched: dict[Var, dict[str, None]] = {}
    for path, (x, out) in found.layers.items():
        for variable in out.variables:
            if isinstance(modules[path], WEIGHTED):
                makers.setdefault(variable, path)
        for variable in (*x.variables, *out.variables):
            touched.setdefault(variable, {})[path] = None
    return [
        Group(f"{path}.{v.role}" if v.role else path, v, tuple(touched[v]))
        for v, path in makers.items() if not v.tied and v.size > 1
    ]  # fmt: skip
