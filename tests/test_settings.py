"""Settings are checked against the signature of the plug-in that they are for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from nas.errors import ExperimentError
from nas.settings import construct
from nas.strategies import strategies


class Plugin:
    def __init__(
        self,
        first: str,
        *,
        rate: float = 0.5,
        steps: int,
        sizes: Sequence[int] = (1, 2),
        pair: tuple[int, float] = (1, 0.5),
        label: str | None = None,
    ) -> None:
        self.values = (first, rate, steps, list(sizes), pair, label)


def test_settings_reach_the_constructor() -> None:
    plugin = construct(Plugin, {"steps": 3, "sizes": [4, 5], "pair": [2, 3], "label": "x"}, "given", where="plugin")
    assert plugin.values == ("given", 0.5, 3, [4, 5], (2, 3.0), "x")
    assert isinstance(plugin.values[4][1], float)


def test_functions_and_dataclasses_are_plugins_too() -> None:
    def plugin(base: int, plus: int = 1) -> int:
        return base + plus

    @dataclass
    class Settings:
        width: int
        deep: bool = False

    assert construct(plugin, {"plus": 2}, 40, where="f") == 42
    assert construct(Settings, {"width": 8}, where="s") == Settings(8)
    with pytest.raises(ExperimentError, match=r"s\.width is 'wide'"):
        construct(Settings, {"width": "wide"}, where="s")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 1, "rat": 0.1}, r"Unknown key plugin\.rat\.[^$]*keys of plugin: rate, steps, sizes, pair, label"),
        ({"rate": 0.1}, r"Key plugin\.steps is missing[^$]*steps"),
        ({"steps": "many"}, r"plugin\.steps is 'many'[^$]*Expected: int"),
        ({"steps": 1.5}, r"plugin\.steps is 1\.5"),
        ({"steps": 1, "rate": [1]}, r"plugin\.rate is \[1\][^$]*Expected: float"),
        ({"steps": 1, "sizes": ["a"]}, r"plugin\.sizes is \['a'\][^$]*Expected: Sequence\[int\]"),
        ({"steps": 1, "sizes": 3}, r"plugin\.sizes is 3"),
        ({"steps": 1, "pair": [1]}, r"plugin\.pair is \[1\]"),
        ({"steps": 1, "label": 3}, r"plugin\.label is 3"),
        ({"steps": 1, "first": "again"}, r"Unknown key plugin\.first"),
    ],
)
def test_wrong_settings_name_their_key(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        construct(Plugin, settings, "given", where="plugin")


@pytest.mark.parametrize("kind", list(strategies))
def test_a_strategy_without_that_setting(kind: str) -> None:
    from helpers import TinySpace, domain_of

    with pytest.raises(ExperimentError, match=r"Unknown key strategy\.no_such"):
        construct(strategies.get(kind), {"no_such": 1}, domain_of(TinySpace()), 0, where="strategy")
