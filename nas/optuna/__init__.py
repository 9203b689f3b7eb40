"""Both ways between Optuna and the strategies: its samplers as strategies, the strategies as samplers.

>>> import nas.optuna
>>> sampler = nas.optuna.StrategySampler("evolution", seed=1)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["OptunaStrategy", "StrategySampler"]

if TYPE_CHECKING:
    from nas.optuna.sampler import StrategySampler
    from nas.optuna.strategy import OptunaStrategy


def __getattr__(name: str) -> Any:
    # Lazily: who needs one direction does not load the other.
    if name == "StrategySampler":
        from nas.optuna.sampler import StrategySampler

        return StrategySampler
    if name == "OptunaStrategy":
        from nas.optuna.strategy import OptunaStrategy

        return OptunaStrategy
    raise AttributeError(f"module 'nas.optuna' has no attribute {name!r}")
