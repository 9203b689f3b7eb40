"""Looking a quality up: published tables, and functions in benchmarks and tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from nas.evaluators.base import Evaluation, Evaluator, evaluators
from nas.space import Genomes

Table = Mapping[tuple[int, ...], float] | Callable[[Genomes], float]


@evaluators.register("lookup")
@dataclass(frozen=True)
class Lookup(Evaluator):
    """Quality from a mapping of genomes (as tuples) or a function of the genome; costs no training.

    A genome that a mapping lacks is recorded as failed, and so is a fidelity that there is no table for.

    Args:
        table: qualities after the full training.
        lower: fidelity below 1 → qualities after that share of the training.
    """

    table: Table
    lower: Mapping[float, Table] = field(default_factory=dict)

    def evaluate(self, genome: Genomes, fidelity: float = 1.0) -> Evaluation:
        found = [t for share, t in {**self.lower, 1.0: self.table}.items() if math.isclose(share, fidelity)]
        if not found:
            return Evaluation(math.nan, reason=f"there is no table for fidelity {fidelity:.4g}")
        (table,) = found
        if callable(table):
            return Evaluation(float(table(genome)))
        quality = table.get(tuple(int(g) for g in genome))
        if quality is None:
            return Evaluation(math.nan, reason="the table has no such genome")
        return Evaluation(float(quality))
