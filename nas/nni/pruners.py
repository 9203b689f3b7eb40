"""Masked models made smaller: what the masks of NNI's pruners switch off is cut out, and the outputs stay.

    pruner = L1NormPruner(model, config_list)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    smaller = nas.nni.speedup(model, example, masks)

In the place of ``ModelSpeedup``, which drops whatever is constant as if it were zero. Here what a masked channel leaves
behind, such as the offset of the batch normalisation after it, is added where it was read.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from nas.compression import Plan
from nas.errors import CompressionError
from nas.nni.masks import Checked, Masks, channel_axis, checked, masked_channels, put_on, unwrapped
from nas.tracing import Group, Structure
from nas.tracing.importance import importance
from nas.tracing.removable import Removable, is_mixed
from nas.tracing.shrink import with_modes

if TYPE_CHECKING:
    import onnx

KEEP, VOTE = "keep", "vote"
UNUSED = "the forward does not use it"
OUTVOTED = "the masks of its group agreed on others"
UNFOLLOWED = "nothing is known of what its channels are"


@dataclass(frozen=True)
class Layer:
    """What became of a masked layer.

    Attributes:
        name: its path.
        channels: that it gave: output channels, or features.
        asked: how many of them the masks switch off whole.
        left: how many it gives now.
        zeros: share of its weights that is zero still.
        stay: reason → how many of the channels asked for stay for it.
    """

    name: str
    channels: int
    asked: int
    left: int
    zeros: float
    stay: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Speedup:
    """A smaller model and what it took.

    Attributes:
        model: plain torch; names of layers are the given model's.
        layers: every masked one.
        masks: those that the model was made by: the given ones, or what tied layers agreed on.
        difference: the largest of its outputs' differences to the model under the given masks, on the example.
        largest: of the masked model's outputs, for comparison.
        parameters: before and after.
    """

    model: fx.GraphModule
    layers: tuple[Layer, ...]
    masks: Checked
    difference: float
    largest: float
    parameters: tuple[int, int]

    def report(self) -> list[str]:
        """Lines for people."""
        lines = [
            f"{layer.name}: {layer.channels} channels, {layer.asked} asked for, {layer.left} left"
            + "".join(f"; {count} stay: {why}" for why, count in layer.stay.items())
            + (f"; {layer.zeros:.0%} of its weights are zero" if layer.zeros else "")
            for layer in self.layers
        ]
        before, after = self.parameters
        lines.append(f"{before:,} → {after:,} parameters")
        lines.append(f"outputs differ from the masked model's by at most {self.difference:.2g} of {self.largest:.2g}")
        return lines


def speedup(
    model: nn.Module,
    example: torch.Tensor,
    masks: Masks | str | Path,
    *,
    conflicts: str = KEEP,
    align: int = 1,
) -> fx.GraphModule:
    """The model without the channels, units and heads that its masks switch off: :func:`shrink` and its ``model``."""
    return shrink(model, example, masks, conflicts=conflicts, align=align).model


def shrink(
    model: nn.Module,
    example: torch.Tensor,
    masks: Masks | str | Path,
    *,
    conflicts: str = KEEP,
    align: int = 1,
) -> Speedup:
    """Cut out of a model what its masks switch off, and say what became of every layer.

    Args:
        model: one tensor in, one out, in training or evaluation mode; unwrapped or still wrapped by the pruner. It
            stays as it is. The result, on the CPU, computes what it computes in evaluation mode, for inputs of the
            example's size.
        example: raw inputs ``[n, *input_shape]``, n ≥ 1.
        masks: layer → ``weight`` and ``bias`` → ones and zeros, as NNI gives them; or a file (:func:`load_masks`).
        conflicts: of layers whose channels are added to each other, or are one, and whose masks differ. ``keep``: a
            channel goes where nothing computes it any more, so that the outputs are the masked model's. ``vote``: all
            of them lose the same channels, as many as each is asked for on average, those that most of their masks ask
            for; among equals those with the smallest weights. The outputs are then those of the model under the masks
            that were agreed on. Masks of single weights, and of channels that a LayerNorm takes together, stay.
        align: channels are left in multiples of this, by keeping some that are switched off. Outputs stay the same;
            onnxruntime is faster on multiples of 8 or 16.

    Raises:
        CompressionError: the masks are not the model's, mask all of a layer, or the forward cannot be traced.
    """
    if conflicts not in (KEEP, VOTE):
        raise CompressionError(f"Unknown conflicts={conflicts!r}.", expected=f"{KEEP} or {VOTE}")
    if isinstance(align, bool) or not isinstance(align, int) or align < 1:
        raise CompressionError(f"align={align!r}.", expected="a whole number of at least 1")
    if not isinstance(example, torch.Tensor) or example.ndim < 2 or not len(example):
        raise CompressionError("The example is no batch of inputs.", expected="a tensor [n, *input_shape], n ≥ 1")
    plain, example = unwrapped(model, example), example.cpu()
    given = checked(plain, masks)
    agreed = _agreed(Structure(plain, example), given) if conflicts == VOTE else given
    count = _size(plain)
    asked = copy.deepcopy(plain)
    put_on(asked, given)
    put_on(plain, agreed)
    structure = Structure(plain, example)
    found = Removable(structure, example[:1], align)
    smaller = found.without()
    difference, largest = _compared(asked, smaller, example)
    smaller = with_modes(smaller, plain)
    order = sorted(given, key=[*structure.calls, *given].index)
    layers = tuple(_layer(found, name, plain.get_submodule(name), given[name], agreed[name], smaller) for name in order)
    return Speedup(smaller, layers, agreed, difference, largest, (count, _size(smaller)))


def sparse_plan(model: nn.Module) -> Plan:
    """The plan of passes under which the zeros of a model stay zeros and are stored as such.

    ``nas.compression.apply_passes(model, plan, example)`` before a fine-tuning keeps them, and
    ``nas.student.export.to_onnx(model, plan, …)`` stores one bit a weight and what is not zero.
    """
    shares = {name: _zeros(layer) for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    return {"weight_prune": {name: share for name, share in shares.items() if share}}


def to_onnx(model: nn.Module, example: torch.Tensor) -> onnx.ModelProto:
    """ONNX of a smaller model: any batch size, normalisation folded, zeros stored sparsely where that is smaller.

    Args:
        model: of :func:`speedup`, fine-tuned or not.
        example: raw inputs ``[n, *input_shape]``.

    Raises:
        StudentError: the exporter cannot express the model.
    """
    from nas.student import export

    return export.to_onnx(model, sparse_plan(model), example, example.numpy())


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _zeros(layer: nn.Module) -> float:
    """Share of a layer's weights that is zero; never all."""
    weight: Any = layer.weight
    return min(int((weight == 0).sum()), weight.numel() - 1) / weight.numel()


@torch.no_grad()
def _compared(asked: nn.Module, smaller: nn.Module, example: torch.Tensor) -> tuple[float, float]:
    wanted, found = asked.eval()(example), smaller.eval()(example)
    return float((wanted - found).abs().max()), float(wanted.abs().max())


# ---- the record --------------------------------------------------------------------------------------


def _layer(
    found: Removable, name: str, layer: nn.Module, given: Mapping[str, torch.Tensor], used: Mapping[str, torch.Tensor],
    smaller: fx.GraphModule,
) -> Layer:  # fmt: skip
    """The record of a layer, by the masks that were given and those that were used."""
    asked, agreed = masked_channels(layer, given), masked_channels(layer, used)
    axis = channel_axis(layer)
    weight: Any = layer.weight
    asked = torch.zeros(weight.shape[axis], dtype=torch.bool) if asked is None else asked
    size, number = len(asked), int(asked.sum())
    nodes = found.structure.calls.get(name)
    now: Any = smaller.get_submodule(name) if nodes else layer
    if not nodes:
        read = any(str(node.target).rpartition(".")[0] == name for node in found.structure.nodes)
        why = UNFOLLOWED if read else UNUSED
        return Layer(name, size, number, size, _zeros(layer), {why: number} if number else {})
    dims = found.structure.axes.of[nodes[0]]
    dim = dims[1] if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.BatchNorm1d | nn.BatchNorm2d) else dims[-1]
    kept = torch.zeros(size, dtype=torch.bool)
    kept[dim.kept(found.chosen)] = True
    reasons: list[str] = [""] * size
    for variable in dim.variables:
        verdict = found.verdicts.get(variable)
        for position, place in enumerate(dim.place(variable).tolist()):
            if place >= 0 and not reasons[position]:
                reasons[position] = variable.tied if verdict is None else verdict.reasons[place]
    outvoted = torch.zeros(size, dtype=torch.bool) if agreed is None else asked & ~agreed
    stay = Counter(
        OUTVOTED if outvoted[i] else reasons[i] or UNFOLLOWED for i in (asked & kept).nonzero().flatten().tolist()
    )
    return Layer(name, size, number, int(kept.sum()), _zeros(now), dict(stay))


# ---- tied layers whose masks differ ------------------------------------------------------------------


def _agreed(structure: Structure, masks: Checked) -> Checked:
    """Masks under which layers that share their channels lose the same ones."""
    result = {name: dict(own) for name, own in masks.items()}
    for group in structure.groups:
        makers = _makers(structure, group)
        own = {name: masks[name] for name in makers if "weight" in masks.get(name, {})}
        known = [_whole_channels(structure.modules[name], mask) for name, mask in own.items()]
        asked = [channels for channels in known if channels is not None]
        if not asked or len(asked) < len(known) or is_mixed(structure, group.variable):
            continue
        votes = torch.stack(asked).sum(dim=0)
        number = min(round(int(votes.sum()) / len(asked)), group.variable.size - 1)
        rank = importance(structure, group.variable)
        order = sorted(range(len(votes)), key=lambda place: (-int(votes[place]), float(rank[place])))
        lost = torch.zeros(len(votes), dtype=torch.bool)
        lost[order[:number]] = True
        for name in makers:
            result[name] = _with_channels(structure.modules[name], result.get(name, {}), lost)
    return result


def _whole_channels(layer: nn.Module, masks: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Which channels of a layer are masked; nothing where single weights are."""
    lost = masked_channels(layer, masks)
    mask = masks["weight"].movedim(channel_axis(layer), 0)
    return lost if lost is not None and bool(mask[~lost].all()) else None


def _makers(structure: Structure, group: Group) -> list[str]:
    """Layers whose outputs are just the places of a group, and have weights of their own."""
    whole = ((group.variable,),)
    return [
        path for path in group.layers
        if path in structure.calls and structure.axes.layers[path][1].terms == whole
        and isinstance(structure.modules[path], nn.Conv1d | nn.Conv2d | nn.Linear)
    ]  # fmt: skip


def _with_channels(layer: nn.Module, masks: Mapping[str, torch.Tensor], lost: torch.Tensor) -> dict[str, torch.Tensor]:
    """Masks of a layer that switch off these channels whole, and no others."""
    weight: Any = layer.weight
    mask = masks.get("weight", torch.ones_like(weight)).detach().clone()
    before = masked_channels(layer, {"weight": mask})
    mask[before] = 1
    mask[lost] = 0
    found = {**masks, "weight": mask}
    bias: Any = layer.bias
    if bias is not None:
        own = masks.get("bias", torch.ones_like(bias)).detach().clone()
        own[before] = 1
        own[lost] = 0
        found["bias"] = own
    return found
