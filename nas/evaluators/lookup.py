"""Looking a quality up: published tables, and functions in benchmarks and tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from nas.evaluators.base import Evaluation, Evaluator, evaluators
from nas.space import Genomes


@evaluators.register("lookup")
@dataclass(frozen=True)
class Lookup(Evaluator):
    """Quality from a mapping of genomes (as tuples) or a function of the genome; costs no training.

    A genome that a mapping lacks is recorded as failed.
    """

    table: Mapping[tuple[int, ...], float] | Callable[[Genomes], float]

    def evaluate(self, genome: Genomes, fidelity: float = 1.0) -> Evaluation:
        if callable(self.table):
            return Evaluation(float(self.table(genome)))
        quality = self.table.get(tuple(int(g) for g in genome))
        if quality is None:
            return Evaluation(math.nan, reason="the table has no such genome")
        return Evaluation(float(quality))
