# SPDX-License-Identifier: Apache-2.0
"""Chooses the session of a new stream. Pure: the caller makes sessions and says what became of them.

For each key one session is made at a time, and all that ask meanwhile wait for it. A full session stays: its streams
end, and it takes new ones again.
"""

from __future__ import annotations

from typing import Generic, NamedTuple, Protocol, TypeVar

from agent.ztunnel.hbone.next_hop import Address
from agent.ztunnel.tls.spiffe import SpiffeId


class SessionKey(NamedTuple):
    """Two streams share a session if they agree in all of this."""

    source: SpiffeId
    identities: frozenset[str]
    address: Address
    source_ip: str


class PooledSession(Protocol):
    """A session as the pool sees it."""

    @property
    def room_for_streams(self) -> int:
        """Returns how many more streams it takes."""


Session = TypeVar("Session", bound=PooledSession)
User = TypeVar("User")


class Pool(Generic[Session, User]):
    """Sessions by key. Under a key of which a session is being made, users wait."""

    def __init__(self) -> None:
        self._sessions: dict[SessionKey, list[Session]] = {}
        self._waiting: dict[SessionKey, dict[User, None]] = {}

    def find(self, key: SessionKey) -> Session | None:
        """Returns an open session with room for a stream."""
        return next((one for one in self._sessions.get(key, ()) if one.room_for_streams > 0), None)

    def wait(self, key: SessionKey, user: User) -> bool:
        """Lets the user wait for the session that is being made; returns True if the caller must make it."""
        first = key not in self._waiting
        self._waiting.setdefault(key, {})[user] = None
        return first

    def leave(self, key: SessionKey, user: User) -> None:
        """Takes a user off the list of those that wait."""
        if key in self._waiting:
            self._waiting[key].pop(user, None)

    def made(self, key: SessionKey, session: Session) -> tuple[list[User], bool]:
        """Adds a session. Returns the users that it serves, and True if another must be made for the rest."""
        self._sessions.setdefault(key, []).append(session)
        waiting = self._waiting.pop(key, {})
        room = max(session.room_for_streams, 0)
        users = list(waiting)
        rest = users[room:]
        if rest:
            self._waiting[key] = dict.fromkeys(rest)
        return users[:room], bool(rest)

    def failed(self, key: SessionKey) -> list[User]:
        """Returns the users that waited for a session that could not be made."""
        return list(self._waiting.pop(key, {}))

    def ended(self, key: SessionKey, session: Session) -> None:
        """Forgets a session."""
        sessions = self._sessions.get(key, [])
        if session in sessions:
            sessions.remove(session)
        if not sessions:
            self._sessions.pop(key, None)

    def sessions(self) -> list[Session]:
        return [one for sessions in self._sessions.values() for one in sessions]
