# SPDX-License-Identifier: Apache-2.0
"""The sessions that clients have opened to one pod, and how many of them one client may have. Pure.

A client is an address. It may have as much as is free: one client half of all, two a third each, and some is always
left for the next one. So no client keeps others out. If each of very many has little, the oldest unfinished handshake
makes room, once it had time to finish.
"""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

from agent.ztunnel.hbone import limits


class ArrivedSession(Protocol):
    """A session as its share is counted."""

    @property
    def streams(self) -> int:
        """Returns how many streams are open."""

    def close(self, *, why: str) -> None:
        """Ends it; `Arrivals.remove` follows."""


Session = TypeVar("Session", bound=ArrivedSession)


class _Client(Generic[Session]):
    __slots__ = ("sessions", "unfinished")

    def __init__(self) -> None:
        self.sessions: set[Session] = set()
        self.unfinished = 0


class Arrivals(Generic[Session]):
    """Belongs to a pod, which may have `share` connections.

    `unfinished` has the handshakes of all pods, the oldest first, with the times they began.
    """

    def __init__(self, unfinished: dict[Session, float], share: int) -> None:
        self._everywhere = unfinished
        self._share = share
        self._unfinished: dict[Session, float] = {}  # of this pod
        self._sessions: dict[Session, str] = {}
        self._clients: dict[str, _Client[Session]] = {}

    def sessions(self) -> list[Session]:
        return list(self._sessions)

    def refusal(self, address: str, now: float) -> str:
        """Returns why a new connection of the client is refused, or ""; an old handshake may be ended for it."""
        client = self._clients.get(address)
        unfinished, sessions = (client.unfinished, len(client.sessions)) if client is not None else (0, 0)
        room = limits.HANDSHAKES_PER_POD - len(self._unfinished)
        if unfinished and unfinished >= min(limits.HANDSHAKES_PER_CLIENT, room):
            return f"{unfinished} of its handshakes are unfinished"
        free = min(limits.SESSIONS_PER_POD, self._share) - len(self._sessions)
        if sessions >= min(limits.SESSIONS_PER_CLIENT, free):
            return f"{sessions} of its sessions are open"
        for queue, most in ((self._unfinished, limits.HANDSHAKES_PER_POD), (self._everywhere, limits.HANDSHAKES)):
            if len(queue) >= most:
                oldest, since = next(iter(queue.items()))
                if now - since < limits.HANDSHAKE_PATIENCE_SECONDS:
                    return f"{len(queue)} handshakes are unfinished"
                oldest.close(why="too many TLS handshakes, and this was the oldest one")
        return ""

    def add(self, session: Session, address: str, now: float) -> None:
        """Counts a session at the beginning of its handshake."""
        client = self._clients.setdefault(address, _Client())
        client.sessions.add(session)
        client.unfinished += 1
        self._sessions[session] = address
        self._unfinished[session] = self._everywhere[session] = now

    def finish(self, session: Session) -> None:
        """Notes the end of the session's handshake."""
        if self._unfinished.pop(session, None) is not None:
            del self._everywhere[session]
            self._clients[self._sessions[session]].unfinished -= 1

    def remove(self, session: Session) -> None:
        """Forgets a session that has ended."""
        self.finish(session)
        address = self._sessions.pop(session)
        self._clients[address].sessions.remove(session)
        if not self._clients[address].sessions:
            del self._clients[address]

    def stream_refusal(self, session: Session, live: int) -> str:
        """Returns why a new stream is refused, or "". The pod has `live` connections."""
        share = self._share
        if live >= share:
            return f"the pod has reached its limit of {share} connections"
        if live >= share // 2:
            streams = sum(one.streams for one in self._clients[self._sessions[session]].sessions)
            if streams > share - live:
                return f"its client has {streams} of the pod's {share} connections"
        return ""
