# SPDX-License-Identifier: Apache-2.0
"""State of each pod, for people, metrics and the CNI plugin's answer."""

from __future__ import annotations

from dataclasses import KW_ONLY, asdict, dataclass
from enum import StrEnum
from typing import Any

from agent.core.model.plan import Foreign


class State(StrEnum):
    WAITING = "waiting"  # known, not reconciled yet; or a running pod without rules that waits for ztunnel
    ENABLED = "enabled"  # rules verified in the kernel, and ztunnel listens in the pod
    PENDING = "pending"  # rules verified, but ztunnel does not listen there: traffic is refused, not passed
    STALLED = "stalled"  # as enabled, but ztunnel does not accept the pod's connections: they hang
    EXCLUDED = "excluded"
    FAILED = "failed"  # what should hold does not; see error


@dataclass(frozen=True, slots=True)
class Status:
    """One pod's state. `error` is the last error in one line, `retry` the seconds until the next try.

    `outside` counts connections that are older than the enrolment and run on uncaptured. `notes` are lines for
    people about what is right but should be known: annotations that cannot be used, foreign rules before ours.
    """

    state: State
    _: KW_ONLY
    reason: str = ""
    backend: str = ""
    error: str = ""
    retry: float | None = None
    repairs: int = 0
    outside: int = 0
    notes: tuple[str, ...] = ()
    leaving: bool = False  # excluded, but rules are there until ztunnel's connections have ended
    probe: str = ""  # what the node's probe of the pod showed, "" before
    verified: float = 0.0  # Unix time of the last read-back that was right

    @property
    def foreign(self) -> tuple[str, ...]:
        """Returns the notes on rules of others that come before ours."""
        return tuple(note for note in self.notes if isinstance(note, Foreign))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
