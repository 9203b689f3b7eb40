"""Optuna's samplers and pruners, made of what a sweep says, and tried before anything runs."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner, NopPruner
from optuna.samplers import BaseSampler

from nas.errors import ContentError, ExperimentError, NasError
from nas.registry import import_object
from nas.settings import construct, keys_of
from nas.sweep.parameter import Parameter, combinations
from nas.sweep.spec import Sweep

# These draw one sequence from their seed and count along it in the record; the others draw anew from each seed.
_ONE_SEQUENCE = ("GridSampler", "QMCSampler")


def distribution(parameter: Parameter) -> BaseDistribution:
    """What Optuna draws a parameter from; the values of a list stand in it as text."""
    p = parameter
    if p.values:
        return CategoricalDistribution(p.labels)
    if p.whole:
        return IntDistribution(int(p.low), int(p.high), log=p.log, step=int(p.step or 1))
    return FloatDistribution(p.low, p.high, log=p.log, step=p.step)


def make_sampler(sweep: Sweep, parameters: Sequence[Parameter], number: int) -> BaseSampler:
    """The sampler for draw ``number``: made anew for each, so that a resumed sweep goes on as it would have.

    Raises:
        ExperimentError: it is unknown, or a setting of it is wrong.
    """
    kind = _class(sweep.sampler, "sampler", optuna.samplers, BaseSampler)
    names, settings = keys_of(kind, 0), dict(sweep.sampler_settings)
    if "seed" in names:
        spawned = (sweep.seed,) if sweep.sampler in _ONE_SEQUENCE else (sweep.seed, number)
        settings.setdefault("seed", int(np.random.SeedSequence(spawned).generate_state(1)[0]))
    if "search_space" in names:
        settings.setdefault("search_space", _grid(sweep, parameters))
    with quiet():
        sampler: BaseSampler = construct(kind, settings, where="sampler_settings")
    return sampler


def make_pruner(sweep: Sweep) -> BasePruner:
    """The pruner, or one that prunes nothing.

    Raises:
        ExperimentError: it is unknown, or a setting of it is wrong.
    """
    if sweep.pruner is None:
        if sweep.pruner_settings:
            raise ExperimentError("There are pruner_settings, but no pruner.", remedy="pruner: MedianPruner")
        return NopPruner()
    kind = _class(sweep.pruner, "pruner", optuna.pruners, BasePruner)
    try:
        with quiet():
            pruner: BasePruner = construct(kind, sweep.pruner_settings, where="pruner_settings")
    except (ValueError, TypeError) as error:
        raise ExperimentError(f"Pruner {sweep.pruner!r} refuses its settings: {error}") from error
    return pruner


def _class(name: str, what: str, offered: Any, base: type) -> Any:
    found = import_object(name, what) if ":" in name else getattr(offered, name, None)
    if not (isinstance(found, type) and issubclass(found, base)):
        names = [n for n in offered.__all__ if n.endswith(what.capitalize()) and not n.startswith(("Base", "Partial"))]
        raise ExperimentError(
            f"Unknown {what} {name!r}.", expected=f"one of Optuna's: {', '.join(names)}, or 'module:Name'"
        )
    return found


def _grid(sweep: Sweep, parameters: Sequence[Parameter]) -> dict[str, list[Any]]:
    for p in parameters:
        if p.options is None:
            raise ExperimentError(
                f"Sampler {sweep.sampler!r} needs finite choices, and vary.{p.key} is a continuous range.",
                remedy=f"a list of values, or a step, for {p.key}",
            )
    return {p.key: list(p.options or ()) for p in parameters}


def check_sampler(sweep: Sweep, parameters: Sequence[Parameter]) -> None:
    """Draw a few times in memory, so that what a sampler cannot do is said before anything runs.

    Raises:
        ExperimentError: the sampler is unknown, lacks a package, or does not suit what is varied.
    """
    study = optuna.create_study(direction=sweep.goal)
    distributions = {p.key: distribution(p) for p in parameters}
    for number in range(int(min(3, combinations(parameters)))):
        study.sampler = make_sampler(sweep, parameters, number)
        try:
            with quiet():
                trial = study.ask(distributions)
                with contextlib.suppress(RuntimeError, KeyError):  # the end of a small grid, see Ledger._end
                    study.tell(trial, float(number))
        except (NasError, KeyboardInterrupt):
            raise
        except ImportError as error:
            raise ContentError(f"Sampler {sweep.sampler!r} needs a package: {error}", remedy="install it") from error
        except Exception as error:
            raise ExperimentError(
                f"Sampler {sweep.sampler!r} cannot draw what is varied: {error}",
                remedy="another sampler, or other sampler_settings",
            ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Samplers and pruners warn of what is experimental in them; that is for those who chose them to know."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
