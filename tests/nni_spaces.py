"""Model spaces written for NNI, as its users write them, and some that cannot be searched."""

from __future__ import annotations

import nni
import torch
from nni.mutable import ExpressionConstraint, ensure_frozen
from nni.nas.nn.pytorch import (
    Cell,
    InputChoice,
    LayerChoice,
    ModelSpace,
    MutableBatchNorm2d,
    MutableConv2d,
    MutableDropout,
    MutableLinear,
    MutableModule,
    MutableReLU,
    ParametrizedModule,
    Repeat,
)
from nni.nas.space import model_context
from torch import Tensor, nn


class Block(nn.Module):
    """A residual branch: narrow or wide within, of some kernel, with or without a second convolution."""

    def __init__(self, channels: int, index: int) -> None:
        super().__init__()
        hidden = nni.choice(f"wide{index}", [1, 2, 3]) * 8
        kernel = nni.choice(f"kernel{index}", [1, 3])
        self.first = MutableConv2d(channels, hidden, kernel, padding=(kernel - 1) // 2, bias=False)
        self.norm = MutableBatchNorm2d(hidden)
        self.act = nn.ReLU(inplace=True)
        self.second = LayerChoice(
            {"one": MutableConv2d(hidden, channels, 1), "two": nn.Sequential(
                MutableConv2d(hidden, hidden, 3, padding=1, groups=hidden), nn.ReLU(),
                LayerChoice([MutableConv2d(hidden, channels, 1), MutableConv2d(hidden, channels, 3, padding=1)],
                            label=f"inner{index}"),
            )},
            label=f"second{index}",
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.act(self.norm(self.first(x))))


class Mixed(ModelSpace):
    """Every kind of choice that NNI's documents have, on grey images of any side."""

    def __init__(self, num_labels: int = 10, widths: tuple[int, ...] = (8, 16)) -> None:
        super().__init__()
        width = nni.choice("width", list(widths))
        self.stem = MutableConv2d(1, width, 3, stride=2, padding=1)
        self.blocks = Repeat(lambda index: Block(width, index), (1, 2), label="depth")
        self.pool = LayerChoice([nn.AvgPool2d(2), nn.MaxPool2d(2)], label="pool")
        self.skip = MutableConv2d(width, width, 2, stride=2)
        self.join = InputChoice(2, None, reduction="sum", label="join")
        self.one = InputChoice(2, 1, label="one")
        self.dropout = MutableDropout(nni.choice("dropout", [0.0, 0.2]))
        self.hidden = MutableLinear(width, nni.choice("units", [8, 24]))
        self.head = MutableLinear(nni.choice("units", [8, 24]), num_labels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        a, b = self.pool(x), self.skip(x)
        x = a + self.one([a, b]).relu()
        joined = self.join([a, b])
        x = x if joined is None else x + joined
        x = self.dropout(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))
        return self.head(torch.relu(self.hidden(x)))


class Scaled(MutableModule):
    """A module that reads a label of its own, as those that NNI lets users write."""

    def __init__(self, label: str) -> None:
        super().__init__()
        self.power = self.add_mutable(nni.choice(label, [1, 2]))

    def freeze(self, sample: dict[str, object]) -> nn.Module:
        return Power(self.power.freeze(sample))

    def forward(self, x: Tensor) -> Tensor:
        return x


class Power(nn.Module):
    def __init__(self, power: int) -> None:
        super().__init__()
        self.power = power

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.power - 1):
            x = x * x
        return x


class Tower(ParametrizedModule):
    """As many convolutions as an argument says, which may be a choice."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(count)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class OwnModules(ModelSpace):
    """Modules with labels that are not NNI's own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.tower = Tower(nni.choice("layers", [1, 2, 3]))
        self.scale = Scaled("power")
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.scale(self.tower(torch.relu(self.stem(x))))
        return self.head(x.mean((2, 3)))


class Cells(ModelSpace):
    """Two cells of one label; operators are modules, so they do not depend on the input that is chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        ops = {"conv": nn.Conv2d(8, 8, 3, padding=1), "pool": nn.MaxPool2d(3, 1, 1), "skip": nn.Identity()}
        self.cells = nn.ModuleList(Cell(ops, 2, 1, 1, label="cell") for _ in range(2))
        self.narrow = nn.ModuleList(nn.Conv2d(16, 8, 1) for _ in range(2))
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for cell, narrow in zip(self.cells, self.narrow, strict=True):
            x = narrow(cell(x))
        return self.head(x.mean((2, 3)))


class Whole(ModelSpace):
    """A space that makes itself anew for its labels, as NNI's documents show for labels of no layer's."""

    def __init__(self) -> None:
        super().__init__()
        count = self.add_mutable(nni.choice("count", [1, 2]))
        self.stem = MutableConv2d(1, 8, kernel_size=[3, 3], padding=[1, 1])
        self.layers = nn.Sequential(*(nn.Conv2d(8, 8, 1) for _ in range(ensure_frozen(count))))
        self.head = nn.Linear(8, 10)

    def freeze(self, sample: dict[str, object]) -> nn.Module:
        with model_context(sample):
            return type(self)()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(torch.relu(self.stem(x))).mean((2, 3)))


# ---- what cannot be searched ------------------------------------------------------------------------------


class Unlabelled(ModelSpace):
    def __init__(self) -> None:
        super().__init__()
        self.layer = LayerChoice([nn.Flatten(), nn.Flatten()])


class Range(Mixed):
    def __init__(self) -> None:
        super().__init__()
        self.extra = MutableDropout(nni.uniform("rate", 0.0, 0.5))


class Constrained(ModelSpace):
    def __init__(self) -> None:
        super().__init__()
        a, b = nni.choice("a", [8, 16]), nni.choice("b", [8, 16])
        self.add_mutable(ExpressionConstraint(a == b, label="equal"))
        self.layer = MutableLinear(64, a)
        self.head = MutableLinear(b, 10)

    def freeze(self, sample: dict[str, object]) -> nn.Module:
        with model_context(sample):
            return type(self)()


class DependsOnData(ModelSpace):
    def __init__(self) -> None:
        super().__init__()
        self.act = LayerChoice([MutableReLU(), nn.Tanh()], label="act")
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.head(self.act(x) if x.sum() > 0 else x)


class Shapes(ModelSpace):
    def __init__(self) -> None:
        super().__init__()
        self.conv = MutableConv2d(1, 8, 3, stride=nni.choice("stride", [1, 2]), padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).mean((2, 3)))


class Fixed(ModelSpace):
    def __init__(self) -> None:
        super().__init__()
        self.conv = MutableConv2d(1, nni.choice("width", [8, 16]), 3, padding=1)
        self.rows = nn.Linear(16 * 32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.pad(self.conv(x), (0, 0, 0, 0, 0, 16 - self.conv.out_channels))
        return self.rows(x.reshape(x.shape[0], 2, 16 * 32)[:, 0])


class Namesake(ModelSpace):
    def __init__(self) -> None:
        super().__init__()
        self.layer = MutableLinear(64, 10, bias=nni.choice("temperature", [True, False]))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1))


class LooseEnds(ModelSpace):
    def __init__(self) -> None:
        super().__init__()
        self.cell = Cell([nn.Conv2d(1, 1, 3, padding=1), nn.Identity()], 2, 1, 1, merge_op="loose_end", label="cell")

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x).flatten(1)[:, :10]


def not_a_space() -> nn.Module:
    return nn.Linear(1, 1)
