"""What an ablation is asked for: an experiment, seeds, latencies, arms; checked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nas.ablation import ARMS, TARGETS
from nas.errors import ExperimentError
from nas.experiment import Experiment, LookupExperiment, amount, load_any

CONTEST, TEST = "contest.json", "test.json"  # of one seed and target: what was searched and measured; test qualities


@dataclass(frozen=True)
class Ablation:
    """One experiment, searched by several arms at latencies fixed beforehand.

    Attributes:
        experiment: its latency budget is replaced by the targets.
        seeds: each has its own searches, and its own data split and teacher, unless the teacher is a given model: what
            that was trained on must not become test data, so there is one split then.
        targets: shares of the teacher's measured p50 (``"50%"``), or milliseconds.
        arms: some of :data:`nas.ablation.ARMS`.
        seconds: training seconds of an arm for a seed and target; None: what ``search.trials`` trainings take the joint
            search.
    """

    experiment: Experiment
    seeds: tuple[int, ...] = (0, 1, 2)
    targets: tuple[float | str, ...] = tuple(TARGETS.split(","))
    arms: tuple[str, ...] = ARMS
    seconds: float | None = None

    def at(self, seed: int, target: float | str) -> Experiment:
        """The experiment of one seed with one latency for its budget."""
        e = self.experiment
        budget, task = e.budget.model_copy(update={"latency": target}), e.task
        if e.teacher.model is not None and "seed" not in task.settings:
            task = task.model_copy(update={"seed": e.seed})
        return e.model_copy(update={"seed": seed, "budget": budget, "task": task, "baselines": ()})

    def plain(self) -> dict[str, Any]:
        """JSON-able form, as it is written to the folder."""
        return {
            "experiment": self.experiment.plain(), "seeds": list(self.seeds), "targets": list(self.targets),
            "arms": list(self.arms), "seconds": self.seconds,
        }  # fmt: skip


def load_ablation(
    source: str | Path | dict[str, Any], overrides: list[str] | None = None, *, seeds: str = "0,1,2",
    targets: str = TARGETS, arms: str = ",".join(ARMS), seconds: float | None = None,
) -> Ablation:  # fmt: skip
    """Read an experiment and the options of ``nas ablate``; lists are separated by commas.

    Raises:
        ExperimentError: an option is malformed, or the experiment cannot be compared fairly; says why.
        ContentError: there is no such experiment.
    """
    experiment = load_any(source, overrides)
    if isinstance(experiment, LookupExperiment):
        raise ExperimentError(
            f"{experiment.name} looks qualities up: it has no device, no teacher and nothing to compress.",
            expected="an experiment with a task, whose students are trained and measured",
            remedy="nas search runs it, beside random search",
        )
    _check_fair(experiment)
    found = Ablation(
        experiment,
        _distinct("--seeds", [_seed(word) for word in _words("--seeds", seeds)]),
        _distinct("--targets", [_target(word) for word in _words("--targets", targets)]),
        _distinct("--arms", [_arm(word) for word in _words("--arms", arms)]),
        seconds,
    )
    if seconds is not None and not 0 < seconds < float("inf"):
        raise ExperimentError(f"--seconds {seconds:g}.", expected="training seconds of an arm, above 0")
    if seconds is None and "joint" not in found.arms:
        raise ExperimentError(
            "The other arms stop when they have trained as long as the joint search, and --arms leaves it out.",
            remedy="add joint to --arms, or say how long with --seconds",
        )
    return found


def _check_fair(e: Experiment) -> None:
    """Refuse what would favour one arm, or would be another comparison than the one that is reported."""
    for key, is_set, why in (
        ("search.enqueue", e.search.enqueue, "the joint search would begin with what somebody else found"),
        ("search.earlier", e.search.earlier, "the joint search would begin with what another search found"),
        ("reward.target", e.reward.target is not None, "every target latency is the target of its own rewards"),
        ("search.seconds", e.search.seconds != float("inf"), "arms end by training seconds, not by the clock"),
    ):
        if is_set:
            raise ExperimentError(f"{key} is set: {why}.", remedy=f"leave {key} out of the experiment")
    if e.budget.percentile != "p50":
        raise ExperimentError(
            f"budget.percentile is {e.budget.percentile}.", expected="p50: the targets are shares of the teacher's p50",
            remedy="--set budget.percentile=p50",
        )  # fmt: skip


def _words(option: str, text: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise ExperimentError(f"{option} {text!r}.", expected="values with commas between them")
    return words


def _distinct(option: str, values: Sequence[Any]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ExperimentError(f"{option} {', '.join(map(str, values))} names one twice.", expected="each once")
    return tuple(values)


def _seed(word: str) -> int:
    if not word.isdecimal():
        raise ExperimentError(f"--seeds {word!r}.", expected="whole numbers, 0 or more")
    return int(word)


def _target(word: str) -> float | str:
    wanted = "shares of the teacher's measured p50 above 0 % and up to 100 %, such as 25%, or milliseconds"
    try:
        value = amount(word if "%" in word else float(word))
    except ValueError:
        raise ExperimentError(f"--targets {word!r}.", expected=wanted) from None
    if isinstance(value, str) and float(value[:-1]) > 100:
        raise ExperimentError(f"--targets {word!r} is slower than the teacher.", expected=wanted)
    return value


def _arm(word: str) -> str:
    if word not in ARMS:
        raise ExperimentError(f"Unknown arm {word!r}.", expected=f"some of {', '.join(ARMS)}")
    return word


def label(target: float | str) -> str:
    """A target for people: ``25%``, ``2.5 ms``."""
    return target if isinstance(target, str) else f"{target:g} ms"


def contest_folder(folder: Path, seed: int, target: float | str) -> Path:
    """The run folder of one seed and target."""
    return folder / "runs" / f"seed{seed}-{label(target).replace('%', 'pct').replace(' ', '')}"


def seed_folder(folder: Path, seed: int) -> Path:
    """Where the teacher of a seed is."""
    return folder / "runs" / f"seed{seed}"
