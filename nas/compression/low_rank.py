"""Low rank: a layer in two or three smaller ones, by its singular values or by a Tucker decomposition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from nas.compression.base import Loss, Pass, matching, named_module, passes
from nas.compression.fold import replace_module
from nas.compression.groups import evaluating
from nas.errors import CompressionError

METHODS = ("svd", "tucker")
Layer = nn.Conv2d | nn.Linear
Ranks = int | tuple[int, int]


@passes.register("low_rank")
class LowRank(Pass):
    """Splits named linear layers and convolutions; ``settings`` maps a layer's name to its rank.

    - An integer r: singular values of the weight as a matrix ``[out, in · k · k]``. A linear layer becomes two, a k×k
      convolution one of k×k to r channels and one of 1×1 (Zhang et al. 2016, "Accelerating Very Deep Convolutional
      Networks", section 3.1, with the weights' own decomposition in place of that of the responses).
    - A pair ``[r_out, r_in]``, for convolutions larger than 1×1: Tucker-2 by higher-order SVD (Kim et al. 2016,
      "Compression of Deep Convolutional Neural Networks", section 3.1): 1×1 to r_in channels, k×k to r_out, 1×1. A 1×1
      whose rank is full is left out.

    At full rank a layer stays as it is. The pieces are plain layers in a ``Sequential`` in the layer's place, without
    biases but the last. Stride, padding and dilation stay with the k×k convolution.
    """

    def apply(self, model: nn.Module, sample: torch.Tensor, loss: Loss | None = None) -> nn.Module:
        for name, setting in self.settings.items():
            layer = _plain_layer(model, name)
            ranks = _checked(name, layer, setting)
            if ranks == _full(layer, pair=isinstance(ranks, tuple)):
                continue
            pieces = nn.Sequential(*_pieces(layer, ranks)).to(layer.weight).train(layer.training)
            pieces.requires_grad_(layer.weight.requires_grad)
            replace_module(model, name, pieces)
        try:
            _run(model, sample)
        except AttributeError as error:
            raise CompressionError(
                f"low_rank: the model's own code reads what a split layer no longer has: {error}.",
                expected="layers that are only called", remedy="leave that layer out",
            ) from error  # fmt: skip
        return model

    @classmethod
    def settings_for(  # type: ignore[override]
        cls,
        model: nn.Module,
        sample: torch.Tensor,
        loss: Loss | None = None,
        *,
        ratio: float | None = None,
        energy: float = 0.9,
        method: str = "svd",
        round_to: int = 8,
        layers: Sequence[str] = ("*",),
        skip: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Ranks of every layer that takes fewer multiplications split than whole; the others are left out.

        Args:
            ratio: rank as a share of the full one; where it is given, ``energy`` is not looked at.
            energy: the smallest rank that keeps this share of the sum of squared singular values.
            method: ``svd``, or ``tucker`` for convolutions larger than 1×1.
            round_to: ranks are multiples of it: the nearest for ``ratio``, the next larger for ``energy``.
            layers, skip: patterns of the names of layers, such as ``stages.*``: which are split, but for which.

        Raises:
            CompressionError: an option is unknown or out of range, or a pattern fits no layer.
        """
        _check_options(ratio, energy, method, round_to)
        settings: dict[str, Any] = {}
        sides = _sides(model, sample)
        for name, layer in _chosen(model, layers, skip).items():
            if name not in sides:  # no forward calls it
                continue
            if method == "tucker" and _kernel(layer) > 1:
                full = _full(layer, pair=True)
                assert isinstance(full, tuple)
                found = [_rank(layer, mode, full[mode], ratio, energy, round_to) for mode in (0, 1)]
                ranks: Ranks = (found[0], found[1])
            else:
                whole = _full(layer, pair=False)
                assert isinstance(whole, int)
                ranks = _rank(layer, 0, whole, ratio, energy, round_to)
            if macs(layer, ranks, *sides[name]) < macs(layer, None, *sides[name]):
                settings[name] = list(ranks) if isinstance(ranks, tuple) else ranks
        return settings


def macs(layer: Layer, ranks: Ranks | None, before: int, after: int) -> int:
    """Multiply-accumulates of one sample in ``layer``, whole (None) or split to ``ranks``.

    Args:
        before, after: positions of its input and output: height · width, or tokens.
    """
    cin, cout, kernel = *_channels(layer), _kernel(layer)
    if ranks is None or ranks == _full(layer, pair=isinstance(ranks, tuple)):
        return cout * cin * kernel * after
    if isinstance(ranks, int):
        return (ranks * cin * kernel + cout * ranks) * after
    r_out, r_in = ranks
    first, last = r_in * cin * before * (r_in < cin), cout * r_out * after * (r_out < cout)
    return first + r_out * r_in * kernel * after + last


# ---- what a layer is ---------------------------------------------------------------------------------


def _splittable(layer: nn.Module) -> bool:
    # Subclasses do something of their own with their weight, as simulated quantisation does.
    return type(layer) is nn.Linear or (type(layer) is nn.Conv2d and layer.groups == 1)


def _plain_layer(model: nn.Module, name: str) -> Layer:
    layer = named_module(model, name, "low_rank")
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        raise CompressionError(
            f"low_rank: {name!r} is a convolution of {layer.groups} groups.", expected="a convolution of one group",
            remedy="leave depthwise and grouped convolutions out: they have hardly any weights",
        )  # fmt: skip
    if not name or not _splittable(layer):
        raise CompressionError(
            f"low_rank: {name!r} is a {type(layer).__name__}.", expected="a plain Conv2d or Linear layer of the model"
        )
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    return layer


def _channels(layer: Layer) -> tuple[int, int]:
    """Input and output channels."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


def _kernel(layer: Layer) -> int:
    """Elements of the kernel: 1 of a linear layer."""
    return 1 if isinstance(layer, nn.Linear) else math.prod(layer.kernel_size)


def _full(layer: Layer, pair: bool) -> Ranks:
    cin, cout = _channels(layer)
    return (cout, cin) if pair else min(cout, cin * _kernel(layer))


def _checked(name: str, layer: Layer, setting: Any) -> Ranks:
    """The rank, or the pair (r_out, r_in), within what the layer has."""
    pair = isinstance(setting, list | tuple)
    if pair and _kernel(layer) == 1:
        raise CompressionError(
            f"low_rank: two ranks {list(setting)} for {name!r}, which is one matrix.", expected="one rank"
        )
    full = _full(layer, pair)
    found, most = (list(setting), list(full)) if isinstance(full, tuple) else ([setting], [full])
    right = len(found) == len(most) and all(isinstance(r, int) and not isinstance(r, bool) for r in found)
    if not right or not all(1 <= r <= m for r, m in zip(found, most, strict=True)):
        bounds = ", ".join(f"1..{m}" for m in most)
        expected = f"[{bounds}]: output and input ranks" if pair else bounds
        raise CompressionError(f"low_rank: rank {setting!r} for {name!r}.", expected=expected)
    return (found[0], found[1]) if pair else found[0]


# ---- splitting ---------------------------------------------------------------------------------------


def _unfolded(layer: Layer, mode: int) -> torch.Tensor:
    """The weight as a matrix: output channels (mode 0) or input channels (mode 1) by everything else."""
    return layer.weight.detach().transpose(0, mode).flatten(1)


def _pieces(layer: Layer, ranks: Ranks) -> list[nn.Module]:
    if isinstance(ranks, int):
        u, s, v = torch.linalg.svd(_unfolded(layer, 0), full_matrices=False)
        root = s[:ranks].sqrt()  # half of the scale in each piece, so that weight decay pulls at both alike
        first, last = root[:, None] * v[:ranks], u[:, :ranks] * root
        if isinstance(layer, nn.Linear):
            return [_linear(first, None), _linear(last, layer.bias)]
        return [_like(layer, first.unflatten(1, layer.weight.shape[1:]), None), _pointwise(last, layer.bias)]
    assert isinstance(layer, nn.Conv2d)
    (r_out, r_in), (cin, cout) = ranks, _channels(layer)
    core, pieces = layer.weight.detach(), list[nn.Module]()
    if r_in < cin:
        inner = torch.linalg.svd(_unfolded(layer, 1), full_matrices=False).U[:, :r_in]
        pieces.append(_pointwise(inner.t(), None))
        core = torch.einsum("oihw,ir->orhw", core, inner)
    if r_out == cout:
        return [*pieces, _like(layer, core, layer.bias)]
    outer = torch.linalg.svd(_unfolded(layer, 0), full_matrices=False).U[:, :r_out]
    core = torch.einsum("oihw,or->rihw", core, outer)
    return [*pieces, _like(layer, core, None), _pointwise(outer, layer.bias)]


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    return _filled(nn.Linear(weight.shape[1], weight.shape[0], bias is not None), weight, bias)


def _pointwise(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Conv2d:
    return _filled(nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=bias is not None), weight[..., None, None], bias)


def _like(conv: nn.Conv2d, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Conv2d:
    """A convolution of other channels with the geometry of ``conv``."""
    geometry: Any = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, 1, bias is not None, conv.padding_mode)
    return _filled(nn.Conv2d(weight.shape[1], weight.shape[0], *geometry), weight, bias)


def _filled(layer: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
    layer.weight.data = weight.clone(memory_format=torch.contiguous_format)
    if bias is not None:
        layer.bias.data = bias.detach().clone()
    return layer


# ---- settings of a whole model -----------------------------------------------------------------------


def _rank(layer: Layer, mode: int, full: int, ratio: float | None, energy: float, round_to: int) -> int:
    """The rank of one unfolding that has the share or the energy, as a multiple, at most the full one."""
    if ratio is not None:
        return min(full, max(1, round(ratio * full / round_to)) * round_to)
    squares = torch.linalg.svdvals(_unfolded(layer, mode).double()).square()
    kept = squares.cumsum(0) / squares.sum().clamp(min=torch.finfo(torch.float64).tiny)
    rank = min(full, int((kept < energy - 1e-12).sum()) + 1)
    return min(full, math.ceil(rank / round_to) * round_to)


def _chosen(model: nn.Module, layers: Sequence[str], skip: Sequence[str]) -> dict[str, Layer]:
    modules = dict(model.named_modules())
    every = {
        name: layer for name, layer in modules.items()
        if name and isinstance(layer, nn.Conv2d | nn.Linear) and _splittable(layer)
        # Torch's own encoder hands the weights of its layers to one fused kernel.
        and not isinstance(modules[name.rpartition(".")[0]], nn.TransformerEncoderLayer)
    }  # fmt: skip
    wanted, left = matching(every, layers, "low_rank"), matching(every, skip, "low_rank")
    return {name: layer for name, layer in every.items() if name in wanted - left}


def _sides(model: nn.Module, sample: torch.Tensor) -> dict[str, tuple[int, int]]:
    """Name of every layer that runs → positions of its input and output, of one sample."""
    found: dict[str, tuple[int, int]] = {}

    def watch(name: str) -> Any:
        def note(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            cin, cout = inputs[0].shape[-1], output.shape[-1]
            if isinstance(layer, nn.Linear):
                found[name] = (inputs[0].numel() // cin, output.numel() // cout)
            else:
                found[name] = (math.prod(inputs[0].shape[2:]), math.prod(output.shape[2:]))

        return note

    handles = [
        layer.register_forward_hook(watch(name)) for name, layer in model.named_modules() if _splittable(layer)
    ]
    try:
        _run(model, sample)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _run(model: nn.Module, sample: torch.Tensor) -> None:
    """One forward of one sample in evaluation mode."""
    with evaluating(model), torch.no_grad():
        model(sample[:1])


def _check_options(ratio: Any, energy: Any, method: Any, round_to: Any) -> None:
    for what, share in (("ratio", ratio), ("energy", energy)):
        if share is not None and (isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1):
            raise CompressionError(f"low_rank: {what} is {share!r}.", expected="a share above 0 and at most 1")
    if method not in METHODS:
        raise CompressionError(f"low_rank: method is {method!r}.", expected=f"one of {', '.join(METHODS)}")
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise CompressionError(f"low_rank: round_to is {round_to!r}.", expected="a whole number, 1 or more")
