"""One device with several runtimes: priced in the fastest, measured in all, and the student says in which it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import SMALL, TinySpace

from nas.errors import ExperimentError
from nas.experiment import load_experiment
from nas.job import Job, execute
from nas.latency import AdditiveEstimator, FastestRuntime, LatencyTable
from nas.latency.estimator import COSTS, LATENCIES
from nas.latency.measure import Timing
from nas.student.finalists import Session
from nas.student.tables import cached_path
from nas.testing import synthetic_table


def test_every_candidate_has_the_latencies_of_its_fastest_runtime() -> None:
    space = TinySpace()
    own = AdditiveEstimator(space, synthetic_table(space, 0), COSTS)
    others = {f"r{seed}": AdditiveEstimator(space, synthetic_table(space, seed), LATENCIES) for seed in (1, 2)}
    fastest = FastestRuntime(own, others)
    genomes = space.sample(np.random.default_rng(0), 200)
    prices, names = fastest.price(genomes), fastest.fastest(genomes)
    assert fastest.costs == COSTS
    assert len(set(names)) >= 2
    assert set(names) <= {"", "r1", "r2"}
    each = {"": own.price(genomes)[:, :2], **{name: other.price(genomes) for name, other in others.items()}}
    for i, name in enumerate(names):
        assert prices[i, 0] == min(table[i, 0] for table in each.values())
        np.testing.assert_array_equal(prices[i, :2], each[name][i])  # p95 of that runtime too
    np.testing.assert_array_equal(prices[:, 2:], own.price(genomes)[:, 2:])


def test_a_model_is_judged_in_the_runtime_that_it_is_fastest_in() -> None:
    def timing(ms: float) -> Timing:
        return Timing(ms, 2 * ms, ms, 10, 0.0)

    session = Session({"a": timing(1.0), "b": timing(1.0)}, {}, 0.1, {"other": {"a": timing(0.5), "b": timing(3.0)}})
    assert session.fastest("a") == ("other", timing(0.5))
    assert session.fastest("b") == ("", timing(1.0))


def experiment(**device: Any) -> dict[str, Any]:
    space = {**SMALL["space"], "bits": [32], "depths": [[1], [1]]}  # type: ignore[dict-item]
    small = {
        "space": space, "table": {"seconds": 0.5, "nets": 8}, "search": {"trials": 3, "batch": 3, "workers": 0},
        "baselines": [], "device": device,
    }  # fmt: skip
    return {**SMALL, **small}


def test_a_search_with_two_runtimes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    learning = load_experiment(experiment(alternatives=["torch"]), ["table.learn=true"])
    execute(learning, run)
    manifest = json.loads((run / "student" / "manifest.json").read_text())
    first, second = manifest["latency"]
    assert {first["runtime"], second["runtime"]} == {"onnxruntime", "torch"}
    assert first["measured"]
    assert second["measured"]
    assert first["p50_ms"] <= second["p50_ms"]
    assert first["fingerprint"] != second["fingerprint"]
    tables = sorted(path.name for path in run.glob("table*.json"))
    assert len(tables) == 3  # onnxruntime's, as it was and refined, and torch's
    assert any("torch" in name for name in tables)
    # The finalists corrected the first runtime's table, and the next search begins with that.
    began, refined = (LatencyTable.load(run / f"{name}.json") for name in ("table", "table-refined"))
    job = Job(learning, run)
    assert LatencyTable.load(cached_path(job.space, job.device)) == refined != began
    loop = json.loads((run / "summary.json").read_text())["table"]["finalists"]
    assert [row["name"] for row in loop["rows"]] == [net.name for net in (run / "finalists").iterdir()]
    assert sum(net.source == "finalist" for net in refined.nets) == len(loop["rows"]) == 1
    assert loop["sha256"] == refined.sha256


@pytest.mark.parametrize("names", [["onnxruntime"], ["torch", "torch"], ["torch", "torch/cpu"]])
def test_a_runtime_is_named_once(names: list[str], tmp_path: Path) -> None:
    job = Job(load_experiment(experiment(alternatives=names)), tmp_path)
    with pytest.raises(ExperimentError, match="names a runtime twice"):
        _ = job.alternatives
