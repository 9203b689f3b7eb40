"""Published tables as spaces: what is read from CSV files, and the whole flow of a search that looks everything up."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nas
from nas import cli, lookup_job
from nas.content import load_space, load_space_class
from nas.controller import best
from nas.errors import BudgetError, ContentError, ExperimentError, SpaceError, StudyError
from nas.experiment import Experiment, LookupExperiment, load_any
from nas.space import Candidate
from nas.tabular import TabularSpace

ROOT = Path(__file__).parents[1]
CODES = ["".join(digits) for digits in product("012", repeat=4)]


def write(path: Path, header: list[str], rows: list[list[Any]]) -> Path:
    with gzip.open(path, "wt", newline="") if path.suffix == ".gz" else path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def quality_of(code: str) -> float:
    return 50.0 + 5 * code.count("2") + int(code[0])


def cost_of(code: str) -> float:
    return 1.0 + sum(map(int, code))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Qualities of all 81 codes; costs of the same in another file and another order, some of them unusable."""
    rows = [[i, code, quality_of(code), quality_of(code) - 10, 2 * i] for i, code in enumerate(CODES)]
    write(tmp_path / "quality.csv.gz", ["idx", "ops", "valid", "early", "test"], rows)
    costs: dict[str, Any] = {code: cost_of(code) for code in CODES}
    costs |= {"2222": "nan", "2221": -1, "2220": "", "2212": 0}
    shuffled = [[CODES.index(code), costs[code], 3.0] for code in reversed(CODES) if code != "2211"]
    write(tmp_path / "cost.csv", ["idx", "ms", "mj"], shuffled)
    return tmp_path


def space_of(folder: Path, **options: Any) -> TabularSpace:
    settings = {"quality": "quality.csv.gz:valid", "genome": "ops", "costs": {"latency_ms": "cost.csv:ms"}, **options}
    return TabularSpace(None, folder=str(folder), **settings)


def genome(code: str) -> np.ndarray[Any, Any]:
    return np.array([[int(digit) for digit in code]])


# ---- the space -----------------------------------------------------------------------------------------


def test_every_row_has_its_published_quality_and_cost(folder: Path) -> None:
    space = space_of(folder, fidelities={0.1: "quality.csv.gz:early"}, report={"test": "quality.csv.gz:test"})
    assert space.fidelities == (0.1, 1.0)
    for code in CODES[:70]:
        assert space.quality(genome(code))[0] == pytest.approx(quality_of(code) / 100)
        assert space.quality(genome(code), 0.1)[0] == pytest.approx(quality_of(code) / 100 - 0.1)
        assert space.tests(genome(code))["test"][0] == 2 * CODES.index(code)
        assert space.price(genome(code)).tolist() == [[cost_of(code)]]
    assert np.isnan(space.quality(genome("0000"), 0.5)).all()


@pytest.mark.parametrize("code", ["2222", "2221", "2220", "2212", "2211"])
def test_missing_and_impossible_costs_are_infinite(folder: Path, code: str) -> None:
    assert np.isinf(space_of(folder).price(genome(code))).all()


def test_digits_of_one_column_are_of_one_kind(folder: Path) -> None:
    space = space_of(folder)
    assert space.kinds.tolist() == [0, 0, 0, 0]
    assert [choice.name for choice in space.choices] == [f"gene{i}.ops" for i in range(1, 5)]
    assert space.cardinalities.tolist() == [3, 3, 3, 3]
    assert not any(choice.ordered for choice in space.choices)


def test_several_columns_codes_numbers_and_words(tmp_path: Path) -> None:
    rows = [
        [k + e, r, where, 70 + i, 1 + i]
        for i, ((k, e), r, where) in enumerate(product(product("01", "01"), [96, 128, 160], ["cpu", "gpu"]))
    ]
    write(tmp_path / "t.csv", ["code", "r", "where", "top1", "ms"], rows)
    options = {"quality": "t.csv:top1", "costs": {"ms": "t.csv:ms"}, "genome": ["code", "r", "where"]}
    space = TabularSpace(None, folder=str(tmp_path), **options)
    assert [choice.name for choice in space.choices] == ["gene1.code", "gene2.code", "r", "where"]
    assert [choice.ordered for choice in space.choices] == [False, False, True, False]
    assert space.kinds.tolist() == [0, 0, 1, 2]
    row = space.encode({"gene1.code": "1", "gene2.code": "0", "r": 128, "where": "gpu"})
    assert space.quality(row)[0] == pytest.approx(0.85)
    assert len(np.unique(space.price(space.reference()))) == len(rows)


def test_a_genome_that_a_full_table_lacks_cannot_be_had(tmp_path: Path) -> None:
    write(tmp_path / "t.csv", ["ops", "q", "ms"], [[code, 50, 1] for code in CODES if code != "1111"])
    options = {"quality": "t.csv:q", "genome": "ops", "costs": {"ms": "t.csv:ms"}}
    space = TabularSpace(None, folder=str(tmp_path), **options)
    assert np.isinf(space.price(genome("1111"))).all()
    assert np.isnan(space.quality(genome("1111"))).all()


def test_a_sample_answers_with_its_nearest_row(tmp_path: Path) -> None:
    rows = [["0" * 12, 10, 1], ["1" * 12, 20, 2], ["01" * 6, 30, 3]]
    write(tmp_path / "t.csv", ["ops", "q", "ms"], rows)
    options = {"quality": "t.csv:q", "genome": "ops", "costs": {"ms": "t.csv:ms"}}
    space = TabularSpace(None, folder=str(tmp_path), **options)
    near = np.concatenate([genome("000000000001"), genome("111111111110"), genome("010101010100"), genome("01" * 6)])
    assert space.quality(near).tolist() == [0.1, 0.2, 0.3, 0.3]
    assert space.price(near)[:, 0].tolist() == [1, 2, 3, 3]
    assert space.canonical_id(near[2]) == space.canonical_id(near[3])
    many = space.sample(np.random.default_rng(0), 2000)
    distance = (many[:, None] != space.index.genomes[None]).sum(axis=2)
    assert (distance[np.arange(2000), space.index.rows(many)] == distance.min(axis=1)).all()


def test_files_are_joined_on_the_genome_or_a_key(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", ["id", "ops", "q"], [[f"n{i}", code, i + 1] for i, code in enumerate(CODES)])
    write(tmp_path / "b.csv", ["ops", "ms"], [[code, cost_of(code)] for code in reversed(CODES)])
    write(tmp_path / "c.csv", ["net", "ops", "id", "ms"], [["x", "0", f"n{i}", i + 1] for i in range(81)])
    options: dict[str, Any] = {"quality": "a.csv:q", "genome": "ops", "folder": str(tmp_path)}
    by_genome = TabularSpace(None, costs={"ms": "b.csv:ms"}, **options)
    assert by_genome.price(genome("0120"))[0, 0] == cost_of("0120")
    by_key = TabularSpace(None, costs={"ms": "c.csv:ms"}, key="id", **options)
    assert by_key.price(genome("0001"))[0, 0] == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quality": "nothing.csv:q"}, ["nothing.csv", "NAS_TABLES", "somewhere"]),
        ({"quality": "quality.csv.gz"}, ["FILE:COLUMN"]),
        ({"quality": "quality.csv.gz:top1"}, ["top1", "valid"]),
        ({"genome": "nope"}, ["nope", "ops"]),
        ({"genome": "valid", "quality": "ragged.csv:q"}, ["no table"]),
        ({"genome": "test"}, ["different lengths"]),
        ({"costs": {}}, ["cost column"]),
        ({"costs": {"ms": "other.csv:ms"}}, ["shares no row"]),
        ({"costs": {"ms": "quality.csv.gz:ops"}, "quality": "words.csv:q"}, ["words.csv"]),
    ],
)
def test_what_is_wrong_is_said(folder: Path, options: dict[str, Any], words: list[str]) -> None:
    (folder / "ragged.csv").write_text("q,valid\n1\n")
    (folder / "words.csv").write_text("ops,q\n0000,good\n0001,bad\n")
    (folder / "other.csv").write_text("idx,ms\n1000,1\n")
    with pytest.raises(ContentError) as caught:
        space_of(folder, origin="somewhere", **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_files_are_found_in_the_folder_that_the_environment_names(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NAS_TABLES", str(folder))
    space = TabularSpace(None, quality="quality.csv.gz:valid", genome="ops", costs={"ms": "cost.csv:ms"})
    assert space.size == 81


def test_there_is_nothing_to_build(folder: Path) -> None:
    space = space_of(folder)
    with pytest.raises(SpaceError, match="no models"):
        space.build(Candidate({}))


# ---- the flow ------------------------------------------------------------------------------------------


@pytest.fixture
def experiment(folder: Path) -> Path:
    path = folder / "mine.yaml"
    path.write_text(
        """
space:
  name: tabular
  quality: quality.csv.gz:valid
  genome: ops
  costs: {latency_ms: cost.csv:ms, energy: cost.csv:mj}
  report: {test: quality.csv.gz:test}
budget: {latency_ms: quantile 0.5}
strategy: {kind: evolution, population: 8, sample: 3}
search: {trials: 20, batch: 2}
"""
    )
    return path


def test_the_whole_flow(experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert cli.main(["search", str(experiment), "--out", str(run)]) == 0
    assert "Budget latency_ms ≤ 5: " in capsys.readouterr().out
    summary = json.loads((run / "summary.json").read_text())
    assert summary["kind"] == "lookup"
    assert len(summary["trials"]) == len(summary["baseline_trials"]["random"]) == 20
    for trial in summary["trials"]:
        code = "".join(trial["candidate"].values())
        assert trial["quality"] == pytest.approx(quality_of(code) / 100)
        assert trial["costs"]["latency_ms"] == cost_of(code) <= 5
        assert trial["reward"] == pytest.approx(trial["quality"])
    (row,) = (item for item in summary["rows"] if item["name"] == "search")
    assert row["quality"] == max(trial["quality"] for trial in summary["trials"])
    assert row["tests"] == {"test": 2 * CODES.index("".join(row["candidate"].values()))}
    page = (run / "report.html").read_text()
    assert "Quality against latency_ms" in page
    assert "test" in page
    assert cli.main(["report", str(run)]) == 0


def test_a_resumed_search_is_the_search(experiment: Path, tmp_path: Path) -> None:
    """Cut short, gone on with, and longer: the same trials as in one go."""
    whole = load_any(experiment)
    short = load_any(experiment, ["search.trials=8"])
    assert isinstance(whole, LookupExperiment)
    assert isinstance(short, LookupExperiment)
    lookup_job.execute(whole, tmp_path / "whole")
    lookup_job.execute(short, tmp_path / "parts")
    lookup_job.execute(whole, tmp_path / "parts", resume=True)

    def trials(run: str) -> list[Any]:
        summary = json.loads((tmp_path / run / "summary.json").read_text())
        found = [*summary["trials"], *summary["baseline_trials"]["random"]]
        return [{key: value for key, value in trial.items() if key != "seconds"} for trial in found]

    assert trials("whole") == trials("parts")
    with pytest.raises(StudyError, match="--resume"):
        lookup_job.execute(whole, tmp_path / "whole")
    changed = load_any(experiment, ["budget.latency_ms=4"])
    assert isinstance(changed, LookupExperiment)
    with pytest.raises(StudyError, match="budget changed"):
        lookup_job.execute(changed, tmp_path / "whole", resume=True)


def test_dry_run(experiment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["search", str(experiment), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "4 choices, 81 genomes" in said
    assert "budget latency_ms ≤ 5" in said


def test_a_whole_small_space_is_looked_up_once(experiment: Path, tmp_path: Path) -> None:
    asked = load_any(experiment, ["search.trials=76", "strategy.kind=random", "search.batch=10", "budget={}"])
    assert isinstance(asked, LookupExperiment)
    space = lookup_job.load(asked)
    trials, _ = lookup_job.search(asked, tmp_path, space, (), "search", lookup_job.Silent())
    assert len({trial.genome for trial in trials}) == len(trials) == 76  # five of the 81 cannot be had
    assert best(trials, 1)[0].reward == max(trial.reward for trial in trials)


@pytest.mark.parametrize(
    ("override", "error", "words"),
    [
        ("budget.size=3", ExperimentError, "latency_ms, energy"),
        ("budget.latency_ms=0.5", BudgetError, "the lowest is 1"),
        ("budget.latency_ms=most", ExperimentError, "quantile 0.4"),
        ("budget.latency_ms=quantile 2", ExperimentError, "quantile 0.4"),
        ("teacher.epochs=3", ExperimentError, "Unknown key 'teacher'"),
        ("space.nothing=3", ExperimentError, "space.nothing"),
        ("reward.kind=nothing", ContentError, "mnasnet_hard"),
        ("strategy.kind=nothing", ContentError, "evolution"),
    ],
)
def test_wrong_experiments(experiment: Path, tmp_path: Path, override: str, error: type[Exception], words: str) -> None:
    def search() -> None:
        asked = load_any(experiment, [override])
        assert isinstance(asked, LookupExperiment)
        lookup_job.execute(asked, tmp_path / "run")

    with pytest.raises(error, match=re.escape(words)):
        search()


def test_the_python_face_says_that_there_is_no_student(experiment: Path) -> None:
    with pytest.raises(ExperimentError, match="no student"):
        nas.search(experiment)


def test_an_experiment_with_a_task_stays_one() -> None:
    assert isinstance(load_any("digits"), Experiment)
    with pytest.raises(ExperimentError, match="'task' is missing"):
        load_any({"name": "x", "space": {"name": "mobilenet"}})


@pytest.mark.parametrize("name", ["nb201", "fbnet", "accel_nasbench", "ofa_mbv3"])
def test_bundled_experiments_say_which_tables_they_lack(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NAS_TABLES", raising=False)
    asked = load_any(name)
    assert isinstance(asked, LookupExperiment)
    assert load_any(asked.plain()) == asked
    with pytest.raises(ContentError, match=r"(?s)published table .* is missing.*github.com/.*NAS_TABLES"):
        lookup_job.forecast(asked)


def test_every_field_of_the_summary_is_documented(experiment: Path, tmp_path: Path) -> None:
    asked = load_any(experiment)
    assert isinstance(asked, LookupExperiment)
    summary = json.loads((lookup_job.execute(asked, tmp_path / "run") / "summary.json").read_text())
    text = (ROOT / "docs" / "run-folder.md").read_text()
    keys = {*summary, *summary["rows"][0], *summary["trials"][0], *summary["reward"], *summary["screened"]}
    assert [key for key in sorted(keys) if f"`{key}`" not in text] == []


# ---- once-for-all --------------------------------------------------------------------------------------


@pytest.fixture
def ofa_files(tmp_path: Path) -> Path:
    """A block table of the published keys with random times, and a predictor with random weights."""
    module: Any = sys.modules[load_space_class("ofa_mbv3").__module__]
    rng = np.random.default_rng(0)
    rows = [[r, key, rng.random()] for r in module.RESOLUTIONS for key in dict.fromkeys(k for _, k in module._keys(r))]
    write(tmp_path / "ofa_note10_lut.csv.gz", ["resolution", "key", "mean_ms"], rows)
    sizes = [128, 40, 40, 40, 1]
    arrays = {f"w{i}": rng.normal(size=(sizes[i + 1], sizes[i])).astype(np.float32) for i in range(4)}
    np.savez(tmp_path / "ofa_acc_predictor.npz", **arrays, **{f"b{i}": np.zeros(sizes[i + 1]) for i in range(4)})
    return tmp_path


def test_ofa_has_96_keys_a_resolution_and_46_choices(ofa_files: Path) -> None:
    space: Any = load_space("ofa_mbv3", lookup_job.NO_TASK, {"folder": str(ofa_files)})
    assert len(space.choices) == 46
    assert sorted(np.bincount(space.kinds).tolist(), reverse=True) == [20, 20, 5, 1]
    assert all(choice.ordered for choice in space.choices)
    with gzip.open(ofa_files / "ofa_note10_lut.csv.gz", "rt") as file:
        assert len(file.readlines()) == 1 + 5 * 96


def test_ofa_blocks_beyond_the_depth_are_dormant(ofa_files: Path) -> None:
    """What is dormant changes neither quality nor latency; everything else changes both or one."""
    space: Any = load_space("ofa_mbv3", lookup_job.NO_TASK, {"folder": str(ofa_files)})
    rng = np.random.default_rng(1)
    genomes = space.sample(rng, 200)
    active = space.active(genomes)
    other = np.where(active, genomes, space.sample(rng, 200))
    assert (space.price(other) == space.price(genomes)).all()
    assert (space.quality(other) == space.quality(genomes)).all()
    assert [space.canonical_id(a) for a in other[:20]] == [space.canonical_id(b) for b in genomes[:20]]
    moved = genomes.copy()
    gene = np.array([rng.choice(np.flatnonzero(row)) for row in active])
    moved[np.arange(200), gene] = (moved[np.arange(200), gene] + 1) % space.cardinalities[gene]
    assert (space.quality(moved) != space.quality(genomes)).all()
    alone = np.array([space.quality(row[None])[0] for row in genomes])
    np.testing.assert_array_equal(alone, space.quality(genomes))


def test_the_benchmark_on_once_for_all(ofa_files: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "ofa.py"), "--tables", str(ofa_files), "--budget", "11"]
    command += ["--evaluations", "120", "--seeds", "2", "--strategies", "random,plain:evolution"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    screened, plain = (json.loads(line) for line in done.stdout.splitlines())
    for line in (screened, plain):
        assert line["evaluations"] == 120
        assert line["accuracy"]["100"] <= line["accuracy"]["120"]
        assert line["accuracy_min"]["120"] <= line["accuracy"]["120"]
    assert screened["asks"] > plain["asks"]


TABLES = Path(os.environ.get("NAS_TABLES", "."))


@pytest.mark.skipif(not (TABLES / "ofa_note10_lut.csv.gz").is_file(), reason="NAS_TABLES has no once-for-all tables")
def test_ofa_tutorial_net() -> None:
    """The net that the authors' tutorial prints: 24.73 ms and 81.71 %."""
    space: Any = load_space("ofa_mbv3", lookup_job.NO_TASK, {"folder": str(TABLES)})
    net: dict[str, Any] = {choice.name: choice.values[0] for choice in space.choices} | {"resolution": 192}
    blocks = [["53", "33"], ["54", "34"], ["76", "73", "34"], ["54", "54", "74", "33"], ["36", "36", "56"]]
    for stage, chosen in enumerate(blocks, 1):
        net[f"stage{stage}.depth"] = len(chosen)
        for block, (kernel, expansion) in enumerate(chosen, 1):
            net[f"stage{stage}.block{block}.kernel"] = int(kernel)
            net[f"stage{stage}.block{block}.expansion"] = int(expansion)
    genomes = space.encode(net)[None]
    assert space.price(genomes)[0, 0] == pytest.approx(24.730, abs=5e-4)
    assert space.quality(genomes)[0] == pytest.approx(0.81713, abs=5e-6)
