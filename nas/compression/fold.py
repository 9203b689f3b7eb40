"""Folding batch normalisation into the convolution before it, so that weights are those that run."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from nas.errors import CompressionError


def fold_batchnorm(model: nn.Module, names: Collection[str] | None = None) -> nn.Module:
    """Fold every BatchNorm2d that directly follows a Conv2d (of ``names``, where given); in place.

    Returns the model, whose folded normalisations have become identities; training mode is kept.

    Raises:
        CompressionError: there may be something to fold, and the model cannot be traced.
    """
    modules = dict(model.named_modules())
    convolved = any(isinstance(modules[name], nn.Conv2d) for name in (modules if names is None else names))
    if not convolved or not any(isinstance(module, nn.BatchNorm2d) for module in modules.values()):
        return model  # which need not be traceable then
    followers = consumers(model)
    for name, users in followers.items():
        if (names is not None and name not in names) or len(users) != 1:
            continue
        conv, norm = modules[name], modules.get(users[0])
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            training = conv.training
            fused = fuse_conv_bn_eval(conv.eval(), norm.eval()).train(training)
            if fused.bias is not None:  # a bias that folding made would be frozen
                fused.bias.requires_grad_(fused.weight.requires_grad)
            replace_module(model, name, fused)
            replace_module(model, users[0], nn.Identity())
    return model


def consumers(model: nn.Module) -> dict[str, list[str]]:
    """Leaf module name → names of the modules (or function names) that read its output."""
    try:
        graph = _Tracer().trace(model)
    except Exception as error:
        raise CompressionError(
            f"The model cannot be traced: {error}.", expected="a forward without data-dependent control flow"
        ) from error
    found: dict[str, list[str]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            # A module that is called twice has the readers of both calls.
            found.setdefault(str(node.target), []).extend(
                str(user.target) if user.op == "call_module" else f"<{user.name}>" for user in node.users
            )
    return found


class _Tracer(fx.Tracer):
    """Keeps layers whole that an earlier pass put in place of torch's own, and lets buffers take the batch's size."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d | nn.Linear) or super().is_leaf_module(m, module_qualified_name)


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` where the module called ``name`` stands."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)
