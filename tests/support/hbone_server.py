# SPDX-License-Identifier: Apache-2.0
"""An HBONE server of the tests' own, on the h2 library and blocking sockets: a stand-in for a waypoint or a gateway."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import h2.errors
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, RequestReceived, StreamEnded
from support.ztunnel import SECONDS, Place

from agent.ztunnel.tls.contexts import make_contexts
from agent.ztunnel.tls.development_ca import DevelopmentCa
from agent.ztunnel.tls.spiffe import SpiffeId


class Answer(Enum):
    """What the server does with a CONNECT."""

    ECHO = "echo"  # 200, then what arrives is sent back
    GARBAGE = "garbage"  # 200, then bytes that are no TLS
    END = "end"  # 200, then the end of the stream
    SILENCE = "silence"  # 200, and nothing more
    RESET = "reset"  # RST_STREAM
    REFUSED = "refused"  # status 404


@dataclass
class HboneServer:
    """`requests` has the header fields of each CONNECT, `peers` the URIs of the clients' certificates."""

    answer: Answer
    requests: list[dict[str, str]] = field(default_factory=list)
    peers: list[str] = field(default_factory=list)

    def serve(self, connected: ssl.SSLSocket) -> None:
        certificate = connected.getpeercert() or {}
        self.peers += [value for kind, value in certificate.get("subjectAltName", ()) if kind == "URI"]
        session = H2Connection(
            H2Configuration(client_side=False, header_encoding="utf-8", validate_inbound_headers=False)
        )
        session.initiate_connection()
        connected.sendall(session.data_to_send())
        while data := connected.recv(65536):
            for event in session.receive_data(data):
                self._handle(session, event)
            connected.sendall(session.data_to_send())

    def _handle(self, session: H2Connection, event: object) -> None:
        match event:
            case RequestReceived():
                self.requests.append(dict(event.headers))
                self._respond(session, event.stream_id)
            case DataReceived():
                session.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                if self.answer is Answer.ECHO:
                    session.send_data(event.stream_id, event.data)
            case StreamEnded() if self.answer is Answer.ECHO:
                session.end_stream(event.stream_id)

    def _respond(self, session: H2Connection, stream: int) -> None:
        if self.answer is Answer.RESET:
            session.reset_stream(stream, h2.errors.ErrorCodes.INTERNAL_ERROR)
            return
        status = "404" if self.answer is Answer.REFUSED else "200"
        session.send_headers(stream, [(":status", status)], end_stream=self.answer is Answer.REFUSED)
        if self.answer is Answer.GARBAGE:
            session.send_data(stream, b"HTTP/1.1 400 Bad Request\r\n\r\n")
        if self.answer is Answer.END:
            session.end_stream(stream)


@contextlib.contextmanager
def hbone_server(
    place: Place, host: str, ca: Path, account: str, *, answer: Answer = Answer.ECHO
) -> Iterator[HboneServer]:
    """Serves in the place, with the identity of a service account of namespace demo."""
    context = make_contexts(DevelopmentCa(ca).issue(SpiffeId("cluster.local", "demo", account))).server
    server = HboneServer(answer)
    ending = threading.Event()

    def serve(client: socket.socket) -> None:
        client.settimeout(SECONDS)
        with contextlib.suppress(OSError), context.wrap_socket(client, server_side=True) as connected:
            server.serve(connected)

    def accept() -> None:
        listener.settimeout(0.1)
        while not ending.is_set():
            with contextlib.suppress(TimeoutError):
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    with place.listen(host, 15008) as listener:
        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield server
        finally:
            ending.set()
            accepting.join()
