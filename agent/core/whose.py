"""Whose something is that was found under the names which all mesh agents share."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum


class Whose(Enum):
    NOBODYS = "nobody's"
    OURS = "ours"
    OTHERS = "another agent's"


def whose(parts: Iterable[Whose]) -> Whose:
    """Of the whole: ours as soon as any part is."""
    found = set(parts)
    return next((one for one in (Whose.OURS, Whose.OTHERS) if one in found), Whose.NOBODYS)
