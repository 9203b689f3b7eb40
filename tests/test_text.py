"""Text classification: data and tokens, training, export, student folder, runners, and what a user can get wrong."""

from __future__ import annotations

import ast
import copy
import csv
import functools
import gzip
import importlib
import inspect
import io
import json
import pickle
import re
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from helpers import TextTransformer
from safetensors.torch import save_file
from torch import nn

import nas
from nas.compression import Quantize, apply_passes
from nas.compression.fold import fold_batchnorm
from nas.errors import DataError, ExperimentError, ExtraError, NasError, StudentError
from nas.evaluators import Distil
from nas.evaluators.train import Lessons, Recipe, predict, train
from nas.experiment import load_experiment
from nas.job import Job
from nas.latency.measure import Timing
from nas.latency.runtimes import OnnxRuntime, runtimes
from nas.registry import import_object
from nas.settings import construct
from nas.space import Candidate, Choice, SearchSpace, TaskInfo, Training
from nas.student.export import export_float, onnx_macs_params, to_onnx
from nas.student.finalists import Entrant, Finalist, realise
from nas.student.package import pack_finalist
from nas.student.tables import untrained_onnx
from nas.student.teacher import onnx_logits, own_teacher
from nas.tasks import TextClassification, tasks
from nas.tasks.tokens import PATTERN, WordTokeniser
from nas.testing import check_pass, check_space
from nas.testing.agreement import check_agreement

ROOT = Path(__file__).resolve().parent.parent
#: Modules whose code and whose documentation are told apart: real text that is wherever Python is.
MODULES = ("argparse", "ast", "csv", "dataclasses", "gzip", "inspect", "pickle", "subprocess", "tokenize", "typing")
LENGTH, VOCABULARY = 16, 1024
SHARED = ROOT.parent / "shared" / "data"  # real sets that need not be there
REST = {"space": {"name": "mobilenet"}, "budget": {"latency": "50%"}}


@functools.cache
def lines_of_python() -> tuple[tuple[str, str], ...]:
    """Lines of documentation and of code, in turn, with what they are."""
    prose, code = [], []
    for name in MODULES:
        source = inspect.getsource(importlib.import_module(name))
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                prose += [line.strip() for line in (ast.get_docstring(node) or "").splitlines()]
        strings = {
            line
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.STRING
            for line in range(token.start[0], token.end[0] + 1)
        }
        code += [line.strip() for i, line in enumerate(source.splitlines(), 1) if i not in strings]
    long = [[line for line in lines if len(line.split()) >= 3] for lines in (prose, code)]
    assert min(map(len, long)) > 600
    return tuple(pair for a, b in zip(*long, strict=False) for pair in ((a, "prose"), (b, "code")))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,400 lines, half of them prose, in a gzipped table."""
    path = tmp_path_factory.mktemp("text") / "lines.csv.gz"
    with gzip.open(path, "wt", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(("label", "text"))
        writer.writerows((label, line) for line, label in lines_of_python()[:1400])
    return path


@pytest.fixture(scope="module")
def task(table: Path) -> TextClassification:
    return TextClassification(table, length=LENGTH, vocabulary=VOCABULARY, dropout=0.1)


@pytest.fixture(scope="module")
def trained(task: TextClassification) -> nn.Module:
    lessons = Lessons.prepare(task, None, 2, 0)
    torch.manual_seed(0)
    return train(model_for(task), task, lessons, Training(), Recipe(3, 0, lr=3e-3), seed=0)


def model_for(task: TextClassification) -> TextTransformer:
    return TextTransformer(task.vocabulary, LENGTH, task.info.classes)


Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a table and returns its path."""

    def written(text: str, name: str = "texts.csv") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return written


def rows(count: int, split: str = "", labels: tuple[str, ...] = ("a", "b")) -> str:
    """Rows of a table: text, label and, if given, split."""
    tail = f",{split}" if split else ""
    return "".join(f"word{i} of {split or 'all'},{labels[i % len(labels)]}{tail}\n" for i in range(count))


# ---- words -------------------------------------------------------------------------------------------


def test_words_are_learnt_by_frequency_then_alphabet() -> None:
    texts = ["The cat, the dog", "the cat's bird!"]
    tokeniser = WordTokeniser.learn(texts, 6, lower=True, length=5)
    assert tokeniser.words == ("[PAD]", "[UNK]", "the", "!", ",", "bird")
    np.testing.assert_array_equal(
        tokeniser.encode(["THE bird", "", "the , ! bird the the", "zebra's"]),
        [[2, 5, 0, 0, 0], [1, 0, 0, 0, 0], [2, 4, 3, 5, 2], [1, 0, 0, 0, 0]],
    )
    cased = WordTokeniser.learn(texts, 100, lower=False, length=4)
    assert {"The", "the", "cat's", "cat"} <= set(cased.words)
    assert cased.size == len(cased.words) == 10


def test_letters_of_every_alphabet_are_words() -> None:
    assert re.findall(PATTERN, "Größe 3,5 – 日本語 l’été it's 'so'") == [
        "Größe", "3", ",", "5", "–", "日本語", "l’été", "it's", "'", "so", "'",
    ]  # fmt: skip


# ---- data --------------------------------------------------------------------------------------------


def test_the_vocabulary_knows_the_training_split_alone(task: TextClassification, table: Path) -> None:
    with gzip.open(table, "rt", encoding="utf-8") as stream:
        every = {word for row in csv.DictReader(stream) for word in re.findall(PATTERN, row["text"].lower())}
    full = TextClassification(table, vocabulary=10**6)
    known = set(json.loads(full.student_files()["vocabulary.json"])["tokens"])
    assert known - {"[PAD]", "[UNK]"} < every
    assert not bool((full.split("train")[0] == 1).any())
    assert bool((full.split("valid")[0] == 1).any()), "words of the validation split alone are unknown"
    assert task.vocabulary == VOCABULARY
    for name in ("train", "valid"):
        x, y = task.split(name)
        assert (x.dtype, y.dtype) == (torch.int64, torch.int64)
        assert x.shape[1:] == (LENGTH,) == task.info.input_shape
        assert 0 <= int(x.min()) <= int(x.max()) < VOCABULARY
        assert bool((x != 0).any(dim=1).all())
    assert task.info == TaskInfo((LENGTH,), 2, value_range=(0.0, VOCABULARY - 1.0), dtype="int64")
    assert task.classes == ("code", "prose")
    assert task.test_reads == 0


def test_splits_are_those_of_the_seed(table: Path) -> None:
    one, same, other = (TextClassification(table, seed=seed) for seed in (0, 0, 1))
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert pickle.loads(pickle.dumps(one)).fingerprint == one.fingerprint
    assert [len(one.split(name)[1]) for name in ("train", "valid", "test")] == [840, 280, 280]
    small = TextClassification(table, limit=100, limit_test=20)
    assert [len(small.split(name)[1]) for name in ("train", "valid", "test")] == [75, 25, 20]


def test_the_datas_own_splits_are_kept(write: Write) -> None:
    text = "text,label,split\n" + rows(12, "train") + rows(4, "dev") + rows(6, "test")
    task = TextClassification(write(text), test=0.5, valid=0.5)
    assert [len(task.split(name)[1]) for name in ("train", "valid", "test")] == [12, 4, 6]
    words = json.loads(task.student_files()["vocabulary.json"])["tokens"]
    assert "train" in words
    assert "dev" not in words
    assert "test" not in words
    half = TextClassification(write("text,label,split\n" + rows(20, "train") + rows(6, "test")), valid=0.25)
    assert [len(half.split(name)[1]) for name in ("train", "valid", "test")] == [15, 5, 6]
    valid = TextClassification(write("text,label,split\n" + rows(20, "train") + rows(6, "val")), test=0.3, limit=10)
    assert [len(valid.split(name)[1]) for name in ("train", "valid", "test")] == [10, 6, 6]
    ignored = TextClassification(write(text), split=None)
    assert sum(len(ignored.split(name)[1]) for name in ("train", "valid", "test")) == 22


def test_a_test_file_tabs_and_other_columns(write: Write) -> None:
    data = write("question\tkind\tid\n" + "".join(f"what is {i}?\t{i % 3 - 1}\t{i}\n" for i in range(30)), "a.tsv")
    other = write("question\tkind\n" + "who?\t0\n" * 5, "b.tsv")
    task = TextClassification(data, text="question", label="kind", test_data=other, length=4)
    assert task.classes == ("-1", "0", "1")
    assert [len(task.split(name)[1]) for name in ("train", "valid", "test")] == [24, 6, 5]
    assert task.split("test")[1].tolist() == [1] * 5
    assert task.split("test")[0][0].tolist()[2:] == [0, 0]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("sentence,label\nhi,a\n", {}, "no column 'text' among 'sentence', 'label'"),
        ("", {}, "no column 'text' among none"),
        ("text,label\n", {}, "no rows"),
        ("text,label\nhello\n", {}, "line 2 has no label"),
        ("text,label\nhello,\n", {}, "line 2 has no label"),
        ("text,label,split\nhi,a,holdout\n", {}, "line 2 is of the split 'holdout'"),
        ("text,label,split\nhi,a,test\n", {}, "no row is of the split 'train'"),
        ("text,label\n" + rows(9, labels=("a",)), {}, "every sample has label 0"),
        ("text,label\n" + rows(4), {}, "class 'a' has 2 samples"),
        ("text,label,split\n" + rows(9, "train") + rows(3, "test", ("a", "c")), {}, "'test' has the label 'c'"),
        ("text,label,split\n" + rows(9, "train") + rows(3, "test"), {"test_data": "x.csv"}, "a test split of its own"),
        ("text,label\n" + rows(40), {"test_data": "no/such.csv"}, "no file 'no/such.csv'"),
        ("text,label\n" + rows(40), {"limit": 3}, "limit is 3"),
    ],
)
def test_bad_tables(write: Write, text: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        TextClassification(write(text), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length is 0"), ({"length": True}, "length is True"), ({"vocabulary": 2}, "vocabulary is 2"),
        ({"dropout": 1}, "dropout is 1"), ({"dropout": "much"}, "dropout is 'much'"), ({"metric": "f2"}, "metric"),
        ({"valid": 0.5, "test": 0.5}, "nothing is left to train on"),
    ],
)  # fmt: skip
def test_bad_options(write: Write, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        TextClassification(write("text,label\n" + rows(40)), **options)


def test_files_that_are_no_texts(tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_bytes("text,label\nGröße,a\n".encode("latin-1"))
    (tmp_path / "bad.csv.gz").write_bytes(b"text,label\nhi,a\n")
    for name, message in (("bad.csv", "not UTF-8"), ("bad.csv.gz", "cannot be read"), ("none.csv", "no file")):
        with pytest.raises(DataError, match=message):
            TextClassification(tmp_path / name)
    with pytest.raises(DataError, match=r"No source reads texts from 'digits'[^$]*\.csv"):
        TextClassification("digits")


def test_experiments_reach_the_task(table: Path, tmp_path: Path) -> None:
    made = construct(tasks.get("text"), {"length": 8, "seed": 3}, str(table), where="task")
    assert made.info.input_shape == (8,)
    with pytest.raises(ExperimentError, match=r"Unknown key task.shift"):
        construct(tasks.get("text"), {"shift": 1}, str(table), where="task")
    section = {"kind": "text", "data": str(table), "length": 8}
    job = Job(load_experiment({"name": "t", "seed": 3, "task": section, **REST}), tmp_path)
    assert job.task.fingerprint == made.fingerprint


# ---- tokens ------------------------------------------------------------------------------------------


def test_tokens_of_an_npz_file(tmp_path: Path) -> None:
    x, y = np.arange(120).reshape(30, 4) % 11, np.arange(30) % 2
    np.savez(tmp_path / "a.npz", x=x.astype(np.uint16), y=y, classes=np.array(["even", "odd"]))
    task = TextClassification(tmp_path / "a.npz")
    assert (task.info.input_shape, task.vocabulary, task.classes) == ((4,), 11, ("even", "odd"))
    assert task.split("train")[0].dtype == torch.int64
    assert task.student_files() == {}
    np.savez(tmp_path / "b.npz", x_train=x, y_train=y, x_test=x[:6], y_test=y[:6])
    with_test = TextClassification(tmp_path / "b.npz", vocabulary=50, length=4)
    assert len(with_test.split("test")[1]) == 6
    assert with_test.info.value_range == (0.0, 49.0)
    given = TextClassification(tmp_path / "a.npz", test_data=str(tmp_path / "a.npz"))
    assert len(given.split("test")[1]) == 30
    for options, message in (
        ({"vocabulary": 10}, "token 10, but vocabulary is 10"), ({"length": 5}, "rows of 4 tokens, not 5"),
        ({"test_data": str(tmp_path / "a.npz")}, "a test split of its own"), ({"tokenizer": "t"}, "holds tokens"),
    ):  # fmt: skip
        with pytest.raises(NasError, match=message):
            TextClassification(tmp_path / "b.npz", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.ones((30, 4)), "dtype float64"), (np.ones((30, 4, 2), int), r"shape \[30, 4, 2\]"),
        (-np.ones((30, 4), int), "token -1 is negative"), (np.ones((29, 4), int), "29 texts but 30 labels"),
        (np.ones((30, 0), int), r"shape \[30, 0\]"),
    ],
)  # fmt: skip
def test_bad_tokens(tmp_path: Path, x: np.ndarray[Any, Any], message: str) -> None:
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(30) % 2)
    with pytest.raises(DataError, match=message):
        TextClassification(tmp_path / "a.npz")


def test_dropped_tokens_are_unknown_and_padding_stays(task: TextClassification, table: Path) -> None:
    x = task.split("train")[0]
    seen = task.augment(x, torch.Generator().manual_seed(1))
    torch.testing.assert_close(seen, task.augment(x, torch.Generator().manual_seed(1)))
    changed = seen != x
    assert bool((seen[changed] == 1).all())
    assert not bool(changed[x == 0].any())
    words = (x > 1).sum().item()
    assert abs(changed.sum().item() / words - 0.1) < 4 * (0.1 * 0.9 / words) ** 0.5
    plain = TextClassification(table)
    assert plain.augment(x, torch.Generator()) is x


def test_random_samples_are_of_the_tasks_kind(task: TextClassification) -> None:
    x = task.info.random(200, seed=4)
    assert (x.dtype, x.shape) == (torch.int64, (200, LENGTH))
    assert int(x.min()) >= 0
    assert int(x.max()) < VOCABULARY
    assert len(x.unique()) > VOCABULARY / 2
    torch.testing.assert_close(x, task.info.random(200, seed=4))
    images = TaskInfo((3, 4, 4), 2, value_range=(-2.0, 6.0)).random(50)
    assert images.dtype == torch.float32
    assert images.shape == (50, 3, 4, 4)
    assert -2 <= float(images.min()) < -1.5
    assert 5.5 < float(images.max()) <= 6


# ---- a tokenizer.json --------------------------------------------------------------------------------


def words_file(folder: Path, padding: bool = True) -> str:
    """A small tokenizer.json whose padding is not 0."""
    library = pytest.importorskip("tokenizers")
    special = ["[UNK]", "[CLS]", *(["[PAD]"] if padding else [])]
    names = [*special, "the", "a", "is", "of", "to", "return", "self"]
    tokenizer = library.Tokenizer(library.models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = library.pre_tokenizers.Whitespace()
    tokenizer.post_processor = library.processors.TemplateProcessing(
        single="[CLS] $A", pair=None, special_tokens=[("[CLS]", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


def test_a_tokenizer_of_hugging_face(tmp_path: Path, table: Path) -> None:
    task = TextClassification(table, tokenizer=words_file(tmp_path), length=6, dropout=0.5)
    assert (task.padding, task.vocabulary) == (2, 10)
    x = task.split("train")[0]
    assert x.shape[1:] == (6,)
    assert bool((x[:, 0] == 1).all())
    assert bool((x == 2).any())
    seen = task.augment(x, torch.Generator().manual_seed(0))
    changed = seen != x
    assert bool(changed.any())
    assert bool((seen[changed] == 0).all())
    assert not bool((changed & ((x == 1) | (x == 2))).any())
    assert pickle.loads(pickle.dumps(task)).fingerprint == task.fingerprint
    assert list(task.student_files()) == ["tokenizer.json"]
    with pytest.raises(DataError, match="no token for padding"):
        TextClassification(table, tokenizer=words_file(tmp_path, padding=False))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="no tokenizer"):
        TextClassification(table, tokenizer=str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"no tokenizer 'nowhere\.json'"):
        TextClassification(table, tokenizer="nowhere.json")


def test_without_the_library_a_tokenizer_says_what_to_install(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ExtraError, match=r"latency-nas\[hf\]"):
        TextClassification(table, tokenizer="tokenizer.json")


# ---- training and export -----------------------------------------------------------------------------


def test_a_transformer_learns_to_read(task: TextClassification, trained: nn.Module) -> None:
    x, y = task.split("valid")
    accuracy = task.evaluate(predict(trained, x), y.numpy())["accuracy"]
    chance = float(np.bincount(y.numpy()).max()) / len(y)
    assert accuracy > chance + 0.25
    again = train(model_seeded(task), task, Lessons.prepare(task, None, 2, 0), Training(), Recipe(3, 0, lr=3e-3), 0)
    torch.testing.assert_close(again.head.weight, trained.get_submodule("head").weight)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "sizes"),
    [
        ("trec_qc", {"label": "coarse", "length": 24}, [4362, 1090, 500]),
        ("sst2_sentences", {}, [6920, 872, 1821]),
        ("sms_spam", {"metric": "macro_f1"}, [3344, 1115, 1115]),
    ],
)
def test_published_sets_are_learnt(name: str, options: dict[str, Any], sizes: list[int]) -> None:
    path = SHARED / f"{name}.csv.gz"
    if not path.exists():
        pytest.skip(f"there is no {path}")
    task = TextClassification(path, dropout=0.1, **options)
    assert [len(task.split(split)[1]) for split in ("train", "valid", "test")] == sizes
    torch.manual_seed(0)
    model = TextTransformer(task.vocabulary, *task.info.input_shape, task.info.classes, width=64, heads=4)
    train(model, task, Lessons.prepare(task, None, 3, 0), Training(), Recipe(3, 0, lr=2e-3), seed=0)
    x, y = task.split("valid")
    majority = float(np.bincount(y.numpy()).max()) / len(y)
    accuracy = task.evaluate(predict(model, x), y.numpy())["accuracy"]
    assert accuracy > majority + 0.4 * (1 - majority)


def model_seeded(task: TextClassification) -> nn.Module:
    torch.manual_seed(0)
    return model_for(task)


def test_the_export_takes_any_batch_and_agrees(task: TextClassification, trained: nn.Module, tmp_path: Path) -> None:
    x, _ = task.split("valid")
    exported = export_float(trained, x[:1])
    onnx.checker.check_model(exported)
    check_agreement(trained, exported, x[:64], "text")
    assert exported.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.INT64
    assert not {"Shape", "Concat", "ConstantOfShape"} & {node.op_type for node in exported.graph.node}
    onnx.save(exported, tmp_path / "model.onnx")
    np.testing.assert_allclose(onnx_logits(tmp_path / "model.onnx", x), predict(trained, x), atol=1e-4)
    macs, params = onnx_macs_params(exported)
    assert params == sum(p.numel() for p in trained.parameters()), "embedding tables are parameters"
    width, hidden = 32, 64
    layer = LENGTH * (4 * width * width + 2 * width * hidden) + 2 * LENGTH * LENGTH * width
    assert macs == 2 * layer + 2 * width


def test_a_table_that_is_looked_up_by_constants_is_no_embedding() -> None:
    """A codebook, of which stored indices make the weights, is counted where the weights are used."""

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.rows = nn.Parameter(torch.rand(7, 3)), torch.tensor([0, 2, 2])
            self.words = nn.Embedding(5, 3)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return (self.words(tokens) * self.table[self.rows]).sum(-1)

    exported = export_float(Fixed(), torch.zeros(1, 3, dtype=torch.int64))
    assert onnx_macs_params(exported) == (0, 15)


class Prefixed(nn.Module):
    """Puts a learnt token in front, once per sample, and a number of samples into every shape."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.first = nn.Embedding(9, 8), nn.Parameter(torch.rand(1, 1, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        n = tokens.shape[0]
        x = torch.cat([self.first.expand(n, 1, 8), self.words(tokens)], 1)
        x = x.view(n * 2, -1, 8).reshape(n, -1, 2, 4).transpose(1, 2).reshape(n, 2, -1)
        return self.head(x.view(n, -1, 8).mean(1))


def test_shapes_that_hold_the_number_of_samples() -> None:
    x = torch.randint(0, 9, (6, 5), generator=torch.Generator().manual_seed(0))
    model = Prefixed().eval()
    for batch in (1, 3):
        check_agreement(model, export_float(model, x[:batch]), x, f"exported with {batch}")


def test_what_cannot_be_exported_says_so() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigvals(x).real

    with pytest.raises(StudentError, match="cannot be exported to ONNX"):
        export_float(Odd(), torch.rand(1, 3, 3))


def test_a_model_without_normalisation_need_not_be_traceable() -> None:
    class Moody(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    model = Moody()
    assert fold_batchnorm(model) is model


def test_int8_linear_layers_of_a_text_model(task: TextClassification, trained: nn.Module) -> None:
    x = task.split("train")[0]
    layers = [name for name, module in trained.named_modules() if isinstance(module, nn.Linear) and name != "head"]
    plan = {"quantize": dict.fromkeys(layers, 8)}
    model = apply_passes(copy.deepcopy(trained), plan, x[:128]).eval()
    exported = to_onnx(model, plan, x[:1], x[:256].numpy())
    integers = [t for t in exported.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2]
    assert len(integers) == len(layers)
    valid, y = task.split("valid")
    session = OnnxRuntime().load(exported, threads=1, batch=2)
    assert session.outputs()[0].shape == (2, 2)
    floats = task.evaluate(predict(trained, valid), y.numpy())["accuracy"]
    check_agreement(model, exported, valid[:64], "int8 text")
    assert abs(task.evaluate(predict(model, valid), y.numpy())["accuracy"] - floats) < 0.03


def test_the_contract_of_passes_holds_on_tokens(task: TextClassification) -> None:
    torch.manual_seed(1)
    check_pass(Quantize, model_for(task), {"layers.0.up": 8, "layers.1.q": 8}, task.split("train")[0][:32])


@pytest.mark.parametrize("name", [name for name in runtimes if name not in ("openvino", "torch-compiled")])
def test_runtimes_time_text_models(task: TextClassification, name: str) -> None:
    exported = export_float(model_for(task), task.split("train")[0][:1])
    for batch in (1, 4):
        runner = runtimes.get(name)().load(exported, threads=1, batch=batch)
        assert all(t > 0 for t in runner.time(3))
        (wanted,) = OnnxRuntime().load(exported, threads=1, batch=batch).outputs()
        np.testing.assert_allclose(runner.outputs()[0], wanted, atol=1e-4)


def test_the_smallest_vocabulary_can_be_timed() -> None:
    model = nn.Sequential(nn.Embedding(2, 4), nn.Flatten(), nn.Linear(12, 2))
    exported = export_float(model, torch.zeros(1, 3, dtype=torch.int64))
    (answer,) = OnnxRuntime().load(exported, threads=1, batch=8).outputs()
    assert answer.shape == (8, 2)
    assert len(np.unique(answer, axis=0)) > 1, "not the same token everywhere"


# ---- the student -------------------------------------------------------------------------------------


class TextSpace(SearchSpace):
    """One choice of a text transformer; it is trained and packed, not priced."""

    name = "texts"

    def __init__(self, info: TaskInfo) -> None:
        self.info = info
        self.choices = (Choice("bits", (32, 8)),)
        self.sites = {}

    def build(self, candidate: Candidate) -> nn.Module:
        return TextTransformer(int(self.info.value_range[1]) + 1, *self.info.input_shape, self.info.classes)

    def training(self, candidate: Candidate) -> Training:
        plan = {"quantize": {"layers.0.up": 8, "layers.0.down": 8}}
        return Training(compression=plan if candidate["bits"] == 8 else {})


def test_networks_with_random_weights_are_exported_with_random_tokens(task: TextClassification) -> None:
    space = TextSpace(task.info)
    for bits in (0, 1):
        exported = onnx.load_from_string(untrained_onnx(space, task.info, np.array([bits])))
        assert any(node.op_type == "QuantizeLinear" for node in exported.graph.node) == bool(bits)
        assert OnnxRuntime().load(exported, threads=1, batch=1).outputs()[0].shape == (1, 2)


@pytest.fixture(scope="module")
def student(task: TextClassification, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student folder, made as a search makes it."""
    folder = tmp_path_factory.mktemp("student")
    return packed(task, folder)


def packed(task: TextClassification, folder: Path) -> Path:
    space = TextSpace(task.info)
    evaluator = Distil(space, task, Lessons.prepare(task, None, 1, 0), Recipe(3, 1, lr=3e-3), 0)
    genome = np.array([1])
    realise(evaluator, (genome, evaluator.recipe, folder / "search-0"))
    facts = json.loads((folder / "search-0" / "facts.json").read_text())
    assert "reason" not in facts, facts
    del facts["asked"]
    assert facts["agreement"] > 0.97
    timing = Timing(1.0, 1.0, 1.0, 1, 0.0)
    entrant = Entrant("search", 0, (1,), None, {})
    finalist = Finalist(entrant, folder / "search-0", timing=timing, runtime="", reward=0, violation=0, **facts)
    low, high = task.info.value_range
    manifest = {
        "name": "texts", "task": {"classes": list(task.classes)},
        "quality": {"metric": "accuracy", "split": "test", "n": 1, "student_onnx": 0.0, "teacher": 0.0},
        "latency": [{"device": "d", "p50_ms": 1.0, "teacher_p50_ms": 1.0}],
        "size_bytes": {"onnx": 1, "teacher_onnx": 1}, "parity": {"max_abs_diff": 0.0, "agreement": 1.0},
        "input": {
            "name": "input", "shape": ["batch", *task.info.input_shape], "dtype": task.info.dtype, "range": [low, high],
        },
    }  # fmt: skip
    pack_finalist(folder / "student", evaluator, finalist, manifest)
    return folder / "student"


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``predict.py`` of a student folder, without this framework or torch."""
    script = (
        "import importlib.abc, runpy, sys\n"
        "class Refuse(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'nas', 'onnx', 'sklearn'):\n"
        "            raise ImportError('refused: ' + name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "sys.argv = ['predict.py', *sys.argv[1:]]\n"
        "runpy.run_path('predict.py', run_name='__main__')\n"
    )
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8", timeout=60)


def test_predict_reads_texts_as_the_training_did(student: Path, task: TextClassification) -> None:
    texts = [line for line, _ in lines_of_python()[1400:1480]] + ["", "Größe l’été ☃", "return self.x"]
    (student / "some.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    vocabulary = json.loads((student / "vocabulary.json").read_text(encoding="utf-8"))
    known = WordTokeniser(tuple(vocabulary["tokens"]), vocabulary["lower"], vocabulary["length"])
    x = known.encode(texts)
    answers = nas.load_student(student).predict(x).argmax(1)
    done = run(student, "some.txt")
    assert done.returncode == 0, done.stderr
    said = [line.split()[1] for line in done.stdout.splitlines()]
    assert said == [task.classes[i] for i in answers]
    np.save(student / "some.npy", x.astype(np.int32))
    assert run(student, "some.npy").stdout == done.stdout
    labels = [label for _, label in lines_of_python()[1400:1480]]
    assert np.mean([a == b for a, b in zip(said, labels, strict=False)]) > 0.7


def test_the_student_proves_itself_and_loads_in_torch(student: Path) -> None:
    assert "selftest passed" in run(student, "--selftest").stdout
    assert "p50" in run(student, "--benchmark").stdout
    with np.load(student / "selftest.npz") as proof:
        assert proof["x"].dtype == np.int64
        logits = nas.load_student(student).torch_program()(torch.from_numpy(proof["x"])).detach().numpy()
        assert (logits.argmax(1) == proof["logits"].argmax(1)).mean() > 0.9
    card = (student / "README.md").read_text()
    assert "int64" in card
    assert "python predict.py INPUT.txt" in card


def test_tokens_that_do_not_exist_are_refused(student: Path) -> None:
    loaded = nas.load_student(student)
    good = np.ones((2, LENGTH), dtype=np.uint8)
    assert loaded.predict(good).shape == (2, 2)
    for bad in (good * 1.0, good.astype(int) * VOCABULARY, -good.astype(int), good[:, :-1]):
        with pytest.raises(StudentError):
            loaded.predict(bad)
        np.save(student / "bad.npy", bad)
        done = run(student, "bad.npy")
        assert done.returncode == 1
        assert "expected" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_student_with_a_tokenizer_brings_it_along(tmp_path: Path, table: Path) -> None:
    task = TextClassification(table, tokenizer=words_file(tmp_path), length=LENGTH, limit=200)
    folder = packed(task, tmp_path)
    (folder / "some.txt").write_text("return self\nThe names of a module\n")
    done = run(folder, "some.txt")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2


# ---- docs/text.md ------------------------------------------------------------------------------------


def snippets() -> dict[str, str]:
    text = (ROOT / "docs" / "text.md").read_text()
    found = re.findall(r"^```(?:python|yaml)\n# file: (\S+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return dict(found)


@pytest.fixture
def pages_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: Path) -> Iterator[Path]:
    """The page's own files, beside a table called questions.csv.gz."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name, text in snippets().items():
        (tmp_path / name).write_text(text)
    with (
        gzip.open(table, "rt", encoding="utf-8") as whole,
        gzip.open("questions.csv.gz", "wt", encoding="utf-8") as few,
    ):
        few.writelines(islice(whole, 801))
    yield tmp_path
    for name in snippets():
        sys.modules.pop(Path(name).stem, None)


def test_the_pages_own_model_is_trained_and_becomes_a_teacher(
    pages_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    importlib.import_module("train_teacher")
    said = capsys.readouterr().out
    found = re.search(r"(\d+) tokens .*'accuracy': ([\d.]+)", said)
    assert found, said
    assert float(found[2]) > 0.75
    task = TextClassification("questions.csv.gz", length=24, vocabulary=4096)
    teacher = own_teacher("my_text_model:build", "teacher.safetensors", task, pages_folder / "teacher")
    assert teacher.quality == pytest.approx(float(found[2]))
    x, _ = task.split("valid")
    np.testing.assert_allclose(onnx_logits(teacher.onnx, x), predict(teacher.module, x), atol=1e-4)


def untrained() -> None:
    """The page's teacher.safetensors, of a model that nobody trained."""
    torch.manual_seed(0)
    save_file(import_object("my_text_model:build", "teacher")().state_dict(), "teacher.safetensors")


def test_the_pages_experiment_describes_its_space(pages_folder: Path) -> None:
    untrained()
    job = Job(load_experiment("questions.yaml"), pages_folder / "run")
    names = {choice.name for choice in job.space.choices}
    assert {"tokens.prune", "layers.0.q.heads.prune", "layers.1.up.prune", "layers.0.keep", "head.bits"} <= names
    check_space(job.space, candidates=2, info=job.task.info)


@pytest.mark.slow
def test_the_pages_experiment_ends_in_a_student_that_reads(
    pages_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NAS_CACHE_DIR", str(pages_folder / "cache"))
    untrained()
    few = [
        "search.trials=2", "search.batch=2", "search.workers=1", "budget.latency=400%", "baselines=[]",
        "space.prune=[0.0,0.5]", "space.ranks=[1.0]", "training.views=1", "table.seconds=0.5", "table.nets=8",
        "finalists.seconds=1.0",
    ]  # fmt: skip
    run_folder = pages_folder / "run"
    nas.search(pages_folder / "questions.yaml", overrides=few, out=run_folder)
    manifest = json.loads((run_folder / "student" / "manifest.json").read_text())
    assert manifest["parity"]["agreement"] == 1.0
    assert manifest["input"]["dtype"] == "int64"
    assert (run_folder / "student" / "vocabulary.json").is_file()
    assert "questions" in (run_folder / "report.html").read_text()
    texts = pages_folder / "lines.txt"
    texts.write_text("def f(x): return x\nReturn the value of the argument.\n")
    done = run(run_folder / "student", str(texts))
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
    tokens = TextClassification("questions.csv.gz", length=24, vocabulary=4096).split("test")[0][:8]
    module = nas.load_student(run_folder / "student").module()
    with torch.no_grad():
        assert module(tokens).shape == (8, 2)


def test_a_model_with_too_few_tokens_is_refused(pages_folder: Path) -> None:
    text = (pages_folder / "my_text_model.py").read_text().replace("24, 4096, 2", "24, 100, 2")
    (pages_folder / "small_model.py").write_text(text)
    save_file(import_object("small_model:build", "teacher")().state_dict(), "small.safetensors")
    task = TextClassification("questions.csv.gz", length=24)
    with pytest.raises(DataError, match=r"The model fails on inputs[^$]*index out of range"):
        own_teacher("small_model:build", "small.safetensors", task, pages_folder / "teacher")
    sys.modules.pop("small_model")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_the_pages_hugging_face_model_is_exported(pages_folder: Path, kind: str) -> None:
    pytest.importorskip("transformers")
    path = pages_folder / "my_bert.py"
    path.write_text(path.read_text().replace('"eager"', f'"{kind}"'))
    torch.manual_seed(0)
    model = import_object("my_bert:build", "teacher")()
    task = TextClassification("questions.csv.gz", length=24, vocabulary=4096)
    train(model, task, Lessons.prepare(task, None, 1, 0), Training(), Recipe(2, 0, lr=1e-3), seed=0)
    x, y = task.split("valid")
    assert task.evaluate(predict(model, x), y.numpy())["accuracy"] > 0.75
    exported = export_float(fold_batchnorm(model), x[:1])
    check_agreement(model, exported, x[:64], "bert")
    assert not {"Concat", "Range", "Expand"} & {node.op_type for node in exported.graph.node}
    macs, params = onnx_macs_params(exported)
    assert params == sum(p.numel() for p in model.parameters())
    assert macs > 24 * 2 * (4 * 64 * 64 + 2 * 64 * 128)
    loaded = [runtimes.get(name)().load(exported, threads=1, batch=3) for name in ("onnxruntime", "torch")]
    np.testing.assert_allclose(*(runner.outputs()[0] for runner in loaded), atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["DistilBert", "Roberta", "Electra", "Albert", "Bert"])
def test_families_of_hugging_face(name: str) -> None:
    """Built from configurations, with the usual mask of ones and zeros."""
    transformers = pytest.importorskip("transformers")
    sizes = dict.fromkeys(("hidden_size", "dim", "embedding_size"), 32)
    sizes |= dict.fromkeys(("num_hidden_layers", "n_layers", "num_attention_heads", "n_heads"), 2)
    sizes |= dict.fromkeys(("intermediate_size", "hidden_dim"), 64)
    config = getattr(transformers, f"{name}Config")(vocab_size=50, max_position_embeddings=20, num_labels=3, **sizes)
    torch.manual_seed(0)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = transformers.AutoModelForSequenceClassification.from_config(config)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=tokens, attention_mask=(tokens != 0).long()).logits

    x = torch.randint(2, 50, (6, 16), generator=torch.Generator().manual_seed(0))
    x[1, 5:] = 0
    model = Plain().eval()
    exported = export_float(model, x[:1])
    check_agreement(model, exported, x, name)
    macs, params = onnx_macs_params(exported)
    assert macs > 16 * 2 * (4 * 32 * 32 + 2 * 32 * 64)
    assert params > 50 * 32
