"""Trials that are whole runs of an experiment: keys checked at the door, one yardstick for all of them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from nas.content import load_space_class
from nas.errors import ExperimentError, NasError
from nas.executors import cores
from nas.experiment import PLUGINS, Experiment, OpenSection, load_experiment
from nas.forecast import forecast
from nas.job import Job, execute, teacher_costs
from nas.progress import Progress
from nas.reward import rewards, violation
from nas.settings import check, construct, keys_of
from nas.strategies import strategies
from nas.sweep.nni_space import branches
from nas.sweep.parameter import Parameter, text
from nas.sweep.spec import Sweep
from nas.tasks import tasks

Values = dict[str, Any]

# Open section → the plug-in of a name, and how many arguments the engine gives it.
_FAMILIES: dict[str, tuple[Callable[[str], Any], int]] = {
    "task": (tasks.get, 1),
    "space": (load_space_class, 1),
    "strategy": (strategies.get, 2),
    "reward": (rewards.get, 1),
}
_NAMED_BY = {section: leaf for [section], leaf in PLUGINS}


@dataclass(frozen=True)
class ExperimentRunner:
    """One run per trial.

    Args:
        source: the experiment, a file or its content.
        fixed: ``key=value`` overrides of every trial.
        name: of the sweep.
        workers: trials at a time, which share the cores.
        wrapped: keys that take a list of choices; each value is put into one of its own.
    """

    source: str | dict[str, Any]
    fixed: tuple[str, ...]
    name: str
    workers: int = 1
    wrapped: frozenset[str] = frozenset()

    @cached_property
    def base(self) -> Experiment:
        """The experiment without what is varied: its reward and its budget are the yardstick of every trial."""
        return self.experiment({})

    def experiment(self, values: Values) -> Experiment:
        """The experiment of a trial."""
        found = load_experiment(self.source, [*self.fixed, *lines(values)])
        for section, (get, filled) in _FAMILIES.items():
            part = getattr(found, section)
            check(get(getattr(part, _NAMED_BY[section])), part.settings, filled, where=section)
        return found

    def settle(self, values: Values) -> Values:
        """Lists around what goes into one, and without the keys that the chosen plug-ins do not have."""
        return {
            key: [value] if key in self.wrapped else value
            for key, value in values.items()
            if self.plugin_key(key) is None or key.split(".")[1] in self.keys(key, values)
        }

    def plugin_key(self, key: str) -> str | None:
        """The section of a key that belongs to a plug-in; nothing for a key of every experiment."""
        section, _, leaf = key.partition(".")
        field = Experiment.model_fields.get(section)
        kind: Any = field.annotation if field else None
        if section not in _FAMILIES or not leaf or not issubclass(kind, OpenSection) or leaf in kind.model_fields:
            return None
        return section

    def keys(self, key: str, values: Values) -> list[str]:
        """The keys of the plug-in that ``values`` choose for the section of ``key``."""
        section = key.partition(".")[0]
        leaf, (get, filled) = _NAMED_BY[section], _FAMILIES[section]
        whole = values.get(section)
        chosen = values.get(f"{section}.{leaf}") or (whole.get(leaf) if isinstance(whole, dict) else None)
        return keys_of(get(chosen or getattr(getattr(self.base, section), leaf)), filled)

    def run(self, values: Values, folder: Path, progress: Progress) -> dict[str, float]:
        """The whole job in ``folder``, gone on with where an earlier attempt stopped; figures of its winner."""
        experiment = self.experiment(values)
        search = experiment.search
        if search.workers == "auto":
            share = max(1, min(cores() // self.workers, search.batch))
            search = search.model_copy(update={"workers": share})
        named = experiment.model_copy(update={"name": f"{self.name}-{folder.name}", "search": search})
        if not (folder / "summary.json").exists():
            execute(named, folder, resume=True, progress=progress)
        return self.figures(folder)

    def figures(self, run: Path) -> dict[str, float]:
        """What the winner of a finished run measured on validation data, by the yardstick of all trials.

        The reward is that of the experiment before anything was varied, and so is the budget whose ``violation`` is
        told: otherwise a sweep over the reward's exponent would find the exponent that flatters most.
        """
        summary = json.loads((run / "summary.json").read_text())
        winner = next(f for f in summary["finalists"] if f["winner"])
        student = next(row for row in summary["rows"] if row["name"] == "student")
        job, whole = Job(self.base, run), teacher_costs(run)
        limits = job.limits(whole)
        costs = {
            "latency_ms": winner["p50_ms"], "latency_p95_ms": winner["p95_ms"], "size_bytes": winner["size_bytes"],
            **winner.get("predicted_elsewhere", {}),
        }  # fmt: skip
        matrix, names = [list(costs.values())], tuple(costs)
        broken = violation(matrix, names, limits)[0]
        value = float(job.reward(limits, whole).score([winner["quality_valid"]], matrix, names)[0])
        figures = {"reward": value, "quality": winner["quality_valid"], **costs, "violation": float(broken)}
        return figures | {"macs": student["macs"], "params": student["params"]}

    def command(self, values: Values, folder: Path) -> str:
        """The search that a trial was; where the experiment is no file, of the one that the trial's folder keeps."""
        if not isinstance(self.source, str):
            return f"nas search {shlex.quote(str(folder / 'experiment.yaml'))}"
        options = [f"--set {shlex.quote(line)}" for line in (*self.fixed, *lines(values))]
        return " ".join(["nas search", shlex.quote(self.source), *options])

    def forecast(self) -> list[str]:
        """The search of the experiment without what is varied."""
        return ["each trial is a run like this one:", *(f"  {line}" for line in forecast(self.base))]


def lines(values: Values) -> list[str]:
    """``key=value`` overrides, plug-ins before the keys that belong to them, sections before what is in them."""
    kinds = {f"{section}.{leaf}" for section, leaf in _NAMED_BY.items()}
    order = sorted(values, key=lambda key: (key.count("."), key not in kinds))
    return [f"{key}={text(values[key])}" for key in order]


def bind(sweep: Sweep, parameters: tuple[Parameter, ...]) -> tuple[ExperimentRunner, tuple[Parameter, ...]]:
    """The runner of a sweep's experiment, and its parameters as the experiment takes them.

    Every value of a list and both ends of a range are tried on the experiment, and the plug-ins are constructed as a
    search would construct them.

    Raises:
        NasError: the experiment itself is wrong, or a key or value of ``vary`` is, which is then named.
    """
    for key, shape in sweep.vary.items():
        if branches(shape):
            raise ExperimentError(
                f"vary.{key} is a nested choice, and an experiment has no such keys.",
                expected="keys of the experiment, each with its own list or range",
            )
    source = sweep.experiment if sweep.experiment is not None else {}
    runner = ExperimentRunner(source, tuple(lines(sweep.set)), sweep.name, sweep.workers)
    door = _Door(runner, parameters)
    door.construct(runner.base)
    bound = tuple(map(door.bind, parameters))
    return door.runner, bound


class _Door:
    """Tries values on the experiment before anything runs."""

    def __init__(self, runner: ExperimentRunner, parameters: tuple[Parameter, ...]) -> None:
        self.parameters = parameters
        self.runner = runner
        wrapped = frozenset(p.key for p in parameters if self._takes_a_list(p))
        self.runner = replace(runner, wrapped=wrapped)
        self._jobs: dict[str, Job] = {}

    def bind(self, parameter: Parameter) -> Parameter:
        """The parameter as the experiment takes it, each of its values tried."""
        for group in self._contexts(parameter):
            for value in parameter.ends:
                self._try(parameter.key, value, group)
        integers = float(parameter.low).is_integer() and float(parameter.high).is_integer()
        whole = parameter.whole
        if not parameter.values and integers and not parameter.step:
            between = parameter.low + 0.5
            whole = not any(self._valid({**c, parameter.key: between}) for g in self._contexts(parameter) for c in g)
        if whole:
            parameter = replace(parameter, low=int(parameter.low), high=int(parameter.high))
        return replace(parameter, whole=whole, wrapped=parameter.key in self.runner.wrapped)

    def _takes_a_list(self, parameter: Parameter) -> bool:
        """Whether the key refuses the values themselves and takes each in a list, as a space's choices do."""
        return any(
            not any(self._valid({**c, parameter.key: value}) for value in parameter.ends)
            and all(self._valid({**c, parameter.key: [value]}) for value in parameter.ends)
            for group in self._contexts(parameter)
            for c in group[:1]
        )

    def _contexts(self, parameter: Parameter) -> list[list[Values]]:
        """Values of the other parameters to try one with: in each group, one that works is enough.

        A plug-in's key has a group for each plug-in on offer that knows it.
        """
        section = parameter.key.partition(".")[0]
        choosing = (section, f"{section}.{_NAMED_BY.get(section)}")
        others = [p for p in self.parameters if p.key != parameter.key]
        kinds = [p for p in others if p.key in choosing]
        rest = [p for p in others if p not in kinds]
        corners: list[Values] = [{}, {p.key: p.ends[0] for p in rest}, {p.key: p.ends[-1] for p in rest}]
        if self.runner.plugin_key(parameter.key) is None or not kinds:
            return [corners]
        leaf = parameter.key.split(".")[1]
        knowing = [{k.key: v} for k in kinds for v in k.values if leaf in self._keys(parameter.key, {k.key: v})]
        if not knowing:
            names = ", ".join(label for k in kinds for label in k.labels)
            raise ExperimentError(f"vary.{parameter.key}: none of {names} has this key.", remedy="check the spelling")
        return [[{**chosen, **corner} for corner in corners] for chosen in knowing]

    def _keys(self, key: str, values: Values) -> list[str]:
        try:
            return self.runner.keys(key, values)
        except NasError as error:
            (chosen,) = values
            raise ExperimentError(
                f"vary.{chosen}: {error.found}", expected=error.expected, remedy=error.remedy
            ) from None

    def _valid(self, values: Values) -> bool:
        try:
            self.runner.experiment(self.runner.settle(values))
        except NasError:
            return False
        return True

    def _try(self, key: str, value: Any, contexts: list[Values]) -> None:
        """Construct the experiment of a value in one of the contexts.

        Raises:
            ExperimentError: it works in none; says what was wrong in the first.
        """
        first: NasError | None = None
        for context in contexts:
            values = {**context, key: value}
            try:
                settled = self.runner.settle(values)
                # A key that the plug-in does not have is left out of a trial, but here it is a mistake.
                self.construct(self.runner.experiment(settled if key in settled else values))
            except NasError as error:
                first = first or error
            else:
                return
        if first is not None:
            raise ExperimentError(
                f"vary.{key}, value {text(value)}: {first.found}", expected=first.expected, remedy=first.remedy
            ) from None

    def construct(self, experiment: Experiment) -> None:
        """What the search itself would refuse at once, without its time: data and spaces are kept for the next."""
        plain = experiment.plain()
        key = text([plain["task"], plain["space"], plain["seed"]])
        job = self._jobs.setdefault(key, Job(experiment, Path(".")))
        job.strategy(experiment.strategy.kind, experiment.strategy.settings, experiment.seed)
        construct(rewards.get(experiment.reward.kind), experiment.reward.settings, 1.0, where="reward")
