"""Content, found by name or path and loaded: search spaces, latency tables and experiments, one file each.

In a wheel the bundled files live in ``nas/_content/<kind>/``, in a checkout in ``<kind>/`` beside ``nas/``.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import inspect
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from nas.errors import ContentError
from nas.registry import import_object
from nas.settings import construct
from nas.space import SearchSpace, TaskInfo

# Kind, which is its folder → what one item is called, and the endings of its files, the first preferred.
KINDS: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "search_spaces": ("search space", (".py",)),
    "latency_tables": ("latency table", (".json", ".json.gz", ".csv", ".csv.gz")),
    "experiments": ("experiment", (".yaml", ".yml")),
    "experiments/sweeps": ("sweep", (".yaml", ".yml")),
}
PACKAGE = "nas_content"
_HERE = Path(__file__).resolve().parent


def folder(kind: str) -> Path:
    """Where the bundled content of ``kind`` lies; the folder need not exist."""
    bundled = _HERE / "_content"
    return (bundled if bundled.is_dir() else _HERE.parent) / kind


def available(kind: str) -> dict[str, Path]:
    """Bundled content: name → file, sorted by name.

    Raises:
        ContentError: ``kind`` is none of :data:`KINDS`.
    """
    endings = _kind(kind)[1]
    place, found = folder(kind), dict[str, Path]()
    for ending in endings:
        for path in place.glob(f"[!._]*{ending}"):
            if path.is_file():
                found.setdefault(path.name.removesuffix(ending), path)
    return dict(sorted(found.items()))


def find(kind: str, name: str | Path) -> Path:
    """The file that ``name`` means: a path to a file, else the name of bundled content.

    A bare name (``mobilenet``) prefers the bundled content, so that a file that happens to lie in the working
    directory cannot take its place; anything with a folder or an ending is a path.

    Args:
        kind: "search_spaces", "latency_tables", "experiments" or "experiments/sweeps".
        name: name or path, ``~`` allowed; relative paths start at the working directory.

    Raises:
        ContentError: there is neither; the message lists what is bundled.
    """
    what, endings = _kind(kind)
    bundled = available(kind)
    if str(name) in bundled:
        return bundled[str(name)]
    path = Path(name).expanduser()
    if path.is_file():
        return path.resolve()
    if path.is_dir():
        raise ContentError(f"{str(name)!r} is a folder.", expected=f"a {what} file ({', '.join(endings)}) or a name")
    raise ContentError(
        f"No {what} {str(name)!r}: neither a file nor bundled.",
        expected=f"one of {', '.join(bundled)}, or the path of a file" if bundled else "the path of a file",
        remedy=_suggestion(str(name), endings, bundled),
    )


def load_space_class(name: str | Path) -> type[SearchSpace]:
    """The search space that ``name`` means: bundled name, path of a Python file, or ``module:name``.

    A file is executed as a module of its own, ``nas_content.<stem>``, and its module-level ``space`` is
    returned. A file that has not changed since is not executed again. Instances can be pickled within one
    process and its forks; a spawned worker first loads the space by its name.

    Raises:
        ContentError: the name is unknown, the file or module fails, or what it offers is no SearchSpace class.
    """
    text = str(name)
    if ":" in text and not Path(text).expanduser().is_file():
        try:
            found = import_object(text, "search space")
        except ContentError:
            raise
        except Exception as error:  # whatever the user's module raises
            raise _failure(text, error, None) from error
        return _checked(found, text)
    path = find("search_spaces", name)
    module = _execute(path)
    if not hasattr(module, "space"):
        own = [key for key, value in vars(module).items() if _is_space(value) and value.__module__ == module.__name__]
        raise ContentError(
            f"{path} defines no 'space'.",
            expected="a module-level 'space', the SearchSpace subclass that the file offers",
            remedy=f"add the line 'space = {own[-1] if own else 'YourSpace'}' at the end of the file",
        )
    return _checked(module.space, str(path))


def _kind(kind: str) -> tuple[str, tuple[str, ...]]:
    if kind not in KINDS:
        raise ContentError(f"Unknown kind of content {kind!r}.", expected=f"one of {', '.join(KINDS)}")
    return KINDS[kind]


def _suggestion(name: str, endings: tuple[str, ...], bundled: dict[str, Path]) -> str:
    """The bundled name that was probably meant, whatever folder and ending came with it."""
    stem = Path(name).name
    for ending in endings:
        stem = stem.removesuffix(ending)
    lowered = {known.lower(): known for known in bundled}
    close = difflib.get_close_matches(stem.lower(), lowered, n=1)
    return repr(lowered[close[0]]) if close else ""


def _is_space(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, SearchSpace)


def _checked(value: Any, origin: str) -> type[SearchSpace]:
    if not _is_space(value):
        if inspect.isclass(value):
            found = f"the class {value.__name__}, which does not derive from it"
        else:
            found = f"an object of type {type(value).__name__}"
        raise ContentError(
            f"The search space of {origin} is {found}.",
            expected="a subclass of nas.space.SearchSpace (the class itself, not an instance)",
        )
    if inspect.isabstract(value):
        missing = ", ".join(sorted(value.__abstractmethods__))
        raise ContentError(f"The search space {value.__name__} of {origin} does not implement {missing}.")
    space: type[SearchSpace] = value
    return space


def _execute(path: Path) -> ModuleType:
    """Run the file as ``nas_content.<stem>``, or return the module where the same text has been run before."""
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ContentError(f"Cannot read {path}: {error.strerror}.") from error
    digest = hashlib.sha256(source).hexdigest()
    name = f"{PACKAGE}." + re.sub(r"\W", "_", path.stem)
    if name in sys.modules and sys.modules[name].__file__ != str(path):
        # Another file of the same name is loaded already: keep both.
        name += "_" + hashlib.sha256(str(path).encode()).hexdigest()[:8]
    loaded = sys.modules.get(name)
    if loaded is not None and loaded.__dict__.get("__digest__") == digest:
        return loaded

    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise ContentError(f"{path} is no Python file.", expected="a file that ends in .py")
    # ``import nas_content.x`` (which unpickling does) wants the parent package too.
    package = sys.modules.setdefault(PACKAGE, ModuleType(PACKAGE, "Search spaces that were loaded from files."))
    package.__path__ = []
    module = importlib.util.module_from_spec(spec)
    module.__dict__["__digest__"] = digest
    sys.modules[name] = module  # before execution: dataclasses look themselves up
    try:
        # Not by the loader, whose cache takes an edit within the same second for no edit.
        exec(compile(source, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:  # whatever the user's file raises
        if loaded is None:
            del sys.modules[name]
        else:
            sys.modules[name] = loaded
        raise _failure(str(path), error, path) from error
    return module


def _failure(origin: str, error: BaseException, path: Path | None) -> ContentError:
    """What went wrong inside somebody's module, and in which line of it."""
    if isinstance(error, SyntaxError) and error.filename:
        where = f"{error.filename}:{error.lineno}"
    else:
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if path is not None and f.filename == str(path)] or frames[-1:]
        where = f"{own[-1].filename}:{own[-1].lineno}" if own else origin
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    return ContentError(
        f"Loading the search space {origin} failed at {where}: {type(error).__name__}: {message}",
        remedy="install the missing package" if isinstance(error, ModuleNotFoundError) else "mend that line",
    )


def load_space(name: str, task: TaskInfo, options: dict[str, Any]) -> SearchSpace:
    """The space called ``name`` for a task, with the options of an experiment; picklable to other processes.

    Raises:
        ContentError: it cannot be found or loaded.
        ExperimentError: an option is unknown or of the wrong type.
        SpaceError: the options describe no valid space.
    """
    space = construct(load_space_class(name), options, task, where="space")
    space.recipe = (load_space, (name, task, options))
    return space
