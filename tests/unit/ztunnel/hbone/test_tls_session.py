# SPDX-License-Identifier: Apache-2.0
"""Two sessions over a transport in memory that takes as many bytes as the test lets it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from agent.ztunnel.hbone import connect_request, limits
from agent.ztunnel.hbone.session_engine import SessionEngine
from agent.ztunnel.hbone.session_events import Headers
from agent.ztunnel.hbone.tls_session import TlsSession
from agent.ztunnel.hbone.work_buffers import WorkBuffers
from agent.ztunnel.relay import poller
from agent.ztunnel.relay.poller import Deadlines, Handler, Poller
from agent.ztunnel.tls.contexts import make_contexts
from agent.ztunnel.tls.development_ca import DevelopmentCa
from agent.ztunnel.tls.spiffe import SpiffeId


class End:
    """One end of the wire, a Transport."""

    def __init__(self) -> None:
        self.peer: End
        self.event: Handler
        self.arrived = bytearray()
        self.most = 1 << 30  # bytes that may wait here
        self.closed = False

    def start(self, event: Handler) -> None:
        self.event = event

    def connect_failure(self) -> str:
        return ""

    def recv_into(self, buffer: memoryview, /) -> int:
        if not self.arrived and not self.peer.closed:
            raise BlockingIOError
        count = min(len(buffer), len(self.arrived))
        buffer[:count] = self.arrived[:count]
        del self.arrived[:count]
        return count

    def send(self, data: memoryview | bytes, /) -> int:
        count = min(len(data), self.peer.most - len(self.peer.arrived))
        if count <= 0:
            raise BlockingIOError
        self.peer.arrived += data[:count]
        return count

    def close(self) -> None:
        self.closed = True


@dataclass(eq=False)
class User:
    """A stream: what arrived on it, and how it ended."""

    session: TlsSession
    stream: int = 0
    got: bytearray = field(default_factory=bytearray)
    end: str = ""

    def answered(self, headers: Headers) -> None:
        """Nothing waits for it."""

    def arrived(self, payload: memoryview) -> None:
        self.got += payload
        self.session.taken(self.stream, len(payload))

    def peer_ended(self) -> None:
        self.end = "ended"

    def peer_reset(self, code: int) -> None:
        self.end = f"reset {code}"

    def may_send(self) -> None:
        """The tests send only what has room."""

    def session_lost(self, why: str) -> None:
        self.end = self.end or why


@dataclass
class Owner:
    """Adopts the stream that the client opens."""

    user: User | None = None
    why: str = ""

    def authenticate(self, session: TlsSession, certificate: dict[str, Any] | None) -> None:
        assert certificate

    def opened(self, session: TlsSession, stream: int, headers: Headers) -> None:
        self.user = User(session, stream)
        session.adopt(stream, self.user)
        session.answer(stream, connect_request.response(200))

    def closed(self, session: TlsSession, why: str) -> None:
        self.why = why


class Pair:
    """Both sessions, and one stream between them."""

    def __init__(self, ca: DevelopmentCa) -> None:
        self.poller = Poller()
        deadlines = [
            Deadlines(self.poller.loop, seconds) for seconds in (limits.HANDSHAKE_SECONDS, limits.PING_SECONDS)
        ]
        engine = SessionEngine(poller=self.poller, buffers=WorkBuffers(), shakes=deadlines[0], pings=deadlines[1])
        contexts = make_contexts(ca.issue(SpiffeId("td", "ns", "sa")))
        self.near, self.far = End(), End()
        self.near.peer, self.far.peer = self.far, self.near
        self.owner = Owner()
        self.client = TlsSession(
            engine=engine, owner=Owner(), transport=self.near, context=contexts.client, client=True
        )
        self.server = TlsSession(
            engine=engine, owner=self.owner, transport=self.far, context=contexts.server, client=False
        )
        self.server.start()
        self.client.start()
        self.run()
        self.user = User(self.client)
        self.user.stream = self.client.request(connect_request.request("a:1", ()), self.user)
        self.run()
        assert self.owner.user is not None
        self.served = self.owner.user
        self.engine = engine
        self.deadlines = deadlines

    def run(self) -> None:
        """Lets both work until nothing is on the way."""
        for _ in range(100):
            for end in (self.near, self.far):
                end.event(poller.WRITE)
                if end.arrived or end.peer.closed:
                    end.event(poller.READ & ~poller.END)

    def send(self, data: bytes) -> None:
        """Sends from the server."""
        assert len(data) <= self.server.room(self.served.stream)
        self.engine.buffers.frame_payload[: len(data)] = data
        self.server.send(self.served.stream, len(data))


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = Pair(DevelopmentCa(tmp_path))
    yield made
    for part in made.deadlines:
        part.close()
    made.poller.loop.close()


def test_a_session_that_drains_first_sends_what_waits(pair: Pair) -> None:
    data = bytes(range(250)) * 400
    pair.server.drain()
    pair.run()
    pair.near.most = 0
    pair.client.end(pair.user.stream)
    pair.run()
    pair.send(data)
    pair.server.end(pair.served.stream)
    pair.server.release(pair.served, pair.served.stream)
    pair.far.event(poller.WRITE)
    assert not pair.server.closed
    pair.near.most = 1 << 30
    pair.run()
    assert (bytes(pair.user.got), pair.user.end) == (data, "ended")
    assert pair.server.closed
    assert pair.owner.why == "closed"


def test_a_retired_session_ends_with_its_stream(pair: Pair) -> None:
    pair.client.retire()
    assert pair.client.room_for_streams <= 0
    pair.send(b"data")
    pair.run()
    assert (bytes(pair.user.got), pair.client.closed) == (b"data", False)
    pair.client.release(pair.user, pair.user.stream)
    assert pair.client.closed
    pair.run()
    assert pair.served.end == "reset 8"  # CANCEL; it comes before the end of the session
