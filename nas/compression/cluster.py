"""Weight sharing: every weight of a layer is one of a few values, which go on learning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from nas.compression.base import Loss, Pass, passes
from nas.compression.choose import chosen, plain_layers_of
from nas.compression.fake_quant import conv_geometry
from nas.compression.fold import fold_batchnorm, replace_module
from nas.compression.qdq import initializer, layer_nodes, pieces_of
from nas.compression.storage import Codebook, spell_out, store_codes
from nas.errors import CompressionError

ROUNDS = 300


class _Shared(nn.Module):
    """The state of a layer whose weights are shared: ``codebook [k]`` learns, ``index`` (uint8) stays.

    Weights that are zero, as pruning leaves them, share one value, which ``learns [k]`` (0 or 1) keeps at zero.
    """

    index: torch.Tensor
    learns: torch.Tensor
    codebook: nn.Parameter

    def share(self, weight: torch.Tensor, clusters: int) -> None:
        """Take the place of ``weight`` in this layer."""
        del self.weight
        values = weight.detach().numpy()
        codebook, index = cluster_values(values, clusters)
        learns = np.ones_like(codebook)
        if (pruned := values == 0).any():
            others = values[~pruned]
            rest, own = cluster_values(others if len(others) else np.zeros(1, np.float32), clusters - 1)
            codebook, learns[0] = np.concatenate([np.zeros(1, np.float32), rest]), 0
            index = np.zeros_like(index)
            index[~pruned] = 1 + own[: len(others)]
        self.codebook = nn.Parameter(torch.from_numpy(codebook))
        self.register_buffer("index", torch.from_numpy(index))
        self.register_buffer("learns", torch.from_numpy(learns))

    def shared(self) -> torch.Tensor:
        """The weights ``[out, ...]``. A value's gradient is the sum of those of its weights (eq. 3 of the paper)."""
        return (self.codebook * self.learns).index_select(0, self.index.flatten().int()).view(self.index.shape)


class ClusterConv2d(_Shared, nn.Conv2d):
    """A convolution with shared weights."""

    def __init__(self, conv: nn.Conv2d, clusters: int) -> None:
        geometry: Any = conv_geometry(conv)
        nn.Conv2d.__init__(self, *geometry)
        self.bias = conv.bias
        self.share(conv.weight, clusters)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.shared(), self.bias)

    def plain(self) -> nn.Conv2d:
        """The convolution with its weights written out."""
        geometry: Any = conv_geometry(self)
        conv = nn.Conv2d(*geometry)
        conv.weight, conv.bias = nn.Parameter(self.shared().detach()), self.bias
        return conv


class ClusterLinear(_Shared, nn.Linear):
    """A linear layer with shared weights."""

    def __init__(self, linear: nn.Linear, clusters: int) -> None:
        nn.Linear.__init__(self, linear.in_features, linear.out_features, linear.bias is not None)
        self.bias = linear.bias
        self.share(linear.weight, clusters)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.shared(), self.bias)

    def plain(self) -> nn.Linear:
        """The layer with its weights written out."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        linear.weight, linear.bias = nn.Parameter(self.shared().detach()), self.bias
        return linear


def cluster_values(
    weight: npt.NDArray[np.float32], clusters: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """k-means of single values: the codebook ``[clusters]``, ascending, and the index of every weight into it.

    Lloyd's algorithm, from centroids spread evenly over the range: the paper's linear initialisation, which keeps the
    few large weights. In one dimension the border between two neighbours is their middle, and sorted values with
    their running sums give a round in ``clusters`` look-ups. A cluster that loses all its weights takes the one that is
    farthest from its own value.
    """
    flat = np.sort(weight.reshape(-1).astype(np.float64))
    sums = np.concatenate([[0.0], np.cumsum(flat)])
    centroids = np.linspace(flat[0], flat[-1], clusters)
    for _ in range(ROUNDS):
        ends = np.searchsorted(flat, (centroids[1:] + centroids[:-1]) / 2, side="right")
        edges = np.concatenate([[0], ends, [len(flat)]])
        counts = np.diff(edges)
        means = np.where(counts > 0, np.diff(sums[edges]) / np.maximum(counts, 1), centroids)
        if empty := np.flatnonzero(counts == 0).tolist():
            distance = np.abs(flat - np.repeat(centroids, counts))
            farthest = np.argsort(distance, kind="stable")[::-1][: len(empty)]
            for place, i in zip(empty, farthest[distance[farthest] > 0], strict=False):  # few weights: too many values
                means[place] = flat[i]
            means = np.sort(means)
        if np.array_equal(means, centroids):
            break
        centroids = means
    middles = (centroids[1:] + centroids[:-1]) / 2
    index = np.searchsorted(middles, weight.astype(np.float64), side="left").astype(np.uint8)
    return centroids.astype(np.float32), index


@passes.register("cluster")
class Cluster(Pass):
    """k-means weight sharing: ``settings`` maps a convolution or linear layer to the number of its values, 2..256.

    Han et al. 2016, "Deep Compression" (section 3): the weights of a layer are clustered, each becomes an index into
    the layer's codebook, and fine-tuning moves the codebook's values by the summed gradients of their weights while
    the indices stay. Zeros that an earlier pass left stay zeros: they are one of the values. Batch normalisation is
    folded first, so that the weights that run are the shared ones.

    The exported file holds the indices in ⌈log2 k⌉ bits and the codebook; the runtime decodes them while it loads
    the file and computes in floats, at the speed of the layer as it was.
    """

    @classmethod
    def settings_for(  # type: ignore[override]
        cls,
        model: nn.Module,
        sample: torch.Tensor,
        loss: Loss | None = None,
        *,
        clusters: int = 16,
        layers: Sequence[str] = ("*",),
        skip: Sequence[str] = (),
    ) -> dict[str, Any]:
        """One number of values for all layers, or for some.

        Args:
            clusters: values of a layer, 2..256.
            layers, skip: patterns (``*``, ``?``) of the names that are clustered, and of those that stay as they are.
        """
        return {name: _clusters(clusters, name) for name in chosen(model, layers, skip, "cluster")}

    def apply(self, model: nn.Module, sample: torch.Tensor, loss: Loss | None = None) -> nn.Module:
        settings = {
            piece: _clusters(value, name)
            for name, value in self.settings.items()
            for piece in plain_layers_of(model, name, "cluster")
        }
        fold_batchnorm(model, settings)
        for name, clusters in settings.items():
            layer = model.get_submodule(name)
            if isinstance(layer, nn.Conv2d):
                replace_module(model, name, ClusterConv2d(layer, clusters).train(layer.training))
            elif isinstance(layer, nn.Linear):
                replace_module(model, name, ClusterLinear(layer, clusters).train(layer.training))
        return model

    def restore(self, model: nn.Module) -> nn.Module:
        for name, module in list(model.named_modules()):
            if isinstance(module, ClusterConv2d | ClusterLinear):
                replace_module(model, name, module.plain())
        return model

    def rewrite(self, model: onnx.ModelProto, calibration: npt.NDArray[np.float32]) -> onnx.ModelProto:
        changed = onnx.ModelProto()
        changed.CopyFrom(model)
        weights = {
            layer_nodes(changed)[piece].input[1]: _clusters(value, name)
            for name, value in self.settings.items()
            for piece in pieces_of(changed, name, "cluster")
        }
        changed = spell_out(changed, list(weights))
        for name, clusters in weights.items():
            values, index = np.unique(numpy_helper.to_array(initializer(changed, name)), return_inverse=True)
            if len(values) > clusters:
                raise CompressionError(
                    f"cluster: {name!r} has {len(values)} values in the exported model.",
                    expected=f"at most {clusters}: the weights as they were restored",
                )
            codes = index.reshape(initializer(changed, name).dims).astype(np.uint8)
            store_codes(changed, name, codes, max(1, math.ceil(math.log2(len(values)))), Codebook(values))
        return changed


def _clusters(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 2 <= value <= 256:
        raise CompressionError(f"cluster: {value!r} values for {name!r}.", expected="a whole number, 2..256")
    return value
