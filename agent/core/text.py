# SPDX-License-Identifier: Apache-2.0
"""Tables, lists and times as people and programs read them. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Final

from agent.core.errors import SluiceError

_SPAN: Final = re.compile(r"(\d{1,9})([smhd])")
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def printable(text: str) -> str:
    r"""Escapes what a terminal or a log would take for more than a character: \x1b, \n, \u202e.

    For names that a pod controls: of processes, interfaces, tables, chains. Surrogates (bytes that were no UTF-8) too.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one == "\t" else ascii(one)[1:-1] for one in text)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as their widest cell, two spaces apart, as kubectl prints them."""
    cells = [
        tuple(header),
        *(tuple("-" if cell in ("", None) else printable(str(cell)) for cell in row) for row in rows),
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


def pairs(rows: Sequence[tuple[str, object]]) -> str:
    """Lines of the form "Key: value", values aligned."""
    width = max((len(key) for key, _ in rows), default=0) + 1
    return "\n".join(f"{key + ':':<{width}}  {printable(str(value))}" for key, value in rows)


def shortened(text: str, most: int) -> str:
    """Returns the text, or its beginning and how long it is: for a log that others must still be able to read."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters in all)"


def first(items: Sequence[str], most: int) -> tuple[str, ...]:
    """Returns all of them, or the first ones and "N more"."""
    return (*items[:most], f"{len(items) - most} more") if len(items) > most else tuple(items)


def some(items: Sequence[str], most: int) -> str:
    """Returns "a, b", or the first ones and how many there are besides: "a, b and 3 more"."""
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Returns one line of a table of which the next lines come later. A cell wider than its column shifts the rest."""
    padded = ((cell or "-").ljust(width) for cell, width in zip(cells, widths, strict=True))
    return printable("  ".join(padded).rstrip())


def utc(seconds: float, timespec: str = "microseconds") -> str:
    """Returns seconds since 1970 in ISO 8601 with Z; `timespec` as of `datetime.isoformat`."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec=timespec).replace("+00:00", "Z")


def moment(text: str, now: float) -> float:
    """Returns the seconds since 1970 of "10m" or "1h30m" (before `now`) or of an ISO 8601 time, UTC without an offset.

    Raises ValueError.
    """
    spans = _SPAN.findall(text)
    if spans and "".join(map("".join, spans)) == text:
        return now - sum(int(number) * _SECONDS[unit] for number, unit in spans)
    given = datetime.fromisoformat(text)
    return (given if given.tzinfo else given.replace(tzinfo=UTC)).timestamp()


def natural(query: Mapping[str, str], key: str, default: int = 0) -> int:
    """Returns the number of that name in a query, or the default without one. Raises SluiceError for anything else."""
    text = query.get(key, "")
    if text and not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise SluiceError(f"{key}: {text!r} is not a number")
    return int(text or default)
