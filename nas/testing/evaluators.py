"""The contract of an evaluator: it travels to workers, and a genome has one quality."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import torch

from nas.evaluators import Evaluation, Evaluator
from nas.space import Genomes
from nas.testing.require import require


def check_evaluator(evaluator: Evaluator, genome: Genomes) -> None:
    """Check an evaluator on a genome that it can evaluate: picklable, and the same quality every time.

    Raises:
        AssertionError: names the clause that is broken.
    """
    kind = type(evaluator).__name__
    try:
        twin = pickle.loads(pickle.dumps(evaluator))
    except Exception as error:
        raise AssertionError(f"{kind} cannot be pickled, so no worker can run it: {error!r}.") from error
    kept = genome.copy()
    found = []
    for one, seed in itertools.product((evaluator, twin), (1, 2)):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - the global generator is what must not matter
        result = one.evaluate(genome)
        require(isinstance(result, Evaluation), f"{kind}: evaluate returns a {type(result).__name__}.")
        require(not result.failed, f"{kind}: genome {kept} has no quality: {result.reason or result.quality}.")
        require(np.array_equal(genome, kept), f"{kind}: evaluate changes the genome in place.")
        found.append(result)
    qualities = [result.quality for result in found]
    require(len(set(qualities)) == 1, f"{kind}: one genome has several qualities: {qualities}.")
    require(all(r.metrics == found[0].metrics for r in found), f"{kind}: one genome has several metrics.")
