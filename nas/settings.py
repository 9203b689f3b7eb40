"""Settings from an experiment file onto a plug-in's own constructor: names and types are checked by its signature."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from nas.errors import ExperimentError

T = TypeVar("T")


def construct(plugin: Callable[..., T], settings: Mapping[str, Any], *args: Any, where: str) -> T:
    """Call ``plugin(*args, **settings)`` after checking every setting against the plug-in's hints.

    Args:
        where: the key of the experiment file that the settings stand under, for messages.

    Raises:
        ExperimentError: a setting is unknown, missing, or of the wrong type.
    """
    return plugin(*args, **check(plugin, settings, len(args), where=where))


def keys_of(plugin: Callable[..., Any], filled: int) -> list[str]:
    """The keys that a plug-in takes from an experiment file; the engine gives the first ``filled`` arguments."""
    return list(inspect.signature(plugin).parameters)[filled:]


def check(plugin: Callable[..., Any], settings: Mapping[str, Any], filled: int, *, where: str) -> dict[str, Any]:
    """The settings as ``plugin`` wants them, without calling it. Raises as :func:`construct` does."""
    signature = inspect.signature(plugin)
    names = keys_of(plugin, filled)
    unknown = sorted(set(settings) - set(names))
    if unknown:
        raise ExperimentError(
            f"Unknown key {where}.{unknown[0]}.", expected=f"keys of {where}: {', '.join(names) or 'none'}"
        )
    missing = [
        n for n in names if n not in settings and signature.parameters[n].default is inspect.Parameter.empty
        and signature.parameters[n].kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    ]  # fmt: skip
    if missing:
        raise ExperimentError(f"Key {where}.{missing[0]} is missing.", expected=f"a value for {', '.join(missing)}")
    hints = _hints(plugin)
    return {name: _check(f"{where}.{name}", value, hints.get(name, Any)) for name, value in settings.items()}


def _hints(plugin: Callable[..., Any]) -> dict[str, Any]:
    if isinstance(plugin, functools.partial):
        return _hints(plugin.func)
    target: Any = getattr(plugin, "__init__") if inspect.isclass(plugin) else plugin  # noqa: B009
    try:
        return typing.get_type_hints(target)
    except (NameError, TypeError):
        return {}


def _check(key: str, value: Any, hint: Any) -> Any:
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise ExperimentError(f"{key} is {value!r}: {first['msg']}.", expected=_readable(hint)) from None


def _readable(hint: Any) -> str:
    return hint.__name__ if inspect.isclass(hint) else str(hint).replace("collections.abc.", "")
