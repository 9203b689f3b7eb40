"""Content is found by name, path or ``module:name``, and what is wrong with it is said."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import pytest

from nas import content
from nas.errors import ContentError
from nas.space import SearchSpace

SPACE = """
from dataclasses import dataclass

from nas.space import Choice, SearchSpace, Training


@dataclass
class Settings:
    width: int = 8


class Tiny(SearchSpace):
    name = "tiny"

    def __init__(self, task=None):
        self.choices = (Choice("width", (8, 16)),)
        self.sites = {}
        self.settings = Settings()

    def build(self, candidate):
        raise RuntimeError

    def training(self, candidate):
        return Training()


"""


@pytest.fixture(autouse=True)
def forget_loaded():
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(content.PACKAGE):
            del sys.modules[name]


@pytest.fixture
def space_file(tmp_path: Path):
    def write(text: str, name: str = "tiny.py") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package folder of our own, so that the tests do not depend on what is bundled today."""
    package = tmp_path / "site" / "nas"
    package.mkdir(parents=True)
    monkeypatch.setattr(content, "_HERE", package)
    return package


def fill(place: Path, *names: str) -> None:
    place.mkdir(parents=True, exist_ok=True)
    for name in names:
        (place / name).write_text("")


# ---- available -----------------------------------------------------------------------------------


def test_the_checkout_offers_its_spaces():
    assert content.available("search_spaces")["mobilenet"].name == "mobilenet.py"


def test_a_checkout_is_read_beside_the_package_and_a_wheel_inside(bundle: Path):
    fill(bundle.parent / "experiments", "digits.yaml")
    assert list(content.available("experiments")) == ["digits"]
    fill(bundle / "_content" / "experiments", "bundled.yaml")
    assert list(content.available("experiments")) == ["bundled"]


def test_names_are_sorted_and_lose_their_endings(bundle: Path):
    tables = bundle.parent / "latency_tables"
    fill(tables, "pi.4.json", "epyc.json.gz", "arm.csv", "README.md", "_draft.json", ".x.json")
    (tables / "folder.json").mkdir()
    assert list(content.available("latency_tables")) == ["arm", "epyc", "pi.4"]


def test_the_preferred_ending_wins(bundle: Path):
    fill(bundle.parent / "experiments", "digits.yml", "digits.yaml")
    assert content.available("experiments")["digits"].suffix == ".yaml"


def test_nothing_bundled_is_no_error(bundle: Path):
    assert content.available("experiments") == {}


def test_an_unknown_kind_is_named():
    with pytest.raises(ContentError, match=r"'tables'(.|\n)*latency_tables"):
        content.available("tables")


# ---- find ----------------------------------------------------------------------------------------


def test_find_by_name_and_by_path(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fill(bundle.parent / "experiments", "digits.yaml")
    fill(tmp_path / "mine", "own.yaml")
    monkeypatch.chdir(tmp_path)
    assert content.find("experiments", "digits") == bundle.parent / "experiments" / "digits.yaml"
    assert content.find("experiments", "mine/own.yaml") == tmp_path / "mine" / "own.yaml"
    assert content.find("experiments", tmp_path / "mine" / "own.yaml") == tmp_path / "mine" / "own.yaml"


def test_a_file_in_the_working_directory_does_not_shadow_a_bundled_name(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fill(bundle.parent / "experiments", "digits.yaml")
    fill(tmp_path, "digits")
    monkeypatch.chdir(tmp_path)
    assert content.find("experiments", "digits") == bundle.parent / "experiments" / "digits.yaml"
    assert content.find("experiments", "./digits") == tmp_path / "digits"


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fill(tmp_path, "own.yaml")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert content.find("experiments", "~/own.yaml") == tmp_path / "own.yaml"


@pytest.mark.parametrize("typed", ["mobilnet", "MobileNet", "mobilenet.py", "search_spaces/mobilnet.py"])
def test_an_unknown_name_lists_and_suggests(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str):
    fill(bundle.parent / "search_spaces", "mobilenet.py", "resnet.py")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ContentError) as caught:
        content.find("search_spaces", typed)
    assert typed in caught.value.found
    assert "mobilenet, resnet" in caught.value.expected
    assert caught.value.remedy == "'mobilenet'"


def test_nothing_alike_gives_no_suggestion(bundle: Path):
    fill(bundle.parent / "search_spaces", "mobilenet.py")
    with pytest.raises(ContentError) as caught:
        content.find("search_spaces", "zzz")
    assert caught.value.remedy == ""


def test_a_folder_is_no_content(tmp_path: Path):
    with pytest.raises(ContentError, match="is a folder"):
        content.find("experiments", tmp_path)


# ---- load_space_class ----------------------------------------------------------------------------


def test_the_bundled_space_loads():
    space = content.load_space_class("mobilenet")
    assert issubclass(space, SearchSpace)
    assert space.name == "mobilenet"
    assert space.__module__ == "nas_content.mobilenet"


def test_a_file_loads_once_and_again_after_an_edit(space_file):
    path = space_file(SPACE + "space = Tiny")
    first = content.load_space_class(path)
    assert content.load_space_class(str(path)) is first
    path.write_text((SPACE + "space = Tiny").replace('"tiny"', '"tidy"'))  # same length, same second
    assert content.load_space_class(path).name == "tidy"


def test_two_files_of_one_name_stay_apart(space_file):
    one = content.load_space_class(space_file(SPACE + "space = Tiny", "a/tiny.py"))
    two = content.load_space_class(space_file(SPACE.replace('"tiny"', '"other"') + "space = Tiny", "b/tiny.py"))
    assert (one.name, two.name) == ("tiny", "other")
    assert one.__module__ != two.__module__
    assert sys.modules[one.__module__].space is one


def test_instances_can_be_pickled(space_file):
    space = content.load_space_class(space_file(SPACE + "space = Tiny", "my-tiny.v2.py"))()
    again = pickle.loads(pickle.dumps(space))
    assert type(again) is type(space)
    assert again.settings == space.settings


def test_module_and_name(space_file, monkeypatch: pytest.MonkeyPatch):
    path = space_file(SPACE, "tiny_space_module.py")
    monkeypatch.syspath_prepend(path.parent)
    assert content.load_space_class("tiny_space_module:Tiny").name == "tiny"
    with pytest.raises(ContentError, match="Settings, which does not derive"):
        content.load_space_class("tiny_space_module:Settings")
    with pytest.raises(ContentError, match="no 'Huge'"):
        content.load_space_class("tiny_space_module:Huge")
    with pytest.raises(ContentError, match="Cannot import 'no_such_module'"):
        content.load_space_class("no_such_module:Tiny")


def test_a_module_that_fails_names_its_line(space_file, monkeypatch: pytest.MonkeyPatch):
    path = space_file("x = 1\n1 / 0\n", "failing_space_module.py")
    monkeypatch.syspath_prepend(path.parent)
    with pytest.raises(ContentError, match=r"failing_space_module\.py:2: ZeroDivisionError"):
        content.load_space_class("failing_space_module:Tiny")


def test_a_file_without_space_says_which_line_to_add(space_file):
    with pytest.raises(ContentError) as caught:
        content.load_space_class(space_file(SPACE))
    assert "defines no 'space'" in caught.value.found
    assert "space = Tiny" in caught.value.remedy


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("space = Settings", "the class Settings, which does not derive"),
        ("space = Tiny()", "an object of type Tiny"),
        ("space = 3", "an object of type int"),
        ("class Half(SearchSpace): pass\nspace = Half", "Half of .* does not implement build"),
    ],
)
def test_what_is_no_space_is_refused(space_file, line: str, said: str):
    with pytest.raises(ContentError, match=said):
        content.load_space_class(space_file(SPACE + line))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\nimport no_such_package\n", r"tiny\.py:2: ModuleNotFoundError.*no_such_package(.|\n)*install"),
        ("def f():\n    return 1 / 0\n\nf()\n", r"tiny\.py:2: ZeroDivisionError"),
        ("x = 1\n\ndef f(:\n", r"tiny\.py:3: SyntaxError"),
        ("import json\njson.loads('{')\n", r"tiny\.py:2: JSONDecodeError"),
        ("raise SystemExit(2)\n", r"tiny\.py:1: SystemExit"),
        ("from nas.space import Choice\nChoice('a', ())\n", r"tiny\.py:2: SpaceError: Choice 'a' has no values"),
    ],
)
def test_an_error_inside_the_file_names_file_and_line(space_file, text: str, said: str):
    with pytest.raises(ContentError, match=said) as caught:
        content.load_space_class(space_file(text))
    assert caught.value.__cause__ is not None
    assert "nas_content.tiny" not in sys.modules


def test_a_failed_reload_keeps_what_was_loaded(space_file):
    path = space_file(SPACE + "space = Tiny")
    first = content.load_space_class(path)
    path.write_text("1 / 0")
    with pytest.raises(ContentError):
        content.load_space_class(path)
    assert sys.modules[first.__module__].space is first


def test_a_file_that_is_no_python_is_refused(space_file):
    with pytest.raises(ContentError, match="no Python file"):
        content.load_space_class(space_file("choices: []", "tiny.yaml"))
