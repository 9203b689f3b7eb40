"""Journals that survive a kill: an Optuna journal file whose torn tail is cut and whose lock dies with its process."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from nas.errors import StudyError
from nas.locks import file_lock

optuna.logging.set_verbosity(optuna.logging.ERROR)


class _ProcessLock:
    """A lock of the operating system, which a killed process cannot leave behind as Optuna's lock files can."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held: Any = None

    def acquire(self) -> bool:
        self._held = file_lock(self.path)
        self._held.__enter__()
        return True

    def release(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            held.__exit__(None, None, None)


def open_journal(path: Path) -> tuple[JournalStorage, str]:
    """The storage in a journal file, and what had to be mended for it, for people; empty mostly."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    with file_lock(lock):  # what looks torn may be a line that another process is writing
        cut = cut_torn_tail(path)
    repaired = f"{path.name}: a last line torn by a crash ({cut} bytes) was cut off" if cut else ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return JournalStorage(JournalFileBackend(str(path), _ProcessLock(lock))), repaired  # type: ignore[arg-type]


def open_study(
    storage: str | Path, name: str, direction: Literal["maximize", "minimize"], identity: dict[str, Any]
) -> tuple[optuna.Study, str]:
    """A study of that name, new or gone on with, and what had to be mended for it.

    Args:
        storage: path of a journal file, or an Optuna storage URL (``sqlite:///…``).
        identity: what must be equal for a resume to be a resume.

    Raises:
        StudyError: the storage cannot be opened, or the study in it has another identity.
    """
    repaired = ""
    try:
        if isinstance(storage, str) and "://" in storage:
            opened: Any = storage
        else:
            opened, repaired = open_journal(Path(storage))
        study = optuna.create_study(storage=opened, study_name=name, direction=direction, load_if_exists=True)
    except Exception as error:
        raise StudyError(
            f"The study {name!r} in {storage} cannot be opened: {error}.",
            remedy="move the file away, or choose another --out",
        ) from error
    _check_identity(study, identity, storage)
    return study, repaired


def _check_identity(study: optuna.Study, identity: dict[str, Any], storage: str | Path) -> None:
    plain = json.loads(json.dumps(identity))
    known = study.user_attrs.get("identity")
    if known is None:
        study.set_user_attr("identity", plain)
    elif known != plain:
        changed = sorted(k for k in {*known, *plain} if known.get(k) != plain.get(k))
        raise StudyError(
            f"The study in {storage} belongs to another experiment: {', '.join(changed)} changed.",
            remedy="undo the change, or start afresh with another --out",
        )


def cut_torn_tail(journal: Path) -> int:
    """Cut what follows the last whole line of a journal; returns how many bytes went.

    A process killed while it writes leaves half a line. Optuna fails on it at the next open and, once more lines
    follow it, for ever.
    """
    if not journal.exists():
        return 0
    data = journal.read_bytes()
    end = whole_lines(data)
    if end < len(data):
        with journal.open("r+b") as file:
            file.truncate(end)
    return len(data) - end


def whole_lines(data: bytes) -> int:
    """Where the last whole line of a journal ends."""
    end = len(data)
    while end:
        start = data.rfind(b"\n", 0, end - 1) + 1
        line = data[start:end]
        if line.endswith(b"\n") and _is_json(line):
            break
        end = start
    return end


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
