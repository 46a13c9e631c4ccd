# SPDX-License-Identifier: Apache-2.0
"""Decides whether a session goes on, every PING_SECONDS. Pure."""

from __future__ import annotations

from agent.ztunnel.hbone import limits

_PING_ROUNDS = round(limits.PING_TIMEOUT_SECONDS / limits.PING_SECONDS)
_STALL_ROUNDS = round(limits.STALL_SECONDS / limits.PING_SECONDS)
_IDLE_ROUNDS = round(limits.IDLE_SESSION_SECONDS / limits.PING_SECONDS)


class SessionLiveness:
    """Belongs to one session. `heard`: the peer has sent bytes since the last decision."""

    __slots__ = ("_idle_rounds", "_ping_rounds", "heard")

    def __init__(self) -> None:
        self.heard = True
        self._ping_rounds = 0
        self._idle_rounds = 0

    def verdict(self, *, ping_answered: bool, may_idle: bool) -> str:
        """Returns why the session ends; "" if it goes on, and a PING is due if the last one was answered."""
        self._ping_rounds = 0 if ping_answered else self._ping_rounds + 1
        self._idle_rounds = 0 if may_idle else self._idle_rounds + 1
        if self._ping_rounds >= (_STALL_ROUNDS if self.heard else _PING_ROUNDS):
            return "HBONE ping timeout"
        if self._idle_rounds > _IDLE_ROUNDS:
            return "unused for too long"
        self.heard = False
        return ""
