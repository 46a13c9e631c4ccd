# SPDX-License-Identifier: Apache-2.0
"""The users of a session's streams, as the session calls them. Pure."""

from __future__ import annotations

from typing import Protocol

from agent.ztunnel.hbone.session_events import Headers


class StreamUser(Protocol):
    """One end of a stream, which does not exist any more after `peer_reset` or `session_lost`."""

    def answered(self, headers: Headers) -> None:
        """Takes the server's answer to the request."""

    def arrived(self, payload: memoryview) -> None:
        """Takes bytes, which are valid during this call; `TlsSession.taken` lets the peer send more."""

    def peer_ended(self) -> None:
        """Handles the end of the peer's bytes."""

    def peer_reset(self, code: int) -> None:
        """Handles a reset by the peer, or its refusal of the stream (REFUSED_STREAM)."""

    def may_send(self) -> None:
        """Resumes sending: there may be room again, after `TlsSession.wait`."""

    def session_lost(self, why: str) -> None:
        """Handles the end of the session, and with it of the stream."""
