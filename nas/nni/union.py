"""An NNI model space as one module that computes every alternative, from which any of its models can be read off.

Sizes that are chosen have their largest value: every other size is a share of it. What cannot be had by shrinking, a
layer among several, a kernel, a depth, an input, is an alternative (:mod:`nas.tracing.alternatives`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from nni.mutable import Mutable, ensure_frozen
from nni.nas.nn.pytorch import Cell, InputChoice, LayerChoice, MutableModule, ParametrizedModule, Repeat
from nni.nas.nn.pytorch.cell import create_cell_op_candidates, preprocess_cell_inputs
from nni.nas.nn.pytorch.choice import ChosenInputs
from nni.nas.space import model_context
from torch import Tensor, nn

from nas.errors import SpaceError
from nas.nni.labels import Labels, Table
from nas.tracing.alternatives import choose

#: Arguments of a layer that are sizes: smaller ones are slices of larger ones.
SIZES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv1d: ("in_channels", "out_channels"), nn.Conv2d: ("in_channels", "out_channels"),
    nn.Linear: ("in_features", "out_features"), nn.BatchNorm1d: ("num_features",), nn.BatchNorm2d: ("num_features",),
    nn.LayerNorm: ("normalized_shape",), nn.Embedding: ("embedding_dim",),
}  # fmt: skip
MADE = {nn.Conv1d: "out_channels", nn.Conv2d: "out_channels", nn.Linear: "out_features", nn.Embedding: "embedding_dim"}
VARIANTS = 64  # of a module with labels of its own


@dataclass(frozen=True)
class Decision:
    """What a candidate takes one of.

    Attributes:
        number: in :attr:`Union.decisions`.
        labels: that decide it, for messages.
    """

    number: int
    labels: str

    def of(self, values: list[Any]) -> Any:
        """A choice among tensors, or among lists of them, place by place.

        Raises:
            SpaceError: they are no tensors, or of different shapes.
        """
        if len(values) == 1:
            return values[0]
        if isinstance(values[0], list | tuple):
            return type(values[0])(self.of(list(own)) for own in zip(*values, strict=True))
        if not all(isinstance(value, Tensor) for value in values):
            raise SpaceError(
                f"What {self.labels} chooses gives a {type(values[0]).__name__}.",
                expected="a tensor, or a list of tensors",
            )
        shapes = list(dict.fromkeys(tuple(value.shape[1:]) for value in values))
        if len(shapes) > 1:
            raise SpaceError(
                f"What {self.labels} chooses has other shapes for other values: "
                f"{', '.join(str(list(shape)) for shape in shapes)}.",
                expected="alternatives that can take each other's place; widths are chosen as sizes of Mutable layers",
            )
        return choose(values, self.number)


class Alternatives(nn.Module):
    """Modules of which a candidate has one; all see the same arguments."""

    def __init__(self, options: dict[str, nn.Module], which: Decision) -> None:
        super().__init__()
        for name, option in options.items():
            self.add_module(name, option)
        self.names, self.which = list(options), which

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.which.of([getattr(self, name)(*args, **kwargs) for name in self.names])


class Inputs(nn.Module):
    """Sets of inputs of which a candidate reduces one."""

    def __init__(self, subsets: Sequence[Sequence[int]], reduction: str, which: Decision) -> None:
        super().__init__()
        self.subsets, self.reduction, self.which = subsets, reduction, which

    def forward(self, candidates: Sequence[Tensor]) -> Any:
        reduced = [
            ChosenInputs._tensor_reduction(cast(Any, self.reduction), [candidates[i] for i in subset])
            for subset in self.subsets
        ]
        return self.which.of(reduced)


class Depths(nn.Module):
    """Blocks of which a candidate has the first few."""

    def __init__(self, blocks: Sequence[nn.Module], depths: Sequence[int], which: Decision) -> None:
        super().__init__()
        for i, block in enumerate(blocks):
            self.add_module(str(i), block)
        self.depths, self.which = depths, which

    def forward(self, x: Any) -> Any:
        after = [x]
        for i in range(max(self.depths)):
            after.append(getattr(self, str(i))(after[-1]))
        return self.which.of([after[depth] for depth in self.depths])


class UnionCell(nn.Module):
    """A cell whose operators depend on the input that they read: every operator for every input."""

    def __init__(self, cell: Cell, ops: Sequence[Sequence[nn.ModuleList]], which: Sequence[Sequence[Decision]]) -> None:
        super().__init__()
        self.preprocessor, self.postprocessor = cell.preprocessor, cell.postprocessor
        self.predecessors, self.concat_dim, self.which = cell.num_predecessors, cell.concat_dim, which
        self.output_node_indices = list(cell.output_node_indices)
        self.ops = nn.ModuleList(nn.ModuleList(own) for own in ops)

    def forward(self, *inputs: Any) -> Any:
        given = preprocess_cell_inputs(self.predecessors, *inputs)
        states = list(self.preprocessor(given))
        for ops, which in zip(self.ops, self.which, strict=True):
            found = [
                decision.of([op(state) for op, state in zip(cast(nn.ModuleList, own), states, strict=True)])
                for own, decision in zip(cast(nn.ModuleList, ops), which, strict=True)
            ]
            states.append(torch.sum(torch.stack(found), 0))
        cell = torch.cat([states[i] for i in self.output_node_indices], self.concat_dim)
        return self.postprocessor(cell, given)


class Union:
    """A model space with all alternatives side by side.

    Args:
        space: an ``nni.nas.nn.pytorch.ModelSpace``; it stays as it is.
        labels: of the space.

    Attributes:
        module: computes every alternative, in the largest sizes.
        decisions: by number, which option a candidate takes.
        sizes: path of a layer → argument → its size for a candidate, where that is chosen.
        homes: paths of alternatives, blocks that are repeated, and cells: what is chosen as a whole.

    Raises:
        SpaceError: the space has something of which the alternatives cannot be listed; the message names it.
    """

    def __init__(self, space: nn.Module, labels: Labels) -> None:
        self._labels, self._largest = labels, labels.sample(labels.largest())
        self.decisions: list[Table] = []
        self.sizes: dict[str, dict[str, Table]] = {}
        self.homes: set[str] = set()
        self._options: set[str] = set()
        self._made: dict[int, tuple[nn.Module, nn.Module]] = {}
        self.module = self._of(copy.deepcopy(space), "")
        inplace: list[Any] = [module for module in self.module.modules() if hasattr(module, "inplace")]
        for module in inplace:
            module.inplace = False  # an alternative must not change what the others read

    def frozen(self, path: str) -> str:
        """The path, in a model of the space, of what is at ``path`` in the union."""
        names, kept = path.split("."), []
        for i, name in enumerate(names):
            if ".".join(names[: i + 1]) not in self._options:
                kept.append(name)
        return ".".join(kept)

    def home(self, path: str) -> str:
        """The outermost thing that is chosen as a whole and holds ``path``; else the module that holds it."""
        names = path.split(".")
        for i in range(1, len(names)):
            if ".".join(names[:i]) in self.homes:
                return self.frozen(".".join(names[:i]))
        return self.frozen(".".join(names[:-1])) or path

    # ---- module by module ----------------------------------------------------------------------

    def _of(self, module: nn.Module, path: str) -> nn.Module:
        if id(module) not in self._made:  # a module that is used twice stays one
            self._made[id(module)] = module, self._made_of(module, path)  # kept, so that its id stays its own
        return self._made[id(module)][1]

    def _made_of(self, module: nn.Module, path: str) -> nn.Module:
        if isinstance(module, LayerChoice):
            return self._layer_choice(module, path)
        if isinstance(module, InputChoice):
            table = self._labels.table([module.choice], module.choice.freeze, f"The inputs {module.label!r}")
            subsets = _distinct(_listed(v) for v in table.values.values())
            return Inputs(subsets, module.reduction, self._decided(table, lambda v: subsets.index(_listed(v))))
        if isinstance(module, Repeat):
            return self._repeat(module, path)
        if isinstance(module, Cell):
            return self._cell(module, path)
        if isinstance(module, ParametrizedModule) and module._bound_type in SIZES:
            return self._layer(module, path)
        if isinstance(module, ParametrizedModule) or (isinstance(module, MutableModule) and module.mutables):
            return self._variants(module, path)
        return self._children(module, path)

    def _children(self, module: nn.Module, path: str) -> nn.Module:
        for name, child in list(module.named_children()):
            module._modules[name] = self._of(child, _within(path, name))
        return module

    def _decided(self, table: Table, place: Callable[[Any], int]) -> Decision:
        """The decision that takes the option at the place of each value."""
        self.decisions.append(Table(table.labels, {key: place(value) for key, value in table.values.items()}))
        return Decision(len(self.decisions) - 1, " and ".join(table.labels) or "nothing")

    def _alternatives(self, options: dict[str, nn.Module], path: str, which: Decision) -> nn.Module:
        self.homes.add(path)
        self._options.update(_within(path, name) for name in options)
        return Alternatives(options, which)

    def _layer_choice(self, module: LayerChoice, path: str) -> nn.Module:
        names = [str(name) for name in module.names]
        options = {str(name): self._of(module[name], f"{path}.{name}") for name in module.names}
        table = self._labels.table([module.choice], module.choice.freeze, f"The layer {module.label!r}")
        return self._alternatives(options, path, self._decided(table, lambda v: names.index(str(v))))

    def _repeat(self, module: Repeat, path: str) -> nn.Module:
        depth = module.depth_choice
        table = (
            self._labels.table([depth], lambda sample: ensure_frozen(depth, sample=sample), f"The depth of {path}")
            if isinstance(depth, Mutable)
            else Table((), {(): depth})
        )
        depths = sorted(set(table.values.values()))
        blocks = [self._of(block, f"{path}.{i}") for i, block in enumerate(cast(Any, module.blocks))]
        self.homes.update(f"{path}.{i}" for i in range(len(blocks)))
        return Depths(blocks, depths, self._decided(table, depths.index))

    def _cell(self, module: Cell, path: str) -> nn.Module:
        self.homes.add(path)
        if module.merge_op == "loose_end":
            raise SpaceError(
                f"The cell {path} concatenates the nodes that no other reads, so its width depends on its inputs.",
                expected="merge_op='all'",
            )
        factory = module.op_candidates_factory
        if factory is None:
            return self._children(module, path)
        module.preprocessor = self._of(module.preprocessor, f"{path}.preprocessor")
        module.postprocessor = self._of(module.postprocessor, f"{path}.postprocessor")
        ops: list[list[nn.ModuleList]] = []
        which: list[list[Decision]] = []
        for i, (inputs, choices) in enumerate(zip(cast(Any, module.inputs), cast(Any, module.ops), strict=True)):
            ops.append([])
            which.append([])
            for k, (reads, op) in enumerate(zip(inputs, choices, strict=True)):
                place = f"{path}.ops.{i}.{k}"
                known = range(module.num_predecessors + i)
                table = self._labels.table([reads.choice], reads.choice.freeze, f"The inputs {reads.label!r}")
                which[-1].append(self._decided(table, lambda v: int(_listed(v)[0])))
                self._options.update(f"{place}.{j}" for j in known)
                made = [self._cell_op(factory, module, op, i, k, j, f"{place}.{j}") for j in known]
                ops[-1].append(nn.ModuleList(made))
        return UnionCell(module, ops, which)

    def _cell_op(
        self, factory: Any, cell: Cell, choice: LayerChoice, i: int, k: int, j: int, path: str
    ) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            options, _ = create_cell_op_candidates(factory, cell.num_predecessors + i, k, j)
        names = [str(name) for name in choice.names]
        table = self._labels.table([choice.choice], choice.choice.freeze, f"The layer {choice.label!r}")
        made = {str(name): self._of(option, f"{path}.{name}") for name, option in options.items()}
        return self._alternatives(made, path, self._decided(table, lambda v: names.index(str(v))))

    def _layer(self, module: ParametrizedModule, path: str) -> nn.Module:
        bound = cast(type[nn.Module], module._bound_type)
        args = dict(module.args)
        sizes = list(SIZES[bound])
        expressions = {name: args[name] for name in sizes if isinstance(args[name], Mutable)}
        chosen = {name: self._table(expression, f"{name} of {path}") for name, expression in expressions.items()}
        if "groups" in args and isinstance(args["groups"], Mutable):
            groups = self._table(args["groups"], f"groups of {path}")
            if chosen.get("in_channels") == groups:
                sizes.append("groups")  # depthwise, whatever the size
        if chosen:
            self.sizes[path] = chosen
        fixed = {name: ensure_frozen(args[name], sample=self._largest) for name in sizes}
        others = {name: value for name, value in args.items() if name not in sizes}
        read = [value for value in others.values() if isinstance(value, Mutable)]
        table = self._labels.table(
            read,
            lambda sample: {name: ensure_frozen(value, sample=sample) for name, value in others.items()},
            f"The layer {path}",
        )
        settings = _distinct(table.values.values())
        made = [bound(**fixed, **own) for own in settings]
        if len(made) == 1:
            return made[0]
        if chosen:
            self.sizes |= {f"{path}.{i}": chosen for i in range(len(made))}
        options = {str(i): layer for i, layer in enumerate(made)}
        return self._alternatives(options, path, self._decided(table, settings.index))

    def _table(self, mutable: Mutable, what: str) -> Table:
        return self._labels.table([mutable], lambda sample: ensure_frozen(mutable, sample=sample), what)

    def _variants(self, module: MutableModule, path: str) -> nn.Module:
        """A module that is something else for every value of its labels, built for each of them."""
        table = self._labels.table([module], dict, f"The module {path}")
        if len(table.values) > VARIANTS:
            raise SpaceError(
                f"{path or 'The space'}, a {type(module).__name__}, is another module for each of "
                f"{len(table.values)} combinations of the labels {', '.join(table.labels)}.",
                expected=f"at most {VARIANTS}, or layers whose sizes are chosen one by one, such as MutableConv2d",
            )
        settings = _distinct(table.values.values())
        made = []
        for own in settings:
            with model_context(own), torch.random.fork_rng(devices=[]):
                made.append(module.freeze(own))
        if len(made) == 1:
            return made[0]
        options = {str(i): variant for i, variant in enumerate(made)}
        return self._alternatives(options, path, self._decided(table, settings.index))


def _within(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _distinct(values: Iterable[Any]) -> list[Any]:
    """Each once, in their order; they need not be hashable."""
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
