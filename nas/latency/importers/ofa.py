"""The block tables of once-for-all: a Galaxy Note10's latencies of MobileNetV3 blocks, one file a resolution.

Cai et al. 2020, "Once-for-All: Train One Network and Specialize it for Efficient Deployment". Blocks of one shape
were measured once for every resolution of the input, so keys of the imported table begin with it: ``r192 Conv-…``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nas.errors import TableError
from nas.latency.importers.base import Format, bottlenecks, importers, out_size, read_rows, shape, table_of
from nas.latency.table import LatencyTable

SPACE = "ofa_mbv3"
RESOLUTIONS = (160, 176, 192, 208, 224)
DEPTHS, KERNELS, EXPANSIONS = (2, 3, 4), (3, 5, 7), (3, 4, 6)
STEM, HEAD, FEATURES, CLASSES = 24, 1152, 1536, 1000
# Of each stage: channels, stride of its first block, squeeze-and-excitation, h-swish (otherwise ReLU).
STAGES = ((32, 2, False, False), (48, 2, True, False), (96, 2, False, True), (136, 1, True, True), (192, 2, True, True))
BLOCKS = 4  # of a stage at its largest depth
ORIGIN = {
    "source": "ofa/note10/*_lookup_table.yaml of the once-for-all authors, github.com/han-cai/files",
    "licence": "none stated (the authors' code, github.com/mit-han-lab/once-for-all, is under MIT)",
}
_FILE = re.compile(r"(\d+)_lookup_table\.(?:ya?ml|json)(?:\.gz)?")


class Block(NamedTuple):
    """One inverted bottleneck: ``middle`` channels between, ``skip``: its input is added, ``se``, ``h_swish``."""

    inputs: int
    outputs: int
    middle: int
    kernel: int
    stride: int
    skip: bool
    se: bool
    h_swish: bool


def read(path: Path, select: str = "") -> LatencyTable:
    """A table from a folder of the authors' YAML files, from one of them, or from a CSV with the column ``resolution``.

    Args:
        select: one resolution, instead of all that are there; of a file whose name does not say it, its resolution.

    Raises:
        TableError: unreadable, or the resolution is not there or not known.
    """
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if _FILE.fullmatch(file.name))
        if not files:
            raise TableError(f"The folder {path} has no block table.", expected="files such as 192_lookup_table.yaml")
    rows = []
    for file in files:
        named = _FILE.fullmatch(file.name)
        for row in read_rows(file, "resolution"):
            group = row.group or (named[1] if named else select)
            if not group.isdecimal():
                raise TableError(f"The resolution of {file} is not known.", remedy="--select 192, or whichever it is")
            rows.append(replace(row, key=f"r{group} {row.key}", group=group))
    chosen = [row for row in rows if select in ("", row.group)]
    if not chosen:
        there = sorted({row.group for row in rows})
        raise TableError(f"{path} has no resolution {select!r}.", expected=f"one of {', '.join(there)}")
    device = {"name": "galaxy-note10", "batch": 1}
    return table_of(chosen, space=SPACE, device=device, origin=ORIGIN, files=files)


def network(resolution: int, stem: int, blocks: Iterable[Block], head: int, features: int, classes: int) -> list[str]:
    """Keys of a network: stem, blocks in order, last convolution, pooling, feature layer, classifier."""
    size = out_size(resolution, 2)
    keys, channels = [f"Conv-input:{shape(resolution, 3)}-output:{shape(size, stem)}"], stem
    for block in blocks:
        out = out_size(size, block.stride)
        keys.append(
            f"expanded_conv-input:{shape(size, block.inputs)}-output:{shape(out, block.outputs)}-expand:{block.middle}"
            f"-kernel:{block.kernel}-stride:{block.stride}-idskip:{int(block.skip)}-se:{int(block.se)}"
            f"-hs:{int(block.h_swish)}"
        )
        size, channels = out, block.outputs
    keys += [
        f"Conv_1-input:{shape(size, channels)}-output:{shape(size, head)}",
        f"AvgPool2D-input:{shape(size, head)}-output:{shape(1, head)}",
        f"Conv_2-input:{shape(1, head)}-output:{shape(1, features)}",
        f"Logits-input:{shape(1, features)}-output:{classes}",
    ]
    return [f"r{resolution} {key}" for key in keys]


def blocks(ks: Sequence[int], e: Sequence[float], d: Sequence[int], resolution: int) -> list[str]:
    """Keys of a subnet of ``ofa_mbv3_d234_e346_k357_w1.2`` as the authors write it.

    Args:
        ks, e: kernel size and expansion ratio of 20 blocks, four a stage; those beyond the stage's depth do not count.
        d: depth of the five stages.
        resolution: side of the input.

    Raises:
        TableError: the lists are of other lengths.
    """
    if not len(ks) == len(e) == BLOCKS * len(STAGES) or len(d) != len(STAGES):
        raise TableError(
            f"A subnet of once-for-all with {len(ks)} kernels, {len(e)} expansions and {len(d)} depths.",
            expected=f"{BLOCKS * len(STAGES)}, {BLOCKS * len(STAGES)} and {len(STAGES)}",
        )
    found, channels = [Block(STEM, STEM, STEM, 3, 1, True, False, False)], STEM
    for stage, (width, stride, se, h_swish) in enumerate(STAGES):
        for i in range(d[stage]):
            at = BLOCKS * stage + i
            middle = round(channels * e[at])
            found.append(Block(channels, width, middle, ks[at], 1 if i else stride, i > 0, se, h_swish))
            channels = width
    return network(resolution, STEM, found, HEAD, FEATURES, CLASSES)


def config_blocks(config: Mapping[str, Any], resolution: int) -> list[str]:
    """Keys of a published specialised network, ``net.config`` of the authors' files.

    Raises:
        TableError: it is no such configuration.
    """
    try:
        found = []
        for block, conv in bottlenecks(config):
            middle = conv["mid_channels"] or round(conv["in_channels"] * conv["expand_ratio"])
            found.append(
                Block(
                    conv["in_channels"], conv["out_channels"], middle, conv["kernel_size"], conv["stride"],
                    block["shortcut"] is not None, bool(conv["use_se"]), conv["act_func"] == "h_swish",
                )
            )  # fmt: skip
        stem, classes = config["first_conv"]["out_channels"], config["classifier"]["out_features"]
        head, features = config["final_expand_layer"]["out_channels"], config["feature_mix_layer"]["out_channels"]
    except (KeyError, TypeError) as error:
        raise TableError(f"This is no configuration of a once-for-all network: {error!r}.") from error
    return network(resolution, stem, found, head, features, classes)


def random_net(rng: np.random.Generator) -> list[str]:
    """Keys of a uniformly drawn subnet."""
    count = BLOCKS * len(STAGES)
    ks, e = (rng.choice(values, count).tolist() for values in (KERNELS, EXPANSIONS))
    return blocks(ks, e, rng.choice(DEPTHS, len(STAGES)).tolist(), int(rng.choice(RESOLUTIONS)))


importers.register("ofa")(Format(SPACE, read, random_net))
