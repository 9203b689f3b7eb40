"""Distilling a student: the candidate is built, taught, compressed, fine-tuned and judged on validation data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from nas.evaluators.base import Evaluation, Evaluator, evaluators
from nas.evaluators.train import Lessons, Recipe, predict, train
from nas.space import Candidate, Genomes, SearchSpace
from nas.tasks import Task


@evaluators.register("distil")
@dataclass(frozen=True)
class Distil(Evaluator):
    """Short distillation of the compressed candidate.

    The seed of a training is the experiment's and the candidate's own, so that one candidate has one quality
    whichever strategy finds it, on whichever worker.

    Args:
        space, task: what is trained on what.
        lessons: training data with the teacher's word on them.
        recipe: how long.
        seed: the experiment's.
    """

    space: SearchSpace
    task: Task
    lessons: Lessons
    recipe: Recipe
    seed: int

    def evaluate(self, genome: Genomes, fidelity: float = 1.0) -> Evaluation:
        model = self.fit(genome, self.recipe, fidelity)
        x, y = self.task.split("valid")
        metrics = self.task.evaluate(predict(model, x), y.numpy())
        return Evaluation(metrics[self.task.metric], metrics)

    def fit(self, genome: Genomes, recipe: Recipe, share: float = 1.0) -> nn.Module:
        """The trained, compressed (still simulating) model of a genome, after a ``share`` of the recipe's steps."""
        candidate = self.space.decode(genome)
        seed = candidate_seed(self.space, genome, self.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.space.build(candidate)
        return train(model, self.task, self.lessons, self.space.training(candidate), recipe, seed, share)


def candidate_seed(space: SearchSpace, genome: Genomes, seed: int) -> int:
    """Seed of a candidate's own training: a function of the experiment's seed and the canonical genome."""
    return (int(space.canonical_id(genome)[:8], 16) ^ (seed * 0x9E3779B1)) % 2**31


def skeleton(space: SearchSpace, candidate: Candidate, sample: torch.Tensor) -> nn.Module:
    """The compressed structure of a candidate with untrained weights: what a saved state is loaded into."""
    from nas.compression import apply_passes

    return apply_passes(space.build(candidate).eval(), space.training(candidate).compression, sample).eval()
