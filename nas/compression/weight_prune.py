"""Unstructured weight pruning: small weights become zeros, stay zeros while the rest is trained, and take no space."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import nn

from nas.compression.base import Loss, Pass, layers_of, passes
from nas.compression.choose import chosen
from nas.compression.sparse import store_sparse
from nas.errors import CompressionError

CHILD = "weight_prune_masks"
KINDS = ("sparsity", "threshold")


class Masks(nn.Module):
    """Which weights of a model may not be zero; sets all others to zero before every forward, as a child of the model.

    The masks belong to layer names and not to layers: what a later pass puts in a layer's place, such as one that
    simulates few bits, stays sparse too. They are buffers, so they are saved and loaded with the weights.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.names = list(masks)
        for i, mask in enumerate(masks.values()):
            self.register_buffer(f"mask{i}", mask)
        self._model = (model,)  # in a tuple: the model is no child of its child
        model.register_forward_pre_hook(self._before)
        model.add_module(CHILD, self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x  # a Sequential calls its every child

    def train(self, mode: bool = True) -> Masks:
        """The last step of a training is followed by no forward; what is saved or exported then has its zeros too."""
        super().train(mode)
        self.enforce()
        return self

    @torch.no_grad()
    def enforce(self) -> None:
        """Set what is masked to zero, in place. A layer that is no longer there with this shape is left alone."""
        modules = dict(self._model[0].named_modules())
        for i, name in enumerate(self.names):
            weight, mask = getattr(modules.get(name), "weight", None), self.get_buffer(f"mask{i}")
            if isinstance(weight, nn.Parameter) and weight.shape == mask.shape:
                weight.masked_fill_(~mask, 0.0)

    def _before(self, module: nn.Module, args: Any) -> None:
        if not (torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export()):  # what is exported has its zeros
            self.enforce()


@passes.register("weight_prune")
class WeightPrune(Pass):
    """Sets the smallest weights of named convolutions and linear layers to zero (Han et al. 2015, "Learning both
    Weights and Connections for Efficient Neural Networks"): w becomes 0 where \\|w\\| is among the smallest or below a
    threshold. The rest is trained on under the mask.

    ``settings`` maps a layer name to the share of its weights to remove, in [0, 1), or to ``{"threshold": t}``.
    The exported file stores sparse layers as one bit a weight and the weights that are left; onnxruntime decodes them
    when it loads, so that size shrinks and speed stays. Biases are not pruned.
    """

    stores = True

    @classmethod
    def settings_for(  # type: ignore[override]
        cls,
        model: nn.Module,
        sample: torch.Tensor,
        loss: Loss | None = None,
        *,
        sparsity: float | None = None,
        threshold: float | None = None,
        scope: str = "global",
        layers: Sequence[str] = ("*",),
        skip: Sequence[str] = (),
    ) -> dict[str, Any]:
        """The share of weights to remove from every layer.

        Args:
            sparsity: share of all weights to remove, in [0, 1); 0.8 where ``threshold`` is not given either.
            threshold: remove the weights of a smaller magnitude, instead.
            scope: ``global``: the smallest weights of the model, wherever they are; ``layer``: the same share of each
                layer. A threshold is the same in both.
            layers: patterns (``*``, ``?``, ``[ab]``) of the layers to prune.
            skip: patterns of the layers to leave, which overrule ``layers``.

        Raises:
            CompressionError: an option is out of range, or a pattern fits no layer.
        """
        if sparsity is not None and threshold is not None:
            raise CompressionError("weight_prune: both sparsity and threshold are given.", expected="one of them")
        if scope not in ("global", "layer"):
            raise CompressionError(f"weight_prune: unknown scope {scope!r}.", expected="global or layer")
        weights: dict[str, torch.Tensor] = {
            name: _weight(model.get_submodule(name), name)
            for name in chosen(model, layers, skip, "weight_prune")
        }
        asked = {"threshold": threshold} if threshold is not None else 0.8 if sparsity is None else sparsity
        kind, value = _asked("*", asked)
        if kind == "threshold" or scope == "layer":
            return {name: {kind: value} if kind == "threshold" else value for name in weights}
        sizes = torch.cat([weight.abs().flatten() for weight in weights.values()])
        owners = torch.cat([torch.full((weight.numel(),), i) for i, weight in enumerate(weights.values())])
        smallest = owners[torch.argsort(sizes, stable=True)[: round(value * len(sizes))]]
        lost = torch.bincount(smallest, minlength=len(weights)).tolist()
        # One weight of each layer stays: a sparsity of 1 is none.
        return {
            name: min(k, weight.numel() - 1) / weight.numel()
            for k, (name, weight) in zip(lost, weights.items(), strict=True)
        }

    def apply(self, model: nn.Module, sample: torch.Tensor, loss: Loss | None = None) -> nn.Module:
        masks: dict[str, torch.Tensor] = {}
        for name, setting in self.settings.items():
            kind, value = _asked(name, setting)
            for piece, layer in layers_of(model, name, "weight_prune").items():
                masks[piece] = _mask(_weight(layer, piece), kind, value)
        self.restore(model)  # masks that are there already: they go, their zeros stay
        if masks:
            Masks(model, masks).train(model.training)
        return model

    def restore(self, model: nn.Module) -> nn.Module:
        # Found by the hook: the copy of a traced module has no children but those that its graph calls.
        for key, hook in list(model._forward_pre_hooks.items()):
            masks = getattr(hook, "__self__", None)
            if isinstance(masks, Masks):
                masks.enforce()
                del model._forward_pre_hooks[key]
        if hasattr(model, CHILD):
            delattr(model, CHILD)
        return model

    def rewrite(self, model: onnx.ModelProto, calibration: npt.NDArray[np.float32]) -> onnx.ModelProto:
        names = {tensor.name for tensor in model.graph.initializer}
        return store_sparse(model, {name for name in names if any(_of(name, layer) for layer in self.settings)})


def _weight(layer: nn.Module, name: str) -> torch.Tensor:
    weight = layer._parameters.get("weight")
    if weight is None:
        raise CompressionError(
            f"weight_prune: {name!r} is a {type(layer).__name__}, whose weights another pass trains.",
            expected="weight_prune before cluster",
        )
    return weight.detach()


def _asked(name: str, setting: Any) -> tuple[str, float]:
    """Kind and value of a setting."""
    kind, value = "sparsity", setting
    if isinstance(setting, Mapping):
        if len(setting) != 1 or next(iter(setting)) not in KINDS:
            raise CompressionError(
                f"weight_prune: {dict(setting)!r} for {name!r}.", expected="{'sparsity': share} or {'threshold': size}"
            )
        kind, value = next(iter(setting.items()))
    limit, expected = (1, "a share in [0, 1)") if kind == "sparsity" else (math.inf, "a number of at least 0")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < limit:
        raise CompressionError(f"weight_prune: {kind} {value!r} for {name!r}.", expected=expected)
    return kind, float(value)


def _mask(weight: torch.Tensor, kind: str, value: float) -> torch.Tensor:
    """True where a weight stays; of the shape and memory layout of ``weight``."""
    mask = torch.ones_like(weight, dtype=torch.bool)
    if kind == "threshold":
        return weight.abs() >= value
    lost = torch.argsort(weight.abs().flatten(), stable=True)[: round(value * weight.numel())]
    flat = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
    flat[lost] = False
    return mask.copy_(flat.view(weight.shape))


def _of(initializer: str, layer: str) -> bool:
    """Whether an initializer holds the layer's weights or those of its pieces.

    The export names the copy for a second reader ``/node_layer.weight``.
    """
    name = initializer.removesuffix("_quantized")
    names = [name[i + 1 :] for i, sign in enumerate(name) if sign == "_"] if name.startswith("/") else [name]
    return any(n == f"{layer}.weight" or (n.startswith(f"{layer}.") and n.endswith(".weight")) for n in names)
