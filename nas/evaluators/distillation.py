"""What a student learns beside its teachers' logits: their features and where they look; and several of them at once.

Features and attention are read by hooks at points (:mod:`nas.evaluators.points`), modules of either model whose outputs
are compared pair by pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.errors import ExperimentError, TrainingError
from nas.evaluators.points import Pairs, as_map, as_run, maps, matched, stage_outputs, watched

CACHE_BYTES = 200_000_000
BATCH = 512


# ---- logits of several teachers ----------------------------------------------------------------------


def mixed_logits(logits: Tensor, weights: Sequence[float], temperature: float) -> Tensor:
    """One teacher's logits whose softmax at ``temperature`` is the weighted mean of several teachers' there.

    softmax(z / T) = Σ wₖ softmax(zₖ / T) for z = T log Σ wₖ softmax(zₖ / T), so that a loss that softens what it is
    given sees the mixture (Hinton et al. 2015, section 2: the arithmetic mean of the ensemble's distributions).

    Args:
        logits: ``[teachers, n, classes]``.
        weights: one per teacher, summing to 1.

    Returns:
        ``[n, classes]``.
    """
    shares = torch.tensor(weights, dtype=logits.dtype).log()[:, None, None]
    return temperature * torch.logsumexp(F.log_softmax(logits / temperature, dim=-1) + shares, dim=0)


# ---- teachers whose features are compared --------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Guide:
    """A trained teacher: raw inputs → logits, in evaluation mode, and what of it is compared.

    Args:
        module: is only read.
        weight: of its word among several teachers, relative to the others', above 0.
        pairs: names of student and teacher modules whose outputs are compared; empty: :func:`stage_outputs` of both.
        build: makes the module in another process, where its class may be known by no name; without it the module
            itself is sent there.

    Raises:
        ExperimentError: the weight is not above 0, or the teacher has no module of a name in ``pairs``.
    """

    module: nn.Module
    weight: float = 1.0
    pairs: Pairs = ()
    build: Callable[[], nn.Module] | None = None
    _cache: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise ExperimentError(f"A teacher's weight is {self.weight}.", expected="a number above 0")
        _check_names(self.module, [teacher for _, teacher in self.pairs], "teacher")

    def __reduce__(self) -> Any:
        state = None if self.build is None else {k: v.detach() for k, v in self.module.state_dict().items()}
        return _remade, (self.module if self.build is None else None, self.build, state, self.weight, self.pairs)

    def points(self, x: Tensor) -> tuple[str, ...]:
        """Names of the modules that are compared; ``x`` is a small batch of raw inputs."""
        if "points" not in self._cache:
            named = tuple(dict.fromkeys(teacher for _, teacher in self.pairs))
            self._cache["points"] = named or stage_outputs(self.module, x)
        found: tuple[str, ...] = self._cache["points"]
        return found

    def features(self, x: Tensor, view: int, rows: Tensor) -> dict[str, Tensor]:
        """Maps ``[len(rows), channels, height, width]`` of every point for ``x[view, rows]``.

        Of small teachers and data the maps of all views are computed once and kept: where they take up to
        :data:`CACHE_BYTES`. What is computed never depends on what was asked before, so that nothing does on workers.

        Args:
            x: all views, ``[views, n, *input_shape]``.
        """
        points = self.points(x[0, :2])
        if self._cache.get("x") is not x:  # other data than last time
            self._cache.clear()
            self._cache.update(points=points, x=x)
        if "kept" not in self._cache:
            sizes = [t[0].numel() * t.element_size() for t in maps(self.module, x[0, :2], points).values()]
            self._cache["kept"] = sum(sizes) * x.shape[0] * x.shape[1] <= CACHE_BYTES
        if not self._cache["kept"]:
            return maps(self.module, x[view, rows], points)
        if ("view", view) not in self._cache:
            batches = [maps(self.module, part, points) for part in x[view].split(BATCH)]
            self._cache["view", view] = {name: torch.cat([b[name] for b in batches]) for name in points}
        return {name: whole[rows] for name, whole in self._cache["view", view].items()}


def _remade(
    module: nn.Module | None, build: Callable[[], nn.Module] | None, state: Any, weight: float, pairs: Pairs
) -> Guide:
    if module is None:
        assert build is not None
        module = build()
        module.load_state_dict(state)
    return Guide(module.eval(), weight, pairs, build)


def guides_of(teachers: nn.Module | Guide | Sequence[nn.Module | Guide] | None) -> tuple[Guide, ...]:
    """The teachers as guides, whichever way they were given."""
    if teachers is None:
        return ()
    several = [teachers] if isinstance(teachers, nn.Module | Guide) else teachers
    return tuple(t if isinstance(t, Guide) else Guide(t) for t in several)


def _check_names(model: nn.Module, names: Sequence[str], whose: str) -> None:
    import difflib

    known = [name for name, _ in model.named_modules() if name]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3) or known[:5]
            raise ExperimentError(f"The {whose} has no module {name!r}.", expected=f"a name such as {near}")


# ---- distances --------------------------------------------------------------------------------------------


def feature_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two maps ``[n, c, h, w]`` of equal channels, over the teacher's mean square; halved.

    Equation 3 of FitNets (Romero et al. 2015), whose student side has been through the regressor; divided by the
    teacher's scale, so that a weight means the same at every point and for every teacher. Maps of different sizes are
    averaged down to the smaller height and width.
    """
    student, teacher = _one_size(student, teacher)
    scale = teacher.square().mean().clamp(min=1e-12)
    return 0.5 * F.mse_loss(student, teacher) / scale


def attention_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """½ ‖Qₛ/‖Qₛ‖₂ − Qₜ/‖Qₜ‖₂‖₂ of two maps ``[n, c, h, w]``, mean over the samples; Q sums the squares over channels.

    One term of equation 2 of Zagoruyko & Komodakis 2017. Channels may differ; sizes are made equal as for features.
    """
    q, wanted = _one_size(student.square().sum(1, keepdim=True), teacher.square().sum(1, keepdim=True))
    difference = F.normalize(q.flatten(1), dim=1) - F.normalize(wanted.flatten(1), dim=1)
    return 0.5 * torch.linalg.vector_norm(difference, dim=1).mean()


def _one_size(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both averaged down to the smaller height and width; a column of tokens and a grid, both as columns."""
    if (a.shape[3] == 1) != (b.shape[3] == 1):
        a, b = (t.flatten(2).unsqueeze(3) for t in (a, b))
    size = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
    a, b = (t if t.shape[2:] == size else F.adaptive_avg_pool2d(t, size) for t in (a, b))
    return a, b


class Hints:
    """The loss of a student's features and attention against those of its teachers.

    Where channels differ, the student's are projected by a 1×1 convolution (FitNets' regressor), which is trained with
    the student and is no part of it.

    Args:
        guides: the teachers; their losses are weighted by their shares.
        x: what is learnt from, ``[views, n, *input_shape]``.
        feature_weight, attention_weight: of the two sums over pairs of points; 0 or more.
        seed: of the projections.

    Raises:
        ExperimentError: a weight is negative, or not finite.
        TrainingError: something is to be compared, and there is no teacher.
    """

    def __init__(
        self, guides: Sequence[Guide], x: Tensor, feature_weight: float, attention_weight: float, seed: int
    ) -> None:
        for what, weight in (("feature_weight", feature_weight), ("attention_weight", attention_weight)):
            if not (weight >= 0 and math.isfinite(weight)):
                raise ExperimentError(f"{what} is {weight}.", expected="0 or more")
        self.active = feature_weight > 0 or attention_weight > 0
        if self.active and not guides:
            raise TrainingError(
                "Features or attention of a teacher are to be learnt, and the lessons hold only its logits.",
                remedy="prepare the lessons with the teacher, or feature_weight and attention_weight 0",
            )
        self.guides, self.x, self.seed = guides, x, seed
        self.feature_weight, self.attention_weight = feature_weight, attention_weight
        self._projections: dict[tuple[int, int], nn.Conv2d] = {}
        self._found: list[Pairs] = []

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[_Watch]:
        """Compare ``model`` while it is trained: after each forward the result gives the loss of what was seen."""
        few = self.x[0, :2]
        compared = self._compared(model, few) if self.active else []
        names = list(dict.fromkeys(student for _, pairs in compared for student, _ in pairs))
        self._project(maps(model, few, names) if names else {}, compared)
        with watched(model, names) as seen:
            yield _Watch(self, compared, seen)

    def _compared(self, model: nn.Module, few: Tensor) -> list[tuple[Guide, Pairs]]:
        """What is compared with each teacher. Pairs found once go on after a compression that kept their layers."""
        running = {call.name for call in as_run(model, few).everything()}
        if not self._found or not all(student in running for pairs in self._found for student, _ in pairs):
            for guide in self.guides:
                _check_names(model, [student for student, _ in guide.pairs], "student")
            self._found = [
                guide.pairs or matched(stage_outputs(model, few), guide.points(few)) for guide in self.guides
            ]
        return list(zip(self.guides, self._found, strict=True))

    def _project(self, students: Mapping[str, Tensor], compared: Sequence[tuple[Guide, Pairs]]) -> None:
        """Projections where channels differ; those of an earlier phase stay where they still fit."""
        fitting = {}
        few = self.x[0, :2]
        for k, (guide, pairs) in enumerate(compared if self.feature_weight else ()):
            teachers = maps(guide.module, few, guide.points(few))
            for i, (student, teacher) in enumerate(pairs):
                cin, cout = students[student].shape[1], teachers[teacher].shape[1]
                known = self._projections.get((k, i))
                if known is not None and (known.in_channels, known.out_channels) == (cin, cout):
                    fitting[k, i] = known
                elif cin != cout:
                    with torch.random.fork_rng(devices=[]):
                        torch.manual_seed((self.seed + 1_000_003 * (100 * k + i + 1)) % 2**63)
                        fitting[k, i] = nn.Conv2d(cin, cout, 1)
        self._projections = fitting

    def parameters(self) -> list[nn.Parameter]:
        """Of the projections."""
        return [p for projection in self._projections.values() for p in projection.parameters()]

    def loss(
        self, compared: Sequence[tuple[Guide, Pairs]], seen: Mapping[str, Tensor], view: int, rows: Tensor
    ) -> Tensor:
        """Σ over teachers of share · (feature weight · Σ distances + attention weight · Σ distances); a scalar."""
        total = torch.zeros(())
        whole = sum(guide.weight for guide, _ in compared)
        for k, (guide, pairs) in enumerate(compared):
            teachers = guide.features(self.x, view, rows)
            for i, (student, teacher) in enumerate(pairs):
                mine, wanted = as_map(seen[student], len(rows)), teachers[teacher]
                if self.feature_weight:
                    projection = self._projections.get((k, i))
                    projected = mine if projection is None else projection(mine)
                    total = total + guide.weight / whole * self.feature_weight * feature_distance(projected, wanted)
                if self.attention_weight:
                    total = total + guide.weight / whole * self.attention_weight * attention_distance(mine, wanted)
        return total


@dataclass
class _Watch:
    """One model under comparison."""

    hints: Hints
    compared: Sequence[tuple[Guide, Pairs]]
    seen: Mapping[str, Tensor]

    def loss(self, view: int, rows: Tensor) -> Tensor | None:
        """What the last forward, on ``x[view, rows]``, adds to the loss; nothing where nothing is compared."""
        return self.hints.loss(self.compared, self.seen, view, rows) if self.compared else None
