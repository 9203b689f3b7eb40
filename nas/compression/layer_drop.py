"""Layer removal: blocks that change little become identities."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from nas.compression.base import Loss, Pass, matching, named_module, passes
from nas.compression.branches import Branches
from nas.compression.fold import replace_module
from nas.compression.groups import evaluating
from nas.errors import CompressionError

IMPORTANCES = ("change", "loss")


@passes.register("layer_drop")
class LayerDrop(Pass):
    """Replaces named blocks by identities: ``settings`` maps a module name to True.

    A block can go if it gives out what it takes in, by shape: one tensor each. Of a residual block that is one module,
    input and output are the same then, so dropping it is dropping its body.

    Of a traced model, a graph module, the residual branches can go, wherever in the forward they lie: what is read
    after the addition is what went into it. They have the name of the module that holds them alone, or else of their
    last layer: ``layers.0.attention.proj``. Beside them, single layers can.
    """

    @classmethod
    def settings_for(  # type: ignore[override]
        cls,
        model: nn.Module,
        sample: torch.Tensor,
        loss: Loss | None = None,
        *,
        count: int | None = None,
        ratio: float | None = None,
        importance: str = "change",
        candidates: Sequence[str] = ("*",),
    ) -> dict[str, Any]:
        """The blocks to drop, least important first; the importance of the rest is measured again after each.

        Blocks that can be dropped have weights, are called once, and give out the shape that they take in. The
        outermost count: what lies in such a block is not dropped by itself, but a ``Sequential`` of nothing but such
        blocks is a stage, whose blocks are dropped one by one.

        Args:
            count: how many; 1 where ``ratio`` is not given either.
            ratio: share of the blocks that can be dropped, in [0, 1], rounded to whole blocks.
            importance: ``change``: 1 − cosine of the angle between a block's input and its output, mean over the
                sample (Men et al. 2024, "ShortGPT", eq. 1); ``loss``: what dropping the block adds to ``loss``.
            candidates: patterns (``*``, ``?``, ``[ab]``) of names that may be dropped.

        Raises:
            CompressionError: an option is out of range, or there are not as many such blocks.
        """
        _check_options(count, ratio, importance, loss)
        model = copy.deepcopy(model)
        found = _branches(model, sample) or _Modules(model)
        blocks = found.candidates(candidates, sample)
        wanted = round(ratio * len(blocks)) if ratio is not None else 1 if count is None else count
        if wanted > len(blocks):
            raise CompressionError(
                f"layer_drop: {wanted} blocks to drop, but only {len(blocks)} can be: {blocks}.",
                expected=f"a count of at most {len(blocks)}",
                remedy="patterns that fit more modules whose input and output have equal shapes",
            )
        dropped: list[str] = []
        with evaluating(model), torch.no_grad():
            while len(dropped) < wanted:
                if importance == "loss" and loss is not None:
                    matters = {name: found.loss_without(name, sample, loss) for name in blocks}
                else:
                    matters = found.changes(blocks, sample)
                least = min(blocks, key=lambda name: matters[name])
                found.drop(least)
                blocks.remove(least)
                dropped.append(least)
        return dict.fromkeys(dropped, True)

    def apply(self, model: nn.Module, sample: torch.Tensor, loss: Loss | None = None) -> nn.Module:
        for name, setting in self.settings.items():
            if setting is not True:
                raise CompressionError(f"layer_drop: {setting!r} for {name!r}.", expected="True, or no entry")
            if not name:
                raise CompressionError("layer_drop: '' is the whole model.", expected="a name of a module in it")
        found = _branches(model, sample) or _Modules(model)
        for name in self.settings:
            named_module(model, name, "layer_drop")
            if outer := next((other for other in self.settings if name.startswith(f"{other}.")), None):
                raise CompressionError(f"layer_drop: {name!r} lies in {outer!r}, which goes as a whole.")
        found.check(self.settings, sample)
        for name in self.settings:
            found.drop(name)
        return found.result()


def _branches(model: nn.Module, sample: torch.Tensor) -> Branches | None:
    """The blocks of a model that is a graph, where it can be followed."""
    if not isinstance(model, fx.GraphModule):
        return None
    try:
        return Branches(model, sample)
    except CompressionError:
        return None


def _check_options(count: Any, ratio: Any, importance: Any, loss: Loss | None) -> None:
    if importance not in IMPORTANCES:
        raise CompressionError(
            f"layer_drop: unknown importance {importance!r}.", expected=f"one of {', '.join(IMPORTANCES)}"
        )
    if importance == "loss" and loss is None:
        raise CompressionError("layer_drop: no loss to measure the importance by.", remedy="importance 'change'")
    if count is not None and ratio is not None:
        raise CompressionError("layer_drop: both count and ratio are given.", expected="one of them")
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
        raise CompressionError(f"layer_drop: count is {count!r}.", expected="a whole number of at least 0")
    if ratio is not None and (isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio <= 1):
        raise CompressionError(f"layer_drop: ratio is {ratio!r}.", expected="a share in [0, 1]")


@dataclass
class _Calls:
    """What was seen of a module: how often it ran, why it cannot be dropped, how much it changes."""

    count: int = 0
    problem: str = ""
    changes: list[float] = field(default_factory=list)

    @property
    def obstacle(self) -> str:
        return self.problem if self.count else "the forward does not call it"

    @property
    def change(self) -> float:
        return sum(self.changes) / len(self.changes)


def _watch(model: nn.Module, sample: torch.Tensor, names: Iterable[str]) -> Mapping[str, _Calls]:
    """Run the sample and look at the inputs and outputs of the named modules."""
    found = {name: _Calls() for name in names}

    def note(calls: _Calls) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
            calls.count += 1
            given = [*args, *options.values()]
            if len(given) != 1:
                calls.problem = f"it is called with {len(given)} arguments"
            elif not isinstance(given[0], torch.Tensor) or not isinstance(output, torch.Tensor):
                calls.problem = f"it makes a {type(output).__name__} of a {type(given[0]).__name__}"
            elif given[0].shape != output.shape:
                calls.problem = (
                    f"it makes [n, {', '.join(map(str, output.shape[1:]))}] of "
                    f"[n, {', '.join(map(str, given[0].shape[1:]))}]"
                )
            elif given[0].dtype != output.dtype:
                calls.problem = f"it makes {output.dtype} of {given[0].dtype}"
            else:
                before, after = given[0].flatten(1).float(), output.flatten(1).float()
                calls.changes.append(float(1 - nn.functional.cosine_similarity(before, after, dim=1).mean()))

        return hook

    hooks = [
        model.get_submodule(name).register_forward_hook(note(calls), with_kwargs=True) for name, calls in found.items()
    ]
    try:
        with evaluating(model), torch.no_grad():
            model(sample)
    finally:
        for hook in hooks:
            hook.remove()
    return found


class _Modules:
    """Blocks of a model that are modules of it; dropped in place."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def candidates(self, patterns: Sequence[str], sample: torch.Tensor) -> list[str]:
        """Names of the outermost modules that may be dropped, in the order of the model."""
        modules = {name: module for name, module in self._model.named_modules() if name}
        wanted = matching(modules, patterns, "layer_drop")
        weighty = [name for name in modules if name in wanted and _weighty(modules[name])]
        calls = _watch(self._model, sample, weighty)
        fit = {name for name, seen in calls.items() if seen.count == 1 and not seen.obstacle}
        stages = {name for name in fit if _stage(modules[name], name, fit)}
        blocks = [name for name in modules if name in fit - stages]
        return [name for name in blocks if not any(name.startswith(f"{other}.") for other in blocks)]

    def check(self, names: Iterable[str], sample: torch.Tensor) -> None:
        """Raise a CompressionError where one of these modules cannot be dropped."""
        for name, calls in _watch(self._model, sample, names).items():
            if calls.obstacle:
                raise CompressionError(
                    f"layer_drop: {name!r} cannot be dropped: {calls.obstacle}.",
                    expected="a module that takes one tensor and gives one of the same shape",
                )

    def changes(self, names: Collection[str], sample: torch.Tensor) -> dict[str, float]:
        """How much each block changes what goes through it."""
        return {name: calls.change for name, calls in _watch(self._model, sample, names).items()}

    def loss_without(self, name: str, sample: torch.Tensor, loss: Loss) -> float:
        """The loss when the block is skipped; the block is put back."""
        block = self._model.get_submodule(name)
        replace_module(self._model, name, nn.Identity())
        try:
            return float(loss(self._model(sample)))
        finally:
            replace_module(self._model, name, block)

    def drop(self, name: str) -> None:
        """Put an identity in place of a block."""
        replace_module(self._model, name, nn.Identity())

    def result(self) -> nn.Module:
        """The model without what was dropped."""
        return self._model


def _weighty(module: nn.Module) -> bool:
    """Whether it computes with weights, rather than normalises at most."""
    return any(parameter.ndim > 1 for parameter in module.parameters())


def _stage(module: nn.Module, name: str, fit: set[str]) -> bool:
    """A chain of several blocks, each of which may be dropped and is more than one layer."""
    children = dict(module.named_children())
    return (
        isinstance(module, nn.Sequential)
        and len(children) > 1
        and all(f"{name}.{leaf}" in fit and any(True for _ in child.children()) for leaf, child in children.items())
    )
