"""``nas compress``: steps in order with fine-tuning between them, a true record, a student; it goes on after Ctrl-C."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import nas
from nas.cli import main
from nas.compression import passes
from nas.errors import CompressionError, ContentError, DataError, ExperimentError, NasError, StudyError
from nas.pipeline import Step, Tuning, parse_step, read_plan, steps_of
from nas.pipeline.record import read_record, sentences, table
from nas.progress import Silent
from nas.student.export import onnx_macs_params
from nas.tasks import tasks

MODELS = '''
import torch
from torch import nn


def build() -> nn.Module:
    """A plain little network of the user's own."""
    return nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 32, 3, stride=2, padding=1),
        nn.ReLU(), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
    )


def no_module() -> str:
    return "a model"


def for_colour() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 10))


def for_three_classes() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
'''

# A pass of the user's own with options for a whole model and a penalty: linear layers split in two.
SPLIT = '''
from collections.abc import Sequence
from fnmatch import fnmatch

import torch
from torch import nn

from nas.compression import Pass
from nas.compression.base import named_module
from nas.compression.fold import replace_module
from nas.errors import CompressionError


class Split(Pass):
    """Truncated SVD; ``settings`` maps a linear layer to its rank, or to the rank and the weight of a penalty."""

    @classmethod
    def settings_for(cls, model, sample, loss=None, *, rank: int = 8, layers: Sequence[str] = ("*",),
                     penalty: float = 0.0):
        if loss is not None:
            assert loss(model(sample)).ndim == 0
        linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
        chosen = [name for name in linear if any(fnmatch(name, pattern) for pattern in layers)]
        return {name: {"rank": rank, "penalty": penalty} for name in chosen}

    def penalty(self, model):
        named = [(named_module(model, name, "split"), s["penalty"]) for name, s in self.settings.items()]
        weights = [(layer.weight, weight) for layer, weight in named if weight]
        return sum((w * tensor.square().sum() for tensor, w in weights), start=torch.zeros(())) if weights else None

    def apply(self, model, sample, loss=None):
        for name, setting in self.settings.items():
            layer, rank = named_module(model, name, "split"), setting["rank"]
            if not 1 <= rank <= min(layer.weight.shape):
                raise CompressionError(f"split: rank {rank} of {name!r}.", expected=f"1..{min(layer.weight.shape)}")
            u, s, v = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
            down, up = nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features)
            down.weight.data, up.weight.data = (s[:rank, None] * v[:rank]).clone(), u[:, :rank].clone()
            up.bias.data = layer.bias.detach().clone()
            replace_module(model, name, nn.Sequential(down, up))
        return model
'''

SETTINGS = {"channel_prune": {"0": 16, "3": 16}, "my_pass:Split": {"6": {"rank": 16, "penalty": 0.0}}}
QUICK = {"task": {"limit": 600}, "seconds": 0.3}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: a module, a pass, trained weights."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "my_models.py").write_text(MODELS)
    (folder / "my_pass.py").write_text(SPLIT)
    scope: dict[str, Any] = {}
    exec(MODELS, scope)
    task = tasks.get("classification")("digits", limit=600)
    x, y = task.split("train")
    torch.manual_seed(0)
    model = scope["build"]()
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    save_file(model.state_dict(), folder / "w.safetensors")
    return folder


@pytest.fixture(autouse=True)
def there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user stands in that folder, and nothing of the same names was imported before."""
    for name in ("my_models", "my_pass"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(place)


def compressed(out: Path, **changes: Any) -> nas.Student:
    arguments: dict[str, Any] = {
        "weights": "w.safetensors", "settings": SETTINGS, "tuning": Tuning(epochs=2, final_epochs=2), **QUICK, **changes
    }  # fmt: skip
    return nas.compress("my_models:build", "digits", out=out, **arguments)


@pytest.fixture(scope="module")
def student(place: Path, tmp_path_factory: pytest.TempPathFactory) -> nas.Student:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.syspath_prepend(place)
        return compressed(tmp_path_factory.mktemp("runs") / "whole")


# ---- the record ---------------------------------------------------------------------------------------


def test_every_step_is_recorded_as_its_files_say(student: nas.Student) -> None:
    run = student.folder.parent
    record = read_record(run)
    rows = record["rows"]
    assert [row["name"] for row in rows] == ["00-original", "01-channel_prune", "02-Split", "03-final"]
    for row in rows:
        path = run / "steps" / row["name"] / "model.onnx"
        assert row["size_bytes"] == path.stat().st_size
        assert (row["macs"], row["params"]) == onnx_macs_params(onnx.load(path))
        assert row["p95_ms"] >= row["p50_ms"] > 0
        assert row["agreement"] > 0.99
        assert row["quality"] == pytest.approx(row["quality_onnx"], abs=0.02)
    sizes, macs = ([row[key] for row in rows] for key in ("size_bytes", "macs"))
    assert sizes[0] > 1.5 * sizes[1] > 1.5 * sizes[2]
    assert sizes[2] == sizes[3]
    assert macs[0] > macs[1] > macs[2] == macs[3]
    assert rows[1]["settings"] == SETTINGS["channel_prune"]
    assert rows[2]["settings"] == SETTINGS["my_pass:Split"]
    assert rows[1]["epochs"] == 2
    assert "quality_applied" not in rows[0]


def test_fine_tuning_repairs_what_a_pass_breaks(student: nas.Student) -> None:
    first, pruned, *_, last = read_record(student.folder.parent)["rows"]
    assert pruned["quality_applied"] < first["quality"] - 0.02, "half of the channels are gone"
    assert pruned["quality"] > pruned["quality_applied"] + 0.02
    assert last["quality"] > first["quality"] - 0.05


def test_the_record_is_a_table_for_people(student: nas.Student) -> None:
    record = read_record(student.folder.parent)
    head, *rows = table(record)
    assert len({len(row) for row in (head, *rows)}) == 1
    assert rows[0][head.index("speed")] == "1.00 ×"
    assert f"{record['test']['student_onnx']:.4f} in onnxruntime" in " ".join(sentences(record))
    with pytest.raises(StudyError, match="no record"):
        read_record(student.folder)


# ---- the student --------------------------------------------------------------------------------------


def test_the_student_is_a_student_folder_like_the_searchs(student: nas.Student) -> None:
    assert {path.name for path in student.folder.iterdir()} == {
        "model.onnx", "model.pt2", "weights.safetensors", "candidate.json", "manifest.json", "README.md", "predict.py",
        "selftest.npz",
    }  # fmt: skip
    assert json.loads((student.folder / "candidate.json").read_text()) == SETTINGS
    with np.load(student.folder.parent / "test.npz", allow_pickle=False) as file:
        x, y = file["x"], file["y"]
    assert (student.predict(x).argmax(1) == y).mean() == pytest.approx(student.quality)
    assert student.quality > 0.85
    with torch.no_grad():
        in_torch = student.torch_program()(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(in_torch, student.predict(x), atol=1e-3)
    weights = load_file(student.folder / "weights.safetensors")
    assert weights["6.0.weight"].shape[0] == 16
    done = subprocess.run(
        [sys.executable, "predict.py", "--selftest"], cwd=student.folder, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_its_candidate_is_a_plan_that_makes_it_again(student: nas.Student, tmp_path: Path) -> None:
    plan = read_plan(student.folder / "candidate.json")
    again = compressed(tmp_path / "again", settings=plan)
    assert equal(states(again)[-1], states(student)[-1])


def states(student: nas.Student) -> list[dict[str, torch.Tensor]]:
    return [load_file(path) for path in sorted(student.folder.parent.glob("steps/*/state.safetensors"))]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---- going on -----------------------------------------------------------------------------------------


class Interrupting(Silent):
    """Ctrl-C in the middle of a stage's work."""

    def __init__(self, stage: str) -> None:
        self.at, self.now = stage, ""

    def stage(self, name: str) -> None:
        self.now = name

    def update(self, share: float, message: str = "") -> None:
        if self.now == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stage", ["02-Split", "measuring"])
def test_what_is_interrupted_keeps_its_steps_and_ends_as_if_it_had_not_been(
    student: nas.Student, tmp_path: Path, stage: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        compressed(tmp_path / "run", progress=Interrupting(stage))
    finished = sorted(tmp_path.glob("run/steps/*/facts.json"))
    assert len(finished) == (2 if stage == "02-Split" else 4)
    times = [path.stat().st_mtime_ns for path in finished]
    again = compressed(tmp_path / "run", resume=True)
    assert [path.stat().st_mtime_ns for path in finished] == times, "what was finished is not done again"
    assert len(states(again)) == len(states(student))
    assert all(equal(a, b) for a, b in zip(states(again), states(student), strict=True))


def test_another_pipeline_is_not_gone_on_with(student: nas.Student, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(student.folder.parent, run)
    with pytest.raises(StudyError, match="holds a pipeline already"):
        compressed(run)
    with pytest.raises(StudyError, match="tuning changed"):
        compressed(run, resume=True, tuning=Tuning(epochs=3))
    with pytest.raises(StudyError, match="data, seed, steps changed"):
        compressed(run, resume=True, settings={"channel_prune": {"0": 8}}, seed=1)


# ---- options, penalties, models ----------------------------------------------------------------------


def test_options_become_settings_by_layer_and_a_penalty_has_its_epochs(tmp_path: Path) -> None:
    task = tasks.get("classification")("digits", limit=600)
    scope: dict[str, Any] = {}
    exec(MODELS, scope)
    model = scope["build"]()
    model.load_state_dict(load_file("w.safetensors"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    norms = {}
    for penalty in (0.0, 1.0):
        step = ("my_pass:Split", {"rank": 4, "layers": ["6"], "penalty": penalty})
        tuning = Tuning(epochs=1, penalty_epochs=6, lr=1e-2)
        student = nas.compress(model, task, [step], tuning=tuning, out=tmp_path / f"{penalty}", seconds=0.2)
        row = read_record(student.folder.parent)["rows"][1]
        assert row["settings"] == {"6": {"rank": 4, "penalty": penalty}}
        assert row["options"] == {"rank": 4, "layers": ["6"], "penalty": penalty}
        assert row["penalty_epochs"] == (6 if penalty else 0)
        state = load_file(student.folder / "weights.safetensors")
        norms[penalty] = float((state["6.1.weight"] @ state["6.0.weight"]).norm())
    assert norms[1.0] < 0.5 * norms[0.0], "the penalty was part of the loss"
    assert equal(before, model.state_dict()), "the user's model stays as it is"


def test_distillation_comes_from_the_original_model(tmp_path: Path) -> None:
    """With the teacher's word alone, labels that are wrong do no harm."""
    task = tasks.get("classification")("digits", limit=600)
    task.split("train")[1][:] = torch.randint(
        0, 10, task.split("train")[1].shape, generator=torch.Generator().manual_seed(0)
    )  # in place: the task is this test's
    found = {}
    for weight in (0.0, 1.0):
        tuning = Tuning(epochs=4, kd_weight=weight, lr=3e-3)
        scope: dict[str, Any] = {}
        exec(MODELS, scope)
        model = scope["build"]()
        model.load_state_dict(load_file("w.safetensors"))
        student = nas.compress(
            model, task, settings={"channel_prune": {"0": 16}}, tuning=tuning, out=tmp_path / f"{weight}", seconds=0.2
        )
        found[weight] = student.quality
    assert found[1.0] > 0.85
    assert found[0.0] < found[1.0] - 0.2


def test_an_untrained_model_is_compressed_and_its_quality_said(tmp_path: Path) -> None:
    student = compressed(tmp_path / "run", weights=None, tuning=Tuning(epochs=0), settings={"quantize": {"0": 8}})
    assert student.manifest["quality"]["teacher"] < 0.5
    (first, second) = read_record(tmp_path / "run")["rows"]
    assert first["quality"] < 0.5
    assert second["quality_applied"] == second["quality"], "nothing was trained"
    assert student.manifest["onnx"]["operators"]["QuantizeLinear"] > 0


# ---- what is asked for --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "step"),
    [
        ("quantize", Step("quantize")),
        ("channel_prune:ratio=0.5,importance=taylor", Step("channel_prune", {"ratio": 0.5, "importance": "taylor"})),
        ("quantize:bits=8,skip=[stem.*, *.head]", Step("quantize", {"bits": 8, "skip": ["stem.*", "*.head"]})),
        ("low_rank:energy=0.9", Step("low_rank", {"energy": 0.9})),
        ("my_pass:Split", Step("my_pass:Split")),
        ("my_pass:Split:rank=4,layers=[6]", Step("my_pass:Split", {"rank": 4, "layers": [6]})),
        ("quantize:mixed={a: 4, b: 8},flag=true", Step("quantize", {"mixed": {"a": 4, "b": 8}, "flag": True})),
    ],
)  # fmt: skip
def test_steps_as_people_write_them(text: str, step: Step) -> None:
    assert parse_step(text) == step


def test_a_plan_alone_is_its_steps_in_order_and_fills_steps_without_options() -> None:
    plan = {"quantize": {"0": 8}, "channel_prune": {"0": 16}}
    assert [step.name for step in steps_of([], plan)] == ["quantize", "channel_prune"]
    steps = steps_of(["channel_prune", "my_pass:Split:rank=2", "quantize"], plan)
    assert [(step.name, step.settings) for step in steps] == [
        ("channel_prune", {"0": 16}), ("my_pass:Split", None), ("quantize", {"0": 8}),
    ]  # fmt: skip
    assert steps[1].options == {"rank": 2}


WRONG: list[tuple[list[Any], dict[str, Any] | None, type[NasError], str]] = [
    ([], None, ExperimentError, "nothing to do"),
    (["nowhere:rank"], None, ContentError, "nowhere"),
    (["nothing"], None, ContentError, "Unknown compression pass 'nothing'"),
    (["my_models:build"], None, ContentError, "no compression pass"),
    (["my_pass:Split:rank"], None, ExperimentError, "'rank' has no value"),
    (["my_pass:Split:ratio=2"], None, ExperimentError, "no option 'ratio'"),
    (["my_pass:Split:rank=many"], None, ExperimentError, "my_pass:Split.rank is 'many'"),
    (["my_pass:Split", "my_pass:Split:rank=2"], None, ExperimentError, "twice"),
    (["my_pass:Split:rank=2"], {"my_pass:Split": {"6": 2}}, ExperimentError, "options and settings"),
    (["my_pass:Split"], {"quantize": {"0": 8}}, ExperimentError, "which is no step"),
    ([], {"quantize": {}}, CompressionError, "empty"),
]


@pytest.mark.parametrize(("asked", "plan", "error", "words"), WRONG, ids=[words for *_, words in WRONG])
def test_what_cannot_be_asked_is_said_before_anything_is_read(
    asked: list[Any], plan: dict[str, Any] | None, error: type[NasError], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words.replace("(", r"\(")):
        nas.compress("my_models:build", "no/such/data", asked, settings=plan, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (None, ContentError, "There is no plan"),
        ("a: [", ExperimentError, "no valid YAML"),
        ("a: 8", ExperimentError, "is no plan"),
        ("{}", ExperimentError, "is no plan"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(
    content: str | None, error: type[NasError], words: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "plan.yaml").write_text(content)
    with pytest.raises(error, match=words):
        read_plan(tmp_path / "plan.yaml")


def test_every_option_that_a_pass_has_is_listed_where_one_is_wrong() -> None:
    with pytest.raises(ExperimentError, match="rank, layers, penalty"):
        steps_of(["my_pass:Split:ratio=2"])
    own = [name for name in passes if "settings_for" in vars(passes.get(name))]
    for name in own:
        with pytest.raises(ExperimentError, match="has no option 'no_such_option'"):
            steps_of([(name, {"no_such_option": 1})])


UNFIT: list[tuple[dict[str, Any], type[NasError], str]] = [
    ({"weights": "nothing.safetensors"}, ContentError, "no weights at nothing.safetensors"),
    ({"settings": {"channel_prune": {"stem": 4}}}, CompressionError, "no module 'stem'"),
    ({"settings": {"channel_prune": {"0": 99}}}, CompressionError, "99 of 24"),
    ({"settings": None, "steps": ["my_pass:Split:rank=900"]}, CompressionError, "rank 900"),
    ({"settings": None, "steps": ["my_pass:Split:layers=[stage.*]"]}, CompressionError, "no layer of the model"),
    ({"task": {"limit": 600, "colour": True}}, ExperimentError, "task.colour"),
    ({"tuning": None, "model": "my_models:no_module"}, ContentError, "returned str"),
    ({"model": "my_models:for_colour", "weights": None}, DataError, "fails on inputs"),
    ({"model": "my_models:for_three_classes", "weights": None}, DataError, r"shape \(\d+, 3\)"),
    ({"model": "my_models:for_three_classes"}, ContentError, "does not fit my_models:for_three_classes"),
]


@pytest.mark.parametrize(("changes", "error", "words"), UNFIT, ids=[words for *_, words in UNFIT])
def test_what_does_not_fit_is_one_clear_error(
    changes: dict[str, Any], error: type[NasError], words: str, tmp_path: Path
) -> None:
    changes = {"model": "my_models:build", "tuning": Tuning(epochs=0), **changes}
    model, steps = changes.pop("model"), changes.pop("steps", ())
    arguments = {"weights": "w.safetensors", "settings": SETTINGS, **QUICK, **changes}
    with pytest.raises(error, match=words):
        nas.compress(model, "digits", steps, out=tmp_path / "run", **arguments)


@pytest.mark.parametrize(
    "wrong", [{"epochs": -1}, {"lr": 0.0}, {"kd_weight": 1.5}, {"temperature": 0.0}, {"batch_size": 1}, {"views": 0}]
)
def test_a_tuning_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ExperimentError, match=next(iter(wrong))):
        Tuning(**wrong)


# ---- the command line ---------------------------------------------------------------------------------


def test_the_command_prints_the_record_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plan.yaml").write_text("channel_prune: {0: 16}\n")
    command = (
        "compress", "my_models:build", "--weights", "w.safetensors", "--data", "digits", "--set", "task.limit=600",
        "--with", "channel_prune", "--with", "my_pass:Split:rank=8,layers=[6]", "--settings", tmp_path / "plan.yaml",
        "--epochs", 1, "--lr", 0.002, "--kd-weight", 0.3, "--temperature", 2, "--seconds", 0.3,
        "--out", tmp_path / "run",
    )  # fmt: skip
    assert main([*map(str, command)]) == 0
    said = capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert [row["name"] for row in record["rows"]] == ["00-original", "01-channel_prune", "02-Split"]
    for row in record["rows"]:
        assert row["name"] in said
        assert f"{row['size_bytes']:,}" in said
    assert f"student: {tmp_path / 'run' / 'student'}" in said
    assert main([*map(str, command)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*map(str, command), "--resume"]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--with", "my_pass:Split:ratio=1"), "no option 'ratio'"),
        (("--with", "my_pass:Split", "--set", "space.name=vit"), "--set space"),
        (("--with", "my_pass:Split", "--set", "task.data=digits"), "--data"),
        (("--settings", "none.yaml"), "none.yaml"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_message(
    arguments: tuple[str, ...], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compress", "my_models:build", "--data", "digits", "--out", str(tmp_path / "run"), *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert words in said
