"""What can be wrong with a table file, all of it: damage, edits, other schemas and units, values that are no times."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nas.errors import TableError
from nas.files import digest
from nas.latency.schema import table_schema, violations
from nas.parts import PRECISIONS

SCHEMA_VERSION: int = table_schema()["properties"]["schema_version"]["const"]
#: One part's summaries come from the same calls; further apart than this, they are in different units.
UNITS_APART = 100.0
_OWN_FACTS = ("cpu", "cores", "runtime", "runtime_version", "threads", "batch", "fingerprint")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a table.

    Attributes:
        text: a sentence.
        fatal: the table is refused; otherwise it is used, and somebody should look.
    """

    text: str
    fatal: bool = True


def rebuild(space: Any = None) -> str:
    """The command that makes a good table of a space."""
    name = space if isinstance(space, str) and re.fullmatch(r"[\w./-]+", space) else "NAME"
    return f"build it again with `nas profile --space {name} --device local`"


def remedy(raw: Any) -> str:
    """What to do about a table that is refused."""
    if isinstance(raw, dict) and raw.get("origin"):
        return "import it again with `nas tables import`"
    return rebuild(raw.get("space") if isinstance(raw, dict) else None)


def read(path: Path) -> Any:
    """The JSON of a table file, unchecked but for keys that stand in it twice.

    Raises:
        TableError: no file, no JSON, or a key that an object has twice.
    """
    twice: list[str] = []

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice.extend(sorted({name for name in names if names.count(name) > 1}))
        return found

    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=once)
    except FileNotFoundError:
        raise TableError(f"There is no table at {path}.", remedy=rebuild()) from None
    except OSError as error:
        raise TableError(f"Cannot read {path}: {error.strerror}.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        found = f"{path} is damaged, cut or no JSON: {error}."
        raise TableError(found, expected="a JSON table", remedy=rebuild()) from error
    if twice:
        raise TableError(
            f"{path} has {len(twice)} key{'s' * (len(twice) > 1)} twice in one object, the first {twice[0]!r}.",
            expected="every part and field once: which of the two is meant cannot be known", remedy=remedy(raw),
        )  # fmt: skip
    return raw


def problems(raw: Any) -> list[Problem]:
    """Everything that is wrong with the content of a table file, the worst first."""
    if not isinstance(raw, dict):
        return [Problem(f"is no table but {type(raw).__name__} in JSON")]
    version = raw.get("schema_version")
    if version != SCHEMA_VERSION:
        if "entries" not in raw and "schema_version" not in raw:
            return [Problem("is no table: it has neither schema_version nor entries")]
        older = "; tables of version 1 lack what fits are repeated from and cannot be converted" if version == 1 else ""
        return [Problem(f"is a table of schema version {version!r}, where this program reads {SCHEMA_VERSION}{older}")]
    found = []
    if raw.get("unit") != "ms":
        found.append(Problem(f"is in {raw.get('unit')!r}, where every time has to be in milliseconds (unit 'ms')"))
    broken = [Problem(text) for text in violations({**raw, "unit": "ms"})]
    found += broken
    if not broken:  # the rest reads fields that are known to be there and of their types
        found += [*_entries(raw), *_nets(raw), *_fits(raw), *_provenance(raw)]
    if not broken and raw["sha256"] != digest({key: value for key, value in raw.items() if key != "sha256"}):
        found.append(Problem("does not match its own sha256: it was edited or cut"))
    return sorted(found, key=lambda problem: not problem.fatal)


def _entries(raw: dict[str, Any]) -> Iterator[Problem]:
    for key, entry in raw["entries"].items():
        for name in ("p50", "mean"):
            ratio = entry["value"] / entry[name]
            # A few calls that waited for a busy processor make a mean as large as they like, but never a small one.
            lowest = 1 / UNITS_APART if name == "p50" else 0.0
            if not lowest <= ratio <= UNITS_APART:
                yield Problem(
                    f"entry {key!r}: value {entry['value']:.4g} is {ratio:.4g} times its own {name} of "
                    f"{entry[name]:.4g} ms, so the units are mixed"
                )
                break
        if entry["p50"] > entry["p95"] * (1 + 1e-9):
            text = f"entry {key!r}: its median {entry['p50']:.4g} is above its 95th percentile {entry['p95']:.4g}"
            yield Problem(text, fatal=entry["measured"])
        if not entry["measured"] and not raw["interpolation"] and not raw["origin"]:
            yield Problem(f"entry {key!r} was not measured, and the table does not say how good that is", fatal=False)


def _nets(raw: dict[str, Any]) -> Iterator[Problem]:
    entries = raw["entries"]
    for i, net in enumerate(raw["nets"]):
        unknown = [key for key in net["parts"] if key not in entries]
        if unknown:
            yield Problem(f"nets[{i}] has {len(unknown)} parts without an entry, the first {unknown[0]!r}", fatal=False)
        elif net["parts"]:
            total = sum(count * entries[key]["value"] for key, count in net["parts"].items())
            if not 1 / UNITS_APART <= total / net["measured_ms"] <= UNITS_APART:
                yield Problem(
                    f"nets[{i}] takes {net['measured_ms']:.4g} ms, the sum of its parts is {total:.4g} ms, "
                    "so the units are mixed"
                )


def _fits(raw: dict[str, Any]) -> Iterator[Problem]:
    for cost, fit in raw["fits"].items():
        for name, values in fit.items():
            if isinstance(values, list) and len(values) != len(PRECISIONS):
                yield Problem(f"fits.{cost}.{name} has {len(values)} numbers, not one for each of {PRECISIONS}")
    for cost in raw["errors"].keys() - raw["fits"].keys():
        yield Problem(f"errors has {cost!r}, for which there is no fit")


def _provenance(raw: dict[str, Any]) -> Iterator[Problem]:
    if raw["origin"]:
        for name in ("source", "licence"):
            if not raw["origin"].get(name):
                yield Problem(f"origin lacks {name!r}: whose are the figures, and who may have them?", fatal=False)
        return
    lacking = [name for name in _OWN_FACTS if name not in raw["device"]]
    if lacking:
        yield Problem(f"device lacks {', '.join(lacking)}, and origin does not say that it was measured elsewhere")
    if "latency_ms" not in raw["errors"]:
        yield Problem("errors lacks 'latency_ms': nobody knows how good its sums are", fatal=False)
