# SPDX-License-Identifier: Apache-2.0
"""What the documents say is there: commands and their options, targets, files, sections."""

from __future__ import annotations

import argparse
import re
import subprocess

import pytest
from support.documents import PLACES, ROOT, anchors, blocks, commands, links

from agent.__main__ import parser

_TARGETS = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def _choices(of: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in of._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def wrong(words: list[str]) -> str:
    """What is wrong with a command of ours; empty when nothing is. Placeholders are no matter."""
    top, at = parser(words[0]), 0
    current = top
    while at < len(words) and (inner := _choices(current)):
        if words[at].startswith("-") or words[at] == "COMMAND":
            break
        name = words[at].strip(",.:")
        if name not in inner:
            return f"there is no command {' '.join(words[: at + 1])!r}"
        current, at = inner[name], at + 1
    known = {option for action in (*current._actions, *top._actions) for option in action.option_strings}
    for word in words[at:]:
        if word == "--":
            break
        option = word.split("=")[0].strip("[],.…")
        if re.fullmatch(r"--?[a-z][a-z0-9-]*", option) and option not in known:
            return f"{' '.join(words[:at])!r} has no option {option}"
    return ""


@pytest.mark.parametrize(
    "words",
    [["nosuch"], ["lab", "nosuch"], ["verify", "--every"], ["pods", "-z"], ["explain", "--config=x", "shop/client"]],
)
def test_a_wrong_command_would_be_found(words: list[str]) -> None:
    assert wrong(words)


def test_each_command_of_ours_is_there_with_its_options() -> None:
    said = [*commands("sluice"), *((str(block), line.split()[1:]) for block in blocks() for line in _lines(block.text))]
    assert len(said) > 60
    assert [(where, problem) for where, words in said if (problem := wrong(words))] == []


def _lines(text: str) -> list[str]:
    """Each command of ours in a block, also behind `kubectl exec … --`."""
    found = re.findall(r"(?:^|-- |\|\| |&& )((?:\.venv/bin/)?sluice [^|&#\n]*)", text, re.MULTILINE)
    return [line.strip() for line in found if not line.startswith("sluice deploy/")]


def test_each_target_is_there() -> None:
    said = [*commands("make"), *((str(block), line.split()[1:]) for block in blocks() for line in _made(block.text))]
    assert len(said) > 10
    assert [(where, words[0]) for where, words in said if words[0].strip(".,") not in _TARGETS] == []


def _made(text: str) -> list[str]:
    return re.findall(r"^make .*$", text, re.MULTILINE)


def test_each_link_leads_somewhere() -> None:
    lost = []
    for path, target in links():
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            lost.append(f"{path.relative_to(ROOT)}: {target}")
    assert lost == []


def test_each_block_of_commands_says_where_it_is_run() -> None:
    assert [(str(block), block.where) for block in blocks() if block.place not in PLACES] == []


def test_the_tests_of_field_problems_are_those_that_there_are() -> None:
    done = subprocess.run([ROOT / "tools/field-problems", "--print"], capture_output=True, text=True, check=True)
    assert done.stdout == (ROOT / "docs/field-problems.md").read_text(), "run tools/field-problems"


def test_the_files_that_the_architecture_names_exist() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    named = re.findall(r"`((?:agent|bpf|cni_plugin|deploy|tests|tools)/[\w./-]+)`", text)
    assert len(named) > 80
    assert [name for name in named if not (ROOT / name).exists()] == []
