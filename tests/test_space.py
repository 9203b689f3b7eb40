"""Choices, candidates, genomes; what sites read decides dormancy, identity and price."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from helpers import IMAGES, TinySpace, tiny_estimator
from torch import nn

from nas import content
from nas.errors import SpaceError
from nas.parts import Conv, GlobalAveragePool, Part
from nas.space import MAX_TABLE_ENTRIES, Candidate, Choice, SearchSpace, Site, Training
from nas.tabular import PublishedSpace
from nas.testing import check_space


class Described(SearchSpace):
    """Only the cost projection, from whatever sites a test brings."""

    name = "described"

    def __init__(self, choices: tuple[Choice, ...], sites: dict[str, Site], reads: tuple[str, ...] = ()) -> None:
        self.choices, self.sites, self._reads_in_training = choices, sites, reads

    def build(self, candidate: Candidate) -> nn.Module:
        raise NotImplementedError

    def training(self, candidate: Candidate) -> Training:
        for name in self._reads_in_training:
            candidate[name]
        return Training()


def part(channels: int) -> Part:
    return Part((Conv(channels, 1),), (8, 4, 4))


# ---- bundled spaces ----------------------------------------------------------------------------------

BUNDLED = [
    name for name in sorted(content.available("search_spaces"))
    if not issubclass(content.load_space_class(name), PublishedSpace)
]  # fmt: skip


@pytest.fixture(scope="module")
def bundled() -> dict[str, SearchSpace]:
    return {name: content.load_space(name, IMAGES, {}) for name in BUNDLED}


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_space(name: str, bundled: dict[str, SearchSpace]) -> None:
    check_space(bundled[name], candidates=60, export=False)
    check_space(bundled[name], candidates=6, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_space_100_exports(name: str, bundled: dict[str, SearchSpace]) -> None:
    check_space(bundled[name], candidates=100, seed=2)


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_space_prices_1000_genomes_as_the_slow_sum(name: str, bundled: dict[str, SearchSpace]) -> None:
    estimator = tiny_estimator(bundled[name], 3)
    genomes = bundled[name].sample(np.random.default_rng(3), 1000)
    slow = [estimator.price_slowly(bundled[name].decode(genome)) for genome in genomes]
    np.testing.assert_allclose(estimator.price(genomes), slow, rtol=1e-12)


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_space_pickles(name: str, bundled: dict[str, SearchSpace]) -> None:
    space = bundled[name]
    twin = pickle.loads(pickle.dumps(space))
    assert twin.choices == space.choices
    genome = space.sample(np.random.default_rng(0), 1)[0]
    assert twin.parts(twin.decode(genome)) == space.parts(space.decode(genome))


# ---- choices -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "ordered"),
    [
        ((1, 2, 3), True), ((3.0, 2.0, 1.0), True), ((1, 3, 2), False), (("a", "b"), False), ((False, True), False),
        ((1, "a"), False), ((7,), True),
    ],
)  # fmt: skip
def test_numbers_in_order_are_ordered(values: tuple[Any, ...], ordered: bool) -> None:
    choice = Choice("c", values)
    assert choice.ordered is ordered
    assert Choice("c", values, ordered=not ordered).ordered is not ordered
    assert [choice.index(value) for value in values] == list(range(len(values)))


def test_choice_errors() -> None:
    with pytest.raises(SpaceError, match="'c' has no values"):
        Choice("c", ())
    with pytest.raises(SpaceError, match="'c' repeats a value"):
        Choice("c", (1, 2, 1))
    with pytest.raises(SpaceError, match=r"5 is no value of choice 'c'[^$]*\[1, 2\]"):
        Choice("c", (1, 2)).index(5)


# ---- candidates --------------------------------------------------------------------------------------


def test_candidate_records_reads_in_order() -> None:
    candidate = Candidate({"a": 1, "b": 2, "c": 3})
    assert candidate.as_dict() == {"a": 1, "b": 2, "c": 3}
    assert list(candidate.reads) == []
    assert (candidate["c"], candidate["a"], candidate["c"]) == (3, 1, 3)
    assert list(candidate.reads) == ["c", "a"]
    with pytest.raises(SpaceError, match=r"no choice 'd'[^$]*\['a', 'b', 'c'\]"):
        candidate["d"]


def test_candidate_replace_leaves_the_original() -> None:
    candidate = Candidate({"stage1.depth": 1, "width": 8})
    other = candidate.replace(stage1__depth=2)
    assert other.as_dict() == {"stage1.depth": 2, "width": 8}
    assert candidate.as_dict() == {"stage1.depth": 1, "width": 8}


# ---- genomes -----------------------------------------------------------------------------------------


def test_decode_and_encode() -> None:
    space = TinySpace()
    genome = np.array([1, 0, 1, 0, 1, 0, 1, 0])
    candidate = space.decode(genome)
    assert candidate.as_dict() == {
        "depth": 2, "width": 8, "kernel": 5, "bits": 32, "prune": 0.5, "fixed": "only", "kd_weight": 0.5,
        "temperature": 2.0,
    }  # fmt: skip
    assert space.encode(candidate).tolist() == genome.tolist()
    assert space.encode(candidate.as_dict()).tolist() == genome.tolist()
    assert not candidate.reads
    assert space.size == 128


@pytest.mark.parametrize(
    ("genome", "message"),
    [
        ([0] * 7, r"shape \(7,\)[^$]*8 genes"),
        ([[0] * 8], r"shape \(1, 8\)"),
        ([0, 2, 0, 0, 0, 0, 0, 0], r"'width' is 2[^$]*0\.\.1"),
        ([0, 0, 0, 0, 0, -1, 0, 0], "'fixed' is -1"),
    ],
)
def test_decode_refuses(genome: Any, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        TinySpace().decode(genome)


def test_encode_refuses() -> None:
    space = TinySpace()
    good = space.decode([0] * 8).as_dict()
    with pytest.raises(SpaceError, match=r"unknown \['depht'\], missing \['depth'\]"):
        space.encode({"depht" if key == "depth" else key: value for key, value in good.items()})
    with pytest.raises(SpaceError, match="3 is no value of choice 'depth'"):
        space.encode({**good, "depth": 3})


def test_samples_are_uniform_and_repeatable() -> None:
    space = TinySpace()
    genomes = space.sample(np.random.default_rng(0), 4000)
    assert genomes.shape == (4000, 8)
    np.testing.assert_array_equal(genomes, space.sample(np.random.default_rng(0), 4000))
    share = genomes.mean(axis=0)
    assert share[5] == 0
    np.testing.assert_allclose(np.delete(share, 5), 0.5, atol=0.04)


# ---- reads, dormancy, identity -----------------------------------------------------------------------


def test_dormant_genes_follow_the_reads() -> None:
    space = TinySpace()
    names = [choice.name for choice in space.choices]
    shallow, deep = space.active(np.array([[0] * 8, [1, 1, 1, 1, 1, 0, 1, 1]]))
    assert [n for n, on in zip(names, shallow, strict=True) if on] == ["depth", "width", "bits", "prune", "kd_weight"]
    assert [n for n, on in zip(names, deep, strict=True) if not on] == ["fixed"]


def test_canonical_ids_group_exactly_by_active_genes() -> None:
    space = TinySpace()
    grid = np.stack(np.meshgrid(*[np.arange(c) for c in space.cardinalities], indexing="ij"), -1).reshape(-1, 8)
    groups: dict[str, set[tuple[Any, ...]]] = {}
    for genome in grid:
        c = space.decode(genome).as_dict()
        if c["depth"] == 1:
            c.pop("kernel")
        if c["kd_weight"] == 0:
            c.pop("temperature")
        groups.setdefault(space.canonical_id(genome), set()).add(tuple(c.items()))
    # depth 1: width·bits·prune, depth 2: ·kernel; and 1 + 2 ways of distilling
    assert len(groups) == (8 + 16) * 3
    assert all(len(members) == 1 for members in groups.values())


def test_genes_read_by_the_training_alone_are_active() -> None:
    choices = (Choice("a", (1, 2)), Choice("b", (1, 2)), Choice("c", (1, 2)))
    space = Described(choices, {"s": lambda c: part(int(c["a"]) * 8)}, reads=("c",))
    assert space.active(np.zeros((1, 3), dtype=np.int64)).tolist() == [[True, False, True]]


def test_a_site_is_enumerated_over_the_genes_it_reads() -> None:
    choices = (Choice("a", (1, 2, 3)), Choice("b", (1, 2)), Choice("c", (8, 16)), Choice("d", (0, 1)))

    def site(c: Candidate) -> Part | None:
        return part(int(c["c"])) if c["a"] == 2 else None

    space = Described(choices, {"site": site})
    (compiled,) = space.compiled
    assert compiled.genes.tolist() == [0, 2]
    assert len(compiled.parts) == 6
    genomes = space.sample(np.random.default_rng(0), 50)
    for genome, entry in zip(genomes, compiled.entries(genomes), strict=True):
        assert list(compiled.parts[entry]) == space.parts(space.decode(genome))
        # The gene ``c`` was looked at only where ``a`` is 2.
        assert compiled.reads[entry].tolist() == [True, genome[0] == 1]


def test_sites_may_give_nothing_one_or_many() -> None:
    head = Part((GlobalAveragePool(), Conv(10, 1)), (8, 4, 4))
    space = Described(
        (Choice("a", (1, 2)),),
        {
            "none": lambda c: None,
            "one": lambda c: part(8),
            "many": lambda c: [part(8)] * int(c["a"]),
            "last": lambda c: head,
        },
    )
    assert space.parts(space.decode([1])) == [part(8), part(8), part(8), head]
    assert set(space.keys()) == {part(8).key, head.key}
    assert [len(site.genes) for site in space.compiled] == [0, 0, 1, 0]


def test_a_site_that_reads_what_is_no_choice() -> None:
    space = Described((Choice("a", (1, 2)),), {"first": lambda c: part(int(c["b"]))})
    with pytest.raises(SpaceError, match=r"Site 'first' reads 'b'[^$]*one of \['a'\]"):
        _ = space.compiled


def test_a_site_that_reads_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_TABLE_ENTRIES >= 1_000_000
    monkeypatch.setattr("nas.space.MAX_TABLE_ENTRIES", 100)
    choices = tuple(Choice(f"g{i}", (0, 1)) for i in range(7))
    space = Described(choices, {"wide": lambda c: part(8 + sum(int(c[f"g{i}"]) for i in range(7)))})
    with pytest.raises(SpaceError, match="'wide' reads 7 choices, 128 combinations"):
        _ = space.compiled


def test_spaces_without_a_ladder_say_so() -> None:
    space = Described((Choice("a", (1,)),), {})
    for offer in (space.ladder, space.uniform):
        with pytest.raises(SpaceError, match="offers no ladder"):
            offer()
