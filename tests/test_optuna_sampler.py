"""Strategies as samplers: Optuna's own contract, restarts after a real kill, several processes, spaces that change."""

from __future__ import annotations

import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.testing import pytest_samplers as contract
from optuna.trial import TrialState, create_trial

import nas.optuna
from nas.errors import ContentError, ExperimentError, SpaceError, StudyError
from nas.optuna import StrategySampler
from nas.optuna.genes import gene
from nas.optuna.sampler import NUMBER, WORKER, ObjectivesError
from nas.optuna.workers import is_alive, this_worker
from nas.strategies import Outcomes, Strategy, strategies
from nas.strategies.base import ASKED, COMPLETE, ENQUEUED, FAILED, SCREENED

ROOT = Path(__file__).resolve().parent.parent
QUICK = "evolution"
SEVERAL = [name for name in strategies if strategies.get(name).multi_objective]
ALL = [pytest.param(name, marks=[] if name == QUICK else pytest.mark.slow) for name in strategies]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


# ---- Optuna's contract for samplers -------------------------------------------------------------------


class TestContract(contract.BasicSamplerTestCase, contract.RelativeSamplerTestCase):
    @pytest.fixture(params=ALL)
    def sampler(self, request: pytest.FixtureRequest) -> Callable[[], BaseSampler]:
        return lambda: StrategySampler(request.param)


class TestSeveralObjectives(contract.MultiObjectiveSamplerTestCase):
    @pytest.fixture(params=SEVERAL)
    def sampler(self, request: pytest.FixtureRequest) -> Callable[[], BaseSampler]:
        return lambda: StrategySampler(request.param)


class TestOneObjective(contract.SingleOnlySamplerTestCase):
    @pytest.fixture(params=[name for name in strategies if name not in SEVERAL])
    def sampler(self, request: pytest.FixtureRequest) -> Callable[[], BaseSampler]:
        return lambda: StrategySampler(request.param)
