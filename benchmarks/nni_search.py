"""The hub's MobileNetV3Space searched on MNIST to measured students: our default strategy, and NNI's evolution.

    python benchmarks/nni_search.py --data PATH/mnist.npz --trials 16 --seeds 0,1,2

Every arm has the same number of trainings of the same length, by the same function: distilled by the same teacher, a
ResNet-8 that somebody has. Latencies are predicted by the same table. Of each arm the best candidate within the budget,
by prediction, has the same long training, is exported, and is measured beside the others' and the teacher, interleaved.

- `ours`, `random`: labels and compression are one genome; what breaks the budget by prediction is never trained.
  `ours, labels` searches what NNI does, with NNI's one precision.
- `NNI …`: RegularizedEvolution over the labels, run by NNI's sequential engine. NNI knows neither latency nor
  compression: it is given one precision for all layers, that at which more of the space is within the budget, and a
  metric, the accuracy or our reward R of accuracy and predicted latency. `filter` has NNI's Filter refuse what breaks
  the budget, by our prices. With its default population of 100 so few trainings would be random search, so the
  population is a third of the trainings and a tournament half of that; our strategy is as it comes.

What several arms ask for is trained once and counted for each. Needs NNI. --out keeps runs, which are not repeated, and
gets `nni_search.json` and the tables, `nni_search.md`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import own_model
import torch
from safetensors.torch import save_file

from nas.arms import measure_finalists, search_arm
from nas.controller import best, evaluate_one
from nas.errors import TrainingError
from nas.evaluators import Distil
from nas.evaluators.base import Evaluation, Evaluator
from nas.executors import Serial
from nas.experiment import load_experiment
from nas.genes import Genomes, Value
from nas.job import Job, open_run, screening, teacher_costs
from nas.latency import CostEstimator, LatencyTable
from nas.masks import Masks
from nas.nni import NniSpace
from nas.reward import Limit, Reward, violation
from nas.space import SearchSpace
from nas.strategies.base import COMPLETE, FAILED
from nas.student.finalists import Entrant, Finalist
from nas.student.teacher import onnx_logits
from nas.study import Trial
from nas.tasks import tasks

NNI = "nni_hub:MobileNetV3Space"
ARGS = {
    "base_widths": [16, 16, 24, 40, 80, 96, 128],
    "width_multipliers": [0.5, 1.0, 2.0],
    "stride": [2, 1, 2, 2, 1, 1, 1],
    "activation": ["relu"] * 7,
    "squeeze_excite": ["none", "none", "none", "optional"],
    "depth_range": [1, 2],
}
OURS = {"ours": "search", "random": "random"}  # as nas.arms calls them
LABELS = "ours, labels"
REWARD, FILTER, ACCURACY = "NNI, R", "NNI, R, filter", "NNI, accuracy"
ARMS = ("ours", LABELS, REWARD, FILTER, ACCURACY, "random")
SAMPLE = 5_000  # random models, for shares of the space


@dataclass(frozen=True)
class Remembered(Distil):
    """Trains a candidate once, whichever arms ask for it: its quality is a function of the candidate and the seed."""

    known: dict[str, Evaluation] = field(default_factory=dict)

    def evaluate(self, genome: Genomes, fidelity: float = 1.0) -> Evaluation:
        identity = self.space.canonical_id(genome)
        if identity not in self.known:
            start = time.monotonic()
            found = super().evaluate(genome, fidelity)
            self.known[identity] = replace(found, seconds=time.monotonic() - start)
        return self.known[identity]

    def seconds(self, trial: Trial) -> float:
        """What a trial's training took, also where another arm had asked for it."""
        known = self.known.get(self.space.canonical_id(np.array(trial.genome)))
        return trial.seconds if known is None else known.seconds


@dataclass(frozen=True)
class Within(Evaluator):
    """Trains candidates of a part of the space as those of the whole."""

    student: Remembered
    part: SearchSpace
    fixed: dict[str, Value]

    def evaluate(self, genome: Genomes, fidelity: float = 1.0) -> Evaluation:
        return self.student.evaluate(self.whole(genome), fidelity)

    def whole(self, genome: Genomes) -> Genomes:
        """The candidate in the whole space."""
        return genome_of(self.student.space, self.part.decode(genome).as_dict(), self.fixed)


@dataclass
class Setting:
    """What all arms of a seed have in common.

    Attributes:
        limits: the budget; ``screen`` is it for predictions, tighter by the table's error.
        fixed: the compression of NNI's candidates.
    """

    job: Job
    student: Remembered
    table: LatencyTable
    estimator: CostEstimator
    limits: tuple[Limit, ...]
    screen: tuple[Limit, ...]
    reward: Reward
    masks: Masks
    fixed: dict[str, Value]

    @property
    def space(self) -> NniSpace:
        """NNI's, as ours."""
        return cast(NniSpace, self.job.space)

    def trained(self, genome: Genomes, index: int) -> Trial:
        """Train a candidate that was proposed elsewhere, whatever it costs."""
        found = evaluate_one(self.student, (genome, 1.0))
        costs, names = self.estimator.price(genome), self.estimator.costs
        reward = float("nan") if found.failed else float(self.reward.score([found.quality], costs, names)[0])
        return Trial(
            index, tuple(genome.tolist()), 0, FAILED if found.failed else COMPLETE,
            dict(zip(names, costs[0].tolist(), strict=True)), self.violation(genome), found.quality, reward,
            found.reason, found.seconds,
        )  # fmt: skip

    def violation(self, genome: Genomes) -> float:
        """By how much of the budget a candidate exceeds it by prediction."""
        return float(violation(self.estimator.price(genome), self.estimator.costs, self.screen)[0])


# ---- the setting ---------------------------------------------------------------------------------------------


def prepare(told: argparse.Namespace) -> dict[str, Any]:
    """Data and a trained teacher in the folder; returns the experiment on them, for every seed."""
    told.out.mkdir(parents=True, exist_ok=True)
    data, weights = told.out / "mnist.npz", told.out / "teacher.safetensors"
    # One split for all seeds: the teacher knows its own training images.
    section = {"data": str(data), "seed": 0, "valid": 0.3, "shift": 2, "limit": told.images}
    if not weights.exists():
        np.savez(data, **own_model.mnist(told.data.parent))
        torch.manual_seed(0)
        model = own_model.mnist_resnet8()
        own_model.train_teacher(model, tasks.get("classification")(**section), told.teacher_epochs, 1e-2, 0)
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, weights)
    return {
        "name": "nni-search", "task": section, "reward": {"kind": "mnasnet_hard"}, "budget": {"latency": told.budget},
        "space": {"nni": NNI, "args": ARGS, "kd_weights": [0.7], "temperatures": [4.0]},
        "teacher": {"model": "own_model:mnist_resnet8", "weights": str(weights)},
        "table": {"seconds": told.table_seconds, "nets": 24},
        "search": {"trials": told.trials, "batch": 1, "workers": 0},
        "training": {"epochs": told.epochs, "compressed_epochs": max(1, told.epochs // 3), "views": 4},
        "finalists": {
            "count": told.finalists, "epochs": told.finalist_epochs,
            "compressed_epochs": max(1, told.finalist_epochs // 3),
        },
    }  # fmt: skip


def setting(told: argparse.Namespace, raw: dict[str, Any], seed: int) -> Setting:
    """Table, teacher, budget and reward of a seed."""
    experiment, run = load_experiment({**raw, "seed": seed}), told.out / f"seed{seed}"
    open_run(experiment, run, resume=True)
    job = Job(experiment, run)
    with job.executor(job.untaught) as workers:
        table, teacher = job.table(workers), job.teacher(workers)
    job.time_teacher(teacher)
    whole = teacher_costs(run)
    limits, estimator = job.limits(whole), job.estimator(table)
    screen, reward = screening(limits, job.errors(table)), job.reward(limits, whole)
    student = job.student(teacher)
    taught = {f: getattr(student, f) for f in ("space", "task", "lessons", "recipe", "seed")}
    return Setting(
        job, Remembered(**taught), table, estimator, limits, screen, reward, job.masks(estimator, screen, reward),
        by_hand(job.space, estimator, screen),
    )  # fmt: skip


def by_hand(space: SearchSpace, estimator: CostEstimator, screen: tuple[Limit, ...]) -> dict[str, Value]:
    """Every choice of compression at one precision for all layers, that at which more of the space fits."""
    rest = [choice for choice in space.choices if choice.technique != "architecture"]
    offered = {value for choice in rest if choice.technique == "quantization" for value in choice.values}
    options = [
        {c.name: bits if c.technique == "quantization" else c.values[0] if c.plain is None else c.plain for c in rest}
        for bits in sorted(offered, reverse=True)
    ]  # fmt: skip
    return max(options, key=lambda fixed: share_within(space, estimator, screen, fixed))


def share_within(
    space: SearchSpace, estimator: CostEstimator, screen: tuple[Limit, ...], fixed: dict[str, Value]
) -> float:
    """Share of random models within the budget by prediction, with some choices fixed."""
    genomes = space.sample(np.random.default_rng(0), SAMPLE)
    for gene, value in space.encode_partly(fixed).items():
        genomes[:, gene] = value
    return float((violation(estimator.price(genomes), estimator.costs, screen) == 0).mean())


def genome_of(space: SearchSpace, sample: dict[str, Any], fixed: dict[str, Value]) -> Genomes:
    """The candidate of a sample of NNI, whose labels have numbers and words for values."""
    return space.encode({choice.name: {**sample, **fixed}[choice.name] for choice in space.choices})


# ---- NNI -----------------------------------------------------------------------------------------------------


def evolve(given: Setting, arm: str, trials: int, seed: int) -> list[Trial]:
    """NNI's RegularizedEvolution over NNI's own space, with NNI's engine; what was trained, in its order."""
    import nni
    from nni.nas.evaluator import FunctionalEvaluator
    from nni.nas.execution import SequentialExecutionEngine
    from nni.nas.space import ExecutableModelSpace, RawFormatModelSpace
    from nni.nas.strategy import RegularizedEvolution
    from nni.nas.strategy.middleware import Chain, Filter

    done: list[Trial] = []

    def genome(model: ExecutableModelSpace) -> Genomes:
        return genome_of(given.space, model.sample, given.fixed)

    def evaluate(_: torch.nn.Module) -> None:
        trial = given.trained(genome(nni.get_current_parameter()), len(done))
        done.append(trial)
        if trial.status == FAILED:
            raise TrainingError(trial.reason)
        nni.report_final_result(trial.quality if arm == ACCURACY else trial.reward)

    population = max(4, trials // 3)
    strategy = RegularizedEvolution(population_size=population, sample_size=population // 2, seed=seed)
    if arm == FILTER:
        strategy = Chain(strategy, Filter(lambda model: given.violation(genome(model)) == 0))
    engine = SequentialExecutionEngine(max_model_count=trials, continue_on_failure=True)
    strategy(RawFormatModelSpace(given.space.model_space, FunctionalEvaluator(evaluate)), engine)
    return done


def labels_alone(given: Setting) -> list[Trial]:
    """Our default strategy over the labels, with the compression of NNI's candidates."""
    whole = given.job.experiment
    offered = {c.technique: [given.fixed[c.name]] for c in given.space.choices if c.technique != "architecture"}
    section = whole.space.model_copy(update={"bits": offered["quantization"], "prune": offered["pruning"]})
    job = Job(whole.model_copy(update={"space": section}), given.job.run / "labels")
    evaluator = Within(given.student, job.space, given.fixed)
    found, _ = search_arm(
        job, "search", Serial(evaluator), job.estimator(given.table), given.screen, given.reward, Masks(job.space)
    )
    return [replace(trial, genome=tuple(evaluator.whole(np.array(trial.genome)).tolist())) for trial in found]


# ---- a seed --------------------------------------------------------------------------------------------------


def searched(given: Setting, arm: str, trials: int, seed: int) -> list[Trial]:
    """The trainings of one arm."""
    if arm == LABELS:
        return labels_alone(given)
    if arm not in OURS:
        return evolve(given, arm, trials, seed)
    found, _ = search_arm(
        given.job, OURS[arm], Serial(given.student), given.estimator, given.screen, given.reward, given.masks
    )
    return found


def run(told: argparse.Namespace, raw: dict[str, Any], seed: int) -> dict[str, Any]:
    """All arms of a seed, their finalists measured side by side; kept in the seed's folder."""
    kept = told.out / f"seed{seed}" / "nni_search.json"
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    given = setting(told, raw, seed)
    arms = told.arms.split(";")
    trials = {arm: searched(given, arm, told.trials, seed) for arm in arms}
    entrants = [
        Entrant(folder_name(arm), t.index, t.genome, t.quality, t.costs)
        for arm, own in trials.items() for t in best(own, told.finalists)
    ]  # fmt: skip
    finalists, session = measure_finalists(
        given.job, entrants, Serial(given.student), given.reward, given.limits, given.table
    )
    x, y = given.job.task.split("test")
    teacher = given.job.run / "teacher.onnx"
    result = {
        "seed": seed, "budget_ms": given.limits[0].limit, "table_error": given.table.error("latency_ms").mape,
        "precision": sorted({given.fixed[c.name] for c in given.space.choices if c.technique == "quantization"}),
        "share": share_within(given.space, given.estimator, given.screen, {}),
        "share_by_hand": share_within(given.space, given.estimator, given.screen, given.fixed),
        "teacher": {
            "test": given.job.task.quality(onnx_logits(teacher, x), y.numpy()),
            "p50_ms": session.timings["teacher"].p50, "size_bytes": teacher.stat().st_size,
        },
        "arms": {
            arm: {**spent(given.student, own), **judged(given.job, arm, finalists, x, y.numpy())}
            for arm, own in trials.items()
        },
    }  # fmt: skip
    kept.write_text(json.dumps(result, indent=1))
    return result


def folder_name(arm: str) -> str:
    """Of an arm, for files."""
    return arm.replace(", ", "-").replace(" ", "").lower()


def spent(student: Remembered, trials: Sequence[Trial]) -> dict[str, Any]:
    """What an arm's trainings went to."""
    return {
        "trained": len(trials),
        "over": sum(trial.violation > 0 for trial in trials),
        "repeated": len(trials) - len({student.space.canonical_id(np.array(t.genome)) for t in trials}),
        "failed": sum(trial.status == FAILED for trial in trials),
        "seconds": sum(student.seconds(trial) for trial in trials),
        "best_valid": max((t.quality for t in best(list(trials), 1)), default=None),
    }


def judged(job: Job, arm: str, finalists: Sequence[Finalist], x: torch.Tensor, y: Any) -> dict[str, Any]:
    """The student of an arm: its best finalist as measured, on test data; nothing where it found none."""
    own = next((f for f in finalists if f.entrant.arm == folder_name(arm)), None)
    if own is None:
        return {"test": None}
    return {
        "test": job.task.quality(onnx_logits(own.folder / "model.onnx", x), y), "p50_ms": own.timing.p50,
        "predicted_ms": own.entrant.costs["latency_ms"], "within": own.feasible, "size_bytes": own.size_bytes,
        "candidate": job.space.decode(np.array(own.entrant.genome)).as_dict(),
    }  # fmt: skip


# ---- tables --------------------------------------------------------------------------------------------------

COLUMNS: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], float], str]] = {
    "test accuracy %": (lambda own, result: 100 * own["test"], ".2f"),
    "points lost": (lambda own, result: 100 * (result["teacher"]["test"] - own["test"]), ".2f"),
    "p50 ms": (lambda own, result: own["p50_ms"], ".4f"),
    "% of the budget": (lambda own, result: 100 * own["p50_ms"] / result["budget_ms"], ".1f"),
    "× faster": (lambda own, result: result["teacher"]["p50_ms"] / own["p50_ms"], ".2f"),
    "predicted / measured": (lambda own, result: own["predicted_ms"] / own["p50_ms"], ".3f"),
    "KiB": (lambda own, result: own["size_bytes"] / 1024, ".0f"),
    "× smaller": (lambda own, result: result["teacher"]["size_bytes"] / own["size_bytes"], ".1f"),
}
SPENT = {"trained": "trained", "over": "over the budget", "repeated": "repeated", "seconds": "seconds of training"}


def headline(result: dict[str, Any]) -> str:
    """Machine, teacher, budget and table."""
    teacher = result["teacher"]
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, one thread; teacher "
        f"{100 * teacher['test']:.2f} %, {teacher['p50_ms']:.4f} ms, {teacher['size_bytes'] / 1024:.0f} KiB; budget "
        f"{result['budget_ms']:.4f} ms, met by {100 * result['share']:.1f} % of genomes and "
        f"{100 * result['share_by_hand']:.1f} % of models with {result['precision']} bits; table's mean error "
        f"{100 * result['table_error']:.1f} %"
    )


def by_seed(results: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown: a line for each seed and arm."""
    head = ["seed", "arm", *COLUMNS, *SPENT.values()]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for result in results:
        for arm, own in result["arms"].items():
            found = own["test"] is not None
            cells = [f"{of(own, result):{form}}" if found else "–" for of, form in COLUMNS.values()]
            cells += [f"{own[key]:.0f}" for key in SPENT]
            lines.append(f"| {' | '.join([str(result['seed']), arm, *cells])} |")
    return lines


def summary(results: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown: mean ± standard deviation over the seeds at which an arm has a student; ratios within a seed."""
    head = ["arm", "students", *COLUMNS, *SPENT.values()]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for arm in results[0]["arms"]:
        rows = [(result["arms"][arm], result) for result in results]
        found = [row for row in rows if row[0]["test"] is not None]
        cells = [spread([of(*row) for row in found], form) for of, form in COLUMNS.values()]
        cells += [f"{statistics.mean(own[key] for own, _ in rows):.1f}" for key in SPENT]
        lines.append(f"| {' | '.join([arm, str(len(found)), *cells])} |")
    return lines


def spread(values: Sequence[float], form: str) -> str:
    """Mean ± standard deviation."""
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}"


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="mnist.npz")
    parser.add_argument("--out", type=Path, default=Path("runs") / "nni-search")
    parser.add_argument("--trials", type=int, default=16, help="trainings of each arm")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--arms", default=";".join(ARMS), help="separated by semicolons")
    parser.add_argument("--images", type=int, default=3000, help="for training and validation together")
    parser.add_argument("--budget", default="35%", help="of the teacher's p50, or milliseconds")
    parser.add_argument("--epochs", type=int, default=3, help="of a candidate")
    parser.add_argument("--finalists", type=int, default=1, help="of each arm")
    parser.add_argument("--finalist-epochs", type=int, default=12)
    parser.add_argument("--teacher-epochs", type=int, default=8)
    parser.add_argument("--table-seconds", type=float, default=60.0)
    told = parser.parse_args(given)
    if unknown := [arm for arm in told.arms.split(";") if arm not in ARMS]:
        parser.error(f"unknown arms {unknown}; there are {', '.join(ARMS)}, separated by semicolons")
    return told


def main() -> None:
    """Run everything; print a line per seed and the tables, and write them into --out."""
    told = arguments()
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)  # NNI warns of every model beyond the last
    warnings.simplefilter("ignore")
    start = time.monotonic()
    raw, results = prepare(told), []
    for seed in map(int, told.seeds.split(",")):
        results.append(run(told, raw, seed))
        print(json.dumps(results[-1]), flush=True)
    lines = [f"{headline(results[0])}; {time.monotonic() - start:.0f} s", "", *summary(results), "", *by_seed(results)]
    (told.out / "nni_search.json").write_text(json.dumps(results, indent=1))
    (told.out / "nni_search.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
