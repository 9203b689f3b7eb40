"""Searches by other people's packages, unmodified and driven by their own loops: Optuna's samplers, NNI's evolution."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from nas.errors import ContentError, ExtraError

Ints = npt.NDArray[np.int64]
Score = Callable[[Ints], float]
Search = Callable[[Ints, Score, int, int], None]


def find(name: str) -> Search | None:
    """The search ``(cardinalities, score, asks, seed)`` of a peer: it maximises ``score(genome)`` in at most ``asks``
    calls, and lets what ``score`` raises pass. None where the name is no peer's."""
    package, _, rest = name.partition(":")
    if package == "optuna":
        return lambda sizes, score, asks, seed: optuna_search(rest, sizes, score, asks, seed)
    if package == "nni":
        if rest != "evolution":
            raise ContentError(f"Unknown peer {name!r}.", expected="nni:evolution")
        return nni_evolution
    return None


def check(name: str) -> bool:
    """Whether ``name``, with or without ``screened:``, is a peer's.

    Raises:
        ExtraError: its package is missing.
        ContentError: the package has no such sampler, or the peer is written plain:NAME.
    """
    bare = name.removeprefix("screened:")
    package, _, rest = bare.partition(":")
    if package == "plain" and rest.partition(":")[0] in ("optuna", "nni"):
        raise ContentError(f"Unknown strategy {name!r}.", expected=f"{rest} (as it comes) or screened:{rest}")
    if find(bare) is None:
        return False
    if package == "optuna":
        _sampler(rest, 0)
    else:
        _nni()
    return True


# ---- Optuna -----------------------------------------------------------------------------------------


def optuna_search(sampler: str, sizes: Ints, score: Score, asks: int, seed: int) -> None:
    """``study.optimize`` with one categorical parameter per choice and the sampler's own defaults."""
    optuna = _optuna()

    def objective(trial: Any) -> float:
        genome = [trial.suggest_categorical(f"x{i}", list(range(size))) for i, size in enumerate(sizes.tolist())]
        return score(np.array(genome, dtype=np.int64))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study = optuna.create_study(direction="maximize", sampler=_sampler(sampler, seed))
        study.optimize(objective, n_trials=asks)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise ExtraError("The peer 'optuna:…' needs Optuna.", remedy="pip install optuna") from None
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    return optuna


def _sampler(name: str, seed: int) -> Any:
    samplers = _optuna().samplers
    if not name.endswith("Sampler") or not hasattr(samplers, name):
        known = ", ".join(item for item in dir(samplers) if item.endswith("Sampler") and item != "BaseSampler")
        raise ContentError(f"Optuna has no sampler {name!r}.", expected=f"optuna: and one of {known}")
    make = getattr(samplers, name)
    needed = [p.name for p in inspect.signature(make).parameters.values() if p.default is p.empty]
    if needed:
        raise ContentError(f"Optuna's {name} does not come with defaults: it needs {', '.join(needed)}.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some samplers are marked experimental
        return make(seed=seed)


# ---- NNI --------------------------------------------------------------------------------------------


def nni_evolution(sizes: Ints, score: Score, asks: int, seed: int) -> None:
    """``RegularizedEvolution`` with its defaults, run by NNI's sequential engine; one ``Categorical`` per choice."""
    nni = _nni()
    engine = nni.nas.execution.SequentialExecutionEngine(max_model_count=asks)

    def evaluate(model: dict[str, int]) -> None:
        genome = [model[f"x{i}"] for i in range(len(sizes))]
        nni.report_final_result(score(np.array(genome, dtype=np.int64)))

    class Genes(nni.mutable.MutableDict):  # type: ignore[name-defined]
        """Freezes to a dict that NNI can hold a weak reference to."""

        def freeze(self, sample: Any) -> Any:
            return _Frozen(super().freeze(sample))

    sizes_of = {f"x{i}": size for i, size in enumerate(sizes.tolist())}
    choices = {name: nni.mutable.Categorical(list(range(size)), label=name) for name, size in sizes_of.items()}
    space = nni.nas.space.RawFormatModelSpace(Genes(choices), nni.nas.evaluator.FunctionalEvaluator(evaluate))
    nni.nas.strategy.RegularizedEvolution(seed=seed)(space, engine)


class _Frozen(dict[str, int]):
    """A dict that may be referred to weakly."""


def _nni() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import nni

            nni.set_default_framework("none")  # no networks here, so no training framework
            import nni.mutable
            import nni.nas.evaluator
            import nni.nas.execution
            import nni.nas.space
            import nni.nas.strategy
    except ImportError as error:
        raise ExtraError(f"The peer 'nni:evolution' needs NNI ({error}).", remedy="pip install nni") from None
    logging.getLogger("nni").setLevel(logging.CRITICAL + 1)
    return nni
