"""The experiment file: its schema, validated once at the door, and ``--set key=value`` on top of it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from nas import content
from nas.errors import ExperimentError
from nas.tabular import PublishedSpace

SCHEMA = "docs/experiment.md"
FIRST = ("warm", "enqueue", "earlier")
DERIVED = "derived"  # the space that is made of a user's model
NNI = "nni"  # the space that is made of a model space of NNI's


class Section(BaseModel):
    """A part of the file; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class OpenSection(BaseModel):
    """A part whose further keys belong to a plug-in, which checks them by its own signature."""

    model_config = ConfigDict(extra="allow", frozen=True)

    @property
    def settings(self) -> dict[str, Any]:
        """The plug-in's own keys."""
        return dict(self.model_extra or {})


class TaskSection(OpenSection):
    """Data and metric. Further keys go to the task (``shift``, ``valid``, ``limit``, …)."""

    kind: str = "classification"
    data: str


class SpaceSection(OpenSection):
    """Search space by name, path or ``module:name``. Further keys go to the space.

    With ``model`` and ``weights`` and without a name it is the space of that model, ``derived``; with ``nni`` that
    model space of NNI's.
    """

    name: str

    @model_validator(mode="before")
    @classmethod
    def _own(cls, raw: Any) -> Any:
        if isinstance(raw, dict):
            for key, name in (("model", DERIVED), ("nni", NNI)):
                if key in raw:
                    return {"name": name, **raw}
        return raw


class DeviceSection(Section):
    """What the latencies are measured on.

    ``alternatives`` are further runtimes, ``RUNTIME`` or ``RUNTIME/PROVIDER``, that a student may run in instead.
    """

    name: str = ""
    threads: int = Field(1, ge=1)
    batch: int = Field(1, ge=1)
    runtime: str = "onnxruntime"
    provider: str = ""
    graph: str = ""
    alternatives: tuple[str, ...] = ()

    @property
    def scenario(self) -> dict[str, Any]:
        """What makes the device, without the alternatives to it."""
        return self.model_dump(exclude={"alternatives"})


DeviceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]


class TableSection(Section):
    """Latency table: ``auto`` finds or builds one for this device; otherwise a path or bundled name.

    ``others`` are tables of other devices, by a name of your own: their latencies are further costs. ``learn`` puts the
    table that the finalists corrected into the cache, for later searches.
    """

    path: str = "auto"
    others: dict[DeviceName, str] = {}
    seconds: float = Field(20.0, gt=0)
    nets: int = Field(20, ge=8, le=30)
    noise: float = Field(0.01, ge=0)
    learn: bool = False


class FurtherTeacher(Section):
    """A module of your own that teaches beside the first; ``influence`` is relative to the first teacher's 1."""

    model: str
    weights: str
    influence: float = Field(1.0, gt=0, allow_inf_nan=False)


class TeacherSection(Section):
    """Trained from the space's ladder, or your own module (``model: my_pkg.models:build``) and its weights.

    ``also`` are further teachers. Budgets in percent refer to the first one.
    """

    epochs: int = Field(14, ge=1)
    tolerance: float = Field(0.005, ge=0, lt=1)
    model: str | None = None
    weights: str | None = None
    also: tuple[FurtherTeacher, ...] = ()

    @model_validator(mode="after")
    def _both(self) -> TeacherSection:
        if (self.model is None) != (self.weights is None):
            raise ValueError("model and weights go together")
        return self


class StrategySection(OpenSection):
    """Strategy by name. Further keys go to it."""

    kind: str = "default"


class RewardSection(OpenSection):
    """Reward by name; ``target`` defaults to the latency budget. Further keys go to it."""

    kind: str = "mnasnet_soft"
    target: float | None = Field(None, gt=0)


def amount(value: Any) -> float | str:
    """A number, or a percentage of the teacher's, as text."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9.]+)\s*%\s*", value)
        if not match or float(match.group(1)) <= 0:
            raise ValueError("expected a number, or a share of the teacher's such as '30%'")
        return f"{float(match.group(1)):g}%"
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ValueError("expected a number above 0, or a share of the teacher's such as '30%'")
    return float(value)


class BudgetSection(Section):
    """Hard limits: milliseconds and bytes, or shares of the teacher's measured percentile and of its file.

    ``others`` are milliseconds on other devices, by the names that ``table.others`` gives them.
    """

    latency: float | str | None = None
    percentile: Literal["p50", "p95"] = "p50"
    size: float | str | None = None
    others: dict[DeviceName, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = {}

    @field_validator("latency", "size", mode="before")
    @classmethod
    def _amount(cls, value: Any) -> Any:
        return None if value is None else amount(value)


class SearchSection(Section):
    """How much is tried, and what is known or wanted before the strategy is asked.

    ``batch``, ``mask``, ``warm``, ``enqueue`` and ``earlier`` belong to the experiment; ``workers`` to the machine (0:
    this process).
    """

    trials: int = Field(24, ge=1)
    seconds: float = Field(math.inf, gt=0)
    batch: int = Field(4, ge=1)
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    retries: int = Field(0, ge=0, le=1)
    mask: bool = True
    warm: int = Field(0, ge=0)
    enqueue: tuple[dict[str, bool | int | float | str], ...] = ()
    earlier: tuple[str, ...] = ()


class Epochs(Section):
    """Epochs in all, and how many of them, the last, come after compression."""

    epochs: int = Field(8, ge=1)
    compressed_epochs: int = Field(3, ge=1)

    @model_validator(mode="after")
    def _order(self) -> Epochs:
        if self.compressed_epochs > self.epochs:
            raise ValueError(f"compressed_epochs {self.compressed_epochs} exceeds epochs {self.epochs}")
        return self


class TrainingSection(Epochs):
    """The short training by which a candidate is judged."""

    batch_size: int = Field(64, ge=2)
    lr: float = Field(1e-2, gt=0)
    weight_decay: float = Field(5e-2, ge=0)
    views: int = Field(4, ge=1)
    seconds: float = Field(600.0, gt=0)


class FinalistsSection(Epochs):
    """The long training of a few, which are then measured: the best by reward, or a front of quality and latency."""

    count: int = Field(3, ge=1)
    pick: Literal["best", "front"] = "best"
    epochs: int = Field(24, ge=1)
    compressed_epochs: int = Field(8, ge=1)
    seconds: float = Field(10.0, gt=0)


class StudySection(Section):
    """Where trials are recorded: a journal in the run folder, or any Optuna storage URL."""

    storage: str | None = None


class Experiment(Section):
    """One experiment, complete and checked."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(0, ge=0)
    task: TaskSection
    space: SpaceSection
    device: DeviceSection = DeviceSection()
    table: TableSection = TableSection()
    teacher: TeacherSection = TeacherSection()
    strategy: StrategySection = StrategySection()
    reward: RewardSection = RewardSection()
    budget: BudgetSection = BudgetSection()
    search: SearchSection = SearchSection()
    training: TrainingSection = TrainingSection()
    finalists: FinalistsSection = FinalistsSection()
    baselines: tuple[Literal["random", "uniform"], ...] = ("uniform",)
    study: StudySection = StudySection()

    @model_validator(mode="before")
    @classmethod
    def _own_teacher(cls, raw: Any) -> Any:
        """Whose space is made of a trained model, has it for a teacher, unless another one is named."""
        space = raw.get("space") if isinstance(raw, dict) else None
        if not isinstance(space, dict) or space.get("name", DERIVED) != DERIVED or "weights" not in space:
            return raw
        teacher = raw.get("teacher") or {}
        own = {"model": space.get("model"), "weights": space["weights"]}
        return raw if not isinstance(teacher, dict) else {**raw, "teacher": {**own, **teacher}}

    @field_validator("budget")
    @classmethod
    def _known_devices(cls, budget: BudgetSection, info: ValidationInfo) -> BudgetSection:
        known = info.data["table"].others if "table" in info.data else budget.others
        if unknown := sorted(set(budget.others) - set(known)):
            raise ValueError(f"budgets for the devices of table.others only, which lacks {unknown[0]!r}")
        return budget

    def plain(self) -> dict[str, Any]:
        """JSON-able form, as it is written to the run folder (no limit on seconds is null)."""
        return _finite(self.model_dump(mode="python"))

    @property
    def identity(self) -> dict[str, Any]:
        """What must stay the same for a run to be resumed."""
        plain = self.plain()
        for section in ("name", "finalists", "baselines", "study"):
            plain.pop(section)
        plain["table"] = {"path": self.table.path, "others": self.table.others}
        search = plain["search"]
        # What is left out where it is not set was not there once: runs begun before it can be gone on with.
        plain["search"] = {"batch": search["batch"], **{k: search[k] for k in ("mask", *FIRST) if search[k]}}
        return plain


def quantile(value: Any) -> float | str:
    """A number, or ``quantile Q`` of the space's costs, as text."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*quantile\s+([0-9.]+)\s*", value)
        if not match or not 0 < float(match.group(1)) <= 1:
            raise ValueError("expected a number in the cost's unit, or 'quantile 0.4'")
        return f"quantile {float(match.group(1)):g}"
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ValueError("expected a number above 0 in the cost's unit, or 'quantile 0.4'")
    return float(value)


class LookupRewardSection(RewardSection):
    """Reward by name; ``target`` defaults to the budget of the first cost. Within the budget it is the quality."""

    kind: str = "mnasnet_hard"


class LookupExperiment(Section):
    """An experiment on published qualities and costs: no task, no device, no training, no student."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(0, ge=0)
    space: SpaceSection
    strategy: StrategySection = StrategySection()
    reward: LookupRewardSection = LookupRewardSection()
    budget: dict[str, float | str] = {}
    search: SearchSection = SearchSection()
    baselines: tuple[Literal["random"], ...] = ("random",)
    study: StudySection = StudySection()

    @field_validator("budget", mode="before")
    @classmethod
    def _amounts(cls, value: Any) -> Any:
        return {name: quantile(amount) for name, amount in value.items()} if isinstance(value, dict) else value

    def plain(self) -> dict[str, Any]:
        """JSON-able form, as it is written to the run folder (no limit on seconds is null)."""
        return _finite(self.model_dump(mode="python"))

    @property
    def identity(self) -> dict[str, Any]:
        """What must stay the same for a run to be resumed."""
        plain = self.plain()
        for section in ("name", "baselines", "study"):
            plain.pop(section)
        plain["space"].pop("folder", None)
        plain["search"] = {"batch": self.search.batch}
        return plain


S = TypeVar("S", Experiment, LookupExperiment)
PLUGINS = ((["task"], "kind"), (["space"], "name"), (["strategy"], "kind"), (["reward"], "kind"))


def load_experiment(source: str | Path | dict[str, Any], overrides: list[str] | None = None) -> Experiment:
    """Read a file (path or bundled name) or a dictionary, apply ``key=value`` overrides, and validate.

    Raises:
        ExperimentError: names the key, what was found and what is expected.
        ContentError: there is no such experiment.
    """
    return _validated(Experiment, *_overridden(source, overrides))


def load_any(source: str | Path | dict[str, Any], overrides: list[str] | None = None) -> Experiment | LookupExperiment:
    """Like :func:`load_experiment`; one without a task whose space is published is a :class:`LookupExperiment`.

    The files of its space may lie beside the experiment's.
    """
    raw, origin = _overridden(source, overrides)
    if "task" in raw or not _is_published(raw):
        return _validated(Experiment, raw, origin)
    if not isinstance(source, dict):
        raw["space"].setdefault("folder", str(Path(origin).parent))
    return _validated(LookupExperiment, raw, origin)


def begun(schema: type[Section], kept: Any) -> Any:
    """The experiment of a run folder by its own schema, as it was begun: before there were masks, without them.

    Raises:
        ValidationError: it is none.
    """
    if isinstance(kept, dict):
        kept = {**kept, "search": {"mask": False, **(kept.get("search") or {})}}
    return schema.model_validate(kept)


def _is_published(raw: dict[str, Any]) -> bool:
    space = raw.get("space")
    name = space.get("name") if isinstance(space, dict) else None
    return isinstance(name, str) and issubclass(content.load_space_class(name), PublishedSpace)


def _overridden(source: str | Path | dict[str, Any], overrides: list[str] | None) -> tuple[dict[str, Any], str]:
    raw, origin = (source, "the experiment") if isinstance(source, dict) else _read(source)
    raw = _copy(raw)
    apply_overrides(raw, overrides or [])
    return raw, origin


def _validated(schema: type[S], raw: dict[str, Any], origin: str) -> S:
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        raise explain(error, origin, schema) from None


def _read(source: str | Path) -> tuple[dict[str, Any], str]:
    path, raw = read_mapping("experiments", source)
    return raw, str(path)


def read_mapping(kind: str, source: str | Path) -> tuple[Path, dict[str, Any]]:
    """A YAML file of that kind of content, by name or path, and what it holds; its name is the file's by default.

    Raises:
        ExperimentError: it is no mapping in YAML.
        ContentError: there is no such file.
    """
    path = content.find(kind, source)
    try:
        raw = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ExperimentError(f"{path} is no valid YAML: {error}.") from error
    if not isinstance(raw, dict):
        raise ExperimentError(f"{path} holds {type(raw).__name__}.", expected="a mapping of keys")
    raw.setdefault("name", path.stem)
    return path, raw


def _copy(raw: dict[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, dict) else value for key, value in raw.items()}


def apply_overrides(raw: dict[str, Any], overrides: Iterable[str]) -> None:
    """Set ``key=value`` strings, whose values are YAML, in nested sections.

    Raises:
        ExperimentError: one has no key, no value, or a key below a value.
    """
    for override in overrides:
        _set(raw, override)


def _set(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ExperimentError(f"--set {override!r}.", expected="key=value, such as strategy.kind=reinforce")
    *parents, leaf = key.strip().split(".")
    place = raw
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise ExperimentError(f"--set {key}: {parent!r} is a value, not a section.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ExperimentError(f"--set {override!r} is no valid YAML value: {error}.") from error
    if (parents, leaf) in PLUGINS and place.get(leaf) not in (None, value):
        # The other keys were the former plug-in's; what belongs to the section itself stays.
        for key in set(place) - {"kind", "name", "data", "target"}:
            del place[key]
    place[leaf] = value


def explain(
    error: ValidationError, origin: str, model: type[BaseModel] = Experiment, schema: str = SCHEMA
) -> ExperimentError:
    """The first thing that is wrong with a file, with its key.

    Args:
        model: what the file was checked against; ``schema`` is the page that documents it.
    """
    first = error.errors()[0]
    # Pydantic adds the member of a union that it tried; "strategy" is none, whatever it begins with.
    tried = re.compile(r"(constrained-)?(bool|float|str|int)|literal\[.*")
    key = ".".join(str(part) for part in first["loc"] if not tried.fullmatch(str(part)))
    if first["type"] == "extra_forbidden":
        place: Any = model
        for part in first["loc"][:-1]:
            # A number is a place in a list, of which all entries are alike.
            place = get_args(place)[0] if isinstance(part, int) else place.model_fields[part].annotation
        return ExperimentError(f"Unknown key {key!r} in {origin}.", expected=f"one of {', '.join(place.model_fields)}")
    if first["type"] == "missing":
        return ExperimentError(f"Key {key!r} is missing in {origin}.", remedy=f"see {schema}")
    found = f"{key} is {first['input']!r} in {origin}." if key else f"What {origin} says does not go together."
    return ExperimentError(found, expected=first["msg"].removeprefix("Value error, "))


def _finite(value: Any) -> Any:
    """Without nulls and infinities, which are the defaults and which other readers of JSON refuse."""
    if isinstance(value, dict):
        kept = {key: _finite(item) for key, item in value.items()}
        return {key: item for key, item in kept.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
