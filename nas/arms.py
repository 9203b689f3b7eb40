"""The arms of a run: each searches or is given, sends its entrants, and all are measured, which corrects the table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nas.controller import Budget, Counts, SearchController, best, front, objective, spread
from nas.errors import StudyError, TableError
from nas.executors import Executor
from nas.experiment import Experiment
from nas.latency import CostEstimator, LatencyTable
from nas.latency.refine import Measured, Refinement, refined
from nas.locks import cache_lock
from nas.masks import Masks
from nas.progress import Progress
from nas.reward import Limit, Reward, violation
from nas.space import Value
from nas.student.finalists import Entrant, Finalist, Session, judge, measure_models, train_finalists
from nas.student.tables import cached_path
from nas.study import Study, Trial, trainings

if TYPE_CHECKING:
    from nas.job import Job

RANDOM_SEED = 10_000  # added to the seed of the random baseline, so that it draws other candidates


def search_arm(
    job: Job,
    arm: str,
    executor: Executor,
    estimator: CostEstimator,
    limits: tuple[Limit, ...],
    reward: Reward,
    masks: Masks,
) -> tuple[list[Trial], Counts]:
    """Run one search; ``random`` is the baseline with the same budget, screening, masks and training."""
    e = job.experiment
    job.progress.stage("search" if arm == "search" else f"baseline: {arm} search")
    kind, settings = (e.strategy.kind, e.strategy.settings) if arm == "search" else ("random", {})
    storage, name = recorded_in(e, job.run, arm)
    study = Study(storage, name, job.space, {**e.identity, "arm": arm, "limits": [vars(x) for x in limits]})
    if study.repaired:
        job.warn(study.repaired)
    own = arm == "search"
    watch = _Watch(job.progress, e.search.trials)
    controller = SearchController(
        space=job.space,
        strategy=job.strategy(
            kind, settings, e.seed if arm == "search" else e.seed + RANDOM_SEED, objective(estimator, limits, reward),
            masks,
        ),
        estimator=estimator,
        executor=executor,
        reward=reward,
        limits=limits,
        study=study,
        budget=Budget(e.search.trials, e.search.seconds),
        batch=e.search.batch,
        on_trial=watch,
        enqueue=[*e.search.enqueue, *warm_starts(job, estimator, limits)] if own else (),
        earlier=job.earlier if own else (),
        retries=e.search.retries,
    )
    trials = controller.run()
    for candidate in controller.ruled_out:
        job.warn(f"the enqueued candidate {candidate} breaks the budget by prediction and was not trained")
    if not best(trials, 1):
        reasons = sorted({t.reason for t in trials if t.reason})
        raise StudyError(
            f"All {len(trials)} candidates failed: {'; '.join(reasons[:3])}.",
            remedy="look at the reasons, then --resume",
        )
    return trials, controller.counts


def recorded_in(experiment: Experiment, run: Path, arm: str) -> tuple[str | Path, str]:
    """Where an arm's trials are: the storage, and the name of the study in it."""
    if experiment.study.storage is None:
        return run / "study.jsonl", arm
    return experiment.study.storage, f"{experiment.name}-{run.name}-{arm}"


def entrants(
    job: Job, trials: dict[str, list[Trial]], estimator: CostEstimator, limits: tuple[Limit, ...]
) -> list[Entrant]:
    """A few of every arm, and uniformly compressed members that fill the budget."""
    section = job.experiment.finalists
    pick = front if section.pick == "front" else best
    chosen = [
        Entrant(arm, t.index, t.genome, t.quality, t.costs)
        for arm, found in trials.items()
        for t in pick(found, section.count)
    ]
    if "uniform" in job.experiment.baselines:
        chosen += _uniform(job, estimator, limits, section.count if section.pick == "front" else 1)
    return chosen


def uniform_within(job: Job, estimator: CostEstimator, limits: tuple[Limit, ...]) -> list[Entrant]:
    """The uniformly compressed members within the budget by prediction, each once, the slowest first.

    They are what people do by hand, so nothing of them is masked.

    Raises:
        SpaceError: the space offers none.
    """
    members = np.array([job.space.encode(c) for c in job.space.uniform()])
    costs = estimator.price(members)
    within = np.flatnonzero(violation(costs, estimator.costs, limits) == 0)
    order = within[np.argsort(-costs[within, estimator.costs.index(job.latency)], kind="stable")]
    different = dict(zip(job.space.canonical_ids(members[order]), order.tolist(), strict=True)) if len(order) else {}
    return [
        Entrant(
            "uniform", i, tuple(int(g) for g in members[i]), None,
            dict(zip(estimator.costs, costs[i].tolist(), strict=True)),
        )
        for i in sorted(different.values(), key=order.tolist().index)
    ]  # fmt: skip


def _uniform(job: Job, estimator: CostEstimator, limits: tuple[Limit, ...], count: int) -> list[Entrant]:
    """Up to ``count`` of them, the slowest among them."""
    within = uniform_within(job, estimator, limits)
    if not within:
        job.warn("no uniformly compressed member of the family meets the budget: that baseline is missing")
    return spread(within[::-1], count)


def warm_starts(job: Job, estimator: CostEstimator, limits: tuple[Limit, ...]) -> list[dict[str, Value]]:
    """The ``search.warm`` slowest uniformly compressed members within the budget: what the search tries first."""
    warm = job.experiment.search.warm
    first = uniform_within(job, estimator, limits)[:warm] if warm else []
    return [job.space.decode(np.array(entrant.genome)).as_dict() for entrant in first]


def measure_finalists(
    job: Job,
    entrants: list[Entrant],
    executor: Executor,
    reward: Reward,
    limits: tuple[Limit, ...],
    table: LatencyTable,
) -> tuple[list[Finalist], Session]:
    """Distil long, export, and measure all of them and the teacher side by side.

    Those of their parts that the table had only interpolated are measured too.
    """
    job.progress.stage("finalists")
    folder = job.run / "finalists"
    done: list[str] = []

    def on_done(name: str) -> None:
        done.append(name)
        job.progress.update(len(done) / len(entrants), f"{name} trained")

    facts = train_finalists(entrants, job.long_recipe, folder, executor, on_done)
    for name, known in facts.items():
        if "reason" in known:
            job.warn(f"finalist {name} failed: {known['reason']}")
    job.progress.stage("measuring")
    models = {name: folder / name / "model.onnx" for name, known in facts.items() if "reason" not in known}
    models["teacher"] = job.run / "teacher.onnx"
    unmeasured = {
        part.key: part
        for entrant in entrants for part in job.space.parts(job.space.decode(entrant.genome))
        if not table.entry(part.key).measured
    }  # fmt: skip
    seconds = job.experiment.finalists.seconds
    session = measure_models(models, job.device, seconds, job.progress.update, unmeasured, job.alternatives)
    return judge(entrants, facts, session, folder, reward, limits), session


def close_loop(job: Job, table: LatencyTable, finalists: Sequence[Finalist], session: Session) -> Refinement:
    """Compare the table with what was measured in the end, correct it, and keep the corrected one beside it.

    The run's own ``table.json`` stays as it is: it is what this search's prices were. So does the cached one, unless
    ``table.learn`` is set: a search that is repeated shall be the same search.
    """
    parts = job.space.keys()
    whole = [
        Measured(
            f.entrant.name, tuple(job.space.parts(job.space.decode(f.entrant.genome))),
            session.timings[f.entrant.name], f.size_bytes,
        )
        for f in finalists
    ]  # fmt: skip
    result = refined(table, parts, whole, session.entries, session.yardstick_ms)
    result.table.save(job.run / "table-refined.json")
    if job.experiment.table.learn:
        cached = cached_path(job.space, job.device)
        with cache_lock(cached):
            if not cached.exists() or _same(cached, table):
                result.table.save(cached)
    if result.exceeded:
        job.warn(
            f"the latency table was {100 * result.before.mape:.1f} % off on the finalists, on average: more than the "
            f"{100 * result.claim:.1f} % that it claims and the {100 * result.noise:.1f} % of noise; corrected by them "
            f"it is {100 * result.after.mape:.1f} % off"
        )
    return result


def _same(path: Path, table: LatencyTable) -> bool:
    """Whether a file still is the table that this search began with: another search may have corrected it meanwhile."""
    try:
        return LatencyTable.load(path).sha256 == table.sha256
    except TableError:
        return False


class _Watch:
    """Turns trials into progress: candidates, and the full trainings that they are worth."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.total = progress, total
        self.done: list[Trial] = []

    def __call__(self, trial: Trial) -> None:
        self.done.append(trial)
        leader, worth = best(self.done, 1), trainings(self.done)
        count = f"{len(self.done)}/{self.total} candidates"
        so_far = f"best reward {leader[0].reward:.4f}" if leader else "nothing yet"
        if worth < len(self.done):
            count = f"{len(self.done)} candidates, {worth:.1f}/{self.total} trainings"
            so_far += f" after {100 * leader[0].fidelity:.3g} % of a training" if leader else ""
        self.progress.update(min(1.0, worth / self.total), f"{count}, {so_far}")
