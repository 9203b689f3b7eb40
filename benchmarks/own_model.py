"""A trained model of somebody's own, for the benchmarks of compression: data, teacher, and an experiment on both.

    python benchmarks/own_model.py --data FOLDER --out runs/own-cifar          # 10,000 images of CIFAR-10, ResNet-8
    python benchmarks/own_model.py --data FOLDER --out runs/own-mnist --set mnist

Writes into --out: ``data.npz``, ``weights.safetensors``, ``experiment.yaml``. FOLDER holds ``cifar10_jpeg_*.npz`` or
``mnist.npz``. The networks are He et al. 2016 for CIFAR, of one block a stage, in plain torch.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file
from torch import nn

from nas.evaluators.train import predict
from nas.tasks import Task, tasks

IMAGES = 10_000
SMOOTHING = 0.1


class Block(nn.Module):
    """Two 3×3 convolutions and their shortcut."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout)
        self.conv2, self.bn2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False), nn.BatchNorm2d(cout)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or cin != cout:
            self.shortcut = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """Stem, three stages, average, classifier; raw values 0..1 in."""

    def __init__(self, channels: int, width: int, depth: int = 1) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        blocks, cin = [], width
        for stage in range(3):
            for i in range(depth):
                blocks.append(Block(cin, width * 2**stage, 2 if stage and not i else 1))
                cin = width * 2**stage
        self.stages = nn.Sequential(*blocks)
        self.fc = nn.Linear(cin, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn(self.stem((x - 0.45) * 4.0)))
        return self.fc(self.stages(x).mean((2, 3)))


def cifar_resnet8() -> nn.Module:
    """ResNet-8 of width 32, as a user's ``module:build``: at 12.5 % of its latency something is left to choose."""
    return ResNet(3, 32)


def mnist_resnet8() -> nn.Module:
    """ResNet-8 of width 16 for one channel."""
    return ResNet(1, 16)


MODELS = {"cifar": cifar_resnet8, "mnist": mnist_resnet8}


def cifar(folder: Path) -> dict[str, npt.NDArray[np.generic]]:
    """The first 10,000 training images and the test images, 0..1."""
    from PIL import Image

    def decoded(path: Path) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        with np.load(path, allow_pickle=False) as data:
            jpeg, offset, label = data["jpeg"], data["offset"], data["label"]
        images = [
            np.asarray(Image.open(io.BytesIO(jpeg[a:b].tobytes()))) for a, b in itertools.pairwise(offset)
        ]
        return (np.stack(images).transpose(0, 3, 1, 2) / 255).astype(np.float32), label.astype(np.int64)

    x, y = decoded(folder / "cifar10_jpeg_train0.npz")
    x_test, y_test = decoded(folder / "cifar10_jpeg_test.npz")
    return {"x_train": x[:IMAGES], "y_train": y[:IMAGES], "x_test": x_test, "y_test": y_test}


def mnist(folder: Path) -> dict[str, npt.NDArray[np.generic]]:
    """The first 10,000 training images and the test images, 0..1."""
    with np.load(folder / "mnist.npz", allow_pickle=False) as data:
        found = {key: data[key] for key in ("x_train", "y_train", "x_test", "y_test")}
    for key in ("x_train", "x_test"):
        found[key] = (found[key].reshape(-1, 1, 28, 28) / 255).astype(np.float32)
    return {key: value[:IMAGES] if "train" in key else value for key, value in found.items()}


def train_teacher(model: nn.Module, task: Task, epochs: int, lr: float, seed: int) -> float:
    """AdamW, one cycle, shifts and flips; returns the accuracy on validation data."""
    x, y = task.split("train")
    generator = torch.Generator().manual_seed(seed)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=5e-2)
    steps = len(x) // 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=epochs * steps)
    for _ in range(epochs):
        model.train()
        images = task.augment(x, generator)
        order = torch.randperm(len(x), generator=generator)
        for rows in order[: steps * 64].split(64):
            optimiser.zero_grad(set_to_none=True)
            F.cross_entropy(model(images[rows]), y[rows], label_smoothing=SMOOTHING).backward()
            optimiser.step()
            schedule.step()
    valid_x, valid_y = task.split("valid")
    return task.evaluate(predict(model, valid_x), valid_y.numpy())[task.metric]


def main() -> None:
    """Prepare everything in a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", choices=sorted(MODELS), default="cifar")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--limit", type=int, default=IMAGES, help="images for training and validation together")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "data.npz"
    np.savez(path, **(cifar if options.set == "cifar" else mnist)(options.data))
    # One split for all seeds of a search: the teacher knows its own training images.
    section = {"data": str(path), "seed": options.seed, "shift": 2, "flip": options.set == "cifar"}
    section["limit"] = options.limit
    task = tasks.get("classification")(**section)
    start = time.perf_counter()
    torch.manual_seed(options.seed)
    model = MODELS[options.set]()
    valid = train_teacher(model, task, options.epochs, options.lr, options.seed)
    weights = options.out / "weights.safetensors"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, weights)
    experiment = {
        "name": f"own-{options.set}",
        "seed": options.seed,
        "task": section,
        "space": {
            "model": f"benchmarks.own_model:{MODELS[options.set].__name__}", "weights": str(weights),
            "prune": [0.0, 0.25, 0.5, 0.75], "bits": [32, 8], "ranks": [1.0, 0.5],
            "kd_weights": [0.3, 0.7], "temperatures": [4.0],
        },
        "table": {"seconds": 60.0, "nets": 24},
        "budget": {"latency": "25%"},
        "strategy": {"kind": "default", "initial": 4},
        "search": {"trials": 8, "batch": 2, "warm": 1},
        "training": {"epochs": 3, "compressed_epochs": 2, "lr": 4e-3, "views": 4, "weight_decay": 2e-2},
        "finalists": {"count": 1, "epochs": 10, "compressed_epochs": 5},
    }  # fmt: skip
    (options.out / "experiment.yaml").write_text(yaml.safe_dump(experiment, sort_keys=False))
    print(json.dumps({"valid": round(valid, 4), "seconds": round(time.perf_counter() - start, 1)}))


if __name__ == "__main__":
    main()
