"""NNI's masks: read, checked against a model, and put on it."""

from __future__ import annotations

import collections
import copy
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nas.compression.groups import evaluating
from nas.errors import CompressionError

Masks = Mapping[str, Mapping[str, "torch.Tensor | None"]]  # layer → parameter → ones and zeros of its shape
Checked = dict[str, dict[str, torch.Tensor]]

WRAPPER = "_nni_wrapper"
PARAMETERS = ("weight", "bias")


def masked(model: nn.Module, masks: Masks | str | Path, example: torch.Tensor) -> nn.Module:
    """A plain copy of a model with its weights multiplied by masks, on the CPU.

    Args:
        model: unwrapped, or still wrapped by the pruner that made the masks. Of a wrapped one the copy has the weights
            that its wrappers compute with: NNI's SlimPruner scales them while it trains, and drops the scale when it
            unwraps.
        masks: as ``pruner.compress()`` or ``pruner.get_masks()`` gives them, or a file of them (:func:`load_masks`).
        example: one or more raw inputs, ``[n, *input_shape]``; used where the model is wrapped.

    Raises:
        CompressionError: the masks are not the model's.
    """
    plain = unwrapped(model, example)
    put_on(plain, checked(plain, masks))
    return plain


def load_masks(path: str | Path) -> Checked:
    """Masks that were saved by ``torch.save(masks, path)``, or by safetensors under ``layer.parameter``.

    Nothing is unpickled but tensors and dictionaries.

    Raises:
        CompressionError: the file is missing, damaged, or holds something else.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: Checked = {}
            for name, mask in load_file(path).items():
                layer, _, parameter = name.rpartition(".")
                found.setdefault(layer, {})[parameter] = mask
            return found
        # NNI gives its masks in a defaultdict(dict), which torch does not fill when it reads without pickle.
        allowed: list[Any] = [(_empty, "collections.defaultdict"), (dict, "builtins.dict")]
        with torch.serialization.safe_globals(allowed):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # missing, no archive, another format, other objects: no common base
        first = str(error).strip().splitlines()[:1]
        raise CompressionError(
            f"{path} cannot be read as masks: {' '.join(first)}",
            expected="a file of torch.save(masks, path), or a .safetensors of layer.parameter → mask",
        ) from error
    return {str(layer): dict(own) for layer, own in _mapping(loaded, str(path)).items()}


def _empty(kind: type) -> collections.OrderedDict[str, Any]:
    return collections.OrderedDict()


def unwrapped(model: nn.Module, example: torch.Tensor) -> nn.Module:
    """A copy of a model in plain torch, without the wrappers of a pruner and without their masks."""
    # The wrapper leaves in a layer what it last computed, which torch does not copy.
    computed = {id(b): b.detach().clone() for b in model.buffers() if not b.is_leaf}
    plain = copy.deepcopy(model, computed)
    layers = [module for module in plain.modules() if WRAPPER in module._modules]
    if not layers:
        return plain.cpu()
    for layer in layers:
        for space in getattr(layer, WRAPPER).pruning_target_spaces.values():
            if space.mask is not None:  # the masks that count are those that are given
                space.mask = torch.ones_like(space.mask)
    try:
        with evaluating(plain), torch.no_grad():
            plain(example)
    except Exception as error:  # the model's own
        raise CompressionError(
            f"The model cannot be run on the example {list(example.shape)}: {type(error).__name__}: {error}",
            expected="raw inputs [n, *input_shape], as the model takes them",
        ) from error
    for layer in layers:
        wrapper: Any = getattr(layer, WRAPPER)
        values = {name: getattr(layer, name) for name in wrapper.pruning_target_spaces if name in PARAMETERS}
        wrapper.unwrap()
        for name, value in values.items():
            if value is not None:
                getattr(layer, name).data.copy_(value)
    return plain.cpu()


def checked(model: nn.Module, masks: Masks | str | Path) -> Checked:
    """Masks that fit a plain model, those that are None left out.

    Raises:
        CompressionError: they do not.
    """
    if isinstance(masks, str | Path):
        masks = load_masks(masks)
    modules = dict(model.named_modules(remove_duplicate=False))
    found: Checked = {}
    for name, own in _mapping(masks, "what is given as masks").items():
        if name not in modules:
            near = difflib.get_close_matches(name, modules, n=3) or [n for n in modules if n][:5]
            raise CompressionError(
                f"There is a mask for {name!r}, and the model has no such layer.", expected=f"a name such as {near}",
                remedy="the masks of this model",
            )  # fmt: skip
        for parameter, mask in _mapping(own, f"the mask of {name!r}").items():
            if mask is not None:
                _check(name, parameter, getattr(modules[name], parameter, None), mask)
                found.setdefault(name, {})[parameter] = mask.detach().cpu()
    if not found:
        raise CompressionError("There are no masks.", remedy="_, masks = pruner.compress()")
    return found


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise CompressionError(
            f"{what} is a {type(value).__name__}.", expected="{layer: {'weight': mask, 'bias': mask}}"
        )
    return value


def _check(name: str, parameter: str, value: Any, mask: Any) -> None:
    told = f"The mask of {name}.{parameter}"
    if parameter not in PARAMETERS:
        raise CompressionError(
            f"{told} is of no parameter.", expected="masks of weight and bias",
            remedy="target_names: [weight, bias] in the pruner's config_list",
        )  # fmt: skip
    if not isinstance(mask, torch.Tensor):
        raise CompressionError(f"{told} is a {type(mask).__name__}.", expected="a tensor of ones and zeros")
    if not isinstance(value, nn.Parameter):
        raise CompressionError(f"{told} is there, and the parameter is not.", remedy="the masks of this model")
    if mask.shape != value.shape:
        raise CompressionError(
            f"{told} has the shape {list(mask.shape)}.", expected=f"{list(value.shape)}, as the parameter has it",
            remedy="the masks of this model, taken before it was made smaller",
        )  # fmt: skip
    if not ((mask == 0) | (mask == 1)).all():
        other = mask[(mask != 0) & (mask != 1)][0].item()
        raise CompressionError(f"{told} has the value {other:g}.", expected="ones and zeros")
    if parameter == "weight" and not mask.any():
        raise CompressionError(
            f"All of {name!r} is masked, so the model's output would not depend on its input there.",
            remedy="a lower sparse_ratio, or max_sparse_ratio, in the pruner's config_list",
        )


@torch.no_grad()
def put_on(model: nn.Module, masks: Checked) -> None:
    """Set what is masked to zero, in place; weights that are not a number are zero there, too."""
    for name, own in masks.items():
        for parameter, mask in own.items():
            value = model.get_submodule(name).get_parameter(parameter)
            value.masked_fill_(mask == 0, 0.0)


def channel_axis(layer: nn.Module) -> int:
    """The axis of a layer's weight that counts what it gives."""
    return 1 if isinstance(layer, nn.Embedding) else 0


def masked_channels(layer: nn.Module, masks: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Which output channels of a layer are masked whole, ``[channels]``; nothing where its weight has no mask."""
    if "weight" not in masks:
        return None
    mask = masks["weight"]
    return (mask.movedim(channel_axis(layer), 0).reshape(mask.shape[channel_axis(layer)], -1) == 0).all(dim=1)
