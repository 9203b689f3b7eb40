"""ResNet-like space: stages of basic blocks (He et al. 2016) of chosen depth, width and resolution, compressed.

Every channel count is a multiple of 8 and every activation a ReLU, which keeps convolutions in the fast layout and
lets int8 fuse. A block whose input has another shape than its output adds a 1×1 projection of its input instead of
the input itself. The compression genes are bits per stage (32 or 8), the share of each block's inner channels that is
pruned after training, and the distillation settings.

A stem of stride 1 without pooling is the paper's for CIFAR, ``stem=(64, 2, 7)`` with ``pool=True`` that for ImageNet.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from nas import members
from nas.errors import SpaceError
from nas.parts import (
    AddInput,
    AddProjected,
    Boundary,
    Conv,
    GlobalAveragePool,
    MaxPool,
    Normalize,
    Op,
    Part,
    Resize,
)
from nas.space import Candidate, Choice, SearchSpace, Site, TaskInfo, Training
from nas.staged import StagedClassifier


def round8(channels: float) -> int:
    """Nearest multiple of 8, at least 8."""
    return max(8, int(channels / 8 + 0.5) * 8)


class ConvNorm(nn.Sequential):
    """Convolution and batch normalisation."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.add_module("conv", nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False))
        self.add_module("norm", nn.BatchNorm2d(cout))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions; the input, projected where its shape is another, is added before the last ReLU."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.first = ConvNorm(cin, cout, 3, stride)
        self.act = nn.ReLU()
        self.second = ConvNorm(cout, cout, 3)
        self.shortcut = nn.Identity() if stride == 1 and cin == cout else ConvNorm(cin, cout, 1, stride)
        self.out = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.second(self.act(self.first(x))) + self.shortcut(x))


class ResNet(SearchSpace):
    """The space; one entry per stage configures it.

    Args:
        task: shapes, classes and preprocessing of the data.
        resolutions: side lengths that the input is resized to.
        stem: channels, stride and, if given, kernel (default 3) of the first convolution.
        pool: whether 3×3 max pooling of stride 2 follows the stem.
        widths, depths, strides: per stage; widths are multiples of 8.
        bits: weight and activation bits on offer per stage: 32 (fp32) or 8 (int8).
        prune: shares of inner channels removed after training, rounded to multiples of 8.
        kd_weights, temperatures: distillation settings on offer.
        feature_weights, attention_weights: of what is learnt beside the teacher's logits; 0 alone is no choice.
    """

    name = "resnet"

    def __init__(
        self,
        task: TaskInfo,
        *,
        resolutions: Sequence[int] = (8, 16),
        stem: Sequence[int] = (16, 1),
        pool: bool = False,
        widths: Sequence[Sequence[int]] = ((16,), (24, 32), (48, 64)),
        depths: Sequence[Sequence[int]] = ((1, 2), (1, 2), (1, 2)),
        strides: Sequence[int] = (1, 2, 2),
        bits: Sequence[int] = (32, 8),
        prune: Sequence[float] = (0.0, 0.5),
        kd_weights: Sequence[float] = (0.0, 0.5, 0.9),
        temperatures: Sequence[float] = (2.0, 4.0),
        feature_weights: Sequence[float] = (0.0,),
        attention_weights: Sequence[float] = (0.0,),
    ) -> None:
        self.task = task
        self.stages = range(len(widths))
        _check(task, stem, widths, depths, strides, bits)
        self.stem_width, self.stem_stride, self.stem_kernel = (*stem, 3)[:3]
        self.pool = pool
        self.strides = tuple(strides)
        plain_bits, plain_prune = 32 if 32 in bits else None, 0.0 if 0.0 in prune else None
        choices = [Choice("resolution", resolutions)]
        for s in self.stages:
            choices += [
                Choice(f"stage{s}.depth", depths[s]),
                Choice(f"stage{s}.width", widths[s]),
                Choice(f"stage{s}.prune", prune, plain=plain_prune, technique="pruning"),
                Choice(f"stage{s}.bits", bits, plain=plain_bits, technique="quantization"),
            ]
        choices += members.distillation_choices(
            kd_weights, temperatures, feature_weights=feature_weights, attention_weights=attention_weights
        )
        self.choices = tuple(choices)
        sites: dict[str, Site] = {"input": self._input, "stem": self._stem, "head": self._head, "output": self._output}
        for s in self.stages:
            sites[f"stage{s}.first"] = partial(self._first, stage=s)
            sites[f"stage{s}.rest"] = partial(self._rest, stage=s)
            sites[f"stage{s}.boundary"] = partial(self._boundary, stage=s)
        self.sites = sites
        # Their order is that of the passes: pruned first, then quantised.
        last = len(self.stages) - 1
        self.treatments = {
            **{f"stage{s}.prune": partial(self._pruned, stage=s) for s in self.stages},
            **{f"stage{s}.bits": partial(self._quantized, stage=s) for s in self.stages},
            "stem.bits": partial(self._quantized_as, stage=0, layer="stem.conv"),
            "head.bits": partial(self._quantized_as, stage=last, layer="head"),
            "distillation": partial(members.distilled, offered=[choice.name for choice in choices]),
        }

    # ---- shapes that sites and build share ----------------------------------------------------

    def _side(self, c: Candidate, stage: int) -> int:
        """Side length of the input of ``stage``; ``len(stages)`` is the output of the last."""
        side = int(c["resolution"])
        for stride in (self.stem_stride, 2 if self.pool else 1, *self.strides[:stage]):
            side = (side - 1) // stride + 1
        return side

    def _width(self, c: Candidate, stage: int) -> int:
        """Channels that leave ``stage``; -1 is the stem."""
        return self.stem_width if stage < 0 else int(c[f"stage{stage}.width"])

    def _inner(self, c: Candidate, stage: int) -> int:
        """Channels between the two convolutions of a block, as pruned."""
        width = self._width(c, stage)
        return min(width, round8(width * (1 - float(c[f"stage{stage}.prune"]))))

    # ---- what it costs ---------------------------------------------------------------------------

    def _precision(self, c: Candidate, stage: int) -> str:
        return "int8" if c[f"stage{stage}.bits"] == 8 else "fp32"

    def _input(self, c: Candidate) -> list[Part]:
        side = int(c["resolution"])
        parts = [Part((Normalize(),), self.task.input_shape)]
        if self.task.input_shape[1:] != (side, side):
            parts = [Part((Normalize(), Resize(side)), self.task.input_shape)]
        if self._precision(c, 0) == "int8":
            parts.append(Part((Boundary("quantize"),), (self.task.input_shape[0], side, side), "boundary"))
        return parts

    def _stem(self, c: Candidate) -> Part:
        side = int(c["resolution"])
        ops: tuple[Op, ...] = (Conv(self.stem_width, self.stem_kernel, self.stem_stride, activation="relu"),)
        if self.pool:
            ops = (*ops, MaxPool(3, 2))
        return Part(ops, (self.task.input_shape[0], side, side), self._precision(c, 0))

    def _block(self, c: Candidate, stage: int, cin: int, side: int, stride: int, count: int) -> Part:
        width = self._width(c, stage)
        same = stride == 1 and cin == width
        shortcut: Op = AddInput("relu") if same else AddProjected(cin, stride, "relu")
        ops = (Conv(self._inner(c, stage), 3, stride, activation="relu"), Conv(width, 3), shortcut)
        return Part(ops, (cin, side, side), self._precision(c, stage), count)

    def _first(self, c: Candidate, stage: int) -> Part:
        return self._block(c, stage, self._width(c, stage - 1), self._side(c, stage), self.strides[stage], 1)

    def _rest(self, c: Candidate, stage: int) -> Part | None:
        more = int(c[f"stage{stage}.depth"]) - 1
        if not more:
            return None
        return self._block(c, stage, self._width(c, stage), self._side(c, stage + 1), 1, more)

    def _boundary(self, c: Candidate, stage: int) -> Part | None:
        """Crossing from the stage before into this one."""
        if stage == 0:
            return None
        before, here = self._precision(c, stage - 1), self._precision(c, stage)
        if before == here:
            return None
        side = self._side(c, stage)
        shape = (self._width(c, stage - 1), side, side)
        if here == "int8":
            return Part((Boundary("quantize"),), shape, "boundary")
        # The runtime dequantises once for every reader: the first convolution, and the shortcut.
        return Part((Boundary("dequantize"),), shape, "boundary", 2)

    def _head(self, c: Candidate) -> Part:
        last = len(self.stages) - 1
        side = self._side(c, last + 1)
        ops = (GlobalAveragePool(), Conv(self.task.classes, 1))
        return Part(ops, (self._width(c, last), side, side), self._precision(c, last))

    def _output(self, c: Candidate) -> Part | None:
        if self._precision(c, len(self.stages) - 1) == "fp32":
            return None
        return Part((Boundary("dequantize"),), (self.task.classes, 1, 1), "boundary")

    # ---- what is trained --------------------------------------------------------------------------

    def build(self, candidate: Candidate) -> nn.Module:
        """The unpruned float model of ``candidate``."""
        c = candidate
        stem = ConvNorm(self.task.input_shape[0], self.stem_width, self.stem_kernel, self.stem_stride)
        stem.add_module("act", nn.ReLU())
        if self.pool:
            stem.add_module("pool", nn.MaxPool2d(3, 2, 1))
        stages = nn.ModuleList()
        for s in self.stages:
            width = self._width(c, s)
            blocks = nn.ModuleList()
            for d in range(int(c[f"stage{s}.depth"])):
                first = (self._width(c, s - 1), width, self.strides[s])
                blocks.append(BasicBlock(*(first if d == 0 else (width, width, 1))))
            stages.append(blocks)
        return StagedClassifier(self.task, int(c["resolution"]), stem, stages, width)

    def _pruned(self, c: Candidate, stage: int) -> Training | None:
        """Inner channels kept, per block."""
        inner = self._inner(c, stage)
        if inner == self._width(c, stage):
            return None
        blocks = [f"stages.{stage}.{d}" for d in range(int(c[f"stage{stage}.depth"]))]
        return Training(compression={"channel_prune": {f"{block}.first.conv": inner for block in blocks}})

    def _quantized(self, c: Candidate, stage: int) -> Training | None:
        """Bits per convolution of the stage's blocks."""
        if self._precision(c, stage) == "fp32":
            return None
        cin, width = self._width(c, stage - 1), self._width(c, stage)
        blocks = [f"stages.{stage}.{d}" for d in range(int(c[f"stage{stage}.depth"]))]
        layers = [f"{block}.{conv}.conv" for block in blocks for conv in ("first", "second")]
        if self.strides[stage] != 1 or cin != width:
            layers.append(f"stages.{stage}.0.shortcut.conv")
        return Training(compression={"quantize": dict.fromkeys(layers, 8)})

    def _quantized_as(self, c: Candidate, stage: int, layer: str) -> Training | None:
        """A layer outside the stages, at the precision of the stage beside it."""
        return Training(compression={"quantize": {layer: 8}}) if self._precision(c, stage) == "int8" else None

    # ---- reference members ------------------------------------------------------------------------

    def ladder(self) -> list[Candidate]:
        """The plain fp32 members with every size choice at its smallest, middle and largest value."""
        return members.ladder(self.choices)

    def uniform(self) -> list[Candidate]:
        """Every uniform level with the fewest bits, pruned or not: the teacher shrunk without a search."""
        return members.uniform(self.choices)


def _check(
    task: TaskInfo,
    stem: Sequence[int],
    widths: Sequence[Sequence[int]],
    depths: Sequence[Sequence[int]],
    strides: Sequence[int],
    bits: Sequence[int],
) -> None:
    if len(task.input_shape) != 3:
        raise SpaceError(f"Input shape {task.input_shape}.", expected="images: (channels, height, width)")
    if not len(widths) == len(depths) == len(strides):
        raise SpaceError(
            f"{len(widths)} widths, {len(depths)} depths, {len(strides)} strides.", expected="one per stage"
        )
    if len(stem) not in (2, 3) or (len(stem) == 3 and stem[2] % 2 == 0):
        raise SpaceError(f"Stem {list(stem)}.", expected="channels, stride and, if you like, an odd kernel")
    unaligned = [w for stage in (*widths, stem[:1]) for w in stage if w % 8]
    if unaligned:
        raise SpaceError(f"Widths {unaligned} are no multiples of 8.", expected="multiples of 8, the runtime's block")
    if set(bits) - {8, 32}:
        raise SpaceError(f"Bits {sorted(bits)}.", expected="8 and 32: what onnxruntime executes")


space = ResNet
