"""A space with some choices fixed: a space like any other, whose members are whole candidates of the first."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from helpers import IMAGES, TinySpace

from nas.content import load_space
from nas.errors import SpaceError
from nas.frozen import Frozen
from nas.latency import AdditiveEstimator
from nas.masks import find_masks
from nas.space import Candidate, SearchSpace
from nas.testing import check_space, synthetic_table

OPTIONS = {
    "resolutions": [8], "stem": [8, 1], "widths": [[8, 16], [16, 24]], "depths": [[1, 2], [1, 2]], "strides": [1, 2],
    "kernels": [3], "expansions": [2, 4],
}  # fmt: skip
BITS = {"stage0.bits": 8, "stage1.bits": 32, "stage0.prune": 0.5, "stage1.prune": 0.0}


@pytest.fixture
def whole() -> SearchSpace:
    return load_space("mobilenet", IMAGES, OPTIONS)


def test_a_view_with_treatments_keeps_the_contract_of_a_space(whole: SearchSpace) -> None:
    check_space(Frozen(whole, BITS), candidates=3, info=IMAGES)
    check_space(Frozen(whole, {"stage0.depth": 2, "stage1.width": 16}), candidates=40, export=False)


def test_a_view_of_a_space_with_a_training_of_its_own_keeps_it_too() -> None:
    check_space(Frozen(TinySpace(), {"bits": 8, "depth": 2}), candidates=3, info=IMAGES)
    check_space(Frozen(TinySpace(), {"depth": 1, "kd_weight": 0.0}), candidates=30, export=False)


def test_a_view_of_a_view_is_one(whole: SearchSpace) -> None:
    twice = Frozen(Frozen(whole, {"stage0.bits": 8}), {"stage1.depth": 2})
    once = Frozen(whole, {"stage0.bits": 8, "stage1.depth": 2})
    assert twice.choices == once.choices
    genomes = once.sample(np.random.default_rng(0), 20)
    assert twice.canonical_ids(genomes) == once.canonical_ids(genomes)


def test_genomes_become_whole_ones_and_back(whole: SearchSpace) -> None:
    view = Frozen(whole, BITS)
    genomes = view.sample(np.random.default_rng(0), 50)
    wide = view.widen(genomes)
    assert np.array_equal(view.narrow(wide), genomes)
    assert np.array_equal(view.widen(genomes[0]), wide[0])
    for row in wide[:5]:
        candidate = whole.decode(row).as_dict()
        assert {name: candidate[name] for name in BITS} == BITS
    assert len(view.choices) == len(whole.choices) - len(BITS)


def test_identity_price_and_training_are_those_of_the_whole_candidate(whole: SearchSpace) -> None:
    view, table = Frozen(whole, BITS), synthetic_table(whole)
    genomes = view.sample(np.random.default_rng(1), 200)
    wide = view.widen(genomes)
    assert view.canonical_ids(genomes) == whole.canonical_ids(wide)
    assert np.array_equal(view.active(genomes), whole.active(wide)[:, view.free])
    assert np.allclose(AdditiveEstimator(view, table).price(genomes), AdditiveEstimator(whole, table).price(wide))
    for narrow, row in zip(genomes[:5], wide[:5], strict=True):
        assert view.training(view.decode(narrow)) == whole.training(whole.decode(row))
    assert set(view.keys()) < set(whole.keys())


def test_masks_of_a_view_touch_nothing_that_is_fixed(whole: SearchSpace) -> None:
    view = Frozen(whole, {"stage0.bits": 8, "stage0.prune": 0.5})
    estimator = AdditiveEstimator(view, synthetic_table(whole))
    masks = find_masks(view, estimator, ["latency_ms"])
    genomes = view.sample(np.random.default_rng(2), 100)
    repaired = view.widen(masks.repair(genomes))
    for name, value in view.fixed.items():
        column = whole.position[name]
        assert (repaired[:, column] == whole.choices[column].index(value)).all()
    assert (estimator.price(masks.repair(genomes))[:, 0] <= estimator.price(genomes)[:, 0] + 1e-12).all()


def test_members_get_the_fixed_values(whole: SearchSpace) -> None:
    view = Frozen(whole, BITS)
    for members in (view.ladder(), view.uniform()):
        assert members
        assert all(set(member) == {choice.name for choice in view.choices} for member in members)
        assert len({tuple(view.encode(member)) for member in members}) == len(members)


def test_a_whole_candidate_can_be_read_and_changed(whole: SearchSpace) -> None:
    view = Frozen(whole, BITS)
    free = view.decode(view.sample(np.random.default_rng(3), 1)[0])
    complete = view.complete(free)
    assert isinstance(complete, Candidate)
    assert set(complete) == {choice.name for choice in whole.choices}
    assert len(complete) == len(whole.choices)
    assert "stage0.bits" in complete
    assert "nothing" not in complete
    assert complete.replace(stage0__bits=32)["stage0.bits"] == 32
    assert np.array_equal(whole.encode(complete), view.widen(view.encode(free)))
    assert complete["stage0.width"] == free["stage0.width"]
    assert list(free.reads) == ["stage0.width"], "what is read of the whole counts as read of the view"


def test_a_view_travels_to_other_processes(whole: SearchSpace) -> None:
    view = Frozen(whole, BITS)
    again = pickle.loads(pickle.dumps(view))
    genomes = view.sample(np.random.default_rng(4), 10)
    assert again.choices == view.choices
    assert again.canonical_ids(genomes) == view.canonical_ids(genomes)


@pytest.mark.parametrize(
    ("fixed", "message"),
    [
        ({"stage9.bits": 8}, "no choice 'stage9.bits'"),
        ({"stage0.bits": 4}, "4 is no value of choice 'stage0.bits'"),
    ],
)
def test_unknown_choices_and_values_are_refused(whole: SearchSpace, fixed: dict[str, int], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        Frozen(whole, fixed)


def test_something_must_be_left_to_choose(whole: SearchSpace) -> None:
    everything = whole.decode(whole.sample(np.random.default_rng(0), 1)[0]).as_dict()
    with pytest.raises(SpaceError, match="is fixed"):
        Frozen(whole, everything)
