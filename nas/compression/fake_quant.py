"""Simulated quantisation: layers that compute in floats what integers of few bits would, gradients straight through.

Bengio et al. 2013, "Estimating or Propagating Gradients Through Stochastic Neurons": a rounding has the slope of the
identity where it does not clip. Jacob et al. 2018, eq. 12: ``(clamp(round(x / scale) + zero) - zero) * scale``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from nas.errors import CompressionError

MOMENTUM = 0.1
BITS = range(2, 9)
REMARKS = "activation_ranges"  # attribute of a restored layer: "input" and "output" → [low, high] as trained


@dataclass(frozen=True)
class Setting:
    """How one layer is quantised.

    Attributes:
        weights: bits of a weight, 2..8, a scale per output channel.
        activations: bits of the layer's input, 2..8, one scale a tensor; None leaves it in floats.
        symmetric: whether the weights' range is -max..max (zero is code 0) or min..max.
        dynamic: whether the input's range is that of the input at hand (8 bits; linear layers only).
    """

    weights: int = 8
    activations: int | None = 8
    symmetric: bool = True
    dynamic: bool = False

    @classmethod
    def of(cls, value: Any, name: str) -> Setting:
        """Read what a plan says of layer ``name``: bits, or a mapping of the attributes.

        Raises:
            CompressionError: it cannot be done.
        """
        if not isinstance(value, dict):
            return cls(weights=_bits(value, name, "bits"))
        if unknown := set(value) - set(cls.__dataclass_fields__):
            raise CompressionError(
                f"quantize: {name!r} sets {sorted(map(str, unknown))}.",
                expected=f"bits, or some of {', '.join(cls.__dataclass_fields__)}",
            )
        found = cls(**value)
        _bits(found.weights, name, "bits for the weights")
        if found.activations is not None:
            _bits(found.activations, name, "bits for the activations", " or None for floats")
        for what in ("symmetric", "dynamic"):
            if not isinstance(getattr(found, what), bool):
                raise CompressionError(f"quantize: {what} is {getattr(found, what)!r} for {name!r}.", expected="a bool")
        if found.dynamic and found.activations != 8:
            raise CompressionError(
                f"quantize: dynamic with activations {found.activations!r} for {name!r}.",
                expected="8, the only width whose range the runtime finds itself",
            )
        if not found.symmetric and found.weights == 8 and found.activations is not None:
            raise CompressionError(
                f"quantize: asymmetric weights of 8 bits with integer activations for {name!r}.",
                expected="at most 7 bits, symmetric ones, or activations None",
                remedy="symmetric: true; integer kernels take one zero point a tensor, not one a channel",
            )
        return found

    def written(self) -> int | dict[str, Any]:
        """The shortest form that a plan can hold: bits alone where everything else is as usual."""
        usual = Setting(weights=self.weights)
        if self == usual:
            return self.weights
        differing = {key: value for key, value in vars(self).items() if value != getattr(usual, key)}
        return {"weights": self.weights, **differing}

    @property
    def integer(self) -> bool:
        """Whether it runs in integers whose activation ranges are fixed."""
        return self.activations is not None and not self.dynamic


def _bits(value: Any, name: str, what: str, besides: str = "") -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value not in BITS:
        raise CompressionError(f"quantize: {value!r} {what} for {name!r}.", expected=f"a whole number, 2..8{besides}")
    return value


class WeightGrid(NamedTuple):
    """Values ``(code - zero) * scale`` with codes ``low..high``; ``scale`` and ``zero`` are ``[out]``."""

    scale: torch.Tensor
    zero: torch.Tensor
    low: int
    high: int


def weight_grid(weight: torch.Tensor, setting: Setting) -> WeightGrid:
    """The grid of ``weight [out, ...]``, a function of its largest (and smallest) values per output channel."""
    flat = weight.detach().flatten(1)
    if setting.symmetric:
        top = 2 ** (setting.weights - 1) - 1
        scale = flat.abs().amax(dim=1).clamp(min=1e-8) / top
        return WeightGrid(scale, torch.zeros_like(scale), -top, top)
    levels = 2**setting.weights - 1
    low, high = flat.amin(dim=1).clamp(max=0.0), flat.amax(dim=1).clamp(min=0.0)
    scale = (high - low).clamp(min=1e-8) / levels
    return WeightGrid(scale, torch.round(-low / scale), 0, levels)


def weight_codes(weight: torch.Tensor, grid: WeightGrid) -> torch.Tensor:
    """Codes ``low..high`` of ``weight [out, ...]``, as floats."""
    scale, zero = (t.view(-1, *[1] * (weight.ndim - 1)) for t in grid[:2])
    return torch.clamp(torch.round(weight / scale) + zero, grid.low, grid.high)


def fake_quantize_weight(weight: torch.Tensor, grid: WeightGrid, training: bool) -> torch.Tensor:
    """``weight [out, ...]`` rounded to its grid."""
    if training:
        zero = grid.zero.to(torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, grid.scale, zero, 0, grid.low, grid.high)
    scale, zero = (t.view(-1, *[1] * (weight.ndim - 1)) for t in grid[:2])
    return (weight_codes(weight, grid) - zero) * scale


def _fake_quantize(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, levels: int, training: bool) -> torch.Tensor:
    scale, zero = _affine(low, high, levels)
    if training:
        return torch.fake_quantize_per_tensor_affine(x, scale, zero.to(torch.int32), 0, levels)
    # The same arithmetic in plain operators: torch.export knows no fake-quantisation by tensors.
    return (torch.clamp(torch.round(x / scale) + zero, 0, levels) - zero) * scale


def _affine(low: torch.Tensor, high: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    scale = (high - low) / levels
    return scale, torch.round(-low / scale)


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
                low, high = _range(x)
                momentum = torch.where(self.seen, MOMENTUM, 1.0)
                self.low.lerp_(low, momentum)
                self.high.lerp_(high, momentum)
                self.seen.fill_(True)
        return _fake_quantize(x, self.low, self.high, self.levels, self.training)


class DynamicQuantizer(nn.Module):
    """The same to 8 bits with the range of the input at hand, all of it: a batch is rounded together."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low, high = _range(x)
        return _fake_quantize(x, low, high, 255, self.training)


def _range(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.detach().amin().clamp(max=0.0), x.detach().amax().clamp(min=1e-6)


def _input_quantizer(setting: Setting) -> nn.Module:
    if setting.dynamic:
        return DynamicQuantizer()
    return nn.Identity() if setting.activations is None else ActivationQuantizer(setting.activations)


class QuantConv2d(nn.Conv2d):
    """A convolution with fake-quantised weight, input and, if last, output (8 bits)."""

    def __init__(self, conv: nn.Conv2d, setting: Setting, quantize_output: bool) -> None:
        geometry: Any = conv_geometry(conv)
        super().__init__(*geometry)
        self.weight, self.bias = conv.weight, conv.bias
        self.setting = setting
        self.input_quantizer = _input_quantizer(setting)
        self.output_quantizer = ActivationQuantizer(8) if quantize_output else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.input_quantizer(x)  # before the bias, whose grid follows from this range
        grid = weight_grid(self.weight, self.setting)
        weight = fake_quantize_weight(self.weight, grid, self.training)
        return self.output_quantizer(self._conv_forward(x, weight, fake_quantize_bias(self, grid)))

    def plain(self) -> nn.Conv2d:
        """The float convolution with the trained weights, see :func:`_release`."""
        geometry: Any = conv_geometry(self)
        conv = nn.Conv2d(*geometry)
        _release(self, conv)
        return conv


class QuantLinear(nn.Linear):
    """A linear layer with fake-quantised weight and input; its output stays float."""

    def __init__(self, linear: nn.Linear, setting: Setting) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.weight, self.bias = linear.weight, linear.bias
        self.setting = setting
        self.input_quantizer = _input_quantizer(setting)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.input_quantizer(x)  # before the bias, whose grid follows from this range
        grid = weight_grid(self.weight, self.setting)
        weight = fake_quantize_weight(self.weight, grid, self.training)
        return nn.functional.linear(x, weight, fake_quantize_bias(self, grid))

    def plain(self) -> nn.Linear:
        """The float layer with the trained weights, see :func:`_release`."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        _release(self, linear)
        return linear


def fake_quantize_bias(layer: QuantConv2d | QuantLinear, grid: WeightGrid) -> torch.Tensor | None:
    """The bias ``[out]`` rounded to the steps of the integer sum, scale of the input times scale of the weights.

    With 8 bits on both sides these steps are too small to matter, and the bias stays as it is.
    """
    bias, quantizer = layer.bias, layer.input_quantizer
    if bias is None or layer.setting == Setting() or not isinstance(quantizer, ActivationQuantizer):
        return bias
    with torch.no_grad():
        step = grid.scale * (quantizer.high - quantizer.low) / quantizer.levels
        error = torch.round(bias / step) * step - bias
    return bias + error


def _release(trained: QuantConv2d | QuantLinear, plain: nn.Conv2d | nn.Linear) -> None:
    """Fill a plain layer.

    At 8 bits its weights and bias are the float ones; below, they are those of the grid, without which the layer would
    not be the one that was trained. The grid of rounded weights is their own, so that the export finds it again.
    What the weights do not tell goes along as a remark (`REMARKS`): the ranges of the activations.
    """
    plain.bias, plain.weight = trained.bias, trained.weight
    with torch.no_grad():
        grid = weight_grid(trained.weight, trained.setting)
        bias = fake_quantize_bias(trained, grid)
        if bias is not None and bias is not trained.bias:
            plain.bias = nn.Parameter(bias)
        if trained.setting.weights < 8:
            plain.weight = nn.Parameter(fake_quantize_weight(trained.weight, grid, training=False))
    vars(plain)[REMARKS] = {
        kind: [float(quantizer.low), float(quantizer.high)]
        for kind in ("input", "output")
        if isinstance(quantizer := getattr(trained, f"{kind}_quantizer", None), ActivationQuantizer)
    }


def conv_geometry(conv: nn.Conv2d) -> tuple[Any, ...]:
    """Arguments that make another convolution of the same geometry."""
    return (
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups,
        conv.bias is not None, conv.padding_mode,
    )  # fmt: skip
