"""The contract checks themselves: they pass what is right, and name what is wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest
import torch
from helpers import IMAGES, TinyModel, TinySpace
from torch import nn

from nas.compression import ChannelPrune, Loss, Pass
from nas.evaluators import Evaluation, Evaluator, Lookup
from nas.parts import Conv, Part
from nas.reward import MnasNetHard, Reward, SingleCost, WeightedProduct
from nas.space import Candidate, Genomes, Training
from nas.strategies import Domain, Draws, Outcomes, Proposals, RandomSearch, Strategy
from nas.strategies.base import SCREENED
from nas.testing import check_evaluator, check_pass, check_reward, check_space, check_strategy, synthetic_table


def test_synthetic_table_is_a_function_of_seed_and_key() -> None:
    space = TinySpace()
    a, b, c = synthetic_table(space, 1), synthetic_table(space, 1), synthetic_table(space, 2)
    assert a == b
    assert a.entries != c.entries
    assert set(a.entries) == set(space.keys())


def test_tiny_space_passes() -> None:
    check_space(TinySpace(), candidates=12)


class UnpricedKernel(TinySpace):
    def __init__(self) -> None:
        super().__init__()
        self.sites = {**self.sites, "body": self._body_without_kernel}

    def _body_without_kernel(self, c: Candidate) -> Part | None:
        if c["depth"] == 1:
            return None
        return Part((Conv(int(c["width"]), 3, activation="relu6"),), (self._kept(c), 8, 8), self._precision(c))


class WrongMacs(UnpricedKernel):
    def _body_without_kernel(self, c: Candidate) -> Part | None:
        assert c["kernel"]  # read, but not acted upon
        return super()._body_without_kernel(c)


class ForgottenBias(TinySpace):
    """The head of the model has no bias, the part has one."""

    def build(self, candidate: Candidate) -> nn.Module:
        model = super().build(candidate)
        model.head = nn.Conv2d(model.head.in_channels, 10, 1, bias=False)  # type: ignore[union-attr, arg-type]
        return model


class ReadsBehindTheBack(TinySpace):
    def training(self, candidate: Candidate) -> Training:
        return Training(
            0.0, float(candidate.as_dict().get("temperature", 2.0)), super().training(candidate).compression
        )


class FickleSite(TinySpace):
    calls = 0

    def _stem(self, c: Candidate) -> Part:
        self.calls += 1
        return Part((Conv(8 * (1 + self.calls % 2), 3),), (1, 8, 8))


class RestlessReads(TinySpace):
    """Reads another gene when it is asked a second time."""

    seen = False

    def _stem(self, c: Candidate) -> Part:
        part = super()._stem(c)
        if self.seen:
            assert c["kernel"]
        return part


class DisagreeingModel(TinyModel):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y if torch.onnx.is_in_onnx_export() else 2 * y


class Disagreeing(TinySpace):
    def build(self, candidate: Candidate) -> nn.Module:
        kernel = int(candidate["kernel"]) if candidate["depth"] == 2 else None
        return DisagreeingModel(self.task, int(candidate["width"]), kernel)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (UnpricedKernel, r"build reads \['kernel'\]"),
        (WrongMacs, "MACs"),
        (ForgottenBias, "parameters"),
        (ReadsBehindTheBack, "the training differs"),
        (Disagreeing, "ONNX and PyTorch differ"),
        (FickleSite, "is not the sum over the parts|parts differ"),
    ],
)
def test_broken_spaces_are_told_apart(space: Callable[[], TinySpace], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_space(space(), candidates=16)


def test_reads_must_be_repeatable() -> None:
    space = RestlessReads()
    assert space.compiled
    space.seen = True
    with pytest.raises(AssertionError, match="a site must be a function"):
        check_space(space, candidates=16, export=False)


def test_a_space_without_shapes_asks_for_them() -> None:
    space = TinySpace()
    del space.task
    space.sites = {}
    with pytest.raises(AssertionError, match="pass info="):
        check_space(space, candidates=0)
    check_space(space, candidates=0, info=IMAGES)


class Global(RandomSearch):
    """Draws from the global generator."""

    def propose(self, draws: Draws) -> Genomes:
        return np.random.randint(0, self.domain.cardinalities, (len(draws), len(self.domain.cardinalities)))  # noqa: NPY002


class Unseeded(RandomSearch):
    def propose(self, draws: Draws) -> Genomes:
        return Draws(0, draws.index, draws.attempt).integers(self.domain.cardinalities)


class OutOfRange(RandomSearch):
    def propose(self, draws: Draws) -> Genomes:
        return draws.integers(self.domain.cardinalities + 1)


class Shared(RandomSearch):
    """Its proposals depend on how many instances there were before."""

    made: ClassVar[list[int]] = []

    def __init__(self, domain: Domain, seed: int = 0) -> None:
        super().__init__(domain, seed)
        self.made.append(seed)
        self.seed += 10 * len(self.made)


class Misnumbered(RandomSearch):
    def ask(self, n: int = 1) -> Proposals:
        return dataclasses.replace(super().ask(n), index=np.arange(n))


class Unrepaired(RandomSearch):
    """Proposes what was drawn, whatever cannot pay on the device."""

    def ask(self, n: int = 1) -> Proposals:
        proposals = super().ask(n)
        drawn = Draws(self.seed, proposals.index).integers(self.domain.cardinalities)
        return dataclasses.replace(proposals, genomes=drawn) if self.domain.repairs else proposals


class Repetitive(RandomSearch):
    """Proposes from a handful of genomes."""

    def propose(self, draws: Draws) -> Genomes:
        return np.minimum(draws.integers(self.domain.cardinalities), np.arange(len(self.domain.cardinalities)) < 2)


class Unreleasing(RandomSearch):
    """Forgets to let go of what its costs rule out."""

    def tell(self, outcomes: Outcomes) -> None:
        super().tell(outcomes.rows(outcomes.status != SCREENED))


class Hoarding(RandomSearch):
    """Remembers everything that it was ever told."""

    def __init__(self, domain: Domain, seed: int = 0) -> None:
        super().__init__(domain, seed)
        self.seen: set[int] = set()

    def learn(self, outcomes: Outcomes) -> None:
        self.seen.update(outcomes.index.tolist())


class Greedy(RandomSearch):
    """Cannot cope with outcomes that have no reward."""

    def learn(self, outcomes: Outcomes) -> None:
        if np.isnan(outcomes.reward).any():
            raise ValueError("no reward")


class Meddling(RandomSearch):
    def learn(self, outcomes: Outcomes) -> None:
        outcomes.genomes[:] = 0


class Retaining(RandomSearch):
    """Keeps the caller's array instead of a copy, and proposes from it."""

    def __init__(self, domain: Domain, seed: int = 0) -> None:
        super().__init__(domain, seed)
        self.last: Genomes | None = None

    def propose(self, draws: Draws) -> Genomes:
        genomes = draws.integers(self.domain.cardinalities)
        return genomes if self.last is None else np.where(draws.uniform(1) < 0.5, self.last[:1], genomes)

    def learn(self, outcomes: Outcomes) -> None:
        self.last = outcomes.genomes if len(outcomes) else self.last


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (Unrepaired, "whose repair is"),
        (Global, "two instances propose"),
        (Unseeded, "two seeds"),
        (OutOfRange, "out of range"),
        (Shared, "two instances propose"),
        (Misnumbered, "numbers its proposals"),
        (Repetitive, "while it is under way"),
        (Unreleasing, "pending is"),
        (Hoarding, "memory must not grow"),
        (Meddling, "in place"),
        (Retaining, "a fresh instance with the same history"),
    ],
)
def test_broken_strategies_are_told_apart(strategy: type[Strategy], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_strategy(strategy)


def test_a_strategy_that_cannot_take_failures_fails() -> None:
    with pytest.raises(ValueError, match="no reward"):
        check_strategy(Greedy)


class Backwards(SingleCost):
    """Pays for latency, and takes anything."""

    def __call__(self, quality: npt.ArrayLike, cost: npt.ArrayLike) -> npt.NDArray[np.float64]:
        return np.asarray(quality) + 0.01 * np.asarray(cost)


class Careless(SingleCost):
    def __call__(self, quality: npt.ArrayLike, cost: npt.ArrayLike) -> npt.NDArray[np.float64]:
        return np.asarray(quality) - 0.01 * np.asarray(cost)


class Flat(MnasNetHard):
    def __call__(self, quality: npt.ArrayLike, cost: npt.ArrayLike) -> npt.NDArray[np.float64]:
        return np.round(super().__call__(quality, cost), 1)


class PaysForSize(WeightedProduct):
    """Pays for a larger file."""

    def combine(self, quality: Any, costs: Any) -> npt.NDArray[np.float64]:
        return np.asarray(super().combine(quality, costs) + 0.01 * costs[:, 1])


class ByPlace(WeightedProduct):
    """Takes the last columns, whatever their names are."""

    def score(self, quality: npt.ArrayLike, costs: npt.ArrayLike, names: Any) -> npt.NDArray[np.float64]:
        self.columns(names)
        return self.combine(np.asarray(quality), np.asarray(costs)[:, -len(self.costs) :])


TARGETS = {"latency_ms": 2.0, "size_bytes": 1000.0}
WEIGHTS = {"latency_ms": -0.07, "size_bytes": -0.03}


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (Backwards(2.0), "a higher cost pays"),
        (Careless(2.0), "RewardError"),
        (Flat(2.0), "does not pay"),
        (PaysForSize(TARGETS, WEIGHTS), "size_bytes: beyond the target, a higher cost pays"),
        (ByPlace(TARGETS, WEIGHTS), "not found by their names"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_broken_rewards_are_told_apart(reward: Reward, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_reward(reward)


class Helper(nn.Conv2d):
    """A training-time helper that restore forgets."""


class Leaves(Pass):
    def apply(self, model: nn.Module, sample: torch.Tensor, loss: Loss | None = None) -> nn.Module:
        for name in self.settings:
            conv = model.get_submodule(name)
            conv.__class__ = Helper
        return model


class Shrinks(ChannelPrune):
    def apply(self, model: nn.Module, sample: torch.Tensor, loss: Loss | None = None) -> nn.Module:
        model.head = nn.Conv2d(model.head.in_channels, 3, 1)  # type: ignore[union-attr, arg-type]
        return model


class Freezes(ChannelPrune):
    def apply(self, model: nn.Module, sample: torch.Tensor, loss: Loss | None = None) -> nn.Module:
        return super().apply(model, sample).requires_grad_(False)


class Forgives(Pass):
    def apply(self, model: nn.Module, sample: torch.Tensor, loss: Loss | None = None) -> nn.Module:
        return model


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Leaves, r"restore leaves \['Helper'\]"),
        (Shrinks, "changes the output"),
        (Freezes, "gradient"),
        (Forgives, "raises no CompressionError"),
    ],
)
def test_broken_passes_are_told_apart(broken: type[Pass], message: str) -> None:
    model = TinyModel(IMAGES, 16, 3)
    with pytest.raises((AssertionError, RuntimeError), match=message if broken is not Freezes else "gradient|grad"):
        check_pass(broken, model, {"stem.conv": 8}, torch.rand(4, 1, 8, 8))


class Noisy(Evaluator):
    def evaluate(self, genome: Genomes, fidelity: float = 1.0) -> Evaluation:
        return Evaluation(float(np.random.rand()))  # noqa: NPY002


@pytest.mark.parametrize(
    ("evaluator", "message"),
    [
        (Noisy(), "several qualities"),
        (Lookup(lambda genome: 1.0), "cannot be pickled"),
        (Lookup({}), "has no quality"),
    ],
)
def test_broken_evaluators_are_told_apart(evaluator: Evaluator, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_evaluator(evaluator, np.array([0, 1]))


def test_third_party_settings_need_no_registry() -> None:
    settings: dict[str, Any] = {"stem.conv": 8}
    check_pass(ChannelPrune, TinyModel(IMAGES, 16, 3), settings, torch.rand(4, 1, 8, 8))
