"""Points: modules of a model whose outputs are compared with another model's, found by running both once.

A point's output is brought to one form, a map ``[n, channels, height, width]``: tokens ``[n, tokens, channels]``, also
as rows ``[n · tokens, channels]``, stand in their square grid, or in one column where their number is no square.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from nas.compression.groups import evaluating
from nas.errors import TrainingError

TOKEN_POINTS = 4
Pairs = tuple[tuple[str, str], ...]


@dataclass
class Call:
    """One module as it ran once, and the calls inside of it."""

    name: str
    kind: type[nn.Module]
    output: Tensor | None = None
    inner: list[Call] = field(default_factory=list)

    def everything(self) -> list[Call]:
        """This call and all inside, the outer ones first."""
        found, level = list[Call](), [self]
        while level:
            found += level
            level = [inner for call in level for inner in call.inner]
        return found


def stage_outputs(model: nn.Module, x: Tensor) -> tuple[str, ...]:
    """Names of the modules whose outputs are the results of a model's stages, in the order in which they run.

    A convolutional model is read as a sequence of blocks, those in a ``Sequential`` or in a module that changes the
    size more than once; the points are the last maps before each change of height and width, and the last of all. Of
    a model on tokens they are :data:`TOKEN_POINTS` blocks at even distances, the last one included; blocks are what
    the outermost module runs that runs one kind repeatedly. Modules that run more than once are left out.

    Args:
        x: raw inputs ``[n, *input_shape]``, n ≥ 2.

    Raises:
        TrainingError: no output is a map or a sequence of tokens.
    """
    root, n = as_run(model, x), len(x)
    repeated = {name for name, times in Counter(call.name for call in root.everything()).items() if times > 1}
    calls = [(call, _form(call.output, n)) for call in _sequence(root, n) if call.name not in repeated]
    sized = [(call.name, form) for call, form in calls if form]
    tokens = [call.name for call, form in calls if form == ()]
    if len(tokens) > len(sized):
        found = _even(_token_blocks(root, n, repeated) or tokens, TOKEN_POINTS)
    else:
        following = [*(form for _, form in sized[1:]), None]
        found = [name for (name, form), after in zip(sized, following, strict=bool(sized)) if form != after]
    if not found:
        raise TrainingError(
            f"No layer of {type(model).__name__} gives maps or tokens that could be compared.",
            expected="a convolutional network or a transformer",
            remedy="feature_weight and attention_weight 0, or pairs of names",
        )
    return tuple(found)


def as_run(model: nn.Module, x: Tensor) -> Call:
    """The calls of one forward in evaluation mode, nested as they were."""
    root = Call("", type(model))
    stack = [root]

    def enter(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any) -> None:
            call = Call(name, type(module))
            stack[-1].inner.append(call)
            stack.append(call)

        return hook

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        stack.pop().output = _tensor(output)

    with ExitStack() as hooks, evaluating(model), torch.no_grad():
        for name, module in model.named_modules():
            if name:
                hooks.callback(module.register_forward_pre_hook(enter(name)).remove)
                hooks.callback(module.register_forward_hook(leave).remove)
        model(x)
    return root


def _sequence(call: Call, n: int) -> list[Call]:
    """What runs inside, block by block: sequences and whole networks are looked into, blocks are not."""
    found: list[Call] = []
    for inner in call.inner:
        inside = _sequence(inner, n)
        sizes = [form for c in inside if (form := _form(c.output, n))]
        changes = sum(before != after for before, after in pairwise(sizes))  # a strided block has one
        network = issubclass(inner.kind, nn.Sequential) or _form(inner.output, n) is None or changes > 1
        found += inside if inside and network else [inner]
    return found


def _token_blocks(root: Call, n: int, repeated: Container[str]) -> list[str]:
    """The blocks on tokens, of kinds that occur more than once, in the outermost module that runs such; or none."""
    for call in root.everything():
        blocks = [c for c in call.inner if c.inner and c.name not in repeated and _form(c.output, n) == ()]
        kinds = Counter(block.kind for block in blocks)
        if found := [block.name for block in blocks if kinds[block.kind] > 1]:
            return found
    return []


def _form(output: Tensor | None, n: int) -> tuple[int, ...] | None:
    """Height and width of a map of more than one position, () for tokens, None for anything else."""
    if output is None or not output.is_floating_point() or not n or output.dim() < 2 or len(output) % n:
        return None
    if output.dim() == 4:
        return tuple(output.shape[2:]) if math.prod(output.shape[2:]) > 1 and len(output) == n else None
    if output.dim() == 3:
        return () if output.shape[1] > 1 and len(output) == n else None
    return () if output.dim() == 2 and len(output) > n else None


def _even(names: Sequence[str], most: int) -> list[str]:
    """At most so many, at even distances, the last one included."""
    count = min(most, len(names))
    return [names[(i + 1) * len(names) // count - 1] for i in range(count)]


def matched(student: Sequence[str], teacher: Sequence[str]) -> Pairs:
    """Pairs by position: of the longer list, as many at even distances as the shorter one has."""
    count = min(len(student), len(teacher))
    return tuple(zip(_even(student, count), _even(teacher, count), strict=True))


@contextmanager
def watched(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """A dictionary that holds, after each forward, what the modules of these names gave."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensor = _tensor(output)
            if tensor is None:
                raise TrainingError(f"Module {name!r} gives no tensor.", expected="a layer or block to compare")
            seen[name] = tensor

        return hook

    with ExitStack() as hooks:
        for name in names:
            hooks.callback(model.get_submodule(name).register_forward_hook(keep(name)).remove)
        yield seen


def maps(model: nn.Module, x: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Outputs of modules for ``x [n, *input_shape]`` as maps ``[n, channels, height, width]``, without gradients.

    Raises:
        TrainingError: a module does not run, or gives no tensor.
    """
    with watched(model, names) as seen, evaluating(model), torch.no_grad():
        model(x)
    if missing := [name for name in names if name not in seen]:
        raise TrainingError(f"Module {missing[0]!r} does not run.", expected="a module that the forward calls")
    return {name: as_map(seen[name], len(x)) for name in names}


def as_map(output: Tensor, n: int) -> Tensor:
    """A point's output for n samples as ``[n, channels, height, width]``.

    Raises:
        TrainingError: it is neither a map, tokens, rows of tokens, nor a vector per sample.
    """
    if output.dim() == 4 and len(output) == n:
        return output
    if output.dim() == 2 and len(output) % n == 0:
        output = output.unflatten(0, (n, -1))
    if output.dim() != 3 or len(output) != n:
        raise TrainingError(
            f"A compared layer gives the shape {list(output.shape)} for {n} samples.",
            expected="[n, c, h, w], [n, tokens, c], [n · tokens, c] or [n, c]",
        )
    tokens = output.shape[1]
    side = math.isqrt(tokens)
    grid = (side, side) if side * side == tokens else (tokens, 1)
    return output.transpose(1, 2).unflatten(2, grid)


def _tensor(output: Any) -> Tensor | None:
    """A module's output, or the first tensor in it."""
    if isinstance(output, Tensor):
        return output
    values = list(output.values()) if isinstance(output, Mapping) else output
    return next((v for v in values if isinstance(v, Tensor)), None) if isinstance(values, list | tuple) else None
