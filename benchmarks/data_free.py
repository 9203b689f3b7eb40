"""Students that never saw the training data: the GAN's and the VAE's samples beside random noise and real data.

    python benchmarks/data_free.py --data PATH/mnist.npz --seeds 0,1,2
    python benchmarks/data_free.py --data digits --seeds 0,1,2

Trains a residual CNN with BatchNorm on labelled images (the teacher), then one student of half its widths per source:
the same recipe, batch and steps for all. Accuracy is that on the test split, which nothing was chosen by. Every seed
changes the subset, the teacher, the student's first weights and everything drawn. "real" are the teacher's own
training images, unlabelled; the VAE is trained on these, and its student sees its samples only.

Prints one JSON line per student and a table at the end.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from own_model import Block
from torch import Tensor, nn

from nas.datafree import Recipe, distil_without_data
from nas.space import TaskInfo
from nas.tasks import ImageClassification, Task

SOURCES = {"GAN": "gan", "VAE": "vae", "noise": "noise", "real": "data"}


class ResidualNet(nn.Module):
    """Raw images → logits; a stem and three stages of one block each. The second and third halve
    the sides, and so does the stem where they are beyond 16 pixels."""

    mean: Tensor
    std: Tensor

    def __init__(self, info: TaskInfo, width: int) -> None:
        super().__init__()
        for name, values in (("mean", info.mean), ("std", info.std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1))
        stride = 2 if info.input_shape[1] > 16 else 1
        self.body = nn.Sequential(
            nn.Conv2d(info.input_shape[0], width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, info.classes),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.body((x - self.mean) / self.std)
        return logits


def make(info: TaskInfo, width: int, seed: int) -> ResidualNet:
    """An untrained network."""
    torch.manual_seed(seed)
    return ResidualNet(info, width)


def teach(task: Task, width: int, epochs: int, seed: int) -> nn.Module:
    """Ordinary training on the labelled training split."""
    (x, y), model = task.split("train"), make(task.info, width, seed)
    generator, batch = torch.Generator().manual_seed(seed), 128
    steps = epochs * (len(x) // batch)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=5e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator)[: len(x) // batch * batch].split(batch):
            loss = F.cross_entropy(model(task.augment(x[rows], generator)), y[rows])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right answers."""
    return float((torch.cat([model(piece) for piece in x.split(512)]).argmax(1) == y).float().mean())


def run(options: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """One teacher, and a student for every source."""
    task = ImageClassification(options.data, seed=seed, limit=options.limit, valid=0.1, shift=options.shift)
    start = time.perf_counter()
    teacher = teach(task, options.width, options.epochs, seed)
    x, y = task.split("test")
    rows = [{"seed": seed, "source": "teacher", "accuracy": accuracy(teacher, x, y)}]
    rows[0]["seconds"] = time.perf_counter() - start
    print(json.dumps(rows[0]), flush=True)
    recipe = Recipe(rounds=options.rounds, steps=options.steps, batch_size=options.batch, replay=options.replay)
    for name in options.sources.split(","):
        settings = json.loads({"GAN": options.gan, "VAE": options.vae}.get(name, "{}"))
        student, start = make(task.info, options.width // 2, seed + 1000), time.perf_counter()
        images = task.split("train")[0] if name in ("VAE", "real") else None
        distil_without_data(
            teacher, student, task.info, SOURCES[name], settings, images=images, recipe=recipe, seed=seed
        )
        seconds = time.perf_counter() - start
        rows.append({"seed": seed, "source": name, "accuracy": accuracy(student, x, y), "seconds": seconds})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, or an .npz of images")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--limit", type=int, default=10_000, help="labelled images that the teacher may learn from")
    parser.add_argument("--width", type=int, default=16, help="of the teacher's stem; the student has half")
    parser.add_argument("--epochs", type=int, default=4, help="of the teacher")
    parser.add_argument("--shift", type=int, default=0, help="augmentation of the teacher's training, pixels")
    parser.add_argument("--rounds", type=int, default=400, help="of a student's training")
    parser.add_argument("--steps", type=int, default=4, help="of the student in a round")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--replay", type=int, default=8192, help="images of earlier rounds that are kept")
    parser.add_argument("--sources", default=",".join(SOURCES))
    parser.add_argument("--gan", default="{}", metavar="JSON", help="options of the GAN that differ from the defaults")
    parser.add_argument("--vae", default='{"steps": 500}', metavar="JSON", help="those of the VAE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    rows = [row for seed in seeds for row in run(options, seed)]
    print(f"\n| trained on | test accuracy, % (mean ± std, {len(seeds)} seeds) | seconds |\n|---|---|---|")
    for name in ["teacher", *options.sources.split(",")]:
        mine = [row for row in rows if row["source"] == name]
        scores = 100 * np.array([row["accuracy"] for row in mine])
        spread = scores.std(ddof=1) if len(scores) > 1 else float("nan")
        print(f"| {name} | {scores.mean():.2f} ± {spread:.2f} | {np.mean([row['seconds'] for row in mine]):.0f} |")


if __name__ == "__main__":
    main()
