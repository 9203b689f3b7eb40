"""NNI's model spaces as search spaces: every label a choice, priced part by part, with compression in the genome.

The space is unfolded into one forward with all its alternatives (:mod:`nas.nni.union`), traced once; a candidate's
parts are read off it. What is trained is the model that NNI itself makes of the labels' values.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from nni.nas.nn.pytorch import ModelSpace
from torch import nn

from nas import members
from nas.derived.clusters import Clustered
from nas.derived.execution import FULL
from nas.derived.traced import TracedSpace, check_shares
from nas.errors import ContentError, NasError, SpaceError
from nas.genes import Genomes
from nas.nni.execution import ChosenExecution
from nas.nni.labels import Labels, Table
from nas.nni.union import MADE, Union
from nas.registry import import_object
from nas.space import Candidate, Choice, TaskInfo, Training, Treatment
from nas.tracing.dims import Var
from nas.tracing.structure import Group
from nas.tracing.trace import trace

HUB = "nni_hub"  # short for the module of NNI's own spaces
LADDER = 512  # random models among which teachers and uniform members are looked for
STEPS = 12
NET = "net"  # where a space's model lies in what is trained


class Preprocessed(nn.Module):
    """Raw inputs → normalised, grey images as three channels where the model wants those → logits."""

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, net: nn.Module, task: TaskInfo, colours: int) -> None:
        super().__init__()
        self.net, self.colours = net, colours
        self.images = len(task.input_shape) == 3
        sides = (1, -1, 1, 1) if self.images else (1, -1)
        self.register_buffer("mean", torch.tensor(task.mean).view(sides))
        self.register_buffer("scale", 1 / torch.tensor(task.std).view(sides))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.images:
            x = (x - self.mean) * self.scale
            if self.colours > x.shape[1]:
                x = torch.cat([x] * self.colours, 1)
        logits: torch.Tensor = self.net(x)
        return logits


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
        CompressionError: a forward of it cannot be traced.
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
        self.model_space = nni if isinstance(nni, ModelSpace) else _made(str(nni), args or {}, task)
        self.labels = Labels(self.model_space)
        self._union = Union(self.model_space, self.labels)
        self._colours = self._wanted_colours()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            union = Preprocessed(self._union.module, task, self._colours)
            self.structure = Clustered(union, task.random(2, seed=0))
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

    # ---- what may be chosen --------------------------------------------------------------------------

    def _wanted_colours(self) -> int:
        """Channels that the model wants: the data's, or three where those are grey and the model takes no grey."""
        channels = self.task.input_shape[0]
        if len(self.task.input_shape) != 3 or channels != 1:
            return channels
        first = next((m for m in self._union.module.modules() if isinstance(m, nn.Conv2d)), None)
        return 3 if first is not None and first.in_channels == 3 else channels

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
            terms = self.structure.axes.layers[place][1].terms
            if made is None or made.constant or len(terms) != 1 or len(terms[0]) != 1:
                continue
            variable = terms[0][0]
            if not isinstance(variable, Var):
                continue
            if variable.tied:
                raise SpaceError(
                    f"{path} has a chosen number of outputs ({', '.join(made.labels)}), but {variable.tied}.",
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
            f"{group.name}.prune": partial(self._pruned, group=group)
            for group in self.structure.groups if group.variable in self._gene_of
        }  # fmt: skip

    def _pruned(self, c: Candidate, group: Group) -> Training | None:
        path = group.name.partition("/")[0].removesuffix(f".{group.variable.role}")
        gene = self._gene_of[group.variable]
        if gene not in self._run.offered or self._run.dropped(c, self.structure.calls[path][0]):
            return None
        table = self._size_of.get(group.variable)
        size = group.variable.size if table is None else int(table(c))
        keep = self.kept(size, float(c[gene]), group.variable.role)
        name = self._named(path) + (f".{group.variable.role}" if group.variable.role else "")
        return None if keep == size else Training(compression={"channel_prune": {name: keep}})

    def build(self, candidate: Candidate) -> nn.Module:
        genome = self.encode(candidate)
        active = dict(zip(self.position, self.active(genome)[0], strict=True))
        values = {c.name: candidate[c.name] if active[c.name] else c.values[0] for c in self.labels.choices}
        with _quiet():
            model = self.model_space.freeze(self.labels.sample(values))
        return trace(Preprocessed(model, self.task, self._colours), self.task.random(2, seed=0))

    # ---- members that are there by hand ----------------------------------------------------------------------

    def ladder(self) -> list[Candidate]:
        """Models of the space, uncompressed, from few to many multiplications: three of random ones."""
        genomes, macs = self._by_macs()
        return [self._member(genomes[i], 0.0, 32) for i in (0, len(genomes) // 2, len(genomes) - 1) if macs[i] > 0]

    def uniform(self) -> list[Candidate]:
        """Models of the space at even steps of their multiplications, compressed alike: with the fewest bits from 8 on
        and every share for all blocks."""
        genomes, _ = self._by_macs()
        bits = min((int(b) for b in self._values["bits"] if b >= 8), default=int(min(self._values["bits"])))
        places = np.unique(np.linspace(0, len(genomes) - 1, STEPS).astype(int))
        return [self._member(genomes[i], share, bits) for i in places for share in sorted(self._values["prune"])]

    def _by_macs(self) -> tuple[Genomes, Any]:
        """Random genomes by their multiplications, and those."""
        genomes = self.sample(np.random.default_rng(0), LADDER)
        for column, choice in enumerate(self.choices):
            if choice.plain is not None:
                genomes[:, column] = choice.index(choice.plain)
        macs = np.zeros(len(genomes))
        for site in self.compiled:
            per_entry = np.array([sum(part.macs for part in parts) for parts in site.values], dtype=float)
            macs += per_entry[site.entries(genomes)]
        order = np.argsort(macs, kind="stable")
        return genomes[order], macs[order]

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
        repeated = [self._inner(path) for path in self.structure.layers if self._run.repeated(path)]
        lines += [f"{path}: stays in fp32 and whole, it is called several times" for path in repeated]
        if self._run.taken_for_run:
            lines.append(
                f"{len(self._run.taken_for_run)} operators are priced even where nothing reads their result, because "
                "too many labels decide that"
            )
        return lines + self.structure.axes.notes


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of NNI about the versions of others, which nobody can do anything about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _made(path: str, args: Mapping[str, Any], task: TaskInfo) -> ModelSpace:
    """The model space that ``module:name`` means."""
    module, _, name = path.partition(":")
    with _quiet():
        factory = import_object(f"nni.nas.hub.pytorch:{name}" if module == HUB else path, "model space")
        if isinstance(factory, ModelSpace):
            return factory
        try:
            known = inspect.signature(getattr(factory, "_init_wrapped", factory)).parameters
            own = {"num_labels": task.classes} if "num_labels" in known and "num_labels" not in args else {}
            space = factory(**own, **args)
        except NasError:
            raise
        except Exception as error:  # whatever the user's class raises
            raise ContentError(
                f"{path} cannot be made: {type(error).__name__}: {error}.", expected="a ModelSpace with labels for all "
                "its choices", remedy="check space.args",
            ) from error  # fmt: skip
    if not isinstance(space, ModelSpace):
        raise ContentError(
            f"{path} is a {type(space).__name__}.", expected="a subclass of nni.nas.nn.pytorch.ModelSpace, or a "
            "function that makes one",
        )  # fmt: skip
    return space
