"""Patterns of architectures that people have: what a derived space makes of each, and that all of it is consistent."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nas.derived import DerivedSpace
from nas.latency import Device
from nas.space import TaskInfo
from nas.student.export import export_float
from nas.testing import check_space
from nas.testing.agreement import check_agreement

IMAGES = TaskInfo((1, 8, 8), 10, value_range=(0.0, 16.0))
TOKENS = TaskInfo((12,), 5, dtype="int64", value_range=(0, 49))
SIGNALS = TaskInfo((2, 32), 5)
ROWS = TaskInfo((20,), 5)


def conv(cin: int, cout: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(cout),
        nn.ReLU(inplace=True),
    )  # fmt: skip


class Images(nn.Module):
    """Stem, body, mean, classifier."""

    def __init__(self, body: nn.Module, width: int, out: int) -> None:
        super().__init__()
        self.stem, self.body, self.fc = conv(1, width, stride=2), body, nn.Linear(out, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(self.stem(x / 16.0)).mean((2, 3)))


class Shuffle(nn.Module):
    """ShuffleNet's unit: half of the channels pass by, and all are shuffled."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(conv(width // 2, width // 2, 1), conv(width // 2, width // 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, dim=1)
        x = torch.cat([a, self.branch(b)], 1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


class DenseBlock(nn.Module):
    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(width + i * growth) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(width + i * growth, growth, 3, 1, 1) for i in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = [x]
        for norm, layer in zip(self.norms, self.convs, strict=True):
            found.append(layer(F.relu(norm(torch.cat(found, 1)))))
        return torch.cat(found, 1)


class SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, width // 2), nn.Linear(width // 2, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.up(F.silu(self.down(F.adaptive_avg_pool2d(x, 1).flatten(1)))).sigmoid()
        return x * scale[:, :, None, None]


class ConvNext(nn.Module):
    """Depthwise convolution, channels last, layer scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, 1, 1, groups=width)
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.depthwise(x).permute(0, 2, 3, 1)
        y = self.scale * self.down(F.gelu(self.up(self.norm(y))))
        return x + y.permute(0, 3, 1, 2)


class Inception(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = conv(width, 8, 1), nn.Sequential(conv(width, 16, 1), conv(16, 8))
        self.c = nn.Sequential(nn.AvgPool2d(3, 1, 1), conv(width, 8, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.a(x), self.b(x), self.c(x)], 1)


class ResNext(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(width, 16, 1), conv(16, 16, groups=4), nn.Conv2d(16, width, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.body(x))


class Twice(nn.Module):
    """One layer, called twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shared, self.after = conv(width, width), conv(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.shared(self.shared(x)))


class Buffers(nn.Module):
    """Constants that are stored, and scaled by what is computed of them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("offset", torch.linspace(-1, 1, width)[:, None, None])
        self.layer = conv(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x + self.offset) * (1 + torch.arange(4).float() / 4)


class PostNorm(nn.Module):
    """Torch's own post-norm encoder; tokens → a mask by number, token types, positions → classes; a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.types, self.positions = nn.Embedding(50, 16), nn.Embedding(2, 16), nn.Embedding(20, 16)
        self.register_buffer("ids", torch.arange(20)[None])
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.fc = nn.Linear(50, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        y = self.tokens(x) + self.types(torch.zeros_like(x)) + self.positions(self.ids[:, :length])
        words = F.linear(self.encoder(y), self.tokens.weight)
        return self.fc(words.mean(1))


class Conv1dRows(nn.Module):
    """Products with a weight [inputs, outputs] on rows, as GPT-2's layers are."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.weight, self.bias = nn.Parameter(torch.randn(16, 32) * 0.2), nn.Parameter(torch.zeros(32))
        self.fc = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.embedding(x)
        rows = torch.addmm(self.bias, y.view(-1, y.shape[-1]), self.weight)
        return self.fc(F.gelu(rows.view(*y.shape[:-1], 32)).mean(1))


class Table(nn.Module):
    """Attention with a bias that is looked up in a table, of tokens that are shifted round."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.qkv, self.out = nn.Embedding(50, 16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.table = nn.Parameter(torch.randn(23, 2) * 0.1)
        self.register_buffer("index", torch.arange(12)[:, None] - torch.arange(12)[None] + 11)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.roll(self.embedding(x), 3, 1)
        n, length, width = y.shape
        q, k, v = self.qkv(y).reshape(n, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(12, 12, 2).permute(2, 0, 1)
        weights = (q @ k.transpose(-2, -1) * 0.35 + bias).softmax(-1)
        return self.fc((y + self.out((weights @ v).transpose(1, 2).reshape(n, length, width))).mean(1))


class Signals(nn.Module):
    """One-dimensional convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv1d(2, 16, 5, 2, 2), nn.BatchNorm1d(16), nn.Conv1d(16, 16, 3, 1, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(F.relu(self.b(F.relu(self.norm(self.a(x))))).mean(2))


def rows() -> nn.Module:
    return nn.Sequential(
        nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 24), nn.BatchNorm1d(24), nn.ReLU(),
        nn.Linear(24, 5),
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], TaskInfo]] = {
    "channel shuffle": (lambda: Images(nn.Sequential(Shuffle(16), Shuffle(16)), 16, 16), IMAGES),
    "dense block": (lambda: Images(nn.Sequential(DenseBlock(12, 8), conv(36, 20)), 12, 20), IMAGES),
    "squeeze and excite": (lambda: Images(SqueezeExcite(16), 16, 16), IMAGES),
    "convnext": (lambda: Images(ConvNext(16), 16, 16), IMAGES),
    "inception": (lambda: Images(nn.Sequential(Inception(16), conv(24, 16)), 16, 16), IMAGES),
    "resnext": (lambda: Images(ResNext(16), 16, 16), IMAGES),
    "called twice": (lambda: Images(Twice(16), 16, 16), IMAGES),
    "buffers": (lambda: Images(Buffers(16), 16, 16), IMAGES),
    "post-norm and a tied head": (PostNorm, TOKENS),
    "rows": (Conv1dRows, TOKENS),
    "bias table": (Table, TOKENS),
    "linear layers with batch normalisation": (rows, ROWS),
    "signals": (Signals, SIGNALS),
}
#: Groups that may be pruned, and a word of what is said of those that may not.
FOUND: dict[str, tuple[set[str], str]] = {
    "channel shuffle": (set(), "stay"),
    "dense block": ({"stem.0", "body.0.convs.0", "body.0.convs.1", "body.0.convs.2", "body.1.0"}, ""),
    "squeeze and excite": ({"stem.0", "body.down"}, ""),
    "convnext": ({"stem.0", "body.up"}, ""),
    "inception": ({"stem.0", "body.0.a.0", "body.0.b.0.0", "body.0.b.1.0", "body.0.c.1.0", "body.1.0"}, ""),
    "resnext": ({"stem.0"}, "grouped convolution"),
    "called twice": ({"stem.0", "body.after.0"}, "called several times"),
    "buffers": ({"stem.0", "body.layer.0"}, ""),
    "post-norm and a tied head": ({"encoder.layers.0.self_attn.in_proj.heads", "encoder.layers.0.linear1"}, ""),
    "rows": ({"embedding"}, ""),
    "bias table": ({"qkv.heads"}, ""),
    "linear layers with batch normalisation": ({"0", "3"}, ""),
    "signals": ({"a", "b"}, ""),
}
EVERY = pytest.mark.parametrize("name", MODELS)


def made(name: str) -> tuple[nn.Module, DerivedSpace, TaskInfo]:
    build, info = MODELS[name]
    torch.manual_seed(0)
    model = build().eval()
    return model, DerivedSpace(info, model=model, multiple=4), info


@EVERY
def test_patterns_are_found_or_said(name: str) -> None:
    model, space, info = made(name)
    wanted, said = FOUND[name]
    assert wanted <= {group.name for group in space.groups}, space.report()
    assert said in "\n".join(space.report())
    x = info.random(4, seed=3)
    with torch.no_grad():
        torch.testing.assert_close(space.build(space.ladder()[0]).eval()(x), model(x), rtol=1e-4, atol=1e-5)


@EVERY
def test_patterns_keep_the_contract(name: str) -> None:
    _, space, info = made(name)
    check_space(space, candidates=3, info=info)


@EVERY
def test_parts_of_patterns_run(name: str) -> None:
    _, space, _ = made(name)
    keys = space.keys()
    device = Device.local()
    for key in np.random.default_rng(0).permutation(sorted(keys))[:8]:
        assert device.load(keys[key].to_onnx(1), part=True).time(1)


def test_nothing_pruned_keeps_sizes_that_are_no_multiple() -> None:
    _, space, _ = made("dense block")
    assert space.kept(20, 0.0) == 20
    assert space.kept(20, 0.5) % 4 == 0


class ByNumber(nn.Module):
    """The last word of each text, by the number of the sample."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.fc = nn.Embedding(50, 16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        last = (x != 0).int().cumsum(1).argmax(1)
        return self.fc(self.embedding(x))[torch.arange(x.shape[0]), last]


def test_rows_by_number_are_exported_for_any_batch() -> None:
    torch.manual_seed(0)
    model = ByNumber().eval()
    x = TOKENS.random(7, seed=0)
    check_agreement(model, export_float(model, x[:1]), x, "rows by number")
