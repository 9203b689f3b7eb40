"""Heads, dimensions of heads, units and widths of attention are pruned, however it is written, and branches dropped."""

from __future__ import annotations

import ast
import copy
import csv
import functools
import importlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import nas
from nas.compression import ChannelPrune, LayerDrop, apply_passes, passes
from nas.compression.importance import IMPORTANCES
from nas.errors import CompressionError
from nas.pipeline import Tuning
from nas.pipeline.prepare import prepare
from nas.progress import Silent
from nas.testing import check_pass
from nas.tracing import trace
from tests.own_models import Grouped, ResidualNet, TextTransformer, VisionTransformer, made

LENGTH, VOCABULARY = 12, 512
MODULES = ("argparse", "csv", "subprocess", "typing", "inspect", "tokenize")
QUICK = Tuning(epochs=1, kd_weight=0.0, lr=2e-3)


def loss_of(model: str, count: int) -> Callable[[torch.Tensor], torch.Tensor]:
    labels = torch.arange(count) % made(model)[2].classes
    return lambda logits: nn.functional.cross_entropy(logits, labels)


def weight(model: nn.Module, layer: str) -> tuple[int, ...]:
    return tuple(model.get_submodule(layer).weight.shape)  # type: ignore[union-attr,operator]


# ---- groups by name ------------------------------------------------------------------------------------


def test_heads_of_fused_and_chunked_projections() -> None:
    model, x, _ = made("vision transformer")
    settings = {
        "layers.0.attention.qkv.heads": {"keep": 2}, "layers.1.attention.qkv.heads": 3,
        "layers.1.attention.qkv.head_dim": 4, "layers.0.mlp.0": 16,
    }  # fmt: skip
    check_pass(ChannelPrune, model, settings, x)
    pruned = ChannelPrune(settings).apply(model, x)
    assert weight(pruned, "layers.0.attention.qkv") == (3 * 2 * 8, 32)
    assert weight(pruned, "layers.0.attention.proj") == (32, 2 * 8)
    assert weight(pruned, "layers.1.attention.qkv") == (3 * 3 * 4, 32)
    assert weight(pruned, "layers.0.mlp.3") == (32, 16)


def test_heads_of_torchs_own_attention() -> None:
    model, x, _ = made("text transformer")
    settings = {"encoder.layers.0.self_attn.in_proj.heads": 1, "embedding": 16}
    pruned = ChannelPrune(settings).apply(model, x)
    assert weight(pruned, "encoder.layers.0.self_attn.in_proj") == (3 * 1 * 8, 16)
    assert weight(pruned, "encoder.layers.1.self_attn.in_proj") == (3 * 4 * 8, 16)
    assert weight(pruned, "embedding") == (100, 16)
    assert pruned(x).shape == (len(x), 5)


def test_the_heads_that_say_nothing_go() -> None:
    """A head without weights is removed, and the model computes the same without it."""
    model, x, _ = made("vision transformer")
    with torch.no_grad():
        model.layers[0].attention.proj.weight[:, 8:16] = 0.0
        model.layers[0].attention.qkv.weight.view(3, 4, 8, 32)[:, 1] *= 1e-3
    for importance in ("l1", "l2", "group_lasso"):
        setting = {"layers.0.attention.qkv.heads": {"keep": 3, "importance": importance}}
        pruned = ChannelPrune(setting).apply(copy.deepcopy(model), x)
        with torch.no_grad():
            torch.testing.assert_close(pruned(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vision transformer", "text transformer", "residual"])
def test_every_importance_scores_the_groups_of_a_graph(name: str) -> None:
    """The structure is that of the settings, whatever chose; what is chosen differs."""
    model, x, _ = made(name)
    graph = trace(model, x)
    chosen = {}
    for importance in IMPORTANCES:
        if importance == "bn" and name != "residual":
            with pytest.raises(CompressionError, match="by its batch normalisation"):
                ChannelPrune.settings_for(graph, x, importance="bn")
            continue
        settings = ChannelPrune.settings_for(graph, x, ratio=0.5, round_to=4, importance=importance)
        pruned = ChannelPrune(settings).apply(copy.deepcopy(graph), x, loss_of(name, len(x)))
        chosen[importance] = pruned.state_dict()
    shapes = {key: value.shape for key, value in chosen["l1"].items()}
    assert all({key: value.shape for key, value in state.items()} == shapes for state in chosen.values())
    assert any(not torch.equal(chosen["l1"][key], chosen["taylor"][key]) for key in shapes)
    assert sum(map(torch.Size.numel, shapes.values())) < 0.6 * sum(p.numel() for p in graph.state_dict().values())


def test_a_saved_state_fits_the_skeleton_of_a_traced_model() -> None:
    model, x, _ = made("vision transformer")
    options: dict[str, dict[str, Any]] = {
        "layer_drop": {"count": 1}, "channel_prune": {"ratio": 0.5, "round_to": 4, "importance": "taylor"},
        "low_rank": {"ratio": 0.5}, "quantize": {"bits": 8},
    }  # fmt: skip
    work, plan, loss = prepare(model, x), {}, loss_of("vision transformer", len(x))
    for name, own in options.items():
        plan[name] = passes.get(name).settings_for(work, x, loss, **own)
        work = apply_passes(work, {name: plan[name]}, x, loss)
    assert any(key.endswith(".heads") for key in plan["channel_prune"])
    torch.manual_seed(7)
    skeleton = apply_passes(prepare(VisionTransformer().eval(), x), json.loads(json.dumps(plan)), x)
    skeleton.load_state_dict(work.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(skeleton.eval()(x), work.eval()(x))


def test_dimensions_of_heads_go_only_where_they_are_named() -> None:
    model, x, _ = made("vision transformer")
    graph = trace(model, x)
    plain = ChannelPrune.settings_for(graph, x, ratio=0.5)
    assert not any(name.endswith("head_dim") for name in plain)
    assert plain["layers.0.attention.qkv.heads"] == 2  # heads are counted one by one, channels by eights
    named = ChannelPrune.settings_for(graph, x, ratio=0.5, round_to=4, layers=["*.head_dim"])
    assert named == {f"layers.{i}.attention.qkv.head_dim": 4 for i in (0, 1)}
    without = ChannelPrune.settings_for(graph, x, ratio=0.5, skip=["*.heads", "patch"])
    assert set(without) == {"layers.0.mlp.0", "layers.1.mlp.0"}


def test_a_share_of_macs_is_met_by_heads_too() -> None:
    model, x, _ = made("vision transformer")
    graph = trace(model, x)
    settings = ChannelPrune.settings_for(graph, x, macs=0.5, round_to=4)
    assert any(name.endswith(".heads") for name in settings)
    before, after = (
        sum(p.numel() for p in m.parameters() if p.ndim == 2) for m in (graph, ChannelPrune(settings).apply(graph, x))
    )
    assert 0.35 < after / before < 0.55


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers.0.attention.qkv": 48}, r"made of \['layers.0.attention.qkv.heads', '[^']*head_dim'\]"),
        ({"layers.0.attention.qkv.heads": 5}, "keep 5 of 4 heads"),
        ({"layers.0.mlp.0.heads": 1}, "'layers.0.mlp.0.heads' cannot be pruned: .*no heads"),
        ({"layers.7.attention.qkv.heads": 1}, "no group 'layers.7.attention.qkv.heads'"),
        ({"head": 5}, "'head' cannot be pruned: it is the model's output"),
        ({"layers.0.mlp.3": 16, "patch": 8}, "is in a group with another layer that is named"),
    ],
)
def test_wrong_names_in_attention(settings: dict[str, Any], message: str) -> None:
    model, x, _ = made("vision transformer")
    with pytest.raises(CompressionError, match=message):
        ChannelPrune(settings).apply(model, x)


def test_the_lasso_reaches_heads_of_a_module_and_of_its_graph() -> None:
    """The penalty is the same, whether the fused projection is a parameter or a layer."""
    model, x, _ = made("text transformer")
    settings = {"encoder.layers.0.self_attn.in_proj.heads": {"keep": 2, "importance": "group_lasso"}}
    values = []
    for own in (model, trace(model, x)):
        step = ChannelPrune(settings)
        assert step.penalty(own) is None
        own(x)
        value = step.penalty(own)
        assert value is not None
        value.backward()
        values.append(value.detach())
    torch.testing.assert_close(*values)
    grad = model.encoder.layers[0].self_attn.in_proj_weight.grad  # type: ignore[union-attr,index]
    assert grad.abs().sum() > 0


# ---- branches --------------------------------------------------------------------------------------------


def test_branches_are_dropped_by_their_names() -> None:
    model, x, _ = made("vision transformer")
    graph = trace(model, x)
    settings = LayerDrop.settings_for(graph, x, ratio=1.0)
    assert set(settings) == {f"layers.{i}.{last}" for i in (0, 1) for last in ("attention.proj", "mlp.3")}
    one = LayerDrop.settings_for(graph, x, loss_of("vision transformer", len(x)), count=1, importance="loss")
    assert len(one) == 1
    check_pass(LayerDrop, graph, one, x)
    without = LayerDrop({"layers.0.attention.proj": True, "layers.1.mlp.3": True}).apply(graph.train(), x)
    assert without.training
    assert not any(name.startswith(("layers.0.attention", "layers.1.mlp")) for name, _ in without.named_modules())
    model.layers[0].attention, model.layers[1].mlp = Zero(), Zero()
    with torch.no_grad():
        torch.testing.assert_close(without.eval()(x), model(x), rtol=1e-4, atol=1e-5)


class Zero(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


def test_a_block_has_the_same_name_in_module_and_graph() -> None:
    model, x, _ = made("residual")
    graph = trace(model, x)
    settings = {"layers.0": True}
    with torch.no_grad():
        torch.testing.assert_close(
            LayerDrop(settings).apply(graph, x)(x), LayerDrop(settings).apply(model, x)(x), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("name", "message"),
    [("layers.0.mlp", "neither a branch nor a layer"), ("layers.0.attention.qkv", r"it makes \[n, 17, 96\]")],
)
def test_what_is_no_branch_is_said(name: str, message: str) -> None:
    model, x, _ = made("vision transformer")
    with pytest.raises(CompressionError, match=message):
        LayerDrop({name: True}).apply(trace(model, x), x)


# ---- before the first step --------------------------------------------------------------------------------


class Sorting(nn.Module):
    """Which layer is called depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU()), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return self.b(y) if float(y.sum()) > -1 else self.b(-y)


@pytest.mark.parametrize("build", [ResidualNet, VisionTransformer, TextTransformer, Grouped])
def test_models_become_graphs_that_compute_the_same(build: Callable[[], nn.Module]) -> None:
    model = build().eval()
    x = made("text transformer" if build is TextTransformer else "residual")[1]
    notes: list[str] = []
    graph = prepare(model, x, notes.append)
    assert isinstance(graph, torch.fx.GraphModule)
    assert not notes
    with torch.no_grad():
        torch.testing.assert_close(graph(x), model(x), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_traced_stays_a_module_and_is_noted() -> None:
    torch.manual_seed(0)
    model, x, notes = Sorting().eval(), made("residual")[1], []
    assert prepare(model, x, notes.append) is model
    assert len(notes) == 1
    assert "module by module" in notes[0]
    assert "cannot be traced" in notes[0]
    pruned = ChannelPrune(ChannelPrune.settings_for(model, x, ratio=0.5)).apply(model, x)
    assert weight(pruned, "b") == (10, 16)


# ---- whole compressions ------------------------------------------------------------------------------------


@functools.cache
def table(folder: Path) -> Path:
    """Lines of documentation and of code of Python's own library: real text, wherever Python is."""
    rows = []
    for name in MODULES:
        source = inspect.getsource(importlib.import_module(name))
        prose = {
            line.strip()
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module)
            for line in (ast.get_docstring(node) or "").splitlines()
        }
        code = {line.strip() for line in source.splitlines()} - prose
        for lines, label in ((prose, "prose"), (code, "code")):
            rows += [(line, label) for line in sorted(lines) if len(line.split()) >= 3][:60]
    path = folder / "lines.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return table(tmp_path_factory.mktemp("lines"))


class Bert(nn.Module):
    """A Hugging Face model that is built from a configuration; tokens → logits."""

    def __init__(self) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        config = transformers.BertConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=LENGTH, num_labels=2,
        )  # fmt: skip
        self.model = transformers.BertForSequenceClassification(config)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        mask = torch.where(tokens != 0, 0.0, -1e4)[:, None, None, :]
        types = torch.zeros_like(tokens)
        return self.model(input_ids=tokens, attention_mask=mask, token_type_ids=types).logits


def compressed(model: nn.Module, data: str | Path, task: dict[str, Any], out: Path, **more: Any) -> nas.Student:
    steps = () if "settings" in more else ("channel_prune:ratio=0.5,round_to=4", "quantize:bits=8")
    student = nas.compress(model, data, steps, task=task, tuning=QUICK, seconds=0.2, out=out, **more)
    x = np.load(out / "test.npz")["x"]
    with torch.no_grad():
        in_torch = student.torch_program()(torch.from_numpy(x)).numpy()
    assert (in_torch.argmax(1) == student.predict(x).argmax(1)).mean() > 0.97
    record = json.loads((out / "record.json").read_text())["rows"]
    assert record[-1]["size_bytes"] < 0.5 * record[0]["size_bytes"]
    assert record[1]["macs"] < 0.6 * record[0]["macs"]
    return student


def state(out: Path, stage: int) -> dict[str, torch.Tensor]:
    return load_file(sorted(out.glob("steps/*"))[stage] / "state.safetensors")


def shape(out: Path, layer: str) -> tuple[int, ...]:
    """Of a layer's weights after pruning."""
    return tuple(state(out, 1)[f"{layer}.weight"].shape)


def keep(out: Path) -> dict[str, int]:
    plan: dict[str, dict[str, int]] = json.loads((out / "student" / "candidate.json").read_text())
    return plan["channel_prune"]


def test_a_vision_transformer_is_compressed_and_its_plan_makes_it_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = VisionTransformer().eval()
    compressed(model, "digits", {"limit": 600}, tmp_path / "a")
    asked = keep(tmp_path / "a")
    for i in (0, 1):
        assert asked[f"layers.{i}.attention.qkv.heads"] == 2
        assert shape(tmp_path / "a", f"layers.{i}.attention.qkv") == (3 * 2 * 8, 16)
    plan = json.loads((tmp_path / "a/student/candidate.json").read_text())
    compressed(model, "digits", {"limit": 600}, tmp_path / "b", settings=plan)
    first, again = (state(tmp_path / name, -1) for name in "ab")
    assert all(torch.equal(value, again[key]) for key, value in first.items())


class Interrupting(Silent):
    """Ctrl-C when the second step begins."""

    def stage(self, name: str) -> None:
        if name.startswith("02"):
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_text_transformer_is_compressed_and_goes_on_after_ctrl_c(lines: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TextTransformer(VOCABULARY, LENGTH, 32, 2).eval()
    task = {"kind": "text", "length": LENGTH, "vocabulary": VOCABULARY}
    compressed(model, lines, task, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        compressed(model, lines, task, tmp_path / "broken", progress=Interrupting())
    compressed(model, lines, task, tmp_path / "broken", resume=True)
    name = "encoder.layers.1.self_attn.in_proj"
    assert keep(tmp_path / "whole")[f"{name}.heads"] == 2
    assert shape(tmp_path / "whole", name) == (3 * 2 * 8, 16)
    whole, resumed = (state(tmp_path / name, -1) for name in ("whole", "broken"))
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_hugging_face_model_is_compressed(lines: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Bert().eval()
    task = {"kind": "text", "length": LENGTH, "vocabulary": VOCABULARY}
    compressed(model, lines, task, tmp_path / "out")
    heads = [name for name in keep(tmp_path / "out") if name.endswith(".heads")]
    assert len(heads) == 2
    query = "model.bert.encoder.layer.0.attention.self.query"
    assert shape(tmp_path / "out", query) == (2 * 8, 16)
    assert shape(tmp_path / "out", "model.bert.encoder.layer.1.attention.output.dense") == (16, 2 * 8)
