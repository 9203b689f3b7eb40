"""What of a traced model runs for a candidate, and in which precision: what onnxruntime makes of what was asked for.

A user's model decides precision layer by layer, so every mixture of neighbours occurs. The rules here are those of the
quantiser and of the runtime's own rewriting; ``tests/test_derived.py`` counts the kernels of parts and whole networks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from torch import fx, nn

from nas.derived.clusters import FOLDED, Cluster, Clustered
from nas.genes import Candidate
from nas.tracing.structure import RELUS, Block
from nas.tracing.trace import is_constant, opname

Condition = Callable[[Candidate], bool]
FULL = 1.0  # the share of the rank of a layer that stays as it is


def _both(c: Candidate, one: Condition, other: Condition) -> bool:
    return one(c) and other(c)


@dataclass(frozen=True)
class Reader:
    """Who may read a value: a node, or one of several of which a candidate has one.

    Attributes:
        nodes: in other clusters, or the output.
        runs: whether it does, for a candidate.
        which: of the nodes a candidate has.
        labels: choices that tell whether it is run, where those are many.
        first: whether to ask first if it is run, and then what it wants.
    """

    nodes: tuple[fx.Node, ...]
    runs: Condition
    which: Callable[[Candidate], fx.Node] | None = None
    labels: frozenset[str] = frozenset()
    first: bool = True

    def taken(self, c: Candidate) -> fx.Node:
        """The one that a candidate has."""
        return self.nodes[0] if self.which is None else self.which(c)

    def only(self, condition: Condition, labels: frozenset[str] = frozenset()) -> Reader:
        """The reader, where a further condition holds, which may read ``labels``."""
        return replace(self, runs=partial(_both, one=condition, other=self.runs), labels=self.labels | labels)


class Execution:
    """The model as a candidate leaves it.

    Args:
        structure: the traced model.
        blocks: residual branches that may be left out.

    Attributes:
        bits_of: layer → gene of its bits; layers that are not in it stay in fp32.
        rank_of: layer → gene of its rank; layers that are not in it stay whole.
        offered: names of the choices; a gene that is none of them has one value.
        only: bits of all layers where there is no choice.
        chained: values along many additions, of one shape and precision whichever blocks are kept.
        ends: the last of each chain.
        by_output: what a block gives → the block.
    """

    def __init__(self, structure: Clustered, blocks: list[Block], only: int) -> None:
        self.structure, self.blocks, self.only = structure, blocks, only
        self.bits_of: dict[str, str] = {}
        self.rank_of: dict[str, str] = {}
        self.offered: set[str] = set()
        self.chained: set[fx.Node] = set()
        self.ends: set[fx.Node] = set()
        self.by_output = {block.output: block for block in blocks}
        self.by_shortcut: dict[fx.Node, list[Block]] = {}
        for block in blocks:
            self.by_shortcut.setdefault(block.shortcut, []).append(block)
        self._sources: dict[fx.Node, list[str]] = {}
        self._readers: dict[fx.Node, list[Reader]] = {}
        self._about: Candidate | None = None
        self._known: dict[tuple[Any, ...], Any] = {}

    def known(self, c: Candidate) -> dict[tuple[Any, ...], Any]:
        """What was already found of a candidate, the last one that was asked about; it has recorded what was read."""
        if self._about is not c:
            self._about, self._known = c, {}
        return self._known

    def repeated(self, path: str) -> bool:
        """Whether a layer is called several times: its copies in the file would each have to be quantised alike."""
        return len(self.structure.calls[path]) > 1

    def keeps(self, c: Candidate, block: Block) -> bool:
        """Whether a residual branch stays."""
        gene = f"{block.name}.keep"
        return bool(c[gene]) if gene in self.offered else True

    @cached_property
    def enclosing(self) -> dict[fx.Node, list[Block]]:
        """Node → the blocks that it is lost with, outer ones first."""
        found: dict[fx.Node, list[Block]] = {}
        for block in reversed(self.blocks):  # outer ones first
            for node in block.branch:
                found.setdefault(node, []).append(block)
        return found

    def dropped(self, c: Candidate, node: fx.Node) -> bool:
        """Whether a node belongs to a branch that is left out."""
        return any(not self.keeps(c, block) for block in self.enclosing.get(node, ()))

    def hidden(self, c: Candidate, block: Block) -> bool:
        """Whether a block lies within another one that is left out."""
        return any(b is not block and not self.keeps(c, b) for b in self.enclosing.get(block.output, ()))

    def read(self, c: Candidate, node: fx.Node) -> fx.Node:
        """The node that is read where ``node`` was; along a chain it makes no difference."""
        while node not in self.chained:
            block = self.by_output.get(node)
            if block is None or self.keeps(c, block):
                break
            node = block.shortcut
        return node

    @cached_property
    def home(self) -> dict[fx.Node, Cluster]:
        """Node → its cluster."""
        return {node: cluster for cluster in self.structure.clusters for node in cluster.nodes}

    def readers(self, node: fx.Node) -> list[Reader]:
        """Whoever may read a value, of other clusters, also through blocks that are left out."""
        if node not in self._readers:
            self._readers[node] = self._find_readers(node)
        return self._readers[node]

    def _find_readers(self, node: fx.Node) -> list[Reader]:
        found = [Reader((user,), partial(self._runs, node=user)) for user in self._users(node)]
        # Whoever reads through a chain reads its end.
        for block in () if node in self.chained else self.by_shortcut.get(node, ()):
            found += [reader.only(partial(self._gone, block=block)) for reader in self.readers(block.output)]
        return found

    def _users(self, node: fx.Node) -> list[fx.Node]:
        """Nodes of other clusters that read a value as it is; the output among them."""
        home = self.home.get(node)
        return [
            user for user in node.users
            if user.op == "output" or (user.op != "call_method" and self.home.get(user) is not home)
        ]  # fmt: skip

    def _runs(self, c: Candidate, node: fx.Node) -> bool:
        return node.op == "output" or not self.dropped(c, node)

    def _gone(self, c: Candidate, block: Block) -> bool:
        return not self.keeps(c, block) and not self.hidden(c, block)

    def asked(self, c: Candidate, path: str) -> int:
        """Bits of a layer, as its gene says."""
        gene = self.bits_of.get(path)
        if gene is None:
            return 32
        return int(c[gene]) if gene in self.offered else self.only

    def share(self, c: Candidate, path: str) -> float:
        """Share of the full rank that a layer has, as its gene says."""
        gene = self.rank_of.get(path)
        return float(c[gene]) if gene in self.offered else FULL

    def bits(self, c: Candidate, path: str) -> int:
        """Bits of a layer, as the runtime executes it.

        onnxruntime computes a float convolution in integers where its input is read from integers and its output goes
        to nothing but integers. So that is how it is trained and priced.
        """
        known = self.known(c)
        if ("bits", path) not in known:
            known["bits", path] = self._executed_bits(c, path)
        found: int = known["bits", path]
        return found

    def _executed_bits(self, c: Candidate, path: str) -> int:
        asked = self.asked(c, path)
        node = self.structure.calls[path][0]
        if asked <= 8 or not isinstance(self.structure.layer(node), nn.Conv2d) or self.repeated(path):
            return asked
        if self.share(c, path) < FULL:
            return asked  # it is two convolutions, of which neither has integers on both sides
        if not self.quantized(c, node.all_input_nodes[0], asked=True):
            return asked
        readers = self.readers(self.home[node].nodes[-1])
        return asked if any(self.is_there(c, reader, asked=True, integers=False) for reader in readers) else 8

    def integers(self, c: Candidate, node: fx.Node, asked: bool = False) -> bool:
        """Whether a node's value is integers: convolutions', and what only passes them on.

        The rule of the quantiser (:func:`nas.compression.qdq.quantized_nodes`): an addition or pooling follows
        the input that was computed last.

        Args:
            asked: by what the genes ask for, and not by what the runtime makes of it.
        """
        if not self.sources(node):
            return False  # no convolution's, so nothing has to be read of the candidate
        if node in self.chained:
            return self.asked(c, self.sources(node)[0]) <= 8
        node = self.read(c, node)
        layer = self.structure.layer(node)
        if isinstance(layer, nn.Conv2d):
            return (self.asked if asked else self.bits)(c, str(node.target)) <= 8
        if node.op in ("placeholder", "call_method") or is_constant(node):
            return False
        if isinstance(layer, nn.BatchNorm2d):
            before = node.all_input_nodes[0]
            folded = isinstance(self.structure.layer(before), nn.Conv2d) and len(before.users) == 1
            return folded and self.integers(c, before, asked)
        passes = isinstance(layer, (*RELUS, nn.Dropout, nn.Dropout2d, nn.Identity)) or self.structure.passes_on(node)
        if not passes:
            return False
        return self.integers(c, self.last_input(c, node), asked)

    def last_input(self, c: Candidate, node: fx.Node) -> fx.Node:
        """The input of a node that is computed last."""
        inputs = [self.read(c, n) for n in node.all_input_nodes if not is_constant(n)]
        return max(inputs, key=self.structure.rank.__getitem__)

    def quantized(self, c: Candidate, node: fx.Node, asked: bool = False) -> bool:
        """Whether a value is read from integers: it is some, or one of its readers wants some, and so all get them."""
        node = self.read(c, node)
        return self.integers(c, node, asked) or self.wanted(c, node, asked)

    def wanted(self, c: Candidate, node: fx.Node, asked: bool = False) -> bool:
        """Whether some reader of a value computes in integers."""
        return any(self.is_there(c, reader, asked, integers=True) for reader in self.readers(node))

    def is_there(self, c: Candidate, reader: Reader, asked: bool, integers: bool) -> bool:
        """Whether a candidate runs a reader that computes in integers, or in floats."""
        if reader.first:
            return reader.runs(c) and self.wants(c, reader, asked) == integers
        return self.wants(c, reader, asked) == integers and reader.runs(c)

    def wants(self, c: Candidate, reader: Reader, asked: bool = False) -> bool:
        """Whether a reader computes in integers what it is given; the output does not.

        Which of several alternatives it is, is read of the candidate only where they differ.
        """
        answers = {self._wants(c, node, asked) for node in reader.nodes}
        return answers.pop() if len(answers) == 1 else self._wants(c, reader.taken(c), asked)

    def _wants(self, c: Candidate, node: fx.Node, asked: bool) -> bool:
        if node.op == "output" or isinstance(self.structure.layer(node), nn.Linear):
            return False
        return self.integers(c, node, asked)

    def fused(self, c: Candidate, cluster: Cluster) -> bool:
        """Whether an addition is done by the float convolution before it: the runtime adds while it stores."""
        node = cluster.nodes[0]
        if opname(node) != "add" or len(node.all_input_nodes) != 2:
            return False
        inputs = [n for n in node.all_input_nodes if not is_constant(n)]
        if not any(self.sources(n) for n in inputs):
            return False
        if any(self.quantized(c, n) for n in inputs):
            return False  # it would have to bring integers into the convolutions' layout first
        return self.convolved(c, self.last_input(c, node))

    def convolved(self, c: Candidate, node: fx.Node) -> bool:
        """Whether a value comes straight from a convolution, and its normalisation."""
        while isinstance(self.structure.layer(node), nn.BatchNorm2d):
            node = node.all_input_nodes[0]
        return isinstance(self.structure.layer(node), nn.Conv2d)

    def sources(self, node: fx.Node) -> list[str]:
        """Convolutions that a value comes from through ReLUs, additions and poolings, in the order of the forward."""
        if node not in self._sources:
            layer = self.structure.layer(node)
            if isinstance(layer, nn.Conv2d):
                found = [str(node.target)]
            elif isinstance(layer, (*RELUS, *FOLDED)) or self.structure.passes_on(node):
                found = [path for n in node.all_input_nodes for path in self.sources(n)]
            else:
                found = []
            self._sources[node] = list(dict.fromkeys(found))
        return self._sources[node]

    def may_be_integers(self, node: fx.Node) -> bool:
        """Whether a value is integers for some candidate."""
        return bool(self.sources(node))

    def carries(self, node: fx.Node) -> bool:
        """Whether a value may be integers, by what was computed last for it."""
        if isinstance(self.structure.layer(node), nn.Conv2d):
            return True
        passes = isinstance(self.structure.layer(node), (*RELUS, *FOLDED)) or self.structure.passes_on(node)
        inputs = [n for n in node.all_input_nodes if not is_constant(n)]
        return passes and self.carries(max(inputs, key=self.structure.rank.__getitem__))
