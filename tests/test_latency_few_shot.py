"""Few-shot adaptation: what it recovers, what it survives, and what it refuses."""

from __future__ import annotations

import os
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from nas.errors import TableError
from nas.latency.few_shot import FewShot, _condition, adapt, choose
from nas.latency.fit import spearman

GENOMES = np.array(list(product(range(4), repeat=5)))  # 1,024 networks of five places and four symbols


def devices(count: int, noise: float = 0.02, seed: int = 0) -> np.ndarray:
    """Costs ``[networks, count]`` of additive devices that have much in common, in units of their own."""
    rng = np.random.default_rng(seed)
    common = rng.gamma(2.0, 1.0, (5, 4))
    columns = []
    for _ in range(count):
        costs = common * rng.lognormal(0.0, 0.4, 4) * rng.lognormal(0.0, 0.1, (5, 4)) + rng.gamma(1.0, 0.1)
        total = costs[np.arange(5), GENOMES].sum(axis=1)
        columns.append(rng.lognormal(0.0, 2.0) * total * rng.lognormal(0.0, noise, len(total)))
    return np.column_stack(columns)


def error(predicted: np.ndarray, true: np.ndarray) -> float:
    return float(np.median(np.abs(predicted / true - 1)))


def test_a_mix_of_known_devices_is_recovered() -> None:
    known = devices(6, noise=0.0)
    mix = known @ (np.array([0.5, 0.3, 0.2, 0, 0, 0]) / np.median(known, axis=0))
    rows = choose(known, 10, seed=0)
    found = adapt(known, rows, 7.0 * mix[rows])
    assert error(found.predicted, 7.0 * mix) < 0.01
    assert spearman(found.predicted, mix) > 0.999


def test_genomes_tell_of_what_no_known_device_has() -> None:
    known = devices(7)
    odd = 1.0 + 5.0 * (GENOMES == 3).sum(axis=1) + 0.2 * (GENOMES == 1).sum(axis=1)  # the same wherever it stands
    with_genes, without = FewShot(known, GENOMES), FewShot(known)
    rows = with_genes.choose(0)
    assert error(with_genes.adapt(rows, odd[rows]).predicted, odd) < 0.1
    assert error(with_genes.adapt(rows, odd[rows]).predicted, odd) < error(
        without.adapt(rows, odd[rows]).predicted, odd
    )


def test_better_than_the_mean_of_the_known_and_tells_how_sure_it_is() -> None:
    every = devices(9, noise=0.03)
    known, target = every[:, :-1], every[:, -1]
    model = FewShot(known, GENOMES)
    rows = model.choose(1)
    found = model.adapt(rows, target[rows])
    rest = np.setdiff1d(np.arange(len(target)), rows)
    mean = (known / np.median(known, axis=0)).mean(axis=1)
    assert spearman(found.predicted[rest], target[rest]) > spearman(mean[rest], target[rest])
    inside = np.abs(found.predicted - target) <= found.uncertainty * found.predicted
    assert 0.5 < inside[rest].mean() < 0.95


def test_more_measurements_help_and_any_number_is_taken() -> None:
    every = devices(5, noise=0.05)
    known, target = every[:, :-1], every[:, -1]
    errors = []
    for count in (2, 10, 40, 400, len(target)):  # the last two have more measurements than the basis has columns
        rows = np.arange(len(target)) if count == len(target) else np.random.default_rng(0).choice(1024, count, False)
        errors.append(error(adapt(known, rows, target[rows], GENOMES).predicted, target))
    assert errors[0] > errors[2] > errors[4]
    assert errors[4] < 0.05


def test_both_forms_of_the_posterior_agree() -> None:
    rng = np.random.default_rng(0)
    basis, theta, noise = rng.normal(size=(6, 6)), rng.gamma(1.0, 1.0, 6), rng.gamma(1.0, 0.1, 6)
    values = rng.normal(size=6)
    dual, half, sign = _condition(basis, theta, values, noise)
    # A seventh measurement that says nothing: now there are more of them than weights.
    more = np.vstack([basis, np.zeros(6)]), theta, np.append(values, 0.0), np.append(noise, 1.0)
    primal, other, positive = _condition(*more)
    assert (sign, positive) == (-1.0, 1.0)
    np.testing.assert_allclose(dual, primal, atol=1e-9)
    np.testing.assert_allclose(np.diag(theta) - half.T @ half, other.T @ other, atol=1e-9)


def test_gaps_constants_and_duplicates_change_little() -> None:
    every = devices(6)
    known, target = every[:, :-1], every[:, -1]
    rows = choose(known, 10, 0, GENOMES)
    plain = adapt(known, rows, target[rows], GENOMES)
    holes = known.copy()
    holes[::7, 1], holes[1::9, 2], holes[2::11, 0] = np.nan, -1.0, np.inf
    spoilt = np.column_stack([holes, np.full(len(known), 3.0), np.full(len(known), np.nan), known[:, 0]])
    found = adapt(spoilt, rows, target[rows], GENOMES)
    assert np.isfinite(found.predicted).all()
    assert (found.predicted > 0).all()
    assert error(found.predicted, plain.predicted) < 0.05
    assert found.weights.shape == (8,)
    assert found.weights[5] == found.weights[6] == 0
    bare = adapt(spoilt, rows, target[rows])
    assert error(bare.predicted, target) < 0.2


def test_a_row_that_no_device_has_is_told() -> None:
    known = devices(4)
    known[17] = np.nan
    rows = [1, 200, 400, 600, 800]
    found = adapt(known, rows, known[rows, 0])
    assert np.isinf(found.uncertainty[17])
    assert np.isfinite(np.delete(found.uncertainty, 17)).all()
    assert np.isfinite(adapt(known, rows, known[rows, 0], GENOMES).uncertainty[17])


def test_a_disturbed_measurement_is_found() -> None:
    every = devices(8, noise=0.01)
    known, target = every[:, :-1], every[:, -1]
    rows = choose(known, 10, 3, GENOMES)
    measured = target[rows].copy()
    measured[4] *= 2.5
    found = adapt(known, rows, measured, GENOMES)
    assert found.outliers.argmax() == 4
    assert found.outliers[4] > 0.9
    assert error(found.predicted, target) < 0.1


def test_the_same_question_has_the_same_answer_in_any_unit() -> None:
    known = devices(5)
    rows = choose(known, 8, 5)
    np.testing.assert_array_equal(rows, choose(known * [1e-6, 1, 1e3, 1, 1e9], 8, 5))
    assert set(choose(known, 8, 6)) != set(rows)
    first, second = (adapt(known, rows, factor * known[rows, 1]) for factor in (1.0, 1e6))
    np.testing.assert_allclose(second.predicted, 1e6 * first.predicted, rtol=1e-6)
    np.testing.assert_array_equal(adapt(known, rows, known[rows, 1]).predicted, first.predicted)


def test_chosen_rows_beat_random_ones() -> None:
    every = devices(8)
    known, target = every[:, :-1], every[:, -1]
    model = FewShot(known, GENOMES, samples=6)
    chosen, drawn = [], []
    for seed in range(6):
        rows = model.choose(seed)
        chosen.append(error(model.adapt(rows, target[rows]).predicted, target))
        rows = np.random.default_rng(seed).choice(1024, 6, replace=False)
        drawn.append(error(model.adapt(rows, target[rows]).predicted, target))
    assert np.mean(chosen) < np.mean(drawn)


def test_choosing_among_some_rows_and_all_rows() -> None:
    known = devices(3)[:40]
    model = FewShot(known, samples=5)
    assert set(model.choose(0, among=[3, 9, 12, 20, 30, 35])) <= {3, 9, 12, 20, 30, 35}
    assert sorted(FewShot(known, samples=40).choose(0)) == list(range(40))
    with pytest.raises(TableError, match="5 samples of 4 rows"):
        model.choose(0, among=[1, 2, 3, 4])


@pytest.mark.parametrize(("rows", "columns"), [(10, 1), (12, 100), (2000, 100)])
def test_small_and_wide_tables(rows: int, columns: int) -> None:
    rng = np.random.default_rng(0)
    base = rng.lognormal(0, 1.5, rows)  # parts lie orders of magnitude apart
    known = base[:, None] * rng.lognormal(0, 0.1, (rows, columns))
    target = 5 * base * rng.lognormal(0, 0.05, rows)
    picked = choose(known, 5, 0)
    found = adapt(known, picked, target[picked])
    assert len(set(picked)) == 5
    assert error(found.predicted, target) < 0.25
    assert sum(found.weights) == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize(
    ("known", "rows", "measured", "genomes", "text"),
    [
        (np.ones(5), [0, 1], [1.0, 2.0], None, "have shape"),
        (np.ones((5, 0)), [0, 1], [1.0, 2.0], None, "have shape"),
        (np.ones((5, 2)), [0, 1], [1.0, 2.0], None, "every column is constant or unknown"),
        (np.full((5, 2), np.nan), [0, 1], [1.0, 2.0], None, "every column is constant or unknown"),
        (np.arange(1.0, 6)[:, None], [0, 1], [1.0], None, "2 rows were measured, but there are 1 costs"),
        (np.arange(1.0, 6)[:, None], [0, 1], [1.0, np.nan], None, "A measured cost is nan"),
        (np.arange(1.0, 6)[:, None], [0, 1], [1.0, 0.0], None, "A measured cost is 0.0"),
        (np.arange(1.0, 6)[:, None], [0], [1.0], None, "1 samples of 5 rows"),
        (np.arange(1.0, 6)[:, None], [0, 0], [1.0, 2.0], None, "1 samples of 5 rows"),
        (np.arange(1.0, 6)[:, None], [0, 5], [1.0, 2.0], None, "do not name measured rows"),
        (np.arange(1.0, 6)[:, None], [0, -1], [1.0, 2.0], None, "do not name measured rows"),
        (np.arange(1.0, 6)[:, None], [0.0, 1.5], [1.0, 2.0], None, "do not name measured rows"),
        (np.arange(1.0, 6)[:, None], [0, 1], [1.0, 2.0], np.ones((4, 2), int), "Genomes have shape"),
        (np.arange(1.0, 6)[:, None], [0, 1], [1.0, 2.0], np.ones((5, 2)), "Genomes have shape"),
    ],
)
def test_what_is_wrong_is_said(known: object, rows: object, measured: object, genomes: object, text: str) -> None:
    with pytest.raises(TableError, match=text):
        adapt(known, rows, measured, genomes)  # type: ignore[arg-type]


def published() -> Path | None:
    """The published table, where it is."""
    places = [os.environ.get("NAS_TABLES"), Path(__file__).parents[2] / "shared" / "tables"]
    files = [Path(place) / "help_nb201.csv.gz" for place in places if place]
    return next((file for file in files if file.is_file()), None)


def test_a_published_device() -> None:
    file = published()
    if file is None:
        pytest.skip("no published tables")
    from nas.tabular import Table, encode

    table = Table.of(f"{file}:idx")
    names = ["1080ti_1_ms", "1080ti_256_ms", "silver_4114_ms", "silver_4210r_ms", "samsung_a50_ms", "samsung_s7_ms"]
    known = np.array([table.column(name) for name in names], dtype=float).T
    target = np.array(table.column("titan_rtx_256_ms"), dtype=float)
    model = FewShot(known, encode(table, ["ops"], range(len(target)))[0])
    rows = model.choose(0)
    found = model.adapt(rows, target[rows])
    assert spearman(found.predicted, target) > 0.98
