"""The labels of an NNI model space as choices, and what depends on them as tables over their values.

NNI keeps a space as expressions over labelled variables; here each expression is evaluated once for all values of the
labels that it reads, so that a candidate's sizes and alternatives are looked up.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nni.mutable import Categorical, CategoricalMultiple, LabeledMutable, Mutable, Numerical
from nni.mutable.annotation import Constraint

from nas.errors import SpaceError
from nas.genes import Choice, Value

MOST = 20_000  # entries of one table, or values of one label


@dataclass(frozen=True)
class Table:
    """A value as a function of a few labels.

    Attributes:
        labels: that it reads.
        values: by the labels' values, as candidates have them.
    """

    labels: tuple[str, ...]
    values: Mapping[tuple[Value, ...], Any]

    def __call__(self, candidate: Mapping[str, Value]) -> Any:
        """The value for a candidate, of which only the labels are read."""
        return self.values[tuple(candidate[label] for label in self.labels)]

    @property
    def constant(self) -> bool:
        """Whether it is one value whatever the labels are."""
        return len(set(self.values.values())) == 1


class Labels:
    """All labels of a model space.

    Args:
        space: an ``nni.nas.nn.pytorch.ModelSpace``.

    Attributes:
        choices: one for each label, in the order of the space.

    Raises:
        SpaceError: a label takes values that cannot be listed, or the space is constrained beyond its labels.
    """

    def __init__(self, space: Mutable) -> None:
        # Several of a list of inputs are one decision; NNI's own algorithms make a yes or no of each.
        found = space.simplify(_labelled)
        self._offered: dict[str, dict[Value, Any]] = {
            label: _subsets(label, m) if isinstance(m, CategoricalMultiple) else _values(label, m)
            for label, m in found.items()
        }
        self.choices = tuple(Choice(label, values) for label, values in self._offered.items())

    def sample(self, candidate: Mapping[str, Value]) -> dict[str, Any]:
        """What ``freeze`` of NNI takes, for a candidate that has all labels."""
        return {label: values[candidate[label]] for label, values in self._offered.items()}

    def largest(self) -> dict[str, Value]:
        """The largest value of every label whose values are numbers, the first of others."""
        return {
            label: max(values) if all(_is_number(v) for v in values) else next(iter(values))
            for label, values in self._offered.items()
        }

    def table(self, read: Sequence[Mutable], value: Callable[[dict[str, Any]], Any], what: str) -> Table:
        """``value`` for all values of the labels that the mutables ``read`` depend on.

        Args:
            value: sample of NNI → what is tabulated.
            what: for messages.

        Raises:
            SpaceError: there are too many combinations.
        """
        labels = tuple(dict.fromkeys(label for mutable in read for label in mutable.simplify(_labelled)))
        offered = [self._offered[label] for label in labels]
        if math.prod(map(len, offered)) > MOST:
            raise SpaceError(
                f"{what} depends on {len(labels)} labels with {math.prod(map(len, offered))} combinations.",
                expected=f"at most {MOST}",
                remedy="fewer values for the labels that it is computed of",
            )
        entries = {}
        for chosen in itertools.product(*offered):
            sample = {label: self._offered[label][v] for label, v in zip(labels, chosen, strict=True)}
            entries[chosen] = value(sample)
        return Table(labels, entries)


def _labelled(mutable: Mutable) -> bool:
    return isinstance(mutable, LabeledMutable)


def _is_number(value: Value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _values(label: str, mutable: LabeledMutable) -> dict[Value, Any]:
    """Value as candidates have it → as NNI has it."""
    if isinstance(mutable, Categorical):
        plain = all(isinstance(v, int | float | str | bool) for v in mutable.values)
        return {v if plain else str(v): v for v in mutable.values}
    if isinstance(mutable, Numerical) and mutable.quantize and math.isfinite(mutable.high - mutable.low):
        count = round((mutable.high - mutable.low) / mutable.quantize) + 1
        if count <= MOST:
            grid = [mutable.qclip(mutable.low + i * mutable.quantize) for i in range(count)]
            return {v: v for v in sorted(set(grid))}
    if isinstance(mutable, Constraint):
        raise SpaceError(
            f"The model space is constrained by {mutable.label!r}.",
            expected="labels that are chosen independently of each other",
            remedy="leave the constraint out; a limit on cost belongs into budget",
        )
    raise SpaceError(
        f"Label {label!r} of the model space is a {type(mutable).__name__} of any number in a range.",
        expected="values that can be listed: nni.choice, or nni.quniform between two ends",
    )


def _subsets(label: str, mutable: CategoricalMultiple) -> dict[Value, Any]:
    values = list(mutable.values)
    # No input at all is left out: it reduces to nothing that a forward could go on with.
    counts = range(1, len(values) + 1) if mutable.n_chosen is None else [mutable.n_chosen]
    if sum(math.comb(len(values), n) for n in counts) > MOST:
        raise SpaceError(f"Label {label!r} chooses among more than {MOST} sets of inputs.", remedy="fewer inputs")
    subsets = [list(chosen) for n in counts for chosen in itertools.combinations(values, n)]
    if mutable.n_chosen == 1:
        return {chosen[0]: chosen for chosen in subsets}
    return {"+".join(map(str, chosen)): chosen for chosen in subsets}
