"""A search space made of a user's own trained model: what to prune, split, quantise and leave out of it.

Its forward is kept as it is written; candidates start from its weights, sliced. Every group of channels, units or
heads has a share that is pruned, every layer its bits and rank, every residual branch whether it is kept.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from nas import members
from nas.compression.base import Plan
from nas.derived.clusters import Cluster, Clustered
from nas.derived.execution import FULL, Execution
from nas.derived.segment import segment
from nas.errors import SpaceError
from nas.parts import Boundary, Part
from nas.space import Candidate, Choice, SearchSpace, Site, TaskInfo, Training, Treatment
from nas.student.own import built, with_weights
from nas.tracing.axes import flat
from nas.tracing.dims import Dim, Var
from nas.tracing.importance import importance
from nas.tracing.layers import is_depthwise
from nas.tracing.shrink import shrunk
from nas.tracing.structure import Block, Group

MOST = 400  # combinations of pruned shares that one part may read
SEEN = 24  # random candidates that show what a site reads
TABULATED = 250_000  # combinations that are tabulated within a second
CHAIN = 2  # residual additions in a row, beyond which their layers share their bits


class DerivedSpace(SearchSpace):
    """The space; its options say what may be chosen.

    Args:
        task: shapes and classes of the data.
        model: ``module:build``, a function of no arguments, or a module.
        weights: its safetensors file; nothing where ``model`` is a trained module.
        prune: shares of a group's channels, units or heads that are removed, on offer for every group.
        bits: of weights and activations, on offer for every convolution and linear layer: 32 (fp32), 8 (int8), or
            fewer for the stored weights of an int8 layer.
        ranks: shares of the full rank, on offer for every layer that fewer weights are made of that way; 1 is the
            layer as it is.
        drop: whether residual branches may be left out.
        head_dims: whether the dimensions of attention heads may be pruned as the heads are.
        multiple: kept channels and units are rounded to it, because runtimes work on blocks of channels.
        skip: names of layers (patterns as in ``layer1.*``) that stay as they are, in fp32.
        kd_weights, temperatures: distillation settings on offer.
        feature_weights, attention_weights: of what is learnt beside the teacher's logits; 0 alone is no choice.

    Raises:
        CompressionError: the model's forward cannot be followed.
        ContentError: model or weights cannot be loaded.
        SpaceError: there is nothing to choose, or an option is out of range.
    """

    name = "derived"

    def __init__(
        self,
        task: TaskInfo,
        *,
        model: Any,
        weights: str = "",
        prune: Sequence[float] = (0.0, 0.25, 0.5, 0.75),
        bits: Sequence[int] = (32, 8),
        ranks: Sequence[float] = (1.0, 0.5),
        drop: bool = True,
        head_dims: bool = False,
        multiple: int = 8,
        skip: Sequence[str] = (),
        kd_weights: Sequence[float] = (0.5, 0.9),
        temperatures: Sequence[float] = (2.0, 4.0),
        feature_weights: Sequence[float] = (0.0,),
        attention_weights: Sequence[float] = (0.0,),
    ) -> None:
        _check(prune, bits, ranks, multiple)
        self.task, self.multiple = task, multiple
        if not isinstance(model, nn.Module) and not weights:
            raise SpaceError(
                "space.model has no weights.", expected="space.weights, its state_dict in a .safetensors file"
            )
        module = model if isinstance(model, nn.Module) else with_weights(built(str(model)), weights, str(model))
        if isinstance(model, nn.Module):
            options = {
                "weights": weights, "prune": prune, "bits": bits, "ranks": ranks, "drop": drop,
                "head_dims": head_dims, "multiple": multiple, "skip": skip, "kd_weights": kd_weights,
                "temperatures": temperatures, "feature_weights": feature_weights,
                "attention_weights": attention_weights,
            }  # fmt: skip
            self.recipe = (_again, (task, model, options))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.structure = Clustered(module, task.random(2, seed=0))
        self.axes = self.structure.axes
        self._classes(task)
        self._skip = tuple(skip)
        self.groups = [group for group in self.structure.groups if self._prunable(group, head_dims)]
        self.blocks = [
            block for block in self.structure.blocks
            if drop and not any(self._skipped(str(n.target)) for n in block.branch if n.op == "call_module")
        ]  # fmt: skip
        self._run = Execution(self.structure, self.blocks, only=int(bits[0]))
        whole = [path for path in self.structure.layers if self._run.repeated(path)]
        self.layers = [path for path in self.structure.layers if not self._skipped(path) and path not in whole]
        self._values = {"prune": tuple(prune), "bits": tuple(bits), "rank": tuple(ranks)}
        self._gene_of = self._shared_groups()
        self._run.bits_of = self._shared_bits()
        self._teaching = members.distillation_choices(
            kd_weights, temperatures, feature_weights=feature_weights, attention_weights=attention_weights
        )
        self._offer()
        if len(self.choices) == len(self._teaching):
            raise SpaceError(
                "Nothing of the model can be chosen: no group, layer or block is left.",
                remedy="fewer names in skip, or more values in prune, bits and ranks",
            )
        self.sites = self._sites()
        self._share_more_bits()
        self.treatments = self._treatments()

    # ---- what may be chosen --------------------------------------------------------------------------

    def _skipped(self, path: str) -> bool:
        return any(fnmatch.fnmatchcase(path, pattern) for pattern in self._skip)

    def _prunable(self, group: Group, head_dims: bool) -> bool:
        own = not any(self._skipped(path) for path in group.layers)
        return own and (head_dims or group.variable.role != "head_dim")

    def _classes(self, task: TaskInfo) -> None:
        out = self.axes.of[self.structure.output]
        if len(out) != 2 or out[1].size != task.classes:
            raise SpaceError(
                f"The model gives outputs of shape [n, {', '.join(str(d.size) for d in out[1:])}].",
                expected=f"logits [n, {task.classes}]",
            )

    def _offer(self) -> None:
        """Make the choices, by the genes that groups and layers have now."""
        found: dict[str, Choice] = {}

        def add(name: str, values: Sequence[Any], plain: Any, technique: str) -> None:
            if name not in found and len(values) > 1:
                found[name] = Choice(name, values, plain=plain if plain in values else None, technique=technique)

        for block in self.blocks:
            add(f"{block.name}.keep", (True, False), True, "architecture")
        for group in self.groups:
            add(self._gene_of[group.variable], self._values["prune"], 0.0, "pruning")
        for path in self.layers:
            if self._splits(path):
                add(f"{path}.rank", self._values["rank"], FULL, "low_rank")
        for path in self.layers:
            add(self._run.bits_of[path], self._values["bits"], 32, "quantization")
        self.choices = (*found.values(), *self._teaching)
        self._run.offered = {choice.name for choice in self.choices}

    def _shared_groups(self) -> dict[Var, str]:
        """Group → gene. Groups that meet in one part share a gene where it would read too many."""
        gene = {group.variable: f"{group.name}.prune" for group in self.groups}
        values = len(self._values["prune"])
        for cluster in self.structure.clusters:
            own = dict.fromkeys(gene[v] for v in self._variables(cluster) if v in gene)
            if values ** len(own) > MOST:
                first, *others = own
                gene = {v: first if name in others else name for v, name in gene.items()}
        return gene

    def _share_more_bits(self) -> None:
        """Let layers share their bits where a site would read too many: those of one module, then all that it reads.

        What a site reads is seen on random candidates. That may miss a gene; the limit leaves room for it.
        """
        values = {choice.name: choice.values for choice in self.choices}
        rng = np.random.default_rng(0)
        drawn = [{name: of[int(rng.integers(len(of)))] for name, of in values.items()} for _ in range(SEEN)]
        for home in (lambda path: path.rpartition(".")[0], lambda path: ""):
            for site in self.sites.values():
                read: set[str] = set()
                for one in drawn:
                    candidate = Candidate({name: value for name, value in one.items() if name in self._run.offered})
                    site(candidate)
                    read.update(candidate.reads)
                if math.prod(len(values[name]) for name in read) <= TABULATED:
                    continue
                first: dict[str, str] = {}
                for path, gene in self._run.bits_of.items():
                    if gene in read:
                        self._run.bits_of[path] = first.setdefault(home(path), gene)
                self._offer()

    def _shared_bits(self) -> dict[str, str]:
        """Layer → gene of its bits. Along many residual additions the stream has one precision, and one gene.

        Otherwise what flows into the last block would depend on every block before it.
        """
        gene = {path: f"{path}.bits" for path in self.layers}
        chains: dict[fx.Node, list[Block]] = {}
        origin: dict[fx.Node, fx.Node] = {}
        for block in self.blocks:
            start = origin.get(block.shortcut, block.shortcut)
            origin[block.output] = start
            chains.setdefault(start, []).append(block)
        for start, blocks in chains.items():
            nodes = [n for block in blocks for n in block.branch]
            inside = [str(n.target) for n in nodes if isinstance(self.structure.layer(n), nn.Conv2d)]
            paths = [*self._run.sources(start), *sorted(inside, key=self.structure.layers.index)]
            paths = [path for path in paths if path in gene]
            through = all(self._run.carries(node) for node in (start, *(block.output for block in blocks)))
            if len(blocks) > CHAIN and paths and through:
                gene |= dict.fromkeys(paths, f"{paths[0]}.bits")
                self._run.chained |= {start, *(block.output for block in blocks)}
                self._run.ends.add(blocks[-1].output)
        return gene

    def _splits(self, path: str) -> bool:
        return any(self._rank_of(path, *self._fans(path, {}), share) is not None for share in self._values["rank"])

    # ---- sizes ----------------------------------------------------------------------------------------

    def _variables(self, cluster: Cluster) -> list[Var]:
        nodes = [*cluster.inputs, *cluster.nodes, *(n for m in cluster.nodes for n in m.all_input_nodes)]
        dims = [dim for node in nodes if node in self.axes.of for dim in flat(self.axes.of[node])]
        for node in cluster.nodes:
            dims += self.axes.layers.get(str(node.target), ())
        return list(dict.fromkeys(v for dim in dims for v in dim.variables))

    def kept(self, size: int, share: float, role: str = "") -> int:
        """How many of ``size`` are left when a ``share`` is pruned."""
        if not share:
            return size
        multiple = 1 if role == "heads" or size < 2 * self.multiple else self.multiple
        return min(size, max(multiple, round(size * (1 - share) / multiple) * multiple))

    def _sizes(self, c: Candidate, variables: Sequence[Var]) -> dict[Var, int]:
        found = {}
        for v in variables:
            gene = self._gene_of.get(v)
            if gene is not None and gene in self._run.offered:
                found[v] = self.kept(v.size, float(c[gene]), v.role)
        return found

    def _fans(self, path: str, sizes: Mapping[Var, int]) -> tuple[int, int]:
        """Weights of one output, and outputs, of a layer."""
        layer = self.structure.modules[path]
        x, out = (dim.sized(sizes) for dim in self.axes.layers[path])
        if not isinstance(layer, nn.Conv2d):
            return x, out
        depthwise = is_depthwise(layer)
        return (1 if depthwise else x // layer.groups) * math.prod(layer.kernel_size), out

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
        if f"{path}.rank" not in self._run.offered:
            return None
        return self._rank_of(path, *self._fans(path, sizes), float(c[f"{path}.rank"]))

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
            if any(self._run.may_be_integers(n) for n in (node, *self._readers(node))):
                variables = _variables(self.axes.of[node])
                sites[f"{node.name}.boundary"] = partial(self._boundary, node=node, variables=variables)
        return sites

    def _part(self, c: Candidate, cluster: Cluster, variables: list[Var]) -> Part | None:
        nodes = cluster.nodes
        if cluster.nodes[0] in self._run.enclosing or cluster.nodes[-1] in self._run.enclosing:
            alive = [node for node in nodes if not self._run.dropped(c, node)]
            if not alive:
                return None
            if len(alive) < len(nodes):
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

    def _readers(self, node: fx.Node) -> list[fx.Node]:
        """First nodes of other clusters that read a value."""
        return [user for user in node.users if user.op != "output" and user.op != "call_method"]

    def _boundary(self, c: Candidate, node: fx.Node, variables: list[Var]) -> list[Part] | None:
        """Quantisation of a value once, where some reader wants integers; dequantisation for each that does not.

        The quantiser lets all readers of a value read what was quantised for one of them.
        """
        if node not in self._run.ends and (self._run.dropped(c, node) or self._run.read(c, node) is not node):
            return None
        own = self._run.integers(c, node)
        readers = self._run.readers(c, node)
        wanted = [self._run.wants_integers(c, user) for user in readers]
        if not own and not any(wanted):
            return None
        sizes = self._sizes(c, variables)
        shape = tuple(dim.sized(sizes) for dim in self.axes.of[node][1:])
        parts = []
        if not own:
            parts.append(Part((Boundary("quantize"),), shape, "boundary"))
        if wanted.count(False):
            parts.append(Part((Boundary("dequantize"),), shape, "boundary", wanted.count(False)))
        return parts

    # ---- what is trained -----------------------------------------------------------------------------------

    def _treatments(self) -> dict[str, Treatment]:
        # Their order is that of the passes: layers are split before they are quantised.
        ranks: dict[str, Treatment] = {
            f"{path}.rank": partial(self._split, path=path, variables=_variables(self.axes.layers[path]))
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
        return None if rank is None else Training(compression={"low_rank": {path: rank}})

    def _quantized(self, c: Candidate, path: str) -> Training | None:
        if self._run.dropped(c, self.structure.calls[path][0]):
            return None
        bits = self._run.bits(c, path)
        return Training(compression={"quantize": {path: bits}}) if bits <= 8 else None

    def build(self, candidate: Candidate) -> nn.Module:
        # Of a group that lies in branches that are left out, nothing is read: its gene is dormant.
        gone = {
            path for path, nodes in self.structure.calls.items() if all(self._run.dropped(candidate, n) for n in nodes)
        }  # fmt: skip
        sizes = self._sizes(candidate, [g.variable for g in self.groups if not gone.issuperset(g.layers)])
        chosen = {v: self._best(v, size) for v, size in sizes.items() if size < v.size}
        outer = [block for block in self.blocks if not self._run.hidden(candidate, block)]
        instead = {block.output: block.shortcut for block in outer if not self._run.keeps(candidate, block)}
        return shrunk(self.axes, chosen, instead=instead)

    def _best(self, variable: Var, count: int) -> torch.Tensor:
        """The most important places, in rising order."""
        return torch.sort(torch.argsort(self._scores[variable], descending=True, stable=True)[:count]).values

    @cached_property
    def _scores(self) -> dict[Var, torch.Tensor]:
        return {group.variable: importance(self.structure, group.variable) for group in self.groups}

    # ---- members that are there by hand ----------------------------------------------------------------------

    def ladder(self) -> list[Candidate]:
        """The model itself."""
        return [self._member(0.0, 32)]

    def uniform(self) -> list[Candidate]:
        """Every share for all groups alike, with the fewest bits from 8 on, nothing split or left out."""
        bits = min((int(b) for b in self._values["bits"] if b >= 8), default=int(min(self._values["bits"])))
        return [self._member(share, bits) for share in sorted(self._values["prune"])]

    def _member(self, share: float, bits: int) -> Candidate:
        wanted = {"prune": share, "bits": bits, "rank": FULL, "keep": True}
        values = {}
        for choice in self.choices:
            value = wanted.get(choice.name.rpartition(".")[2])
            values[choice.name] = value if value in choice.values else choice.values[0]
        return Candidate(values)

    def remarks(self) -> list[str]:
        """How much may be chosen, and what stays as it is and why, a line each."""
        pruned = len(set(self._gene_of.values()))
        lines = [
            f"of the model, {pruned} groups of channels, units or heads may be pruned, {len(self.layers)} layers "
            f"quantised and {len(self.blocks)} residual branches left out"
        ]
        output = set(self.axes.of[self.structure.output][-1].variables)
        for path, (_, out) in self.axes.layers.items():
            alone = [term[0] for term in out.terms if len(term) == 1]  # not the 3 in three times the heads
            lines += [
                f"{path}: {v.size} outputs stay, {v.tied}" for v in alone
                if isinstance(v, Var) and v.tied and v not in output and path in self.layers
            ]  # fmt: skip
        repeated = [path for path in self.structure.layers if self._run.repeated(path)]
        lines += [f"{path}: stays in fp32 and whole, it is called several times" for path in repeated]
        return lines + self.axes.notes

    def report(self) -> list[str]:
        """Every group, layer and branch that may be chosen, then the remarks, a line each."""
        lines = [f"{g.name}: {g.variable.size} {g.variable.role or 'channels'}" for g in self.groups]
        lines += [f"{path}: bits{' and rank' if self._splits(path) else ''}" for path in self.layers]
        lines += [f"{block.name}: a residual branch that may be left out" for block in self.blocks]
        return lines + self.remarks()


def _again(task: TaskInfo, model: nn.Module, options: dict[str, Any]) -> DerivedSpace:
    return DerivedSpace(task, model=model, **options)


def _variables(dims: Sequence[Dim]) -> list[Var]:
    return list(dict.fromkeys(v for dim in dims for v in dim.variables))


def _check(prune: Sequence[float], bits: Sequence[int], ranks: Sequence[float], multiple: int) -> None:
    if not prune or not all(0 <= share < 1 for share in prune):
        raise SpaceError(f"prune is {list(prune)}.", expected="shares from 0 to below 1")
    if not bits or not all(b == 32 or 2 <= b <= 8 for b in bits):
        raise SpaceError(f"bits is {list(bits)}.", expected="32, or 2 to 8")
    if not ranks or not all(0 < share <= 1 for share in ranks):
        raise SpaceError(f"ranks is {list(ranks)}.", expected="shares above 0, up to 1")
    if multiple < 1:
        raise SpaceError(f"multiple is {multiple}.", expected="1 or more")
