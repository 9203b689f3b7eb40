"""Choices, candidates, and what follows from the genes that a function of the candidate reads."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nas.errors import SpaceError
from nas.genes import MAX_TABLE_ENTRIES, Candidate, Choice, Dormancy, Genomes, enumerated

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
    with pytest.raises(SpaceError, match=r"'c' has the plain value 16, which is none of \[32, 8\]"):
        Choice("c", (32, 8), plain=16)


def test_a_choice_of_compression_says_what_is_plain() -> None:
    assert Choice("c", (32, 8), plain=32).plain == 32
    assert Choice("c", (0.0, 0.5), plain=0.0).plain == 0.0
    assert Choice("c", (1, 2)).plain is None
    assert Choice("c", (32, 8), plain=32) != Choice("c", (32, 8))


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


# ---- enumeration -------------------------------------------------------------------------------------

CHOICES = (Choice("a", (1, 2, 3)), Choice("b", (1, 2)), Choice("c", (8, 16)), Choice("d", (0, 1, 2)))
SIZES = np.array([len(choice.values) for choice in CHOICES])
GENOMES: Genomes = np.array(list(itertools.product(*map(range, SIZES))))


def decode(genome: Genomes) -> Candidate:
    return Candidate({c.name: c.values[i] for c, i in zip(CHOICES, genome, strict=True)})


def test_a_function_is_enumerated_over_the_genes_it_reads() -> None:
    calls = []

    def function(c: Candidate) -> int | None:
        calls.append(c)
        return int(c["c"]) if c["a"] == 2 else None

    table = enumerated("f", function, CHOICES)
    assert table.genes.tolist() == [0, 2]
    assert len(table.values) == 6
    assert len(calls) == 1 + 3 + 2  # asked for a; then for c where a is 2
    for genome, entry in zip(GENOMES, table.entries(GENOMES), strict=True):
        assert table.values[entry] == function(decode(genome))
        # The gene ``c`` was looked at only where ``a`` is 2.
        assert table.reads[entry].tolist() == [True, genome[0] == 1]


def test_a_function_of_nothing_has_one_entry() -> None:
    table = enumerated("f", lambda c: "same", CHOICES)
    assert table.genes.tolist() == []
    assert table.values == ("same",)
    assert table.entries(GENOMES).tolist() == [0] * len(GENOMES)


def test_a_function_that_reads_what_is_no_choice() -> None:
    with pytest.raises(SpaceError, match=r"Site 's' reads 'x'[^$]*one of \['a', 'b', 'c', 'd'\]"):
        enumerated("Site 's'", lambda c: c["x"], CHOICES)


def test_a_function_that_reads_too_much_is_refused_before_it_is_enumerated(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_TABLE_ENTRIES >= 1_000_000
    monkeypatch.setattr("nas.genes.MAX_TABLE_ENTRIES", 100)
    choices = [Choice(f"g{i}", (0, 1)) for i in range(40)]
    with pytest.raises(SpaceError, match="Site 'wide' reads 7 choices or more, 128 combinations"):
        enumerated("Site 'wide'", lambda c: [c[choice.name] for choice in choices], choices)


# ---- dormancy ----------------------------------------------------------------------------------------


def some(c: Candidate) -> object:
    return c["d"] if c["a"] > 1 and c["b"] == 2 else None


def late(c: Candidate) -> object:
    return [c["a"], c["d"] if c["a"] == 3 else c["c"]]


def other(c: Candidate) -> object:
    return c["c"] if c["b"] == 1 else c["b"]


def all_but_c(c: Candidate) -> object:
    return [c["a"], c["b"], c["d"]]


def always_d(c: Candidate) -> object:
    return c["d"] if c["b"] == 1 else [c["d"]]


FUNCTIONS: list[Callable[[Candidate], object]] = [some, late, other, all_but_c, always_d, lambda c: None]


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_a_gene_is_active_where_any_function_reads_it(count: int) -> None:
    """Beside the definition: every function run on every genome, and watched."""
    for functions in itertools.combinations(FUNCTIONS, count):
        dormancy = Dormancy([enumerated("f", function, CHOICES) for function in functions], SIZES)
        watched = []
        for genome in GENOMES:
            candidate = decode(genome)
            for function in functions:
                function(candidate)
            watched.append([choice.name in candidate.reads for choice in CHOICES])
        np.testing.assert_array_equal(dormancy.active(GENOMES), watched)
        for genome, row in zip(GENOMES, watched, strict=True):
            assert dormancy.active(genome[None]).tolist() == [row]


def test_genes_read_on_every_path_need_no_look_up() -> None:
    tables = [enumerated("f", function, CHOICES) for function in (always_d, all_but_c)]
    assert Dormancy(tables[:1], SIZES).always.tolist() == [False, True, False, True]
    assert Dormancy(tables, SIZES).always.tolist() == [True, True, False, True]
    assert Dormancy(tables, SIZES).active(GENOMES[:0]).shape == (0, 4)
