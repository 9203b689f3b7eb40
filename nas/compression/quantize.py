"""k-bit quantisation: simulated with straight-through gradients while training, real Q/DQ operators at the end."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import nn

from nas.compression.base import Loss, Pass, named_module, passes
from nas.compression.fold import consumers, fold_batchnorm, replace_module
from nas.errors import CompressionError

MOMENTUM = 0.1
FOLLOWERS = {"Add", "GlobalAveragePool", "AveragePool", "MaxPool", "Clip", "Relu"}
LINEAR = ("Gemm", "MatMul")


class ActivationQuantizer(nn.Module):
    """Affine per-tensor fake quantisation to unsigned ``bits``, range from a running minimum and maximum."""

    low: torch.Tensor
    high: torch.Tensor
    seen: torch.Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.levels = 2**bits - 1
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.ones(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.bool))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            with torch.no_grad():
                low, high = x.detach().amin().clamp(max=0.0), x.detach().amax().clamp(min=1e-6)
                momentum = torch.where(self.seen, MOMENTUM, 1.0)
                self.low.lerp_(low, momentum)
                self.high.lerp_(high, momentum)
                self.seen.fill_(True)
        scale = (self.high - self.low) / self.levels
        zero = torch.round(-self.low / scale)
        if self.training:
            return torch.fake_quantize_per_tensor_affine(x, scale, zero.to(torch.int32), 0, self.levels)
        return _fake_quantize(x, scale, zero, 0, self.levels)


def _fake_quantize(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | float, low: int, high: int
) -> torch.Tensor:
    """The same arithmetic in plain operators: torch.export knows no fake-quantisation by tensors."""
    return (torch.clamp(torch.round(x / scale) + zero, low, high) - zero) * scale


class QuantConv2d(nn.Conv2d):
    """A convolution with fake-quantised weight (symmetric, per output channel), input and, if last, output."""

    def __init__(self, conv: nn.Conv2d, bits: int, quantize_output: bool) -> None:
        geometry: Any = _geometry(conv)
        super().__init__(*geometry)
        self.weight, self.bias = conv.weight, conv.bias
        self.top = 2 ** (bits - 1) - 1
        self.input_quantizer = ActivationQuantizer(bits)
        self.output_quantizer = ActivationQuantizer(bits) if quantize_output else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = _fake_quantize_weight(self.weight, self.top, self.training)
        return self.output_quantizer(self._conv_forward(self.input_quantizer(x), weight, self.bias))

    def plain(self) -> nn.Conv2d:
        """The float convolution with the trained weights."""
        geometry: Any = _geometry(self)
        conv = nn.Conv2d(*geometry)
        conv.weight, conv.bias = self.weight, self.bias
        return conv


class QuantLinear(nn.Linear):
    """A linear layer with fake-quantised weight (symmetric, per output unit) and input; its output stays float."""

    def __init__(self, linear: nn.Linear, bits: int) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.weight, self.bias = linear.weight, linear.bias
        self.top = 2 ** (bits - 1) - 1
        self.input_quantizer = ActivationQuantizer(bits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = _fake_quantize_weight(self.weight, self.top, self.training)
        return nn.functional.linear(self.input_quantizer(x), weight, self.bias)

    def plain(self) -> nn.Linear:
        """The float layer with the trained weights."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        linear.weight, linear.bias = self.weight, self.bias
        return linear


def _fake_quantize_weight(weight: torch.Tensor, top: int, training: bool) -> torch.Tensor:
    """``weight [out, ...]`` rounded to multiples of its largest magnitude per output channel, divided by ``top``."""
    scale = weight.detach().abs().flatten(1).amax(dim=1).clamp(min=1e-8) / top
    if training:
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -top, top)
    return _fake_quantize(weight, scale.view(-1, *[1] * (weight.ndim - 1)), 0.0, -top, top)


def _geometry(conv: nn.Conv2d) -> tuple[Any, ...]:
    """Arguments that make another convolution of the same geometry."""
    return (
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups,
        conv.bias is not None, conv.padding_mode,
    )  # fmt: skip


@passes.register("quantize")
class Quantize(Pass):
    """Static quantisation of named convolutions and linear layers: ``settings`` maps a layer name to its bits.

    Training simulates the integer arithmetic (Jacob et al. 2018, "Quantization and Training of Neural Networks
    for Efficient Integer-Arithmetic-Only Inference"): batch normalisation is folded first, weights are symmetric
    per channel, activations affine per tensor, gradients pass straight through. The exported model carries real
    QuantizeLinear/DequantizeLinear pairs around exactly those layers, which onnxruntime fuses into integer kernels.

    A convolution's result is rounded too, because what follows it goes on in integers. A linear layer's is not:
    between the linear layers of a transformer stand operators that have no integer kernel.
    """

    def apply(self, model: nn.Module, sample: torch.Tensor, loss: Loss | None = None) -> nn.Module:
        for name, bits in self.settings.items():
            layer = named_module(model, name, "quantize")
            if not isinstance(layer, nn.Conv2d | nn.Linear):
                raise CompressionError(
                    f"quantize: {name!r} is a {type(layer).__name__}.", expected="a Conv2d or Linear layer"
                )
            if bits != 8:
                raise CompressionError(f"quantize: {bits} bits for {name!r}.", expected="8")
        fold_batchnorm(model, self.settings)
        followers = consumers(model)
        modules = dict(model.named_modules())
        for name, bits in self.settings.items():
            layer = model.get_submodule(name)
            if isinstance(layer, nn.Linear):
                replace_module(model, name, QuantLinear(layer, bits))
                continue
            users = _past_identities(name, followers, modules)
            activated = len(users) == 1 and isinstance(modules.get(users[0]), nn.ReLU | nn.ReLU6)
            replace_module(model, name, QuantConv2d(cast(nn.Conv2d, layer), bits, not activated))
        self._calibrate(model, sample)
        return model

    @staticmethod
    def _calibrate(model: nn.Module, sample: torch.Tensor) -> None:
        """First activation ranges from real data; normalisation statistics stay as they are."""
        training = model.training
        model.eval()
        for module in model.modules():
            if isinstance(module, ActivationQuantizer):
                module.train()
        with torch.no_grad():
            model(sample)
        model.train(training)

    def restore(self, model: nn.Module) -> nn.Module:
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantConv2d | QuantLinear):
                replace_module(model, name, module.plain())
        return model

    def rewrite(self, model: onnx.ModelProto, calibration: npt.NDArray[np.float32]) -> onnx.ModelProto:
        nodes = quantized_nodes(model, self.settings)
        # The quantiser takes an empty list for "everything".
        return quantize_static(model, nodes, calibration) if nodes else model


def _past_identities(name: str, followers: dict[str, list[str]], modules: dict[str, Any]) -> list[str]:
    users = followers.get(name, [])
    while len(users) == 1 and isinstance(modules.get(users[0]), nn.Identity):
        users = followers.get(users[0], [])
    return users


def quantized_nodes(model: onnx.ModelProto, layers: Collection[str]) -> list[str]:
    """Names of the nodes that run in int8: the named layers' own and those that only pass their result on.

    A layer is found by the name of its weight. An addition or pooling takes the precision of the input that
    was computed last, which in a residual block is the block's own projection. A linear layer passes nothing on.
    """
    producers = {out: i for i, node in enumerate(model.graph.node) if node.op_type != "Constant" for out in node.output}
    quantized: dict[int, bool] = {}
    for i, node in enumerate(model.graph.node):
        weight = node.input[1] if len(node.input) > 1 else ""
        if node.op_type in ("Conv", *LINEAR):
            quantized[i] = weight.removesuffix(".weight") in layers
        elif node.op_type in FOLLOWERS:
            sources = [producers[x] for x in node.input if x in producers]
            last = max(sources, default=-1)
            quantized[i] = quantized.get(last, False) and model.graph.node[last].op_type not in LINEAR
    names = [node.name for i, node in enumerate(model.graph.node) if quantized.get(i)]
    weights = {
        n.input[1].removesuffix(".weight")
        for i, n in enumerate(model.graph.node)
        if quantized.get(i) and len(n.input) > 1
    }
    if missing := set(layers) - weights:
        raise CompressionError(f"quantize: no exported node carries the weights of {sorted(missing)}.")
    return names


def quantize_static(model: onnx.ModelProto, nodes: list[str], calibration: npt.NDArray[np.float32]) -> onnx.ModelProto:
    """onnxruntime's static quantiser, QDQ, uint8 activations, int8 weights per channel, on the named nodes."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as ort_quantize

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(np.array_split(calibration, max(1, len(calibration) // 64)))

        def get_next(self) -> dict[str, npt.NDArray[np.float32]] | None:
            batch = next(self.batches, None)
            return None if batch is None else {model.graph.input[0].name: batch}

    root = logging.getLogger()
    level = root.level
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        target = Path(folder) / "quantized.onnx"
        root.setLevel(logging.ERROR)  # the quantiser logs advice on the root logger
        try:
            ort_quantize(
                model, target, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, nodes_to_quantize=nodes,
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
                extra_options={"OpTypesToExcludeOutputQuantization": list(LINEAR)},
            )  # fmt: skip
        finally:
            root.setLevel(level)
        return onnx.load(target)
