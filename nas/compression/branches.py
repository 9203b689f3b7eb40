"""What can be left out of a traced model: residual branches, and single layers that keep the shape."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import fx, nn

from nas.compression.base import Loss, matching, named_module
from nas.errors import CompressionError
from nas.tracing import Block, Structure, shrunk
from nas.tracing.shrink import with_modes
from nas.tracing.trace import shape_of


class Branches:
    """The blocks of a traced model, and those of them that are left out so far.

    Args:
        model: which stays as it is.
        sample: raw inputs ``[n, *input_shape]``.

    Raises:
        CompressionError: the forward cannot be traced.
    """

    def __init__(self, model: nn.Module, sample: torch.Tensor) -> None:
        self._given = model
        self._structure = Structure(model, sample)
        self.blocks = {block.name: block for block in self._structure.blocks}
        self._gone: dict[fx.Node, fx.Node] = {}

    def named(self, name: str) -> Block:
        """A branch by its name, or a layer as one.

        Raises:
            CompressionError: there is none, or it cannot be left out.
        """
        if name in self.blocks:
            return self.blocks[name]
        model = self._structure.model
        named_module(model, name, "layer_drop")
        calls = [node for node in self._structure.nodes if node.op == "call_module" and node.target == name]
        if len(calls) == 1:
            (x,) = calls[0].all_input_nodes
            before, after = shape_of(x), shape_of(calls[0])
            if before == after and x.meta["val"].dtype == calls[0].meta["val"].dtype:
                return Block(name, calls[0], x, frozenset(calls))
            reason = f"it makes [n, {', '.join(map(str, after[1:]))}] of [n, {', '.join(map(str, before[1:]))}]"
        else:
            reason = f"the forward calls it {len(calls)} times" if calls else "it is neither a branch nor a layer"
        raise CompressionError(
            f"layer_drop: {name!r} cannot be dropped: {reason}.",
            expected=f"a layer that keeps the shape, or a branch, {', '.join(self.blocks) or 'of which there is none'}",
        )

    def candidates(self, patterns: Sequence[str], sample: torch.Tensor) -> list[str]:
        """Names of what may be left out and fits a pattern, in the order of the forward: branches, and layers with
        weights that are in no such branch."""
        called = [str(node.target) for node in self._structure.nodes if node.op == "call_module"]
        weighty = [name for name in called if any(p.ndim > 1 for p in self._structure.modules[name].parameters())]
        names = {*self.blocks, *(name for name, _ in self._structure.model.named_modules() if name)}
        wanted = matching(names, patterns, "layer_drop")
        found = {name: block for name, block in self.blocks.items() if name in wanted}
        inside = {node for block in found.values() for node in block.branch}
        for name in weighty:
            if name in wanted and name not in self.blocks:
                try:
                    layer = self.named(name)
                except CompressionError:
                    continue
                if not inside & layer.branch:
                    found[name] = layer
        return sorted(found, key=lambda name: self._structure.rank[found[name].output])

    def check(self, names: Iterable[str], sample: torch.Tensor) -> None:
        """Raise a CompressionError where one of these blocks cannot be left out."""
        for name in names:
            self.named(name)

    def changes(self, names: Collection[str], sample: torch.Tensor) -> dict[str, float]:
        """1 − cosine of the angle between what goes into each block and what comes out, mean over the sample."""
        blocks = [self.named(name) for name in names]
        ends = [node for block in blocks for node in (block.shortcut, block.output)]
        values = self._model({}, ends)(sample)
        found = {}
        for name, before, after in zip(names, values[::2], values[1::2], strict=True):
            pair = before.flatten(1).float(), after.flatten(1).float()
            found[name] = float(1 - nn.functional.cosine_similarity(*pair, dim=1).mean())
        return found

    def loss_without(self, name: str, sample: torch.Tensor, loss: Loss) -> float:
        """The loss where this block is left out too."""
        block = self.named(name)
        return float(loss(self._model({block.output: block.shortcut})(sample)))

    def drop(self, name: str) -> None:
        """Leave a block out."""
        block = self.named(name)
        self._gone[block.output] = block.shortcut

    def result(self) -> nn.Module:
        """The model without what was left out."""
        return with_modes(self._model({}), self._given)

    def _model(self, more: dict[fx.Node, fx.Node], outputs: Sequence[fx.Node] = ()) -> fx.GraphModule:
        return shrunk(self._structure.axes, {}, outputs=outputs, instead={**self._gone, **more})
