"""A traced forward without what does nothing to its result: checks, casts to the same type, masks looked up by number.

Libraries write their models for many uses, a cache of earlier tokens or masks of any pattern among them. What is left
of that in the graph costs a call each time, and hides from the search what belongs together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from nas.tracing.trace import BATCH, is_reshape, mark_constants, opname, shape_of

aten: Any = torch.ops.aten
BROADCAST = ("add", "sub", "mul", "div", "where", "bitwise_and", "bitwise_or", "__and__", "__or__", "logical_and")


def simplify(module: fx.GraphModule) -> None:
    """Leave out of a traced graph, in place, what the result does not need; the result is the same for all inputs."""
    graph = module.graph
    for node in list(graph.nodes):
        if opname(node) == "_assert_tensor_metadata":
            graph.erase_node(node)
            continue
        same = _same(node)
        if same is not None:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
        elif opname(node) == "index":
            _looked_up(graph, node)
    graph.eliminate_dead_code()
    mark_constants(graph)
    _stored(module)
    layers = dict(module.named_modules())
    for node in list(graph.nodes):
        if node.op == "call_module" and isinstance(layers[str(node.target)], nn.Linear):
            _by_rows(node)
    for node in list(graph.nodes):
        if node.op != "placeholder" and node.users:
            _one_row(graph, node, layers)
    graph.eliminate_dead_code()


def _tensor(node: Any) -> torch.Tensor | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def _same(node: fx.Node) -> fx.Node | None:
    """The input whose value a node hands on as it is, or nothing."""
    name, args = opname(node), node.args
    if name in ("cat", "concat"):
        given: Any = args[0]
        full = [n for n in given if shape_of(n) != (0,)]  # a cache that is empty yet
        return full[0] if len(full) == 1 and len(given) > 1 and shape_of(full[0]) == shape_of(node) else None
    if name not in ("to", "_to_copy", "type_as", "slice", "add", "sub"):
        return None
    before: Any = args[0]
    x, own = _tensor(before), _tensor(node)
    if x is None or own is None or (x.dtype, x.device) != (own.dtype, own.device):
        return None
    if shape_of(before) != shape_of(node) or (name in ("add", "sub") and not _is_zero(args[1])):
        return None
    return before if name != "slice" or args[4:5] in ((), (1,)) else None


def _is_zero(value: Any) -> bool:
    return isinstance(value, int | float) and value == 0


def _by_rows(node: fx.Node) -> None:
    """A linear layer on rows, for which samples and tokens were one axis, is one on its last axis, as others are."""
    rows: Any = node.args[0]
    if not is_reshape(rows):
        return
    x: Any = rows.args[0]
    shape = (*shape_of(x)[:-1], shape_of(node)[-1])
    if shape_of(x)[-1] != shape_of(rows)[-1] or not all(is_reshape(n) and shape_of(n) == shape for n in node.users):
        return
    users = list(node.users)
    node.args = (x,)
    node.meta = {**node.meta, "val": users[0].meta["val"]}
    for user in users:
        user.replace_all_uses_with(node)


def _looked_up(graph: fx.Graph, node: fx.Node) -> None:
    """``x[rows, columns]`` that gives all of ``x`` in its order becomes a reshape.

    Libraries build the mask of attention so, by the numbers of sample and token. Tried on places that all differ.
    """
    given: Any = node.args
    indices = [None if index is None else _computed(index) for index in given[1]]
    if any(index is None for index in indices) or None in given[1]:
        return
    size = shape_of(given[0])
    places = torch.arange(int(torch.tensor(size).prod())).reshape(size)
    found = places[tuple(indices)]
    if found.shape[0] != BATCH or not torch.equal(found.flatten(), places.flatten()):
        return
    with graph.inserting_before(node):
        new = graph.call_function(aten.reshape.default, (given[0], [-1, *found.shape[1:]]))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)


def _computed(node: fx.Node) -> torch.Tensor | None:
    """The value of whole numbers that are counted and not read of the data, for the batch of the trace."""
    if node.op == "call_method" and node.target == "size":
        return torch.tensor(BATCH)
    if node.op != "call_function" or not isinstance(_tensor(node), torch.Tensor):
        return None
    known = {n: _computed(n) for n in node.all_input_nodes}
    if any(value is None for value in known.values()) or node.meta["val"].dtype.is_floating_point:
        return None

    def value(n: fx.Node) -> Any:
        found = known[n]
        return BATCH if n.op == "call_method" else found

    args = fx.map_arg(node.args, value)
    kwargs = {key: v for key, v in node.kwargs.items() if key not in ("device", "pin_memory", "layout")}
    target: Any = node.target
    result = target(*args, **fx.map_arg(kwargs, value))
    return result if isinstance(result, torch.Tensor) else None


def _stored(module: fx.GraphModule) -> None:
    """What is computed of no parameters, the numbers of positions or a mask of windows, becomes a buffer."""
    values: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value = _attribute(module, str(node.target))
            if not isinstance(value, nn.Parameter):
                values[node] = value
        elif node.op == "call_function" and all(n in values for n in node.all_input_nodes):
            args, kwargs = (fx.map_arg(given, values.__getitem__) for given in (node.args, node.kwargs))
            values[node] = node.target(*args, **kwargs)
    for node in list(module.graph.nodes):
        value = values.get(node)
        if node.op != "call_function" or not isinstance(value, torch.Tensor) or all(n in values for n in node.users):
            continue
        name = f"{STORED}.{node.name}"
        module.add_submodule(STORED, _attribute(module, STORED) if hasattr(module, STORED) else nn.Module())
        module.get_submodule(STORED).register_buffer(node.name, value.detach().clone())
        with module.graph.inserting_before(node):
            new = module.graph.create_node("get_attr", name)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
    module.graph.eliminate_dead_code()


STORED = "stored"


def _attribute(module: nn.Module, path: str) -> Any:
    parent, _, leaf = path.rpartition(".")
    return getattr(module.get_submodule(parent), leaf)


def _one_row(graph: fx.Graph, node: fx.Node, layers: dict[str, nn.Module]) -> None:
    """What is repeated for every sample, only to be added or looked up, is there once: zeros for token types."""
    own = _tensor(node)
    if own is None or not own.ndim or shape_of(node)[0] != BATCH or isinstance(own.shape[0], int):
        return
    given: Any = node.args
    if not _broadcasts(node, layers):
        return
    with graph.inserting_before(node):
        if opname(node) in ("zeros_like", "ones_like"):
            make = aten.zeros.default if opname(node) == "zeros_like" else aten.ones.default
            new = graph.call_function(make, ([1, *shape_of(node)[1:]],), {"dtype": own.dtype})
        elif node.op == "call_method" and node.target == "expand" and _is_row(given[0]):
            new = graph.call_method("expand", (given[0], 1, *given[2:]))
        else:
            return
    new.meta = {**node.meta, "val": own[:1]}
    _cut(node)
    node.replace_all_uses_with(new)
    mark_constants(graph)


def _is_row(node: fx.Node) -> bool:
    shape = shape_of(node)
    return bool(node.meta["constant"]) and bool(shape) and shape[0] == 1


def _broadcasts(node: fx.Node, layers: dict[str, nn.Module]) -> bool:
    """Whether all that read a value would read one row of it as the same."""
    rank = len(shape_of(node))
    for user in node.users:
        others = [n for n in user.all_input_nodes if n is not node and _tensor(n) is not None]
        if any(_is_batch(n) and len(shape_of(n)) == rank for n in others) and opname(user) in BROADCAST:
            continue
        looked_up = user.op == "call_module" and isinstance(layers[str(user.target)], nn.Embedding)
        alone = opname(user) in BROADCAST and not any(_is_batch(n) for n in others) and len(shape_of(user)) == rank
        if not (looked_up or alone) or not _broadcasts(user, layers):
            return False
    return bool(node.users)


def _is_batch(node: fx.Node) -> bool:
    """Whether a value has samples, and is not the same for all of them."""
    return shape_of(node)[:1] == (BATCH,) and opname(node) not in ("zeros_like", "ones_like", "expand")


def _cut(node: fx.Node) -> None:
    """One row in what only such readers make of one row."""
    for user in node.users:
        if not any(_is_batch(n) for n in user.all_input_nodes if n is not node and _tensor(n) is not None):
            user.meta["val"] = user.meta["val"][:1]
            _cut(user)
