# SPDX-License-Identifier: Apache-2.0
"""The tree keeps the house style of CONTRIBUTING.md: forbidden words are counted, and their number only falls."""

from __future__ import annotations

import re
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

REPO = Path(__file__).resolve().parents[2]
# Lower a number when you have removed words; never raise one.
CEILING = {"agent": 1, "bpf": 5, "texts": 0}  # the name of a pinned map, which an upgrade keeps


def _load() -> ModuleType:
    loader = SourceFileLoader("house", str(REPO / "tools" / "house"))
    spec = spec_from_loader("house", loader)
    assert spec
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def house() -> ModuleType:
    return _load()


def test_forbidden_words_become_fewer(house: ModuleType) -> None:
    counted = house.words_by_room(REPO)
    more = {room: (counted[room], ceiling) for room, ceiling in CEILING.items() if counted[room] > ceiling}
    assert set(counted) <= set(CEILING)
    assert not more, f"forbidden words (found, allowed): {more}; see them with: tools/house --list words"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("the error is told", ["told"]),
        ("connections passed ztunnel by", ["passed ztunnel by"]),
        ("if value is None:  # a word is none", ["is none"]),
        ("the rules are to be removed", ["are to be"]),
        ("a telling name, a password, an abode", []),
    ],
)
def test_words_are_found_as_whole_words(house: ModuleType, tmp_path: Path, line: str, words: list[str]) -> None:
    (tmp_path / "README.md").write_text(f"{line}\n`told` in code\n```sh\necho told\n```\n")
    assert [word for _, _, word in house.words(tmp_path)] == words


def test_docstrings_are_sentences_of_their_own(house: ModuleType) -> None:
    assert house.fragments(REPO) == []


@pytest.mark.parametrize(
    ("code", "fragments"),
    [
        ('def f():\n    """Returns the size."""\n', 0),
        ('def f():\n    """True if it exists."""\n', 0),
        ('def f():\n    """The size."""\n', 1),
        ('def f():\n    """"" without a name."""\n', 1),
        ('async def f():\n    """With the lock held."""\n', 1),
        ('class C:\n    """A pod."""\n\n    @property\n    def size(self):\n        """The size."""\n', 0),
        ('class C:\n    """Of a pod."""\n', 1),
    ],
)
def test_a_fragment_is_no_sentence(house: ModuleType, tmp_path: Path, code: str, fragments: int) -> None:
    (tmp_path / "agent").mkdir()
    (tmp_path / "agent" / "example.py").write_text(code)
    assert len(house.fragments(tmp_path)) == fragments


def test_no_file_has_more_than_400_lines(house: ModuleType) -> None:
    assert house.long_files(REPO) == [], "split it by noun; what several test files use belongs in tests/support"


def test_a_long_file_is_found(house: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "tests" / "netns").mkdir(parents=True)
    for name, lines in (("test_short", 400), ("test_long", 401)):
        (tmp_path / "tests" / "netns" / f"{name}.py").write_text("pass\n" * lines)
    assert house.long_files(tmp_path) == [("tests/netns/test_long.py", 1, "401 lines")]


def test_no_conflict_of_a_merge_is_left(house: ModuleType) -> None:
    marker = re.compile(r"^(<<<<<<<|>>>>>>>) ", re.MULTILINE)
    read = house.files(
        REPO, "*.md", "docs/**/*.md", "deploy/**/*.*", "agent/**/*.py", "tests/**/*.py", "bpf/*", "cni_plugin/*.[ch]"
    )
    assert [path for path in read if marker.search(path.read_text(errors="replace"))] == []


def test_a_module_name_occurs_once(house: ModuleType) -> None:
    assert house.module_names(REPO) == [], "rename one of them to the noun that a stranger would search for"


def test_kept_names_are_still_used_more_than_once(house: ModuleType) -> None:
    missing = [f"{package}/{name}.py" for name, packages in house.KEPT_NAMES.items() for package in packages]
    assert [path for path in missing if not (REPO / path).is_file()] == []


def test_a_kept_name_is_kept_only_in_its_packages(house: ModuleType, tmp_path: Path) -> None:
    for package in ("agent/cli", "agent/lab", "agent/zds"):
        (tmp_path / package).mkdir(parents=True)
    (tmp_path / "agent/cli/lab.py").touch()
    (tmp_path / "agent/lab/lab.py").touch()
    assert house.module_names(tmp_path) == []
    (tmp_path / "agent/zds/lab.py").touch()
    assert house.module_names(tmp_path) == [("lab", 3, "agent/cli, agent/lab, agent/zds")]


def test_unlike_things_are_not_packed(house: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "agent").mkdir()
    (tmp_path / "agent" / "example.py").write_text(
        "a, b = b, a\nleft, right = 0, 1\nname, size = 'x', 4\nself.x, self.y = x, y\nfirst, second = f(1), f(2)\n"
    )
    assert [line for _, line, _ in house.packed(tmp_path)] == [3, 4]


def test_constructors_with_many_fields_take_keywords(house: ModuleType) -> None:
    assert house.positional(REPO) == [], "take keywords, or give the reason: # By position: …"


def test_constructors_by_position_are_found(house: ModuleType, tmp_path: Path) -> None:
    fields = "".join(f"    {name}: int\n" for name in "abcde")
    (tmp_path / "agent").mkdir()
    (tmp_path / "agent" / "example.py").write_text(
        f"@dataclass\nclass Value:\n{fields}"
        f"@dataclass(kw_only=True)\nclass Named:\n{fields}"
        f"@dataclass\nclass Half:\n    z: int\n    _: KW_ONLY\n{fields}"
        f"# By position: it is unpacked.\n@dataclass\nclass Unpacked:\n{fields}"
        f"class Row(NamedTuple):\n{fields}"
        "class Part:\n    def __init__(self, a, b, c, d, e): ...\n"
        "class Other:\n    def __init__(self, a, *, b, c, d, e): ...\n"
        "Row(1, 2, 3, 4, 5)\nRow(a=1, b=2, c=3, d=4, e=5)\nUnpacked(1, 2, 3, 4, 5)\n"
    )
    found = [text for _, _, text in house.positional(tmp_path)]
    assert found == ["Value takes 5", "Part takes 5", "Row is given 5"]
