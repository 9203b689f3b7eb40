"""Registries: bundled names, ``module:name``, and messages for names that are neither."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from nas.compression import passes
from nas.errors import ContentError
from nas.evaluators import evaluators
from nas.latency.runtimes import runtimes
from nas.registry import Registry, import_object
from nas.reward import rewards
from nas.strategies import strategies
from nas.tasks import tasks


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_enter_and_find() -> None:
    rooms: Registry[type] = Registry("room")

    @rooms.register("kitchen")
    class Kitchen: ...

    rooms.register("attic")(int)
    assert rooms.get("kitchen") is Kitchen
    assert list(rooms) == ["attic", "kitchen"]
    assert "attic" in rooms
    assert "cellar" not in rooms
    with pytest.raises(ContentError, match=r"Unknown room 'cellar'[^$]*attic, kitchen, or 'module:name'"):
        rooms.get("cellar")


@pytest.mark.parametrize("registry", [evaluators, passes, rewards, runtimes, strategies, tasks], ids=lambda r: r.what)
def test_every_room_has_documented_plugins(registry: Registry[type]) -> None:
    assert list(registry)
    for name in registry:
        assert (registry.get(name).__doc__ or "").strip(), f"{registry.what} {name} has no docstring"


def test_module_and_name_from_the_working_directory(here: Path) -> None:
    (here / "my_rooms_a.py").write_text("class Loft:\n    pass\n")
    assert Registry[type]("room").get("my_rooms_a:Loft").__name__ == "Loft"
    # Worker processes inherit the path, and must find the module too.
    assert str(here) in sys.path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module_b:Loft", "Cannot import 'no_such_module_b' for the room 'no_such_module_b:Loft'"),
        ("json:Loft", "Module 'json' has no 'Loft'"),
    ],
)
def test_module_and_name_that_do_not_exist(here: Path, name: str, message: str) -> None:
    with pytest.raises(ContentError, match=message):
        import_object(name, "room")


def test_a_module_that_imports_what_is_missing(here: Path) -> None:
    (here / "my_rooms_c.py").write_text("import no_such_package_c\n")
    with pytest.raises(ContentError, match="no_such_package_c"):
        import_object("my_rooms_c:Loft", "room")
