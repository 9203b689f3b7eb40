"""Structured pruning: whole channels, units, heads and dimensions removed by importance, with all that reads them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import fx, nn

from nas.compression.base import Loss, Pass, matching, passes
from nas.compression.dependency import TRIAL, DependencyGroups
from nas.compression.groups import Group, Groups, UnprunableError, check_keep, evaluating, squared_norms
from nas.compression.importance import IMPORTANCES, Evidence, gradients
from nas.compression.traced import TracedGroups
from nas.errors import CompressionError
from nas.tracing.trace import opname

T = TypeVar("T")
STRENGTH = 1e-3  # of the group lasso
KEYS = ("keep", "importance", "strength")


@passes.register("channel_prune")
class ChannelPrune(Pass):
    """Keeps the most important output channels of named convolutions or linear layers, and heads of attention.

    ``settings`` maps a layer name to the number of output channels to keep, or to ``{"keep": n, "importance": name}``
    with one of :data:`nas.compression.importance.IMPORTANCES`; a number alone means ``l1``. A score belongs to the
    channel in every layer that it runs through: the layers that a residual connection ties lose the same channels, and
    depthwise convolutions follow. The module becomes physically smaller; nothing is masked.

    The outputs of a layer that makes queries, keys or values are heads times dimensions: ``LAYER.heads`` is how many
    heads are kept, ``LAYER.head_dim`` how many dimensions of each. LAYER is any of the projections, or the fused one
    (``qkv``, and ``….in_proj`` of ``nn.MultiheadAttention``); all of them follow. Such models come back as graph
    modules, whose forward has the new numbers (:func:`groups_of`).

    ``group_lasso`` learns what to remove: while the model is trained plain, λ Σ ‖w_c‖₂ is added to the loss, over the
    channels c of the named groups, w_c being all weights of a channel (Wen et al. 2016, "Learning Structured Sparsity
    in Deep Neural Networks", eq. 3); λ is ``strength``, 0.001 where the setting says nothing. Then the norms decide.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        self._lasso: _Lasso | None = None

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
        """Channels to keep in every group of layers, named by the group's first layer, and heads to keep.

        The output layer is never pruned, nor what the forward does not allow to be pruned. Dimensions of heads are
        pruned only where a pattern in ``layers`` or ``ratios`` ends with ``head_dim``.

        Args:
            ratio: share of the channels to remove, in [0, 1); 0.5 where ``macs`` is not given either.
            macs: share of the convolutions' and linear layers' multiplications that may be left, in (0, 1]; the
                smallest ratio that does it is found by bisection. What the rounding takes beyond it is given back,
                one multiple of channels each, to the groups that lost the largest shares, while it fits.
            importance: which channels go; see the class.
            strength: λ of ``group_lasso``.
            round_to: kept channels are rounded up to a multiple of it, at least one multiple, at most all; heads to
                whole heads.
            scope: ``uniform``: the ratio in every group; ``global``: over all channels by one threshold on the scores,
                each group's divided by their mean.
            layers: patterns (``*``, ``?``, ``[ab]``) of the layers to prune; a group is chosen by its own name, such
                as ``*.heads``, or by any layer that makes it.
            skip: patterns of the layers to leave, which overrule ``layers``.
            ratios: pattern → ratio of the groups that it fits, instead of ``ratio``; the first that fits counts.

        Raises:
            CompressionError: an option is out of range, a pattern fits no layer, or nothing can be pruned so far.
        """
        _check_options(ratio, macs, importance, strength, round_to, scope, ratios or {})
        model = copy.deepcopy(model)

        def chosen(groups: Groups, leave_out: bool) -> dict[str, int]:
            every = groups.all(leave_out)
            scored = scope == "global"
            found = _chosen(groups, every, sample, loss, importance, layers, skip, ratios or {}, scored, round_to)
            return _counts(groups, found, sample, ratio, macs, layers if leave_out else None)

        keep = _first_way(model, sample, chosen)
        if importance == "l1":
            return dict(keep)
        more = {"strength": strength} if importance == "group_lasso" else {}
        return {name: {"keep": count, "importance": importance, **more} for name, count in keep.items()}

    def penalty(self, model: nn.Module) -> torch.Tensor | None:
        """The group lasso over the groups that ask for it; none on the first call, which waits for the model's next
        input to find the groups with."""
        if not self._eased:
            return None
        if self._lasso is None or self._lasso.model is not model:
            self._lasso = _Lasso(self._eased, model)
        return self._lasso()

    @cached_property
    def _eased(self) -> dict[str, tuple[int, float]]:
        """Group that asks for the lasso → channels that it keeps, and λ."""
        asked = {name: _asked(name, setting) for name, setting in self.settings.items()}
        return {name: (s.keep, s.strength) for name, s in asked.items() if s.importance == "group_lasso"}

    def apply(self, model: nn.Module, sample: torch.Tensor, loss: Loss | None = None) -> nn.Module:
        asked = {name: _asked(name, setting) for name, setting in self.settings.items()}
        groups = groups_of(model, sample, {name: setting.keep for name, setting in asked.items()})
        slopes = loss is not None and any(setting.importance == "taylor" for setting in asked.values())
        if slopes and loss is not None:
            gradients(groups.model, sample, loss)
        lost: dict[str, list[int]] = {}
        for name, setting in asked.items():
            group = groups.named(name)
            check_keep(setting.keep, group, name)
            if setting.keep < group.size:
                score = IMPORTANCES[setting.importance](group, Evidence(groups.model, name, sample, slopes))
                lost[name] = sorted(torch.argsort(score, stable=True)[: group.size - setting.keep].tolist())
        if slopes:
            groups.model.zero_grad(set_to_none=True)
        return groups.without(lost, sample)


def groups_of(model: nn.Module, sample: torch.Tensor, keep: Mapping[str, int], here: bool = False) -> Groups:
    """The groups of which so many channels are to be kept, found one way or the other.

    torch-pruning's where they do. Those of the traced model where they do not have such names, where the model that
    they leave fails on the sample, because its forward has constants of the unpruned shape, and where attention is
    seen, whose heads they cut through. Structure and numbers decide, never weights.

    Args:
        here: whether slices have to be of ``model`` itself, and not of its traced copy.

    Raises:
        CompressionError: it can be pruned in neither way.
    """

    def way(groups: Groups, leave_out: bool) -> Groups:
        if isinstance(groups, DependencyGroups):
            groups.trial(keep, sample)
        return groups

    return _first_way(model, sample, way, here)


def _first_way(
    model: nn.Module, sample: torch.Tensor, use: Callable[[Groups, bool], T], here: bool = False
) -> T:  # fmt: skip
    """What ``use`` makes of the first kind of groups that it can use; its second argument says that it is the last
    kind there is, so that what cannot be pruned may be left out."""
    failure: CompressionError | None = None
    if not _attends(model):
        try:
            return use(DependencyGroups(model, sample), False)
        except CompressionError as error:
            failure = error
    try:
        traced = TracedGroups(model, sample, here)
    except CompressionError:
        if failure is not None and not isinstance(failure, UnprunableError):
            raise failure from None
        return use(DependencyGroups(model, sample), True)
    return use(traced, True)


def _attends(model: nn.Module) -> bool:
    """Whether attention is seen in a model: torch's own, or a product of two activations in a graph."""
    products = ("scaled_dot_product_attention", "matmul", "bmm")
    if isinstance(model, fx.GraphModule):
        return any(opname(node) in products for node in model.graph.nodes)
    return any(isinstance(module, nn.MultiheadAttention) for module in model.modules())


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


class _Lasso:
    """The penalty of one model; its groups are found once, with the first input that the model gets from now on."""

    def __init__(self, eased: Mapping[str, tuple[int, float]], model: nn.Module) -> None:
        self.eased, self.model = eased, model
        self.terms: list[tuple[float, Group]] | None = None
        self.seen: torch.Tensor | None = None
        self.hook = model.register_forward_pre_hook(self._remember)

    def _remember(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.seen = args[0][:TRIAL].detach()
        self.hook.remove()

    def __call__(self) -> torch.Tensor | None:
        if self.terms is None:
            if self.seen is None:
                return None
            groups = groups_of(self.model, self.seen, {name: keep for name, (keep, _) in self.eased.items()}, here=True)
            self.terms = [(weight, groups.named(name)) for name, (_, weight) in self.eased.items()]
        # The root of zero has no slope; a tiny floor keeps the gradient finite.
        parts = [weight * (squared_norms(g.slices, g.size) + 1e-12).sqrt().sum() for weight, g in self.terms]
        return torch.stack(parts).sum()


# ---- settings of a whole model -----------------------------------------------------------------------


@dataclass
class _Candidate:
    """A group that may be pruned: its width and multiple, its own ratio where it has one, its scores where they are
    compared."""

    channels: int
    multiple: int
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
    groups: Groups, every: Sequence[Group], sample: torch.Tensor, loss: Loss | None, importance: str,
    layers: Sequence[str], skip: Sequence[str], ratios: Mapping[str, float], scored: bool, round_to: int,
) -> dict[str, _Candidate]:  # fmt: skip
    """The groups to prune by name, in the order of the model."""
    model = groups.model
    known = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    known += [name for group in every for name in (group.name, *group.makers) if name not in known]
    wanted, left = matching(known, layers, "channel_prune"), matching(known, skip, "channel_prune")
    for pattern in ratios:
        matching(known, [pattern], "channel_prune")
    if scored and importance == "taylor" and loss is not None:
        gradients(model, sample, loss)
    found: dict[str, _Candidate] = {}
    for group in every:
        names = {group.name, *group.makers}
        own = next((r for pattern, r in ratios.items() if any(fnmatchcase(n, pattern) for n in names)), None)
        if group.role == "head_dim" and not any(p.endswith("head_dim") for p in (*layers, *ratios)):
            continue  # half of the heads and half of each is a quarter
        if not wanted & names or left & names or (importance == "bn" and not group.normalised):
            continue
        score = None
        if scored and own is None:
            score = IMPORTANCES[importance](group, Evidence(model, group.name, sample, loss is not None))
        found[group.name] = _Candidate(group.size, group.multiple(round_to), own, score)
    model.zero_grad(set_to_none=True)
    if not found:
        raise CompressionError(
            f"channel_prune: no layer that fits {list(layers)} can be pruned"
            + (" by its batch normalisation." if importance == "bn" else "."),
            expected="a convolution or linear layer before the output layer",
        )
    return found


def _counts(
    groups: Groups, chosen: dict[str, _Candidate], sample: torch.Tensor, ratio: float | None, macs: float | None,
    meant: Sequence[str] | None,
) -> dict[str, int]:  # fmt: skip
    """How many channels to keep of every group that loses some.

    Args:
        meant: where groups that cannot be pruned are left out, the names that must not be; nothing where none are.
    """
    counted = _macs(groups.model, sample)

    def left(keep: Mapping[str, int]) -> float:
        """Share of the MACs that is left."""
        return _macs(groups.trial(keep, sample), sample) / counted

    def attempt(share: float) -> tuple[dict[str, int], float]:
        """What to keep at a ratio, and the share of MACs that it leaves."""
        while True:
            keep = _keeps(chosen, share)
            try:
                return keep, left(keep)
            except UnprunableError as error:
                if meant is None:
                    raise
                del chosen[error.layer]
                if error.layer in meant or not chosen:
                    raise

    if macs is None:
        keep, _ = attempt(0.5 if ratio is None else ratio)
        return keep
    own = {name: group for name, group in chosen.items() if group.ratio is None}
    return _give_back(_bisect(attempt, macs), own, lambda more: left(more) <= macs)


def _keeps(groups: Mapping[str, _Candidate], share: float) -> dict[str, int]:
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
        multiples = max(1, math.ceil(round((group.channels - gone) / group.multiple, 6)))
        if multiples * group.multiple < group.channels:
            keep[name] = multiples * group.multiple
    return keep


def _give_back(
    keep: dict[str, int], groups: Mapping[str, _Candidate], fits: Callable[[dict[str, int]], bool]
) -> dict[str, int]:
    """One multiple of channels more for each group for which it ``fits``, the most pruned group first, in rounds."""
    widths = {name: group.channels for name, group in groups.items()}
    before: dict[str, int] = {}
    while keep != before:
        before = keep
        shares = {name: count / widths[name] for name, count in keep.items() if name in widths}
        for name in sorted(shares, key=lambda name: shares[name]):
            if keep[name] < widths[name]:
                more = keep | {name: min(keep[name] + groups[name].multiple, widths[name])}
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
