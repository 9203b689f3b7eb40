"""Contract checks that anybody can run on a plug-in of their own: space, strategy, reward, pass, evaluator.

Each raises AssertionError and says which clause of the contract is broken, and by what::

    from nas.testing import check_space

    def test_my_space():
        check_space(MySpace(TaskInfo((3, 32, 32), classes=10)))
"""

from __future__ import annotations

import copy
import itertools
import pickle
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
from torch import nn

from nas.compression import Pass, apply_passes
from nas.compression.fold import fold_batchnorm
from nas.errors import CompressionError, RewardError, SpaceError
from nas.evaluators import Evaluation, Evaluator
from nas.latency import AdditiveEstimator, Device, LatencyTable
from nas.latency.fit import FitError, LinearFit
from nas.latency.measure import Timing
from nas.latency.runtimes.onnxruntime_cpu import session_options
from nas.latency.table import Entry
from nas.reward import Array, Reward, SingleCost
from nas.space import Candidate, Genomes, SearchSpace, TaskInfo
from nas.strategies.base import (
    ASKED,
    COMPLETE,
    DUPLICATE,
    EARLIER,
    ENQUEUED,
    FAILED,
    SCREENED,
    Domain,
    Outcomes,
    Proposals,
    Strategy,
)
from nas.student.export import export_float, onnx_macs_params, to_onnx

SAMPLES = 64
FLOAT_TOLERANCE, INT8_TOLERANCE = 1e-4, 0.05  # root mean square, of the largest output
BATCHES = (1, 3)


def _require(condition: bool, message: str) -> None:
    # Not an assert statement: these checks must hold under ``python -O`` too.
    if not condition:
        raise AssertionError(message)


# ---- spaces ------------------------------------------------------------------------------------------


def check_space(
    space: SearchSpace, *, candidates: int = 100, seed: int = 0, export: bool = True, info: TaskInfo | None = None
) -> None:
    """Check a search space on random genomes.

    Genomes and candidates convert into each other; whatever ``build`` reads is read by a site or by the training;
    dormant genes change nothing; the compiled price is the sum over the parts; and the parts have the MACs and
    parameters of the model that is really exported, which runs and agrees with PyTorch.

    Args:
        candidates: how many random genomes.
        export: whether every one of them is built, compressed and exported (up to about a second each).
        info: shapes of the data; by default the space's own ``task``.

    Raises:
        AssertionError: names the clause that is broken and the candidate that breaks it.
    """
    _check_choices(space)
    rng = np.random.default_rng(seed)
    genomes = space.sample(rng, candidates)
    others = space.sample(rng, candidates)
    for genome, other in zip(genomes, others, strict=True):
        _check_round_trip(space, genome)
        _check_reads(space, genome)
        _check_dormant(space, genome, other)
    _check_price(space, genomes, seed)
    if export:
        info = info or getattr(space, "task", None)
        if info is None:
            raise AssertionError(f"{space.name}: pass info=TaskInfo(…), or keep it as the space's attribute 'task'.")
        for genome in genomes:
            _check_export(space, genome, info, seed)


def synthetic_table(space: SearchSpace, seed: int = 0) -> LatencyTable:
    """A table for every key of ``space`` whose times are a function of (seed, key): nothing is measured.

    Times grow with the MACs and are off by a key's own random factor; fits are not trivial, so that prices feel them.
    """
    entries = {}
    for key, part in space.keys().items():
        luck = np.random.default_rng((seed, zlib.crc32(key.encode()))).lognormal(0.0, 0.3)
        value = float((2e-3 + part.macs / part.count * 1e-8) * luck)
        entries[key] = Entry(Timing(value, 1.2 * value, 1.05 * value, 100, 0.01), value, {"Conv": 1})
    fits = {
        "latency_ms": LinearFit((0.9, 0.95, 1.1), (-2e-4, 1e-4, 2e-4), 0.01),
        "latency_p95_ms": LinearFit((0.92, 0.97, 1.2), (-1e-4, 1e-4, 3e-4), 0.015),
        "size_bytes": LinearFit((1.01, 1.05, 1.0), (250.0, 400.0, 300.0), 900.0),
    }
    return LatencyTable(
        space=space.name,
        device=Device("synthetic", "synthetic", 1, "onnxruntime", "0", 1, 1).as_dict(),
        entries=entries,
        fits=fits,
        errors={cost: FitError(0.01, 1.0, 1.0, 0.99, 20) for cost in fits},
        noise=0.01,
        nets=[{"predicted_ms": 0.11, "measured_ms": 0.1, "plain_sum_ms": 0.12}],
        protocol={"method": "synthetic", "seed": seed},
        date="2000-01-01T00:00:00+00:00",
        nas_version="0",
    )


def _at(space: SearchSpace, genome: Genomes) -> str:
    return f"{space.name}, candidate {space.decode(genome).as_dict()}"


def _check_choices(space: SearchSpace) -> None:
    names = [choice.name for choice in space.choices]
    _require(len(set(names)) == len(names), f"{space.name}: two choices have one name among {names}.")
    for offer in (space.ladder, space.uniform):
        try:
            members = offer()
        except SpaceError:  # a space need not offer teachers
            continue
        for member in members:
            genome = space.encode(member)
            _require(space.decode(genome).as_dict() == member.as_dict(), f"{space.name}: {member} is not of the space.")


def _check_round_trip(space: SearchSpace, genome: Genomes) -> None:
    candidate = space.decode(genome)
    again = space.encode(candidate)
    _require(np.array_equal(genome, again), f"{_at(space, genome)}: encode(decode({genome})) is {again}.")
    _require(space.decode(again).as_dict() == candidate.as_dict(), f"{_at(space, genome)}: decode is not repeatable.")


def _check_reads(space: SearchSpace, genome: Genomes) -> None:
    priced = _reads(space, space.parts, genome)
    trained = _reads(space, space.training, genome)
    unpriced = sorted(_reads(space, space.build, genome) - priced - trained)
    _require(
        not unpriced,
        f"{_at(space, genome)}: build reads {unpriced}, which no site and no training reads; "
        "candidates that differ there would be taken for the same.",
    )
    mask = space.active(genome)[0]
    active = {choice.name for choice, on in zip(space.choices, mask, strict=True) if on}
    _require(
        active == priced | trained,
        f"{_at(space, genome)}: compiled, sites and treatments read {sorted(active)}, and run, "
        f"{sorted(priced | trained)}; a site must be a function of what it reads through the candidate, "
        "and so must a treatment.",
    )


def _reads(space: SearchSpace, function: Callable[[Candidate], object], genome: Genomes) -> set[str]:
    candidate = space.decode(genome)
    function(candidate)
    return set(candidate.reads)


def _check_dormant(space: SearchSpace, genome: Genomes, other: Genomes) -> None:
    """``other`` gives the dormant genes of ``genome`` their new values."""
    twin = np.where(space.active(genome)[0], genome, other)
    where = f"{_at(space, genome)}, dormant genes changed to {space.decode(twin).as_dict()}"
    a, b = space.decode(genome), space.decode(twin)
    _require(space.parts(a) == space.parts(b), f"{where}: the parts differ.")
    _require(space.training(a) == space.training(b), f"{where}: the training differs.")
    ids = space.canonical_ids(np.array([genome, twin, other]))
    _require(ids[0] == ids[1], f"{where}: the canonical ids differ.")
    canonical = space.canonical(genome)
    _require(np.array_equal(space.canonical(canonical), canonical), f"{where}: canonical() is not idempotent.")
    _require(
        np.array_equal(space.canonical(other), canonical) == (ids[2] == ids[0]),
        f"{where}: canonical ids do not tell canonical genomes apart.",
    )


def _check_price(space: SearchSpace, genomes: Genomes, seed: int) -> None:
    estimator = AdditiveEstimator(space, synthetic_table(space, seed))
    fast = estimator.price(genomes)
    for row, genome in zip(fast, genomes, strict=True):
        slow = estimator.price_slowly(space.decode(genome))
        _require(
            bool(np.allclose(row, slow, rtol=1e-12, atol=0)),
            f"{_at(space, genome)}: the compiled price {row} is not the sum over the parts {slow}.",
        )


def _check_export(space: SearchSpace, genome: Genomes, info: TaskInfo, seed: int) -> None:
    candidate = space.decode(genome)
    plan = space.training(candidate).compression
    x = _inputs(info, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _settled(space.build(candidate), x)
    model = apply_passes(model, plan, x).eval()
    exported = to_onnx(model, plan, x, x.numpy())
    parts = space.parts(space.decode(genome))
    described = sum(part.macs for part in parts), sum(part.params for part in parts)
    counted = onnx_macs_params(exported)
    for what, said, found in zip(("MACs", "parameters"), described, counted, strict=True):
        _require(said == found, f"{_at(space, genome)}: the parts have {said} {what}, the exported model {found}.")
    _check_agreement(model, exported, x, _at(space, genome))


def _inputs(info: TaskInfo, seed: int) -> torch.Tensor:
    low, high = info.value_range
    random = torch.rand((SAMPLES, *info.input_shape), generator=torch.Generator().manual_seed(seed))
    return low + (high - low) * random


def _settled(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Normalisation statistics of ``x``: with the initial ones, activations vanish and anything agrees."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def _check_agreement(model: nn.Module, exported: onnx.ModelProto, x: torch.Tensor, where: str) -> None:
    """The exported model gives PyTorch's outputs (int8: but for rounding noise), whatever the batch size."""
    session = ort.InferenceSession(
        exported.SerializeToString(), session_options(threads=1), providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name
    with torch.no_grad():
        wanted = model.eval()(x).numpy()
    scale = max(float(np.abs(wanted).max()), 1e-9)
    quantized = any(node.op_type == "QuantizeLinear" for node in exported.graph.node)
    tolerance = INT8_TOLERANCE if quantized else FLOAT_TOLERANCE
    for batch in (len(x), *BATCHES):
        got = session.run(None, {name: x[:batch].numpy()})[0]
        shape = (batch, *wanted.shape[1:])
        _require(got.shape == shape, f"{where}: the ONNX gives {got.shape} for batch {batch}, not {shape}.")
        error = float(np.sqrt(np.mean((got - wanted[:batch]) ** 2))) / scale
        # A few samples may have bad luck; all of them together must not.
        limit = tolerance if batch == len(x) else 3 * tolerance
        _require(
            error <= limit,
            f"{where}: ONNX and PyTorch differ by {100 * error:.2g} % of the largest output (batch {batch}); "
            f"at most {100 * limit:g} % are rounding.",
        )


# ---- strategies --------------------------------------------------------------------------------------


def check_strategy(make: Callable[[Domain, int], Strategy]) -> None:
    """Check a strategy: numbered proposals in range, and a state that is a function of the seed and the outcomes.

    Args:
        make: ``(domain, seed)`` → a fresh strategy.

    Raises:
        AssertionError: names the clause that is broken and the domain.
    """
    for name, domain in _domains().items():
        _check_proposals(make, domain, name)
        _check_asking(make, domain, name)
        _check_replay(make, domain, name)
        _check_tolerance(make, domain, name)


def _domains() -> dict[str, Domain]:
    def everything(genomes: Genomes) -> npt.NDArray[np.bool_]:
        return np.ones(np.atleast_2d(genomes).shape, dtype=bool)

    def by_depth(genomes: Genomes) -> npt.NDArray[np.bool_]:
        genomes = np.atleast_2d(genomes)
        mask = np.arange(genomes.shape[1])[None] <= 2 * genomes[:, :1] + 1
        mask[:, 0] = True
        return np.asarray(mask)

    def domain(sizes: list[int], active: Callable[[Genomes], npt.NDArray[np.bool_]] = everything) -> Domain:
        return Domain(np.array(sizes, dtype=np.int64), np.arange(len(sizes)) % 2 == 0, active)

    return {
        "all genes active": domain([4, 3, 5, 2, 4, 3, 6, 2]),
        "single-valued genes": domain([1, 6, 1, 1, 5, 7, 4, 1]),
        "one gene": domain([400]),
        "dormant genes": domain([4, 3, 5, 2, 4, 1, 6, 3], by_depth),
    }


def _outcomes(proposals: Proposals, domain: Domain, statuses: tuple[str, ...], source: str = ASKED) -> Outcomes:
    """Made-up outcomes, a function of the genomes alone; statuses take turns by index."""
    n = len(proposals.index)
    status = np.array([statuses[int(i) % len(statuses)] for i in proposals.index], dtype="U10")
    scored = np.isin(status, (COMPLETE, DUPLICATE))
    used = np.where(domain.active(proposals.genomes), proposals.genomes, 0)
    weights = 1 / np.arange(1, used.shape[1] + 1)
    quality = np.where(scored, 0.5 + 0.5 * np.sin(used @ weights), np.nan)
    costs = 1.0 + used.sum(axis=1, keepdims=True).astype(np.float64)
    return Outcomes(
        index=proposals.index.copy(),
        genomes=proposals.genomes.copy(),
        quality=quality,
        costs=costs,
        violation=np.where(status == SCREENED, 0.3, 0.0),
        reward=np.where(scored, quality - 0.001 * costs[:, 0], np.nan),
        fidelity=proposals.fidelity.copy(),
        status=status,
        source=np.full(n, source),
    )


def _same(a: Proposals, b: Proposals) -> bool:
    return all(np.array_equal(getattr(a, part), getattr(b, part)) for part in ("index", "genomes", "fidelity"))


def _require_valid(proposals: Proposals, first: int, n: int, domain: Domain, where: str) -> None:
    genomes, fidelity = proposals.genomes, proposals.fidelity
    _require(
        np.array_equal(proposals.index, np.arange(first, first + n)),
        f"{where}: ask({n}) after {first} numbers its proposals {proposals.index}.",
    )
    shape = (n, len(domain.cardinalities))
    _require(genomes.shape == shape, f"{where}: genomes of shape {genomes.shape} instead of {shape}.")
    _require(np.issubdtype(genomes.dtype, np.integer), f"{where}: genomes of type {genomes.dtype}, not integers.")
    _require(
        bool(((genomes >= 0) & (genomes < domain.cardinalities)).all()), f"{where}: a gene is out of range: {genomes}."
    )
    _require(
        fidelity.shape == (n,) and bool(((fidelity > 0) & (fidelity <= 1)).all()),
        f"{where}: fidelity {fidelity}, not in (0, 1].",
    )


ALL = (COMPLETE, COMPLETE, FAILED, COMPLETE, SCREENED, COMPLETE, DUPLICATE)


def _check_proposals(make: Callable[[Domain, int], Strategy], domain: Domain, name: str) -> None:
    strategy, asked = make(domain, 0), 0
    for n in (1, 4, 3, 8, *[4] * 20):
        proposals = strategy.ask(n)
        _require_valid(proposals, asked, n, domain, f"domain with {name}")
        strategy.tell(_outcomes(proposals, domain, ALL))
        asked += n
    first, second = (make(domain, seed).ask(12).genomes for seed in (0, 1))
    _require(not np.array_equal(first, second), f"domain with {name}: seeds 0 and 1 propose the same genomes.")


def _check_asking(make: Callable[[Domain, int], Strategy], domain: Domain, name: str) -> None:
    """Asking changes the counter and nothing else, before and after something was learnt."""
    for lessons in (0, 8):
        batch, single, extra = make(domain, 3), make(domain, 3), make(domain, 3)
        for _ in range(lessons):
            proposals = batch.ask(4)
            outcomes = _outcomes(proposals, domain, ALL)
            for one in (single, extra):
                one.ask(4)
                one.tell(outcomes)
            batch.tell(outcomes)
        where = f"domain with {name}, after {4 * lessons} outcomes"
        together = batch.ask(4)
        apart = [single.ask(1) for _ in range(4)]
        _require(
            all(np.array_equal(together.genomes[i], one.genomes[0]) for i, one in enumerate(apart)),
            f"{where}: ask(4) proposes {together.genomes.tolist()}, asking one at a time "
            f"{[one.genomes[0].tolist() for one in apart]}.",
        )
        # One strategy asks before it is told, the other asks all at the end: told the same, they propose the same.
        outcomes = _outcomes(together, domain, (COMPLETE,))
        batch.tell(outcomes)
        extra.tell(outcomes)
        _require(
            np.array_equal(batch.ask(4).genomes, extra.ask(8).genomes[4:]),
            f"{where}: asking changes the state; a proposal may depend on its number, the seed and the outcomes only.",
        )


def _check_replay(make: Callable[[Domain, int], Strategy], domain: Domain, name: str) -> None:
    """Two instances that are told the same propose the same, whatever else happens in the process."""
    first, second = make(domain, 5), make(domain, 5)
    for _ in range(15):
        a = first.ask(4)
        np.random.seed(int(a.index[0]))  # noqa: NPY002 - the global generator is what must not matter
        b = second.ask(4)
        _require(_same(a, b), f"domain with {name}: told the same, two instances propose {a.genomes} and {b.genomes}.")
        outcomes = _outcomes(a, domain, ALL)
        kept = copy.deepcopy(outcomes)
        for strategy in (first, second):
            strategy.tell(outcomes)
        for part in vars(kept):
            same = np.array_equal(getattr(kept, part), getattr(outcomes, part), equal_nan=part in ("quality", "reward"))
            _require(same, f"domain with {name}: tell changes the outcomes' {part!r} in place.")
        a.genomes[:] = 0  # the caller's to do with as it likes


def _check_tolerance(make: Callable[[Domain, int], Strategy], domain: Domain, name: str) -> None:
    """Outcomes without a reward, and outcomes that this strategy never asked for."""
    strategy = make(domain, 7)
    foreign = make(domain, 8).ask(6)
    strategy.tell(_outcomes(foreign, domain, (COMPLETE, FAILED), EARLIER))
    for status in (FAILED, SCREENED, DUPLICATE):
        strategy.tell(_outcomes(strategy.ask(4), domain, (status,)))
    strategy.tell(_outcomes(foreign, domain, (COMPLETE, SCREENED), ENQUEUED))
    strategy.tell(_outcomes(Proposals(foreign.index[:0], foreign.genomes[:0], foreign.fidelity[:0]), domain, ALL))
    for _ in range(8):
        strategy.tell(_outcomes(strategy.ask(4), domain, (FAILED, SCREENED)))
    where = f"domain with {name}, after outcomes without a reward and from elsewhere"
    _require_valid(strategy.ask(4), 44, 4, domain, where)


# ---- rewards -----------------------------------------------------------------------------------------


def check_reward(reward: Reward) -> None:
    """Check a reward: rising with quality, never rising with a cost beyond its target, and strict about its input.

    Costs are found by name, whatever else is priced and in whatever order.

    Raises:
        AssertionError: names the clause that is broken.
    """
    kind = type(reward).__name__
    _require(bool(reward.costs), f"{kind} reads no cost.")
    names = ("another_cost", *reversed(reward.costs))
    at_target = np.array([7.0, *(reward.targets[cost] for cost in names[1:])])
    quality = np.linspace(0.05, 1.0, 20)
    for cost in reward.costs:
        _check_trade(reward, quality, at_target, names, names.index(cost), f"{kind}, {cost}")
    shuffled = reward.score(quality, np.tile(at_target[::-1], (20, 1)), names[::-1])
    straight = reward.score(quality, np.tile(at_target, (20, 1)), names)
    _require(bool((shuffled == straight).all()), f"{kind}: costs are not found by their names.")
    one = reward.score(quality[3:4], at_target[None], names)
    _require(one.shape == (1,) and one[0] == straight[3], f"{kind}: a reward depends on its neighbours.")
    for what, q, row in _improper(reward, names, at_target):
        _require_refused(reward, [q], [row], names, what)
        _require_refused(reward, [0.5, q], [at_target, row], names, what)
    _require_refused(reward, [0.5], [[1.0]], ("another_cost",), "a missing cost")
    if isinstance(reward, SingleCost):
        _check_call(reward)


def _check_trade(
    reward: Reward, quality: Array, at_target: Array, names: tuple[str, ...], column: int, where: str
) -> None:
    """Quality against one cost, the others at their targets."""
    share = np.array([0.25, 0.5, 0.9, 1.0, 1.1, 2.0, 5.0])
    rows = np.tile(at_target, (len(share), 1))
    rows[:, column] *= share
    table = np.array([reward.score(np.full(len(share), q), rows, names) for q in quality])  # [qualities, shares]
    _require(table.shape == (len(quality), len(share)), f"{where}: 7 candidates give rewards {table.shape[1:]}.")
    _require(bool(np.isfinite(table).all()), f"{where}: a reward is not finite.")
    _require(bool((np.diff(table, axis=0) > 0).all()), f"{where}: a higher quality at one cost does not pay.")
    beyond = table[:, share >= 1.0]
    _require(bool((np.diff(beyond, axis=1) <= 0).all()), f"{where}: beyond the target, a higher cost pays.")


def _improper(reward: Reward, names: tuple[str, ...], at_target: Array) -> Iterator[tuple[str, float, Array]]:
    """Values that no reward is defined for: what is wrong, quality, costs."""
    yield "quality NaN", np.nan, at_target
    yield "quality infinite", np.inf, at_target
    for cost in reward.costs:
        for what, value in {"NaN": np.nan, "infinite": np.inf, "0": 0.0, "below 0": -1.0}.items():
            row = at_target.copy()
            row[names.index(cost)] = value
            yield f"cost {what}", 0.5, row


def _require_refused(
    reward: Reward, quality: npt.ArrayLike, costs: npt.ArrayLike, names: tuple[str, ...], what: str
) -> None:
    try:
        got = reward.score(quality, costs, names)
    except RewardError:
        return
    raise AssertionError(f"{type(reward).__name__}: {what} gives {got} instead of a RewardError.")


def _check_call(reward: SingleCost) -> None:
    """Calling it gives what ``score`` gives, in the shape of its arguments."""
    kind = type(reward).__name__
    quality, costs = np.linspace(0.05, 1.0, 20), reward.target * np.array([0.25, 1.0, 5.0])
    q, c = np.meshgrid(quality, costs, indexing="ij")
    table = reward(q, c)
    _require(table.shape == (20, 3), f"{kind}: arrays of shape (20, 3) give a reward of shape {table.shape}.")
    same = table.ravel() == reward.score(q.ravel(), c.reshape(-1, 1), reward.costs)
    _require(bool(same.all()), f"{kind}: calling it and score() differ.")
    scalar = reward(0.5, float(costs[2]))
    _require(np.shape(scalar) == (), f"{kind}: two numbers give a reward of shape {np.shape(scalar)}.")
    row = reward([0.5, 0.6], [float(costs[2])] * 2)
    _require(row.shape == (2,) and row[0] == scalar, f"{kind}: the reward of a pair depends on its neighbours.")


# ---- passes ------------------------------------------------------------------------------------------


def check_pass(
    pass_class: Callable[[Mapping[str, Any]], Pass], model: nn.Module, settings: Mapping[str, Any], sample: torch.Tensor
) -> None:
    """Check a compression pass: apply, train, restore, export and rewrite, each on a copy of ``model``.

    Args:
        pass_class: the pass; built as ``pass_class(settings)``.
        model: a traceable module, uncompressed.
        settings: module name → what is asked of it; at least one.
        sample: raw inputs ``[n, *input_shape]``, n ≥ 3.

    Raises:
        AssertionError: names the clause that is broken.
    """
    name = getattr(pass_class, "__name__", "pass")
    with torch.no_grad():
        shape = model.eval()(sample).shape
    kinds = {type(module) for module in model.modules()}
    step = pass_class(settings)
    compressed = step.apply(copy.deepcopy(model), sample)
    with torch.no_grad():
        found = compressed.eval()(sample).shape
    _require(found == shape, f"{name}: apply changes the output from {tuple(shape)} to {tuple(found)}.")
    _check_trainable(compressed, sample, name)
    plain = step.restore(copy.deepcopy(compressed).eval())
    helpers = {type(m).__name__ for m in plain.modules() if type(m) not in kinds and not _plain(type(m))}
    _require(not helpers, f"{name}: restore leaves {sorted(helpers)}, which are no layers of torch.nn.")
    exported = step.rewrite(export_float(fold_batchnorm(plain), sample[:1]), sample.numpy())
    _check_agreement(compressed, exported, sample, name)
    wrong = {"no.such.layer": next(iter(settings.values()))}
    try:
        pass_class(wrong).apply(copy.deepcopy(model), sample)
    except CompressionError as error:
        _require("no.such.layer" in str(error), f"{name}: the error does not name the layer that is missing: {error}")
    else:
        raise AssertionError(f"{name}: a layer that does not exist raises no CompressionError.")


def _plain(kind: type[nn.Module]) -> bool:
    return kind.__module__.startswith(("torch.nn.", "torch.fx."))


def _check_trainable(model: nn.Module, sample: torch.Tensor, name: str) -> None:
    """One step of training on a copy reaches every parameter."""
    pupil = copy.deepcopy(model).train()
    output = pupil(sample)
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    lost = [key for key, p in pupil.named_parameters() if p.grad is None or not bool(torch.isfinite(p.grad).all())]
    _require(not lost, f"{name}: after apply, no finite gradient reaches {lost}.")


# ---- evaluators --------------------------------------------------------------------------------------


def check_evaluator(evaluator: Evaluator, genome: Genomes) -> None:
    """Check an evaluator on a genome that it can evaluate: picklable, and the same quality every time.

    Raises:
        AssertionError: names the clause that is broken.
    """
    kind = type(evaluator).__name__
    try:
        twin = pickle.loads(pickle.dumps(evaluator))
    except Exception as error:
        raise AssertionError(f"{kind} cannot be pickled, so no worker can run it: {error!r}.") from error
    kept = genome.copy()
    found = []
    for one, seed in itertools.product((evaluator, twin), (1, 2)):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - the global generator is what must not matter
        result = one.evaluate(genome)
        _require(isinstance(result, Evaluation), f"{kind}: evaluate returns a {type(result).__name__}.")
        _require(not result.failed, f"{kind}: genome {kept} has no quality: {result.reason or result.quality}.")
        _require(np.array_equal(genome, kept), f"{kind}: evaluate changes the genome in place.")
        found.append(result)
    qualities = [result.quality for result in found]
    _require(len(set(qualities)) == 1, f"{kind}: one genome has several qualities: {qualities}.")
    _require(all(r.metrics == found[0].metrics for r in found), f"{kind}: one genome has several metrics.")
