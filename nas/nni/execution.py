"""What of a model space's union runs for a candidate: the alternatives that it takes, and what those read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from torch import fx, nn

from nas.derived.clusters import FOLDED, Clustered
from nas.derived.execution import Execution, Reader
from nas.genes import Candidate
from nas.nni.labels import Table
from nas.tracing.alternatives import decision_of, is_choice, options_of
from nas.tracing.structure import RELUS
from nas.tracing.trace import is_constant

#: A choice, and those of its options that a node is needed for; nothing where it is needed for all.
Gate = tuple[fx.Node, frozenset[fx.Node] | None]

FEW = 16  # combinations of labels that are read before the bits of what they decide
DECIDING = 1_000  # combinations of labels that decide whether a node is run


class ChosenExecution(Execution):
    """The union as a candidate leaves it.

    Args:
        structure: the traced union.
        decisions: by number, which option a candidate takes.
        only: bits of all layers where there is no choice.

    Attributes:
        choices: nodes that take one of several values.
        taken_for_run: nodes of which it takes too many labels to tell whether anything reads them. They are priced as
            if something always did.
    """

    def __init__(self, structure: Clustered, decisions: Sequence[Table], only: int) -> None:
        super().__init__(structure, [], only)
        self._decisions = decisions
        self.choices = [node for node in structure.nodes if is_choice(node)]
        always = _always(structure)
        self._gates = {node: gates for node, gates in self._ways(structure).items() if node not in always}
        self._sizes = {
            label: len({key[i] for key in table.values}) for table in decisions for i, label in enumerate(table.labels)
        }
        self._deciding: dict[fx.Node, frozenset[str]] = {}
        self.taken_for_run = self._bound()

    def _bound(self) -> list[fx.Node]:
        """Let nodes count as run where whether they are depends on more than :data:`DECIDING` combinations."""
        given_up = []
        for node in sorted(self._gates, key=self.structure.rank.__getitem__, reverse=True):
            own: frozenset[str] = frozenset()
            for choice, options in self._gates[node]:
                own |= self._labels(choice) | (frozenset() if options is None else self._decided_by(choice))
            if math.prod(self._sizes[label] for label in own) > DECIDING:
                given_up.append(node)
                del self._gates[node]
            else:
                self._deciding[node] = own
        return given_up

    def taken(self, c: Candidate, node: fx.Node) -> fx.Node:
        """The option of a choice that a candidate takes."""
        return options_of(node)[self._decisions[decision_of(node)](c)]

    def read(self, c: Candidate, node: fx.Node) -> fx.Node:
        while is_choice(node):
            node = self.taken(c, node)
        return node

    def dropped(self, c: Candidate, node: fx.Node) -> bool:
        """Whether nothing that a candidate runs reads a node."""
        if node not in self._gates:
            return False
        known = self.known(c)
        if ("dropped", node) not in known:
            # The choice first: what it takes is read only where it is run itself, and where it makes a difference.
            known["dropped", node] = not any(
                not self.dropped(c, choice) and (options is None or self.taken(c, choice) in options)
                for choice, options in self._gates[node]
            )
        gone: bool = known["dropped", node]
        return gone

    def integers(self, c: Candidate, node: fx.Node, asked: bool = False) -> bool:
        known = self.known(c)
        if (asked, node) not in known:
            known[asked, node] = self._agreed(c, node, partial(super().integers, asked=asked))
        found: bool = known[asked, node]
        return found

    def convolved(self, c: Candidate, node: fx.Node) -> bool:
        return self._agreed(c, node, super().convolved)

    def quantized(self, c: Candidate, node: fx.Node, asked: bool = False) -> bool:
        # What an option gives is read by others too, unless nothing but the choice reads it.
        while is_choice(node) and any(len(option.users) > 1 for option in options_of(node)):
            node = self.taken(c, node)
        return self.integers(c, node, asked) or self.wanted(c, node, asked)

    def _agreed(self, c: Candidate, node: fx.Node, about: Callable[[Candidate, fx.Node], bool]) -> bool:
        """What is true of the option that a choice takes; which one that is, is read only where they differ."""
        while is_choice(node):
            options = list(dict.fromkeys(options_of(node)))
            if len({self._decider(option) for option in options}) == 1:
                answers = {self._agreed(c, option, about) for option in options}
                if len(answers) == 1:
                    return answers.pop()
            node = self.taken(c, node)
        return about(c, node)

    def _decider(self, node: fx.Node) -> str:
        """The gene that decides whether a value is integers: of the convolution that was computed last for it."""
        if is_choice(node):
            found = {self._decider(option) for option in options_of(node)}
            return found.pop() if len(found) == 1 else ""
        layer = self.structure.layer(node)
        if isinstance(layer, nn.Conv2d):
            return self.bits_of.get(str(node.target), "")
        passes = isinstance(layer, (*RELUS, *FOLDED)) or self.structure.passes_on(node)
        inputs = [n for n in node.all_input_nodes if not is_constant(n)]
        return self._decider(max(inputs, key=self.structure.rank.__getitem__)) if passes and inputs else ""

    def last_input(self, c: Candidate, node: fx.Node) -> fx.Node:
        # A choice comes right after its options.
        inputs = [n for n in node.all_input_nodes if not is_constant(n)]
        return max(inputs, key=self.structure.rank.__getitem__)

    def _find_readers(self, node: fx.Node) -> list[Reader]:
        users = self._users(node)
        found = [
            reader.only(partial(self._takes, choice=user, option=node), self._labels(user) | self._decided_by(user))
            for user in users if is_choice(user) for reader in self.readers(user)
        ]  # fmt: skip
        by_choice: dict[fx.Node, dict[fx.Node, list[fx.Node]]] = {}
        alone = []
        for user in users:
            gates = self._gates.get(user, [])
            options = gates[0][1] if len(gates) == 1 else None
            if options is not None and len(options) == 1:
                by_choice.setdefault(gates[0][0], {}).setdefault(next(iter(options)), []).append(user)
            elif not is_choice(user):
                alone.append(user)
        for choice, by_option in by_choice.items():
            if set(by_option) == set(options_of(choice)) and all(len(own) == 1 for own in by_option.values()):
                nodes = {option: own[0] for option, own in by_option.items()}
                which = partial(self._reading, choice=choice, nodes=nodes)
                runs = partial(self._runs, node=choice)
                found.append(Reader(tuple(nodes.values()), runs, which, self._labels(choice)))
            else:
                alone += [user for own in by_option.values() for user in own if not is_choice(user)]
        found += [Reader((user,), partial(self._runs, node=user), labels=self._labels(user)) for user in alone]
        # A depth is read, rather than the bits of blocks beyond it; not so the inputs of all operators of a cell.
        read: frozenset[str] = frozenset()
        ordered = sorted(found, key=lambda reader: len(reader.labels))
        for i, reader in enumerate(ordered):
            few = math.prod(self._sizes[label] for label in read | reader.labels) <= FEW
            read |= reader.labels if few else frozenset()
            ordered[i] = replace(reader, first=few)
        return ordered

    def _labels(self, node: fx.Node) -> frozenset[str]:
        """Labels that may have to be read to tell whether a node is run."""
        return self._deciding.get(node, frozenset())

    def _decided_by(self, choice: fx.Node) -> frozenset[str]:
        return frozenset(self._decisions[decision_of(choice)].labels)

    def _takes(self, c: Candidate, choice: fx.Node, option: fx.Node) -> bool:
        return not self.dropped(c, choice) and self.taken(c, choice) is option

    def _reading(self, c: Candidate, choice: fx.Node, nodes: dict[fx.Node, fx.Node]) -> fx.Node:
        return nodes[self.taken(c, choice)]

    def sources(self, node: fx.Node) -> list[str]:
        if is_choice(node) and node not in self._sources:
            options = dict.fromkeys(options_of(node))
            self._sources[node] = list(dict.fromkeys(path for n in options for path in self.sources(n)))
        return super().sources(node)

    def _ways(self, structure: Clustered) -> dict[fx.Node, list[Gate]]:
        """Node → the choices that it is read by, through nothing but ordinary nodes.

        The last choice comes first: whether a stage ends before a block is asked before what the block is.
        """
        found: dict[fx.Node, dict[fx.Node, set[fx.Node]]] = {}
        for node in reversed(structure.nodes):
            own = found[node] = {}
            for user in node.users:
                if is_choice(user):
                    own.setdefault(user, set()).add(node)
                elif user.op != "output":
                    for choice, options in found[user].items():
                        own.setdefault(choice, set()).update(options)
        return {
            node: [
                (choice, None if own[choice] >= set(options_of(choice)) else frozenset(own[choice]))
                for choice in sorted(own, key=structure.rank.__getitem__, reverse=True)
            ]
            for node, own in found.items()
        }


def _always(structure: Clustered) -> set[fx.Node]:
    """Nodes that every candidate runs: all that the output needs, of a choice what all options need."""
    bit = {node: 1 << i for node, i in structure.rank.items()}
    needs: dict[fx.Node, int] = {}
    for node in (structure.input, *structure.nodes):
        needs[node] = bit[node]
        if is_choice(node):
            common = -1
            for option in options_of(node):
                common &= needs[option]
            needs[node] |= common
        else:
            for n in node.all_input_nodes:
                needs[node] |= needs[n]
    return {node for node in needs if needs[structure.output] & bit[node]}
