"""MobileNet-like space: inverted bottlenecks of chosen depth, kernel, expansion, width and resolution, compressed.

Every channel count is a multiple of 8 and every activation a ReLU6, because that is what keeps convolutions in
the fast layout and lets int8 fuse (see docs/architecture.md). The compression genes are bits per stage (32 or 8),
the share of each bottleneck's hidden channels that is pruned after training, and the distillation settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from nas import members
from nas.errors import SpaceError
from nas.parts import AddInput, Boundary, Conv, GlobalAveragePool, Normalize, Part, Resize
from nas.space import Candidate, Choice, SearchSpace, Site, TaskInfo, Training
from nas.staged import StagedClassifier


def round8(channels: float) -> int:
    """Nearest multiple of 8, at least 8."""
    return max(8, int(channels / 8 + 0.5) * 8)


class ConvNormAct(nn.Sequential):
    """Convolution, batch normalisation and, unless linear, ReLU6."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True) -> None:
        conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
        super().__init__()
        self.add_module("conv", conv)
        self.add_module("norm", nn.BatchNorm2d(cout))
        if act:
            self.add_module("act", nn.ReLU6())


class InvertedBottleneck(nn.Module):
    """1×1 expansion, depthwise k×k, linear 1×1 projection; residual where the shapes allow."""

    def __init__(self, cin: int, hidden: int, cout: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.expand = ConvNormAct(cin, hidden, 1)
        self.depthwise = ConvNormAct(hidden, hidden, kernel, stride, groups=hidden)
        self.project = ConvNormAct(hidden, cout, 1, act=False)
        self.residual = stride == 1 and cin == cout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return y + x if self.residual else y


class MobileNet(SearchSpace):
    """The space; one dictionary entry per stage configures it.

    Args:
        task: shapes, classes and preprocessing of the data.
        resolutions: side lengths that the input is resized to.
        stem: channels and stride of the first convolution.
        widths, depths, strides: per stage; widths are multiples of 8.
        kernels, expansions: offered in every stage.
        bits: weight and activation bits on offer per stage: 32 (fp32) or 8 (int8).
        prune: shares of hidden channels removed after training, rounded to multiples of 8.
        kd_weights, temperatures: distillation settings on offer.
        feature_weights, attention_weights: of what is learnt beside the teacher's logits; 0 alone is no choice.
    """

    name = "mobilenet"

    def __init__(
        self,
        task: TaskInfo,
        *,
        resolutions: Sequence[int] = (8, 16),
        stem: tuple[int, int] = (16, 1),
        widths: Sequence[Sequence[int]] = ((16,), (24, 32), (48, 64)),
        depths: Sequence[Sequence[int]] = ((1, 2), (1, 2, 3), (1, 2, 3)),
        strides: Sequence[int] = (1, 2, 2),
        kernels: Sequence[int] = (3, 5),
        expansions: Sequence[int] = (2, 4),
        bits: Sequence[int] = (32, 8),
        prune: Sequence[float] = (0.0, 0.5),
        kd_weights: Sequence[float] = (0.0, 0.5, 0.9),
        temperatures: Sequence[float] = (2.0, 4.0),
        feature_weights: Sequence[float] = (0.0,),
        attention_weights: Sequence[float] = (0.0,),
    ) -> None:
        self.task = task
        self.stem_width, self.stem_stride = stem
        self.strides = tuple(strides)
        self.stages = range(len(widths))
        _check(task, widths, depths, strides, bits, self.stem_width)
        choices = [Choice("resolution", resolutions)]
        for s in self.stages:
            choices += [
                Choice(f"stage{s}.depth", depths[s]),
                Choice(f"stage{s}.width", widths[s]),
                Choice(f"stage{s}.kernel", kernels),
                Choice(f"stage{s}.expand", expansions),
                Choice(f"stage{s}.prune", prune, plain=0.0 if 0.0 in prune else None, technique="pruning"),
                Choice(f"stage{s}.bits", bits, plain=32 if 32 in bits else None, technique="quantization"),
            ]
        choices += members.distillation_choices(
            kd_weights, temperatures, feature_weights=feature_weights, attention_weights=attention_weights
        )
        # A choice of one value is no choice, but spaces with fixed genes keep one shape of genome.
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
        for stride in (self.stem_stride, *self.strides[:stage]):
            side = (side - 1) // stride + 1
        return side

    def _cin(self, c: Candidate, stage: int) -> int:
        return self.stem_width if stage == 0 else int(c[f"stage{stage - 1}.width"])

    def _hidden(self, c: Candidate, stage: int, cin: int) -> tuple[int, int]:
        """Hidden channels as trained and as pruned."""
        trained = round8(cin * float(c[f"stage{stage}.expand"]))
        return trained, min(trained, round8(trained * (1 - float(c[f"stage{stage}.prune"]))))

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
        conv = Conv(self.stem_width, 3, self.stem_stride, activation="relu6")
        return Part((conv,), (self.task.input_shape[0], side, side), self._precision(c, 0))

    def _block(self, c: Candidate, stage: int, cin: int, side: int, stride: int, count: int) -> Part:
        width = int(c[f"stage{stage}.width"])
        kernel = int(c[f"stage{stage}.kernel"])
        _, hidden = self._hidden(c, stage, cin)
        ops: list[Any] = [
            Conv(hidden, 1, activation="relu6"),
            Conv(hidden, kernel, stride, groups=0, activation="relu6"),
            Conv(width, 1),
        ]
        if stride == 1 and cin == width:
            ops.append(AddInput())
        return Part(tuple(ops), (cin, side, side), self._precision(c, stage), count)

    def _first(self, c: Candidate, stage: int) -> Part:
        return self._block(c, stage, self._cin(c, stage), self._side(c, stage), self.strides[stage], 1)

    def _rest(self, c: Candidate, stage: int) -> Part | None:
        more = int(c[f"stage{stage}.depth"]) - 1
        if not more:
            return None
        return self._block(c, stage, int(c[f"stage{stage}.width"]), self._side(c, stage + 1), 1, more)

    def _boundary(self, c: Candidate, stage: int) -> Part | None:
        """Crossing from the stage before into this one."""
        if stage == 0:
            return None
        before, here = self._precision(c, stage - 1), self._precision(c, stage)
        if before == here:
            return None
        cin, side = self._cin(c, stage), self._side(c, stage)
        if here == "int8":
            return Part((Boundary("quantize"),), (cin, side, side), "boundary")
        # The runtime dequantises once for every reader; a residual is a second one.
        residual = self.strides[stage] == 1 and cin == int(c[f"stage{stage}.width"])
        return Part((Boundary("dequantize"),), (cin, side, side), "boundary", 2 if residual else 1)

    def _head(self, c: Candidate) -> Part:
        last = len(self.stages) - 1
        side = self._side(c, last + 1)
        ops = (GlobalAveragePool(), Conv(self.task.classes, 1))
        return Part(ops, (int(c[f"stage{last}.width"]), side, side), self._precision(c, last))

    def _output(self, c: Candidate) -> Part | None:
        if self._precision(c, len(self.stages) - 1) == "fp32":
            return None
        return Part((Boundary("dequantize"),), (self.task.classes, 1, 1), "boundary")

    # ---- what is trained --------------------------------------------------------------------------

    def build(self, candidate: Candidate) -> nn.Module:
        """The unpruned float model of ``candidate``."""
        c = candidate
        stem = ConvNormAct(self.task.input_shape[0], self.stem_width, 3, self.stem_stride)
        stages = nn.ModuleList()
        for s in self.stages:
            width, kernel = int(c[f"stage{s}.width"]), int(c[f"stage{s}.kernel"])
            blocks = nn.ModuleList()
            for d in range(int(c[f"stage{s}.depth"])):
                cin = self._cin(c, s) if d == 0 else width
                trained, _ = self._hidden(c, s, cin)
                blocks.append(InvertedBottleneck(cin, trained, width, kernel, self.strides[s] if d == 0 else 1))
            stages.append(blocks)
        return StagedClassifier(self.task, int(c["resolution"]), stem, stages, width)

    def _pruned(self, c: Candidate, stage: int) -> Training | None:
        """Hidden channels kept, per block."""
        keep: dict[str, int] = {}
        for d in range(int(c[f"stage{stage}.depth"])):
            cin = self._cin(c, stage) if d == 0 else int(c[f"stage{stage}.width"])
            trained, pruned = self._hidden(c, stage, cin)
            if pruned < trained:
                keep[f"stages.{stage}.{d}.expand.conv"] = pruned
        return Training(compression={"channel_prune": keep}) if keep else None

    def _quantized(self, c: Candidate, stage: int) -> Training | None:
        """Bits per convolution of the stage's blocks."""
        if self._precision(c, stage) == "fp32":
            return None
        blocks = [f"stages.{stage}.{d}" for d in range(int(c[f"stage{stage}.depth"]))]
        convs = ("expand", "depthwise", "project")
        return Training(compression={"quantize": {f"{block}.{conv}.conv": 8 for block in blocks for conv in convs}})

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
    widths: Sequence[Sequence[int]],
    depths: Sequence[Sequence[int]],
    strides: Sequence[int],
    bits: Sequence[int],
    stem: int,
) -> None:
    if len(task.input_shape) != 3:
        raise SpaceError(f"Input shape {task.input_shape}.", expected="images: (channels, height, width)")
    if not len(widths) == len(depths) == len(strides):
        raise SpaceError(
            f"{len(widths)} widths, {len(depths)} depths, {len(strides)} strides.", expected="one per stage"
        )
    unaligned = [w for stage in widths for w in stage if w % 8] + ([stem] if stem % 8 else [])
    if unaligned:
        raise SpaceError(f"Widths {unaligned} are no multiples of 8.", expected="multiples of 8, the runtime's block")
    if set(bits) - {8, 32}:
        raise SpaceError(f"Bits {sorted(bits)}.", expected="8 and 32: what onnxruntime executes")


space = MobileNet
