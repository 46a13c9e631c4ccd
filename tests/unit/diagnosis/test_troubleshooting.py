# SPDX-License-Identifier: Apache-2.0
"""docs/troubleshooting.md and the checks hold together; SLUICE_GOLDEN=write writes its generated table anew."""

from __future__ import annotations

import os
import re
from pathlib import Path

from agent.__main__ import _GROUPS
from agent.diagnosis.checks import CHECKS

PAGE = Path(__file__).resolve().parents[3] / "docs" / "troubleshooting.md"
BEGIN, END = "<!-- checks -->\n", "<!-- end -->\n"
ROWS = {f"P{number:02}" for number in range(1, 60)} | {f"P60{letter}" for letter in "abcdefghijklmnop"}


def table() -> str:
    lines = ["| check | looks whether | field problems |", "|---|---|---|"]
    lines += [f"| [{one.id}](#{one.id}) | {one.about} | {', '.join(one.problems)} |" for one in CHECKS]
    return "\n".join(lines) + "\n"


def sections() -> dict[str, str]:
    parts = re.split(r"^### (.+)\n", PAGE.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], (part.split("\n## ")[0] for part in parts[2::2]), strict=True))


def test_the_table_is_that_of_the_checks() -> None:
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    held, _, after = rest.partition(END)
    if os.environ.get("SLUICE_GOLDEN") == "write":
        PAGE.write_text(before + BEGIN + table() + END + after)
        held = table()
    assert held == table(), "run: SLUICE_GOLDEN=write .venv/bin/pytest tests/unit/diagnosis"


def test_each_check_has_its_section_with_symptom_cause_and_remedy() -> None:
    found = sections()
    assert list(found) == [one.id for one in sorted(CHECKS, key=lambda one: list(found).index(one.id))]
    assert set(found) == {one.id for one in CHECKS}
    for name, text in found.items():
        assert re.findall(r"^- \*\*(\w+)\*\*: \S", text, re.MULTILINE) == ["Symptom", "Cause", "Remedy"], name


def test_each_row_is_seen_by_a_check_or_said_not_to_be() -> None:
    unseen = re.findall(r"^\| (P\d\d[a-p]?) \|", PAGE.read_text(), re.MULTILINE)
    seen = {row for one in CHECKS for row in one.problems}
    assert len(unseen) == len(set(unseen))
    assert seen & set(unseen) == set()
    assert seen | set(unseen) == ROWS


def test_links_lead_to_sections_and_files() -> None:
    text = PAGE.read_text()
    for target in re.findall(r"\]\(#([\w-]+)\)", text):
        assert target in sections(), target
    for target in re.findall(r"\]\(([\w-]+\.md)\)", text):
        assert (PAGE.parent / target).is_file(), target


def test_commands_exist() -> None:
    used = set(re.findall(r"(?:`|^|-- )sluice ([a-z]+)", PAGE.read_text(), re.MULTILINE))
    assert used and used <= set(_GROUPS), used - set(_GROUPS)
