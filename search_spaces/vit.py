"""Vision transformers (Dosovitskiy et al. 2021) of chosen resolution, patch, width, depth, heads and MLP, compressed.

The layers stand in groups; depth, heads, MLP ratio and compression are chosen per group, the width for all of them,
because residuals tie it. Normalisation comes before each sub-block, q, k and v have projections of their own, and the
classifier reads the mean of the tokens. The compression genes are the bits of a group's linear layers (32 or 8), the
share of each MLP's hidden units that is pruned after training, and the distillation settings. In int8 the matrix
products with weights are integers; what flows between them stays float.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from nas import members
from nas.errors import SpaceError
from nas.parts import AddInput, Attention, LayerNorm, Linear, Mlp, Normalize, Part, PatchEmbed, Resize, TokenMean
from nas.space import Candidate, Choice, SearchSpace, Site, TaskInfo, Training


def round8(units: float) -> int:
    """Nearest multiple of 8, at least 8."""
    return max(8, int(units / 8 + 0.5) * 8)


class SelfAttention(nn.Module):
    """Pre-normalised multi-head self-attention with its residual, on rows ``[n · tokens, width]``."""

    def __init__(self, tokens: int, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.split = (-1, tokens, heads, head_dim)  # constants, so that the export computes no shapes
        self.joined = (-1, heads * head_dim)
        self.scale = head_dim**-0.5
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, heads * head_dim)
        self.key = nn.Linear(width, heads * head_dim)
        self.value = nn.Linear(width, heads * head_dim)
        self.out = nn.Linear(heads * head_dim, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        query = self.query(y).reshape(self.split).permute(0, 2, 1, 3)
        key = self.key(y).reshape(self.split).permute(0, 2, 3, 1)
        value = self.value(y).reshape(self.split).permute(0, 2, 1, 3)
        # Scaled after the product: the runtime fuses the two.
        scores = torch.softmax((query @ key) * self.scale, dim=-1)
        return self.out((scores @ value).permute(0, 2, 1, 3).reshape(self.joined)) + x


class FeedForward(nn.Module):
    """Pre-normalised MLP with its residual, on rows ``[n · tokens, width]``."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.down = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.up(self.norm(x)))) + x


class ViTModel(nn.Module):
    """Preprocessing, patches and positions, groups of layers, classifier on the mean token: raw images → logits."""

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, task: TaskInfo, resolution: int, patch: int, width: int, groups: nn.ModuleList) -> None:
        super().__init__()
        channels, tokens = task.input_shape[0], (resolution // patch) ** 2
        self.register_buffer("mean", torch.tensor(task.mean).view(1, channels, 1, 1))
        self.register_buffer("scale", 1.0 / torch.tensor(task.std).view(1, channels, 1, 1))
        self.resolution = resolution
        self.resize = tuple(task.input_shape[1:]) != (resolution, resolution)
        self.patch = nn.Conv2d(channels, width, patch, patch)
        self.maps, self.rows, self.tokens = (-1, width, tokens), (-1, width), (-1, tokens, width)
        # An Embedding, and not a bare parameter, because pruning knows what that is.
        self.position = nn.Embedding(tokens, width)
        nn.init.trunc_normal_(self.position.weight, std=0.02)
        self.groups = groups
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, task.classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x - self.mean) * self.scale
        if self.resize:
            x = F.interpolate(x, size=(self.resolution, self.resolution), mode="bilinear", align_corners=False)
        x = self.patch(x).reshape(self.maps).permute(0, 2, 1) + self.position.weight
        # Rows, so that a linear layer is exported as one Gemm (see nas/parts/transformer.py).
        x = x.reshape(self.rows)
        for group in self.groups:
            for block in group.children():
                x = block(x)
        return self.head(self.norm(x).reshape(self.tokens).mean(dim=1))


class ViT(SearchSpace):
    """The space; one entry per group of layers configures it.

    Args:
        task: shapes, classes and preprocessing of the data.
        resolutions: side lengths that the input is resized to, multiples of every patch.
        patches: side lengths of a patch.
        widths: of the embedding, multiples of 8.
        depths: per group, the layers on offer.
        heads: attention heads, offered in every group; each has ``head_dim`` dimensions.
        ratios: hidden units of an MLP over the width, offered in every group.
        bits: weight and activation bits of the linear layers, on offer per group: 32 (fp32) or 8 (int8).
        prune: shares of hidden units removed after training, rounded to multiples of 8.
        kd_weights, temperatures: distillation settings on offer.
        feature_weights, attention_weights: of what is learnt beside the teacher's logits; 0 alone is no choice.
    """

    name = "vit"

    def __init__(
        self,
        task: TaskInfo,
        *,
        resolutions: Sequence[int] = (8, 16),
        patches: Sequence[int] = (2, 4),
        widths: Sequence[int] = (32, 48, 64),
        depths: Sequence[Sequence[int]] = ((1, 2), (1, 2), (1, 2)),
        heads: Sequence[int] = (2, 4),
        head_dim: int = 16,
        ratios: Sequence[float] = (2, 4),
        bits: Sequence[int] = (32, 8),
        prune: Sequence[float] = (0.0, 0.5),
        kd_weights: Sequence[float] = (0.0, 0.5, 0.9),
        temperatures: Sequence[float] = (2.0, 4.0),
        feature_weights: Sequence[float] = (0.0,),
        attention_weights: Sequence[float] = (0.0,),
    ) -> None:
        self.task, self.head_dim = task, head_dim
        self.groups = range(len(depths))
        _check(task, resolutions, patches, [*widths, head_dim], depths, bits)
        plain_bits, plain_prune = 32 if 32 in bits else None, 0.0 if 0.0 in prune else None
        choices = [Choice("resolution", resolutions), Choice("patch", patches), Choice("width", widths)]
        for g in self.groups:
            choices += [
                Choice(f"group{g}.depth", depths[g]),
                Choice(f"group{g}.heads", heads),
                Choice(f"group{g}.ratio", ratios),
                Choice(f"group{g}.prune", prune, plain=plain_prune, technique="pruning"),
                Choice(f"group{g}.bits", bits, plain=plain_bits, technique="quantization"),
            ]
        choices += members.distillation_choices(
            kd_weights, temperatures, feature_weights=feature_weights, attention_weights=attention_weights
        )
        self.choices = tuple(choices)
        sites: dict[str, Site] = {"input": self._input, "patch": self._patch, "head": self._head}
        for g in self.groups:
            sites[f"group{g}.attention"] = partial(self._attention, group=g)
            sites[f"group{g}.mlp"] = partial(self._mlp, group=g)
        self.sites = sites
        # Their order is that of the passes: pruned first, then quantised.
        self.treatments = {
            **{f"group{g}.prune": partial(self._pruned, group=g) for g in self.groups},
            **{f"group{g}.bits": partial(self._quantized, group=g) for g in self.groups},
            "distillation": partial(members.distilled, offered=[choice.name for choice in choices]),
        }

    # ---- shapes that sites and build share ----------------------------------------------------

    def _stream(self, c: Candidate) -> tuple[int, int]:
        """Tokens and width of what flows through all layers."""
        return (int(c["resolution"]) // int(c["patch"])) ** 2, int(c["width"])

    def _hidden(self, c: Candidate, group: int) -> tuple[int, int]:
        """Hidden units of an MLP as trained and as pruned."""
        trained = round8(int(c["width"]) * float(c[f"group{group}.ratio"]))
        return trained, min(trained, round8(trained * (1 - float(c[f"group{group}.prune"]))))

    # ---- what it costs ---------------------------------------------------------------------------

    def _precision(self, c: Candidate, group: int) -> str:
        return "int8" if c[f"group{group}.bits"] == 8 else "fp32"

    def _input(self, c: Candidate) -> Part:
        side = int(c["resolution"])
        if self.task.input_shape[1:] == (side, side):
            return Part((Normalize(),), self.task.input_shape)
        return Part((Normalize(), Resize(side)), self.task.input_shape)

    def _patch(self, c: Candidate) -> Part:
        side = int(c["resolution"])
        return Part((PatchEmbed(int(c["width"]), int(c["patch"])),), (self.task.input_shape[0], side, side))

    def _attention(self, c: Candidate, group: int) -> Part:
        ops = (LayerNorm(), Attention(int(c[f"group{group}.heads"]), self.head_dim), AddInput())
        return Part(ops, self._stream(c), self._precision(c, group), int(c[f"group{group}.depth"]))

    def _mlp(self, c: Candidate, group: int) -> Part:
        ops = (LayerNorm(), Mlp(self._hidden(c, group)[1]), AddInput())
        return Part(ops, self._stream(c), self._precision(c, group), int(c[f"group{group}.depth"]))

    def _head(self, c: Candidate) -> Part:
        return Part((LayerNorm(), TokenMean(), Linear(self.task.classes)), self._stream(c))

    # ---- what is trained --------------------------------------------------------------------------

    def build(self, candidate: Candidate) -> nn.Module:
        """The unpruned float model of ``candidate``."""
        c = candidate
        tokens, width = self._stream(c)
        groups = nn.ModuleList()
        for g in self.groups:
            blocks = nn.ModuleList()
            for _ in range(int(c[f"group{g}.depth"])):
                blocks.append(SelfAttention(tokens, width, int(c[f"group{g}.heads"]), self.head_dim))
                blocks.append(FeedForward(width, self._hidden(c, g)[0]))
            groups.append(blocks)
        return ViTModel(self.task, int(c["resolution"]), int(c["patch"]), width, groups)

    def _blocks(self, c: Candidate, group: int) -> list[tuple[str, str]]:
        """Names of the attention and the MLP of each layer."""
        return [
            (f"groups.{group}.{2 * d}", f"groups.{group}.{2 * d + 1}") for d in range(int(c[f"group{group}.depth"]))
        ]

    def _pruned(self, c: Candidate, group: int) -> Training | None:
        """Hidden units kept, per MLP."""
        trained, pruned = self._hidden(c, group)
        if pruned == trained:
            return None
        keep = {f"{mlp}.up": pruned for _, mlp in self._blocks(c, group)}
        return Training(compression={"channel_prune": keep})

    def _quantized(self, c: Candidate, group: int) -> Training | None:
        """Bits per linear layer of the group."""
        if self._precision(c, group) == "fp32":
            return None
        layers: dict[str, int] = {}
        for attention, mlp in self._blocks(c, group):
            layers |= {f"{attention}.{name}": 8 for name in ("query", "key", "value", "out")}
            layers |= {f"{mlp}.{name}": 8 for name in ("up", "down")}
        return Training(compression={"quantize": layers})

    # ---- reference members ------------------------------------------------------------------------

    def ladder(self) -> list[Candidate]:
        """The plain fp32 members with every size choice at its smallest, middle and largest value."""
        return members.ladder(self.choices, falling=("patch",))

    def uniform(self) -> list[Candidate]:
        """Every uniform level with the fewest bits, pruned or not: the teacher shrunk without a search."""
        return members.uniform(self.choices, falling=("patch",))


def _check(
    task: TaskInfo,
    resolutions: Sequence[int],
    patches: Sequence[int],
    widths: Sequence[int],
    depths: Sequence[Sequence[int]],
    bits: Sequence[int],
) -> None:
    if len(task.input_shape) != 3:
        raise SpaceError(f"Input shape {task.input_shape}.", expected="images: (channels, height, width)")
    if torn := [(r, p) for r in resolutions for p in patches if r % p]:
        raise SpaceError(f"Resolution {torn[0][0]} is no multiple of patch {torn[0][1]}.", expected="whole patches")
    if not depths or min(min(group) for group in depths) < 1:
        raise SpaceError(f"Depths {depths}.", expected="at least one group, and one layer in each")
    if unaligned := [w for w in widths if w % 8]:
        raise SpaceError(f"Widths {unaligned} are no multiples of 8.", expected="multiples of 8, also for head_dim")
    if set(bits) - {8, 32}:
        raise SpaceError(f"Bits {sorted(bits)}.", expected="8 and 32: what onnxruntime executes")


space = ViT
