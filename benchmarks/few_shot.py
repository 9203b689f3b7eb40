"""A new device's costs from other devices' columns and a few measured rows: rank correlation and errors, over seeds.

    python benchmarks/few_shot.py --known help_nb201:1080ti_1_ms,silver_4114_ms,hwnasbench_nb201:c10_pixel3_latency \\
        --target help_nb201:titan_rtx_256_ms --samples 10 --seeds 20
    python benchmarks/few_shot.py --known 'help_fbnet:*' --target help_fbnet:gold_6240_ms --exclude silver_4210r_ms
    python benchmarks/few_shot.py --suite help

FILE is a .csv or .csv.gz, with or without that ending: a path, or a name in the working directory or in the folder
``$NAS_TABLES``. ``--known`` lists ``FILE:COLUMN``; a COLUMN without a file is of the file before it, and ``*`` is
every number column of a file but ``idx``. The target's own column is never known, whatever is listed; ``--exclude``
(COLUMN or FILE:COLUMN) takes more of them out, such as near-duplicates. Files are joined on ``idx``: rows that are in
all of them. A column of codes (strings of five or more digits or letters, all of one length), if there is one, is
used as genomes: ``--no-codes`` does without.

Each seed chooses its rows among those whose target is finite and positive, from the known columns alone, and is
judged on all others of these. The last line is JSON: means over the seeds of ``spearman`` and of the shares
``within_5`` and ``within_10`` of rows predicted to within 5 and 10 %; ``spearman_std`` is the spread over seeds;
``covered`` is the share of rows within one predicted standard deviation (about 0.68 where uncertainty is told well).
``ridge`` is the peer: the mean Spearman of a ridge regression of logarithms on the known columns, its strength by
leave-one-out, on as many rows drawn at random.

``--suite`` runs every target of a published problem, prints a line each, and sums up in the last one.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small matrices: threads would only be in the way
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nas.errors import ContentError, NasError, TableError
from nas.latency.few_shot import FewShot
from nas.latency.fit import spearman
from nas.tabular import CODE, FOLDER, Table, encode

Array = npt.NDArray[np.float64]
ORIGIN = "the authors' repositories: HELP, HW-NAS-Bench, BRP-NAS"
JOIN = "idx"
ENDINGS = ("", ".csv.gz", ".csv")


@dataclass(frozen=True)
class Column:
    """A column of a file as it was named."""

    file: str
    name: str

    def __str__(self) -> str:
        return f"{self.file}:{self.name}"


@dataclass(frozen=True)
class Suite:
    """A published problem: what is known, what is predicted, and which twins of a target are not known.

    Attributes:
        known: as on the command line.
        targets: as on the command line; of none, every known column in turn.
        twins: Spearman with the target above which a known column counts as the same device and is left out.
    """

    known: str
    targets: str = ""
    twins: float | None = None


SUITES = {
    "help": Suite(
        "help_nb201:1080ti_1_ms,1080ti_32_ms,1080ti_256_ms,silver_4114_ms,silver_4210r_ms,samsung_a50_ms,"
        "essential_ph_1_ms,samsung_s7_ms,hwnasbench_nb201:c10_pixel3_latency",
        "help_nb201:titan_rtx_256_ms,gold_6226_ms,pixel2_ms,hwnasbench_nb201:c10_fpga_latency,c10_eyeriss_latency",
    ),
    "help_nb201": Suite("help_nb201:*", twins=0.99),
    "help_fbnet": Suite("help_fbnet:*"),
}


# ---- reading -------------------------------------------------------------------------------------


@cache
def read(file: str) -> Table:
    """A table by path or name, with or without its ending; raises ContentError where it is nowhere."""
    folders = [Path(), *([Path(os.environ[FOLDER])] if FOLDER in os.environ else [])]
    for name in (file + ending for ending in ENDINGS):
        if any((folder / name).expanduser().is_file() for folder in folders):
            table = Table.of(f"{name}:{JOIN}", origin=ORIGIN)
            table.column(JOIN)
            return table
    return Table.of(f"{file}:{JOIN}", origin=ORIGIN)  # says where it was looked for


@cache
def numbers(file: str, name: str) -> dict[str, float]:
    """A column by ``idx``; NaN where a cell is empty or no number."""
    table = read(file)
    values = map(_number, table.column(name))
    return dict(zip(reversed(table.column(JOIN)), reversed(list(values)), strict=True))


def is_code(cells: Sequence[str]) -> bool:
    """Whether a column holds genomes: long strings of digits or letters, all of one length."""
    return len({len(cell) for cell in cells}) == 1 and all(re.fullmatch(f"[0-9a-z]{{{CODE},}}", cell) for cell in cells)


def parse(text: str) -> list[Column]:
    """``FILE:COLUMN,COLUMN,FILE:*`` → columns; raises ContentError."""
    found: list[Column] = []
    file = ""
    for item in filter(None, text.split(",")):
        where, colon, name = item.rpartition(":")
        file = where if colon else file
        if not file or not name:
            raise ContentError(f"{item!r} names no file or no column.", expected="FILE:COLUMN,COLUMN,FILE:*")
        found += [Column(file, each) for each in (costs(file) if name == "*" else [name])]
    return list(dict.fromkeys(found))


def costs(file: str) -> list[str]:
    """Names of the number columns of a file, but for ``idx`` and codes."""
    found = []
    for name, cells in read(file).columns.items():
        filled = [cell for cell in cells if cell and cell.lower() != "nan"]
        if name != JOIN and filled and not is_code(cells) and all(np.isfinite(_number(cell)) for cell in filled):
            found.append(name)
    return found


@dataclass(frozen=True)
class Problem:
    """Known columns ``[n, d]``, the target's ``[n]``, and genomes ``[n, places]`` or none."""

    known: Array
    target: Array
    genomes: npt.NDArray[np.int64] | None


def problem(known: Sequence[Column], target: Column, codes: bool = True) -> Problem:
    """Join the columns on ``idx``, in the order of the target's file.

    Raises:
        ContentError: something is missing, or no row is in all files.
    """
    if not known:
        raise ContentError("No known column is left.", expected="a column of another device in --known")
    columns = [numbers(column.file, column.name) for column in known]
    wanted = numbers(target.file, target.name)
    rows = [row for row in wanted if all(row in column for column in columns)]
    if not rows:
        raise ContentError(f"{target} shares no {JOIN!r} with the known columns.")
    values = np.array([[column[row] for column in columns] for row in rows])
    files = list(dict.fromkeys(column.file for column in (*known, target)))
    genomes = next(filter(lambda g: g is not None, (genes(file, rows) for file in files)), None) if codes else None
    return Problem(values, np.array([wanted[row] for row in rows]), genomes)


def genes(file: str, rows: Sequence[str]) -> npt.NDArray[np.int64] | None:
    """The code columns of a file as integers ``[rows, places]``; none where it has none."""
    table = read(file)
    names = [name for name, cells in table.columns.items() if name != JOIN and is_code(cells)]
    position = {row: i for i, row in reversed(list(enumerate(table.column(JOIN))))}
    found, symbols = [], 0
    for name in names:
        codes = encode(table, [name], [position[row] for row in rows])[0]
        found.append(codes + symbols)  # a 3 is another thing in another column
        symbols += int(codes.max()) + 1
    return np.hstack(found) if found else None


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return np.nan


# ---- judging -------------------------------------------------------------------------------------


def ridge(known: Array, target: Array, rows: npt.NDArray[np.int64]) -> Array:
    """The peer: ridge regression of logarithms, strength by leave-one-out, gaps filled with the column's mean."""
    from sklearn.linear_model import RidgeCV

    with np.errstate(invalid="ignore", divide="ignore"):
        logs = np.log(np.where(known > 0, known, np.nan))
    logs = np.where(np.isfinite(logs), logs, np.nan)
    logs = logs[:, np.isfinite(logs).any(axis=0)]
    logs = np.where(np.isfinite(logs), logs, np.nanmean(logs, axis=0))
    logs = (logs - logs.mean(axis=0)) / np.maximum(logs.std(axis=0), 1e-12)
    model = RidgeCV(np.logspace(-3, 3, 13)).fit(logs[rows], np.log(target[rows]))
    return np.asarray(np.exp(model.predict(logs)))


def judge(setting: Problem, samples: int, seeds: int) -> dict[str, Any]:
    """Means over seeds, as the last line prints them; raises NasError."""
    valid = np.flatnonzero(np.isfinite(setting.target) & (setting.target > 0))
    if len(valid) < samples + 2:
        raise TableError(
            f"{len(valid)} rows have a finite, positive target.", expected=f"{samples} to measure and two to judge by"
        )
    model = FewShot(setting.known, setting.genomes, samples)
    found = []
    for seed in range(seeds):
        rows = model.choose(seed, valid)
        adapted = model.adapt(rows, setting.target[rows])
        rest = np.setdiff1d(valid, rows)
        true, predicted = setting.target[rest], adapted.predicted[rest]
        drawn = np.random.default_rng(seed).choice(valid, samples, replace=False)
        others = np.setdiff1d(valid, drawn)
        off = np.abs(predicted / true - 1)
        covered = np.abs(predicted - true) <= adapted.uncertainty[rest] * predicted
        peer = spearman(ridge(setting.known, setting.target, drawn)[others], setting.target[others])
        found.append((spearman(predicted, true), (off <= 0.05).mean(), (off <= 0.10).mean(), covered.mean(), peer))
    mean, spread = np.mean(found, axis=0), np.std(found, axis=0)
    names = ("spearman", "within_5", "within_10", "covered", "ridge")
    return {
        **{name: round(float(value), 4) for name, value in zip(names, mean, strict=True)},
        "spearman_std": round(float(spread[0]), 4),
        "samples": samples,
        "seeds": seeds,
        "rows": len(valid),
        "known": setting.known.shape[1],
        "codes": setting.genomes is not None,
    }


def twins(known: Sequence[Column], target: Column, limit: float) -> list[Column]:
    """Known columns whose Spearman with the target is above ``limit``."""
    wanted, found = numbers(target.file, target.name), []
    for column in known:
        other = numbers(column.file, column.name)
        pairs = np.array([(wanted[row], other[row]) for row in wanted if row in other])
        pairs = pairs[np.isfinite(pairs).all(axis=1)]
        if len(pairs) > 2 and spearman(pairs[:, 0], pairs[:, 1]) > limit:
            found.append(column)
    return found


def run_suite(name: str, samples: int, seeds: int, codes: bool) -> dict[str, Any]:
    """Print a line per target; the summary."""
    suite = SUITES[name]
    known = parse(suite.known)
    targets = parse(suite.targets) or known
    lines = []
    for target in targets:
        left = [column for column in known if column != target]
        if suite.twins is not None:
            gone = twins(left, target, suite.twins)
            left = [column for column in left if column not in gone]
        line = judge(problem(left, target, codes), samples, seeds)
        lines.append(line)
        print(
            f"{target!s:44} {len(left):3} known  spearman {line['spearman']:.4f} ±{line['spearman_std']:.4f}"
            f"  within 5 % {line['within_5']:.3f}  10 % {line['within_10']:.3f}  covered {line['covered']:.2f}"
            f"  ridge {line['ridge']:.4f}  ratio {line['spearman'] / max(line['ridge'], 1e-9):.3f}",
            flush=True,
        )
    names = ("spearman", "within_5", "within_10", "covered", "ridge", "spearman_std")
    means = {key: round(float(np.mean([line[key] for line in lines])), 4) for key in names}
    return {
        "suite": name,
        **means,
        "spearman_min": min(line["spearman"] for line in lines),
        "ratio": round(means["spearman"] / max(means["ridge"], 1e-9), 4),
        "targets": len(lines),
        "samples": samples,
        "seeds": seeds,
    }


def main() -> None:
    """Read the tables, adapt to every target, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--known", metavar="FILE:COLUMN[,…]", action="append", default=[])
    parser.add_argument("--target", metavar="FILE:COLUMN")
    parser.add_argument("--exclude", metavar="COLUMN[,…]", action="append", default=[])
    parser.add_argument("--suite", choices=sorted(SUITES))
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--no-codes", action="store_true")
    options = parser.parse_args()
    if options.samples < 2 or options.seeds < 1:
        parser.error("--samples is at least 2, --seeds at least 1")
    if bool(options.suite) == bool(options.target or options.known):
        parser.error("either --known and --target, or --suite")
    try:
        if options.suite:
            print(json.dumps(run_suite(options.suite, options.samples, options.seeds, not options.no_codes)))
            return
        if not options.target or not options.known:
            parser.error("--known and --target go together")
        targets = parse(options.target)
        if len(targets) != 1:
            parser.error("--target is one column")
        known = left_over(parse(",".join(options.known)), targets[0], ",".join(options.exclude).split(","))
        print(json.dumps(judge(problem(known, targets[0], not options.no_codes), options.samples, options.seeds)))
    except NasError as error:
        raise SystemExit(str(error)) from None


def left_over(known: Sequence[Column], target: Column, exclude: Sequence[str]) -> list[Column]:
    """Known columns without the target's, however its file was named, and without the excluded ones."""
    own = (read(target.file).file.resolve(), target.name)
    return [
        column
        for column in known
        if (read(column.file).file.resolve(), column.name) != own and not {column.name, str(column)} & set(exclude)
    ]


if __name__ == "__main__":
    main()
