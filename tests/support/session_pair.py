# SPDX-License-Identifier: Apache-2.0
"""A session of HBONE with the h2 library as its peer, and single frames."""

from __future__ import annotations

from collections.abc import Iterable

from h2.config import H2Configuration
from h2.connection import H2Connection
from hpack import Encoder
from hyperframe import frame as rfc

from agent.ztunnel.hbone import frames
from agent.ztunnel.hbone.frames import Data
from agent.ztunnel.hbone.session_core import SessionCore
from agent.ztunnel.hbone.session_events import Happening

CONNECT = [(b":method", b"CONNECT"), (b":authority", b"10.0.0.1:80"), (b"baggage", b"a=b")]
OK = [(b":status", b"200")]


class Pair:
    """The core and a peer of the h2 library."""

    def __init__(self, *, client: bool) -> None:
        self.core = SessionCore(client=client, now=0.0)
        self.peer = H2Connection(H2Configuration(
            client_side=not client, validate_outbound_headers=False, validate_inbound_headers=False,
        ))  # fmt: skip
        self.peer.initiate_connection()
        self.swap()

    def swap(self, now: float = 0.0) -> tuple[list[Happening], list[object]]:
        """What each end hears until both are silent: (the core, the peer)."""
        heard: list[Happening] = []
        told: list[object] = []
        while True:
            to_peer = b"".join(self.core.output)
            self.core.output.clear()
            to_core = self.peer.data_to_send()
            if not to_peer and not to_core:
                return heard, told
            told += self.peer.receive_data(to_peer)
            heard += receive(self.core, to_core, now)

    def open(self) -> int:
        """A stream that the client has opened and the server has answered."""
        if self.core.client:
            stream = self.core.open(CONNECT)
            self.swap()
            self.peer.send_headers(stream, OK)
        else:
            stream = self.peer.get_next_available_stream_id()
            self.peer.send_headers(stream, CONNECT)
            self.swap()
            self.core.answer(stream, OK)
        self.swap()
        return stream

    def send(self, stream: int, count: int) -> None:
        """DATA of the core, as the session writes it."""
        buffer = bytearray(frames.HEADER_SIZE + count)
        frames.write_data_header(buffer, count, stream)
        self.core.sent(stream, count)
        self.core.output.append(bytes(buffer))


def receive(core: SessionCore, data: bytes, now: float = 0.0) -> list[Happening]:
    return [
        one._replace(payload=memoryview(bytes(one.payload))) if isinstance(one, Data) else one
        for one in core.receive(memoryview(data), now)
    ]


def of(kind: type, events: Iterable[object]) -> list[object]:
    return [event for event in events if isinstance(event, kind)]


def data(stream: int, payload: bytes) -> bytes:
    return bytes(rfc.DataFrame(stream, payload).serialize())


def headers(stream: int, fields: list[tuple[bytes, bytes]]) -> bytes:
    return bytes(rfc.HeadersFrame(stream, Encoder().encode(fields), flags=["END_HEADERS"]).serialize())


def window_update(stream: int, increment: int) -> bytes:
    return bytes(rfc.WindowUpdateFrame(stream, window_increment=increment).serialize())
