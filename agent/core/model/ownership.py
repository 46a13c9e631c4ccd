# SPDX-License-Identifier: Apache-2.0
"""Owners of state found under the names that all mesh agents share."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum


class Owner(Enum):
    NONE = ""
    SLUICE = "sluice"
    FOREIGN = "another agent"


def owner_of(parts: Iterable[Owner]) -> Owner:
    """Returns the owner of the whole: Sluice as soon as any part is Sluice's."""
    found = set(parts)
    return next((one for one in (Owner.SLUICE, Owner.FOREIGN) if one in found), Owner.NONE)
