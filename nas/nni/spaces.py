"""NNI's model spaces as search spaces: every label a choice, priced part by part, with compression in the genome.

The space is unfolded into one forward with all its alternatives (:mod:`nas.nni.union`), traced once; a candidate's
parts are read off it. What is trained is the model that NNI itself makes of the labels' values.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from nni.nas.nn.pytorch import ModelSpace
from torch import nn

from nas import members
from nas.derived.clusters import Clustered
from nas.derived.execution import FULL
from nas.derived.segment import layer_counts
from nas.derived.traced import TracedSpace, check_shares, variables_of
from nas.errors import CompressionError, SpaceError
from nas.genes import Genomes
from nas.nni.execution import ChosenExecution
from nas.nni.labels import Labels, Table
from nas.nni.models import Preprocessed, frozen, layer_macs, model_space, shown, wanted_colours
from nas.nni.union import MADE, Union
from nas.space import Candidate, Choice, TaskInfo, Training, Treatment, Value
from nas.tracing.dims import Var
from nas.tracing.layers import is_depthwise
from nas.tracing.structure import Group
from nas.tracing.trace import trace

LADDER = 512  # random models among which teachers and uniform members are looked for
STEPS = 12
TRIED = 3  # random models that are compared with NNI's own
NET = "net"  # where a space's model lies in what is trained


class NniSpace(TracedSpace):
    """A model space of NNI; its options say how its models may be compressed.

    Args:
        task: shapes and classes of the data.
        nni: ``module:name`` of a ``ModelSpace`` class, or of a function that makes one; ``nni_hub:NAME`` for those of
            NNI's hub; or a ModelSpace itself.
        args: for the class or function. Where it takes ``num_labels`` and nothing is said, they are the data's.
        prune: shares of the channels within a block that are removed before the last epochs, on offer for every block.
        bits: of weights and activations, on offer for every block: 32 (fp32), 8 (int8), or fewer for the stored
            weights of an int8 layer.
        ranks: shares of the full rank, on offer for every block; 1 is its layers as they are.
        multiple: kept channels and units are rounded to it, because runtimes work on blocks of channels.
        skip: names of layers (patterns as in ``blocks.0.*``) that stay as they are, in fp32.
        kd_weights, temperatures: distillation settings on offer.
        feature_weights, attention_weights: of what is learnt beside the teacher's logits; 0 alone is no choice.

    Raises:
        ExtraError: NNI is not installed.
        ContentError: the space cannot be imported or made.
        SpaceError: the space has what cannot be listed or followed; the message names it.
    """

    name = "nni"

    def __init__(
        self,
        task: TaskInfo,
        *,
        nni: Any,
        args: Mapping[str, Any] | None = None,
        prune: Sequence[float] = (0.0, 0.25, 0.5),
        bits: Sequence[int] = (32, 8),
        ranks: Sequence[float] = (1.0,),
        multiple: int = 8,
        skip: Sequence[str] = (),
        kd_weights: Sequence[float] = (0.5, 0.9),
        temperatures: Sequence[float] = (2.0, 4.0),
        feature_weights: Sequence[float] = (0.0,),
        attention_weights: Sequence[float] = (0.0,),
    ) -> None:
        check_shares(prune, bits, ranks, multiple)
        self.task, self.multiple, self._skip = task, multiple, tuple(skip)
        self.model_space = nni if isinstance(nni, ModelSpace) else model_space(str(nni), args or {}, task)
        self.labels = Labels(self.model_space)
        self._colours = wanted_colours(self.model_space, task)
        real = [(values, self._real_macs(values)) for values in self._some()]
        self._union = Union(self.model_space, self.labels)
        self.structure = self._side_by_side()
        self._check_classes()
        self._run: ChosenExecution = ChosenExecution(self.structure, self._union.decisions, only=int(bits[0]))
        self._size_of = self._chosen_sizes()
        self._values = {"prune": tuple(prune), "bits": tuple(bits), "rank": tuple(ranks)}
        own = [path for path in self.structure.layers if not self._skipped(self._inner(path))]
        self.layers = [path for path in own if not self._run.repeated(path)]
        self._gene_of = {
            group.variable: f"{home}.prune" for group in self.structure.groups if (home := self._interior(group))
        }
        self._run.bits_of = {path: f"{self._home(path)}.bits" for path in self.layers}
        self._run.rank_of = {path: f"{self._home(path)}.rank" for path in self.layers if self._splits(path, ranks)}
        self._teaching = members.distillation_choices(
            kd_weights, temperatures, feature_weights=feature_weights, attention_weights=attention_weights
        )
        self._offer()
        self.sites = self._sites()
        self._share_more_bits()
        # What is pruned away is neither split nor quantised.
        self.treatments = {**self._taking(), **self._pruning(), **self._layer_treatments()}
        self._check_followed(real)

    # ---- what may be chosen --------------------------------------------------------------------------

    def _side_by_side(self) -> Clustered:
        union = Preprocessed(self._union.module, self.task, self._colours)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return Clustered(union, self.task.random(2, seed=0))
        except CompressionError as error:
            raise SpaceError(
                f"{type(self.model_space).__name__} cannot be followed with its alternatives side by side, at the "
                f"largest sizes: {error.found}",
                expected="one tensor in, one tensor out, no control flow that depends on values, and sizes that labels "
                "choose of Mutable layers alone, not of parameters that a module makes itself",
            ) from error

    def _inner(self, path: str) -> str:
        return path.removeprefix(f"{NET}.")

    def _home(self, path: str) -> str:
        return self._union.home(self._inner(path))

    def _named(self, path: str) -> str:
        return f"{NET}.{self._union.frozen(self._inner(path))}"

    def _interior(self, group: Group) -> str:
        """What holds all layers of a group, or nothing where several do, or where some stay as they are."""
        homes = {self._home(path) for path in group.layers}
        skipped = any(self._skipped(self._inner(path)) for path in group.layers)
        return "" if skipped or len(homes) > 1 or group.variable.role == "head_dim" else homes.pop()

    def _offer(self) -> None:
        found: dict[str, Choice] = {choice.name: choice for choice in self.labels.choices}
        for genes, role, plain, technique in (
            (self._gene_of.values(), "prune", 0.0, "pruning"),
            (self._run.rank_of.values(), "rank", FULL, "low_rank"),
            (self._run.bits_of.values(), "bits", 32, "quantization"),
        ):
            values = self._values[role]
            for gene in genes:
                if len(values) > 1:
                    known = plain if plain in values else None
                    found.setdefault(gene, Choice(gene, values, plain=known, technique=technique))
        labels = {choice.name for choice in self.labels.choices}
        own = {gene for genes in (self._gene_of, self._run.rank_of, self._run.bits_of) for gene in genes.values()}
        if taken := sorted(labels & (own | {choice.name for choice in self._teaching})):
            raise SpaceError(
                f"The label {taken[0]!r} of the model space is the name of a choice of its compression.",
                remedy="another label",
            )
        self.choices = (*found.values(), *self._teaching)
        self._run.offered = {choice.name for choice in self.choices}

    # ---- sizes ----------------------------------------------------------------------------------------

    def _chosen_sizes(self) -> dict[Var, Table]:
        """Variable → its size for a candidate, before anything is pruned."""
        found: dict[Var, Table] = {}
        for path, sizes in self._union.sizes.items():
            place = f"{NET}.{path}"
            if place not in self.structure.axes.layers:
                continue
            made = sizes.get(MADE.get(type(self.structure.modules[place]), ""))
            if made is None or made.constant:
                continue
            terms = self.structure.axes.layers[place][1].terms
            if len(terms) > 1:
                continue  # a concatenation is added to it, whose sizes are chosen themselves
            variable = terms[0][0] if len(terms[0]) == 1 else None
            if not isinstance(variable, Var) or variable.tied:
                why = variable.tied if isinstance(variable, Var) else "the forward takes them apart"
                raise SpaceError(
                    f"{path} has a number of outputs that {' and '.join(made.labels)} chooses, but {why}.",
                    expected="sizes that the forward does not fix",
                )
            if max(made.values.values()) > variable.size:
                raise SpaceError(
                    f"The outputs of {path} do not grow with {', '.join(made.labels)}.",
                    expected="the largest size where every label has its largest value",
                )
            found.setdefault(variable, made)
        return found

    def _sizes(self, c: Candidate, variables: Sequence[Var]) -> dict[Var, int]:
        found = {}
        for v in variables:
            table, gene = self._size_of.get(v), self._gene_of.get(v)
            size = v.size if table is None else int(table(c))
            if gene in self._run.offered:
                size = self.kept(size, float(c[gene]), v.role)
            if size != v.size:
                found[v] = size
        return found

    def _some(self) -> list[dict[str, Value]]:
        """Values for the labels: the largest, and some by chance."""
        rng, choices = np.random.default_rng(0), self.labels.choices
        drawn = [{c.name: c.values[int(rng.integers(len(c.values)))] for c in choices} for _ in range(TRIED)]
        return [self.labels.largest(), *drawn]

    def _check_followed(self, real: Sequence[tuple[Mapping[str, Value], Mapping[str, int]]]) -> None:
        """See that models of the space are what the union says: a forward may do more with its labels."""
        for values, found in real:
            for path, macs in self._said_macs(Candidate({**self._plain, **values})).items():
                if found.get(path) != macs:
                    raise SpaceError(
                        f"A forward of {type(self.model_space).__name__} cannot be followed: with {shown(values)} "
                        f"{self._inner(path)} makes {found.get(path, 0)} multiplications, and {macs} by its labels.",
                        expected="labels that act through LayerChoice, InputChoice, Repeat, Cell and Mutable layers",
                    )

    @property
    def _plain(self) -> dict[str, Value]:
        return {c.name: c.values[0] if c.plain is None else c.plain for c in self.choices}

    def _said_macs(self, c: Candidate) -> dict[str, int]:
        """Layer that a candidate runs → its multiplications for one sample, by the union."""
        structure, found = self.structure, dict[str, int]()
        for path in structure.layers:
            for node in structure.calls[path]:
                if not self._run.dropped(c, node):
                    variables = variables_of([*structure.axes.layers[path], *structure.axes.of[node]])
                    sizes = {**self._sizes(c, variables), structure.axes.batch: 1}
                    macs = (layer_counts(structure, node, sizes, {}) or (0, 0))[0]
                    found[self._named(path)] = found.get(self._named(path), 0) + macs
        return found

    def _real_macs(self, values: Mapping[str, Value]) -> dict[str, int]:
        """The same of NNI's model, by running it; what nothing reads is among it."""
        model = copy.deepcopy(frozen(self.model_space, self.labels.sample(values)))
        try:
            return layer_macs(Preprocessed(model, self.task, self._colours).eval(), self.task.random(1, seed=0))
        except Exception as error:  # whatever the user's forward raises
            raise SpaceError(
                f"A model of {type(self.model_space).__name__} fails with {shown(values)}: {error}.",
                expected="models for all values of the labels",
            ) from error

    # ---- what is trained -----------------------------------------------------------------------------------

    def _taking(self) -> dict[str, Treatment]:
        """Every decision, so that one that costs nothing, such as a share of dropout, is part of the candidate too."""
        return {f"{node.name}.taken": partial(self._take, node=node) for node in self._run.choices}

    def _take(self, c: Candidate, node: Any) -> Training | None:
        if not self._run.dropped(c, node):
            self._run.taken(c, node)
        return None

    def _pruning(self) -> dict[str, Treatment]:
        return {
            f"{group.name}.prune": partial(self._pruned, group=group, makers=self._makers(group))
            for group in self.structure.groups if group.variable in self._gene_of
        }  # fmt: skip

    def _makers(self, group: Group) -> list[str]:
        """Layers that make the outputs of a group; where they are alternatives, a candidate has one of them."""
        structure = self.structure
        return [
            path for path in group.layers
            if group.variable in structure.axes.layers[path][1].variables and path in structure.calls
            and not is_depthwise(structure.modules[path])
        ]  # fmt: skip

    def _pruned(self, c: Candidate, group: Group, makers: list[str]) -> Training | None:
        variable, gene = group.variable, self._gene_of[group.variable]
        if gene not in self._run.offered:
            return None
        maker = next((path for path in makers if not self._run.dropped(c, self.structure.calls[path][0])), None)
        if maker is None:
            return None
        table = self._size_of.get(variable)
        size = variable.size if table is None else int(table(c))
        keep = self.kept(size, float(c[gene]), variable.role)
        name = self._named(maker) + (f".{variable.role}" if variable.role else "")
        return None if keep == size else Training(compression={"channel_prune": {name: keep}})

    def build(self, candidate: Candidate) -> nn.Module:
        genome = self.encode(candidate)
        active = dict(zip(self.position, self.active(genome)[0], strict=True))
        values = {c.name: candidate[c.name] if active[c.name] else c.values[0] for c in self.labels.choices}
        model = frozen(self.model_space, self.labels.sample(values))
        return trace(Preprocessed(model, self.task, self._colours), self.task.random(2, seed=0))

    # ---- members that are there by hand ----------------------------------------------------------------------

    def ladder(self) -> list[Candidate]:
        """Models of the space, uncompressed: of random ones that with the fewest multiplications and a middle one, and
        the largest, found label by label."""
        genomes, macs = self._by_macs()
        return [self._member(genomes[i], 0.0, 32) for i in (0, len(genomes) // 2, len(genomes) - 1) if macs[i] > 0]

    def uniform(self) -> list[Candidate]:
        """Models of the space at even steps of their multiplications, compressed alike: with the fewest bits from 8 on
        and every share for all blocks."""
        genomes, _ = self._by_macs()
        bits = self._fewest_bits()
        places = np.unique(np.linspace(0, len(genomes) - 1, STEPS).astype(int))
        return [self._member(genomes[i], share, bits) for i in places for share in sorted(self._values["prune"])]

    def _by_macs(self) -> tuple[Genomes, Any]:
        """Random genomes by their multiplications, with the largest of all at the end, and those."""
        genomes = self.sample(np.random.default_rng(0), LADDER)
        for column, choice in enumerate(self.choices):
            if choice.plain is not None:
                genomes[:, column] = choice.index(choice.plain)
        largest = genomes[self._macs(genomes).argmax()]
        for column, choice in enumerate(self.labels.choices):  # labels come first
            others = np.repeat(largest[None], len(choice.values), axis=0)
            others[:, column] = np.arange(len(choice.values))
            largest = others[self._macs(others).argmax()]
        genomes = np.concatenate([genomes, largest[None]])
        macs = self._macs(genomes)
        order = np.argsort(macs, kind="stable")
        return genomes[order], macs[order]

    def _macs(self, genomes: Genomes) -> Any:
        """Multiplications of genomes, ``[n]``."""
        total = np.zeros(len(genomes))
        for site, per_entry in zip(self.compiled, self._macs_of_entries, strict=True):
            total += per_entry[site.entries(genomes)]
        return total

    @cached_property
    def _macs_of_entries(self) -> list[Any]:
        return [np.array([sum(p.macs for p in parts) for parts in site.values], float) for site in self.compiled]

    def _member(self, genome: Genomes, share: float, bits: int) -> Candidate:
        wanted = {"prune": share, "bits": bits, "rank": FULL}
        values = self.decode(genome).as_dict()
        for choice in self.choices:
            value = wanted.get(choice.name.rpartition(".")[2])
            if choice.technique != "architecture" and value in choice.values:
                values[choice.name] = value
        return Candidate(values)

    def remarks(self) -> list[str]:
        """How much may be chosen, and what stays as it is and why, a line each."""
        lines = [
            f"{type(self.model_space).__name__}: {len(self.labels.choices)} labels, "
            f"{len(set(self._gene_of.values()) & self._run.offered)} blocks pruned within, "
            f"{len(set(self._run.bits_of.values()) & self._run.offered)} with bits of their own"
        ]
        if self._colours != self.task.input_shape[0]:
            lines.append(f"grey images are given to the model as {self._colours} channels")
        lines += self._repeated_remarks()
        if self._run.taken_for_run:
            lines.append(
                f"{len(self._run.taken_for_run)} operators are priced even where nothing reads their result, because "
                "too many labels decide that"
            )
        return lines + self.structure.axes.notes
