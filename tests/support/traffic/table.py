# SPDX-License-Identifier: Apache-2.0
"""The traffic table as it is printed: a line for each row, a column for each mechanism."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Table:
    """`found`: by row number and mechanism, by family (or what else was tried) -> (got, wanted)."""

    rows: dict[int, Any] = field(default_factory=dict)  # number -> support.traffic.row.Row
    found: dict[tuple[int, str], dict[str, tuple[str, str]]] = field(default_factory=dict)

    def note(self, number: int, row: Any, mechanism: str, how: str, got: str) -> None:
        wanted = row.gets(6 if "6" in how else 4, mechanism)
        self.rows[number] = row
        self.found.setdefault((number, mechanism), {})[how] = got, wanted

    def lines(self) -> list[str]:
        if not self.rows:
            return []
        mechanisms = list(dict.fromkeys(mechanism for _, mechanism in self.found))
        head = f"{'NO':>3} {'CAPTURE':19} {'FROM':4} {'WHAT':47} {'PROT':4} {'TO':19} {'PORT':>5} {'FATE':10}"
        found = [f"{head} {' '.join(mechanisms)}"]
        for number, row in sorted(self.rows.items()):
            cells = [_cell(self.found.get((number, one), {})).ljust(len(one)) for one in mechanisms]
            found.append(f"{number:3} {_row(row)} {' '.join(cells)}".rstrip())
        every = [one for cell in self.found.values() for one in cell.values()]
        wrong = sum(got != wanted for got, wanted in every)
        tried = ", ".join(dict.fromkeys(how for cell in self.found.values() for how in cell))
        found.append(
            f"{len(self.rows)} rows, {len(every)} fates ({tried}) over {len(mechanisms)} mechanisms, {wrong} wrong"
        )
        return found


def _row(row: Any) -> str:
    fate = row.fate if isinstance(row.fate, str) else " / ".join(row.fate[family] for family in (4, 6))
    port = str(row.port or "-")
    return f"{row.variant:19} {row.sender:4} {row.what:47} {row.protocol:4} {row.to:19} {port:>5} {fate:10}"


def _cell(found: Mapping[str, tuple[str, str]]) -> str:
    if not found:
        return "-"
    wrong = [f"{how}: {got}" for how, (got, wanted) in found.items() if got != wanted]
    return "WRONG " + "; ".join(wrong) if wrong else "ok"
