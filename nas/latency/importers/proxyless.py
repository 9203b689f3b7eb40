"""The block tables of ProxylessNAS: phone latencies of inverted bottlenecks at 224×224.

Cai, Zhu and Han 2019, "ProxylessNAS: Direct Neural Architecture Search on Target Task and Hardware". A key names an
operation with its shapes, ``expanded_conv-input:112x112x16-output:56x56x24-expand:6-kernel:5-stride:2-idskip:0``; a
network costs the sum over its operations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nas.errors import TableError
from nas.latency.importers.base import Format, bottlenecks, importers, out_size, read_rows, shape, table_of
from nas.latency.table import LatencyTable

SPACE = "proxylessnas"
ORIGINS = {
    "pixel_trim": {
        "source": "pixel_trim.yaml of the ProxylessNAS authors (github.com/mit-han-lab/proxylessnas), as kept in "
        "github.com/itouchz/Neural-Predictor-Tensorflow, proxylessnas/pixel_trim.yaml",
        "licence": "MIT",
    },
    "mobile_trim": {
        "source": "proxylessnas/mobile_trim.yaml of the ProxylessNAS authors, github.com/han-cai/files",
        "licence": "none stated (the authors' code, github.com/mit-han-lab/proxylessnas, is under MIT)",
    },
}
#: Of each stage: channels, blocks, stride of the first; the stem has 32 channels and the first block 16.
STAGES = ((24, 4, 2), (40, 4, 2), (80, 4, 2), (96, 4, 1), (192, 4, 2), (320, 1, 1))
STEM, FIRST, FEATURES, CLASSES, RESOLUTION = 32, 16, 1280, 1000, 224


class Block(NamedTuple):
    """One inverted bottleneck; ``skip``: its input is added to its output."""

    inputs: int
    outputs: int
    expand: int
    kernel: int
    stride: int
    skip: bool


def read(path: Path, select: str = "") -> LatencyTable:
    """A table from the authors' YAML (or the same as JSON), or from a CSV with the column ``table``.

    Args:
        select: which table of a CSV; may be left out where there is one.

    Raises:
        TableError: unreadable, or it is not said which of several tables is meant.
    """
    rows = read_rows(path, "table")
    names = sorted({row.group for row in rows})
    stem = path.name.partition(".")[0]
    if select not in names:
        if select or len(names) > 1:
            found = f"{path} has no table {select!r}." if select else f"{path} has {len(names)} tables."
            raise TableError(found, expected=f"one of {', '.join(names)}", remedy=f"--select {names[0]}")
        select = names[0]
    name = select or stem
    origin = ORIGINS.get(name, {"source": path.name, "licence": "not known"})
    chosen = [row for row in rows if row.group == select]
    return table_of(chosen, space=SPACE, device={"name": name, "batch": 1}, origin=origin, files=[path])


def network(
    stem: int, blocks: Iterable[Block], features: int, classes: int = CLASSES, resolution: int = RESOLUTION
) -> list[str]:
    """Keys of a network: its stem, its blocks in order, the last convolution and the classifier."""
    size = out_size(resolution, 2)
    keys, channels = [f"Conv-input:{shape(resolution, 3)}-output:{shape(size, stem)}"], stem
    for block in blocks:
        out = out_size(size, block.stride)
        keys.append(
            f"expanded_conv-input:{shape(size, block.inputs)}-output:{shape(out, block.outputs)}-expand:{block.expand}"
            f"-kernel:{block.kernel}-stride:{block.stride}-idskip:{int(block.skip)}"
        )
        size, channels = out, block.outputs
    return [
        *keys,
        f"Conv_1-input:{shape(size, channels)}-output:{shape(size, features)}",
        f"Logits-input:{shape(size, features)}-output:{classes}",
    ]


def blocks(config: Mapping[str, Any], resolution: int = RESOLUTION) -> list[str]:
    """Keys of a published network, ``proxyless_mobile.config`` and the like; blocks that do nothing cost nothing.

    Raises:
        TableError: it is no such configuration.
    """
    try:
        found = []
        for block, conv in bottlenecks(config):
            found.append(
                Block(
                    conv["in_channels"], conv["out_channels"], conv["expand_ratio"], conv["kernel_size"],
                    conv["stride"], block["shortcut"] is not None and block["shortcut"]["name"] != "ZeroLayer",
                )
            )  # fmt: skip
        classes = config["classifier"]["out_features"]
        stem, features = config["first_conv"]["out_channels"], config["feature_mix_layer"]["out_channels"]
    except (KeyError, TypeError) as error:
        raise TableError(f"This is no configuration of a ProxylessNAS network: {error!r}.") from error
    return network(stem, found, features, classes, resolution)


def random_net(rng: np.random.Generator) -> list[str]:
    """Keys of a uniformly drawn network of the space that the tables were made for."""
    first = Block(STEM, FIRST, 1, 3, 1, False)
    found, channels = [first], FIRST
    for width, depth, stride in STAGES:
        for i in range(depth):
            if i and rng.random() < 1 / 7:  # one of the seven choices is to leave the block out
                continue
            kernel, expand = int(rng.choice((3, 5, 7))), int(rng.choice((3, 6)))
            found.append(Block(channels, width, expand, kernel, 1 if i else stride, i > 0))
            channels = width
    return network(STEM, found, FEATURES)


importers.register("proxylessnas")(Format(SPACE, read, random_net))
