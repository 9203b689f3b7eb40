"""The documents say what the code does: commands parse, links resolve, keys are complete, examples run."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from nas import testing
from nas.cli import _parser
from nas.compression import passes
from nas.content import available, load_space, load_space_class
from nas.errors import CompressionError
from nas.evaluators import evaluators
from nas.experiment import DERIVED, NNI, Experiment, LookupExperiment, OpenSection, apply_overrides, load_any
from nas.latency import LatencyTable
from nas.latency.importers import importers
from nas.latency.runtimes import runtimes
from nas.latency.schema import table_schema
from nas.pipeline import parse_step, steps_of
from nas.pipeline.steps import options_of
from nas.registry import Registry
from nas.reward import rewards
from nas.settings import check, construct
from nas.space import TaskInfo
from nas.strategies import Domain, strategies
from nas.student.formats import formats
from nas.sweep.schedule import prepare
from nas.sweep.spec import Range, Sweep, load_sweep
from nas.tasks import tasks

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "latency_tables" / "README.md",
]  # fmt: skip
MAX_LINES = 30
#: What a reader has without this project; everything else in a shell block must be a command of ours.
OTHERS = ("cd", "git", "source")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in one of the languages."""
    found = re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


def commands(page: Path) -> list[list[str]]:
    """The words of every line of the page's shell blocks."""
    lines = [line for block in blocks(page, "bash", "sh") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


# ---- commands, links, snippets ------------------------------------------------------------------------


@every_page
def test_shell_blocks_use_commands_that_exist(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    template = (ROOT / "nas" / "student" / "templates" / "predict.py").read_text()
    extras = _pyproject()["project"]["optional-dependencies"]
    for program, *arguments in commands(page):
        if program == "nas":
            continue  # the next test
        if program == "make":
            assert {a for a in arguments if "=" not in a} <= targets, arguments
            assert {a.partition("=")[0] for a in arguments if "=" in a} <= {"PYTHON", "TORCH_INDEX"}, arguments
        elif program == "python":
            assert arguments[0] == "predict.py", arguments
            assert all(f'"{a}"' in template for a in arguments if a.startswith("--")), arguments
        elif program == "pip":
            named = [a[2:-1].split(",") for a in arguments if a.startswith(".[")]
            assert {extra for group in named for extra in group} <= set(extras), arguments
        else:
            assert program in OTHERS, program


@every_page
def test_nas_commands_parse_and_their_overrides_are_valid(page: Path) -> None:
    names = "search|sweep|compress|export|ablate|profile|tables|front|report|list"
    inline = re.findall(rf"`(nas (?:{names})\b[^`…]*)`", page.read_text())
    bare = ("nas search", "nas sweep", "nas profile", "nas tables", "nas front", "nas report", "nas tables adapt")
    bare += ("nas compress", "nas export", "nas ablate")
    bare += tuple(f"nas tables {action}" for action in ("show", "validate", "compare", "import"))
    known = [shlex.split(line) for line in inline if line not in bare]
    for program, *arguments in [*commands(page), *known]:
        if program == "nas":
            options = _parser().parse_args(arguments)
            if hasattr(options, "steps"):
                check_steps(options.steps)
            elif hasattr(options, "candidate"):
                assert set(options.format) <= set(formats)
            elif getattr(options, "sweep", None):
                path = ROOT / options.sweep if "/" in options.sweep else options.sweep
                prepare(load_sweep(path, options.set), Path("nowhere"))
            elif getattr(options, "space", None) and hasattr(options, "set"):
                load_space(options.space, TaskInfo((3, 224, 224), 1000), overridden(options.set))
            elif getattr(options, "experiment", None) and hasattr(options, "set"):
                check_plugins(load_any(named(options.experiment, page), options.set))


def named(experiment: str, page: Path) -> Any:
    """The experiment that a command names: of this repository, bundled, or written out on the page."""
    written = {content.get("name"): content for content in map(yaml.safe_load, blocks(page, "yaml"))}
    return written.get(experiment.removesuffix(".yaml")) or (ROOT / experiment if "/" in experiment else experiment)


def check_steps(steps: list[str]) -> None:
    """Passes that exist, with options that they have; without options they may be meant with settings by layer."""
    for step in map(parse_step, steps):
        assert step.name in passes, step.name
        if step.options:
            steps_of([step])


def overridden(overrides: list[str]) -> dict[str, Any]:
    """A space's settings from ``--set``."""
    settings: dict[str, Any] = {}
    apply_overrides(settings, overrides)
    return settings


@every_page
def test_overrides_in_tables_are_valid(page: Path) -> None:
    for line in re.findall(r"`(--set [^`]*)`", page.read_text()):
        _, override = shlex.split(line)
        if override == "key=value":
            continue
        if page.name == "sweep.md":
            load_sweep("digits", [override])
        else:
            check_plugins(load_any("digits", [override]))


@every_page
def test_yaml_blocks_are_valid_sections(page: Path) -> None:
    whole = yaml.safe_load((ROOT / "experiments" / "digits.yaml").read_text())
    for block in blocks(page, "yaml"):
        content = yaml.safe_load(block)
        if set(content) <= set(passes):
            steps_of([], content)
        elif "vary" in content:
            sweep = load_sweep({"name": "block", **content})
            assert sweep.function or prepare(sweep, Path("nowhere"))
        else:
            load_any(content if {"name", "space"} <= content.keys() else {**whole, **content})


@every_page
def test_python_blocks_compile(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block, str(page), "exec")


def test_the_names_that_the_readme_imports_exist() -> None:
    import nas

    names = set(re.findall(r"\bnas\.(\w+)\(", (ROOT / "README.md").read_text()))
    assert names == {"search", "load_student", "derive", "compress"}
    assert all(callable(getattr(nas, name)) for name in names)
    attributes = set(re.findall(r"\bstudent\.(\w+)", (ROOT / "README.md").read_text()))
    assert {"quality", "latency_ms", "predict"} <= attributes <= {*dir(nas.Student), "folder", "manifest"}


@every_page
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}, there are {sorted(anchors(file))}"


@every_page
def test_files_named_in_the_text_exist(page: Path) -> None:
    not_built = {"nas/supernet/", "nas/_content/"}
    named = set(re.findall(r"`((?:nas|search_spaces|tests|experiments)/[\w./]*)`", page.read_text()))
    assert not [name for name in named - not_built if not (ROOT / name).exists()]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the usual renderers make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def check_plugins(experiment: Experiment | LookupExperiment) -> None:
    """The open sections fit the signatures of the plug-ins that they choose."""
    domain = Domain(np.array([2, 3]), np.array([True, True]), lambda genomes: np.ones(genomes.shape, dtype=bool))
    construct(strategies.get(experiment.strategy.kind), experiment.strategy.settings, domain, 0, where="strategy")
    construct(rewards.get(experiment.reward.kind), experiment.reward.settings, 1.0, where="reward")
    if isinstance(experiment, LookupExperiment):
        return  # its space reads tables that are not here
    if experiment.space.name in (DERIVED, NNI):
        check(load_space_class(experiment.space.name), experiment.space.settings, 1, where="space")
        return  # its model, or model space, is not here
    images = TaskInfo((1, 8, 8), 10)
    construct(load_space_class(experiment.space.name), experiment.space.settings, images, where="space")


def _pyproject() -> dict[str, Any]:
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_floors_of_the_page_are_those_of_the_contracts() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text().partition("## Floors")[2].split("```")[1]
    page = {name: row for row, line in enumerate(text.splitlines()) for name in re.findall(r"\w+", line)}
    contract = next(c for c in _pyproject()["tool"]["importlinter"]["contracts"] if c["name"] == "floors")
    layers = [re.findall(r"\w+", layer) for layer in contract["layers"]]
    assert {name for layer in layers for name in layer} <= set(page)
    rows = [[page[name] for name in layer] for layer in layers]
    assert all(max(above) <= min(below) for above, below in pairwise(rows)), "a room stands on another floor"


# ---- the README ---------------------------------------------------------------------------------------


def test_the_readme_names_every_extra() -> None:
    table = (ROOT / "README.md").read_text().partition("## Extras")[2].partition("##")[0]
    assert set(_pyproject()["project"]["optional-dependencies"]) <= set(re.findall(r"`(\w+)`", table))


@pytest.mark.parametrize("registry", [strategies, rewards], ids=lambda registry: registry.what)
def test_the_readme_names_what_is_on_offer(registry: Registry[Any]) -> None:
    text = (ROOT / "README.md").read_text()
    assert [name for name in registry if f"`{name}`" not in text] == []


def test_the_changelog_has_the_version() -> None:
    import nas

    assert f"## [{nas.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


# ---- docs/experiment.md -------------------------------------------------------------------------------


def documented(after: str = "", name: str = "experiment.md") -> dict[str, list[str]]:
    """Key → default cells of a page, of the tables below the line that starts with ``after``."""
    text = (ROOT / "docs" / name).read_text()
    if after:
        text = re.split(r"^(?:Keys of |## )", text[text.index(after) + len(after) :], maxsplit=1, flags=re.MULTILINE)[0]
    found: dict[str, list[str]] = {}
    for key, default in re.findall(r"^\| `([\w.]+)` \|[^|]*\| ([^|]*) \|", text, re.MULTILINE):
        found.setdefault(key, []).append(default.strip())
    return found


def fields() -> Iterator[tuple[str, Any]]:
    """Every key of the schema and its default."""
    for name, field in Experiment.model_fields.items():
        section: Any = field.annotation
        if not hasattr(section, "model_fields"):
            yield name, field.default
            continue
        for key, inner in section.model_fields.items():
            yield f"{name}.{key}", inner.default


def plugins() -> Iterator[tuple[str, str, Callable[..., Any], int]]:
    """Section, name, constructor, and how many positional arguments the engine fills in."""
    yield from (("task", name, tasks.get(name), 1) for name in tasks)
    yield from (("strategy", name, strategies.get(name), 2) for name in strategies)
    yield "strategy", "halving:NAME", strategies.get("halving:random"), 2
    yield from (("reward", name, rewards.get(name), 1) for name in rewards)
    yield from (("space", name, load_space_class(name), 1) for name in available("search_spaces"))


def same(cell: str, default: Any) -> bool:
    if cell == "*required*":
        return default is inspect.Parameter.empty or repr(default) == "PydanticUndefined"
    written = yaml.safe_load(cell.strip("`"))
    return bool(written == json.loads(json.dumps(default)))


@pytest.mark.parametrize(("key", "default"), [f for f in fields() if f[0] != "name"], ids=lambda v: str(v)[:30])
def test_every_key_is_documented_with_its_default(key: str, default: Any) -> None:
    assert key in documented(), f"docs/experiment.md lacks {key}"
    assert same(documented()[key][0], default), f"{key}: the page says {documented()[key][0]}, the code {default!r}"


def test_no_key_is_documented_that_does_not_exist() -> None:
    known = {key for key, _ in fields()}
    for section, _, plugin, filled in plugins():
        known |= {f"{section}.{name}" for name in list(inspect.signature(plugin).parameters)[filled:]}
    assert set(documented()) <= known | {"mnasnet_soft", "mnasnet_hard", "tunas_absolute", "weighted_product"}


@pytest.mark.parametrize(("section", "name", "plugin", "filled"), list(plugins()), ids=lambda v: str(v)[:30])
def test_every_key_of_a_plugin_is_documented(section: str, name: str, plugin: Callable[..., Any], filled: int) -> None:
    parameters = list(inspect.signature(plugin).parameters.values())[filled:]
    rows = documented(f"Keys of `{name}`") if parameters else {}
    for parameter in parameters:
        key = f"{section}.{parameter.name}"
        assert key in rows, f"docs/experiment.md lacks {key} of {name}"
        assert same(rows[key][0], parameter.default), f"{key}: {rows[key][0]}, the code {parameter.default!r}"


def test_open_sections_are_those_that_the_page_calls_open() -> None:
    kinds = {name: field.annotation for name, field in Experiment.model_fields.items()}
    found = {name for name, kind in kinds.items() if inspect.isclass(kind) and issubclass(kind, OpenSection)}
    assert found == {"task", "space", "strategy", "reward"}


# ---- docs/sweep.md --------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [Sweep, Range], ids=lambda model: model.__name__)
def test_every_key_of_a_sweep_is_documented_with_its_default(model: Any) -> None:
    rows = documented(name="sweep.md")
    assert set(rows) == {*Sweep.model_fields, *Range.model_fields}
    for key, field in model.model_fields.items():
        if key != "name":
            assert same(rows[key][0], field.get_default(call_default_factory=True)), key


def test_every_field_of_a_sweeps_result_is_documented() -> None:
    page = (ROOT / "docs" / "sweep.md").read_text().partition("| field of `sweep.json`")[2].partition("##")[0]
    named = set(re.findall(r"`(\w+)`", page))
    for function in ("write_result", "_trial", "_best"):
        assert written_keys(function, "sweep/result.py") - named == set()
    assert written_keys("plain", "sweep/parameter.py", "Parameter") - named == set()


# ---- docs/run-folder.md, docs/latency-tables.md, latency_tables/README.md ------------------------------


def written_keys(function: str, module: str = "result.py", owner: str = "") -> set[str]:
    """The keys of all dictionaries that a function of a module, or a method of its class, writes out."""
    tree: Any = ast.parse((ROOT / "nas" / module).read_text())
    if owner:
        tree = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == owner)
    body = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)
    dicts = [node for node in ast.walk(body) if isinstance(node, ast.Dict)]
    return {key.value for d in dicts for key in d.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}


@pytest.mark.parametrize(
    "function",
    ["_manifest", "candidate_facts", "_other_runtimes", "_summary", "_rows", "_trial", "_finalist", "_elsewhere",
     "_hypervolume"],
)  # fmt: skip
def test_every_written_field_is_documented(function: str) -> None:
    quoted = re.findall(r"`([^`\n]+)`", (ROOT / "docs" / "run-folder.md").read_text())
    named = {part for text in quoted for part in re.split(r"[.\[\]]+", text)}
    assert written_keys(function)
    assert written_keys(function) - named == set()


def test_every_field_of_a_record_and_every_format_is_documented() -> None:
    text = (ROOT / "docs" / "compression.md").read_text()
    named = {part for quoted in re.findall(r"`([^`\n]+)`", text) for part in re.split(r"[.\[\]]+", quoted)}
    written = written_keys("write_record", "pipeline/record.py")
    for function in ("run", "_stage", "_finish"):
        written |= written_keys(function, "pipeline/run.py", "Pipeline")
    assert written - named == set()
    assert written_keys("add_format", "student/formats/base.py") - {"formats"} - named == set()
    assert [name for name in formats if f"| `{name}` |" not in text] == []


def test_every_pass_has_a_section_that_lists_its_options() -> None:
    text = (ROOT / "docs" / "compression.md").read_text()
    for name in passes:
        section = re.split(r"^## ", text.partition(f"\n## `{name}`")[2], maxsplit=1, flags=re.MULTILINE)[0]
        assert section, f"docs/compression.md lacks a section `{name}`"
        kind = passes.get(name)
        options = options_of(kind) if "settings_for" in vars(kind) else {}
        assert [option for option in options if f"| `{option}` |" not in section] == [], name


def test_every_file_of_the_student_folder_is_documented() -> None:
    text = (ROOT / "docs" / "run-folder.md").read_text()
    package = (ROOT / "nas" / "student" / "package.py").read_text()
    files = set(re.findall(r'making / "([\w.]+)"', package))
    assert "model.onnx" in files
    assert [name for name in files if f"`{name}`" not in text] == []


def test_every_field_of_a_table_is_documented() -> None:
    text = (ROOT / "docs" / "latency-tables.md").read_text()
    schema = table_schema()
    objects = [schema, *schema["$defs"].values()]
    names = {name for one in objects for name in one.get("properties", {})}
    space = load_space_class("mobilenet")(TaskInfo((1, 8, 8), 10), widths=[[16]], depths=[[1]], strides=[1])  # type: ignore[call-arg]
    content = testing.synthetic_table(space)._content()
    assert {*content, *content["device"], *content["fits"]["latency_ms"]} <= names
    assert [name for name in sorted({*names, *content["fits"]}) if f"`{name}`" not in text] == []


def test_every_bundled_table_loads_and_others_figures_say_whose_they_are() -> None:
    text = (ROOT / "latency_tables" / "README.md").read_text()
    for path in available("latency_tables").values():
        table = LatencyTable.load(path)
        if table.origin:
            assert f"`{path.name}`" in text
            assert table.origin["licence"] in ("MIT", "Apache-2.0", "CC-BY-4.0", "CC0-1.0")


def test_every_importer_and_action_is_documented() -> None:
    text = (ROOT / "docs" / "latency-tables.md").read_text()
    assert [name for name in importers if f"| `{name}` |" not in text] == []
    actions = ("list", "show", "validate", "compare", "import")
    assert [action for action in actions if f"nas tables {action}" not in text] == []


def test_figures_are_measured_again_by_the_snippet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page's own script, on a run folder with two small models whose accuracies are known."""
    run = tmp_path / "runs" / "digits"
    (run / "student").mkdir(parents=True)
    x = np.eye(4, dtype=np.float32)[[0, 1, 2, 3, 0, 1, 2, 3]]
    y = np.arange(8) % 4
    np.savez(run / "test.npz", x=x, y=y)
    onnx.save(linear(np.eye(4)), run / "teacher.onnx")
    onnx.save(linear(np.diag([1.0, 1.0, 1.0, -1.0])), run / "student" / "model.onnx")
    latency = {"threads": 1, "batch": 2, "p50_ms": 0.01, "teacher_p50_ms": 0.01}
    manifest = {"latency": [latency], "quality": {"student_onnx": 0.75}, "size_bytes": {"onnx": 1}}
    (run / "student" / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.chdir(tmp_path)
    (script,) = (text for text in blocks(ROOT / "docs" / "run-folder.md", "python") if "onnxruntime" in text)
    exec(compile(script, "run-folder.md", "exec"), {"__name__": "snippet"})
    said = capsys.readouterr().out
    assert "teacher: accuracy 1.0000" in said
    assert "student: accuracy 0.7500" in said
    imported = set(re.findall(r"^(?:import|from) (\w+)", script, re.MULTILINE))
    assert imported <= {"json", "time", "pathlib", "numpy", "onnxruntime"}


def linear(weight: np.ndarray[Any, Any]) -> onnx.ModelProto:
    """``x @ weight`` with a free batch dimension."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(weight.astype(np.float32), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


# ---- docs/extending.md --------------------------------------------------------------------------------


def snippets(page: str = "extending.md") -> dict[str, str]:
    """File name → text of every complete example."""
    found = {}
    for block in blocks(ROOT / "docs" / page, "python"):
        first, _, text = block.partition("\n")
        if first.startswith("# file: "):
            found[first.removeprefix("# file: ").strip()] = text
    return found


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, Registry[Any]], Any]]:
    """Writes all examples into the working directory and gets one as an experiment would: by ``module:name``."""
    for name, text in snippets().items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # the pickling of tasks and evaluators, as PYTHONPATH=. does it
    yield lambda name, registry: registry.get(name)
    for name in snippets():
        sys.modules.pop(Path(name).stem, None)


def test_the_examples_are_all_there() -> None:
    kinds = ("strategy", "reward", "space", "pass", "task", "data", "runtime", "evaluator", "search")
    assert set(snippets()) == {f"my_{kind}.py" for kind in kinds}


@pytest.mark.parametrize("name", sorted(snippets()))
def test_an_example_is_short(name: str) -> None:
    lines = [line for line in snippets()[name].splitlines() if line.strip()]
    assert len(lines) < MAX_LINES
    assert max(map(len, lines)) <= 120


Load = Callable[[str, Registry[Any]], Any]


def test_strategy_example(load: Load) -> None:
    kind = load("my_strategy:HillClimb", strategies)
    testing.check_strategy(lambda domain, seed: construct(kind, {"restart": 0.1}, domain, seed, where="strategy"))


def test_reward_example(load: Load) -> None:
    kind = load("my_reward:LogTradeOff", rewards)
    reward = construct(kind, {"price": 0.05}, 2.0, where="reward")
    testing.check_reward(reward)
    assert reward(0.9, 1.0) == pytest.approx(0.95)


@pytest.mark.parametrize("name", ["my_space.py", "my_space:Plain"])
def test_space_example(load: Load, name: str) -> None:
    space = construct(load_space_class(name), {"widths": [8, 24]}, TaskInfo((3, 8, 8), 5), where="space")
    testing.check_space(space, candidates=4)


def test_pass_example(load: Load) -> None:
    kind = load("my_pass:LowRank", passes)
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1, bias=False))
    testing.check_pass(kind, model, {"0": 2, "3": 4}, torch.rand(8, 3, 6, 6))


def test_the_whole_rank_changes_nothing(load: Load) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 1))
    x = torch.rand(2, 3, 6, 6)
    before = model(x)
    after = load("my_pass:LowRank", passes)({"0": 3}).apply(model, x)(x)
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize(("layer", "rank"), [("0", 0), ("0", 4), ("1", 1), ("nowhere", 1)])
def test_the_pass_example_refuses_what_it_cannot_do(load: Load, layer: str, rank: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 3))
    with pytest.raises(CompressionError):
        load("my_pass:LowRank", passes)({layer: rank}).apply(model, torch.rand(2, 3, 6, 6))


def test_task_and_data_examples(load: Load) -> None:
    task = construct(load("my_task:TopK", tasks), {"seed": 1, "k": 1}, "my_data:Stripes", where="task")
    x, y = task.split("train")
    assert task.info.classes == 2
    assert x.shape[1:] == task.info.input_shape == (1, 8, 8)
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    sizes = [len(task.split(name)[1]) for name in ("train", "valid", "test")]
    assert sum(sizes) == 400
    perfect = np.eye(2)[y.numpy()]
    assert task.evaluate(perfect, y.numpy())[task.metric] == 1.0
    assert task.evaluate(-perfect, y.numpy())[task.metric] == 0.0
    logits = torch.zeros(len(y), 2, requires_grad=True)
    task.distillation_loss(logits, torch.from_numpy(perfect), y, 0.5, 2.0).backward()
    assert logits.grad is not None


def test_runtime_example(load: Load) -> None:
    testing.check_runtime(load("my_runtime:Reference", runtimes))
    runtime = load("my_runtime:Reference", runtimes)()
    space = load_space_class("my_space.py")(TaskInfo((1, 8, 8), 2))  # type: ignore[call-arg]
    for part in space.keys().values():
        runtime.load(part.to_onnx(1), threads=1, batch=1)()
    runtime.load(linear(np.eye(4)), threads=1, batch=3)()


def test_evaluator_example(load: Load) -> None:
    task = construct(tasks.get("classification"), {"limit": 200}, "digits", where="task")
    space = load_space("my_space:Plain", task.info, {})
    evaluator = load("my_evaluator:GradNorm", evaluators)(space, task)
    testing.check_evaluator(evaluator, space.encode(space.ladder()[0]))


def test_search_example(load: Load, tmp_path: Path) -> None:
    module = importlib.import_module("my_search")
    trials = module.main(tmp_path, 20)
    assert len(trials) == 3
    assert all(trial.violation == 0 for trial in trials)
    again = module.main(tmp_path, 20)  # read from the study
    assert [t.genome for t in again] == [t.genome for t in trials]


def test_the_checks_that_the_page_names_exist() -> None:
    names = set(re.findall(r"`(check_\w+)`", (ROOT / "docs" / "extending.md").read_text()))
    assert names == {name for name in dir(testing) if name.startswith("check_")}


# ---- docs/own-model.md --------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Writes the page's files into the working directory and runs one of them, trainings shortened."""
    files = snippets("own-model.md")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_models", raising=False)  # another test's
    yield lambda name: exec(compile(files[name].replace("EPOCHS = 12", "EPOCHS = 4"), name, "exec"), {})
    sys.modules.pop("my_models", None)


def test_the_example_model_is_trained_and_looked_at(
    own: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    own("train_digits.py")
    assert float(capsys.readouterr().out.partition("accuracy:")[2]) > 0.5  # of ten digits
    own("look.py")
    said = capsys.readouterr().out.strip()
    assert said
    assert f"```\n{said}\n```" in (ROOT / "docs" / "own-model.md").read_text()


@pytest.mark.slow
def test_the_example_model_becomes_a_student(own: Callable[[str], None], tmp_path: Path) -> None:
    import nas

    own("train_digits.py")
    (block,) = blocks(ROOT / "docs" / "own-model.md", "yaml")
    short = ["search.trials=2", "search.batch=2", "search.workers=0", "training.epochs=2", "finalists.epochs=2"]
    short += ["training.compressed_epochs=1", "finalists.compressed_epochs=1", "finalists.count=1", "baselines=[]"]
    short += ["table.seconds=3", "table.nets=8", "finalists.seconds=1", "space.bits=[32]", "space.ranks=[1.0]"]
    student = nas.search(yaml.safe_load(block), out=tmp_path / "run", overrides=short)
    assert student.manifest["candidate"]["kd_weight"] in (0.5, 0.9)
    assert student.predict(np.zeros((2, 1, 8, 8), np.float32)).shape == (2, 10)
    assert student.size_bytes < student.manifest["size_bytes"]["teacher_onnx"]
