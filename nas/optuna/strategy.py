"""Any of Optuna's samplers as a strategy, ``optuna:TPESampler``, in an in-memory study of its own."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

from nas.errors import ContentError, ExperimentError, ExtraError
from nas.space import Genomes
from nas.strategies.base import ASKED, SCREENED, Domain, Outcomes, Proposals, Strategy
from nas.strategies.draws import Draws

Array = npt.NDArray[np.float64]
#: What a sampler imports beyond Optuna's own requirements, when it first samples.
NEEDS = {"CmaEsSampler": ("cmaes",), "GPSampler": ("scipy", "torch"), "QMCSampler": ("scipy",)}
#: Samplers that search numbers only: to them every choice is a number, ordered or not.
NUMBERS_ONLY = ("CmaEsSampler", "QMCSampler")
#: Hints of the settings that an experiment file can hold; the other parameters are functions and objects.
PLAIN: dict[str, Any] = {kind.__name__: kind for kind in (bool, int, float, str)}
PLAIN |= {f"{name} | None": kind | None for name, kind in PLAIN.items()}
QUALITY, REWARD = "quality", "reward"
SAMPLE = 256


def samplers() -> dict[str, type[BaseSampler]]:
    """Optuna's samplers that need nothing beyond settings, by name."""
    found = {}
    for name in optuna.samplers.__all__:
        kind = getattr(optuna.samplers, name)
        if inspect.isclass(kind) and issubclass(kind, BaseSampler) and not inspect.isabstract(kind):
            parameters = inspect.signature(kind).parameters.values()
            if all(parameter.default is not inspect.Parameter.empty for parameter in parameters):
                found[name] = kind
    return found


def named(name: str) -> Callable[..., OptunaStrategy]:
    """The maker of strategies ``(domain, seed, **settings)`` around the sampler called ``name``.

    Its signature has the sampler's own settings, as far as a file can hold them, and ``objectives``.

    Raises:
        ContentError: Optuna has no such sampler.
        ExtraError: the sampler needs a package that is not installed.
    """
    known = samplers()
    if name not in known:
        raise ContentError(f"Unknown strategy 'optuna:{name}'.", expected=f"optuna: and one of {', '.join(known)}")
    missing = [package for package in NEEDS.get(name, ()) if find_spec(package) is None]
    if missing:
        raise ExtraError(
            f"optuna:{name} needs {' and '.join(missing)}, not installed.", remedy=f"pip install {' '.join(missing)}"
        )

    def make(domain: Domain, seed: int = 0, **settings: Any) -> OptunaStrategy:
        return OptunaStrategy(domain, seed, sampler=name, **settings)

    own = [inspect.Parameter("domain", inspect.Parameter.POSITIONAL_OR_KEYWORD),
           inspect.Parameter("seed", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=0),
           inspect.Parameter("objectives", inspect.Parameter.KEYWORD_ONLY, default=(REWARD,))]  # fmt: skip
    settings = [p for p in inspect.signature(known[name]).parameters.values() if p.name != "seed" and _hint(p)]
    settings = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in settings]
    make.__signature__ = inspect.Signature([*own, *settings])  # type: ignore[attr-defined]
    make.__annotations__ = {"objectives": tuple[str, ...], **{p.name: _hint(p) for p in settings}}
    return make


def _hint(parameter: inspect.Parameter) -> Any:
    """The type of a setting that a file can hold, otherwise None."""
    return PLAIN.get(str(parameter.annotation))


class OptunaStrategy(Strategy):
    """A sampler of Optuna, unmodified, asked and told through a study in memory.

    An ordered choice is an integer parameter, any other a categorical one. What is under way are the study's running
    trials, which samplers with a constant liar take into account. Outcomes with a reward are complete trials, repeats
    too; failed ones are failed trials, which every sampler ignores.

    A candidate that its costs rule out is a complete trial with a violated constraint, for samplers that know
    constraints, and with the worst value told so far, which is never compared with a feasible one's except by the
    model of a Gaussian process; to other samplers it is a failed trial. Violations are told as log(1 + violation):
    finite, and in the same order. No constraint is set where nothing of a random sample of the space breaks a budget.

    Where proposals are repaired, the sampler is told the outcome under what it drew: to it, masked values are as good
    as the plain ones in their place.

    The study keeps every trial, and a sampler's time to propose grows with their number.

    Args:
        domain: the genes.
        seed: of the sampler, any non-negative integer.
        sampler: name of a class in ``optuna.samplers``.
        objectives: what the sampler optimises: ``reward`` or ``quality``, both upwards, or costs by name, downwards.
        settings: keyword arguments of the sampler.

    Raises:
        ExperimentError: the sampler refuses its settings or so many objectives, or a cost is unknown.
    """

    def __init__(
        self, domain: Domain, seed: int = 0, *, sampler: str, objectives: tuple[str, ...] = (REWARD,), **settings: Any
    ) -> None:
        super().__init__(domain, seed)
        self.objectives = tuple(objectives)
        self.minimises = tuple(name for name in self.objectives if name not in (QUALITY, REWARD))
        self._columns = _columns(self.objectives, domain)
        self._sign = np.array([-1.0 if name in (QUALITY, REWARD) else 1.0 for name in self.objectives])
        self._worst = np.full(len(self.objectives), np.nan)
        kind = samplers()[sampler]
        self._constrained = "constraints_func" in inspect.signature(kind).parameters and _rules_out(domain, seed)
        self._distributions = {
            str(gene): _distribution(int(size), bool(ordered) or sampler in NUMBERS_ONLY)
            for gene, (size, ordered) in enumerate(zip(domain.cardinalities, domain.ordered, strict=True))
        }
        if len(self.objectives) > 1:  # a rehearsal, because samplers refuse several objectives only when they sample
            self._open(kind, sampler, settings, check=True)
        self.study = self._open(kind, sampler, settings)
        self._trials: dict[int, optuna.Trial] = {}

    def _open(
        self, kind: type[BaseSampler], name: str, settings: Mapping[str, Any], check: bool = False
    ) -> optuna.Study:
        directions = [StudyDirection.MINIMIZE if sign > 0 else StudyDirection.MAXIMIZE for sign in self._sign]
        with warnings.catch_warnings():
            # Whoever names a sampler has chosen it, experimental or not.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            try:
                sampler = kind(**settings, seed=self.seed % 2**32)  # type: ignore[call-arg]
                study = optuna.create_study(sampler=sampler, directions=directions)
                if check:
                    study.ask({"x": IntDistribution(0, 1)})
            except (TypeError, ValueError) as error:
                raise ExperimentError(f"optuna:{name} refuses {dict(settings)}, {self.objectives}: {error}") from error
        # Samplers that enumerate a space stop their study at its end; the search decides for itself.
        study.stop = lambda: None  # type: ignore[method-assign]
        return study

    def ask(self, n: int = 1) -> Proposals:
        """``n`` proposals, one after the other: each is known to the sampler before the next is drawn."""
        parts = [super().ask(0)]
        for _ in range(n):
            parts.append(super().ask(1))
        return Proposals(
            np.concatenate([part.index for part in parts]),
            np.concatenate([part.genomes for part in parts]),
            np.concatenate([part.fidelity for part in parts]),
        )

    def propose(self, draws: Draws) -> Genomes:
        """New trials of the study; one that is drawn again has failed."""
        genomes = np.empty((len(draws), len(self._distributions)), dtype=np.int64)
        for row, number in enumerate(draws.index.tolist()):
            if (repeated := self._trials.pop(number, None)) is not None:
                self.study.tell(repeated, state=TrialState.FAIL)
            trial = self._trials[number] = self.study.ask(self._distributions)
            genomes[row] = [trial.params[gene] for gene in self._distributions]
        return genomes

    def learn(self, outcomes: Outcomes) -> None:
        values = self._values(outcomes)
        known = outcomes.scored & np.isfinite(values).all(axis=1)
        ruled_out = (outcomes.status == SCREENED) & (outcomes.violation > 0) & self._constrained
        for row in range(len(outcomes)):
            trial = self._trials.pop(int(outcomes.index[row]), None) if outcomes.source[row] == ASKED else None
            if not known[row] and not ruled_out[row]:
                if trial is not None:
                    self.study.tell(trial, state=TrialState.FAIL)
                continue
            if known[row]:
                self._worst = self._sign * np.fmax(self._sign * self._worst, self._sign * values[row])
            value = np.where(np.isfinite(values[row]), values[row], np.nan_to_num(self._worst)).tolist()
            excess = float(np.log1p(min(outcomes.violation[row], 1e9)))
            self._finish(trial, outcomes.genomes[row], value, {"budget": excess} if self._constrained else {})

    def _finish(
        self, trial: optuna.Trial | None, genome: Genomes, values: list[float], constraints: dict[str, float]
    ) -> None:
        if trial is None:  # not asked for here: enqueued, or from an earlier search
            params = dict(zip(self._distributions, genome.tolist(), strict=True))
            self.study.add_trial(
                create_trial(
                    values=values, params=params, distributions=dict(self._distributions), constraints=constraints
                )
            )
            return
        for name, excess in constraints.items():
            trial.set_constraint(name, excess)
        self.study.tell(trial, values)

    def _values(self, outcomes: Outcomes) -> Array:
        """The objectives of every outcome, ``[n, objectives]``; NaN where unknown."""
        known = {REWARD: outcomes.reward, QUALITY: outcomes.quality}
        columns = [
            known[name] if name in known else outcomes.costs[:, column]
            for name, column in zip(self.objectives, self._columns, strict=True)
        ]
        return np.stack(columns, axis=1).astype(np.float64)


def _columns(objectives: tuple[str, ...], domain: Domain) -> list[int]:
    """Column of each objective among the costs; −1 for quality and reward."""
    costs = domain.objective.costs if domain.objective is not None else ()
    offered = [REWARD, QUALITY, *costs]
    unknown = [name for name in objectives if name not in offered]
    if unknown or not objectives or len(set(objectives)) != len(objectives):
        raise ExperimentError(
            f"strategy.objectives is {list(objectives)}.", expected=f"one or several of {', '.join(offered)}, once each"
        )
    return [costs.index(name) if name in costs else -1 for name in objectives]


def _rules_out(domain: Domain, seed: int) -> bool:
    """Whether the budgets rule out anything of a random sample; taken to be so where nothing is known of them."""
    if domain.objective is None:
        return True
    genomes = Draws(seed, np.arange(SAMPLE)).integers(domain.cardinalities)
    return bool((domain.objective.violation(domain.objective.price(genomes)) > 0).any())


def _distribution(size: int, ordered: bool) -> BaseDistribution:
    return IntDistribution(0, size - 1) if ordered else CategoricalDistribution(range(size))
