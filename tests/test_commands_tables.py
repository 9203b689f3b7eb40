"""`nas tables`: what it prints, and with which exit code."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import SMALL, TinySpace

from nas import content
from nas.cli import main
from nas.commands_tables import aligned
from nas.latency import Device, LatencyTable
from nas.latency.table import Net
from nas.settings import construct
from nas.space import TaskInfo
from nas.testing import synthetic_table

Capture = pytest.CaptureFixture[str]
SPACE = TinySpace()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with one table of this machine, of which three parts are interpolated, and a torn one."""
    table = synthetic_table(SPACE)
    entries = {
        key: replace(entry, measured=i > 2, uncertainty=0.05, energy_mj=0.25)
        for i, (key, entry) in enumerate(table.entries.items())
    }
    net = Net({next(iter(entries)): 3}, 0.02, 0.03, 5e3, 0.022, 0.01)
    table = replace(
        table,
        entries=entries,
        nets=[net] * 2,
        device=Device.local().as_dict(),
        interpolation={"interpolated": 3, "held_out": {"mape": 0.04123456}},
    )
    folder = tmp_path / "cache" / "tables"
    table.save(folder / "mine.json")
    (folder / "torn.json").write_text("{")
    monkeypatch.setenv("NAS_CACHE_DIR", str(folder.parent))
    return folder


def said(capsys: Capture, *arguments: object, code: int = 0) -> str:
    assert main(["tables", *map(str, arguments)]) == code
    out, err = capsys.readouterr()
    return out if code != 2 or out else err


def test_list(cache: Path, capsys: Capture) -> None:
    text = said(capsys, "list")
    head, *rows = text.splitlines()
    assert head.split()[:4] == ["name", "where", "space", "device"]
    (row,) = (line for line in rows if line.startswith("mine "))
    assert f"{len(SPACE.keys()) - 3}+3 interpolated" in row
    for cell in ("cache", "tiny", "onnxruntime", "1.0 %", "100.0 %", "2000-01-01"):
        assert cell in row
    assert any(line.startswith("proxylessnas-pixel_trim ") for line in rows)
    assert any(line.startswith("damaged: torn (cache): ") for line in rows)


def test_list_as_json(cache: Path, capsys: Capture) -> None:
    found = {item["name"]: item for item in json.loads(said(capsys, "list", "--json"))}
    mine = found["mine"]
    assert mine["measured"] + 3 == mine["parts"] == len(SPACE.keys())
    assert mine["error"]["mape"] == 0.01
    assert mine["fingerprint"] == Device.local().fingerprint
    assert "is damaged" in found["torn"]["problem"]
    assert found["proxylessnas-pixel_trim"]["error"] is None
    assert found["proxylessnas-pixel_trim"]["licence"] == "MIT"


def test_list_where_there_is_nothing(cache: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAS_CACHE_DIR", str(cache / "nowhere"))
    monkeypatch.setattr(content, "folder", lambda kind: cache / "nowhere")
    assert "no tables" in said(capsys, "list")
    assert json.loads(said(capsys, "list", "--json")) == []


def test_show(cache: Path, capsys: Capture) -> None:
    text = said(capsys, "show", "mine")
    for expected in (
        "this machine's: yes, by its fingerprint", "protocol: method synthetic, seed 0",
        "interpolation: interpolated 3, held_out (mape 0.04123)",
        "fit latency_ms (fp32/int8/boundary): scale 0.9/0.95/1.1", "error latency_ms: 1.0 % on average",
        "parts have it", "slowest", "fastest", "noise: 1.0 %", "measured 2000-01-01", "3 interpolated",
    ):  # fmt: skip
        assert expected in text, expected


def test_show_parts_and_nets(cache: Path, capsys: Capture) -> None:
    text = said(capsys, "show", "mine", "--part", "normalize", "--nets")
    assert "fp32 1x8x8 normalize" in text
    assert "– interpolated" in text
    assert "+10.0 %" in text
    assert "calibration" in text
    assert "slowest" not in text
    error = said(capsys, "show", "mine", "--part", "attention", code=2)
    assert "has no part with 'attention'" in error
    assert "no whole networks" in said(capsys, "show", "proxylessnas-pixel_trim", "--nets")


def test_show_what_was_imported(capsys: Capture) -> None:
    text = said(capsys, "show", "proxylessnas-pixel_trim")
    for expected in ("origin licence: MIT", "this machine's: no: cpu not known", "error: not known", "plain sums"):
        assert expected in text


def test_a_name_that_is_none(cache: Path, capsys: Capture) -> None:
    error = said(capsys, "show", "mein", code=2)
    assert "There is no latency table 'mein'" in error
    assert "Try: 'mine'" in error


def test_validate(cache: Path, capsys: Capture, tmp_path: Path) -> None:
    assert said(capsys, "validate", "mine", cache / "mine.json").count(": good, ") == 2
    raw = json.loads((cache / "mine.json").read_text())
    raw["unit"] = "us"
    first, second = list(raw["entries"].values())[:2]
    first["p50"], second["value"] = -1, "fast"
    (tmp_path / "bad.json").write_text(json.dumps(raw))
    text = said(capsys, "validate", "mine", tmp_path / "bad.json", cache / "torn.json", tmp_path / "absent", code=2)
    assert "bad.json: 3 errors, refused" in text
    for expected in ("error: is in 'us'", "p50 is -1, not above 0", "value is 'fast'", "torn.json: not a table"):
        assert expected in text
    assert "Try: build it again with `nas profile --space tiny --device local`" in text
    assert "There is no latency table" in text
    assert "mine: good" in text


def test_validate_shows_warnings_and_goes_on(cache: Path, capsys: Capture, tmp_path: Path) -> None:
    table = replace(LatencyTable.load(cache / "mine.json"), origin={"source": "x"})
    table.save(tmp_path / "odd.json")
    text = said(capsys, "validate", tmp_path / "odd.json")
    assert "odd.json: good" in text
    assert "warning: origin lacks 'licence'" in text


def test_compare(cache: Path, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synthetic_table(SPACE, 1).save(tmp_path / "other.json")
    text = said(capsys, "compare", "mine", tmp_path / "other.json")
    assert f"parts: {len(SPACE.keys())} shared, 0 only in a, 0 only in b" in text
    assert "value in b / value in a: median " in text
    assert "networks: none to rank" in text
    monkeypatch.chdir(Path(__file__).parent)  # module:name is imported from the working directory
    arguments = ("compare", "mine", tmp_path / "other.json", "--space", "helpers:TinySpace")
    arguments += ("--classes", 10, "--input", "1x8x8")
    text = said(capsys, *arguments)
    assert "1000 random candidates of tiny: Spearman " in text
    assert "those that change their places most" in text
    found = json.loads(said(capsys, *arguments, "--json"))
    assert found["rankings"][0]["nets"] == 1000
    assert "lacks" in said(capsys, *arguments[:-1], "3x32x32", code=2)
    assert "--input '3×32'" in said(capsys, *arguments[:-1], "3×32", code=2)


def test_compare_in_the_space_of_an_experiment(capsys: Capture, tmp_path: Path) -> None:
    settings = {key: value for key, value in SMALL["space"].items() if key != "name"}  # type: ignore[attr-defined]
    info = TaskInfo((1, 8, 8), 10)
    space = construct(content.load_space_class("mobilenet"), settings, info, where="space")
    for seed in (0, 1):
        synthetic_table(space, seed).save(tmp_path / f"{seed}.json")
    (tmp_path / "small.yaml").write_text(json.dumps(SMALL))
    text = said(capsys, "compare", tmp_path / "0.json", tmp_path / "1.json", "--experiment", tmp_path / "small.yaml")
    assert "1000 random candidates of mobilenet: Spearman " in text


def test_import(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "192_lookup_table.yaml").write_text(
        "Conv-input:192x192x3-output:96x96x24: {mean: 1.5, std: 0.1, count: 9}"
    )
    out = tmp_path / "note10.json"
    text = said(capsys, "import", "ofa", tmp_path / "192_lookup_table.yaml", "--out", out)
    assert "1 blocks of ofa_mbv3-galaxy-note10 written to" in text
    assert "licence: none stated" in text
    assert LatencyTable.load(out).entry("r192 Conv-input:192x192x3-output:96x96x24").value == 1.5
    assert "Unknown importer 'tflite'" in said(capsys, "import", "tflite", "x", "--out", out, code=2)
    assert "There is no file" in said(capsys, "import", "ofa", "absent.yaml", "--out", out, code=2)


def test_columns_of_figures_stand_to_the_right() -> None:
    assert aligned([("name", "ms"), ("a", "10.5"), ("longer", "–")]) == ["name      ms", "a       10.5", "longer     –"]
