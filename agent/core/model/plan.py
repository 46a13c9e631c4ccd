# SPDX-License-Identifier: Apache-2.0
"""Plan: what has to change in one target. The contract between thinking and doing.

It prints as the mechanism's own script; that text is what dry run, log, golden tests and apply share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

P = TypeVar("P")


class Foreign(str):
    """A remark on foreign state that precedes Sluice's and takes its traffic, or on the effect of such state."""


@dataclass(frozen=True, slots=True)
class Step(Generic[P]):
    """One atomic change: its script as a person would write it, and what the backend sends for it."""

    text: str
    payload: P


@dataclass(frozen=True, slots=True)
class Plan(Generic[P]):
    """Steps in order; empty when in sync. `differences` say in words how the actual state differs.

    `seen` is the backend's mark of the state that the plan was made from (a generation), so that applying
    it to another state fails instead of doing harm; None where the mechanism has no such mark. `remarks` say what is
    no drift but should be known, such as foreign rules that come before ours.
    """

    steps: tuple[Step[P], ...] = ()
    differences: tuple[str, ...] = ()
    seen: int | None = None
    remarks: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.steps)

    def __str__(self) -> str:
        return "\n".join(step.text for step in self.steps)
