"""Fronts of a run under any reward and any limits, from its record alone: nothing is trained again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from nas.arms import recorded_in
from nas.controller import comparable
from nas.errors import ExperimentError, RewardError, StudyError
from nas.experiment import Experiment, load_experiment
from nas.job import Job, teacher_costs
from nas.reward import Limit, Reward, hypervolume, pareto_front, reference_point, violation, where_defined
from nas.study import Trial, read_trials


@dataclass(frozen=True)
class Point:
    """One evaluated candidate under the reward and the limits that were asked for.

    Attributes:
        quality: on validation data, after the search's short training.
        costs: predicted, by name.
        reward: None where the reward is not defined for the quality.
        violation: how far the limits are broken; 0 is feasible.
        candidate: choice → value.
    """

    index: int
    quality: float
    costs: dict[str, float]
    reward: float | None
    violation: float
    candidate: dict[str, Any]


@dataclass(frozen=True)
class Front:
    """What a run's record says under a reward.

    Attributes:
        evaluated, failed: trials of the arm, and those of them without a quality.
        reward: ``kind``, and what it aims at as ``targets``.
        limits: cost → the highest that is admitted.
        costs: what stands against quality on the front.
        points: the front of everything that was evaluated, within the limits or not, by rising first cost.
        best: the candidate within the limits that has the highest reward, the faster where rewards are equal.
        hypervolume: what the front dominates within ``reference`` (``quality``, and a value for each of ``costs``).
    """

    arm: str
    evaluated: int
    failed: int
    reward: dict[str, Any]
    limits: dict[str, float]
    costs: tuple[str, ...]
    points: list[Point]
    best: Point | None
    hypervolume: float
    reference: dict[str, float]

    def plain(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


def run_front(
    run: Path,
    *,
    kind: str | None = None,
    settings: Sequence[str] = (),
    limits: Sequence[str] = (),
    costs: Sequence[str] = (),
    arm: str = "search",
) -> Front:
    """The front of everything that one arm of a run evaluated, and its best candidate under a reward.

    Works while the run goes on, and changes nothing.

    Args:
        run: run folder.
        kind: reward by name or ``module:name``; by default the run's own.
        settings: ``"key=value"`` on top of the reward's section, such as ``"w=-0.1"`` or ``"target=3"``.
        limits: ``"cost=value"``, instead of the run's own limit on that cost.
        costs: what stands against quality; by default the latency that the run's budget means.
        arm: search, or a baseline that searches.

    Raises:
        StudyError: there is no run, no such arm, or nothing evaluated yet.
        ExperimentError: a key, a limit or a cost is unknown.
        RewardError: the reward is not defined for any of the candidates, or has a target that is no cost.
    """
    job = Job(_experiment(run, kind, settings), run)
    trials, candidates = _recorded(job, arm)
    full = {trial.index for trial in comparable(trials)}
    done = [i for i, trial in enumerate(trials) if trial.index in full]
    names = tuple(trials[done[0]].costs)
    whole = teacher_costs(run)
    bounds = _limits(job.limits(whole), limits, names)
    reward = job.reward(bounds, whole)
    axes = tuple(dict.fromkeys(costs)) or (job.latency,)
    for cost in axes:
        _require_known(cost, names, "--cost")

    quality = np.array([trials[i].quality for i in done])
    priced = np.array([[trials[i].costs[name] for name in names] for i in done])
    broken = violation(priced, names, bounds)
    scores = _scores(reward, quality, priced, names)
    points = [
        Point(
            trials[i].index, trials[i].quality, trials[i].costs,
            float(score) if math.isfinite(score) else None, float(over), candidates[i],
        )
        for i, score, over in zip(done, scores, broken, strict=True)
    ]  # fmt: skip
    against = priced[:, [names.index(cost) for cost in axes]]
    corner = reference_point(quality, against, axes, bounds)
    return Front(
        arm=arm,
        evaluated=len(trials),
        failed=sum(trial.status != "complete" for trial in trials),
        reward={"kind": job.experiment.reward.kind, "targets": reward.targets},
        limits={limit.cost: limit.limit for limit in bounds},
        costs=axes,
        points=[points[i] for i in pareto_front(quality, against)],
        best=_best(points, job.latency),
        hypervolume=hypervolume(quality, against, corner),
        reference=dict(zip(("quality", *axes), corner, strict=True)),
    )


def _experiment(run: Path, kind: str | None, settings: Sequence[str]) -> Experiment:
    """The run's experiment with another reward."""
    kept = run / "experiment.yaml"
    if not kept.exists():
        raise StudyError(
            f"{run} holds no run.", expected="a folder that `nas search` made", remedy="nas list runs shows those here"
        )
    overrides = [f"reward.kind={kind}"] if kind is not None else []
    overrides += [f"reward.{setting.strip().removeprefix('reward.')}" for setting in settings]
    try:
        raw = yaml.safe_load(kept.read_text())
    except yaml.YAMLError as error:
        raise StudyError(f"{kept} is damaged: {error}.") from error
    return load_experiment(raw, overrides)


def _recorded(job: Job, arm: str) -> tuple[list[Trial], list[dict[str, Any]]]:
    """Trials of an arm and the values of their candidates; at least one has a quality."""
    storage, name = recorded_in(job.experiment, job.run, arm)
    if isinstance(storage, Path) and not storage.exists():
        raise StudyError(f"The run in {job.run} has evaluated nothing yet.", remedy="wait for its first candidates")
    found = read_trials(storage, name)
    if all(trial.status != "complete" for trial, _ in found):
        raise StudyError(
            f"None of the {len(found)} candidates of {arm!r} in {job.run} has a quality.",
            remedy="wait for more of them, or look at the reasons in the report",
        )
    return [trial for trial, _ in found], [values for _, values in found]


def _limits(own: Sequence[Limit], asked: Sequence[str], names: tuple[str, ...]) -> tuple[Limit, ...]:
    """The run's limits with those that were asked for in their place."""
    bounds = {limit.cost: limit.limit for limit in own}
    for text in asked:
        cost, _, value = (part.strip() for part in text.partition("="))
        try:
            bounds[cost] = float(value)
        except ValueError:
            bounds[cost] = math.nan
        if not 0 < bounds[cost] < math.inf:
            raise ExperimentError(f"--limit {text!r}.", expected="cost=value, such as latency_ms=3.0, above 0")
        _require_known(cost, names, "--limit")
    return tuple(Limit(cost, value) for cost, value in bounds.items())


def _require_known(cost: str, names: tuple[str, ...], option: str) -> None:
    if cost not in names:
        raise ExperimentError(
            f"{option} {cost!r}: the run did not record such a cost.", expected=f"one of {', '.join(names)}"
        )


def _scores(reward: Reward, quality: Any, costs: Any, names: tuple[str, ...]) -> Any:
    """Rewards ``[n]``, NaN for some; raises the reward's own error where it is defined for none."""
    scores = where_defined(reward, quality, costs, names)
    if not np.isfinite(scores).any():
        reward.score(quality, costs, names)
        raise RewardError("The reward is not a number for any of the candidates.")
    return scores


def _best(points: Sequence[Point], latency: str) -> Point | None:
    def place(point: Point) -> tuple[float, float, int]:
        return -(point.reward or 0.0), point.costs[latency], point.index

    within = [point for point in points if point.violation == 0 and point.reward is not None]
    return min(within, key=place, default=None)


def rows(front: Front) -> list[list[str]]:
    """The front as a table for people, header first."""
    shown = tuple(dict.fromkeys((*front.costs, *front.reward["targets"], *front.limits)))
    head = ["", "quality", *shown, "reward", "limits"]
    return [head, *(_row(point, shown, front.best) for point in front.points)]


def _row(point: Point, shown: tuple[str, ...], best: Point | None) -> list[str]:
    mark = " best" if best is not None and point.index == best.index else ""
    reward = "–" if point.reward is None else f"{point.reward:.4f}"
    over = "met" if point.violation == 0 else f"over by {100 * point.violation:.1f} %"
    return [
        f"{point.index}{mark}",
        f"{point.quality:.4f}",
        *(_value(point.costs[name]) for name in shown),
        reward,
        over,
    ]


def sentences(front: Front) -> list[str]:
    """What else there is to say about it."""
    said = [
        f"{len(front.points)} of {front.evaluated} candidates of {front.arm!r} are on the front"
        + (f"; {front.failed} failed" if front.failed else ""),
        f"reward {front.reward['kind']}, aiming at {_named(front.reward['targets'])}; "
        f"limits {_named(front.limits) if front.limits else 'none'}",
        f"hypervolume {front.hypervolume:.6g}, reference point {_named(front.reference)}",
    ]
    if front.best is None:
        return [*said, "no candidate within the limits has a reward"]
    chosen = "  ".join(f"{name}={value}" for name, value in front.best.candidate.items())
    return [
        *said,
        f"best: {front.best.index}, reward {front.best.reward:.4f}, quality {front.best.quality:.4f}",
        chosen,
    ]


def _named(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {_value(value)}" for name, value in values.items())


def _value(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
