"""Models as users write them, for spaces that are derived from them; raw inputs → logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from nas.space import TaskInfo


class Residual(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout)
        self.conv2, self.bn2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False), nn.BatchNorm2d(cout)
        self.down: nn.Module = nn.Identity()
        if stride > 1 or cin != cout:
            self.down = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.down(x)
        return F.relu(y)


class ResidualNet(nn.Module):
    """A ResNet of three stages; ``depth`` blocks each."""

    def __init__(self, width: int = 16, depth: int = 1) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        blocks, cin = [], width
        for stage, cout in enumerate((width, 2 * width, 4 * width)):
            for i in range(depth):
                blocks.append(Residual(cin, cout, 2 if stage and not i else 1))
                cin = cout
        self.layers = nn.Sequential(*blocks)
        self.fc = nn.Linear(cin, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn(self.stem((x - 5.0) / 6.0)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(self.layers(x), 1), 1))


class Inverted(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = cin * expand
        self.residual = stride == 1 and cin == cout
        self.conv = nn.Sequential(
            nn.Conv2d(cin, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(),
            nn.Conv2d(hidden, cout, 1, bias=False), nn.BatchNorm2d(cout),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class Squeeze(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * F.hardsigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class InvertedNet(nn.Module):
    """A MobileNetV2 with one squeeze-and-excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6(),
            Inverted(16, 16, 1, 2), Inverted(16, 24, 2, 4), Inverted(24, 24, 1, 4), Squeeze(24), Inverted(24, 32, 2, 4),
        )  # fmt: skip
        self.classifier = nn.Sequential(nn.Dropout(0.1), nn.Linear(32, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x / 16.0).mean([2, 3]))


class FusedAttention(nn.Module):
    """q, k and v from one layer, taken apart by a reshape, as timm's vision transformers have it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        weights = ((q @ k.transpose(-2, -1)) * (c // self.heads) ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, c))


class ChunkedAttention(nn.Module):
    """q, k and v by ``chunk``, and torch's own attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = (t.view(b, n, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


class Layer(nn.Module):
    def __init__(self, width: int, attention: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(width), attention, nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Class token, learnt positions; one layer of each attention."""

    def __init__(self, width: int = 32, heads: int = 4, side: int = 8) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, 2)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, (side // 2) ** 2 + 1, width) * 0.1)
        self.layers = nn.ModuleList(
            [Layer(width, FusedAttention(width, heads)), Layer(width, ChunkedAttention(width, heads))]
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch((x - 5.0) / 6.0).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, 0])


class TextTransformer(nn.Module):
    """Tokens → torch's own encoder → mean → classes."""

    def __init__(self, vocabulary: int = 100, length: int = 12, width: int = 32, classes: int = 5) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(length, width) * 0.1)
        layer = nn.TransformerEncoderLayer(width, 4, 64, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.fc = nn.Linear(width, classes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.fc(self.encoder(self.embedding(tokens) + self.position).mean(1))


class Dense(nn.Module):
    """Concatenations, and a linear layer on a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 16, 3, 1, 1), nn.Conv2d(16, 16, 3, 1, 1)
        self.c, self.fc = nn.Conv2d(32, 16, 3, 2, 1), nn.Linear(16 * 4 * 4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.a(x / 16.0))
        x = F.relu(self.c(torch.cat([x, F.relu(self.b(x))], 1)))
        return self.fc(x.flatten(1))


class Grouped(nn.Module):
    """What cannot be pruned: a grouped convolution, a normalisation by groups, channels cut by a slice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(1, 16, 3, 1, 1), nn.Conv2d(16, 16, 3, 1, 1, groups=4)
        self.norm, self.free = nn.GroupNorm(4, 16), nn.Conv2d(16, 32, 3, 2, 1)
        self.cut, self.fc = nn.Conv2d(32, 16, 3, 2, 1), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.grouped(F.relu(self.stem(x))))
        return self.fc(F.relu(self.cut(F.relu(self.free(x))))[:, :8].mean((2, 3)))


def residual_net() -> nn.Module:
    torch.manual_seed(0)
    return ResidualNet()


IMAGES = TaskInfo((1, 8, 8), 10, value_range=(0.0, 16.0))
TOKENS = TaskInfo((12,), 5, dtype="int64", value_range=(0, 99))
MODELS = {
    "residual": (ResidualNet, IMAGES),
    "inverted": (InvertedNet, IMAGES),
    "vision transformer": (VisionTransformer, IMAGES),
    "text transformer": (TextTransformer, TOKENS),
    "dense": (Dense, IMAGES),
    "grouped": (Grouped, IMAGES),
}
def made(name: str) -> tuple[nn.Module, torch.Tensor, TaskInfo]:
    build, info = MODELS[name]
    torch.manual_seed(0)
    model = build()
    x = info.random(16, seed=1)
    if info.dtype == "float32":  # statistics of real activations, so that nothing vanishes
        with torch.no_grad():
            for _ in range(10):
                model.train()(x)
    return model.eval(), x, info
