"""A user's model as a graph: its own forward, operator by operator, with its own layers and their names.

``torch.export`` follows the forward whatever it is written like, and keeps every shape that the forward computes as a
number in the graph. That is what makes a model prunable whose forward says ``reshape(b, n, 3, heads, dim)``: the
numbers can be changed. Layers are put back where their operators came from, so that they train, have their names, and
can be quantised or split by the compression passes.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import operator
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn

from nas.errors import CompressionError, NasError
from nas.tracing.alternatives import sink

#: Layers that stay layers, and the operator that is each one's whole forward. Of any other module the operators are
#: taken.
OPERATORS: dict[type[nn.Module], str] = {
    nn.Conv1d: "conv1d", nn.Conv2d: "conv2d", nn.Linear: "linear", nn.Embedding: "embedding",
    nn.BatchNorm1d: "batch_norm", nn.BatchNorm2d: "batch_norm", nn.LayerNorm: "layer_norm", nn.GroupNorm: "group_norm",
    nn.Dropout: "dropout", nn.Dropout1d: "feature_dropout", nn.Dropout2d: "feature_dropout",
    nn.ReLU: "relu", nn.ReLU6: "hardtanh", nn.GELU: "gelu", nn.SiLU: "silu", nn.Hardswish: "hardswish",
    nn.Hardsigmoid: "hardsigmoid", nn.Sigmoid: "sigmoid", nn.Tanh: "tanh", nn.LeakyReLU: "leaky_relu", nn.ELU: "elu",
    nn.Softmax: "softmax", nn.AdaptiveAvgPool2d: "adaptive_avg_pool2d", nn.AvgPool2d: "avg_pool2d",
    nn.MaxPool2d: "max_pool2d", nn.Flatten: "flatten",
}  # fmt: skip
LAYERS = tuple(OPERATORS)
BATCH = 3  # samples of the example that is traced: at least two, or the batch would be taken for a constant
FUNCTIONAL = "functional"  # where layers live that the forward calls as functions

aten: Any = torch.ops.aten


def trace(model: nn.Module, example: torch.Tensor) -> fx.GraphModule:
    """``model`` as a graph of its layers and operators, in evaluation mode; it shares nothing with ``model``.

    Args:
        model: a module of one tensor → one tensor.
        example: one or more samples, ``[n, *input_shape]``.

    Returns:
        A graph module with the parameter names of ``model``, whose nodes know their shapes (``node.meta["val"]``, for
        a batch of :data:`BATCH`).

    Raises:
        CompressionError: the forward cannot be followed: it depends on values, or fixes the size of the batch.
    """
    from nas.tracing.simplify import simplify

    model = copy.deepcopy(model).eval()
    program = _exported(model, _batch(example))
    graph_module: Any = program.module(check_guards=False)
    fixed = _fixed_batch(graph_module)
    if fixed is not None:
        raise CompressionError(
            f"The model's forward works for one size of batch only: {fixed} has {BATCH} rows whatever comes in.",
            expected="a forward that takes its batch size from its input, as in x.shape[0]",
        )
    _functional(graph_module.graph)
    rebuilt = _with_layers(graph_module, model)
    _free_batch(rebuilt.graph)
    simplify(rebuilt)
    sink(rebuilt)
    mark_constants(rebuilt.graph)
    rebuilt.graph.lint()
    rebuilt.recompile()
    rebuilt.delete_all_unused_submodules()
    return rebuilt.eval()


def _batch(example: torch.Tensor) -> torch.Tensor:
    repeats = -(-BATCH // len(example))
    return torch.cat([example] * repeats)[:BATCH]


def _exported(model: nn.Module, x: torch.Tensor) -> Any:
    # The fused kernels of nn.MultiheadAttention would hide its layers.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.no_grad():
                out = model(x)
            if not isinstance(out, torch.Tensor):
                raise CompressionError(
                    f"The model returns {type(out).__name__}.",
                    expected="one tensor of logits; wrap the model where it returns more",
                )
            dynamic = ({0: torch.export.Dim.DYNAMIC},)
            with _unsaid():
                return torch.export.export(model, (x,), dynamic_shapes=dynamic, strict=False)
    except NasError:
        raise
    except Exception as error:
        raise CompressionError(
            f"The model's forward cannot be traced on inputs {list(x.shape)}: {_first_line(error)}",
            expected="one tensor in, one tensor out, no control flow that depends on values, any size of batch",
            remedy="wrap what depends on values, or leave it out of the module that is traced",
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def _unsaid() -> Iterator[None]:
    """Without the graph that the exporter prints where it fails: the error says what it is about."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Shape of a node's value in the traced example, the batch as a number."""
    return tuple(number(size) for size in node.meta["val"].shape)


def opname(node: fx.Node) -> str:
    """Name of the torch operator or method that a node calls; "" where it calls a layer or a function of Python's."""
    return str(getattr(node.target, "_opname", node.target if node.op == "call_method" else ""))


def number(size: Any) -> int:
    """A size of the traced example, the batch's too."""
    return size if isinstance(size, int) else int(size.node.hint)


def _fixed_batch(module: fx.GraphModule) -> str | None:
    """Name of the model's result where that has one size of batch; nothing where it is free."""
    output = next(node for node in module.graph.nodes if node.op == "output")
    value = output.args[0][0].meta.get("val") if isinstance(output.args[0], tuple | list) else None
    if value is not None and value.ndim and isinstance(value.shape[0], int):
        return str(output.args[0][0].name)
    return None


def _functional(graph: fx.Graph) -> None:
    """Operators that write into their input become those that do not: every node is a value of its own."""
    for node in graph.nodes:
        name = opname(node)
        if node.op == "call_function" and name.endswith("_") and not name.startswith("_"):
            packet = getattr(aten, name[:-1])
            node.target = getattr(packet, node.target._overloadname)


def _with_layers(module: fx.GraphModule, model: nn.Module) -> fx.GraphModule:
    """Put layers back in place of the operators that came from them."""
    parts: dict[str, Any] = {name: value for name, value in model.named_modules() if isinstance(value, LAYERS)}
    graph = module.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        found = _layer(node, parts) or _functional_layer(node, module, parts)
        if found is None:
            continue
        path, x = found
        with graph.inserting_before(node):
            new = graph.create_node("call_module", path, (x,))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    for node in graph.nodes:
        if node.op == "get_attr":
            parts[str(node.target)] = _attribute(module, str(node.target))
        elif node.op == "output":
            node.args = (node.args[0][0] if isinstance(node.args[0], tuple | list) else node.args[0],)
    for value in parts.values():
        if hasattr(value, "inplace"):
            value.inplace = False
    used = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
    graph.set_codegen(fx.graph.CodeGen())
    return fx.GraphModule({name: parts[name] for name in used}, graph)


def _attribute(module: nn.Module, path: str) -> Any:
    parent, _, leaf = path.rpartition(".")
    value = getattr(module.get_submodule(parent), leaf)
    return value if isinstance(value, nn.Parameter | nn.Module) else value.detach()


def _layer(node: fx.Node, parts: dict[str, Any]) -> tuple[str, fx.Node] | None:
    """Path of the layer whose whole forward ``node`` is, and its input."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    path = re.sub(r"@\d+$", "", list(stack.values())[-1][0])
    layer = parts.get(path)
    if layer is None or OPERATORS.get(type(layer)) != opname(node):
        return None
    # An embedding's operator takes its weight first.
    x = node.args[1] if isinstance(layer, nn.Embedding) else node.args[0]
    return (path, x) if isinstance(x, fx.Node) else None


def _functional_layer(node: fx.Node, module: fx.GraphModule, parts: dict[str, Any]) -> tuple[str, Any] | None:
    """A layer for an operator that was called as a function, where passes want one: ReLUs and matrix products."""
    name = opname(node)
    make: Callable[[], nn.Module] | None = None
    if name == "relu":
        make = nn.ReLU
    elif name == "relu6" or (name in ("hardtanh", "clamp") and tuple(node.args[1:3]) == (0, 6) and len(node.args) == 3):
        make = nn.ReLU6
    elif name == "linear":
        offset = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        return _linear(node, module, parts, node.args[0], node.args[1], offset)
    elif name == "addmm" and not node.kwargs:
        # Products with a weight [inputs, outputs], as GPT-2's layers are written.
        return _linear(node, module, parts, node.args[1], node.args[2], node.args[0], transposed=True)
    if make is None:
        return None
    path = f"{FUNCTIONAL}.{node.name}"
    parts[path] = make()
    return path, node.args[0]


def _linear(
    node: fx.Node, module: fx.GraphModule, parts: dict[str, Any], x: Any, factor: Any, offset: Any = None,
    transposed: bool = False,
) -> tuple[str, Any] | None:
    """A Linear layer for a product with a parameter, as nn.MultiheadAttention has them."""
    if any(isinstance(n, fx.Node) and n.op != "get_attr" for n in (factor, offset)):
        return None
    target = str(factor.target)
    weight = _attribute(module, target)
    bias = None if offset is None else _attribute(module, str(offset.target))
    if not isinstance(weight, nn.Parameter) or not isinstance(bias, nn.Parameter | None):
        return None
    if transposed:
        weight = nn.Parameter(weight.detach().t().contiguous(), weight.requires_grad)
    path = re.sub(r"[._]weight$", "", target)
    if not isinstance(parts.get(path), nn.Linear | None):
        path = f"{FUNCTIONAL}.{node.name}"  # the weight is an embedding's, which stays one
    layer = parts.get(path)
    if type(layer) is not nn.Linear:
        with torch.random.fork_rng(devices=[]):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
        layer.weight = weight
        if bias is not None:
            layer.bias = bias
        parts[path] = layer
    return path, x


def _free_batch(graph: fx.Graph) -> None:
    """Sizes that are the batch: in a reshape -1, elsewhere read off the tensor.

    Methods and not operators: what an operator is given as a size is a number to the exporter, of one batch only.
    """
    for node in graph.nodes:
        if is_reshape(node) and sum(isinstance(size, fx.Node) for size in node.args[1]) == 1:
            # What the forward leaves open is known; what depends on the batch is left open instead.
            named = zip(node.args[1], shape_of(node), strict=True)
            sizes = [-1 if isinstance(size, fx.Node) else known for size, known in named]
            node.args = (node.args[0], sizes)
    graph.eliminate_dead_code()
    for node in list(graph.nodes):
        if node.op != "call_function" or opname(node) != "sym_size":
            continue
        for user in list(node.users):
            if opname(user) == "expand":
                user.op, user.target, user.args = "call_method", "expand", (user.args[0], *user.args[1])
            elif opname(user) == "arange":
                kwargs = {name: value for name, value in user.kwargs.items() if name == "dtype"}
                user.target, user.kwargs = torch.arange, kwargs
        if not node.users:
            graph.erase_node(node)
            continue
        with graph.inserting_before(node):
            new = graph.call_method("size", (node.args[0], node.args[1]))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def mark_constants(graph: fx.Graph) -> None:
    """Note in every node whether it :func:`is_constant`."""
    for node in graph.nodes:
        if node.op != "output":
            node.meta[CONSTANT] = node.op != "placeholder" and all(n.meta[CONSTANT] for n in node.all_input_nodes)


CONSTANT = "constant"


def is_constant(node: fx.Node) -> bool:
    """Whether a value is the same for all inputs: a parameter, or what is computed of parameters alone.

    The exporter stores it, so it is no work, and no part of the forward that could be priced: positions that an
    embedding looks up by number, a bias that is gathered from a table.
    """
    return bool(node.meta[CONSTANT])


def is_reshape(node: fx.Node) -> bool:
    """Whether a node gives its input another shape, named in full."""
    return node.op == "call_function" and opname(node) in RESHAPES


RESHAPES = ("reshape", "view", "_unsafe_view")
