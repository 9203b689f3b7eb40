"""What operators do with axes: which of their inputs' are the same, and what their results are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from nas.errors import CompressionError
from nas.tracing.alternatives import CHOOSE, options_of
from nas.tracing.axes import Axes, as_is
from nas.tracing.dims import Dim, constant, reshaped, resolve, tie, unify
from nas.tracing.trace import number, shape_of

Handler = Callable[[Axes, fx.Node], "list[Any] | None"]
HANDLERS: dict[str, Handler] = {}


def _handles(*names: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


def _first(found: Axes, node: fx.Node) -> list[Dim]:
    return list(found.of[node.args[0]])  # type: ignore[index]


def _axis(node: fx.Node, position: int, default: int = 0) -> int:
    """A dimension argument, counted from the front of the first input."""
    value: Any = node.args[position] if len(node.args) > position else node.kwargs.get("dim", default)
    count = node.args[0].meta["val"].ndim if isinstance(node.args[0], fx.Node) else 0
    return int(value) % count if count else int(value)


@_handles(
    "relu", "relu6", "hardtanh", "gelu", "silu", "hardswish", "hardsigmoid", "sigmoid", "tanh", "leaky_relu", "elu",
    "softplus", "mish", "exp", "log", "sqrt", "rsqrt", "reciprocal", "abs", "neg", "erf", "square", "clamp",
    "clamp_min", "clamp_max", "dropout", "feature_dropout", "to", "_to_copy", "type_as", "contiguous", "clone", "alias",
    "detach", "softmax", "_softmax", "log_softmax", "float", "bitwise_not", "logical_not",
    "lift_fresh_copy", "pow", "sin", "cos", "zeros_like", "ones_like", "round", "floor", "sign", "masked_fill",
)  # fmt: skip
def _unary(found: Axes, node: fx.Node) -> list[Dim] | None:
    tensors = [n for n in node.all_input_nodes if n in found.of]
    return _broadcast(found, node) if len(tensors) > 1 else _first(found, node)


@_handles(
    "add", "sub", "rsub", "mul", "div", "maximum", "minimum", "where", "eq", "ne", "lt", "le", "gt", "ge",
    "bitwise_and", "bitwise_or", "logical_and", "logical_or", "__and__", "__or__",
)  # fmt: skip
def _broadcast(found: Axes, node: fx.Node) -> list[Dim] | None:
    shapes = [list(found.of[n]) for n in node.all_input_nodes if n in found.of]
    rank = max(len(dims) for dims in shapes)
    result: list[Dim] = []
    for axis in range(-rank, 0):
        own = [dims[axis] for dims in shapes if len(dims) >= -axis]
        wide = [dim for dim in own if dim.size != 1]
        for other in wide[1:]:
            unify(wide[0], other)
        result.append(wide[0] if wide else own[0])
    return result


@_handles("reshape", "view", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze")
def _reshape(found: Axes, node: fx.Node) -> list[Dim] | None:
    return reshaped(_first(found, node), shape_of(node))



@_handles("permute")
def _permute(found: Axes, node: fx.Node) -> list[Dim]:
    x = _first(found, node)
    return [x[axis] for axis in node.args[1]]  # type: ignore[union-attr,index]


@_handles("transpose", "swapaxes")
def _transpose(found: Axes, node: fx.Node) -> list[Dim]:
    x = _first(found, node)
    a, b = _axis(node, 1), _axis(node, 2)
    x[a], x[b] = x[b], x[a]
    return x


@_handles("t")
def _t(found: Axes, node: fx.Node) -> list[Dim]:
    return _first(found, node)[::-1]


@_handles("expand", "expand_as")
def _expand(found: Axes, node: fx.Node) -> list[Dim]:
    x, shape = _first(found, node), shape_of(node)
    x = [constant(1)] * (len(shape) - len(x)) + x
    plain = as_is(found, node.meta["val"])
    return [dim if dim.size == size else own for dim, size, own in zip(x, shape, plain, strict=True)]


@_handles("mean", "sum", "amax", "amin", "prod")
def _reduce(found: Axes, node: fx.Node) -> list[Dim] | None:
    x = _first(found, node)
    axes_: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if axes_ is None:
        return []
    axes_ = [axes_] if isinstance(axes_, int) else axes_
    gone = {axis % len(x) for axis in axes_} or set(range(len(x)))
    keep = len(shape_of(node)) == len(x)
    return [constant(1) if axis in gone else dim for axis, dim in enumerate(x) if keep or axis not in gone]


@_handles(
    "adaptive_avg_pool2d", "avg_pool2d", "max_pool2d", "adaptive_max_pool2d", "upsample_bilinear2d",
    "upsample_nearest2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "adaptive_avg_pool1d", "max_pool1d",
    "avg_pool1d",
)  # fmt: skip
def _spatial(found: Axes, node: fx.Node) -> list[Dim]:
    x, shape = _first(found, node), shape_of(node)
    return [*x[:2], *(constant(size) for size in shape[2:])]


@_handles("pad", "constant_pad_nd")
def _pad(found: Axes, node: fx.Node) -> list[Dim]:
    x, shape = _first(found, node), shape_of(node)
    changed = [dim for dim, size in zip(x, shape, strict=True) if dim.size != size]
    tie(changed, f"{node.name} pads")
    return [dim if dim.size == size else constant(size) for dim, size in zip(x, shape, strict=True)]


@_handles("cat", "concat")
def _cat(found: Axes, node: fx.Node) -> list[Dim]:
    shapes: list[list[Dim]] = [found.of[n] for n in node.args[0]]  # type: ignore[union-attr,index]
    axis = int(node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % len(shapes[0])  # type: ignore[arg-type]
    for other in shapes[1:]:
        for i, (a, b) in enumerate(zip(shapes[0], other, strict=True)):
            if i != axis:
                unify(a, b)
    result = list(shapes[0])
    result[axis] = Dim(tuple(term for dims in shapes for term in resolve(dims[axis]).terms))
    return result


@_handles(CHOOSE)
def _choose(found: Axes, node: fx.Node) -> list[Dim]:
    shapes: list[list[Dim]] = [found.of[n] for n in options_of(node)]
    sizes = {shape_of(n) for n in options_of(node)}
    if len(sizes) > 1:
        raise CompressionError(
            f"Alternatives have different shapes: {', '.join(map(str, sorted(sizes)))} ({node.name}).",
            expected="alternatives that can take each other's place",
        )
    for other in shapes[1:]:
        for a, b in zip(shapes[0], other, strict=True):
            unify(a, b)
    return list(shapes[0])


@_handles("stack")
def _stack(found: Axes, node: fx.Node) -> list[Dim]:
    shapes: list[list[Dim]] = [found.of[n] for n in node.args[0]]  # type: ignore[union-attr,index]
    for other in shapes[1:]:
        for a, b in zip(shapes[0], other, strict=True):
            unify(a, b)
    axis = int(node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % (len(shapes[0]) + 1)  # type: ignore[arg-type]
    result = list(shapes[0])
    result.insert(axis, constant(len(shapes)))
    return result


@_handles("unbind")
def _unbind(found: Axes, node: fx.Node) -> list[list[Dim]]:
    x, axis = _first(found, node), _axis(node, 1)
    tie([x[axis]], f"{node.name} takes it apart")
    rest = [dim for i, dim in enumerate(x) if i != axis]
    return [list(rest) for _ in range(x[axis].size)]


@_handles("select")
def _select(found: Axes, node: fx.Node) -> list[Dim]:
    x, axis = _first(found, node), _axis(node, 1)
    tie([x[axis]], f"{node.name} takes it apart")
    return [dim for i, dim in enumerate(x) if i != axis]


@_handles("slice", "narrow")
def _slice(found: Axes, node: fx.Node) -> list[Dim]:
    x, shape, axis = _first(found, node), shape_of(node), _axis(node, 1)
    if x[axis].size != shape[axis]:
        tie([x[axis]], f"{node.name} cuts through it")
        x[axis] = constant(shape[axis])
    return x


@_handles("roll")
def _roll(found: Axes, node: fx.Node) -> list[Dim]:
    x = _first(found, node)
    given: Any = node.args
    tie([x[axis] for axis in given[2]] if len(given) > 2 else x, f"{node.name} moves it round")
    return x


@_handles("index")
def _index(found: Axes, node: fx.Node) -> list[Dim] | None:
    """Rows of a table by number."""
    x = _first(found, node)
    given: Any = node.args
    if len(given[1]) != 1:
        return None
    tie([x[0]], f"{node.name} looks it up")
    return [*found.of[given[1][0]], *x[1:]]


@_handles("index_select")
def _index_select(found: Axes, node: fx.Node) -> list[Dim]:
    x, axis = _first(found, node), _axis(node, 1)
    tie([x[axis]], f"{node.name} looks it up")
    x[axis] = constant(shape_of(node)[axis])
    return x


@_handles("chunk", "split", "split_with_sizes")
def _chunks(found: Axes, node: fx.Node) -> list[list[Dim]]:
    x = _first(found, node)
    axis = _axis(node, 2)
    sizes = [number(value.shape[axis]) for value in node.meta["val"]]
    pieces = _pieces(resolve(x[axis]), sizes)
    if pieces is None:
        tie([x[axis]], f"{node.name} cuts through it")
        pieces = [constant(size) for size in sizes]
    return [[*x[:axis], piece, *x[axis + 1 :]] for piece in pieces]


def _pieces(dim: Dim, sizes: list[int]) -> list[Dim] | None:
    """An axis cut into sizes: along its sum, or into equal parts of a product."""
    if [Dim((term,)).size for term in dim.terms] == sizes:
        return [Dim((term,)) for term in dim.terms]
    if len(dim.terms) == 1 and len(set(sizes)) == 1:
        both = reshaped([dim], [len(sizes), sizes[0]])
        if both is not None:
            tie([both[0]], "it counts the parts of a split")
            return [both[1]] * len(sizes)
    return None


@_handles("getitem")
def _getitem(found: Axes, node: fx.Node) -> list[Dim] | None:
    value = found.of[node.args[0]]  # type: ignore[index]
    index = node.args[1]
    return list(value[index]) if isinstance(index, int) and isinstance(value[0], list) else None


@_handles("matmul", "bmm", "mm")
def _matmul(found: Axes, node: fx.Node) -> list[Dim] | None:
    a, b = (list(found.of[n]) for n in node.args[:2])  # type: ignore[index]
    if len(a) < 2 or len(b) < 2:
        return None
    unify(a[-1], b[-2])
    outer: list[Dim] = []
    for axis in range(-max(len(a), len(b)), -2):
        own = [dims[axis] for dims in (a, b) if len(dims) >= -axis]
        wide = [dim for dim in own if dim.size != 1]
        for other in wide[1:]:
            unify(wide[0], other)
        outer.append(wide[0] if wide else own[0])
    if outer:
        _name(outer[-1], "heads")
        _name(a[-1], "head_dim")
        _name(b[-1], "head_dim")
    return [*outer, a[-2], b[-1]]


def _name(dim: Dim, role: str) -> None:
    for variable in resolve(dim).variables:
        variable.role = variable.role or role


@_handles("scaled_dot_product_attention")
def _attention(found: Axes, node: fx.Node) -> list[Dim]:
    q, k, v = (list(found.of[n]) for n in node.args[:3])  # type: ignore[index]
    unify(q[-1], k[-1])
    unify(k[-2], v[-2])
    for axis in range(len(q) - 2):
        unify(q[axis], k[axis])
        unify(k[axis], v[axis])
    _name(q[-3], "heads")
    _name(q[-1], "head_dim")
    _name(v[-1], "head_dim")
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    if isinstance(mask, fx.Node) and mask in found.of:
        for own, wanted in zip(reversed(found.of[mask]), [k[-2], q[-2], *reversed(q[:-2])], strict=False):
            if own.size != 1:
                unify(own, wanted)
    return [*q[:-1], v[-1]]


@_handles("linear")
def _functional_linear(found: Axes, node: fx.Node) -> list[Dim]:
    x, weight = (list(found.of[n]) for n in node.args[:2])  # type: ignore[index]
    unify(x[-1], weight[1])
    bias = node.args[2] if len(node.args) > 2 else None
    if isinstance(bias, fx.Node):
        unify(weight[0], found.of[bias][0])
    return [*x[:-1], weight[0]]


@_handles("layer_norm")
def _layer_norm(found: Axes, node: fx.Node) -> list[Dim]:
    x = _first(found, node)
    shape: Any = node.args[1]
    if len(shape) > 1:
        tie(x[-len(shape) :], f"{node.name} normalises over several axes")
    for own in node.args[2:4]:
        if isinstance(own, fx.Node):
            unify(x[-1], found.of[own][-1])
    return x
