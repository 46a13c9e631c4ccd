# SPDX-License-Identifier: Apache-2.0
"""A captured outbound connection that goes on as a stream of HBONE."""

from __future__ import annotations

import os
import socket
from typing import Protocol

from agent.ztunnel.hbone import connect_request
from agent.ztunnel.hbone.frames import FIRST_STREAM, ErrorCode, reset_text
from agent.ztunnel.hbone.next_hop import Address, TunnelHop
from agent.ztunnel.hbone.pool import SessionKey
from agent.ztunnel.hbone.session_engine import SessionEngine
from agent.ztunnel.hbone.session_events import Headers, first
from agent.ztunnel.hbone.stream_relay import StreamRelay
from agent.ztunnel.hbone.tls_session import TlsSession
from agent.ztunnel.relay import original_dst, poller
from agent.ztunnel.relay.pod_context import PodContext
from agent.ztunnel.relay.upstream import shut
from agent.ztunnel.telemetry.records import Began
from agent.ztunnel.telemetry.response_flags import Reporter, ResponseFlag

_TRIES = 3  # sessions: a stream without an answer may be asked for again


class SessionSource(Protocol):
    """Finds and makes sessions."""

    engine: SessionEngine
    peer: str  # the identity at the end of an inner session; "" if sessions are pooled

    def seek(self, key: SessionKey, user: OutboundStream) -> None:
        """Calls `session_ready` or `session_failed` of the user, at once or later."""

    def leave(self, key: SessionKey, user: OutboundStream) -> None:
        """Removes the user from those that wait."""

    def late(self, key: SessionKey) -> tuple[str, ResponseFlag | None]:
        """Returns what is missing when the time for a session is over, and its flag."""


class OutboundStream:
    """Belongs to `pod.live` from `open` until it is recorded."""

    def __init__(
        self, *, pod: PodContext, sessions: SessionSource, hop: TunnelHop, client: socket.socket,
        source: Address, destination: Address, began: Began,
    ) -> None:  # fmt: skip
        """Takes over `client`, the application's connection, non-blocking and in no poller."""
        self._pod = pod
        self._sessions = sessions
        self._hop = hop
        self._parties = hop.parties
        self._key = SessionKey(hop.source, hop.identities, hop.address, source[0])
        self._client = client
        self._source = source
        self._destination = destination
        self._began = began
        self._session: TlsSession | None = None
        self._relay: StreamRelay | None = None
        self._stream = 0
        self._tries = 0
        self._answered = False
        self._done = False

    def open(self) -> None:
        """Asks for a session. A failure is recorded and resets the client, and is never raised."""
        self._pod.live.add(self)
        if self._hop.inner is None:
            self._count()
        self._pod.engine.connects.add(self)
        self._seek()

    def _count(self) -> None:
        if self not in self._pod.counted:
            self._pod.count(self, self._parties, self._began)

    def _seek(self) -> None:
        self._tries += 1
        self._relay = None  # of a stream that was refused
        self._sessions.seek(self._key, self)

    def session_ready(self, session: TlsSession) -> None:
        self._session = session
        end = self._hop.inner or self._hop
        self._stream = session.request(connect_request.request(end.authority, end.fields), self)
        self._relay = StreamRelay(
            engine=self._sessions.engine, session=session, stream=self._stream, user=self, done=self._relayed
        )

    def session_failed(self, why: str, flag: ResponseFlag) -> None:
        self._end("timeout" if "timed out" in why else "error", why, flag)

    def expire(self) -> None:
        if self._done or self._answered:
            return
        self._end("timeout", *self._sessions.late(self._key))

    def abort(self) -> None:
        self._end("drained", "")

    def moved(self) -> tuple[int, int]:
        return (self._relay.sent, self._relay.received) if self._relay is not None else (0, 0)

    # The stream (see StreamUser)

    def answered(self, headers: Headers) -> None:
        status = first(headers, b":status") or b""
        if status != b"200":
            self._end("refused", f"http status: {status[:3].decode('latin-1')}")  # it has three digits
            return
        if self._hop.inner is not None and self._parties is not None:
            said = (first(headers, b"baggage") or b"").decode("latin-1")
            self._parties = self._parties.ending_at(said, self._sessions.peer)
        self._count()
        self._answered = True
        self._pod.engine.connects.settle(self)
        if self._relay is not None:
            try:
                self._relay.connect(self._client)
                self._relay.event(poller.READ & ~poller.END)  # the request has usually arrived already
                if not self._done:
                    self._pod.engine.poller.add(self._client.fileno(), self._relay.event)
            except OSError as error:
                self._relayed(error, "")

    def arrived(self, payload: memoryview) -> None:
        if self._relay is not None:
            self._relay.arrived(payload)

    def peer_ended(self) -> None:
        if not self._answered:
            self._end("error", "the stream ended without an answer")
        elif self._relay is not None:
            self._relay.peer_ended()

    def peer_reset(self, code: int) -> None:
        if code != ErrorCode.REFUSED_STREAM or not self._sought_again():
            self._end("reset", reset_text(code), None if self._answered else ResponseFlag.CONNECT)

    def may_send(self) -> None:
        if self._relay is not None:
            self._relay.may_send()

    def session_lost(self, why: str) -> None:
        # The first stream may be lost because the server refuses the session. An older session was in use.
        if self._stream == FIRST_STREAM or not self._sought_again():
            self._end("error", why, self._session.failure if self._session is not None else None)

    def _sought_again(self) -> bool:
        """Asks for a session again, if nothing of the application has been sent; returns False if it is too late."""
        again = not (self._answered or self._done) and self._tries < _TRIES
        if again:
            self._seek()
        return again

    def _relayed(self, error: OSError | None, why: str) -> None:
        if error is not None:
            self._end("reset", os.strerror(error.errno) if error.errno else "")
        else:
            self._end("error" if why else "fin", why)

    def _end(self, close: str, error: str, flag: ResponseFlag | None = None) -> None:
        if self._done:
            return
        self._done = True
        if self._relay is not None:
            self._relay.fail(error)
        else:
            self._sessions.leave(self._key, self)
        self._pod.engine.poller.remove(self._client.fileno())
        shut(self._client, close)
        self._pod.engine.connects.settle(self)
        self._count()
        self._pod.end(
            self,
            kind="hbone",
            reporter=Reporter.SOURCE,
            began=self._began,
            source=self._source,
            destination=self._destination,
            close=close,
            error=error,
            flag=flag,
            via=original_dst.plain(self._hop.address),
        )
