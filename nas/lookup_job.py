"""The whole job where everything is published: search, baseline, best candidates, front, report. No student.

space ─► budget in the costs' units ─► search (and random search) ─► summary.json, report.html
"""

from __future__ import annotations

import datetime
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nas import content
from nas.controller import Budget, Counts, SearchController, best, objective
from nas.errors import BudgetError, ExperimentError, StudyError
from nas.evaluators import Evaluation, Evaluator
from nas.executors import Serial
from nas.experiment import LookupExperiment
from nas.files import write_json
from nas.job import open_run
from nas.locks import run_lock
from nas.progress import Progress, Silent
from nas.reward import Limit, Reward, pareto_front, rewards, violation
from nas.settings import construct
from nas.space import Genomes, TaskInfo
from nas.strategies import Domain, strategies
from nas.study import Study, Trial
from nas.tabular import PublishedSpace

Array = npt.NDArray[np.float64]
SCHEMA_VERSION = 1
NO_TASK = TaskInfo((), 0)
LABELS = {"search": "search", "random": "random search, equal budget"}
SEED_OF_RANDOM = 10_000  # added to the experiment's, so that the baseline is another draw


@dataclass(frozen=True)
class Published(Evaluator):
    """Quality as the space publishes it."""

    space: PublishedSpace

    def evaluate(self, genome: Genomes, fidelity: float = 1.0) -> Evaluation:
        quality = float(self.space.quality(genome[None], fidelity)[0])
        return Evaluation(quality, reason="" if math.isfinite(quality) else f"not published at fidelity {fidelity:g}")


def execute(experiment: LookupExperiment, run: Path, *, resume: bool = False, progress: Progress | None = None) -> Path:
    """Search the published space; returns the run folder. Raises subclasses of NasError for what a user can mend."""
    from nas.report import write_report

    start, progress = time.monotonic(), progress or Silent()
    run.mkdir(parents=True, exist_ok=True)
    with run_lock(run):
        open_run(experiment, run, resume)
        space = load(experiment)
        limits, share = budget(experiment, space)
        progress.note(budget_text(limits, share))
        arms = ("search", *experiment.baselines)
        found = {arm: search(experiment, run, space, limits, arm, progress) for arm in arms}
        summary = summarise(experiment, space, limits, found, time.monotonic() - start)
        write_json(run / "summary.json", summary)
        write_report(run)
    return run


def forecast(experiment: LookupExperiment) -> list[str]:
    """Lines for people. Writes nothing.

    Raises:
        NasError: everything that the search itself would refuse at once.
    """
    space = load(experiment)
    limits, share = budget(experiment, space)
    reward(experiment, space, limits)
    section = experiment.strategy
    construct(strategies.get(section.kind), section.settings, strategy_domain(space), 0, where="strategy")
    return [
        f"space {space.name}: {len(space.choices)} choices, {space.size:,} genomes, published at fidelities "
        + ", ".join(f"{fidelity:g}" for fidelity in space.fidelities),
        budget_text(limits, share),
        f"{1 + len(experiment.baselines)} × {experiment.search.trials} candidates to look up",
    ]


def load(experiment: LookupExperiment) -> PublishedSpace:
    """The published space that the experiment names."""
    section = experiment.space
    space = content.load_space(section.name, NO_TASK, section.settings)
    if not isinstance(space, PublishedSpace):
        raise ExperimentError(f"Space {section.name!r} publishes no qualities.", remedy="add a task to the experiment")
    return space


def budget(experiment: LookupExperiment, space: PublishedSpace) -> tuple[tuple[Limit, ...], float]:
    """Hard limits in the costs' units, and the share of the space's reference genomes that meets them.

    Raises:
        ExperimentError: a budget's cost is none of the space's.
        BudgetError: no reference genome meets the budget.
    """
    if unknown := sorted(set(experiment.budget) - set(space.costs)):
        raise ExperimentError(
            f"Unknown key 'budget.{unknown[0]}'.", expected=f"a cost of the space: {', '.join(space.costs)}"
        )
    costs = space.price(space.reference())
    limits = []
    for name, value in experiment.budget.items():
        column = costs[:, space.costs.index(name)]
        if isinstance(value, str):
            value = float(np.quantile(column[np.isfinite(column)], float(value.split()[1])))
        limits.append(Limit(name, value))
    share = float((violation(costs, space.costs, had(space, tuple(limits))) == 0).mean())
    if share == 0:
        lowest = dict(zip(space.costs, costs.min(axis=0), strict=True))
        raise BudgetError(
            "Nothing meets the budget: "
            + "; ".join(f"{x.cost} ≤ {x.limit:.4g} asked, the lowest is {lowest[x.cost]:.4g}" for x in limits) + ".",
            expected="a budget that at least one candidate meets",
        )  # fmt: skip
    return tuple(limits), share


def had(space: PublishedSpace, limits: tuple[Limit, ...]) -> tuple[Limit, ...]:
    """The limits, and one on every other cost that only what cannot be had (infinite) breaks."""
    named = {limit.cost for limit in limits}
    return (*limits, *(Limit(cost, sys.float_info.max) for cost in space.costs if cost not in named))


def reward(experiment: LookupExperiment, space: PublishedSpace, limits: tuple[Limit, ...]) -> Reward:
    """R(α), aiming at the budgets and at the medians of costs without one; of one cost, it reads the space's first."""
    section, costs = experiment.reward, space.price(space.reference())
    medians = {name: float(np.median(c[np.isfinite(c)])) for name, c in zip(space.costs, costs.T, strict=True)}
    targets = medians | {limit.cost: limit.limit for limit in limits}
    if section.target is not None:
        targets[space.costs[0]] = section.target
    judged = construct(rewards.get(section.kind), section.settings, targets, where="reward")
    judged.columns(space.costs)
    return judged


def strategy_domain(space: PublishedSpace) -> Domain:
    """What strategies know of the space, the objective aside."""
    ordered = np.array([choice.ordered for choice in space.choices])
    return Domain(space.cardinalities, ordered, space.active, space.kinds)


def search(
    experiment: LookupExperiment,
    run: Path,
    space: PublishedSpace,
    limits: tuple[Limit, ...],
    arm: str,
    progress: Progress,
) -> tuple[list[Trial], Counts]:
    """One arm, by the same controller and into the same study as a search that trains."""
    progress.stage("search" if arm == "search" else f"baseline: {arm} search")
    e = experiment
    own = arm == "search"
    kind, settings = (e.strategy.kind, e.strategy.settings) if own else (arm, {})
    judged = reward(e, space, limits)
    screen = had(space, limits)
    domain = strategy_domain(space)
    known = Domain(domain.cardinalities, domain.ordered, domain.active, domain.kinds, objective(space, screen, judged))
    seed = e.seed if own else e.seed + SEED_OF_RANDOM
    name = arm if e.study.storage is None else f"{e.name}-{run.name}-{arm}"
    identity = {**e.identity, "arm": arm, "limits": [vars(limit) for limit in limits]}
    done: list[Trial] = []

    def watch(trial: Trial) -> None:
        done.append(trial)
        if len(done) % 10 == 0 or len(done) == e.search.trials:
            progress.update(len(done) / e.search.trials, f"{len(done)}/{e.search.trials} candidates")

    trials = SearchController(
        space=space,
        strategy=construct(strategies.get(kind), settings, known, seed, where="strategy"),
        estimator=space,
        executor=Serial(Published(space)),
        reward=judged,
        limits=screen,
        study=Study(e.study.storage or run / "study.jsonl", name, space, identity),
        budget=Budget(e.search.trials, e.search.seconds),
        batch=e.search.batch,
        on_trial=watch,
        counts=(counts := Counts()),
    ).run()
    if not best(trials, 1):
        raise StudyError(f"None of {len(trials)} candidates has a published quality.", remedy="look into the table")
    return trials, counts


# ---- what is written down ------------------------------------------------------------------------


def summarise(
    experiment: LookupExperiment,
    space: PublishedSpace,
    limits: tuple[Limit, ...],
    found: dict[str, tuple[list[Trial], Counts]],
    seconds: float,
) -> dict[str, Any]:
    """``summary.json`` of a search that looked everything up."""
    judged, cost = reward(experiment, space, limits), space.costs[0]
    counts = found["search"][1]
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "lookup",
        "name": experiment.name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": experiment.seed,
        "seconds": seconds,
        "warnings": [],
        "quality_metric": "quality",
        "strategy": experiment.strategy.kind,
        "rows": [_row(space, arm, best(trials, 1)[0]) for arm, (trials, _) in found.items()],
        "front": _front(found["search"][0], cost),
        "trials": [_trial(space, trial) for trial in found["search"][0]],
        "baseline_trials": {
            arm: [_trial(space, trial) for trial in trials] for arm, (trials, _) in found.items() if arm != "search"
        },
        "finalists": [],
        "limits": [vars(limit) for limit in limits],
        "reward": {
            "kind": experiment.reward.kind,
            "target": judged.targets.get(cost),
            "targets": judged.targets,
            "cost": cost,
        },
        "screened": {"asked": counts.asked, "infeasible": counts.infeasible, "duplicates": counts.duplicates},
    }


def _row(space: PublishedSpace, arm: str, trial: Trial) -> dict[str, Any]:
    tests = space.tests(np.array([trial.genome]))
    return {
        "name": arm, "label": LABELS[arm], **_trial(space, trial),
        "tests": {name: _known(float(values[0])) for name, values in tests.items()},
    }  # fmt: skip


def _trial(space: PublishedSpace, trial: Trial) -> dict[str, Any]:
    genome = space.canonical(np.array([trial.genome]))[0]  # in a sample, that of the row which stands for the trial
    return {
        "index": trial.index, "status": trial.status, "candidate": space.decode(genome).as_dict(),
        "quality": _known(trial.quality), "reward": _known(trial.reward),
        "costs": {name: _known(value) for name, value in trial.costs.items()}, "violation": trial.violation,
        "reason": trial.reason, "seconds": trial.seconds,
    }  # fmt: skip


def _front(trials: list[Trial], cost: str) -> list[int]:
    """Indices of the trials on the front of quality and ``cost``, by rising cost."""
    usable = best(trials, len(trials))
    return [usable[i].index for i in pareto_front([t.quality for t in usable], [t.costs[cost] for t in usable])]


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def budget_text(limits: tuple[Limit, ...], share: float) -> str:
    """The budget and how much of the space meets it."""
    wanted = ", ".join(f"{limit.cost} ≤ {limit.limit:.4g}" for limit in limits) or "none"
    return f"budget {wanted}; {100 * share:.1f} % of the space meets it"
