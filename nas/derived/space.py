"""A search space made of a user's own trained model: what to prune, split, quantise and leave out of it.

Its forward is kept as it is written; candidates start from its weights, sliced. Every group of channels, units or
heads has a share that is pruned, every layer its bits and rank, every residual branch whether it is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from nas import members
from nas.derived.clusters import Clustered
from nas.derived.execution import FULL, Execution
from nas.derived.traced import TracedSpace, check_shares
from nas.errors import SpaceError
from nas.space import Candidate, Choice, TaskInfo
from nas.student.own import built, with_weights
from nas.tracing.dims import Var
from nas.tracing.importance import importance
from nas.tracing.shrink import shrunk
from nas.tracing.structure import Block, Group

MOST = 400  # combinations of pruned shares that one part may read
CHAIN = 2  # residual additions in a row, beyond which their layers share their bits


class DerivedSpace(TracedSpace):
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
        check_shares(prune, bits, ranks, multiple)
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
        self._check_classes()
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
        self._run.rank_of = {path: f"{path}.rank" for path in self.layers if self._splits(path, ranks)}
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
        self.treatments = self._layer_treatments()

    # ---- what may be chosen --------------------------------------------------------------------------

    def _prunable(self, group: Group, head_dims: bool) -> bool:
        own = not any(self._skipped(path) for path in group.layers)
        return own and (head_dims or group.variable.role != "head_dim")

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
            if path in self._run.rank_of:
                add(self._run.rank_of[path], self._values["rank"], FULL, "low_rank")
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

    # ---- sizes ----------------------------------------------------------------------------------------

    def _sizes(self, c: Candidate, variables: Sequence[Var]) -> dict[Var, int]:
        found = {}
        for v in variables:
            gene = self._gene_of.get(v)
            if gene is not None and gene in self._run.offered:
                found[v] = self.kept(v.size, float(c[gene]), v.role)
        return found

    # ---- what is trained -----------------------------------------------------------------------------------

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
        bits = self._fewest_bits()
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
        lines += self._repeated_remarks()
        return lines + self.axes.notes

    def report(self) -> list[str]:
        """Every group, layer and branch that may be chosen, then the remarks, a line each."""
        lines = [f"{g.name}: {g.variable.size} {g.variable.role or 'channels'}" for g in self.groups]
        lines += [f"{path}: bits{' and rank' if path in self._run.rank_of else ''}" for path in self.layers]
        lines += [f"{block.name}: a residual branch that may be left out" for block in self.blocks]
        return lines + self.remarks()


def _again(task: TaskInfo, model: nn.Module, options: dict[str, Any]) -> DerivedSpace:
    return DerivedSpace(task, model=model, **options)
