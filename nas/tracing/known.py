"""Which values inside a traced model are the same whatever comes in, and what they are.

Zeros among the weights, those of masks above all, make some of a model's values independent of its input: a filter of
zeros gives its bias everywhere, batch normalisation and activation make another constant of that, and a convolution
with padding makes a fixed pattern of that one. Each rule follows from the operator alone; nothing is concluded from
values that merely happened to agree on some inputs. An operator without a rule gives values that nothing is known of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from nas.tracing.layers import ELEMENTWISE, NORMS
from nas.tracing.structure import Structure
from nas.tracing.trace import is_constant, opname

POOLS = (nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.MaxPool2d)
POINTWISE = (
    "relu", "relu6", "hardtanh", "gelu", "silu", "hardswish", "hardsigmoid", "sigmoid", "tanh", "leaky_relu", "elu",
    "softplus", "mish", "exp", "log", "sqrt", "rsqrt", "reciprocal", "abs", "neg", "erf", "square", "clamp",
    "clamp_min", "clamp_max", "to", "_to_copy", "contiguous", "clone", "alias", "detach",
    "pow", "sin", "cos", "round", "floor", "sign", "add", "sub", "rsub", "div", "maximum", "minimum", "where",
    "masked_fill",
)  # fmt: skip
MOVING = (
    "reshape", "view", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose",
    "swapaxes", "t", "expand", "cat", "concat", "stack", "unbind", "select", "slice", "narrow", "chunk", "split",
    "split_with_sizes", "getitem", "roll",
)  # fmt: skip
POOLING = (
    "adaptive_avg_pool2d", "avg_pool2d", "max_pool2d", "adaptive_max_pool2d", "adaptive_avg_pool1d", "avg_pool1d",
    "max_pool1d", "mean", "sum", "amax", "amin", "upsample_nearest2d",
)  # fmt: skip
HALF = 0.5  # what is counted is whole, whichever way a kernel adds it up


class Known(fx.Interpreter):
    """Values of a traced model and which of them are known.

    Args:
        structure: of the model, in evaluation mode, with the weights that count.
        sample: one raw input, ``[1, *input_shape]``.

    Attributes:
        values: node → its value for ``sample``.
        known: node → booleans of the same shape: true where the value is that for every input. Nodes that give several
            tensors have a list in both.
    """

    def __init__(self, structure: Structure, sample: torch.Tensor) -> None:
        super().__init__(structure.model)
        self.values: dict[fx.Node, Any] = {}
        self.known: dict[fx.Node, Any] = {}
        with torch.no_grad():
            self.run(sample)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op != "output":
            self.values[n] = value
            if _is_tensor(value):
                self.known[n] = self._known(n, value)
        return value

    def _known(self, node: fx.Node, value: Any) -> Any:
        if is_constant(node):
            return _like(value, True)
        rule: Callable[[Known, fx.Node], Any] | None = None
        if node.op == "call_module":
            layer = self.submodules[str(node.target)]
            rule = next((rule for kinds, rule in LAYER_RULES if isinstance(layer, kinds)), None)
        elif node.op in ("call_function", "call_method"):
            rule = RULES.get(opname(node) or getattr(node.target, "__name__", str(node.target)))
        found = rule(self, node) if rule is not None else None
        return _like(value, False) if found is None else found

    def zero(self, node: fx.Node) -> torch.Tensor:
        """Where a node's value is known to be zero."""
        found: torch.Tensor = self.known[node] & (self.values[node] == 0)
        return found

    def unknown(self, node: fx.Node) -> torch.Tensor:
        """1 where nothing is known, 0 elsewhere."""
        found: torch.Tensor = (~self.known[node]).float()
        return found


def _is_tensor(value: Any) -> bool:
    """Whether it is a tensor or several of them."""
    several = isinstance(value, tuple | list) and len(value) > 0
    return all(isinstance(v, torch.Tensor) for v in value) if several else isinstance(value, torch.Tensor)


def _like(value: Any, known: bool) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.full_like(value, known, dtype=torch.bool)
    return [_like(v, known) for v in value]


# ---- layers ------------------------------------------------------------------------------------------


def _same(found: Known, node: fx.Node) -> Any:
    return found.known[node.all_input_nodes[0]]


def _weighted(found: Known, node: fx.Node) -> Any:
    """An output is known where all that it sums up is known, or multiplied by zero."""
    layer: Any = found.submodules[str(node.target)]
    x, counts = found.unknown(node.all_input_nodes[0]), (layer.weight != 0).float()
    if isinstance(layer, nn.Linear):
        return F.linear(x, counts) < HALF
    if layer.padding_mode != "zeros":
        return None
    convolve: Any = F.conv1d if isinstance(layer, nn.Conv1d) else F.conv2d
    return convolve(x, counts, None, layer.stride, layer.padding, layer.dilation, layer.groups) < HALF


def _batch_norm(found: Known, node: fx.Node) -> Any:
    layer: Any = found.submodules[str(node.target)]
    x = found.known[node.all_input_nodes[0]]
    if layer.running_mean is None:
        return None
    if layer.weight is None:
        return x
    return x | (layer.weight == 0).view(1, -1, *[1] * (x.ndim - 2))


def _layer_norm(found: Known, node: fx.Node) -> Any:
    x = found.known[node.all_input_nodes[0]]
    axes = list(range(-len(found.submodules[str(node.target)].normalized_shape), 0))
    return x.all(dim=axes[0], keepdim=True).expand_as(x) if len(axes) == 1 else None


def _embedding(found: Known, node: fx.Node) -> Any:
    """Dimensions that all rows have the same."""
    table: Any = found.submodules[str(node.target)].weight
    return (table == table[0]).all(dim=0).expand_as(found.values[node])


def _pool(found: Known, node: fx.Node) -> Any:
    """What is taken from a window is known where all of the window is."""
    return found.submodules[str(node.target)](found.unknown(node.all_input_nodes[0])) == 0


def _nothing(found: Known, node: fx.Node) -> Any:
    return None


def _moved_by_layer(found: Known, node: fx.Node) -> Any:
    return found.submodules[str(node.target)](found.known[node.all_input_nodes[0]])


LAYER_RULES: list[tuple[Any, Callable[[Known, fx.Node], Any]]] = [
    (nn.Softmax, _nothing), (ELEMENTWISE, _same), ((nn.Conv1d, nn.Conv2d, nn.Linear), _weighted),
    (nn.Embedding, _embedding), (NORMS, _batch_norm), (nn.LayerNorm, _layer_norm), (POOLS, _pool),
    (nn.Flatten, _moved_by_layer),
]  # fmt: skip


# ---- operators ---------------------------------------------------------------------------------------


def _pointwise(found: Known, node: fx.Node) -> Any:
    """Known where every operand is."""
    result = torch.ones((), dtype=torch.bool)
    for n in node.all_input_nodes:
        if n in found.known:
            result = result & found.known[n]
    return result.expand_as(found.values[node])


def _product(found: Known, node: fx.Node) -> Any:
    known = _pointwise(found, node)
    for n in node.all_input_nodes:
        if n in found.known:
            known = known | found.zero(n)
    return known


def _moved(found: Known, node: fx.Node) -> Any:
    """What goes to other places is known there."""
    given: Any = fx.map_arg((node.args, node.kwargs), lambda n: found.known.get(n, found.values[n]))
    args, kwargs = given
    target: Any = getattr(args[0], str(node.target)) if node.op == "call_method" else node.target
    return target(*(args[1:] if node.op == "call_method" else args), **kwargs)


def _gathered(found: Known, node: fx.Node) -> Any:
    """Of averages and sums, where all that goes in is known."""
    counts = fx.map_arg(node.args, lambda n: found.unknown(n) if n in found.known else found.values[n])
    return node.target(*counts, **node.kwargs) == 0  # type: ignore[operator]


def _matmul(found: Known, node: fx.Node) -> Any:
    """Known where in each product of the sum both factors are known, or one is known to be zero."""
    a, b = node.all_input_nodes[0], node.all_input_nodes[-1]
    open_a, open_b = ((~found.zero(n)).float() for n in (a, b))
    return (found.unknown(a) @ open_b + open_a @ found.unknown(b)) < HALF


def _dropout(found: Known, node: fx.Node) -> Any:
    return None if node.args[2] else _same(found, node)  # of one that is on in evaluation, too


def _padded(found: Known, node: fx.Node) -> Any:
    given: Any = node.args
    if isinstance(given[2] if len(given) > 2 else None, str) and given[2] != "constant":
        return None
    return F.pad(found.unknown(given[0]), given[1]) == 0


def _attention(found: Known, node: fx.Node) -> Any:
    """A mean over tokens, with weights that nothing is known of: known where the tokens all have the same."""
    given: Any = node.args
    value, known = found.values[given[2]], found.known[given[2]]
    same = (known & (value == value[..., :1, :])).all(dim=-2, keepdim=True)
    return same.expand_as(found.values[node]) if same.shape[:-2] == found.values[node].shape[:-2] else None


RULES: dict[str, Callable[[Known, fx.Node], Any]] = {
    **dict.fromkeys(POINTWISE, _pointwise),
    **dict.fromkeys(MOVING, _moved),
    **dict.fromkeys(POOLING, _gathered),
    **dict.fromkeys(("matmul", "bmm", "mm"), _matmul),
    **dict.fromkeys(("dropout", "feature_dropout"), _dropout),
    **dict.fromkeys(("pad", "constant_pad_nd"), _padded),
    "mul": _product,
    "scaled_dot_product_attention": _attention,
}
