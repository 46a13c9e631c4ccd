# SPDX-License-Identifier: Apache-2.0
"""Shared by the parts of the demo: its claims, the windows in which faults are made, and their accounts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, Protocol

from agent.lab.account import Account

CALM: Final = 1.0  # seconds of traffic around each fault, so that its effects fall into its own window
Accounts = Mapping[str, Account]  # by the window's name


class Checks:
    """Prints each claim with its result and keeps those that did not hold in `failed`."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def __call__(self, claim: str, held: bool, found: object = "") -> None:
        print(f"  {'ok  ' if held else 'FAIL'} {claim}" + (f": {found}" if found != "" else ""))
        if not held:
            self.failed.append(claim)


class During(Protocol):
    """Runs an action in a window of its own."""

    def __call__(self, name: str, action: Callable[[], None], hitless: bool = True) -> None: ...
