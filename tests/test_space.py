"""Choices, candidates, genomes; what sites read decides dormancy, identity and price."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from helpers import IMAGES, TinySpace, tiny_estimator
from torch import nn

from nas import content
from nas.derived.traced import TracedSpace
from nas.errors import SpaceError
from nas.parts import Conv, GlobalAveragePool, Part
from nas.space import Candidate, Choice, Genomes, SearchSpace, Site, Training, Treatment
from nas.tabular import PublishedSpace
from nas.testing import check_space


class Described(SearchSpace):
    """Only what a candidate costs and how it is taught, from whatever a test brings."""

    name = "described"

    def __init__(
        self, choices: tuple[Choice, ...], sites: dict[str, Site], treatments: dict[str, Treatment] | None = None
    ) -> None:
        self.choices, self.sites, self.treatments = choices, sites, treatments or {}

    def build(self, candidate: Candidate) -> nn.Module:
        raise NotImplementedError


def part(channels: int) -> Part:
    return Part((Conv(channels, 1),), (8, 4, 4))


# ---- bundled spaces ----------------------------------------------------------------------------------

BUNDLED = [
    name for name in sorted(content.available("search_spaces"))
    if not issubclass(content.load_space_class(name), PublishedSpace | TracedSpace)  # spaces of models are tested apart
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


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_spaces_say_what_is_not_compressed(name: str, bundled: dict[str, SearchSpace]) -> None:
    """Every choice of bits and pruning has a plain value, no other has; the ladder is plain throughout."""
    plain = {choice.name: choice.plain for choice in bundled[name].choices if choice.plain is not None}
    bits_and_pruning = {c.name for c in bundled[name].choices if c.name.endswith((".bits", ".prune"))}
    assert set(plain) == bits_and_pruning
    for member in bundled[name].ladder():
        assert {gene: member[gene] for gene in plain} == plain
    options = {"bits": [8], "prune": [0.5]}
    assert all(choice.plain is None for choice in content.load_space(name, IMAGES, options).choices)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet", {"stem": [12, 1]}, "Widths \\[12\\] are no multiples of 8"),
        ("resnet", {"stem": [16, 1, 4]}, "an odd kernel"),
        ("resnet", {"strides": [1]}, "3 widths, 3 depths, 1 strides"),
        ("resnet", {"bits": [4]}, "Bits \\[4\\]"),
        ("vit", {"resolutions": [9]}, "Resolution 9 is no multiple of patch 2"),
        ("vit", {"depths": [[0, 1]]}, "one layer in each"),
        ("vit", {"head_dim": 12}, "Widths \\[12\\] are no multiples of 8"),
        ("vit", {"bits": [16]}, "Bits \\[16\\]"),
    ],
)
def test_impossible_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        content.load_space(name, IMAGES, options)


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


def test_canonical_ids_of_a_matrix_are_those_of_its_rows() -> None:
    space = TinySpace()
    genomes = space.sample(np.random.default_rng(0), 50)
    assert space.canonical_ids(genomes) == [space.canonical_id(genome) for genome in genomes]
    assert space.canonical_ids(genomes[:0]) == []


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_space_is_active_where_it_is_read(name: str, bundled: dict[str, SearchSpace]) -> None:
    space = bundled[name]
    genomes = space.sample(np.random.default_rng(4), 300)
    np.testing.assert_array_equal(space.active(genomes), [watched(space, genome) for genome in genomes])


def watched(space: SearchSpace, genome: Genomes) -> list[bool]:
    """The definition of being active: read when the parts and the training are made."""
    candidate = space.decode(genome)
    space.parts(candidate)
    space.training(candidate)
    return [choice.name in candidate.reads for choice in space.choices]


CHOICES = (Choice("a", (1, 2)), Choice("b", (1, 2)), Choice("c", (1, 2)))
SITES: dict[str, Site] = {"s": lambda c: part(int(c["a"]) * 8)}


class OwnTraining(Described):
    def training(self, candidate: Candidate) -> Training:
        return Training(float(candidate["c"]) / 10 if candidate["a"] == 2 else 0.0)


def test_genes_read_by_treatments_alone_are_active() -> None:
    space = Described(CHOICES, SITES, {"t": lambda c: Training(0.5, c["c"]) if c["a"] == 2 else None})
    assert space.active(np.array([[0, 0, 0], [1, 0, 0]])).tolist() == [[True, False, False], [True, False, True]]


def test_genes_read_by_a_training_of_the_space_s_own_are_active() -> None:
    treatments: dict[str, Treatment] = {"unused": lambda c: Training(float(c["b"]))}
    space = OwnTraining(CHOICES, SITES, treatments)
    assert space.active(np.array([[0, 0, 0], [1, 0, 0]])).tolist() == [[True, False, False], [True, False, True]]


@pytest.mark.parametrize("space", [Described(CHOICES, SITES), OwnTraining(CHOICES, SITES)])
def test_dormancy_of_what_is_no_genome(space: SearchSpace) -> None:
    for genome, message in (([0, 2, 0], r"'b' is 2[^$]*0\.\.1"), ([0, 0, -1], "'c' is -1")):
        with pytest.raises(SpaceError, match=message):
            space.active(np.array([[0, 0, 0], genome]))


# ---- treatments --------------------------------------------------------------------------------------


def test_treatments_are_merged_in_their_order() -> None:
    space = Described(
        CHOICES,
        {},
        {
            "weight": lambda c: Training(kd_weight=c["a"] / 2),
            "prune": lambda c: Training(compression={"prune": {"y": c["b"]}}),
            "nothing": lambda c: None,
            "bits": lambda c: Training(compression={"quantize": {"y": 8}, "prune": {"x": 1, "y": c["b"]}}),
            "temperature": lambda c: Training(temperature=4.0),
        },
    )
    training = space.training(space.decode([0, 1, 0]))
    assert training == Training(0.5, 4.0, {"prune": {"y": 2, "x": 1}, "quantize": {"y": 8}})
    assert [(name, list(settings)) for name, settings in training.compression.items()] == [
        ("prune", ["y", "x"]), ("quantize", ["y"]),
    ]  # fmt: skip
    assert Described(CHOICES, {}).training(space.decode([0, 0, 0])) == Training()


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (Training(0.5), Training(0.9), "'second' sets kd_weight to 0.9, an earlier one to 0.5"),
        (
            Training(compression={"quantize": {"head": 8}}),
            Training(compression={"quantize": {"head": 4}}),
            "'second' sets head to 4, an earlier one to 8",
        ),
    ],
)
def test_treatments_that_disagree(first: Training, second: Training, message: str) -> None:
    space = Described(CHOICES, {}, {"first": lambda c: first, "second": lambda c: second})
    with pytest.raises(SpaceError, match=message):
        space.training(space.decode([0, 0, 0]))


def test_the_treatments_of_mobilenet(bundled: dict[str, SearchSpace]) -> None:
    """Pruned first, block by block; then the blocks' bits, the stem's and the head's."""
    space = bundled["mobilenet"]
    sizes = {"resolution": 16, "kd_weight": 0.9, "temperature": 4.0}
    for s, (depth, width) in enumerate([(2, 16), (1, 24), (1, 64)]):
        sizes |= {f"stage{s}.depth": depth, f"stage{s}.width": width, f"stage{s}.kernel": 3, f"stage{s}.expand": 2}
        sizes |= {f"stage{s}.prune": 0.5 if s < 2 else 0.0, f"stage{s}.bits": 32 if s == 1 else 8}
    training = space.training(Candidate(sizes))
    assert (training.kd_weight, training.temperature) == (0.9, 4.0)
    assert [(name, list(settings.items())) for name, settings in training.compression.items()] == [
        (
            "channel_prune",
            [("stages.0.0.expand.conv", 16), ("stages.0.1.expand.conv", 16), ("stages.1.0.expand.conv", 16)],
        ),
        (
            "quantize",
            [
                *((f"stages.0.{d}.{conv}.conv", 8) for d in (0, 1) for conv in ("expand", "depthwise", "project")),
                *((f"stages.2.0.{conv}.conv", 8) for conv in ("expand", "depthwise", "project")),
                ("stem.conv", 8), ("head", 8),
            ],
        ),
    ]  # fmt: skip
    plain = space.training(Candidate({**sizes, "kd_weight": 0.0, **{f"stage{s}.bits": 32 for s in range(3)}}))
    assert (plain.kd_weight, plain.temperature, list(plain.compression)) == (0.0, 1.0, ["channel_prune"])


# ---- sites -------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("what", ["site", "treatment"])
def test_a_function_that_reads_what_is_no_choice_is_named(what: str) -> None:
    wrong = {"first": lambda c: c["x"]}
    space = Described(CHOICES, wrong) if what == "site" else Described(CHOICES, {}, wrong)
    with pytest.raises(SpaceError, match=f"{what.title()} 'first' of space 'described' reads 'x'"):
        space.active(np.zeros((1, 3), dtype=np.int64))


def test_spaces_without_a_ladder_say_so() -> None:
    space = Described((Choice("a", (1,)),), {})
    for offer in (space.ladder, space.uniform):
        with pytest.raises(SpaceError, match="offers no ladder"):
            offer()
