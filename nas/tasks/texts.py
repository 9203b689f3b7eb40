"""Reading labelled texts: tables of text and label (.csv, .tsv, gzipped or not)."""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nas.errors import DataError

SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
#: What a column of splits may say → the split that it means.
SPLIT_NAMES = {
    "train": "train", "training": "train", "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid",
    "test": "test",
}  # fmt: skip


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns.

    Attributes:
        text, label: must be there.
        split: which split a row belongs to; used where the table has such a column, None: never.
    """

    text: str = "text"
    label: str = "label"
    split: str | None = "split"


@dataclass(frozen=True)
class Texts:
    """Rows of one split: texts, and their labels as they are written."""

    texts: list[str]
    labels: list[str]


def is_table(path: str) -> bool:
    """Whether a file is a table, by its name."""
    return path.lower().endswith(SUFFIXES)


def read_texts(data: str, columns: Columns) -> dict[str, Texts]:
    """The rows of a table by split; all of them are "train" where it has no column of splits.

    Raises:
        DataError: the file is missing, damaged, has not the columns, or a row is not whole.
    """
    path = Path(data).expanduser()
    if not path.is_file():
        raise DataError(
            f"There is no file {data!r}; the working directory is {Path.cwd()}.",
            remedy="check the spelling and the working directory, or give an absolute path",
        )
    try:
        opened = gzip.open if path.suffix.lower() == ".gz" else open
        with opened(path, "rt", encoding="utf-8-sig", newline="") as stream:
            tabs = path.name.lower().endswith((".tsv", ".tsv.gz"))
            found = _rows(csv.DictReader(stream, delimiter="\t" if tabs else ","), data, columns)
    except UnicodeDecodeError as error:
        raise DataError(f"{data}: not UTF-8: {error}.", remedy="save the table as UTF-8") from error
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise DataError(
            f"{data}: cannot be read as a table: {error}.", expected=f"a file {', '.join(SUFFIXES)}"
        ) from error
    if not found:
        raise DataError(f"{data}: the table has no rows.", expected="one row for each text")
    return found


def _rows(reader: csv.DictReader[str], data: str, columns: Columns) -> dict[str, Texts]:
    names = list(reader.fieldnames or ())
    if missing := [name for name in (columns.text, columns.label) if name not in names]:
        raise DataError(
            f"{data}: there is no column {missing[0]!r} among {', '.join(map(repr, names)) or 'none'}.",
            expected="a first line with the names of the columns",
            remedy="name the columns of text and label with task.text and task.label",
        )
    by_split = columns.split if columns.split in names else None
    found: dict[str, Texts] = {}
    for row in reader:
        text, label = row[columns.text], row[columns.label]
        if text is None or not label:
            raise DataError(
                f"{data}: line {reader.line_num} has no {'text' if text is None else 'label'}.",
                expected="a text and a label in every row",
                remedy="leave the row out, or put texts with commas in quotation marks",
            )
        said = row[by_split] if by_split else "train"
        split = SPLIT_NAMES.get((said or "").strip().lower())
        if split is None:
            raise DataError(
                f"{data}: line {reader.line_num} is of the split {said!r}.",
                expected=f"one of {', '.join(SPLIT_NAMES)}",
                remedy="if the column is something else, set task.split to null or to another column",
            )
        rows = found.setdefault(split, Texts([], []))
        rows.texts.append(text)
        rows.labels.append(label.strip())
    return found


def label_names(labels: Iterable[str]) -> tuple[str, ...]:
    """The different labels in the order of the classes: by value where all are whole numbers, else by the alphabet."""
    names = set(labels)
    whole = all(name.isascii() and name.removeprefix("-").isdigit() for name in names)
    return tuple(sorted(names, key=(lambda name: (int(name), name)) if whole else None))


def numbered(labels: Sequence[str], classes: tuple[str, ...], where: str) -> list[int]:
    """Labels by the number of their class.

    Raises:
        DataError: a label is none of the classes.
    """
    number = {name: i for i, name in enumerate(classes)}
    if strange := sorted(set(labels) - set(number)):
        raise DataError(
            f"{where} has the label {strange[0]!r}, which the training split lacks.",
            expected=f"one of {', '.join(classes[:10])}{', …' * (len(classes) > 10)}",
        )
    return [number[name] for name in labels]
