"""Published tables are read as they are, and price published networks as their authors do."""

from __future__ import annotations

import csv
import gzip
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from nas import content
from nas.errors import ContentError, TableError
from nas.latency import LatencyTable
from nas.latency.check import problems
from nas.latency.fit import LinearFit
from nas.latency.importers import importers, ofa, price, proxyless

ROOT = Path(__file__).resolve().parent.parent
TABLES = Path(os.environ.get("NAS_TABLES") or ROOT.parent / "shared" / "tables")
BLOCK = "expanded_conv-input:112x112x16-output:56x56x24-expand:6-kernel:5-stride:2-idskip:0"


def published(name: str) -> Path:
    """A file of the published tables; skips where there is none."""
    if not (TABLES / name).is_file():
        pytest.skip(f"there is no {TABLES / name}")
    return TABLES / name


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, float]]:
    """The blocks of some networks of the space, with made-up times."""
    rng = np.random.default_rng(0)
    keys = sorted({key for _ in range(100) for key in proxyless.random_net(rng)})
    return {key: {"count": 100, "mean": 1.0 + i / 64, "var": 0.01} for i, key in enumerate(keys)}


# ---- both ---------------------------------------------------------------------------------------------


def test_the_registry() -> None:
    assert set(importers) == {"ofa", "proxylessnas"}
    with pytest.raises(ContentError, match="Unknown importer 'tflite'"):
        importers.get("tflite")
    rng = np.random.default_rng(0)
    for name in importers:
        assert all("-input:" in key for key in importers.get(name).random_net(rng))


def test_yaml_json_and_gzip_are_one(rows: dict[str, dict[str, float]], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(rows))
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    (tmp_path / "mine.yaml.gz").write_bytes(gzip.compress(yaml.safe_dump(rows).encode()))
    tables = [proxyless.read(tmp_path / f"mine.{ending}") for ending in ("yaml", "json", "yaml.gz")]
    assert tables[0].entries == tables[1].entries == tables[2].entries
    assert {table.name for table in tables} == {"proxylessnas-mine"}
    entry = tables[0].entries[BLOCK]
    mean = rows[BLOCK]["mean"]
    assert entry.value == entry.timing.mean == entry.timing.p50 == round(mean, 6)
    assert entry.timing.p95 == pytest.approx(mean + 1.645 * 0.1, abs=1e-6)
    assert entry.timing.n == 100
    assert entry.uncertainty == pytest.approx(0.1 / mean / 10, abs=1e-6)
    assert entry.timing.noise == pytest.approx(2 * entry.uncertainty, abs=2e-6)


def test_an_imported_table_is_one_of_ours(rows: dict[str, dict[str, float]], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(rows))
    table = proxyless.read(tmp_path / "mine.yaml")
    assert table.fits == {"latency_ms": LinearFit()}
    assert table.errors == {}
    assert set(table.origin) == {"source", "licence", "retrieved"}
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table
    assert problems(json.loads((tmp_path / "table.json").read_text())) == []


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.yaml", "a: {mean: 1.0", "is damaged"),
        ("a.json", "{", "is damaged"),
        ("a.yaml", "- 1\n- 2", "is no block table"),
        ("a.yaml", "a: 1", "is no block table"),
        ("a.yaml", "a: {var: 1}", "'a' lacks or garbles a figure"),
        ("a.yaml", "a: {mean: fast}", "'a' lacks or garbles a figure"),
        ("a.yaml", "a: {mean: 1, var: -1}", "'a' lacks or garbles a figure"),
        ("a.yaml", "a: {mean: 0}", "the mean of 'a' is 0"),
        ("a.yaml", "a: {mean: .nan}", "the mean of 'a' is nan"),
        ("a.csv", "key,mean\na,1\n", "lacks columns"),
        ("a.csv", "", "lacks columns"),
        ("a.csv", "table,key,mean_ms,var_ms2,count\nt,a,1,0,1\nt,a,2,0,1\n", "'a' is there twice"),
        ("a.csv.gz", "no gzip", "Cannot read"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(TableError, match=said):
        proxyless.read(tmp_path / name)
    with pytest.raises(TableError, match="There is no file"):
        proxyless.read(tmp_path / "absent.yaml")


def test_a_missing_block_names_the_nearest(rows: dict[str, dict[str, float]], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(rows))
    table = proxyless.read(tmp_path / "mine.yaml")
    with pytest.raises(TableError, match="lacks 1 of 2 parts") as caught:
        price(table, [BLOCK, BLOCK.replace("56x56x24", "56x56x26")])
    assert f"the nearest that it has is {BLOCK!r}" in caught.value.found
    assert "its publisher measured" in caught.value.remedy


# ---- ProxylessNAS -------------------------------------------------------------------------------------


def test_one_of_several_tables_in_a_csv(rows: dict[str, dict[str, float]], tmp_path: Path) -> None:
    path = tmp_path / "both.csv.gz"
    with gzip.open(path, "wt", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["table", "key", "mean_ms", "var_ms2", "count"])
        for factor, name in enumerate(("mobile_trim", "pixel_trim"), 1):
            writer.writerows([name, key, factor * row["mean"], row["var"], 100] for key, row in rows.items())
    one, two = (proxyless.read(path, name) for name in ("mobile_trim", "pixel_trim"))
    assert two.entries[BLOCK].value == pytest.approx(2 * one.entries[BLOCK].value)
    assert two.origin["licence"] == "MIT"
    for select in ("", "desktop"):
        with pytest.raises(TableError) as caught:
            proxyless.read(path, select)
        assert caught.value.expected == "one of mobile_trim, pixel_trim"


def test_blocks_of_a_configuration() -> None:
    conv = {"name": "MBInvertedConvLayer", "kernel_size": 3, "stride": 1, "expand_ratio": 1}
    config: dict[str, Any] = {
        "first_conv": {"out_channels": 32}, "feature_mix_layer": {"out_channels": 1280},
        "classifier": {"in_features": 1280, "out_features": 1000},
        "blocks": [
            {"mobile_inverted_conv": {**conv, "in_channels": 32, "out_channels": 16}, "shortcut": None},
            {"mobile_inverted_conv": {"name": "ZeroLayer", "stride": 1}, "shortcut": {"name": "IdentityLayer"}},
            {
                "mobile_inverted_conv": {**conv, "in_channels": 16, "out_channels": 16, "expand_ratio": 6},
                "shortcut": {"name": "IdentityLayer"},
            },
            {"mobile_inverted_conv": {**conv, "in_channels": 16, "out_channels": 24, "stride": 2}, "shortcut": None},
        ],
    }  # fmt: skip
    assert proxyless.blocks(config) == [
        "Conv-input:224x224x3-output:112x112x32",
        "expanded_conv-input:112x112x32-output:112x112x16-expand:1-kernel:3-stride:1-idskip:0",
        "expanded_conv-input:112x112x16-output:112x112x16-expand:6-kernel:3-stride:1-idskip:1",
        "expanded_conv-input:112x112x16-output:56x56x24-expand:1-kernel:3-stride:2-idskip:0",
        "Conv_1-input:56x56x24-output:56x56x1280",
        "Logits-input:56x56x1280-output:1000",
    ]
    with pytest.raises(TableError, match="no configuration of a ProxylessNAS network"):
        proxyless.blocks({"blocks": [{}]})


def test_the_bundled_table_is_the_published_one() -> None:
    table = LatencyTable.load(content.find("latency_tables", "proxylessnas-pixel_trim"))
    read = proxyless.read(published("proxylessnas_lut.csv.gz"), "pixel_trim")
    assert table.entries == read.entries
    assert table.origin["licence"] == "MIT"
    assert "itouchz/Neural-Predictor-Tensorflow" in table.origin["source"]


def test_the_bundled_table_prices_every_network_of_its_space() -> None:
    table = LatencyTable.load(content.find("latency_tables", "proxylessnas-pixel_trim"))
    assert len(table.entries) == 72
    rng = np.random.default_rng(0)
    nets = [proxyless.random_net(rng) for _ in range(500)]
    assert all(30 < price(table, net) < 250 for net in nets)
    # A 3×3 first block is the only one drawn; its 5×5 and 7×7 forms are in the table too.
    assert len({key for net in nets for key in net}) == 70


@pytest.mark.parametrize("name", ["cpu", "gpu", "mobile", "mobile_14"])
def test_published_networks_have_blocks_that_the_tables_lack(name: str) -> None:
    """Their stages are wider than those of the tables, whose authors measured the networks themselves."""
    table = proxyless.read(published("proxylessnas_lut.csv.gz"), "mobile_trim")
    keys = proxyless.blocks(json.loads(published(f"proxyless_{name}.config.json").read_text()))
    missing = {"cpu": 23, "gpu": 17, "mobile": 3, "mobile_14": 23}[name]
    with pytest.raises(TableError, match=rf"lacks {missing} of {len(keys)} parts, the first '\S+'; the nearest"):
        price(table, keys)


# ---- once-for-all -------------------------------------------------------------------------------------


def tutorial_net() -> list[str]:
    """The network that the authors' tutorial prints."""
    stages = [["53", "33"], ["54", "34"], ["76", "73", "34"], ["54", "54", "74", "33"], ["36", "36", "56"]]
    padded = [block for stage in stages for block in [*stage, *["33"] * (4 - len(stage))]]
    ks, e = ([int(block[i]) for block in padded] for i in (0, 1))
    return ofa.blocks(ks, e, [len(stage) for stage in stages], 192)


def test_blocks_beyond_the_depth_do_not_count() -> None:
    keys = tutorial_net()
    assert len(keys) == 1 + 1 + 14 + 4
    assert keys[0] == "r192 Conv-input:192x192x3-output:96x96x24"
    assert keys[1].endswith("-input:96x96x24-output:96x96x24-expand:24-kernel:3-stride:1-idskip:1-se:0-hs:0")
    assert keys[2].endswith("-input:96x96x24-output:48x48x32-expand:72-kernel:5-stride:2-idskip:0-se:0-hs:0")
    assert keys[-1] == "r192 Logits-input:1x1x1536-output:1000"
    with pytest.raises(TableError, match="with 2 kernels, 20 expansions and 5 depths"):
        ofa.blocks([3, 3], [3] * 20, [2] * 5, 160)


def test_files_folders_and_csv_of_resolutions(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    drawn = {key for _ in range(300) for key in ofa.random_net(rng)} | set(tutorial_net())
    table = tmp_path / "lut.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["resolution", "key", "mean_ms", "std_ms", "count"])
        writer.writerows([*key[1:].split(" ", 1), 1 + i / 8, 0.1, 50] for i, key in enumerate(sorted(drawn)))
    whole = ofa.read(table)
    assert set(whole.entries) == drawn
    folder = tmp_path / "note10"
    folder.mkdir()
    for resolution in ofa.RESOLUTIONS:
        own = {k.split(" ")[1]: e for k, e in whole.entries.items() if k.startswith(f"r{resolution} ")}
        rows = {key: {"mean": e.value, "std": 0.1, "count": 50} for key, e in own.items()}
        (folder / f"{resolution}_lookup_table.yaml").write_text(yaml.safe_dump(rows))
    assert ofa.read(folder).entries == whole.entries
    small = ofa.read(folder / "160_lookup_table.yaml")
    assert set(small.entries) == {key for key in drawn if key.startswith("r160 ")}
    assert ofa.read(table, "160").entries == small.entries
    (folder / "160_lookup_table.yaml").rename(tmp_path / "other.yaml")
    assert ofa.read(tmp_path / "other.yaml", "160").entries == small.entries
    for path, select, said in (
        (tmp_path / "other.yaml", "", "resolution of .* is not known"), (table, "100", "no resolution '100'"),
        (tmp_path, "", "has no block table"),
    ):  # fmt: skip
        with pytest.raises(TableError, match=said):
            ofa.read(path, select)
    net = tutorial_net()
    assert price(whole, net) == pytest.approx(math.fsum(whole.entries[key].value for key in net))


def test_the_tutorials_network_has_its_published_latency() -> None:
    """Once-for-all's tutorial: «81.71% predicted accuracy with 24.73 ms latency on note10»."""
    table = ofa.read(published("ofa_note10_lut.csv.gz"))
    assert len(table.entries) == 480
    assert f"{price(table, tutorial_net()):.3f}" == "24.730"


def test_the_30_ms_network_has_its_published_latency() -> None:
    """``note10_lat@30ms_top1@78.4_finetune@75``, the only published Note10 network that the table covers."""
    table = ofa.read(published("ofa_note10_lut.csv.gz"))
    with gzip.open(published("ofa_specialized.csv.gz"), "rt") as file:
        nets = {row["name"]: row for row in csv.DictReader(file) if row["device"] == "note10"}
    net = nets["note10_lat-30ms_top1-78.4_finetune-75"]
    assert f"{price(table, specialized(net)):.2f}" == "29.97"
    uncovered = [name for name in nets if table.missing(specialized(nets[name]))]
    assert len(uncovered) == len(nets) - 1


def specialized(row: dict[str, str]) -> list[str]:
    """Block keys of a row of the published networks, through the configuration that it was made of."""
    blocks = []
    for text in row["blocks"].split(";"):
        inputs, outputs, *rest = text.split("-")
        middle, kernel, stride, skip, se = (int(word.lstrip("mksied")) for word in rest[:5])
        conv = {
            "name": "MBInvertedConvLayer", "in_channels": int(inputs), "out_channels": int(outputs),
            "mid_channels": middle, "kernel_size": kernel, "stride": stride, "use_se": bool(se), "act_func": rest[5],
        }  # fmt: skip
        blocks.append({"mobile_inverted_conv": conv, "shortcut": {"name": "IdentityLayer"} if skip else None})
    config = {
        "first_conv": {"out_channels": int(row["first_conv_out"])}, "blocks": blocks,
        "final_expand_layer": {"out_channels": int(float(row["final_expand_out"]))},
        "feature_mix_layer": {"out_channels": int(row["feature_mix_out"])}, "classifier": {"out_features": 1000},
    }  # fmt: skip
    return ofa.config_blocks(config, int(row["image_size"]))


def test_what_is_no_configuration() -> None:
    with pytest.raises(TableError, match="no configuration of a once-for-all network"):
        ofa.config_blocks({"blocks": []}, 224)
