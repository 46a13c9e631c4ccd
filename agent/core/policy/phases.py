# SPDX-License-Identifier: Apache-2.0
"""The phase of a pod between two passes, and the table of its transitions. Pure: `now` is an argument.

    a pod that is being created    UNCAPTURED -> CAPTURED
    a pod that already runs        UNCAPTURED -> WAITING -> PRESERVING -> CAPTURED
    a change of the backend        CAPTURED -> POSTPONED -> DRAINING -> CAPTURED
    the end of capture             CAPTURED -> LEAVING -> UNCAPTURED
    enrolled again meanwhile       LEAVING -> RETURNING -> PRESERVING -> CAPTURED

A phase says which rules stand in the pod and what the agent waits for. It is lost with the agent: the next one begins
with the pod's note (NOTED), and its first pass finds the rest in the kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Final


class Phase(Enum):
    """State of the rules in a pod, and the event that its next pass waits for."""

    UNCAPTURED = "no rules of Sluice"
    WAITING = "a running pod without rules: ztunnel first, so that no connection is refused"
    PRESERVING = "captured, but pre-existing connections run on past the rules"
    POSTPONED = "captured by the former backend, until the new one knows ztunnel's sockets"
    DRAINING = "captured, while connections of the former backend end"
    CAPTURED = "captured, and nothing is about to end"
    LEAVING = "no new connection is captured, until those in ztunnel have ended"
    RETURNING = "as LEAVING, but enrolled again: ztunnel first, as in WAITING"

    @property
    def captures(self) -> bool:
        """True if the rules capture new connections."""
        return self in (Phase.PRESERVING, Phase.POSTPONED, Phase.DRAINING, Phase.CAPTURED)

    @property
    def has_rules(self) -> bool:
        """True if rules of Sluice stand in the pod."""
        return self.captures or self.drains

    @property
    def drains(self) -> bool:
        """True if rules stand that capture no new connection."""
        return self in (Phase.LEAVING, Phase.RETURNING)

    @property
    def awaits_ztunnel(self) -> bool:
        """True if rules that capture must not be applied before ztunnel listens, or the deadline has passed."""
        return self in (Phase.WAITING, Phase.RETURNING)

    @property
    def ends_soon(self) -> bool:
        """True if connections are about to end, which no event reports."""
        return self in (Phase.PRESERVING, Phase.DRAINING)


class Event(Enum):
    """Result of a pass: an observation or a change."""

    NOTED = "the pod's note says that rules may stand: of an earlier agent, or of a pass that failed halfway"
    AWAITED = "a pass over an enrolled pod that runs and is not captured"
    PRESERVED = "rules applied; pre-existing connections run on"
    POSTPONED = "rules applied, except those that need ztunnel's sockets"
    SWITCHED = "rules applied; connections of the former backend run on"
    CAPTURED = "rules applied; they are strict"
    STOPPED = "a pass over an excluded pod has stopped the capture of new connections"
    ENDED = "the runtime has begun to end the pod's sandbox"
    REMOVED = "a pass over an excluded pod has withdrawn it from ztunnel and removed the rules"


_APPLIED: Final = {
    Event.PRESERVED: Phase.PRESERVING,
    Event.POSTPONED: Phase.POSTPONED,
    Event.SWITCHED: Phase.DRAINING,
    Event.CAPTURED: Phase.CAPTURED,
}


def _captured(phase: Phase) -> dict[Event, Phase]:
    """Returns the transitions of a phase that captures: the rules are applied again in each pass."""
    return {Event.NOTED: phase, **_APPLIED, Event.STOPPED: Phase.LEAVING, Event.ENDED: phase}


# An event that a phase does not name cannot happen there.
TRANSITIONS: Final[Mapping[Phase, Mapping[Event, Phase]]] = MappingProxyType(
    {
        Phase.UNCAPTURED: {
            Event.NOTED: Phase.CAPTURED,
            Event.AWAITED: Phase.WAITING,
            **_APPLIED,
            Event.ENDED: Phase.UNCAPTURED,
        },
        Phase.WAITING: {
            Event.NOTED: Phase.CAPTURED,
            Event.AWAITED: Phase.WAITING,
            **_APPLIED,
            Event.ENDED: Phase.WAITING,
            Event.REMOVED: Phase.UNCAPTURED,
        },
        Phase.PRESERVING: _captured(Phase.PRESERVING),
        Phase.POSTPONED: _captured(Phase.POSTPONED),
        Phase.DRAINING: _captured(Phase.DRAINING),
        Phase.CAPTURED: _captured(Phase.CAPTURED),
        Phase.LEAVING: {
            Event.NOTED: Phase.LEAVING,
            Event.AWAITED: Phase.RETURNING,
            Event.STOPPED: Phase.LEAVING,
            Event.ENDED: Phase.CAPTURED,  # if the pod runs after all, it leaves from the beginning
            Event.REMOVED: Phase.UNCAPTURED,
        },
        Phase.RETURNING: {
            Event.NOTED: Phase.RETURNING,
            Event.AWAITED: Phase.RETURNING,
            **_APPLIED,
            Event.STOPPED: Phase.LEAVING,
            Event.ENDED: Phase.RETURNING,
        },
    }
)

# Seconds that a phase lasts at most. Istio's ztunnel comes back within 15.
LIMITS: dict[Phase, float] = {Phase.WAITING: 30.0, Phase.LEAVING: 30.0, Phase.RETURNING: 30.0}


@dataclass(frozen=True, slots=True)
class CurrentPhase:
    """A pod's phase with its deadline `until`, in seconds of any clock that does not go back; None without one."""

    phase: Phase = Phase.UNCAPTURED
    until: float | None = None

    def after(self, event: Event, now: float) -> CurrentPhase:
        """Returns the phase after `event`; a phase that lasts keeps its deadline.

        Raises ValueError for an event that cannot happen in this phase.
        """
        phase = TRANSITIONS[self.phase].get(event)
        if phase is None:
            raise ValueError(f"{event.name} cannot happen to a pod in phase {self.phase.name}")
        if phase is self.phase:
            return self
        limit = LIMITS.get(phase)
        return CurrentPhase(phase, None if limit is None else now + limit)

    def expired(self, now: float) -> bool:
        """Returns True if the deadline has passed."""
        return self.until is not None and now >= self.until
