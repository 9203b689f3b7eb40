"""A model that NNI's quantisers trained or calibrated, exported with real QuantizeLinear/DequantizeLinear operators.

NNI simulates: its model stays in floats, with ``(round(clamp(x / scale + zero_point)) - zero_point) * scale`` on the
targets of every wrapped layer, and exports no quantised operator. Here the same layers are traced with ONNX's operators
at the same places and with the same scales (:mod:`nas.nni.simulated`), and the graph is then brought into the form that
onnxruntime runs in integers (:mod:`nas.nni.quantized_graph`).

Nothing here imports nni: of a live quantiser only what it left in the model is read, and a plain model with a saved
calibration configuration needs no nni at all.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from nas.errors import CompressionError
from nas.nni.masks import WRAPPER
from nas.nni.quantized_graph import finish
from nas.nni.simulated import CODES, Grid, simulate
from nas.student.export import export_float

STATES = ("_scale", "_zero_point", "_tracked_max", "_tracked_min", "_mask")  # of a wrapper, not of the layer
INTEGER = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)  # layers that ONNX has integer operators for
METHODS = {None, "bypass", "clamp_round", "qat_clamp_round", "lsq_clamp_round"}
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
Calibration = Mapping[str, Mapping[str, Mapping[str, Any]]]  # layer → target → scale, zero_point, quant_dtype, …


@dataclass(frozen=True)
class ExportedLayer:
    """What became of one layer that NNI quantised.

    Attributes:
        name, kind: the layer and its type.
        targets: NNI's name of what is quantised (``weight``, ``_input_0``, …) → how it is written.
        integers: whether onnxruntime computes it in integers.
        why: where it does not, the reason.
    """

    name: str
    kind: str
    targets: Mapping[str, str]
    integers: bool
    why: str = ""

    def line(self) -> str:
        """One line for people."""
        found = ", ".join(f"{target} {how}" for target, how in self.targets.items())
        return f"{self.name} ({self.kind}): {found}; {'integers' if self.integers else f'floats: {self.why}'}"


@dataclass(frozen=True)
class QuantizedModel:
    """The ONNX model and what became of every quantised layer.

    Attributes:
        model: input ``input`` ``[batch, …]`` → ``logits``.
        layers: in the order of the model.
    """

    model: onnx.ModelProto
    layers: tuple[ExportedLayer, ...]

    def report(self) -> list[str]:
        """A line for each layer."""
        return [layer.line() for layer in self.layers]

    def save(self, path: str | Path) -> None:
        """Write the ONNX file."""
        onnx.save(self.model, str(path))


def quantized_onnx(
    model: Any,
    example: torch.Tensor,
    calibration: Calibration | None = None,
    *,
    fuse_names: Iterable[Sequence[str]] = (),
    exact: bool = True,
) -> QuantizedModel:
    """Export what NNI 3.0's ``QATQuantizer``, ``PtqQuantizer`` or ``LsqQuantizer`` made, at the scales that it found.

    Args:
        model: the quantiser, or the model that it wraps, or a plain model with the trained weights.
        example: raw inputs ``[n, *input_shape]``; they fix the shapes.
        calibration: for a plain model: the configuration that ``compress()`` returned (tensors, or what JSON or
            `calibration_json` makes of them).
        fuse_names: for a plain model: NNI's ``fuse_names`` of the configuration list, such as
            ``[("conv1", "bn1", "relu1")]``. A live quantiser knows them.
        exact: keep every rounding of NNI's. It rounds what a layer gives and then what the next one reads, on grids
            that differ a little. Without, what was rounded to 8 bits is not rounded again: faster, and other values.

    Raises:
        CompressionError: the quantiser is not calibrated, the configuration is of another model, or what it holds has
            no form in ONNX.
        StudentError: the exporter cannot express the model.
    """
    if not isinstance(example, torch.Tensor):
        raise CompressionError(f"NNI: the example is a {type(example).__name__}.", expected="a tensor of raw inputs")
    bound = getattr(model, "bound_model", model)
    if not isinstance(bound, nn.Module):
        raise CompressionError(
            f"NNI: cannot export a {type(model).__name__}.", expected="a quantiser of NNI 3.0, or its torch model"
        )
    wrappers = wrappers_of(model)
    if calibration is None and not wrappers:
        raise CompressionError(
            "NNI: a plain model without a calibration configuration.",
            remedy="pass the quantiser itself, or the configuration that quantizer.compress() returned",
        )
    chains = [tuple(names) for names in fuse_names]
    if calibration is None:
        calibration, chains = _calibration_of(wrappers), _chains_of(bound, wrappers)
    plain = plain_copy(bound).cpu().eval()
    masks = {name: _masks_of(name, wrapper) for name, wrapper in wrappers.items()}
    grids = _grids_of(plain, calibration)
    afterwards = _fuse(plain, chains, grids)
    for name in {**grids, **masks}:
        simulate(plain.get_submodule(name), grids.get(name, {}), afterwards.get(name), masks.get(name, {}), INTEGER)
    bits = {name: found["weight"].bits for name, found in grids.items() if hasattr(plain.get_submodule(name), CODES)}
    exported, reasons = finish(export_float(plain, example[:1].detach().cpu()), bits, exact)
    return QuantizedModel(exported, tuple(_record(plain, name, found, reasons) for name, found in grids.items()))


def _record(model: nn.Module, name: str, grids: Mapping[str, Grid], reasons: Mapping[str, str]) -> ExportedLayer:
    layer = model.get_submodule(name)
    kind = type(layer).__name__
    if name in reasons:
        why = reasons[name]
    elif isinstance(layer, INTEGER) and "weight" in grids:
        why = "its weight has no scale of output channels; its rounded values are stored"
    elif isinstance(layer, INTEGER):
        why = "its weight is not quantised"
    elif parameters := [target for target in grids if not target.startswith("_")]:
        why = f"ONNX has no integer operator for a {kind}; rounded values of {', '.join(parameters)} are stored"
    else:
        why = "it has no weight; what it reads or gives is rounded"
    return ExportedLayer(name, kind, {target: grid.text() for target, grid in grids.items()}, not why, why)


# ---- what was saved --------------------------------------------------------------------------------------


def calibration_json(calibration: Calibration) -> dict[str, dict[str, dict[str, Any]]]:
    """A calibration configuration in numbers, lists and strings, for ``json.dump``; nothing is lost."""
    return {
        name: {
            target: {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in found.items()}
            for target, found in targets.items()
        }
        for name, targets in calibration.items()
    }


def load_state(model: nn.Module, state: Mapping[str, torch.Tensor]) -> nn.Module:
    """Load a state dict that was saved while NNI's wrappers were on into the plain model; in place.

    The wrappers hold the trained weights; what stands under the layer's own name are rounded copies.

    Raises:
        CompressionError: the state is of another model.
    """
    wanted = model.state_dict()
    inside = {key.replace(f"{WRAPPER}.", ""): value for key, value in state.items() if f"{WRAPPER}." in key}
    found = {key: inside.get(key, state.get(key)) for key in wanted}
    odd = sorted(key for key, value in found.items() if value is None or value.shape != wanted[key].shape)
    odd += sorted(key for key in inside if key not in wanted and not key.endswith(STATES))
    if odd:
        raise CompressionError(
            f"NNI: the saved state does not fit the model at {odd[:5]}.", remedy="the model whose state was saved"
        )
    model.load_state_dict(found)
    return model


# ---- what is alive ---------------------------------------------------------------------------------------


def wrappers_of(model: Any) -> dict[str, Any]:
    """Layer name → NNI's wrapper of it: those of a quantiser, or those that stand in a wrapped model."""
    found = dict(getattr(model, "_module_wrappers", {}))
    bound: nn.Module = getattr(model, "bound_model", model)
    for name, module in bound.named_modules():  # NNI's own order is that of a set
        wrapper = found.pop(name, None) or module._modules.get(WRAPPER)
        if wrapper is not None:
            found[name] = wrapper
    return found


def plain_copy(model: nn.Module) -> nn.Module:
    """The model without NNI's wrappers, with the trained weights; NNI's own stays as it is.

    Its ``unwrap_model`` is not used because wrapping again loses the bias of a fused layer.
    """
    memo: dict[int, Any] = {}
    wrappers = wrappers_of(model)
    for wrapper in wrappers.values():
        memo[id(wrapper)] = nn.Identity()  # it holds on to the quantiser, its data and its training
    for tensor in (*model.buffers(), *model.parameters()):
        if not tensor.is_leaf:  # rounded weights of the last forward pass
            memo[id(tensor)] = tensor.detach().clone()
    plain = copy.deepcopy(model, memo)
    for name, wrapper in wrappers.items():
        layer = plain.get_submodule(name)
        del layer._modules[WRAPPER]
        vars(layer).pop("forward", None)
        own = [target for space in (wrapper.quantization_target_spaces, wrapper.pruning_target_spaces)
               for target in space if not target.startswith("_")]  # fmt: skip
        if wrapper.fused_modules:
            own.append("bias")
        for target in own:
            _set_parameter(layer, target, getattr(wrapper, target, None))
    return plain


def _set_parameter(layer: nn.Module, name: str, value: torch.Tensor | None) -> None:
    layer._buffers.pop(name, None)
    layer._parameters.pop(name, None)
    layer.register_parameter(name, None if value is None else nn.Parameter(value.detach().clone()))


def _calibration_of(wrappers: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """The configuration that ``get_calibration_config`` would give, of layers whose rounding ONNX can express."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, wrapper in wrappers.items():
        for target, space in wrapper.quantization_target_spaces.items():
            if not target.startswith("_") and getattr(wrapper, target) is None:
                continue  # the bias of a layer that has none
            if space.apply_method not in METHODS:
                raise CompressionError(
                    f"NNI: {name!r} rounds {target} by {space.apply_method!r}.",
                    expected="a model of QATQuantizer, PtqQuantizer or LsqQuantizer",
                )
            found.setdefault(name, {})[target] = {
                "scale": space.scale, "zero_point": space.zero_point, "quant_dtype": space.quant_dtype,
            }  # fmt: skip
    return found


def _chains_of(model: nn.Module, wrappers: Mapping[str, Any]) -> list[tuple[str, ...]]:
    names = {id(module): name for name, module in model.named_modules()}
    chains = [wrapper.fused_modules for wrapper in wrappers.values() if wrapper.fused_modules]
    return [tuple(names[id(module)] for module in chain) for chain in chains]


def _masks_of(name: str, wrapper: Any) -> dict[str, torch.Tensor]:
    """Masks that a pruner of the same pipeline multiplies parameters by."""
    found = {target: space.mask for target, space in wrapper.pruning_target_spaces.items() if space.mask is not None}
    if odd := [target for target in found if target.startswith("_")]:
        raise CompressionError(f"NNI: {name!r} has masks on {odd}.", remedy="masks on weights and biases only")
    return {target: mask.detach().cpu() for target, mask in found.items()}


# ---- grids -----------------------------------------------------------------------------------------------


def _grids_of(model: nn.Module, calibration: Calibration) -> dict[str, dict[str, Grid]]:
    modules = dict(model.named_modules())
    if unknown := sorted(set(calibration) - set(modules)):
        raise CompressionError(
            f"NNI: the calibration configuration names {unknown[:5]}, which the model does not have.",
            expected=f"layers such as {', '.join(list(modules)[1:6])}",
            remedy="the model whose configuration it is",
        )
    found: dict[str, dict[str, Grid]] = {}
    for name in [name for name in modules if name in calibration]:
        for target, entry in calibration[name].items():
            value = None if target.startswith("_") else getattr(modules[name], target, None)
            if target.startswith("_") or isinstance(value, torch.Tensor):
                found.setdefault(name, {})[target] = _grid(f"{name}.{target}", entry, value)
            elif _tensor(entry.get("scale")) is not None:
                raise CompressionError(
                    f"NNI: the calibration configuration has a scale for {target} of {name!r}, which is a "
                    f"{type(modules[name]).__name__} without one.",
                    remedy="the model whose configuration it is",
                )
    if not found:
        raise CompressionError("NNI: nothing is quantised.", remedy="a configuration list that names layers")
    return found


def _grid(where: str, entry: Mapping[str, Any], value: torch.Tensor | None) -> Grid:
    dtype = entry.get("quant_dtype") or "int8"
    match = re.fullmatch(r"(u?)int([2-8])", str(dtype))
    if match is None:
        raise CompressionError(f"NNI: {where} has the type {dtype!r}.", expected="int2..int8 or uint2..uint8")
    bits = int(match[2])
    low, high = (0, 2**bits - 1) if match[1] else (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)
    scale, zero = _tensor(entry.get("scale")), _tensor(entry.get("zero_point"))
    if scale is None or zero is None or not scale.numel():
        raise CompressionError(
            f"NNI: {where} has no scale: it was never calibrated.",
            remedy="quantizer.compress(max_steps, max_epochs) first, with enough steps to pass quant_start_step",
        )
    if not (scale.isfinite().all() and zero.isfinite().all()) or (zero != zero.round()).any():
        raise CompressionError(f"NNI: {where} has the scale {_few(scale)} and the zero point {_few(zero)}.",
                               expected="finite scales and whole zero points")  # fmt: skip
    if low == -high and not zero.any():
        scale = scale.abs()  # a learned one may cross zero, which changes nothing on a symmetric grid
    if (scale <= 0).any() or (zero < low).any() or (zero > high).any():
        raise CompressionError(f"NNI: {where} has the scale {_few(scale)} and the zero point {_few(zero)}.",
                               expected=f"positive scales and zero points {low}..{high}")  # fmt: skip
    return Grid.of(where, scale, zero, low, high, None if value is None else tuple(value.shape))


def _tensor(value: Any) -> torch.Tensor | None:
    return None if value is None else torch.as_tensor(value).detach().to("cpu", torch.float32)


def _few(values: torch.Tensor) -> str:
    shown = [f"{value:g}" for value in values.flatten()[:4].tolist()]
    return f"[{', '.join(shown)}{', …' if values.numel() > 4 else ''}]"


# ---- layers that NNI rounds as one -----------------------------------------------------------------------


def _fuse(model: nn.Module, chains: Collection[tuple[str, ...]], grids: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Fold what NNI folds before it rounds; gives what follows a layer inside its rounding: layer → activation."""
    modules = dict(model.named_modules())
    afterwards: dict[str, nn.Module] = {}
    for chain in chains:
        if unknown := [name for name in chain if name not in modules]:
            raise CompressionError(f"NNI: fuse_names has {unknown}, which the model does not have.")
        if chain[0] not in grids:
            raise CompressionError(f"NNI: fuse_names starts with {chain[0]!r}, which is not quantised.")
        layer = modules[chain[0]]
        for name in chain[1:]:
            module = modules[name]
            if isinstance(module, NORMS):
                _fold(layer, module, name)
            elif isinstance(module, nn.ReLU):
                afterwards[chain[0]] = nn.ReLU()
            else:
                raise CompressionError(
                    f"NNI: fuse_names puts {name!r}, a {type(module).__name__}, behind {chain[0]!r}.",
                    expected="normalisations and ReLU",
                )
            model.set_submodule(name, nn.Identity())
    return afterwards


def _fold(layer: Any, norm: Any, name: str) -> None:
    """NNI's folding, whose result is what it rounds."""
    mean, var = norm.running_mean, norm.running_var
    if not isinstance(mean, torch.Tensor) or not isinstance(var, torch.Tensor):
        raise CompressionError(f"NNI: the fused {name!r} keeps no running statistics.", expected="track_running_stats")
    weight, bias = layer.weight, layer.bias
    with torch.no_grad():
        gain = torch.rsqrt(var + norm.eps) if norm.weight is None else norm.weight * torch.rsqrt(var + norm.eps)
        shift = (0 if bias is None else bias) - mean
        shift = shift * gain if norm.bias is None else shift * gain + norm.bias
        _set_parameter(layer, "weight", weight * gain.reshape(-1, *[1] * (weight.ndim - 1)))
        _set_parameter(layer, "bias", shift)
