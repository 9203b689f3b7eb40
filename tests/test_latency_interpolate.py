"""Parts that are not measured: the grid of those that are, the guesses between them, and how far these are trusted."""

from __future__ import annotations

import numpy as np
import pytest

from nas.latency.interpolate import FEWEST, coordinates, families, family, grid, interpolate
from nas.parts import Boundary, Conv, Part


def blocks(precision: str = "fp32") -> dict[str, Part]:
    """Inverted bottlenecks of two kernels over channels and sides."""
    found = [
        Part(
            (Conv(hidden, 1, activation="relu6"), Conv(hidden, kernel, groups=0, activation="relu6"), Conv(cout, 1)),
            (cin, side, side), precision,
        )
        for cin in (8, 16, 24, 40) for hidden in (24, 48, 72, 96, 192) for cout in (16, 24, 32)
        for side in (7, 14, 28) for kernel in (3, 5)
    ]  # fmt: skip
    return {part.key: part for part in found}


def law(part: Part) -> float:
    """Work and traffic; hidden channels are computed in blocks of 16."""
    hidden = part.ops[0].out_channels  # type: ignore[attr-defined]
    padded = np.ceil(hidden / 16) * 16 / hidden
    return float(0.005 + 1e-7 * part.macs * padded + 2e-6 * part.traffic)


def test_a_family_is_a_key_without_its_sizes() -> None:
    one, other = Part((Conv(8, 3, 2),), (4, 9, 9)), Part((Conv(16, 5, 2),), (8, 7, 7))
    assert family(one.key) == family(other.key) == "fp32 #x#x# conv#k#s#"
    assert family(Part(one.ops, one.shape, "int8").key) == "int8 #x#x# conv#k#s#"
    assert families([one.key, Part((Conv(8, 3),), (4, 9, 9)).key, other.key]) == {
        "fp32 #x#x# conv#k#s#": [one.key, other.key],
        "fp32 #x#x# conv#k#": ["fp32 4x9x9 conv8k3"],
    }


def test_coordinates_are_standardised_and_have_no_constants() -> None:
    x = coordinates(list(blocks().values()))
    np.testing.assert_allclose(x.mean(axis=0), 0, atol=1e-9)
    np.testing.assert_allclose(x.std(axis=0), 1, atol=1e-9)
    assert len(np.unique(x, axis=0)) == len(x)


def test_a_grid_has_the_corners_and_small_families_whole() -> None:
    parts = blocks()
    few = {p.key: p for p in (Part((Boundary("quantize"),), (8, s, s), "boundary") for s in (4, 8, 16))}
    everything = {**parts, **few}
    chosen = grid(everything, 60)
    assert set(few) <= set(chosen) <= set(everything)
    assert len(chosen) == len(set(chosen)) <= 60 + FEWEST
    assert grid(everything, len(everything)) == list(everything)
    macs = np.array([parts[key].macs for key in parts])
    inside = [parts[key].macs for key in chosen if key in parts]
    assert (min(inside), max(inside)) == (macs.min(), macs.max())
    # Nearer to all of the others than as many random ones are.
    x = dict(zip(parts, coordinates(list(parts.values())), strict=True))

    def farthest(keys: list[str]) -> float:
        return max(min(float(np.linalg.norm(x[k] - x[c])) for c in keys) for k in parts)

    own = [key for key in chosen if key in parts]
    random = [list(np.random.default_rng(seed).choice(list(parts), len(own), replace=False)) for seed in range(5)]
    assert farthest(own) < min(map(farthest, random))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_guesses_follow_a_law_with_blocks_and_know_their_errors(precision: str) -> None:
    parts = blocks(precision)
    keys = grid(parts, 120)
    noise = np.random.default_rng(0)
    measured = {key: law(parts[key]) * float(noise.lognormal(0, 0.005)) for key in keys}
    guesses, validation = interpolate(parts, measured)
    assert set(guesses) == set(parts) - set(keys)
    off = np.array([guess.value / law(parts[key]) - 1 for key, guess in guesses.items()])
    assert np.abs(off).mean() < 0.02
    uncertainty = np.array([guess.uncertainty for guess in guesses.values()])
    assert np.mean(np.abs(off) <= 3 * uncertainty) > 0.95
    assert validation is not None
    assert validation.parts == len(keys)
    assert 0 < validation.mape < 0.1
    assert 0.5 < validation.within_10 <= 1
    assert interpolate(parts, measured) == (guesses, validation)  # nothing is drawn


def test_more_measured_parts_are_better_guesses() -> None:
    parts = blocks()
    errors = []
    for count in (30, 90, 240):
        guesses, _ = interpolate(parts, {key: law(parts[key]) for key in grid(parts, count)})
        errors.append(np.mean([abs(guess.value / law(parts[key]) - 1) for key, guess in guesses.items()]))
    assert errors[0] > errors[1] > errors[2]


def test_a_family_of_which_nothing_is_measured_is_guessed_roughly() -> None:
    parts = blocks()
    lone = Part((Conv(32, 3),), (16, 14, 14))
    guesses, _ = interpolate({**parts, lone.key: lone}, {key: law(part) for key, part in parts.items()})
    assert list(guesses) == [lone.key]
    assert 0.1 < guesses[lone.key].value / law(Part((Conv(32, 3),), (16, 14, 14))) < 10
    assert guesses[lone.key].uncertainty >= 0.3


def test_nothing_to_guess_and_nothing_to_guess_from() -> None:
    parts = blocks()
    assert interpolate(parts, dict.fromkeys(parts, 1.0)) == ({}, None)
    with pytest.raises(ValueError, match="nothing is measured"):
        interpolate(parts, {})
