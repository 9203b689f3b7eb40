"""What of a model space's union runs for a candidate: the alternatives that it takes, and what those read."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from nas.derived.clusters import Clustered
from nas.derived.execution import Execution
from nas.genes import Candidate
from nas.nni.labels import Table
from nas.tracing.alternatives import decision_of, is_choice, options_of


class ChosenExecution(Execution):
    """The union as a candidate leaves it.

    Args:
        structure: the traced union.
        decisions: by number, which option a candidate takes.
        only: bits of all layers where there is no choice.

    Attributes:
        choices: nodes that take one of several values.
    """

    def __init__(self, structure: Clustered, decisions: Sequence[Table], only: int) -> None:
        super().__init__(structure, [], only)
        self._decisions = decisions
        self.choices = [node for node in structure.nodes if is_choice(node)]
        self._always = _always(structure)
        self._gates = {node: gates for node, gates in self._ways(structure).items() if node not in self._always}

    def taken(self, c: Candidate, node: fx.Node) -> fx.Node:
        """The option of a choice that a candidate takes."""
        return options_of(node)[self._decisions[decision_of(node)](c)]

    def read(self, c: Candidate, node: fx.Node) -> fx.Node:
        while is_choice(node):
            node = self.taken(c, node)
        return node

    def dropped(self, c: Candidate, node: fx.Node) -> bool:
        """Whether nothing that a candidate runs reads a node."""
        return not self._lives(c, node, {})

    def _lives(self, c: Candidate, node: fx.Node, known: dict[fx.Node, bool]) -> bool:
        if node not in self._gates:
            return True
        if node not in known:
            # The choice first: what it would take is nobody's business where it is not run itself.
            known[node] = any(
                self._lives(c, choice, known) and self.taken(c, choice) is option
                for choice, option in self._gates[node]
            )
        return known[node]

    def readers(self, c: Candidate, node: fx.Node) -> list[fx.Node | None]:
        found: list[fx.Node | None] = []
        home = self.home.get(node)
        for user in node.users:
            if user.op == "output":
                found.append(None)
            elif is_choice(user):
                if not self.dropped(c, user) and self.taken(c, user) is node:
                    found += self.readers(c, user)
            elif user.op != "call_method" and self.home.get(user) is not home and not self.dropped(c, user):
                found.append(user)
        return found

    def sources(self, node: fx.Node) -> list[str]:
        if is_choice(node) and node not in self._sources:
            options = dict.fromkeys(options_of(node))
            self._sources[node] = list(dict.fromkeys(path for n in options for path in self.sources(n)))
        return super().sources(node)

    def _ways(self, structure: Clustered) -> dict[fx.Node, list[tuple[fx.Node, fx.Node]]]:
        """Node → the choices that it is read by, through nothing but ordinary nodes, and as which option.

        The last choice comes first: whether a stage ends before a block is asked before what the block is.
        """
        found: dict[fx.Node, dict[tuple[fx.Node, fx.Node], None]] = {}
        for node in reversed(structure.nodes):
            own: dict[tuple[fx.Node, fx.Node], None] = {}
            for user in node.users:
                if user.op == "output":
                    continue
                own.update({(user, node): None} if is_choice(user) else found[user])
            found[node] = own
        rank = structure.rank
        return {node: sorted(own, key=lambda gate: -rank[gate[0]]) for node, own in found.items()}


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
