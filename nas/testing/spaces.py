"""The contract of a search space: what is trained and what is priced are one candidate."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from nas.compression import apply_passes
from nas.errors import SpaceError
from nas.latency import AdditiveEstimator, Device, LatencyTable
from nas.latency.fit import FitError, LinearFit
from nas.latency.measure import Timing
from nas.latency.table import Entry, Net
from nas.space import Candidate, Genomes, SearchSpace, TaskInfo
from nas.student.export import onnx_macs_params, to_onnx
from nas.testing.agreement import check_agreement
from nas.testing.require import require

SAMPLES = 64


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
        "latency_ms": LinearFit(
            (0.9, 0.95, 1.1), (-2e-4, 1e-4, 2e-4), (1e-3, 2e-3, 0.0), (0.1, -0.1, 0.0), (1e-3, 0.0, 0.0), 0.01
        ),
        "latency_p95_ms": LinearFit((0.92, 0.97, 1.2), (-1e-4, 1e-4, 3e-4), per_net=0.015),
        "size_bytes": LinearFit((1.01, 1.05, 1.0), (250.0, 400.0, 300.0), per_net=900.0),
    }
    return LatencyTable(
        space=space.name,
        device=Device("synthetic", "synthetic", 1, "onnxruntime", "0", 1, 1).as_dict(),
        entries=entries,
        fits=fits,
        errors={cost: FitError(0.01, 1.0, 1.0, 0.99, 20) for cost in fits},
        noise=0.01,
        nets=[Net({}, 0.1, 0.12, 4e3, 0.11, 0.12)],
        protocol={"method": "synthetic", "seed": seed},
        date="2000-01-01T00:00:00+00:00",
        nas_version="0",
    )


def _at(space: SearchSpace, genome: Genomes) -> str:
    return f"{space.name}, candidate {space.decode(genome).as_dict()}"


def _check_choices(space: SearchSpace) -> None:
    names = [choice.name for choice in space.choices]
    require(len(set(names)) == len(names), f"{space.name}: two choices have one name among {names}.")
    for offer in (space.ladder, space.uniform):
        try:
            members = offer()
        except SpaceError:  # a space need not offer teachers
            continue
        for member in members:
            genome = space.encode(member)
            require(space.decode(genome).as_dict() == member.as_dict(), f"{space.name}: {member} is not of the space.")


def _check_round_trip(space: SearchSpace, genome: Genomes) -> None:
    candidate = space.decode(genome)
    again = space.encode(candidate)
    require(np.array_equal(genome, again), f"{_at(space, genome)}: encode(decode({genome})) is {again}.")
    require(space.decode(again).as_dict() == candidate.as_dict(), f"{_at(space, genome)}: decode is not repeatable.")


def _check_reads(space: SearchSpace, genome: Genomes) -> None:
    priced = _reads(space, space.parts, genome)
    trained = _reads(space, space.training, genome)
    unpriced = sorted(_reads(space, space.build, genome) - priced - trained)
    require(
        not unpriced,
        f"{_at(space, genome)}: build reads {unpriced}, which no site and no training reads; "
        "candidates that differ there would be taken for the same.",
    )
    mask = space.active(genome)[0]
    active = {choice.name for choice, on in zip(space.choices, mask, strict=True) if on}
    require(
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
    require(space.parts(a) == space.parts(b), f"{where}: the parts differ.")
    require(space.training(a) == space.training(b), f"{where}: the training differs.")
    ids = space.canonical_ids(np.array([genome, twin, other]))
    require(ids[0] == ids[1], f"{where}: the canonical ids differ.")
    canonical = space.canonical(genome)
    require(np.array_equal(space.canonical(canonical), canonical), f"{where}: canonical() is not idempotent.")
    require(
        np.array_equal(space.canonical(other), canonical) == (ids[2] == ids[0]),
        f"{where}: canonical ids do not tell canonical genomes apart.",
    )


def _check_price(space: SearchSpace, genomes: Genomes, seed: int) -> None:
    estimator = AdditiveEstimator(space, synthetic_table(space, seed))
    fast = estimator.price(genomes)
    for row, genome in zip(fast, genomes, strict=True):
        slow = estimator.price_slowly(space.decode(genome))
        require(
            bool(np.allclose(row, slow, rtol=1e-12, atol=0)),
            f"{_at(space, genome)}: the compiled price {row} is not the sum over the parts {slow}.",
        )


def _check_export(space: SearchSpace, genome: Genomes, info: TaskInfo, seed: int) -> None:
    candidate = space.decode(genome)
    plan = space.training(candidate).compression
    x = info.random(SAMPLES, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _settled(space.build(candidate), x)
    model = apply_passes(model, plan, x).eval()
    exported = to_onnx(model, plan, x, x.numpy())
    parts = space.parts(space.decode(genome))
    described = sum(part.macs for part in parts), sum(part.params for part in parts)
    counted = onnx_macs_params(exported)
    for what, said, found in zip(("MACs", "parameters"), described, counted, strict=True):
        require(said == found, f"{_at(space, genome)}: the parts have {said} {what}, the exported model {found}.")
    check_agreement(model, exported, x, _at(space, genome))


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
