"""Tokenisers: from texts to rows of numbers of one length; learnt words, or a tokenizer.json of Hugging Face's."""

from __future__ import annotations

import abc
import importlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nas.errors import DataError, ExtraError

Tokens = npt.NDArray[np.int64]
PADDING, UNKNOWN = 0, 1
#: A word, with what stands behind its apostrophe, or one character that is neither word nor space.
PATTERN = r"\w+(?:['’]\w+)?|[^\w\s]"


class Tokeniser(abc.ABC):
    """Texts → token numbers.

    Attributes:
        size: of the vocabulary; every token is below it.
        padding: what fills a short text's row.
        unknown: what stands for a word that is not known; None where the tokeniser needs no such token.
        special: tokens that are no part of a text, padding among them.
    """

    size: int
    padding: int
    unknown: int | None
    special: tuple[int, ...]

    @abc.abstractmethod
    def encode(self, texts: Sequence[str]) -> Tokens:
        """Token numbers ``[n, length]``; what is longer is cut off at the end. No row is padding alone."""

    @abc.abstractmethod
    def files(self) -> dict[str, bytes]:
        """What a student's ``predict.py`` needs to read texts: file name → content."""


@dataclass(frozen=True)
class WordTokeniser(Tokeniser):
    """Words and punctuation marks, each one token.

    Attributes:
        words: by number; 0 is padding and 1 is every unknown word.
        lower: whether case is dropped first.
        length: tokens of a row.
    """

    words: tuple[str, ...]
    lower: bool
    length: int

    padding = PADDING
    unknown = UNKNOWN
    special = (PADDING,)

    @classmethod
    def learn(cls, texts: Iterable[str], size: int, lower: bool, length: int) -> WordTokeniser:
        """The ``size - 2`` most frequent words of ``texts``, equally frequent ones by the alphabet."""
        counts = Counter(word for text in texts for word in _words(text, lower))
        ordered = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(("[PAD]", "[UNK]", *ordered[: size - 2]), lower, length)

    @property
    def size(self) -> int:  # type: ignore[override]
        return len(self.words)

    @cached_property
    def _number(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}

    def encode(self, texts: Sequence[str]) -> Tokens:
        tokens = np.full((len(texts), self.length), PADDING, dtype=np.int64)
        for row, text in zip(tokens, texts, strict=True):
            # A text without a word is one unknown word: attention to nothing is not defined.
            found = [self._number.get(word, UNKNOWN) for word in _words(text, self.lower)[: self.length]] or [UNKNOWN]
            row[: len(found)] = found
        return tokens

    def files(self) -> dict[str, bytes]:
        content = {"pattern": PATTERN, "lower": self.lower, "length": self.length, "tokens": self.words}
        return {"vocabulary.json": json.dumps(content, ensure_ascii=False, indent=0).encode()}


def _words(text: str, lower: bool) -> list[str]:
    return re.findall(PATTERN, text.lower() if lower else text)


@dataclass(frozen=True)
class FileTokeniser(Tokeniser):
    """A ``tokenizer.json`` of Hugging Face's library ``tokenizers``; padding is the file's own.

    Attributes:
        content: of the file, with truncation and padding to one length set.
    """

    content: str
    size: int
    padding: int
    unknown: int | None
    special: tuple[int, ...]

    @classmethod
    def load(cls, path: str, length: int) -> FileTokeniser:
        """Read a file.

        Raises:
            ExtraError: ``tokenizers`` is not installed.
            DataError: the file is missing, is no tokeniser, or has no token for padding.
        """
        library = _tokenizers()
        if not Path(path).expanduser().is_file():
            raise DataError(
                f"There is no tokenizer {path!r}; the working directory is {Path.cwd()}.",
                expected="the tokenizer.json of a Hugging Face model",
                remedy="check the spelling and the working directory, or give an absolute path",
            )
        try:
            tokenizer = library.Tokenizer.from_file(str(Path(path).expanduser()))
        except Exception as error:  # the library raises plain exceptions
            raise DataError(f"{path}: no tokenizer: {error}.", expected="the tokenizer.json of a model") from error
        named = {name: tokenizer.token_to_id(name) for name in ("[PAD]", "<pad>", "[UNK]", "<unk>")}
        known = {name: number for name, number in named.items() if number is not None}
        set_before = tokenizer.padding
        padding = set_before["pad_id"] if set_before else known.get("[PAD]", known.get("<pad>"))
        if padding is None:
            raise DataError(
                f"{path}: the tokenizer has no token for padding.",
                expected="a token [PAD] or <pad>, or padding set in the file",
                remedy="tokenizer.enable_padding(pad_id=…), then save it again",
            )
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(length=length, pad_id=padding, pad_token=tokenizer.id_to_token(padding))
        added = tokenizer.get_added_tokens_decoder()
        special = {number for number, token in added.items() if token.special} | {padding}
        unknown = known.get("[UNK]", known.get("<unk>"))
        return cls(tokenizer.to_str(), tokenizer.get_vocab_size(), padding, unknown, tuple(sorted(special)))

    def encode(self, texts: Sequence[str]) -> Tokens:
        encoded = _tokenizers().Tokenizer.from_str(self.content).encode_batch(list(texts))
        tokens = np.array([one.ids for one in encoded], dtype=np.int64)
        nothing = (tokens == self.padding).all(axis=1)
        tokens[nothing, 0] = self.padding if self.unknown is None else self.unknown
        return tokens

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self.content.encode()}


def _tokenizers() -> Any:
    try:
        return importlib.import_module("tokenizers")
    except ImportError as error:
        raise ExtraError(
            "Reading a tokenizer.json needs the package tokenizers.", remedy="pip install 'latency-nas[hf]'"
        ) from error
