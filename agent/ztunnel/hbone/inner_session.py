# SPDX-License-Identifier: Apache-2.0
"""A session within a stream to a gateway (double HBONE).

The gateway ends the outer tunnel and chooses a workload, to which it hands the bytes of the stream as they are. So the
inner session ends at that workload's ztunnel, and is not pooled: all connections would reach the same workload.

The inner windows bound what the application does not take. Bytes of the outer stream are always taken at once.
"""

from __future__ import annotations

from typing import Any

from agent.ztunnel.hbone import connect_request
from agent.ztunnel.hbone.frames import FIRST_STREAM, ErrorCode, reset_text
from agent.ztunnel.hbone.next_hop import InnerHop, TunnelHop
from agent.ztunnel.hbone.pod_sessions import PodSessions, SessionUser
from agent.ztunnel.hbone.pool import SessionKey
from agent.ztunnel.hbone.session_engine import SessionEngine
from agent.ztunnel.hbone.session_events import Headers, first
from agent.ztunnel.hbone.tls_session import TlsSession
from agent.ztunnel.relay import poller
from agent.ztunnel.relay.poller import Handler
from agent.ztunnel.telemetry.response_flags import ResponseFlag
from agent.ztunnel.tls.peer_checks import check_server

_TRIES = 3  # outer streams: one that was not processed may be asked for again
_READABLE = poller.READ & ~poller.END


class StreamTransport:
    """A stream of an outer session as the transport of an inner one: a Transport and a StreamUser."""

    def __init__(self, session: TlsSession, engine: SessionEngine, headers: Headers) -> None:
        """Takes the outer session, its engine, and the request of the stream."""
        self.answered_well = False
        self.refused = False  # the gateway has not processed the stream, or has not answered it
        self.outer_failure: ResponseFlag | None = None  # of the outer session, once it is lost
        self._session = session
        self._engine = engine
        self._headers = headers
        self._stream = 0
        self._event: Handler
        self._pending = memoryview(b"")
        self._failure = ""
        self._ended = False  # the gateway sends no more
        self._gone = False  # the stream does not exist any more
        self._closed = False

    # The transport

    def start(self, event: Handler) -> None:
        self._event = event
        self._stream = self._session.request(self._headers, self)

    def connect_failure(self) -> str:
        return self._failure

    def recv_into(self, buffer: memoryview, /) -> int:
        if not self._pending:
            if self._failure:
                raise OSError(self._failure)
            if not self._ended:
                raise BlockingIOError
        count = min(len(buffer), len(self._pending))
        buffer[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count

    def send(self, data: memoryview | bytes, /) -> int:
        if self._gone or self._closed:
            raise OSError("the stream has ended")
        payload = self._engine.buffers.frame_payload
        count = min(self._session.room(self._stream), len(payload), len(data))
        if not count:
            self._session.wait(self)
            raise BlockingIOError
        payload[:count] = data[:count]
        self._session.send(self._stream, count)
        return count

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._gone:
            return
        if not self.answered_well:
            self._session.release(self, self._stream)
            return
        self._session.end(self._stream)  # a reset would overtake the last bytes at the gateway
        if self._ended:
            self._session.release(self, self._stream)
        else:
            self._engine.shakes.add(self)

    def expire(self) -> None:
        """Gives up a stream that the gateway does not end after this end has."""
        if not self._gone:
            self._session.release(self, self._stream)

    # The stream

    def answered(self, headers: Headers) -> None:
        status = first(headers, b":status") or b""
        if status != b"200":
            self._fail(f"http status: {status[:3].decode('latin-1')}, from the gateway")
        elif not self._closed:
            self.answered_well = True
            self._event(poller.WRITE)

    def arrived(self, payload: memoryview) -> None:
        if not self._closed:
            self._pending = payload
            self._event(_READABLE)
            self._pending = memoryview(b"")
        self._session.taken(self._stream, len(payload))

    def peer_ended(self) -> None:
        self._ended = True
        if self._closed:
            self._engine.shakes.settle(self)
            self._session.release(self, self._stream)
        elif self.answered_well:
            self._event(poller.READ)
        else:
            self._fail("the gateway ended the stream without an answer")

    def peer_reset(self, code: int) -> None:
        self.refused = code == ErrorCode.REFUSED_STREAM and not self.answered_well
        self._lost(reset_text(code) or "the gateway reset the stream")

    def may_send(self) -> None:
        if not self._closed:
            self._event(poller.WRITE)

    def session_lost(self, why: str) -> None:
        self.outer_failure = self._session.failure
        self.refused = self._stream != FIRST_STREAM and not self.answered_well
        self._lost(f"gateway: {why}")

    def _lost(self, why: str) -> None:
        self._gone = True
        self._engine.shakes.settle(self)
        self._fail(why)

    def _fail(self, why: str) -> None:
        if not self._closed:
            self._failure = why
            self._event(poller.READ)


class InnerSession:
    """Finds the session of one connection: a SessionSource for it, a SessionUser of the pool, a SessionOwner."""

    def __init__(self, sessions: PodSessions, engine: SessionEngine, hop: TunnelHop, inner: InnerHop) -> None:
        """Takes the pod's sessions, of which one is the outer, and the engine for inner ones."""
        self.engine = engine
        self.peer = ""
        self._sessions = sessions
        self._hop = hop
        self._inner = inner
        self._key: SessionKey
        self._user: SessionUser | None = None
        self._session: TlsSession | None = None
        self._transport: StreamTransport
        self._tries = 0
        self._made = False

    def seek(self, key: SessionKey, user: SessionUser) -> None:
        """Calls `session_ready` or `session_failed` of the user; `key` is that of the outer session."""
        self._key = key
        self._user = user
        self._session = None
        self._made = False
        self._tries += 1
        self._sessions.seek(key, self)

    def leave(self, key: SessionKey, user: SessionUser) -> None:
        """Takes back `seek`."""
        self._user = None
        self._sessions.leave(key, self)
        if self._session is not None:
            self._session.close()

    def late(self, key: SessionKey) -> tuple[str, ResponseFlag | None]:
        """Returns what is missing when the time for a session is over, and its flag."""
        if self._session is None:
            return self._sessions.late(key)
        if not self._transport.answered_well:
            return "connect timed out: no answer from the gateway", None
        return "connect timed out behind the gateway", None

    # The outer session

    def session_ready(self, session: TlsSession) -> None:
        contexts = self._sessions.contexts.get(self._hop.source)
        if contexts is None:
            self.session_failed(f"no certificate of {self._hop.source}", ResponseFlag.IDENTITY)
            return
        headers = connect_request.request(self._hop.authority, self._hop.fields)
        self._transport = StreamTransport(session, self._sessions.engine, headers)
        self._session = TlsSession(
            engine=self.engine, owner=self, transport=self._transport, context=contexts.client, client=True
        )
        self._session.start()

    def session_failed(self, why: str, flag: ResponseFlag) -> None:
        if self._user is not None:
            self._user.session_failed(f"gateway: {why}", flag)

    # The inner session

    def authenticate(self, session: TlsSession, certificate: dict[str, Any] | None) -> None:
        self.peer = check_server(certificate, self._inner.identities)
        self._made = True
        if self._user is not None:
            self._user.session_ready(session)
            session.retire()  # it has one stream

    def opened(self, session: TlsSession, stream: int, headers: Headers) -> None:
        """Servers open no streams: the core refuses them."""

    def closed(self, session: TlsSession, why: str) -> None:
        if session is not self._session:  # one that refused its stream
            return
        session.failure = self._transport.outer_failure or session.failure
        if self._made or self._user is None:
            return
        if self._transport.refused and self._tries < _TRIES:
            self.seek(self._key, self._user)
        else:
            self._user.session_failed(why, session.failure)
