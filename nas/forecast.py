"""What a search would do, said without doing it: keys, feasible candidates, and time."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch

from nas.evaluators.train import Recipe
from nas.experiment import Experiment
from nas.job import COSTS, Job
from nas.latency import CostEstimator
from nas.masks import note
from nas.reward import Limit, violation
from nas.space import Candidate
from nas.student.tables import find_table

EXPORT_SECONDS = 1.0
SAMPLES = 20_000


def forecast(experiment: Experiment) -> list[str]:
    """Lines for people. Writes nothing; times a few training steps of a typical candidate.

    Raises:
        NasError: everything that the search itself would refuse at once.
    """
    torch.set_num_threads(1)
    job = Job(experiment, Path("."))
    job.check_keys()
    space = job.space
    lines = [
        f"task {experiment.task.data}: " + ", ".join(f"{len(job.task.split(s)[1])} {s}" for s in ("train", "valid")),
        f"space {space.name}: {len(space.choices)} choices, {space.size:,} genomes, {len(space.keys())} distinct parts",
        *space.remarks(),
        f"device {job.device.name}, {job.workers} workers",
    ]
    table_lines, table_seconds, typical = _table(job)
    step = _seconds_per_step(job, typical)
    largest = _seconds_per_step(job, space.ladder()[-1])
    seconds = table_seconds + _training_seconds(job, step, largest)
    arms = 1 + ("random" in experiment.baselines)
    lines += table_lines
    lines.append(
        f"{arms} × {experiment.search.trials} full trainings of candidates, or shorter ones that add up to as many, "
        f"about {step * _steps(job, job.recipe):.1f} s each"
    )
    lines.append(f"about {seconds / 60:.1f} minutes in all (a cached teacher or table takes its share away)")
    return lines


def _table(job: Job) -> tuple[list[str], float, Candidate]:
    """Lines, seconds that a table would take, and a typical candidate."""
    notes = [f"{name}: table {other.name}, predictions only" for name, other in job.others.items()]
    table = find_table(job.experiment.table.path, job.space, job.device, notes.append)
    rng = np.random.default_rng(0)
    genomes = job.space.sample(rng, SAMPLES)
    if table is None:
        section = job.experiment.table
        seconds = section.seconds + section.nets * EXPORT_SECONDS / max(1, job.workers) + 0.02 * len(job.space.keys())
        line = f"no table for this device: building one takes about {seconds:.0f} s; then it is known what is feasible"
        return [*notes, line], seconds, job.space.decode(genomes[0])
    estimator = job.estimator(table)
    costs = estimator.price(genomes)
    limits, whole, assumed = _limits(job, estimator)
    feasible = violation(costs, estimator.costs, limits) == 0
    lines = [*notes, f"table {table.name} ({len(table.entries)} parts)"]
    count = feasible.mean() * job.space.size
    lines.append(f"{100 * feasible.mean():.1f} % of the space, about {count:,.0f} genomes, meets the budget{assumed}")
    if not feasible.any():
        job.check_budget(estimator, limits)
    if masked := note(job.masks(estimator, limits, job.reward(limits, whole)), most=100):
        lines.append(masked)
    among = np.flatnonzero(feasible) if feasible.any() else np.arange(len(genomes))
    middle = among[np.argsort(costs[among, 0])[len(among) // 2]]
    return lines, 0.0, job.space.decode(genomes[middle])


def _limits(job: Job, estimator: CostEstimator) -> tuple[tuple[Limit, ...], dict[str, float], str]:
    """Budgets and the teacher's costs; of one that is not trained yet, those of the family's second largest member."""
    budget = job.experiment.budget
    ladder = job.space.ladder()
    whole = estimator.price(job.space.encode(ladder[max(0, len(ladder) - 2)]))[0].tolist()
    relative = isinstance(budget.latency, str) or isinstance(budget.size, str)
    assumed = " (of a teacher of the usual size; it is not measured yet)" if relative else ""
    named = dict(zip(estimator.costs, whole, strict=True))
    return job.limits(named), {cost: named[cost] for cost in COSTS}, assumed


def _steps(job: Job, recipe: Recipe) -> int:
    return recipe.epochs * (len(job.task.split("train")[1]) // recipe.batch_size)


def _seconds_per_step(job: Job, candidate: Candidate) -> float:
    from nas.evaluators.train import train

    steps = 8  # fewer, and the optimiser's own start would be the figure
    size = steps * job.recipe.batch_size
    lessons = job.untaught.lessons
    few = type(lessons)(lessons.x[:1, :size], lessons.y[:size], None)
    model = job.space.build(candidate)
    recipe = Recipe(1, 0, job.recipe.batch_size)
    train(model, job.task, few, type(job.space.training(candidate))(), recipe, 0)
    start = time.perf_counter()
    train(model, job.task, few, type(job.space.training(candidate))(), recipe, 0)
    return (time.perf_counter() - start) / min(steps, max(1, len(few.y) // recipe.batch_size))


def _training_seconds(job: Job, step: float, largest: float) -> float:
    e = job.experiment
    teacher = 2 * largest * e.teacher.epochs * (len(job.task.split("train")[1]) // job.recipe.batch_size)
    arms = 1 + ("random" in e.baselines)
    finalists = arms * e.finalists.count + ("uniform" in e.baselines)
    trained = arms * e.search.trials * step * _steps(job, job.recipe) + finalists * step * _steps(job, job.long_recipe)
    return (teacher + trained) / max(1, job.workers) + e.finalists.seconds + 15
