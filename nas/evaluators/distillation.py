"""What a student learns beside its teachers' logits: their features and where they look; and several of them at once.

Features and attention are read by hooks at *points*, modules of either model whose outputs are compared pair by pair. A
point's output is brought to one form, a map ``[n, channels, height, width]``: tokens ``[n, tokens, channels]``, also as
rows ``[n · tokens, channels]``, stand in their square grid, or in one column where their number is no square.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.errors import ExperimentError, TrainingError

CACHE_BYTES = 200_000_000
BATCH = 512
TOKEN_POINTS = 4
Pairs = tuple[tuple[str, str], ...]


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


# ---- points --------------------------------------------------------------------------------------------


@dataclass
class _Call:
    """One module as it ran once, and the calls inside of it."""

    name: str
    kind: type[nn.Module]
    output: Tensor | None = None
    inner: list[_Call] = field(default_factory=list)

    def everything(self) -> list[_Call]:
        """This call and all inside, the outer ones first."""
        found, level = list[_Call](), [self]
        while level:
            found += level
            level = [inner for call in level for inner in call.inner]
        return found


def stage_outputs(model: nn.Module, x: Tensor) -> tuple[str, ...]:
    """Names of the modules whose outputs are the results of a model's stages, in the order in which they run.

    A convolutional model is read as a sequence of blocks, those in a ``Sequential`` or in a module that changes the
    size more than once; the points are the last maps before each change of height and width, and the last of all. Of
    a model on tokens they are :data:`TOKEN_POINTS` blocks at even distances, the last one included; blocks are what
    the outermost module runs that runs one kind repeatedly. Modules that run more than once are left out.

    Args:
        x: raw inputs ``[n, *input_shape]``, n ≥ 2.

    Raises:
        TrainingError: no output is a map or a sequence of tokens.
    """
    root, n = _traced(model, x), len(x)
    repeated = {name for name, times in Counter(call.name for call in root.everything()).items() if times > 1}
    calls = [(call, _form(call.output, n)) for call in _sequence(root, n) if call.name not in repeated]
    sized = [(call.name, form) for call, form in calls if form]
    tokens = [call.name for call, form in calls if form == ()]
    if len(tokens) > len(sized):
        found = _even(_token_blocks(root, n, repeated) or tokens, TOKEN_POINTS)
    else:
        following = [*(form for _, form in sized[1:]), None]
        found = [name for (name, form), after in zip(sized, following, strict=bool(sized)) if form != after]
    if not found:
        raise TrainingError(
            f"No layer of {type(model).__name__} gives maps or tokens that could be compared.",
            expected="a convolutional network or a transformer",
            remedy="feature_weight and attention_weight 0, or pairs of names",
        )
    return tuple(found)


def _traced(model: nn.Module, x: Tensor) -> _Call:
    """The calls of one forward in evaluation mode, nested as they were."""
    root = _Call("", type(model))
    stack = [root]

    def enter(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any) -> None:
            call = _Call(name, type(module))
            stack[-1].inner.append(call)
            stack.append(call)

        return hook

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        stack.pop().output = _tensor(output)

    with ExitStack() as hooks, _evaluating(model):
        for name, module in model.named_modules():
            if name:
                hooks.callback(module.register_forward_pre_hook(enter(name)).remove)
                hooks.callback(module.register_forward_hook(leave).remove)
        model(x)
    return root


def _sequence(call: _Call, n: int) -> list[_Call]:
    """What runs inside, block by block: sequences and whole networks are looked into, blocks are not."""
    found: list[_Call] = []
    for inner in call.inner:
        inside = _sequence(inner, n)
        sizes = [form for c in inside if (form := _form(c.output, n))]
        changes = sum(before != after for before, after in pairwise(sizes))  # a strided block has one
        network = issubclass(inner.kind, nn.Sequential) or _form(inner.output, n) is None or changes > 1
        found += inside if inside and network else [inner]
    return found


def _token_blocks(root: _Call, n: int, repeated: Container[str]) -> list[str]:
    """The blocks on tokens, of kinds that occur more than once, in the outermost module that runs such; or none."""
    for call in root.everything():
        blocks = [c for c in call.inner if c.inner and c.name not in repeated and _form(c.output, n) == ()]
        kinds = Counter(block.kind for block in blocks)
        if found := [block.name for block in blocks if kinds[block.kind] > 1]:
            return found
    return []


def _form(output: Tensor | None, n: int) -> tuple[int, ...] | None:
    """Height and width of a map of more than one position, () for tokens, None for anything else."""
    if output is None or not output.is_floating_point() or not n or output.dim() < 2 or len(output) % n:
        return None
    if output.dim() == 4:
        return tuple(output.shape[2:]) if math.prod(output.shape[2:]) > 1 and len(output) == n else None
    if output.dim() == 3:
        return () if output.shape[1] > 1 and len(output) == n else None
    return () if output.dim() == 2 and len(output) > n else None


def _even(names: Sequence[str], most: int) -> list[str]:
    """At most so many, at even distances, the last one included."""
    count = min(most, len(names))
    return [names[(i + 1) * len(names) // count - 1] for i in range(count)]


def _matched(student: Sequence[str], teacher: Sequence[str]) -> Pairs:
    """Pairs by position: of the longer list, as many at even distances as the shorter one has."""
    count = min(len(student), len(teacher))
    return tuple(zip(_even(student, count), _even(teacher, count), strict=True))


# ---- outputs of points -----------------------------------------------------------------------------------


@contextmanager
def watched(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """A dictionary that holds, after each forward, what the modules of these names gave."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensor = _tensor(output)
            if tensor is None:
                raise TrainingError(f"Module {name!r} gives no tensor.", expected="a layer or block to compare")
            seen[name] = tensor

        return hook

    with ExitStack() as hooks:
        for name in names:
            hooks.callback(model.get_submodule(name).register_forward_hook(keep(name)).remove)
        yield seen


def maps(model: nn.Module, x: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Outputs of modules for ``x [n, *input_shape]`` as maps ``[n, channels, height, width]``, without gradients.

    Raises:
        TrainingError: a module does not run, or gives no tensor.
    """
    with watched(model, names) as seen, _evaluating(model):
        model(x)
    if missing := [name for name in names if name not in seen]:
        raise TrainingError(f"Module {missing[0]!r} does not run.", expected="a module that the forward calls")
    return {name: as_map(seen[name], len(x)) for name in names}


def as_map(output: Tensor, n: int) -> Tensor:
    """A point's output for n samples as ``[n, channels, height, width]``.

    Raises:
        TrainingError: it is neither a map, tokens, rows of tokens, nor a vector per sample.
    """
    if output.dim() == 4 and len(output) == n:
        return output
    if output.dim() == 2 and len(output) % n == 0:
        output = output.unflatten(0, (n, -1))
    if output.dim() != 3 or len(output) != n:
        raise TrainingError(
            f"A compared layer gives the shape {list(output.shape)} for {n} samples.",
            expected="[n, c, h, w], [n, tokens, c], [n · tokens, c] or [n, c]",
        )
    tokens = output.shape[1]
    side = math.isqrt(tokens)
    grid = (side, side) if side * side == tokens else (tokens, 1)
    return output.transpose(1, 2).unflatten(2, grid)


def _tensor(output: Any) -> Tensor | None:
    """A module's output, or the first tensor in it."""
    if isinstance(output, Tensor):
        return output
    values = list(output.values()) if isinstance(output, Mapping) else output
    return next((v for v in values if isinstance(v, Tensor)), None) if isinstance(values, list | tuple) else None


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode and without gradients; every module gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


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
        running = {call.name for call in _traced(model, few).everything()}
        if not self._found or not all(student in running for pairs in self._found for student, _ in pairs):
            for guide in self.guides:
                _check_names(model, [student for student, _ in guide.pairs], "student")
            self._found = [
                guide.pairs or _matched(stage_outputs(model, few), guide.points(few)) for guide in self.guides
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
