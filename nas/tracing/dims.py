"""What the sizes of a traced model are made of, and which of them may shrink together.

Every axis of every tensor is written as variables: a convolution's output channels are one, the output of a fused
q, k, v projection is the product of 3, the heads and the dimensions of a head, a concatenation is a sum. An operator
says which of its axes are the same. What is left unbound at the end are the *groups*: sizes that may be chosen freely,
each with every slice of every parameter that belongs to it. (torch-pruning's dependency graph, Fang et al. 2023,
"DepGraph: Towards Any Structural Pruning", finds such groups of layers; here an axis may also be a product, so that
heads, and the numbers in a reshape, are part of it.)

An operator that is not known here ties its inputs to their sizes and is told of, so nothing is pruned that should not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from nas.tracing.trace import BATCH, shape_of


class Var:
    """A size that may be chosen, unless it is tied.

    Attributes:
        size: as the model has it.
        name: of the layer whose outputs it counts.
        role: "" for channels or units, "heads" or "head_dim" in attention.
        tied: why it has to stay, or "".
        bound: what it turned out to be made of, or nothing.
    """

    def __init__(self, size: int, name: str, role: str = "", tied: str = "") -> None:
        self.size, self.name, self.role, self.tied = size, name, role, tied
        self.bound: Dim | None = None

    def __repr__(self) -> str:
        return f"{self.name}{'.' + self.role if self.role else ''}[{self.size}]"


Factor = Var | int
Product = tuple[Factor, ...]


@dataclass(frozen=True)
class Dim:
    """An axis: a sum of products, in the order in which they lie in memory."""

    terms: tuple[Product, ...]

    @property
    def size(self) -> int:
        """As the model has it."""
        return sum(math.prod(_size(f) for f in term) for term in self.terms)

    @property
    def variables(self) -> list[Var]:
        """Every variable in it, as far as it is known."""
        return [f for term in self.terms for f in term if isinstance(f, Var)]

    def sized(self, sizes: dict[Var, int]) -> int:
        """Its size where the variables have others; resolved axes only."""
        return sum(math.prod(sizes.get(f, f.size) if isinstance(f, Var) else f for f in term) for term in self.terms)

    def kept(self, chosen: dict[Var, torch.Tensor]) -> torch.Tensor:
        """Which places of the axis are kept, where of a variable the places ``chosen`` are; resolved axes only."""
        start, found = 0, []
        for term in self.terms:
            places = torch.zeros(1, dtype=torch.long)
            for f in term:
                own = chosen.get(f) if isinstance(f, Var) else None
                own = torch.arange(_size(f)) if own is None else own
                places = (places[:, None] * _size(f) + own[None, :]).flatten()
            found.append(start + places)
            start += math.prod(_size(f) for f in term)
        return torch.cat(found)

    def place(self, variable: Var) -> torch.Tensor:
        """Place of the variable that every place of the axis belongs to, ``[size]``, -1 where none."""
        found = []
        for term in self.terms:
            places = torch.full((1,), -1, dtype=torch.long)
            for f in term:
                own = torch.arange(_size(f)) if f is variable else torch.full((_size(f),), -1)
                places = torch.maximum(places[:, None], own[None, :]).flatten()
            found.append(places)
        return torch.cat(found)


def _size(factor: Factor) -> int:
    return factor.size if isinstance(factor, Var) else factor


def constant(size: int) -> Dim:
    """An axis that stays."""
    return Dim(((),) if size == 1 else ((size,),))


def resolve(dim: Dim) -> Dim:
    """The axis by what its variables were bound to."""
    terms: list[Product] = []
    for term in dim.terms:
        if len(term) == 1 and isinstance(term[0], Var) and term[0].bound is not None:
            terms += resolve(term[0].bound).terms
            continue
        factors: list[Factor] = []
        for f in term:
            inner = resolve(f.bound) if isinstance(f, Var) and f.bound is not None else None
            if inner is None:
                factors.append(f)
            elif len(inner.terms) == 1:
                factors += inner.terms[0]
            else:  # a sum within a product has no simple order
                tie([inner], "a concatenation is reshaped")
                factors.append(_size(f))
        terms.append(tuple(factors))
    whole = Dim(tuple(terms))
    return whole if len(terms) == 1 or whole.variables else constant(whole.size)


def tie(dims: Iterable[Dim], reason: str) -> None:
    """Whatever these axes are made of stays as it is."""
    for dim in dims:
        for variable in resolve(dim).variables:
            variable.tied = variable.tied or reason


def unify(a: Dim, b: Dim) -> None:
    """The two axes are one. Where their structures do not fit, both are tied."""
    a, b = resolve(a), resolve(b)
    if a == b:
        return
    if a.size == b.size and len(a.terms) == len(b.terms) == 1 and _aligned(a.terms[0], b.terms[0]):
        return
    for one, other in ((a, b), (b, a)):
        alone = one.terms[0][0] if len(one.terms) == 1 and len(one.terms[0]) == 1 else None
        if isinstance(alone, Var) and a.size == b.size and len(other.terms) > 1:
            if alone.tied:
                tie([other], alone.tied)
            alone.bound = other
            return
    if a.size == b.size and len(a.terms) == len(b.terms):
        pairs = list(zip(a.terms, b.terms, strict=True))
        if all(Dim((x,)).size == Dim((y,)).size for x, y in pairs):
            for x, y in pairs:
                unify(Dim((x,)), Dim((y,)))
            return
    tie([a, b], "axes of different make-up meet")


def _aligned(a: Product, b: Product) -> bool:
    """Bind the factors of two products of one size to each other; False where they interleave."""
    left, right = list(a), list(b)
    while left and right:
        x, y = left.pop(0), right.pop(0)
        if _size(x) == _size(y):
            _same(x, y)
            continue
        small, large, rest = (x, y, right) if _size(x) < _size(y) else (y, x, left)
        if _size(large) % _size(small):
            return False
        first, second = _split(large, _size(small))
        _same(small, first)
        rest.insert(0, second)
    return not left and not right


def _split(factor: Factor, size: int) -> tuple[Factor, Factor]:
    """A factor as a product of ``size`` and the rest."""
    if isinstance(factor, int):
        return size, factor // size
    first, second = (Var(s, factor.name, tied=factor.tied) for s in (size, factor.size // size))
    factor.bound = Dim(((first, second),))
    return first, second


def _same(x: Factor, y: Factor) -> None:
    if x is y:
        return
    if isinstance(x, Var) and isinstance(y, Var):
        x.tied = x.tied or y.tied
        x.role = x.role or y.role
        y.bound = Dim(((x,),))
        return
    for f in (x, y):
        if isinstance(f, Var):
            f.tied = f.tied or "it meets a fixed size"


def reshaped(dims: Sequence[Dim], sizes: Sequence[int]) -> list[Dim] | None:
    """Axes of the same numbers in another shape, or nothing where the sizes cut through variables."""
    queue: list[Factor | Dim] = []
    for dim in map(resolve, dims):
        queue += [f for f in dim.terms[0] if f != 1] if len(dim.terms) == 1 else [dim]
    found = []
    for size in sizes:
        taken: list[Factor] = []
        room = size
        whole: Dim | None = None
        while room > 1:
            if not queue:
                return None
            head = queue.pop(0)
            if isinstance(head, Dim):
                if head.size != room or taken:
                    return None
                whole, room = head, 1
                continue
            if room % _size(head) == 0:
                taken.append(head)
                room //= _size(head)
            elif _size(head) % room == 0:
                first, second = _split(head, room)
                taken.append(first)
                queue.insert(0, second)
                room = 1
            else:
                return None
        found.append(whole or Dim((tuple(taken),)))
    return found


@dataclass(frozen=True)
class Use:
    """An axis of a parameter or buffer, by name."""

    tensor: str
    axis: int
    dim: Dim


@dataclass
class Axes:
    """What is known of a traced model.

    Attributes:
        model: as traced.
        of: node → axes of its value (a list of such where the value is a list of tensors).
        uses: every axis of every parameter and buffer.
        notes: what could not be followed, and where.
        layers: path of a layer with weights → its input and output axis.
        batch: the variable that counts samples.

    All axes are resolved.
    """

    model: fx.GraphModule
    of: dict[fx.Node, Any] = field(default_factory=dict)
    uses: list[Use] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    layers: dict[str, tuple[Dim, Dim]] = field(default_factory=dict)
    batch: Var = field(default_factory=lambda: Var(BATCH, "batch", tied="it is the batch"))

    def tensors(self, name: str) -> list[Use]:
        """Axes of one parameter or buffer."""
        return [use for use in self.uses if use.tensor == name]


def axes(model: fx.GraphModule) -> Axes:
    """Follow all axes through a traced model."""
    found = Axes(model)
    modules = dict(model.named_modules())
    for node in model.graph.nodes:
        _visit(found, node, modules)
    found.uses = [Use(use.tensor, use.axis, resolve(use.dim)) for use in found.uses]
    found.layers = {path: (resolve(x), resolve(out)) for path, (x, out) in found.layers.items()}
    found.of = {node: _resolved(dims) for node, dims in found.of.items()}
    return found


def _resolved(dims: Any) -> Any:
    return [_resolved(item) if isinstance(item, list) else resolve(item) for item in dims]


def _visit(found: Axes, node: fx.Node, modules: dict[str, nn.Module]) -> None:
    if node.op == "placeholder":
        found.of[node] = _plain(found, node.meta["val"])
    elif node.op == "get_attr":
        found.of[node] = _attribute(found, node)
    elif node.op == "output":
        tie(found.of[node.args[0]], "it is the model's output")  # type: ignore[index]
    elif node.op == "call_module":
        x = found.of[node.args[0]]  # type: ignore[index]
        found.of[node] = _module(found, node, str(node.target), modules[str(node.target)], x)
    elif node.op == "call_method" and node.target == "size":
        return
    else:
        name = getattr(node.target, "_opname", getattr(node.target, "__name__", str(node.target)))
        inputs = [found.of[n] for n in node.all_input_nodes if n in found.of]
        if not inputs or not _is_tensor(node):
            if _is_tensor(node):
                found.of[node] = _plain(found, node.meta["val"])
            return
        handler = HANDLERS.get(name)
        result = handler(found, node) if handler is not None else None
        if result is None:
            _opaque(found, node, inputs, f"operator {name} ({node.name}) is not followed")
        else:
            found.of[node] = result


def _is_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) or (
        isinstance(value, tuple | list) and all(isinstance(v, torch.Tensor) for v in value)
    )


def _opaque(found: Axes, node: fx.Node, inputs: Sequence[Any], reason: str) -> None:
    """Tie all inputs, so that the node's own shape stays as it is."""
    free = [v for dims in inputs for dim in flat(dims) for v in resolve(dim).variables if not v.tied]
    for dims in inputs:
        tie(flat(dims), reason)
    if free:
        found.notes.append(f"{reason}: {', '.join(sorted({str(v) for v in free}))} stay as they are")
    found.of[node] = _plain(found, node.meta["val"])


def _plain(found: Axes, value: Any) -> Any:
    """Axes of a tensor, or of each of several, as they are: all fixed but for the batch."""
    if not isinstance(value, torch.Tensor):
        return [_plain(found, v) for v in value]
    return [
        constant(size) if isinstance(size, int) else
        Dim(((found.batch, _int(size) // BATCH),)) if _int(size) > BATCH else Dim(((found.batch,),))
        for size in value.shape
    ]  # fmt: skip


def _int(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def flat(dims: Any) -> list[Dim]:
    """Axes of a value, of all tensors where it is several."""
    return [d for item in dims for d in (flat(item) if isinstance(item, list) else [item])]


def _attribute(found: Axes, node: fx.Node) -> list[Dim]:
    name = str(node.target)
    known = {use.axis: use.dim for use in found.uses if use.tensor == name}
    dims = []
    for axis, size in enumerate(shape_of(node) if "val" in node.meta else _tensor(found.model, name).shape):
        dim = known.get(axis) or (constant(1) if size == 1 else Dim(((Var(size, name),),)))
        if axis not in known:
            found.uses.append(Use(name, axis, dim))
        dims.append(dim)
    return dims


def _tensor(model: nn.Module, name: str) -> torch.Tensor:
    parent, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(parent), leaf)


# ---- layers ---------------------------------------------------------------------------------------

ELEMENTWISE: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.ELU,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Identity, nn.Softmax,
)  # fmt: skip
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def _module(found: Axes, node: fx.Node, path: str, layer: nn.Module, x: list[Dim]) -> list[Dim]:
    if isinstance(layer, ELEMENTWISE):
        return x
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        return _conv(found, node, path, layer, x)
    if isinstance(layer, nn.Linear):
        return [*x[:-1], _weighted(found, path, layer, x[-1], layer.out_features)]
    if isinstance(layer, nn.Embedding):
        dim = _out(found, path, layer.embedding_dim)
        _use(found, f"{path}.weight", 0, constant(layer.num_embeddings))
        _use(found, f"{path}.weight", 1, dim)
        found.layers[path] = (constant(layer.num_embeddings), dim)
        return [*x, dim]
    if isinstance(layer, NORMS):
        for name in ("weight", "bias", "running_mean", "running_var"):
            if getattr(layer, name) is not None:
                _use(found, f"{path}.{name}", 0, x[1])
        return x
    if isinstance(layer, nn.LayerNorm):
        if len(layer.normalized_shape) > 1:
            tie(x[-len(layer.normalized_shape) :], f"{path} normalises over several axes")
        else:
            for name in ("weight", "bias"):
                if getattr(layer, name) is not None:
                    _use(found, f"{path}.{name}", 0, x[-1])
            found.layers[path] = (x[-1], x[-1])
        return x
    if isinstance(layer, nn.GroupNorm):
        tie([x[1]], f"{path} normalises by groups of channels")
        return x
    if isinstance(layer, nn.AdaptiveAvgPool2d | nn.AvgPool2d | nn.MaxPool2d):
        return [*x[:-2], *(constant(size) for size in shape_of(node)[-2:])]
    if isinstance(layer, nn.Flatten):
        return _shaped(found, node, x)
    raise AssertionError(f"{type(layer).__name__} is traced as a layer and not followed as one")


def _use(found: Axes, tensor: str, axis: int, dim: Dim) -> None:
    """An axis of a tensor; where the tensor is used twice, both uses are one."""
    for use in found.uses:
        if use.tensor == tensor and use.axis == axis:
            unify(use.dim, dim)
            return
    found.uses.append(Use(tensor, axis, dim))


def _out(found: Axes, path: str, size: int) -> Dim:
    """The output axis of a layer, the same for each of its calls."""
    if path in found.layers:
        return found.layers[path][1]
    return Dim(((Var(size, path),),)) if size > 1 else constant(1)


def _weighted(found: Axes, path: str, layer: Any, x: Dim, size: int) -> Dim:
    out = _out(found, path, size)
    _use(found, f"{path}.weight", 1, x)
    _use(found, f"{path}.weight", 0, out)
    if layer.bias is not None:
        _use(found, f"{path}.bias", 0, out)
    found.layers[path] = (x, out)
    return out


def _conv(found: Axes, node: fx.Node, path: str, layer: nn.Conv1d | nn.Conv2d, x: list[Dim]) -> list[Dim]:
    sides = [constant(size) for size in shape_of(node)[2:]]
    if layer.groups == 1:
        return [x[0], _weighted(found, path, layer, x[1], layer.out_channels), *sides]
    if layer.groups == layer.in_channels:  # depthwise: every channel has outputs of its own
        each = layer.out_channels // layer.in_channels
        inner = resolve(x[1])
        out = inner
        if each > 1:
            out = Dim(tuple((*term, each) for term in inner.terms))
    else:
        tie([x[1]], f"{path} is a grouped convolution")
        out = constant(layer.out_channels)
    _use(found, f"{path}.weight", 0, out)
    if layer.bias is not None:
        _use(found, f"{path}.bias", 0, out)
    found.layers[path] = (x[1], out)
    return [x[0], out, *sides]


# ---- operators ------------------------------------------------------------------------------------

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


def _shaped(found: Axes, node: fx.Node, x: list[Dim]) -> list[Dim]:
    dims = reshaped(x, shape_of(node))
    if dims is None:
        tie(x, f"{node.name} cuts through channels")
        return list(_plain(found, node.meta["val"]))
    return dims


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
    plain = _plain(found, node.meta["val"])
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
    sizes = [_int(value.shape[axis]) for value in node.meta["val"]]
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
