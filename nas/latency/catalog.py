"""Which latency tables there are: bundled ones and this machine's own, by name; and whose each is."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from nas import content
from nas.errors import NasError, TableError
from nas.latency.device import Device
from nas.latency.table import LatencyTable
from nas.locks import cache_dir

ENDING = ".json"


@dataclass(frozen=True)
class Listed:
    """A table file that is there.

    Attributes:
        where: ``bundled`` or ``cache``.
        table: None where the file is damaged; ``reason`` then says how.
    """

    name: str
    where: str
    path: Path
    table: LatencyTable | None
    reason: str = ""


def listed() -> list[Listed]:
    """Every bundled and cached table, damaged ones too."""
    found = []
    for where, files in (("bundled", _bundled()), ("cache", _cached())):
        for name, path in files.items():
            try:
                found.append(Listed(name, where, path, LatencyTable.load(path)))
            except TableError as error:
                found.append(Listed(name, where, path, None, error.found))
    return found


def find(name: str) -> Path:
    """The file of a table: a bundled or cached name, else a path.

    Raises:
        TableError: there is none; suggests the name that was probably meant.
    """
    known = {**_cached(), **_bundled()}
    if name in known:
        return known[name]
    path = Path(name).expanduser()
    if path.is_file():
        return path
    close = difflib.get_close_matches(name, known, n=1)
    raise TableError(
        f"There is no latency table {name!r}: neither bundled, nor in this machine's cache, nor a file.",
        expected=f"one of {', '.join(known)}, or the path of a file" if known else "the path of a file",
        remedy=repr(close[0]) if close else "`nas tables list` shows what there is",
    )


def elsewhere(table: LatencyTable) -> list[str]:
    """In what the device of a table differs from this machine in the same scenario; nothing where it does not.

    A table whose device is not known well enough to be this machine's differs by what is not known.
    """
    facts = table.device
    if unknown := [name for name in ("cpu", "runtime", "threads", "batch") if name not in facts]:
        return [f"{name} not known" for name in unknown]
    try:
        here = Device.local(
            threads=facts["threads"], batch=facts["batch"], runtime=facts["runtime"],
            provider=facts.get("provider", ""), graph=facts.get("graph", ""),
        )  # fmt: skip
    except NasError as error:
        return [f"its runtime does not run here: {error.found}"]
    return here.differences(facts)


def _bundled() -> dict[str, Path]:
    return {name: path for name, path in content.available("latency_tables").items() if path.suffix == ENDING}


def _cached() -> dict[str, Path]:
    return {path.stem: path for path in sorted((cache_dir() / "tables").glob(f"[!.]*{ENDING}"))}
