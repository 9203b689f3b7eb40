"""Text classification: one label per text; token numbers in, unknown words as augmentation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nas.errors import DataError, ExperimentError
from nas.space import TaskInfo
from nas.tasks import checks
from nas.tasks.base import tasks
from nas.tasks.data import ReadOptions
from nas.tasks.labelled import LabelledTask, check_count, check_options
from nas.tasks.readers import read_npz
from nas.tasks.splits import Index, Shares, limited, three_way
from nas.tasks.texts import SUFFIXES, Columns, Texts, is_table, label_names, numbered, read_texts
from nas.tasks.tokens import PADDING, UNKNOWN, FileTokeniser, Tokeniser, Tokens, WordTokeniser

LENGTH, VOCABULARY = 32, 8192


@tasks.register("text")
class TextClassification(LabelledTask):
    """Labelled texts as rows of token numbers, split by seed so that every class keeps its share.

    The vocabulary is learnt from the training split alone. Token 0 is padding and 1 stands for unknown words, unless a
    ``tokenizer`` says otherwise.

    Args:
        data: a table ``.csv`` or ``.tsv`` (``.gz`` or not) of texts and labels, or an .npz file of token numbers
            ``x [n, length]`` and labels ``y [n]``.
        seed: decides the splits and the subsets.
        valid: share of the samples for validation; not used where the data have a validation split of their own.
        test: share of the samples for the test; not used where the data have a test split of their own.
        metric: accuracy, macro_recall or macro_f1: which one is the quality.
        text, label: names of the table's columns.
        split: name of the column that says train, valid or test, used where the table has it; None: never.
        test_data: a file of its own for the test split, of the same kind.
        length: tokens of a text: 32 by default; an .npz file's rows have theirs.
        vocabulary: at most so many different tokens, padding and unknown among them: 8192 by default; of an .npz file,
            how many there are, if it is more than those that occur.
        lower: drop the case of letters.
        tokenizer: path of a Hugging Face ``tokenizer.json`` to use instead of learnt words.
        dropout: augmentation makes each token unknown with this probability.
        limit: at most so many samples for training and validation together (for training alone, where the data have
            a validation split).
        limit_test: at most so many samples for the test.

    Attributes:
        vocabulary: number of different tokens; every token is below it.
        padding: the token that fills short rows.

    Raises:
        ExperimentError: an option is out of range.
        DataError: the data cannot be read or split.
        ExtraError: a tokenizer needs a package that is not installed.
    """

    def __init__(
        self,
        data: str | Path,
        *,
        seed: int = 0,
        valid: float = 0.2,
        test: float = 0.2,
        metric: str = "accuracy",
        text: str = "text",
        label: str = "label",
        split: str | None = "split",
        test_data: str | None = None,
        length: int | None = None,
        vocabulary: int | None = None,
        lower: bool = True,
        tokenizer: str | None = None,
        dropout: float = 0.0,
        limit: int | None = None,
        limit_test: int | None = None,
    ) -> None:
        check_options(seed, valid, test, metric, limit, limit_test)
        for name, count, least in (("length", length, 1), ("vocabulary", vocabulary, 3)):
            if count is not None:
                check_count(name, count, least)
        if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise ExperimentError(f"dropout is {dropout!r}.", expected="a probability from 0 to below 1")
        shares = Shares(seed, valid, test, limit)
        if is_table(str(data)):
            columns = Columns(text, label, split)
            rows = _with_test(read_texts(str(data), columns), str(data), test_data, columns)
            found = _from_texts(rows, str(data), shares, limit_test)
            tokeniser = _tokeniser(found, tokenizer, length or LENGTH, vocabulary, lower)
            tokens = {name: (tokeniser.encode(texts), y) for name, (texts, y) in found.splits.items()}
            size, padding, self._unknown, special = (
                tokeniser.size, tokeniser.padding, tokeniser.unknown, tokeniser.special
            )  # fmt: skip
            self._files, classes = tokeniser.files(), found.classes
        elif str(data).lower().endswith(".npz"):
            if tokenizer is not None:
                raise ExperimentError(
                    f"tokenizer is {tokenizer!r}, but {data} holds tokens.", remedy="leave tokenizer out"
                )
            tokens, classes, size = _from_tokens(str(data), test_data, shares, limit_test, length, vocabulary)
            padding, self._unknown, special = PADDING, UNKNOWN, (PADDING,)
            self._files = {}
        else:
            raise DataError(
                f"No source reads texts from {str(data)!r}.",
                expected=f"a table ({', '.join(SUFFIXES)}) of texts and labels, or an .npz file of tokens",
            )
        if dropout and self._unknown is None:
            raise ExperimentError(
                f"dropout is {dropout}, but the tokenizer has no token for unknown words.", expected="0"
            )
        x = tokens["train"][0]
        info = TaskInfo(x.shape[1:], len(classes), value_range=(0.0, float(size - 1)), dtype="int64")
        tensors = {name: (torch.from_numpy(x), torch.from_numpy(y)) for name, (x, y) in tokens.items()}
        super().__init__(tensors, info, metric, classes)
        self.vocabulary, self.padding, self.dropout = size, padding, dropout
        self._special = torch.tensor(special)

    def augment(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Each token of ``x [n, length]`` unknown by its own draw; padding and other special tokens stay."""
        if not self.dropout or self._unknown is None:
            return x
        drawn = torch.rand(x.shape, generator=generator, device=generator.device).to(x.device) < self.dropout
        return torch.where(drawn & ~torch.isin(x, self._special.to(x.device)), self._unknown, x)

    def student_files(self) -> dict[str, bytes]:
        return dict(self._files)


@dataclass(frozen=True)
class _Labelled:
    """Texts and label numbers by split, and the classes' names."""

    splits: dict[str, tuple[list[str], Index]]
    classes: tuple[str, ...]


def _with_test(rows: dict[str, Texts], data: str, test_data: str | None, columns: Columns) -> dict[str, Texts]:
    """The rows of ``data`` by split, those of ``test_data`` as the test."""
    if "train" not in rows:
        raise DataError(f"{data}: no row is of the split 'train', all are of {', '.join(sorted(rows))}.")
    if test_data is None:
        return rows
    if "test" in rows:
        raise DataError(
            f"{data} has a test split of its own, and test_data is {test_data}.", remedy="leave one of them out"
        )
    other = read_texts(test_data, Columns(columns.text, columns.label, None))
    return {**rows, "test": other["train"]}


def _from_texts(rows: dict[str, Texts], where: str, shares: Shares, limit_test: int | None) -> _Labelled:
    classes = label_names(rows["train"].labels)
    labels = {
        name: np.array(numbered(of_split.labels, classes, f"{where}: the split {name!r}"), dtype=np.int64)
        for name, of_split in rows.items()
    }
    checks.class_names(labels["train"], classes, where)
    chosen = _chosen(labels, classes, where, shares, limit_test)
    splits = {
        name: ([rows[source].texts[i] for i in index], labels[source][index])
        for name, (source, index) in chosen.items()
    }
    return _Labelled(splits, classes)


def _chosen(
    labels: dict[str, Index], classes: tuple[str, ...], where: str, shares: Shares, limit_test: int | None
) -> dict[str, tuple[str, Index]]:
    """For each split, which of the data's own splits it comes from, and which samples of it."""
    own = {name: name in labels for name in ("valid", "test")}
    cuts = three_way(labels["train"], classes, where, shares, own_valid=own["valid"], own_test=own["test"])
    chosen = {
        name: (name, np.arange(len(labels[name]))) if own.get(name) else ("train", index)
        for name, index in zip(("train", "valid", "test"), cuts, strict=True)
    }
    source, index = chosen["test"]
    chosen["test"] = (source, limited(labels[source], index, limit_test, where, shares.seed))
    return chosen


def _tokeniser(found: _Labelled, tokenizer: str | None, length: int, vocabulary: int | None, lower: bool) -> Tokeniser:
    if tokenizer is not None:
        return FileTokeniser.load(tokenizer, length)
    return WordTokeniser.learn(found.splits["train"][0], vocabulary or VOCABULARY, lower, length)


def _from_tokens(
    data: str, test_data: str | None, shares: Shares, limit_test: int | None, length: int | None, vocabulary: int | None
) -> tuple[dict[str, tuple[Tokens, Index]], tuple[str, ...], int]:
    """Splits, classes and the number of different tokens of an .npz file."""
    raw = read_npz(data, ReadOptions())
    arrays = {"train": _tokens(raw.x, raw.y, data, length)}
    classes = checks.class_names(arrays["train"][1], raw.classes, data)
    if test_data is not None:
        if raw.test is not None:
            raise DataError(
                f"{data} has a test split of its own, and test_data is {test_data}.", remedy="leave one of them out"
            )
        other = read_npz(test_data, ReadOptions())
        arrays["test"] = _tokens(other.x, other.y, test_data, arrays["train"][0].shape[1])
    elif raw.test is not None:
        arrays["test"] = _tokens(*raw.test, f"{data} (test split)", arrays["train"][0].shape[1])
    if "test" in arrays and arrays["test"][1].max() >= len(classes):
        raise DataError(
            f"{data}: the test split has label {int(arrays['test'][1].max())}, which the training split lacks.",
            expected=f"labels 0..{len(classes) - 1}",
        )
    largest = max(int(x.max()) for x, _ in arrays.values())
    if vocabulary is not None and largest >= vocabulary:
        raise DataError(f"{data}: token {largest}, but vocabulary is {vocabulary}.", expected=f"0..{vocabulary - 1}")
    labels = {name: y for name, (_, y) in arrays.items()}
    chosen = _chosen(labels, classes, data, shares, limit_test)
    splits = {name: (arrays[source][0][index], arrays[source][1][index]) for name, (source, index) in chosen.items()}
    return splits, classes, vocabulary or max(largest + 1, UNKNOWN + 1)


def _tokens(x: npt.NDArray[Any], y: npt.NDArray[Any], where: str, length: int | None) -> tuple[Tokens, Index]:
    """Token numbers ``[n, length]`` and labels ``[n]``, both int64."""
    if x.ndim != 2 or x.dtype.kind not in "iu" or not x.size:
        raise DataError(
            f"{where}: the tokens have dtype {x.dtype} and shape {list(x.shape)}.",
            expected="whole numbers of shape [n, length]",
            remedy="cut and pad all texts to one length, 0 for padding",
        )
    if x.min() < 0:
        raise DataError(f"{where}: token {int(x.min())} is negative.", expected="0, 1, 2, …; 0 is padding")
    if length is not None and x.shape[1] != length:
        raise DataError(
            f"{where}: rows of {x.shape[1]} tokens, not {length}.",
            expected="rows of one length; those of an .npz file are neither cut nor padded",
        )
    checks.check_memory(x.size, ReadOptions().max_bytes, where, "texts", 8)
    labels = checks.as_labels(y, where)
    checks.check_lengths(x, labels, where, "texts")
    return np.ascontiguousarray(x, dtype=np.int64), labels
