# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from agent.core.text import pairs, printable, table


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("postgres: näme \\ 日本", "postgres: näme \\ 日本"),
        ("\x1b]0;P\x07", "\\x1b]0;P\\x07"),
        ("a\n2026-01-01 ERROR", "a\\n2026-01-01 ERROR"),
        ("\r\x00\x7f\x9b", "\\r\\x00\\x7f\\x9b"),
        ("a\tb", "a\tb"),
        ("\u202egnp\u2028", "\\u202egnp\\u2028"),
        ("\udcff", "\\udcff"),
    ],
)
def test_a_name_cannot_be_more_than_a_name(name: str, shown: str) -> None:
    assert printable(name) == shown


def test_cells_and_values_stay_in_their_line() -> None:
    assert table(("A", "B"), [("x\ny", 1)]).split("\n")[1:] == ["x\\ny  1"]
    assert pairs([("A", "x\ny")]) == "A:  x\\ny"
