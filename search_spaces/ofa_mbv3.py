"""Once-for-all MobileNetV3 on a Galaxy Note10: accuracy by the authors' predictor, latency by their block table.

Cai et al. 2020, "Once-for-All: Train One Network and Specialize it for Efficient Deployment"; the two files are those
of the tutorial in github.com/mit-han-lab/once-for-all, in plain formats.
"""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nas.errors import ContentError
from nas.space import Choice, Genomes, TaskInfo
from nas.tabular import Array, PublishedSpace, find_table

RESOLUTIONS = (160, 176, 192, 208, 224)
DEPTHS, KERNELS, EXPANSIONS = (2, 3, 4), (3, 5, 7), (3, 4, 6)
STEM, HEAD, FEATURES, CLASSES = 24, 1152, 1536, 1000
# Of each stage: channels, stride of its first block, squeeze-and-excitation, h-swish (otherwise ReLU).
STAGES = ((32, 2, 0, 0), (48, 2, 1, 0), (96, 2, 0, 1), (136, 1, 1, 1), (192, 2, 1, 1))
BLOCKS = 4  # of a stage at its largest depth
ORIGIN = "accuracy predictor and Note10 table of the tutorial in github.com/mit-han-lab/once-for-all, as npz and CSV"
DECIMALS = 8


class OfaMobileNetV3(PublishedSpace):
    """Resolution, and per stage a depth and per block a kernel size and an expansion ratio: 46 choices.

    The kernel size and the expansion of a block beyond the depth of its stage are dormant. ``quality`` is
    ImageNet top-1 accuracy, as predicted; the cost is ``latency_ms``, the sum over the table's blocks.

    Args:
        task: not used.
        lut: CSV with the columns resolution, key, mean_ms.
        predictor: npz with the weights ``w0..w3`` and biases ``b0..b3`` of the accuracy predictor.
        folder: where the files lie, if neither here nor in ``$NAS_TABLES``.
    """

    name = "ofa_mbv3"
    costs = ("latency_ms",)

    def __init__(
        self,
        task: TaskInfo | None = None,
        *,
        lut: str = "ofa_note10_lut.csv.gz",
        predictor: str = "ofa_acc_predictor.npz",
        folder: str | None = None,
    ) -> None:
        choices = [Choice("resolution", RESOLUTIONS)]
        depth, kernel, expansion = [], [], []
        for stage in range(1, len(STAGES) + 1):
            depth.append(len(choices))
            choices.append(Choice(f"stage{stage}.depth", DEPTHS))
            for block in range(1, BLOCKS + 1):
                kernel.append(len(choices))
                choices.append(Choice(f"stage{stage}.block{block}.kernel", KERNELS))
                expansion.append(len(choices))
                choices.append(Choice(f"stage{stage}.block{block}.expansion", EXPANSIONS))
        self.choices = tuple(choices)
        self._depth, self._kernel, self._expansion = np.array(depth), np.array(kernel), np.array(expansion)
        # Number of each block in its stage: block j exists where the depth's value, index + 2, exceeds j.
        self._number = np.tile(np.arange(BLOCKS), len(STAGES))
        self._stage = np.repeat(np.arange(len(STAGES)), BLOCKS)
        self._fixed, self._blocks = _latencies(find_table(lut, ORIGIN, folder))
        self._layers = _layers(find_table(predictor, ORIGIN, folder))

    def active(self, genomes: Genomes) -> npt.NDArray[np.bool_]:
        """Everything but the genes of blocks beyond the depth."""
        genomes = np.atleast_2d(genomes)
        mask = np.ones(genomes.shape, dtype=bool)
        mask[:, self._kernel] = mask[:, self._expansion] = self._present(genomes)
        return mask

    def price(self, genomes: Genomes) -> Array:
        """Latency in ms, ``[n, 1]``."""
        genomes = np.atleast_2d(genomes)
        resolution = genomes[:, 0]
        kernel, expansion = genomes[:, self._kernel], genomes[:, self._expansion]
        each = self._blocks[resolution[:, None], np.arange(len(self._number)), kernel, expansion]
        return (self._fixed[resolution] + np.where(self._present(genomes), each, 0.0).sum(axis=1))[:, None]

    def quality(self, genomes: Genomes, fidelity: float = 1.0) -> Array:
        """Predicted top-1 accuracy 0..1, ``[n]``, to eight decimals (so that it does not depend on n)."""
        genomes = np.atleast_2d(genomes)
        n, present = len(genomes), self._present(genomes)
        one_hot = np.zeros((n, 128))
        row, block = np.nonzero(present)
        one_hot[row, 3 * block + genomes[:, self._kernel][row, block]] = 1
        one_hot[row, 60 + 3 * block + genomes[:, self._expansion][row, block]] = 1
        one_hot[np.arange(n), 120 + (np.array(RESOLUTIONS)[genomes[:, 0]] - 112) // 16] = 1
        x = one_hot
        for weight, bias in self._layers[:-1]:
            x = np.maximum(x @ weight + bias, 0.0)
        weight, bias = self._layers[-1]
        return np.asarray(np.round((x @ weight + bias)[:, 0], DECIMALS))

    def _present(self, genomes: Genomes) -> npt.NDArray[np.bool_]:
        """Which of the 20 blocks exist, ``[n, 20]``."""
        depth = np.array(DEPTHS)[genomes[:, self._depth]]
        return np.asarray(self._number < depth[:, self._stage])


def _latencies(path: Path) -> tuple[Array, Array]:
    """Milliseconds of everything that is no choice ``[resolutions]``, and of blocks ``[resolutions, 20, 3, 3]``."""
    with gzip.open(path, "rt", newline="") if path.suffix == ".gz" else path.open(newline="") as handle:
        table = {(row["resolution"], row["key"]): float(row["mean_ms"]) for row in csv.DictReader(handle)}
    fixed = np.zeros(len(RESOLUTIONS))
    blocks = np.zeros((len(RESOLUTIONS), BLOCKS * len(STAGES), len(KERNELS), len(EXPANSIONS)))
    try:
        for i, resolution in enumerate(RESOLUTIONS):
            for place, key in _keys(resolution):
                if place is None:
                    fixed[i] += table[str(resolution), key]
                else:
                    blocks[(i, *place)] = table[str(resolution), key]
    except KeyError as error:
        raise ContentError(f"{path} has no entry {error}.", expected="the block table of once-for-all") from None
    return fixed, blocks


def _keys(resolution: int) -> list[tuple[tuple[int, int, int] | None, str]]:
    """Table keys of a net, with the block, kernel and expansion index that ask for each; None: in every net."""
    size, channels = (resolution + 1) // 2, STEM
    keys: list[tuple[tuple[int, int, int] | None, str]] = [
        (None, f"Conv-input:{_shape(resolution, 3)}-output:{_shape(size, STEM)}"),
        (None, _block(size, size, STEM, STEM, STEM, 3, 1, 1, 0, 0)),
    ]
    for block in range(BLOCKS * len(STAGES)):
        width, stride, se, hs = STAGES[block // BLOCKS]
        first = block % BLOCKS == 0
        out = (size - 1) // stride + 1 if first else size
        for k, kernel in enumerate(KERNELS):
            for e, expansion in enumerate(EXPANSIONS):
                middle, step = channels * expansion, stride if first else 1
                key = _block(size, out, channels, width, middle, kernel, step, int(not first), se, hs)
                keys.append(((block, k, e), key))
        size, channels = out, width
    return [
        *keys,
        (None, f"Conv_1-input:{_shape(size, channels)}-output:{_shape(size, HEAD)}"),
        (None, f"AvgPool2D-input:{_shape(size, HEAD)}-output:{_shape(1, HEAD)}"),
        (None, f"Conv_2-input:{_shape(1, HEAD)}-output:{_shape(1, FEATURES)}"),
        (None, f"Logits-input:{_shape(1, FEATURES)}-output:{CLASSES}"),
    ]


def _shape(size: int, channels: int) -> str:
    return f"{size}x{size}x{channels}"


def _block(
    size: int, out: int, channels: int, width: int, middle: int, kernel: int, stride: int, skip: int, se: int, hs: int
) -> str:
    return (
        f"expanded_conv-input:{_shape(size, channels)}-output:{_shape(out, width)}-expand:{middle}"
        f"-kernel:{kernel}-stride:{stride}-idskip:{skip}-se:{se}-hs:{hs}"
    )


def _layers(path: Path) -> list[tuple[Array, Array]]:
    """Weights ``[in, out]`` and biases of the predictor, layer by layer."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return [(stored[f"w{i}"].T.astype(np.float64), stored[f"b{i}"].astype(np.float64)) for i in range(4)]
    except (KeyError, ValueError) as error:
        raise ContentError(f"{path} is no accuracy predictor: {error}.", expected="arrays w0..w3 and b0..b3") from None


space = OfaMobileNetV3
