"""What importers share: files of block keys with mean, spread and count, and the table that they become."""

from __future__ import annotations

import csv
import datetime
import gzip
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from nas import __version__
from nas.errors import TableError
from nas.latency.fit import LinearFit
from nas.latency.measure import Timing
from nas.latency.table import Entry, LatencyTable
from nas.registry import Registry

DIGITS = 6  # of a millisecond: what the published tables are good for, and nanoseconds
QUANTILE_95 = 1.645  # of the normal distribution, in standard deviations above the mean


@dataclass(frozen=True)
class Format:
    """A published format.

    Attributes:
        space: what imported tables call their space.
        read: (file or folder, which of several tables in it, or "") → table.
        random_net: block keys of a random network of the space, for comparing tables.
    """

    space: str
    read: Callable[[Path, str], LatencyTable]
    random_net: Callable[[np.random.Generator], list[str]]


importers: Registry[Format] = Registry("importer")


@dataclass(frozen=True)
class Row:
    """One published measurement: ``mean`` and standard deviation ``std`` in ms over ``count`` runs.

    ``group`` is what tells several tables in one file apart, "" where there is one.
    """

    key: str
    mean: float
    std: float
    count: int
    group: str = ""


def bottlenecks(config: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Blocks of a published network's configuration with their convolutions, but for those that do nothing."""
    for block in config["blocks"]:
        conv = block["mobile_inverted_conv"]
        if conv is not None and conv["name"] != "ZeroLayer":
            yield block, conv


def read_rows(path: Path, group: str) -> list[Row]:
    """Rows of a published file: YAML or JSON of ``key: {mean, var or std, count}``, or CSV with a column of groups.

    Args:
        path: may be gzipped.
        group: the CSV's column that tells tables apart.

    Raises:
        TableError: unreadable, or a row without a positive mean.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except FileNotFoundError:
        raise TableError(f"There is no file {path}.") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise TableError(f"Cannot read {path}: {error}.") from error
    ending = path.name.removesuffix(".gz").rpartition(".")[2]
    return _from_csv(path, text, group) if ending == "csv" else _from_mapping(path, text, ending)


def _from_csv(path: Path, text: str, group: str) -> list[Row]:
    rows = list(csv.DictReader(io.StringIO(text)))
    wanted = {group, "key", "mean_ms", "count"}
    if not rows or not wanted <= set(rows[0]):
        raise TableError(f"{path} lacks columns of a block table.", expected=f"{', '.join(sorted(wanted))}")
    return [
        _row(path, row["key"], {**row, "mean": row["mean_ms"], "std": row.get("std_ms"), "var": row.get("var_ms2")},
             row[group])
        for row in rows
    ]  # fmt: skip


def _from_mapping(path: Path, text: str, ending: str) -> list[Row]:
    try:
        content = json.loads(text) if ending == "json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise TableError(f"{path} is damaged: {error}.", expected="a block table in YAML, JSON or CSV") from error
    if not isinstance(content, dict) or not all(isinstance(value, dict) for value in content.values()):
        raise TableError(f"{path} is no block table.", expected="key: {mean, var or std, count} for every block")
    return [_row(path, str(key), values) for key, values in content.items()]


def _row(path: Path, key: str, values: Mapping[str, Any], group: str = "") -> Row:
    try:
        mean, count = float(values["mean"]), int(values.get("count") or 0)
        var = values.get("var")
        std = math.sqrt(float(var)) if var not in (None, "") else float(values.get("std") or 0.0)
    except (KeyError, TypeError, ValueError) as error:
        raise TableError(
            f"{path}: {key!r} lacks or garbles a figure: {error}.", expected="mean, var or std, count"
        ) from error
    if not (math.isfinite(mean) and mean > 0 and math.isfinite(std) and count >= 0):
        raise TableError(f"{path}: the mean of {key!r} is {mean}.", expected="finite, positive milliseconds")
    return Row(key, mean, std, count, group)


def table_of(
    rows: Iterable[Row], *, space: str, device: Mapping[str, Any], origin: Mapping[str, str], files: Sequence[Path]
) -> LatencyTable:
    """Rows as a table whose sums are plain: no fit, because there are no whole networks to fit to.

    Only mean, spread and count are published. The median is taken to be the mean, and the 95th percentile that of a
    normal distribution of that spread; the uncertainty is the standard error of the mean, and the noise the
    difference that two halves of the runs can be expected to have.
    """
    entries: dict[str, Entry] = {}
    for row in rows:
        if row.key in entries:
            raise TableError(
                f"Block {row.key!r} is there twice.", expected="every block once", remedy="import one table at a time"
            )
        standard_error = row.std / row.mean / math.sqrt(row.count) if row.count else 0.0
        mean = round(row.mean, DIGITS)
        timing = Timing(
            mean, round(row.mean + QUANTILE_95 * row.std, DIGITS), mean, row.count, round(2 * standard_error, DIGITS)
        )
        entries[row.key] = Entry(timing, mean, uncertainty=round(standard_error, DIGITS))
    today = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return LatencyTable(
        space=space, device=dict(device), entries=entries, fits={"latency_ms": LinearFit()}, errors={}, noise=0.0,
        nets=[], protocol={"method": "published by others", "files": [path.name for path in files]}, date=today,
        nas_version=__version__, energy="not published", origin={**origin, "retrieved": today[:10]},
    )  # fmt: skip


def price(table: LatencyTable, keys: Sequence[str]) -> float:
    """Milliseconds of a network given as the keys of its blocks, a block as often as it is executed.

    Raises:
        TableError: the table lacks blocks; names the first and the one that is most like it.
    """
    if missing := table.missing(list(keys)):
        raise table.lacks(missing, len(keys))
    return sum(table.entries[key].value for key in keys)


def out_size(size: int, stride: int) -> int:
    """Side of the output of a padded convolution on a side of ``size``."""
    return (size - 1) // stride + 1


def shape(size: int, channels: int) -> str:
    """A square map as published keys write it."""
    return f"{size}x{size}x{channels}"
