"""What `nas tables` does: list, show, validate, compare, adapt and import tables; the command line prints it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.errors import TableError

if TYPE_CHECKING:
    from nas.latency.catalog import Listed
    from nas.latency.compare import Comparison, Ranking
    from nas.latency.table import Entry, LatencyTable, Net
    from nas.space import SearchSpace

INVALID = 2
EXTREMES = 5  # slowest and fastest parts that are shown


@dataclass(frozen=True)
class Answer:
    """What a command says, and its exit code."""

    lines: list[str] = field(default_factory=list)
    code: int = 0


def add_parser(commands: Any, common: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the group to the subparsers ``commands``; each command sets ``answer``, a function of the options."""
    group: argparse.ArgumentParser = commands.add_parser("tables", help="look at, check, compare and import tables")
    actions = group.add_subparsers(required=True, metavar="ACTION")

    listing = actions.add_parser("list", parents=[common], help="what is bundled and in this machine's cache")
    listing.add_argument("--json", action="store_true", help="print JSON")
    listing.set_defaults(answer=list_tables)

    show = actions.add_parser("show", parents=[common], help="everything about one table")
    show.add_argument("table", help="bundled or cached name, or a file")
    show.add_argument("--part", metavar="SUBSTRING", help="the parts whose keys have this in them")
    show.add_argument("--nets", action="store_true", help="the whole networks that its fits come from")
    show.set_defaults(answer=show_table)

    validate = actions.add_parser("validate", parents=[common], help="every check; exit code 2 where one fails")
    validate.add_argument("files", nargs="+", metavar="FILE")
    validate.set_defaults(answer=validate_tables)

    compare = actions.add_parser("compare", parents=[common], help="two tables part by part, and how they rank nets")
    compare.add_argument("a", help="bundled or cached name, or a file")
    compare.add_argument("b", help="the other one")
    space = compare.add_mutually_exclusive_group()
    space.add_argument("--space", metavar="NAME", help="rank random candidates of this space too, as it is by default")
    space.add_argument("--experiment", metavar="FILE", help="or of this experiment's space")
    compare.add_argument("--input", default="3x224x224", help="with --space: shape of an input (default: %(default)s)")
    compare.add_argument("--classes", type=int, default=1000, help="with --space: classes (default: %(default)s)")
    compare.add_argument("--json", action="store_true", help="print JSON")
    compare.set_defaults(answer=compare_tables)

    adapt = actions.add_parser(
        "adapt", parents=[common], help="a new device's table from other devices' tables and a few measurements"
    )
    adapt.add_argument("known", nargs="+", metavar="TABLE", help="tables of other devices for one space")
    adapt.add_argument("--suggest", type=int, metavar="N", help="print the N parts that are worth measuring")
    adapt.add_argument("--seed", type=int, default=0, help="with --suggest: another choice (default: %(default)s)")
    adapt.add_argument(
        "--measured", type=Path, metavar="FILE", help="the new device's few: a table, or JSON of parts and networks"
    )
    adapt.add_argument("--name", default="adapted", help="of the new device (default: that of the table, or adapted)")
    adapt.add_argument("--experiment", metavar="FILE", help="of the tables' space: sums are fitted to FILE's nets")
    adapt.add_argument("--out", type=Path, metavar="TABLE.json", help="table file to write")
    adapt.set_defaults(answer=adapt_tables)

    importing = actions.add_parser("import", parents=[common], help="read a published table of another project")
    importing.add_argument("format", help="proxylessnas or ofa")
    importing.add_argument("file", type=Path, help="their file (YAML, JSON or CSV), or a folder of them")
    importing.add_argument("--out", type=Path, required=True, metavar="TABLE.json", help="table file to write")
    importing.add_argument("--select", default="", metavar="NAME", help="which of several tables in the file")
    importing.set_defaults(answer=import_table)
    return group


# ---- list ---------------------------------------------------------------------------------------------


def list_tables(options: argparse.Namespace) -> Answer:
    """One line a table; damaged ones with the reason."""
    from nas.latency.catalog import listed

    found = listed()
    if options.json:
        return Answer([json.dumps([_facts(item) for item in found], indent=2, allow_nan=False)])
    if not found:
        return Answer(["no tables: none is bundled, none in this machine's cache; `nas profile` measures one"])
    head = (
        "name",
        "where",
        "space",
        "device",
        "runtime",
        "threads",
        "batch",
        "parts",
        "error",
        "≤5 %",
        "noise",
        "date",
    )
    rows = [_row(_facts(item)) for item in found if item.table is not None]
    damaged = [f"damaged: {item.name} ({item.where}): {item.reason}" for item in found if item.table is None]
    return Answer([*(aligned([head, *rows]) if rows else []), *damaged])


def _facts(item: Listed) -> dict[str, Any]:
    base: dict[str, Any] = {"name": item.name, "where": item.where, "path": str(item.path)}
    table = item.table
    if table is None:
        return {**base, "problem": item.reason}
    error = table.errors.get("latency_ms")
    measured = sum(entry.measured for entry in table.entries.values())
    return {
        **base, "problem": None, "space": table.space, "device": table.device["name"],
        **{key: table.device.get(key) for key in ("runtime", "threads", "batch", "fingerprint")},
        "parts": len(table.entries), "measured": measured, "interpolated": len(table.entries) - measured,
        "error": None if error is None else asdict(error), "noise": None if table.origin else table.noise,
        "date": table.date, "licence": table.origin.get("licence"),
    }  # fmt: skip


def _row(facts: Mapping[str, Any]) -> tuple[str, ...]:
    error = facts["error"]
    parts = f"{facts['measured']}" + (f"+{facts['interpolated']} interpolated" if facts["interpolated"] else "")
    return (
        facts["name"], facts["where"], facts["space"], facts["device"],
        *(str(facts[key] or "–") for key in ("runtime", "threads", "batch")), parts,
        "–" if error is None else _percent(error["mape"]), "–" if error is None else _percent(error["within_5"]),
        "–" if facts["noise"] is None else _percent(facts["noise"]), facts["date"][:10],
    )  # fmt: skip


# ---- show ---------------------------------------------------------------------------------------------


def show_table(options: argparse.Namespace) -> Answer:
    """Provenance, protocol, fits, errors and the extremes; or the parts or nets that were asked for."""
    from nas.latency.catalog import find
    from nas.latency.table import LatencyTable

    path = find(options.table)
    table = LatencyTable.load(path)
    lines = [f"{table.name}: latency table for space {table.space}, in ms", f"file {path}, sha256 {table.sha256[:12]}…"]
    if options.part is not None:
        lines += ["", *_parts(table, {k: e for k, e in table.entries.items() if options.part in k}, options.part)]
    if options.nets:
        lines += ["", *_nets(table)]
    if options.part is None and not options.nets:
        lines += _provenance(table) + _quality(table) + _extremes(table)
    return Answer(lines)


def _provenance(table: LatencyTable) -> list[str]:
    from nas.latency.catalog import elsewhere

    apart = elsewhere(table)
    facts = ", ".join(f"{key} {value}" for key, value in table.device.items() if value not in ("", None))
    made = f"imported {table.date}" if table.origin else f"measured {table.date}"
    return [
        f"{made} by nas {table.nas_version}",
        *(f"origin {key}: {value}" for key, value in table.origin.items()),
        f"device: {facts}",
        f"this machine's: no: {'; '.join(apart)}" if apart else "this machine's: yes, by its fingerprint",
        "protocol: " + _pairs(table.protocol),
    ]


def _quality(table: LatencyTable) -> list[str]:
    from nas.latency.fit import LinearFit
    from nas.parts import PRECISIONS

    measured = sum(entry.measured for entry in table.entries.values())
    lines = [f"parts: {measured} measured, {len(table.entries) - measured} interpolated"]
    if table.interpolation:
        lines.append("interpolation: " + _pairs(table.interpolation))
    for cost, fit in table.fits.items():
        if fit == LinearFit():
            lines.append(f"fit {cost}: none, plain sums of parts")
            continue
        terms = [f"{name} {'/'.join(map(_number, v))}" for name, v in fit.as_dict().items() if isinstance(v, tuple)]
        lines.append(f"fit {cost} ({'/'.join(PRECISIONS)}): {', '.join(terms)}, per_net {_number(fit.per_net)}")
    for cost, error in table.errors.items():
        lines.append(
            f"error {cost}: {_percent(error.mape)} on average, {_percent(error.within_5)} of {error.nets} nets within "
            f"5 %, {_percent(error.within_10)} within 10 %, Spearman {error.spearman:.3f} (nets that it did not see)"
        )
    if not table.errors:
        lines.append("error: not known, sums were never compared with whole networks")
    lines.append(f"noise: {'not known' if table.origin else _percent(table.noise)}")
    known = sum(entry.energy_mj is not None for entry in table.entries.values())
    lines.append(f"energy: {table.energy or 'not measured'}" + (f"; {known} parts have it" if known else ""))
    return lines


def _extremes(table: LatencyTable) -> list[str]:
    order = sorted(table.entries.items(), key=lambda pair: -pair[1].value)
    few = min(EXTREMES, (len(order) + 1) // 2)
    slowest, fastest = dict(order[:few]), dict(reversed(order[few:][-few:]))
    return ["", "slowest", *_entry_rows(slowest), "fastest", *_entry_rows(fastest)]


def _parts(table: LatencyTable, chosen: Mapping[str, Entry], part: str) -> list[str]:
    from nas.latency.keys import nearest

    if not chosen:
        raise TableError(
            f"Table {table.name!r} has no part with {part!r} in its key.",
            expected="a piece of a key such as " + repr(nearest(part, table.entries)),
        )
    return _entry_rows(chosen)


def _entry_rows(entries: Mapping[str, Entry]) -> list[str]:
    head = ("ms", "p50", "p95", "n", "± %", "mJ", "executed as", "part")
    return aligned([head, *(_entry_row(key, entry) for key, entry in entries.items())])


def _entry_row(key: str, entry: Entry) -> tuple[str, ...]:
    fused = " ".join(f"{n}×{op}" if n > 1 else op for op, n in entry.fused.items())
    times = (f"{ms:.4g}" for ms in (entry.value, entry.timing.p50, entry.timing.p95))
    energy = "–" if entry.energy_mj is None else f"{entry.energy_mj:.3g}"
    calls = str(entry.timing.n) if entry.measured else "– interpolated"
    return (*times, calls, f"{100 * entry.uncertainty:.1f}", energy, fused or "–", key)


def _nets(table: LatencyTable) -> list[str]:
    if not table.nets:
        return ["no whole networks: plain sums of parts"]
    head = ("net", "measured", "predicted", "off by", "plain sum", "p95", "kB", "parts", "source")
    return aligned([head, *(_net_row(i, net) for i, net in enumerate(table.nets))])


def _net_row(i: int, net: Net) -> tuple[str, ...]:
    off = f"{100 * (net.predicted_ms / net.measured_ms - 1):+.1f} %"
    times = [f"{ms:.4g}" for ms in (net.measured_ms, net.predicted_ms, net.plain_sum_ms, net.p95_ms)]
    return (
        str(i), *times[:2], off, *times[2:], f"{net.size_bytes / 1000:.1f}", str(sum(net.parts.values())), net.source,
    )  # fmt: skip


# ---- validate -----------------------------------------------------------------------------------------


def validate_tables(options: argparse.Namespace) -> Answer:
    """All problems of all files."""
    lines, code = [], 0
    for name in options.files:
        found, good = _validated(name)
        lines += found
        code = code if good else INVALID
    return Answer(lines, code)


def _validated(name: str) -> tuple[list[str], bool]:
    from nas.latency.catalog import find
    from nas.latency.check import problems, read, remedy

    try:
        raw = read(find(name))
    except TableError as error:
        return [f"{name}: not a table", *(f"  {line}" for line in str(error).splitlines())], False
    found = problems(raw)
    fatal = [problem for problem in found if problem.fatal]
    lines = [f"  {'error' if p.fatal else 'warning'}: {p.text}" for p in found]
    if fatal:
        count = f"{len(fatal)} error{'s' * (len(fatal) > 1)}"
        return [f"{name}: {count}, refused", *lines, f"  Try: {remedy(raw)}"], False
    return [f"{name}: good, {len(raw['entries'])} parts of space {raw['space']}", *lines], True


# ---- compare ------------------------------------------------------------------------------------------


def compare_tables(options: argparse.Namespace) -> Answer:
    """Parts and networks of two tables beside each other."""
    from nas.latency.catalog import find
    from nas.latency.compare import compare
    from nas.latency.table import LatencyTable

    a, b = (LatencyTable.load(find(name)) for name in (options.a, options.b))
    found = compare(a, b, _space(options))
    if options.json:
        return Answer([json.dumps({"a": a.name, "b": b.name, **asdict(found)}, indent=2, allow_nan=False)])
    return Answer([f"a: {a.name} ({a.date[:10]})", f"b: {b.name} ({b.date[:10]})", *_compared(found)])


def _compared(found: Comparison) -> list[str]:
    lines = [
        f"parts: {found.shared} shared, {found.only_a} only in a, {found.only_b} only in b",
        f"value in b / value in a: {_quartiles(found.ratio)}; Spearman over parts {found.spearman:.3f}",
    ]
    if not found.rankings:
        lines.append("networks: none to rank; name a space of these parts with --space or --experiment")
    for ranking in found.rankings:
        lines += ["", *_ranked(ranking)]
    return lines


def _ranked(ranking: Ranking) -> list[str]:
    lines = [
        f"{ranking.nets} {ranking.what}: Spearman {ranking.spearman:.3f}, b / a {_quartiles(ranking.ratio)}",
    ]
    if ranking.swaps:
        head = ("places in a", "in b", "ms in a", "in b", "network")
        rows = [(str(s.rank_a), str(s.rank_b), f"{s.ms_a:.4g}", f"{s.ms_b:.4g}", s.network) for s in ranking.swaps]
        lines += ["those that change their places most (1 is the fastest):", *aligned([head, *rows])]
    return lines


def _space(options: argparse.Namespace) -> SearchSpace | None:
    from nas import profiling
    from nas.experiment import load_experiment

    if options.experiment:
        return profiling.of_experiment(load_experiment(options.experiment), profiling.Scenario(), None).space
    if not options.space:
        return None
    shape = profiling.parse_shape(options.input)
    return profiling.of_space(options.space, [], shape, options.classes, profiling.Scenario(), None).space


# ---- adapt --------------------------------------------------------------------------------------------


def adapt_tables(options: argparse.Namespace) -> Answer:
    """Say what to measure, or make the table of what was measured."""
    from nas.experiment import load_experiment
    from nas.job import Job
    from nas.latency.adapt import suggest, values
    from nas.latency.adapted import adapted_table, read_few
    from nas.latency.catalog import find
    from nas.latency.profile import describe
    from nas.latency.table import LatencyTable

    known = [LatencyTable.load(find(name)) for name in options.known]
    if (options.suggest is None) == (options.measured is None):
        raise TableError(
            "nas tables adapt takes either --suggest or --measured.",
            remedy="--suggest 10 says which parts to measure (nas profile --keys), --measured FILE makes the table",
        )
    if options.suggest is not None:
        return Answer(suggest([values(table) for table in known], options.suggest, options.seed))
    if options.out is None:
        raise TableError("nas tables adapt --measured needs a place for the table.", remedy="--out TABLE.json")
    few = read_few(options.measured)
    name = options.name if options.name != "adapted" else few.device.get("name", options.name)
    parts = Job(load_experiment(options.experiment), Path(".")).space.keys() if options.experiment else None
    table = adapted_table(known, few, name, parts)
    table.save(options.out)
    return Answer([describe(table), f"table written to {options.out}"])


# ---- import -------------------------------------------------------------------------------------------


def import_table(options: argparse.Namespace) -> Answer:
    """Read a published table and write ours."""
    from nas.latency.importers import importers

    table = importers.get(options.format).read(options.file, options.select)
    table.save(options.out)
    licence = table.origin.get("licence", "not known")
    return Answer(
        [
            f"{len(table.entries)} blocks of {table.name} written to {options.out}",
            f"source: {table.origin.get('source')}",
            f"licence: {licence}; look at it before you pass the table on",
        ]
    )


# ---- words --------------------------------------------------------------------------------------------


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A head and rows as lines of columns, those of figures to the right."""
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    figures = [all(cell[:1] in "0123456789+-–" for cell in column[1:]) for column in columns]
    formats = [f"{{:{'>' if right else '<'}{width}}}" for width, right in zip(widths, figures, strict=True)]
    return ["  ".join(f.format(cell) for f, cell in zip(formats, row, strict=True)).rstrip() for row in rows]


def _pairs(values: Mapping[str, Any]) -> str:
    inner = (f"{key} ({_pairs(v)})" if isinstance(v, dict) else f"{key} {_number(v)}" for key, v in values.items())
    return ", ".join(inner)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _quartiles(values: Iterable[float]) -> str:
    low, middle, high = values
    return f"median {middle:.3g} (quartiles {low:.3g} and {high:.3g})"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
