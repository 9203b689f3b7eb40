"""Tables are found by name or path, damaged ones are listed with the reason, and whose a table is, is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from helpers import TinySpace

from nas import content
from nas.errors import TableError
from nas.latency import Device
from nas.latency.catalog import elsewhere, find, listed
from nas.student.tables import cached_path, find_table
from nas.testing import synthetic_table

SPACE = TinySpace()


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The bundled folder and that of the cache, both empty."""
    bundled, cache = tmp_path / "bundled", tmp_path / "cache" / "tables"
    for folder in (bundled, cache):
        folder.mkdir(parents=True)
    monkeypatch.setattr(content, "folder", lambda kind: bundled)
    monkeypatch.setenv("NAS_CACHE_DIR", str(cache.parent))
    return bundled, cache


def test_what_is_where(places: tuple[Path, Path]) -> None:
    bundled, cache = places
    assert listed() == []
    table = synthetic_table(SPACE)
    table.save(bundled / "board.json")
    (bundled / "README.md").write_text("notes")
    table.save(cache / "mine.json")
    (cache / "torn.json").write_text('{"schema_version": 2')
    (cache / ".mine.json.lock").touch()
    found = {item.name: item for item in listed()}
    assert [(name, item.where) for name, item in found.items()] == [
        ("board", "bundled"), ("mine", "cache"), ("torn", "cache"),
    ]  # fmt: skip
    assert found["board"].table == found["mine"].table == table
    assert found["torn"].table is None
    assert "is damaged" in found["torn"].reason


def test_find(places: tuple[Path, Path], tmp_path: Path) -> None:
    bundled, cache = places
    for path in (bundled / "board.json", bundled / "both.json", cache / "both.json", tmp_path / "own.json"):
        path.write_text("{}")
    assert find("board") == bundled / "board.json"
    assert find("both") == bundled / "both.json"
    assert find(str(tmp_path / "own.json")) == tmp_path / "own.json"
    with pytest.raises(TableError, match="no latency table 'bord'") as caught:
        find("bord")
    assert caught.value.remedy == "'board'"
    with pytest.raises(TableError) as caught:
        find(str(bundled))
    assert "nas tables list" in caught.value.remedy


def test_whose_a_table_is() -> None:
    here = Device.local(threads=2)
    table = replace(synthetic_table(SPACE), device=here.as_dict())
    assert elsewhere(table) == []
    other = replace(here, cpu="another processor", cores=here.cores + 1)
    assert len(elsewhere(replace(table, device=other.as_dict()))) == 2
    assert "another processor, here" in elsewhere(replace(table, device=other.as_dict()))[0]
    phone = replace(table, device={"name": "phone", "cpu": "A76", "batch": 1, "fingerprint": here.fingerprint})
    assert elsewhere(phone) == ["runtime not known", "threads not known"]
    foreign = replace(here, runtime="toaster").as_dict()
    (said,) = elsewhere(replace(table, device=foreign))
    assert said.startswith("its runtime does not run here: Unknown runtime 'toaster'")


def test_a_search_is_told_in_what_the_machines_differ(places: tuple[Path, Path]) -> None:
    bundled, _ = places
    device = Device.local()
    table = replace(synthetic_table(SPACE), device=replace(device, threads=3).as_dict())
    table.save(bundled / "board.json")
    notes: list[str] = []
    assert find_table("board", SPACE, device, notes.append) == table
    assert "measured on another device (threads 3, here 1)" in notes[0]
    assert "nas profile --space tiny --device local" in notes[0]
    assert find_table("auto", SPACE, device, notes.append) is None


def test_a_table_whose_sums_nobody_checked_is_not_searched_with(places: tuple[Path, Path]) -> None:
    bundled, _ = places
    replace(synthetic_table(SPACE), errors={}).save(bundled / "board.json")
    with pytest.raises(TableError, match="never compared with whole networks"):
        find_table("board", SPACE, Device.local(), lambda _: None)


def test_auto_does_not_trip_over_published_or_damaged_tables(places: tuple[Path, Path]) -> None:
    bundled, _ = places
    device = Device.local()
    published = replace(synthetic_table(SPACE), device={"name": "phone"}, origin={"source": "x", "licence": "MIT"})
    published.save(bundled / "a-phone.json")
    (bundled / "b-torn.json").write_text("{")
    notes: list[str] = []
    assert find_table("auto", SPACE, device, notes.append) is None
    assert ["b-torn.json is damaged" in note for note in notes] == [True]
    own = replace(synthetic_table(SPACE), device=device.as_dict())
    own.save(cached_path(SPACE, device))
    assert find_table("auto", SPACE, device, notes.append) == own
