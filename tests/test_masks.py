"""Masks: what pays nowhere is not tried, what pays anywhere is, and a candidate stays the candidate it is."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers import SMALL, TinySpace, domain_of, plain
from torch import nn

import nas.masks
from nas.controller import Budget, SearchController, objective
from nas.errors import StudyError
from nas.evaluators import Evaluation, Evaluator
from nas.executors import Serial
from nas.experiment import load_experiment
from nas.forecast import forecast
from nas.job import Job, open_run
from nas.latency import AdditiveEstimator, CostEstimator, LatencyTable, SeveralDevices
from nas.latency.fit import LinearFit
from nas.latency.measure import Timing
from nas.latency.table import Entry
from nas.masks import Masks, find_masks, note
from nas.parts import Boundary, Conv, Part
from nas.report import render
from nas.reward import Limit, MnasNetHard, MnasNetSoft
from nas.space import Candidate, Choice, Genomes, SearchSpace, Training
from nas.strategies import Strategy, Surrogate, strategies
from nas.study import Study, Trial
from nas.testing import synthetic_table

STAGES = (0, 1)
UNALIGNED = 0.3  # of 16 and 32 channels this leaves 11 and 22, of which the fast layout knows nothing


class Staged(SearchSpace):
    """Two stages with a precision and a share of pruned channels each, unrounded; boundaries where precisions meet."""

    name = "staged"

    def __init__(self, bits: Sequence[int] = (32, 8)) -> None:
        stages = [
            [
                Choice(f"stage{s}.width", (16, 32)),
                Choice(f"stage{s}.depth", (1, 2)),
                Choice(f"stage{s}.prune", (0.0, UNALIGNED, 0.5), plain=0.0),
                Choice(f"stage{s}.bits", bits, plain=32),
            ]
            for s in STAGES
        ]
        self.choices = (Choice("resolution", (32, 224)), *itertools.chain(*stages))
        self.sites = {"input": self._input, "output": self._output, "between": self._between}
        self.sites |= {f"stage{s}": lambda c, s=s: self._stage(c, s) for s in STAGES}
        self.treatments = {f"stage{s}": lambda c, s=s: self._treated(c, s) for s in STAGES}

    def _side(self, c: Candidate, stage: int) -> int:
        return int(c["resolution"]) // 2**stage

    def _kept(self, c: Candidate, stage: int) -> int:
        return round(int(c[f"stage{stage}.width"]) * (1 - float(c[f"stage{stage}.prune"])))

    def _int8(self, c: Candidate, stage: int) -> bool:
        return c[f"stage{stage}.bits"] == 8

    def _stage(self, c: Candidate, s: int) -> Part:
        side = self._side(c, s)
        precision = "int8" if self._int8(c, s) else "fp32"
        return Part((Conv(self._kept(c, s), 3),), (16, side, side), precision, int(c[f"stage{s}.depth"]))

    def _input(self, c: Candidate) -> Part | None:
        return self._boundary("quantize", self._side(c, 0)) if self._int8(c, 0) else None

    def _between(self, c: Candidate) -> Part | None:
        before, after = self._int8(c, 0), self._int8(c, 1)
        return None if before == after else self._boundary("quantize" if after else "dequantize", self._side(c, 1))

    def _output(self, c: Candidate) -> Part | None:
        return self._boundary("dequantize", self._side(c, 1)) if self._int8(c, 1) else None

    def _boundary(self, kind: str, side: int) -> Part:
        return Part((Boundary(kind),), (16, side, side), "boundary")

    def _treated(self, c: Candidate, s: int) -> Training:
        return Training(
            compression={"channel_prune": {f"{s}": self._kept(c, s)}, "quantize": {f"{s}": c[f"stage{s}.bits"]}}
        )

    def build(self, candidate: Candidate) -> nn.Module:
        raise NotImplementedError


SPACE = Staged()
EVERY = np.indices(tuple(SPACE.cardinalities.tolist())).reshape(len(SPACE.choices), -1).T
PLAIN = {
    "resolution": 32,
    **{f"stage{s}.{k}": v for s in STAGES for k, v in {"width": 16, "depth": 1, "prune": 0.0, "bits": 32}.items()},
}


def genome(space: SearchSpace = SPACE, **values: Any) -> Genomes:
    changed = {name.replace("__", "."): value for name, value in values.items()}
    return space.encode({**PLAIN, **changed})


def table(ms: Callable[[Part], float], space: SearchSpace = SPACE) -> LatencyTable:
    """A table whose times are what ``ms`` says, added up without a correction."""
    made = synthetic_table(space)
    entries = {
        key: Entry(Timing(ms(part), 1.1 * ms(part), ms(part), 9, 0.01), ms(part)) for key, part in space.keys().items()
    }
    return replace(made, entries=entries, fits={cost: LinearFit() for cost in made.fits})


def estimator(ms: Callable[[Part], float]) -> AdditiveEstimator:
    return AdditiveEstimator(SPACE, table(ms), ("latency_ms", "latency_p95_ms", "size_bytes"))


def masks_of(ms: Callable[[Part], float], *costs: str) -> Masks:
    return find_masks(SPACE, estimator(ms), costs or ("latency_ms",))


def macs(part: Part) -> float:
    """Plain times: a tick and what the arithmetic takes; boundaries are nearly free."""
    return 1e-6 if part.precision == "boundary" else 0.01 + part.macs / part.count * 1e-8


def half(part: Part) -> float:
    """int8 takes half the time."""
    return macs(part) * (0.5 if part.precision == "int8" else 1.0)


def slow_when_small(part: Part) -> float:
    """int8 is slower in stage 1 at the lower resolution, where the side is 16; elsewhere it takes half the time."""
    return macs(part) * 1.5 if part.precision == "int8" and part.shape[1] == 16 else half(part)


def unaligned(part: Part) -> float:
    """Channels that are no multiple of 8 take three times as long."""
    conv = part.ops[0]
    return half(part) * (3.0 if isinstance(conv, Conv) and conv.out_channels % 8 else 1.0)


def saving(ms: float) -> Callable[[Part], float]:
    """int8 saves so much per stage, and every boundary costs 0.08."""
    return lambda part: 0.08 if part.precision == "boundary" else 0.5 - (ms if part.precision == "int8" else 0.0)


def by_definition(space: SearchSpace, priced: AdditiveEstimator, costs: Sequence[str], row: Genomes) -> Genomes:
    """Repair, candidate by candidate: from prices alone, one choice after the other, then all choices of a kind."""
    columns = [priced.costs.index(cost) for cost in costs]
    genes = [i for i, choice in enumerate(space.choices) if choice.plain is not None]
    bits = [i for i in genes if space.choices[i].name.endswith("bits")]
    row = row.copy()
    changed = True
    while changed:
        changed = False
        for move in [*([gene] for gene in genes), bits]:
            switched = row.copy()
            for gene in move:
                switched[gene] = space.choices[gene].index(space.choices[gene].plain)
            now, then = (priced.price_slowly(space.decode(one))[columns] for one in (row, switched))
            if (switched != row).any() and (now >= then - 1e-9 * np.abs(then)).all():
                row, changed = switched, True
    return row


# ---- where a form pays -------------------------------------------------------------------------------


def test_a_form_that_is_slower_in_one_stage_at_one_resolution_is_masked_there_alone() -> None:
    masks = masks_of(slow_when_small)
    assert [form.name for form in masks.forms] == ["stage1.bits=8"]
    form = masks.forms[0]
    assert not form.everywhere
    assert form.share == pytest.approx(0.5)
    assert (form.by, form.where) == ("resolution", {32: 1.0, 224: 0.0})
    assert form.excess["latency_ms"] > 0
    assert form.scope == "in 50 % of its candidates (resolution=32: 100 %, resolution=224: 0 %)"
    low, high = genome(stage1__bits=8), genome(stage1__bits=8, resolution=224)
    np.testing.assert_array_equal(masks.repair(np.array([low, high])), [genome(), high])
    np.testing.assert_array_equal(masks.repair(genome(stage0__bits=8)), [genome(stage0__bits=8)])


def test_unaligned_channels_are_masked_everywhere_and_aligned_ones_nowhere() -> None:
    masks = masks_of(unaligned)
    assert {form.name for form in masks.forms} == {f"stage{s}.prune={UNALIGNED}" for s in STAGES}
    assert all(form.everywhere and form.scope == "everywhere" and form.plain == 0.0 for form in masks.forms)
    repaired = masks.repair(EVERY)
    for s in STAGES:
        gene = SPACE.position[f"stage{s}.prune"]
        assert set(repaired[:, gene].tolist()) == {0, 2}
        np.testing.assert_array_equal(repaired[:, gene] == 2, EVERY[:, gene] == 2)
    untouched = [i for i, choice in enumerate(SPACE.choices) if not choice.name.endswith("prune")]
    np.testing.assert_array_equal(repaired[:, untouched], EVERY[:, untouched])


def test_what_equals_the_plain_form_is_no_better() -> None:
    """int8 that saves nothing and costs nothing has no claim on a training; to save a rounding is to save nothing."""
    for factor in (1.0, 1.0 - 1e-12):
        same = masks_of(lambda part, f=factor: macs(part) * (f if part.precision == "int8" else 1.0))
        assert {form.name for form in same.forms} == {f"stage{s}.bits=8" for s in STAGES}
    assert not masks_of(lambda part: macs(part) * (0.999 if part.precision == "int8" else 1.0)).forms


def test_neighbours_in_int8_are_kept_where_only_the_pair_pays() -> None:
    """Each stage saves 0.1, each run of int8 pays two boundaries of 0.08: one stage alone loses, two together win."""
    masks = masks_of(saving(0.1))
    both = genome(stage0__bits=8, stage1__bits=8)
    np.testing.assert_array_equal(masks.repair(both), [both])
    for s in STAGES:
        np.testing.assert_array_equal(masks.repair(genome(**{f"stage{s}__bits": 8})), [genome()])
    bits = {form.name: form.everywhere for form in masks.forms if form.name.endswith("bits=8")}
    assert bits == {"stage0.bits=8": False, "stage1.bits=8": False}


def test_neighbours_in_int8_are_masked_together_where_the_pair_loses_too() -> None:
    """A saving of 0.07 each: neither stage can leave the pair alone (0.02 against 0.09), and yet none is better."""
    masks = masks_of(saving(0.07))
    shallow = {"stage0__depth": 1, "stage1__depth": 1}
    np.testing.assert_array_equal(masks.repair(genome(stage0__bits=8, stage1__bits=8, **shallow)), [genome(**shallow)])
    together = masks.forms[-1]
    assert together.name == "stage0.bits, stage1.bits together"
    assert 0 < together.share < 1
    deep = genome(stage0__bits=8, stage1__bits=8, stage0__depth=2, stage1__depth=2)  # saves 0.28, pays 0.16
    np.testing.assert_array_equal(masks.repair(deep), [deep])


# ---- the objective decides ---------------------------------------------------------------------------


def test_a_cost_that_a_form_lowers_unmasks_it() -> None:
    assert not masks_of(slow_when_small, "latency_ms", "size_bytes").forms
    names = {form.name for form in masks_of(unaligned, "latency_p95_ms").forms}
    assert names == {f"stage{s}.prune={UNALIGNED}" for s in STAGES}


def test_another_device_in_the_objective_unmasks_what_pays_there() -> None:
    both = SeveralDevices(estimator(slow_when_small), {"pixel": estimator(half), "old": estimator(slow_when_small)})
    assert not find_masks(SPACE, both, ["latency_ms", "latency_ms@pixel"]).forms
    for costs in (["latency_ms"], ["latency_ms", "latency_ms@old"]):
        assert [form.name for form in find_masks(SPACE, both, costs).forms] == ["stage1.bits=8"]
    assert set(find_masks(SPACE, both, ["latency_ms", "latency_ms@old"]).forms[0].excess) == {
        "latency_ms",
        "latency_ms@old",
    }


class Learned:
    """Prices, and nothing known of how they come about."""

    costs = ("latency_ms",)

    def price(self, genomes: Genomes) -> Any:
        return np.ones((len(genomes), 1))


def test_nothing_is_masked_where_nothing_is_known_or_wanted() -> None:
    unknown: CostEstimator = Learned()
    for masks in (
        find_masks(SPACE, unknown, ["latency_ms"]),
        find_masks(SPACE, SeveralDevices(estimator(unaligned), {"x": unknown}), ["latency_ms"]),
        find_masks(SPACE, estimator(unaligned), []),
        masks_of(half, "latency_ms"),
        find_masks(TinySpace(), AdditiveEstimator(TinySpace(), synthetic_table(TinySpace())), ["latency_ms"]),
    ):
        assert not masks.moves
        assert not masks.forms
        assert note(masks) == ""
        np.testing.assert_array_equal(masks.repair(EVERY), EVERY)


# ---- repair ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("costs", [("latency_ms",), ("latency_ms", "size_bytes"), ("latency_p95_ms", "latency_ms")])
def test_repair_is_its_definition(costs: tuple[str, ...], dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tables of chance, by lookup in one table or site by site: what prices alone say, candidate by candidate."""
    if not dense:
        monkeypatch.setattr(nas.masks, "DENSE", 1)
    changed = 0
    for seed in range(4):
        priced = AdditiveEstimator(SPACE, synthetic_table(SPACE, seed))
        masks = find_masks(SPACE, priced, costs)
        rows = EVERY[np.random.default_rng(seed).permutation(len(EVERY))[:150]]
        repaired = masks.repair(rows)
        np.testing.assert_array_equal(repaired, [by_definition(SPACE, priced, costs, row) for row in rows])
        changed += int((repaired != rows).any(axis=1).sum())
    assert (changed > 50) == ("size_bytes" not in costs)  # every form here lowers the size


@pytest.mark.parametrize("seed", range(3))
def test_a_repair_is_its_own_repair_and_costs_no_more(seed: int) -> None:
    priced = AdditiveEstimator(SPACE, synthetic_table(SPACE, seed))
    costs = ("latency_ms", "latency_p95_ms")
    masks = find_masks(SPACE, priced, costs)
    repaired = masks.repair(EVERY)
    np.testing.assert_array_equal(masks.repair(repaired), repaired)
    before, after = priced.price(EVERY)[:, :2], priced.price(repaired)[:, :2]
    assert (after <= before * (1 + 1e-9)).all()
    np.testing.assert_array_equal(repaired[::7], masks.repair(EVERY[::7]))  # a row does not depend on its neighbours
    np.testing.assert_array_equal(masks.repair(EVERY[5]), repaired[5:6])
    assert masks.repair(EVERY[:0]).shape == EVERY[:0].shape
    np.testing.assert_array_equal(SPACE.canonical(repaired), masks.repair(SPACE.canonical(repaired)))


def test_many_rows_are_repaired_as_few_are() -> None:
    masks = masks_of(unaligned)
    many = SPACE.sample(np.random.default_rng(0), nas.masks.CHUNK + 100)
    kept = many.copy()
    repaired = masks.repair(many)
    np.testing.assert_array_equal(many, kept)
    np.testing.assert_array_equal(repaired[-100:], masks.repair(many[-100:]))


def test_candidates_keep_their_ids() -> None:
    """So that what was evaluated on one device answers for it on another, whose masks are others."""
    ids = SPACE.canonical_ids(EVERY)
    here, there = masks_of(unaligned), masks_of(slow_when_small)
    assert SPACE.canonical_ids(EVERY) == ids == Staged().canonical_ids(EVERY)
    shared = (here.repair(EVERY) == EVERY).all(axis=1) & (there.repair(EVERY) == EVERY).all(axis=1)
    assert shared.sum() > 100


# ---- dormant genes -----------------------------------------------------------------------------------


class Sleepy(Staged):
    """Stage 1 may be missing; a fallback is read by plain stages only, a sparsity by the training alone; int8 first."""

    def __init__(self) -> None:
        super().__init__(bits=(8, 32))
        self.choices = (
            *self.choices,
            Choice("stages", (1, 2)),
            Choice("fallback", ("slow", "fast")),
            Choice("sparsity", (0.5, 0.0), plain=0.0),
        )
        self.treatments = {**self.treatments, "sparsity": self._sparse}

    def _stage(self, c: Candidate, s: int) -> Any:
        if s == 1 and c["stages"] == 1:
            return None
        part = super()._stage(c, s)
        return part if part.precision == "int8" or c["fallback"] == "fast" else (part, part)

    def _between(self, c: Candidate) -> Part | None:
        return None if c["stages"] == 1 else super()._between(c)

    def _output(self, c: Candidate) -> Part | None:
        return None if c["stages"] == 1 else super()._output(c)

    def _treated(self, c: Candidate, s: int) -> Any:
        return None if s == 1 and c["stages"] == 1 else super()._treated(c, s)

    def _sparse(self, c: Candidate) -> Training | None:
        return None if c["stages"] == 1 else Training(compression={"sparse": {"share": c["sparsity"]}})


def test_dormant_genes_neither_decide_nor_change() -> None:
    """int8 takes 1.5 times as long as the fast fallback; but where that is dormant, it may be the slow one."""
    space = Sleepy()
    rows = space.sample(np.random.default_rng(0), 4000)
    priced = AdditiveEstimator(
        space, table(lambda part: macs(part) * (1.5 if part.precision == "int8" else 1.0), space)
    )
    masks = find_masks(space, priced, ["latency_ms"])
    repaired = masks.repair(rows)
    np.testing.assert_array_equal(masks.repair(repaired), repaired)
    canonical = space.canonical(repaired)
    np.testing.assert_array_equal(masks.repair(canonical), canonical)
    np.testing.assert_array_equal(space.canonical(masks.repair(space.canonical(rows))), canonical)
    dormant = ~space.active(rows)
    np.testing.assert_array_equal(repaired[dormant & ~space.active(repaired)], rows[dormant & ~space.active(repaired)])

    sparsity, stages = space.position["sparsity"], space.position["stages"]
    np.testing.assert_array_equal(repaired[:, sparsity], np.where(rows[:, stages] == 1, 1, rows[:, sparsity]))
    assert next(form for form in masks.forms if form.name == "sparsity=0.5").everywhere
    bits = [space.position[f"stage{s}.bits"] for s in STAGES]
    # Both stages in int8: nothing reads the fallback, which may be the slow one.
    both_int8 = (rows[:, bits] == 0).all(axis=1) & (rows[:, stages] == 1)
    np.testing.assert_array_equal(repaired[both_int8][:, bits], rows[both_int8][:, bits])


# ---- searches ----------------------------------------------------------------------------------------


class Simulated(Evaluator):
    """A made-up quality that every compression lowers; remembers what it was given."""

    def __init__(self) -> None:
        self.genomes = list[Genomes]()

    def evaluate(self, row: Genomes, fidelity: float = 1.0) -> Evaluation:
        self.genomes.append(row.copy())
        c = SPACE.decode(row)
        lost = sum(0.02 * (c[f"stage{s}.bits"] == 8) + 0.1 * float(c[f"stage{s}.prune"]) for s in STAGES)
        gained = sum(0.03 * math.log2(int(c[f"stage{s}.width"]) * int(c[f"stage{s}.depth"])) for s in STAGES)
        return Evaluation(0.5 + gained - lost + 0.04 * (c["resolution"] == 224))


def search(
    path: Path, kind: str, masked: bool, trials: int, evaluator: Evaluator, seed: int = 1, **settings: Any
) -> tuple[list[Trial], SearchController, Masks]:
    priced = estimator(lambda part: slow_when_small(part) * unaligned(part) / half(part))
    limits = (Limit("latency_ms", float(np.quantile(priced.price(EVERY)[:, 0], 0.5))),)
    reward = MnasNetSoft(limits[0].limit)
    masks = find_masks(SPACE, priced, ["latency_ms"]) if masked else Masks(SPACE)
    domain = replace(
        domain_of(SPACE), kinds=SPACE.kinds, objective=objective(priced, limits, reward), repair=masks.repair
    )
    strategy: Strategy = strategies.get(kind)(domain, seed)
    controller = SearchController(
        space=SPACE, strategy=strategy, estimator=priced, executor=Serial(evaluator), reward=reward, limits=limits,
        study=Study(path, "search", SPACE, {}), budget=Budget(trials), **settings,
    )  # fmt: skip
    return controller.run(), controller, masks


SEARCHED = [
    "random",
    "evolution",
    "nsga2",
    "local-search",
    "reinforce",
    "ppo",
    "default",
    "halving:evolution",
    "optuna:TPESampler",
]


@pytest.mark.parametrize("kind", SEARCHED)
def test_a_masked_candidate_is_never_trained(tmp_path: Path, kind: str) -> None:
    evaluator = Simulated()
    trials, controller, masks = search(tmp_path / "study.jsonl", kind, True, 16, evaluator)
    rows = np.array(evaluator.genomes)
    np.testing.assert_array_equal(masks.repair(rows), rows)
    assert masks.moves
    assert len(rows) == len(trials) >= 16
    assert len({SPACE.canonical_id(row) for row in rows}) == len(rows) or kind.startswith("halving")
    assert all(trial.violation == 0 for trial in trials)
    assert controller.counts.asked == len(trials) + controller.counts.infeasible + controller.counts.duplicates


def test_the_whole_space_has_the_same_best_with_fewer_trainings(tmp_path: Path) -> None:
    free, _, _ = search(tmp_path / "free.jsonl", "random", False, 5000, Simulated(), batch=100)
    masked, controller, masks = search(tmp_path / "masked.jsonl", "random", True, 5000, Simulated(), batch=100)
    assert max(t.reward for t in masked) == max(t.reward for t in free)
    feasible = controller.strategy.domain.objective
    assert feasible is not None
    left = np.unique(masks.repair(EVERY), axis=0)
    left = left[feasible.violation(feasible.price(left)) == 0]
    assert len(masked) == len(left) < 0.6 * len(free)  # exhausted: every repaired candidate once
    surrogate = Surrogate(controller.strategy.domain)
    assert surrogate._everything is not None  # which searches a small space as a whole
    np.testing.assert_array_equal(surrogate._everything.genomes, np.unique(SPACE.canonical(left), axis=0))


def test_a_search_with_masks_resumes_exactly(tmp_path: Path) -> None:
    for kind in ("evolution", "default", "reinforce"):
        whole, _, _ = search(tmp_path / f"{kind}-whole.jsonl", kind, True, 16, Simulated())
        search(tmp_path / f"{kind}-cut.jsonl", kind, True, 8, Simulated())
        evaluator = Simulated()
        again, _, _ = search(tmp_path / f"{kind}-cut.jsonl", kind, True, 16, evaluator)
        assert plain(again) == plain(whole)
        assert len(evaluator.genomes) == 8


def test_enqueued_candidates_are_what_was_asked_for(tmp_path: Path) -> None:
    """A masked value that somebody asks for is tried; what is left open is repaired."""
    wanted = {"resolution": 32, "stage1.bits": 8, "stage1.width": 16, "stage0.prune": UNALIGNED}
    trials, _, masks = search(
        tmp_path / "study.jsonl", "evolution", True, 6, Simulated(), enqueue=[wanted, {"resolution": 32}]
    )
    first, second = (SPACE.decode(trial.genome) for trial in trials[:2])
    assert {name: first[name] for name in wanted} == wanted
    assert first["stage1.prune"] != UNALIGNED
    np.testing.assert_array_equal(masks.repair(np.array(trials[1].genome)), [trials[1].genome])
    assert second["resolution"] == 32
    np.testing.assert_array_equal(
        masks.repair(np.array([t.genome for t in trials[2:]])), [t.genome for t in trials[2:]]
    )


def test_masks_leave_no_strategy_worse_off(tmp_path: Path) -> None:
    """Equal budgets, several seeds: the mean of the best rewards does not fall."""
    found = {
        masked: [
            max(
                t.reward
                for t in search(tmp_path / f"{masked}{seed}.jsonl", "evolution", masked, 12, Simulated(), seed)[0]
            )
            for seed in range(8)
        ]
        for masked in (True, False)
    }
    assert np.mean(found[True]) >= np.mean(found[False]) - 1e-3


# ---- the job, and what it says -----------------------------------------------------------------------


def job(tmp_path: Path, *overrides: str) -> tuple[Job, LatencyTable]:
    """A job whose int8 takes three times as long."""
    small = {**SMALL, "table": {"path": str(tmp_path / "table.json")}}
    made = Job(load_experiment(small, list(overrides)), tmp_path / "run")
    slow = table(lambda part: macs(part) * (3.0 if part.precision == "int8" else 1.0), made.space)
    slow.save(tmp_path / "table.json")
    return made, slow


def found(tmp_path: Path, *overrides: str) -> set[str]:
    made, slow = job(tmp_path, *overrides)
    whole = {"latency_ms": 1.0, "latency_p95_ms": 1.0, "size_bytes": 1e5}
    limits = made.limits(whole)
    return {f.name for f in made.masks(made.estimator(slow), limits, made.reward(limits, whole)).forms}


def test_limits_reward_and_strategy_are_the_objective(tmp_path: Path) -> None:
    int8 = {"stage0.bits=8", "stage1.bits=8"}
    assert int8 <= found(tmp_path)
    assert found(tmp_path, "search.mask=false") == set()
    assert not int8 & found(tmp_path, "budget.size=50%")
    weighted = "reward={kind: weighted_product, weights: {latency_ms: -0.07, size_bytes: -0.03}}"
    assert not int8 & found(tmp_path, weighted)
    for strategy in (
        "{kind: nsga2, objectives: [quality, size_bytes]}",
        "{kind: 'halving:random', by: front}",
        "{kind: 'halving:nsga2', wrapped: {objectives: [quality, size_bytes]}}",
        "{kind: 'optuna:NSGAIISampler', objectives: [quality, size_bytes]}",
    ):
        assert not int8 & found(tmp_path, f"strategy={strategy}"), strategy
    assert int8 <= found(tmp_path, "strategy={kind: nsga2, objectives: [quality, latency_ms]}")


def test_settings_that_name_costs_are_accepted_at_the_door(tmp_path: Path) -> None:
    job(tmp_path, "strategy={kind: nsga2, objectives: [quality, latency_ms]}")[0].check_keys()


def test_a_dry_run_says_what_would_be_masked(tmp_path: Path) -> None:
    made, _ = job(tmp_path)
    lines = forecast(made.experiment)
    said = next(line for line in lines if line.startswith("masked on this device"))
    assert "stage0.bits=8 everywhere (latency_ms +" in said


def test_a_run_begun_before_there_were_masks_goes_on_without_them(tmp_path: Path) -> None:
    made, _ = job(tmp_path)
    now, without = made.experiment, job(tmp_path, "search.mask=false")[0].experiment
    old = now.plain()
    del old["search"]["mask"]
    assert "mask" not in without.identity["search"]
    made.run.mkdir()
    (made.run / "experiment.yaml").write_text(yaml.safe_dump(old))
    with pytest.raises(StudyError, match="search changed"):
        open_run(now, made.run, resume=True)
    open_run(without, made.run, resume=True)
    with pytest.raises(StudyError, match="search changed"):
        open_run(now, made.run, resume=True)


def test_the_report_shows_masks_and_why() -> None:
    masks = masks_of(lambda part: slow_when_small(part) * unaligned(part) / half(part))
    summary: dict[str, Any] = {
        "schema_version": 1,
        "name": "x",
        "rows": [],
        "trials": [],
        "finalists": [],
        "limits": [],
    }
    forms = json.loads(json.dumps([form.plain_form() for form in masks.forms], allow_nan=False))
    page = render({**summary, "masks": {"on": True, "costs": list(masks.costs), "forms": forms}})
    assert "Compression that does not pay on this device" in page
    for form in masks.forms:
        assert form.name in page
        assert form.scope in page
    assert page.index(f"stage0.prune={UNALIGNED}") < page.index("stage1.bits=8")  # everywhere comes first
    assert "what it adds: median latency" in page
    assert "search.mask is false" in render({**summary, "masks": {"on": False, "costs": [], "forms": []}})
    assert "Nothing was masked: by the latency table" in render(
        {**summary, "masks": {"on": True, "costs": ["size_bytes"], "forms": []}}
    )
    assert "does not pay" not in render(summary)  # an older run's


def test_one_line_for_people() -> None:
    masks = masks_of(lambda part: slow_when_small(part) * unaligned(part) / half(part))
    assert note(masks, most=2).startswith(
        "masked on this device, better on no cost in the objective: stage0.prune=0.3 everywhere ("
    )
    assert note(masks, most=2).endswith("; and 1 more, see the report")
    assert MnasNetHard(1.0).costs == ("latency_ms",)
