"""k-bit quantisation: simulated with straight-through gradients while training, real integer operators at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import nn

from nas.compression.base import Loss, Pass, passes
from nas.compression.choose import chosen, plain_layers_of
from nas.compression.fake_quant import ActivationQuantizer, QuantConv2d, QuantLinear, Setting
from nas.compression.fold import consumers, fold_batchnorm, replace_module
from nas.compression.groups import evaluating
from nas.compression.qdq import layer_nodes, pieces_of, store_weights, take_ranges, to_dynamic, to_integers
from nas.compression.storage import spell_out
from nas.errors import CompressionError


@passes.register("quantize")
class Quantize(Pass):
    """Quantisation of named convolutions and linear layers: ``settings`` maps a layer name to bits or to a mapping.

    ``b`` (2..8) means weights of ``b`` bits and an input of 8. A mapping sets ``weights`` (2..8), ``activations``
    (2..8, or None for floats: only the file gains), ``symmetric`` (of the weights) and ``dynamic`` (input ranges found
    while the model runs; linear layers only): :class:`~nas.compression.fake_quant.Setting`.

    Training simulates the integer arithmetic (Jacob et al. 2018, "Quantization and Training of Neural Networks
    for Efficient Integer-Arithmetic-Only Inference"): batch normalisation is folded first, weights are rounded
    per channel, activations affine per tensor, gradients pass straight through. The exported model carries real
    QuantizeLinear/DequantizeLinear pairs around exactly those layers, which onnxruntime fuses into integer kernels.
    Weights below 8 bits are int8 to these kernels, on the coarser grid, and are stored in as many bits as they have
    (:mod:`~nas.compression.storage`). Scales are those of the training.

    A convolution's result is rounded too, because what follows it goes on in integers. A linear layer's is not:
    between the linear layers of a transformer stand operators that have no integer kernel.
    """

    @classmethod
    def settings_for(  # type: ignore[override]
        cls,
        model: nn.Module,
        sample: torch.Tensor,
        loss: Loss | None = None,
        *,
        bits: int = 8,
        weights: int | None = None,
        activations: int | str | None = "default",
        symmetric: bool = True,
        dynamic: bool = False,
        layers: Sequence[str] = ("*",),
        skip: Sequence[str] = (),
    ) -> dict[str, Any]:
        """One setting for all layers, or for some.

        Args:
            bits: of the weights, 2..8.
            weights: the same by its longer name; it wins.
            activations: bits of the layers' inputs, 2..8; None leaves them in floats; "default" is 8.
            symmetric: the weights' range is -max..max; otherwise min..max (below 8 bits, or with float activations).
            dynamic: input ranges are found while the model runs; takes the linear layers alone.
            layers, skip: patterns (``*``, ``?``) of the names that are quantised, and of those that stay float.
        """
        asked = {
            "weights": bits if weights is None else weights,
            "activations": 8 if activations == "default" else activations,
            "symmetric": symmetric,
            "dynamic": dynamic,
        }
        kinds = (nn.Linear,) if dynamic is True else (nn.Conv2d, nn.Linear)
        return {name: Setting.of(asked, name).written() for name in chosen(model, layers, skip, "quantize", kinds)}

    def apply(self, model: nn.Module, sample: torch.Tensor, loss: Loss | None = None) -> nn.Module:
        settings: dict[str, Setting] = {}
        for name, value in self.settings.items():
            for piece, layer in plain_layers_of(model, name, "quantize").items():
                settings[piece] = Setting.of(value, name)
                if settings[piece].dynamic and isinstance(layer, nn.Conv2d):
                    raise CompressionError(
                        f"quantize: dynamic ranges for the Conv2d {name!r}.",
                        expected="a Linear layer; integer convolutions need ranges that are known beforehand",
                    )
        fold_batchnorm(model, settings)
        modules = dict(model.named_modules())
        # Only a convolution asks what follows it; models without need not be traceable.
        followers = consumers(model) if any(isinstance(modules[name], nn.Conv2d) for name in settings) else {}
        for name, setting in settings.items():
            layer = model.get_submodule(name)
            if isinstance(layer, nn.Conv2d):
                users = _past_identities(name, followers, modules)
                activated = len(users) == 1 and isinstance(modules.get(users[0]), nn.ReLU | nn.ReLU6)
                replace_module(model, name, QuantConv2d(layer, setting, setting.integer and not activated))
            elif isinstance(layer, nn.Linear):
                replace_module(model, name, QuantLinear(layer, setting))
        self._calibrate(model, sample)
        return model

    @staticmethod
    def _calibrate(model: nn.Module, sample: torch.Tensor) -> None:
        """First activation ranges from real data; normalisation statistics stay as they are."""
        with evaluating(model), torch.no_grad():
            for module in model.modules():
                if isinstance(module, ActivationQuantizer):
                    module.train()
            model(sample)

    def restore(self, model: nn.Module) -> nn.Module:
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantConv2d | QuantLinear):
                replace_module(model, name, module.plain())
        return model

    def rewrite(self, model: onnx.ModelProto, calibration: npt.NDArray[np.float32]) -> onnx.ModelProto:
        settings = {
            piece: Setting.of(value, name) for name, value in self.settings.items() for piece in pieces_of(model, name)
        }
        changed = onnx.ModelProto()
        changed.CopyFrom(model)
        layers = layer_nodes(changed)
        changed = spell_out(changed, [tensor for name in settings for tensor in layers[name].input[1:]])
        ranges = take_ranges(changed)
        static = {name: setting for name, setting in settings.items() if setting.integer}
        if static:  # the quantiser takes an empty list for "everything"
            changed = to_integers(changed, static, ranges, calibration)
        to_dynamic(changed, {name: setting for name, setting in settings.items() if setting.dynamic})
        store_weights(changed, {name: setting for name, setting in settings.items() if setting.activations is None})
        return changed


def _past_identities(name: str, followers: dict[str, list[str]], modules: dict[str, Any]) -> list[str]:
    users = followers.get(name, [])
    while len(users) == 1 and isinstance(modules.get(users[0]), nn.Identity):
        users = followers.get(users[0], [])
    return users
