"""Search spaces made of a traced forward: what its pieces cost in the sizes, precisions and ranks of a candidate.

A user's own trained model and a model space of NNI are searched alike: clusters of a graph, at sizes that a candidate
decides, in precisions that it decides, some of them left out. A subclass says where sizes come from, which choices are
on offer, and what is built.
"""

from __future__ import annotations

import abc
import fnmatch
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import fx, nn

from nas import members
from nas.compression.base import Plan
from nas.derived.clusters import Cluster, Clustered
from nas.derived.execution import FULL, Execution, Reader
from nas.derived.segment import segment
from nas.errors import SpaceError
from nas.parts import Boundary, Part
from nas.space import Candidate, SearchSpace, Site, TaskInfo, Training, Treatment, Value
from nas.tracing.axes import flat
from nas.tracing.dims import Dim, Var
from nas.tracing.layers import is_depthwise

SEEN = 24  # random candidates that show what a site reads
TABULATED = 250_000  # combinations that are tabulated within a second


class TracedSpace(SearchSpace):
    """The base of such spaces.

    Attributes:
        task: shapes and classes of the data.
        structure: the traced forward, in clusters.
        axes: what its sizes are made of.
        multiple: kept channels and units are rounded to it.
        layers: paths of the layers whose bits and ranks may be chosen.
    """

    task: TaskInfo
    structure: Clustered
    multiple: int
    layers: list[str]
    _run: Execution
    _values: dict[str, tuple[Any, ...]]
    _skip: tuple[str, ...]

    @abc.abstractmethod
    def _offer(self) -> None:
        """Make the choices, by the genes that groups and layers have now."""

    @abc.abstractmethod
    def _sizes(self, c: Candidate, variables: Sequence[Var]) -> dict[Var, int]:
        """Sizes of those of the variables that do not have their own for the candidate."""

    def _inner(self, path: str) -> str:
        """The path, in the user's own model, of the layer that is at ``path`` in the structure."""
        return path

    def _named(self, path: str) -> str:
        """The path, in what ``build`` gives, of the layer that is at ``path`` in the structure."""
        return path

    # ---- what may be chosen --------------------------------------------------------------------------

    def _skipped(self, path: str) -> bool:
        return any(fnmatch.fnmatchcase(path, pattern) for pattern in self._skip)

    def _check_classes(self) -> None:
        out = self.structure.axes.of[self.structure.output]
        if len(out) != 2 or out[1].size != self.task.classes:
            raise SpaceError(
                f"The model gives outputs of shape [n, {', '.join(str(d.size) for d in out[1:])}].",
                expected=f"logits [n, {self.task.classes}]",
            )

    def _share_more_bits(self) -> None:
        """Let layers share their bits where a site would read too many: those of one module, then all that it reads.

        What a site reads is seen on random candidates. That may miss a gene; the limit leaves room for it.
        """
        values = {choice.name: choice.values for choice in self.choices}
        rng = np.random.default_rng(0)
        drawn = [{name: of[int(rng.integers(len(of)))] for name, of in values.items()} for _ in range(SEEN)]
        for home in (lambda path: path.rpartition(".")[0], lambda path: ""):
            large = [read for site in self.sites.values() if (read := self._reads_too_much(site, drawn, values))]
            if not large:
                return
            for read in large:
                first: dict[str, str] = {}
                for path, gene in self._run.bits_of.items():
                    if gene in read:
                        self._run.bits_of[path] = first.setdefault(home(path), gene)
            self._offer()

    def _reads_too_much(
        self, site: Site, drawn: Sequence[Mapping[str, Value]], values: Mapping[str, Sequence[Value]]
    ) -> set[str]:
        """What a site reads of some candidates, where that has too many combinations."""
        read: set[str] = set()
        for one in drawn:
            candidate = Candidate({name: value for name, value in one.items() if name in self._run.offered})
            site(candidate)
            read.update(candidate.reads)
        return read if math.prod(len(values[name]) for name in read) > TABULATED else set()

    def _fewest_bits(self) -> int:
        """Of those on offer, from 8 on where there are such: what uniform members have."""
        bits = [int(b) for b in self._values["bits"]]
        return min((b for b in bits if b >= 8), default=min(bits))

    def _repeated_remarks(self) -> list[str]:
        """A line for each layer that is called several times."""
        return [
            f"{self._inner(path)}: stays in fp32 and whole, it is called several times"
            for path in self.structure.layers if self._run.repeated(path)
        ]  # fmt: skip

    # ---- sizes ----------------------------------------------------------------------------------------

    def _variables(self, cluster: Cluster) -> list[Var]:
        axes = self.structure.axes
        nodes = [*cluster.inputs, *cluster.nodes, *(n for m in cluster.nodes for n in m.all_input_nodes)]
        dims = [dim for node in nodes if node in axes.of for dim in flat(axes.of[node])]
        for node in cluster.nodes:
            dims += axes.layers.get(str(node.target), ())
        return variables_of(dims)

    def kept(self, size: int, share: float, role: str = "") -> int:
        """How many of ``size`` are left when a ``share`` is pruned."""
        if not share:
            return size
        multiple = 1 if role == "heads" or size < 2 * self.multiple else self.multiple
        return min(size, max(multiple, round(size * (1 - share) / multiple) * multiple))

    def _fans(self, path: str, sizes: Mapping[Var, int]) -> tuple[int, int]:
        """Weights of one output, and outputs, of a layer."""
        layer = self.structure.modules[path]
        x, out = (dim.sized(sizes) for dim in self.structure.axes.layers[path])
        if not isinstance(layer, nn.Conv2d):
            return x, out
        depthwise = is_depthwise(layer)
        return (1 if depthwise else x // layer.groups) * math.prod(layer.kernel_size), out

    def _splits(self, path: str, shares: Sequence[float]) -> bool:
        """Whether some of the shares of the full rank split a layer, at its own sizes."""
        return any(self._rank_of(path, *self._fans(path, {}), share) is not None for share in shares)

    def _rank_of(self, path: str, fan_in: int, out: int, share: float) -> int | None:
        """Rank of a split layer; nothing where it stays whole, because that would save no weights."""
        layer = self.structure.modules[path]
        if share >= FULL or (isinstance(layer, nn.Conv2d) and layer.groups > 1):
            return None
        rank = max(8, round(share * min(fan_in, out) / 8) * 8)
        return rank if rank < min(fan_in, out) and rank * (fan_in + out) < fan_in * out else None

    # ---- what it costs -----------------------------------------------------------------------------------

    def _rank(self, c: Candidate, path: str, sizes: Mapping[Var, int]) -> int | None:
        """Rank of a layer, or nothing where it is whole."""
        if self._run.rank_of.get(path) not in self._run.offered:
            return None
        return self._rank_of(path, *self._fans(path, sizes), self._run.share(c, path))

    def _plan(self, c: Candidate, path: str, sizes: Mapping[Var, int]) -> Plan:
        """Passes and settings of one layer."""
        plan: dict[str, dict[str, Any]] = {}
        rank, bits = self._rank(c, path, sizes), self._run.bits(c, path)
        if rank is not None:
            plan["low_rank"] = {path: rank}
        if bits <= 8:
            plan["quantize"] = {path: bits}
        return plan

    def _sites(self) -> dict[str, Site]:
        sites: dict[str, Site] = {}
        for i, cluster in enumerate(self.structure.clusters):
            sites[f"{i}.{cluster.name}"] = partial(self._part, cluster=cluster, variables=self._variables(cluster))
        for node in [self.structure.input, *(n for cluster in self.structure.clusters for n in cluster.outputs)]:
            readers = self._run.readers(node)
            if any(self._run.may_be_integers(n) for n in (node, *(n for reader in readers for n in reader.nodes))):
                known = {"node": node, "variables": variables_of(self.structure.axes.of[node])}
                sites[f"{node.name}.quantize"] = partial(self._quantize, **known)
                for i, reader in enumerate(readers):
                    sites[f"{node.name}.dequantize{i}"] = partial(self._dequantize, reader=reader, **known)
        return sites

    def _part(self, c: Candidate, cluster: Cluster, variables: list[Var]) -> Part | None:
        alive = [node for node in cluster.nodes if not self._run.dropped(c, node)]
        if not alive:
            return None
        if len(alive) < len(cluster.nodes):
            cluster = Cluster(cluster.name, tuple(alive), cluster.layer)
        if self._run.fused(c, cluster):
            return None
        sizes = self._sizes(c, variables)
        layer = self.structure.modules.get(cluster.layer)
        plan = self._plan(c, cluster.layer, sizes) if cluster.layer else {}
        bits = plan.get("quantize", {}).get(cluster.layer, 32)
        if isinstance(layer, nn.Linear):
            precision = "int8" if bits <= 8 else "fp32"
        else:
            precision = "int8" if self._run.integers(c, cluster.nodes[-1]) else "fp32"
        return segment(self.structure, cluster, sizes, plan, precision, bits)

    def _quantize(self, c: Candidate, node: fx.Node, variables: list[Var]) -> Part | None:
        """Quantisation of a value once, where some reader wants integers."""
        if not self._flows(c, node) or self._run.integers(c, node) or not self._run.wanted(c, node):
            return None
        return self._crossing(c, "quantize", node, variables)

    def _dequantize(self, c: Candidate, node: fx.Node, variables: list[Var], reader: Reader) -> Part | None:
        """Dequantisation for a reader that wants floats, where the value is integers or others want it to be.

        The quantiser lets all readers of a value read what was quantised for one of them.
        """
        if not self._flows(c, node) or not self._run.is_there(c, reader, asked=False, integers=False):
            return None
        if not (self._run.integers(c, node) or self._run.wanted(c, node)):
            return None
        return self._crossing(c, "dequantize", node, variables)

    def _flows(self, c: Candidate, node: fx.Node) -> bool:
        """Whether a value is there and is not another one that is read in its place."""
        return node in self._run.ends or (not self._run.dropped(c, node) and self._run.read(c, node) is node)

    def _crossing(self, c: Candidate, what: str, node: fx.Node, variables: list[Var]) -> Part:
        sizes = self._sizes(c, variables)
        return Part((Boundary(what),), tuple(d.sized(sizes) for d in self.structure.axes.of[node][1:]), "boundary")

    # ---- what is trained -----------------------------------------------------------------------------------

    def _layer_treatments(self) -> dict[str, Treatment]:
        """Ranks, then bits, of every layer, then how it is taught: layers are split before they are quantised."""
        axes = self.structure.axes
        ranks: dict[str, Treatment] = {
            f"{path}.rank": partial(self._split, path=path, variables=variables_of(axes.layers[path]))
            for path in self.layers
        }
        bits: dict[str, Treatment] = {
            f"{path}.bits": partial(self._quantized, path=path)
            for path in self.structure.layers if not self._run.repeated(path)
        }
        return {**ranks, **bits, "distillation": partial(members.distilled, offered=set(self._run.offered))}

    def _split(self, c: Candidate, path: str, variables: list[Var]) -> Training | None:
        if self._run.dropped(c, self.structure.calls[path][0]):
            return None
        rank = self._rank(c, path, self._sizes(c, variables))
        return None if rank is None else Training(compression={"low_rank": {self._named(path): rank}})

    def _quantized(self, c: Candidate, path: str) -> Training | None:
        if self._run.dropped(c, self.structure.calls[path][0]):
            return None
        bits = self._run.bits(c, path)
        return Training(compression={"quantize": {self._named(path): bits}}) if bits <= 8 else None


def variables_of(dims: Sequence[Dim]) -> list[Var]:
    """Every variable of some axes, once."""
    return list(dict.fromkeys(v for dim in dims for v in dim.variables))


def check_shares(prune: Sequence[float], bits: Sequence[int], ranks: Sequence[float], multiple: int) -> None:
    """See that what is on offer is in range.

    Raises:
        SpaceError: it is not.
    """
    if not prune or not all(0 <= share < 1 for share in prune):
        raise SpaceError(f"prune is {list(prune)}.", expected="shares from 0 to below 1")
    if not bits or not all(b == 32 or 2 <= b <= 8 for b in bits):
        raise SpaceError(f"bits is {list(bits)}.", expected="32, or 2 to 8")
    if not ranks or not all(0 < share <= 1 for share in ranks):
        raise SpaceError(f"ranks is {list(ranks)}.", expected="shares above 0, up to 1")
    if multiple < 1:
        raise SpaceError(f"multiple is {multiple}.", expected="1 or more")
