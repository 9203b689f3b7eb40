"""Structured channel pruning: whole channels removed by importance, through torch-pruning's dependency groups."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from nas.compression.base import Loss, Pass, layers_of, matching, passes
from nas.compression.groups import CONSUMERS, PRODUCERS, Slices, dependency_graph, evaluating, slices, squared_norms
from nas.compression.importance import IMPORTANCES, Evidence, gradients
from nas.errors import CompressionError

STRENGTH = 1e-3  # of the group lasso
# Inputs to try the pruned model with: a reshape to [-1, ...] makes a smaller batch of fewer channels, and 7 hides none.
TRIAL = 7
KEYS = ("keep", "importance", "strength")


@passes.register("channel_prune")
class ChannelPrune(Pass):
    """Keeps the most important output channels of named convolutions or linear layers.

    ``settings`` maps a layer name to the number of output channels to keep, or to ``{"keep": n, "importance": name}``
    with one of :data:`nas.compression.importance.IMPORTANCES`; a number alone means ``l1``. A score belongs to the
    channel in every layer that it runs through: the layers that a residual connection ties lose the same channels, and
    depthwise convolutions follow. The module becomes physically smaller; nothing is masked.

    ``group_lasso`` learns what to remove: while the model is trained plain, λ Σ ‖w_c‖₂ is added to the loss, over the
    channels c of the named groups, w_c being all weights of a channel (Wen et al. 2016, "Learning Structured Sparsity
    in Deep Neural Networks", eq. 3); λ is ``strength``, 0.001 where the setting says nothing. Then the norms decide.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        self._lasso = _Lasso({})

    @classmethod
    def settings_for(  # type: ignore[override]
        cls,
        model: nn.Module,
        sample: torch.Tensor,
        loss: Loss | None = None,
        *,
        ratio: float | None = None,
        macs: float | None = None,
        importance: str = "l1",
        strength: float = STRENGTH,
        round_to: int = 8,
        scope: str = "uniform",
        layers: Sequence[str] = ("*",),
        skip: Sequence[str] = (),
        ratios: Mapping[str, float] | None = None,
    ) -> dict[str, Any]:
        """Channels to keep in every group of layers, named by the group's first layer.

        The output layer is never pruned, nor what the forward does not allow to be pruned.

        Args:
            ratio: share of the channels to remove, in [0, 1); 0.5 where ``macs`` is not given either.
            macs: share of the convolutions' and linear layers' multiplications that may be left, in (0, 1]; the
                smallest ratio that does it is found by bisection. What the rounding takes beyond it is given back,
                one multiple of channels each, to the groups that lost the largest shares, while it fits.
            importance: which channels go; see the class.
            strength: λ of ``group_lasso``.
            round_to: kept channels are rounded up to a multiple of it, at least one multiple, at most all.
            scope: ``uniform``: the ratio in every group; ``global``: over all channels by one threshold on the scores,
                each group's divided by their mean.
            layers: patterns (``*``, ``?``, ``[ab]``) of the layers to prune; a group is chosen by any layer in it.
            skip: patterns of the layers to leave, which overrule ``layers``.
            ratios: pattern → ratio of the groups that it fits, instead of ``ratio``; the first that fits counts.

        Raises:
            CompressionError: an option is out of range, a pattern fits no layer, or nothing can be pruned so far.
        """
        _check_options(ratio, macs, importance, strength, round_to, scope, ratios or {})
        model = copy.deepcopy(model)
        groups = _chosen(model, sample, loss, importance, layers, skip, ratios or {}, scope == "global")
        counted = _macs(model, sample)

        def left(keep: Mapping[str, int]) -> float:
            """Share of the MACs that is left."""
            return _macs(cls(keep).apply(copy.deepcopy(model), sample), sample) / counted

        def attempt(share: float) -> tuple[dict[str, int], float]:
            """What to keep at a ratio, and the share of MACs that it leaves; groups that cannot be pruned go."""
            while True:
                keep = _keeps(groups, share, round_to)
                try:
                    return keep, left(keep)
                except _Unprunable as error:
                    del groups[error.layer]
                    if error.layer in layers or not groups:
                        raise

        if macs is None:
            keep, _ = attempt(0.5 if ratio is None else ratio)
        else:
            keep = _bisect(attempt, macs)
            own = {name: group.channels for name, group in groups.items() if group.ratio is None}
            keep = _give_back(keep, own, round_to, lambda more: left(more) <= macs)
        if importance == "l1":
            return dict(keep)
        more = {"strength": strength} if importance == "group_lasso" else {}
        return {name: {"keep": count, "importance": importance, **more} for name, count in keep.items()}

    def penalty(self, model: nn.Module) -> torch.Tensor | None:
        """The group lasso over the groups that ask for it; none on the first call, which waits for the model's next
        input to find the groups with."""
        asked = {name: _asked(name, setting) for name, setting in self.settings.items()}
        eased = {name: setting.strength for name, setting in asked.items() if setting.importance == "group_lasso"}
        if not eased:
            return None
        if self._lasso.model is not model:
            self._lasso = _Lasso(eased, model)
        return self._lasso()

    def apply(self, model: nn.Module, sample: torch.Tensor, loss: Loss | None = None) -> nn.Module:
        asked = {name: _asked(name, setting) for name, setting in self.settings.items()}
        layers = {name: _last(model, name) for name in asked}
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        graph = dependency_graph(model, sample)
        with evaluating(model), torch.no_grad():
            shape = _shape(model(sample[:TRIAL]))
        slopes = loss is not None and any(setting.importance == "taylor" for setting in asked.values())
        if slopes and loss is not None:
            gradients(model, sample, loss)
        for name, setting in asked.items():
            layer, keep = layers[name], setting.keep
            prune, channels = _pruner(layer)
            if not 1 <= keep <= channels:
                raise CompressionError(
                    f"channel_prune: keep {keep} of {channels} channels of {name!r}.", expected=f"1..{channels}"
                )
            if keep == channels:
                continue
            everything = _group(graph, layer, name)
            score = IMPORTANCES[setting.importance](everything, Evidence(model, name, sample, slopes))
            order = torch.argsort(score, stable=True)
            lost = sorted(order[: channels - keep].tolist())
            try:
                graph.get_pruning_group(layer, prune, idxs=lost).prune()
                with evaluating(model), torch.no_grad():
                    found = _shape(model(sample[:TRIAL]))
            except Exception as error:
                raise _unprunable(name, f"the forward has constants of the unpruned shape ({error})") from error
            if found != shape:
                raise _unprunable(name, f"its channels reach the output, which becomes {found} instead of {shape}")
        if slopes:
            model.zero_grad(set_to_none=True)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        return model


@dataclass(frozen=True)
class _Asked:
    keep: int
    importance: str = "l1"
    strength: float = STRENGTH


def _asked(name: str, setting: Any) -> _Asked:
    if isinstance(setting, Mapping):
        unknown = sorted(set(setting) - set(KEYS))
        if unknown or "keep" not in setting:
            found = f"unknown key {unknown[0]!r}" if unknown else "no key 'keep'"
            raise CompressionError(f"channel_prune: {found} for {name!r}.", expected=f"the keys {', '.join(KEYS)}")
        asked = _Asked(**setting)
    else:
        asked = _Asked(setting)
    if isinstance(asked.keep, bool) or not isinstance(asked.keep, int):
        raise CompressionError(
            f"channel_prune: keep {asked.keep!r} channels of {name!r}.",
            expected="a whole number of channels, or {'keep': number, 'importance': name}",
        )
    _check_importance(asked.importance, asked.strength)
    return asked


def _check_importance(importance: Any, strength: Any) -> None:
    if importance not in IMPORTANCES:
        raise CompressionError(
            f"channel_prune: unknown importance {importance!r}.", expected=f"one of {', '.join(IMPORTANCES)}"
        )
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength < math.inf:
        raise CompressionError(f"channel_prune: strength {strength!r}.", expected="a number of at least 0")


class _Unprunable(CompressionError):
    """Pruning this layer breaks the model."""

    layer = ""


def _unprunable(name: str, reason: str) -> _Unprunable:
    error = _Unprunable(
        f"channel_prune: {name!r} cannot be pruned: {reason}.",
        remedy="leave it out (skip it); heads of attention have to be pruned as a whole",
    )
    error.layer = name
    return error


def _last(model: nn.Module, name: str) -> nn.Module:
    """The layer called ``name``, or the last of the pieces that an earlier pass made of it, which has its outputs."""
    *_, layer = layers_of(model, name, "channel_prune").values()
    return layer


def _pruner(layer: nn.Module) -> tuple[Any, int]:
    if isinstance(layer, nn.Conv2d):
        return tp.prune_conv_out_channels, layer.out_channels
    assert isinstance(layer, nn.Linear)
    return tp.prune_linear_out_channels, layer.out_features


def _group(graph: Any, layer: nn.Module, name: str) -> Any:
    """All channels of the layer, with every layer that they run through."""
    if layer not in graph.module2node:
        raise _unprunable(name, "the forward does not use it, or not once and by its own call")
    prune, channels = _pruner(layer)
    return graph.get_pruning_group(layer, prune, idxs=list(range(channels)))


def _shape(output: Any) -> tuple[int, ...]:
    if not isinstance(output, torch.Tensor):
        raise CompressionError(
            f"channel_prune: the model returns a {type(output).__name__}.", expected="a model that returns one tensor"
        )
    return tuple(output.shape)


class _Lasso:
    """The penalty of one model; its groups are found once, with the first input that the model gets from now on."""

    def __init__(self, eased: Mapping[str, float], model: nn.Module | None = None) -> None:
        self.eased, self.model = eased, model
        self.terms: list[tuple[float, list[Slices], int]] | None = None
        self.seen: torch.Tensor | None = None
        if model is not None:
            self.hook = model.register_forward_pre_hook(self._remember)

    def _remember(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.seen = args[0][:1].detach()
        self.hook.remove()

    def __call__(self) -> torch.Tensor | None:
        if self.terms is None:
            if self.seen is None or self.model is None:
                return None
            graph = dependency_graph(self.model, self.seen)
            layers = {name: _last(self.model, name) for name in self.eased}
            self.terms = [
                (self.eased[name], slices(_group(graph, layer, name)), _pruner(layer)[1])
                for name, layer in layers.items()
            ]
        # The root of zero has no slope; a tiny floor keeps the gradient finite.
        parts = [weight * (squared_norms(part, n) + 1e-12).sqrt().sum() for weight, part, n in self.terms]
        return torch.stack(parts).sum()


# ---- settings of a whole model -----------------------------------------------------------------------


@dataclass
class _Candidate:
    """A group that may be pruned: its width, its own ratio where it has one, its scores where they are compared."""

    channels: int
    ratio: float | None
    scores: torch.Tensor | None


def _check_options(
    ratio: float | None, macs: float | None, importance: str, strength: float, round_to: int, scope: str,
    ratios: Mapping[str, float],
) -> None:  # fmt: skip
    _check_importance(importance, strength)
    if ratio is not None and macs is not None:
        raise CompressionError("channel_prune: both ratio and macs are given.", expected="one of them")
    for name, value in {"ratio": ratio, **{f"ratios of {key!r}": share for key, share in ratios.items()}}.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1):
            raise CompressionError(f"channel_prune: {name} is {value!r}.", expected="a share in [0, 1) to remove")
    if macs is not None and (isinstance(macs, bool) or not isinstance(macs, int | float) or not 0 < macs <= 1):
        raise CompressionError(f"channel_prune: macs is {macs!r}.", expected="a share in (0, 1] to be left")
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise CompressionError(f"channel_prune: round_to is {round_to!r}.", expected="a whole number of at least 1")
    if scope not in ("uniform", "global"):
        raise CompressionError(f"channel_prune: unknown scope {scope!r}.", expected="uniform or global")


def _chosen(
    model: nn.Module, sample: torch.Tensor, loss: Loss | None, importance: str, layers: Sequence[str],
    skip: Sequence[str], ratios: Mapping[str, float], scored: bool,
) -> dict[str, _Candidate]:  # fmt: skip
    """The groups to prune by the name of their first layer, in the order of the model."""
    names = {module: name for name, module in model.named_modules()}
    known = [name for module, name in names.items() if isinstance(module, nn.Conv2d | nn.Linear)]
    wanted, left = matching(known, layers, "channel_prune"), matching(known, skip, "channel_prune")
    for pattern in ratios:
        matching(known, [pattern], "channel_prune")
    graph = dependency_graph(model, sample)
    if scored and importance == "taylor" and loss is not None:
        gradients(model, sample, loss)
    found: dict[str, _Candidate] = {}
    for group in graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]):
        members = [dep.layer for dep, _ in group if dep.handler in PRODUCERS and dep.layer in names]
        tied = sorted((names[layer] for layer in members), key=known.index)
        normalised = any(isinstance(dep.layer, nn.BatchNorm2d | nn.BatchNorm1d) for dep, _ in group)
        if (
            _reaches_output(group)
            or not wanted.intersection(tied)
            or left.intersection(tied)
            or (importance == "bn" and not normalised)
        ):
            continue
        name = next(name for name in tied if not _depthwise(model.get_submodule(name)))
        whole = _group(graph, model.get_submodule(name), name)
        own = next((r for pattern, r in ratios.items() if any(fnmatchcase(n, pattern) for n in tied)), None)
        score = None
        if scored and own is None:
            score = IMPORTANCES[importance](whole, Evidence(model, name, sample, loss is not None))
        found[name] = _Candidate(_pruner(model.get_submodule(name))[1], own, score)
    model.zero_grad(set_to_none=True)
    if not found:
        raise CompressionError(
            f"channel_prune: no layer that fits {list(layers)} can be pruned"
            + (" by its batch normalisation." if importance == "bn" else "."),
            expected="a convolution or linear layer before the output layer",
        )
    return {name: found[name] for name in sorted(found, key=known.index)}


def _depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.out_channels > 1


def _reaches_output(group: Any) -> bool:
    """Whether the last operator of the model gives these channels out, rather than reads them."""
    return any(not dep.target.outputs and dep.handler not in CONSUMERS for dep, _ in group)


def _keeps(groups: Mapping[str, _Candidate], share: float, round_to: int) -> dict[str, int]:
    """Layer → channels to keep, of those that lose any, when ``share`` of the channels is removed.

    Groups with scores are compared: the weakest of all their channels go.
    """
    lost = {name: share * group.channels for name, group in groups.items()}
    pool = {name: group.scores for name, group in groups.items() if group.scores is not None}
    if pool:
        owners = torch.cat([torch.full((len(scores),), i) for i, scores in enumerate(pool.values())])
        values = torch.cat([scores / scores.mean().clamp(min=1e-12) for scores in pool.values()])
        weakest = owners[torch.argsort(values, stable=True)[: int(share * len(values))]]
        lost |= {name: float((weakest == i).sum()) for i, name in enumerate(pool)}
    keep = {}
    for name, group in groups.items():
        gone = lost[name] if group.ratio is None else group.ratio * group.channels
        # Rounded first: 1 − 0.9 of ten channels is one channel, not 0.9999….
        multiples = max(1, math.ceil(round((group.channels - gone) / round_to, 6)))
        if multiples * round_to < group.channels:
            keep[name] = multiples * round_to
    return keep


def _give_back(
    keep: dict[str, int], widths: Mapping[str, int], round_to: int, fits: Callable[[dict[str, int]], bool]
) -> dict[str, int]:
    """One multiple of channels more for each group for which it ``fits``, the most pruned group first, in rounds."""
    before: dict[str, int] = {}
    while keep != before:
        before = keep
        shares = {name: count / widths[name] for name, count in keep.items() if name in widths}
        for name in sorted(shares, key=lambda name: shares[name]):
            if keep[name] < widths[name]:
                more = keep | {name: min(keep[name] + round_to, widths[name])}
                keep = more if fits(more) else keep
    return {name: count for name, count in keep.items() if count != widths.get(name)}


def _bisect(attempt: Callable[[float], tuple[dict[str, int], float]], target: float) -> dict[str, int]:
    """Keeps of the smallest ratio that leaves at most ``target`` of the MACs."""
    low, high = 0.0, 1.0 - 1e-6
    best, least = attempt(high)
    if least > target:
        raise CompressionError(
            f"channel_prune: {100 * target:g} % of the MACs cannot be reached.",
            expected=f"macs of at least {math.ceil(1000 * least) / 1000:g} with these layers and this rounding",
        )
    for _ in range(12):
        middle = (low + high) / 2
        keep, left = attempt(middle)
        if left <= target:
            best, high = keep, middle
        else:
            low = middle
    return best


def _macs(model: nn.Module, sample: torch.Tensor) -> int:
    """Multiplications of the convolutions and linear layers for one sample."""
    total = 0

    def count(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        nonlocal total
        weight: Any = module.weight
        positions = output[0, 0] if isinstance(module, nn.Conv2d) else output[0, ..., 0]
        total += weight.numel() * positions.numel()

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    try:
        with evaluating(model), torch.no_grad():
            model(sample[:1])
    finally:
        for hook in hooks:
            hook.remove()
    return total
