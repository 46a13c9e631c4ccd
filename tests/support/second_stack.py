# SPDX-License-Identifier: Apache-2.0
"""HBONE by the tests' own client and server, on nghttp2 and GnuTLS, at the other end of a ztunnel."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cryptography import x509
from support import gnutls
from support.gnutls import GnuTls
from support.hbone import HBONE_PORT, Node
from support.nghttp2 import Http2Peer, Stream
from support.ztunnel import PEER4, SECONDS, read_all

from agent.ztunnel.tls.contexts import Credentials
from agent.ztunnel.tls.development_ca import DevelopmentCa
from agent.ztunnel.tls.spiffe import SpiffeId

_MARK = 0x539  # of ztunnel's own connections, which are not captured
PORT = 8080
Pair = tuple[Stream, socket.socket]


def credentials(folder: Path, account: str) -> Credentials:
    return DevelopmentCa(folder / "ca").issue(SpiffeId("cluster.local", "demo", account))


def identity(tls: GnuTls) -> str:
    """The identity in the other side's certificate."""
    names = x509.load_der_x509_certificate(tls.peer).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    (found,) = names.value.get_values_for_type(x509.UniformResourceIdentifier)
    return found


class OwnClient:
    """In the pod web, without a ztunnel; a ztunnel serves shop."""

    def __init__(self, web: Node, shop: Node, folder: Path, made: contextlib.ExitStack) -> None:
        self._web, self._shop, self._made = web, shop, made
        self._credentials = credentials(folder, "web")
        self._listener = made.enter_context(shop.pod.listen(PEER4, PORT))
        self._listener.settimeout(SECONDS)

    def session(self, **options: Any) -> Http2Peer:
        link = self._web.pod.make()
        link.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, _MARK)
        link.connect((PEER4, HBONE_PORT))
        peer = Http2Peer(GnuTls(link, gnutls.CLIENT, self._credentials), **options)
        self._made.callback(peer.close)
        return peer

    def stream(self, peer: Http2Peer, *fields: tuple[str, str]) -> Pair:
        """(a new stream, the application's end in shop)."""
        stream = peer.connect(f"{PEER4}:{PORT}", *fields)
        peer.pump(lambda: stream.status or stream.closed is not None)
        assert (stream.status, stream.closed) == ("200", None)
        return stream, self._accepted()

    def _accepted(self) -> socket.socket:
        application, _ = self._listener.accept()
        application.settimeout(SECONDS)
        return self._made.enter_context(application)


class OwnServer:
    """In the pod shop, without a ztunnel; a ztunnel serves web."""

    def __init__(self, web: Node, shop: Node, folder: Path, made: contextlib.ExitStack) -> None:
        self._web, self._made = web, made
        self._credentials = credentials(folder, "shop")
        self._listener = made.enter_context(shop.pod.listen(PEER4, HBONE_PORT))
        self._listener.settimeout(SECONDS)

    def dial(self) -> socket.socket:
        """The application's end in web."""
        application = self._made.enter_context(self._web.pod.connect(PEER4, PORT))
        application.settimeout(SECONDS)
        return application

    def session(self, **options: Any) -> Http2Peer:
        """Takes the session that ztunnel opens next."""
        link, _ = self._listener.accept()
        peer = Http2Peer(GnuTls(link, gnutls.SERVER, self._credentials), server=True, **options)
        self._made.callback(peer.close)
        return peer

    def stream(self, peer: Http2Peer, *fields: tuple[str, str]) -> Pair:
        """(a new stream that it has answered with 200, the application's end in web)."""
        before = len(peer.streams)
        application = self.dial()
        return self.answered(peer, before, *fields), application

    def first(self, *fields: tuple[str, str], **options: Any) -> tuple[Http2Peer, Stream, socket.socket]:
        application = self.dial()
        peer = self.session(**options)
        return peer, self.answered(peer, 0, *fields), application

    def answered(self, peer: Http2Peer, before: int, *fields: tuple[str, str]) -> Stream:
        peer.pump(lambda: len(peer.streams) > before)
        stream = peer.streams[max(peer.streams)]
        peer.respond(stream, "200", *fields)
        return stream


@contextlib.contextmanager
def sent(application: socket.socket, data: bytes, *, end: bool = False) -> Iterator[None]:
    """Sends at the application's end while the block runs."""

    def send() -> None:
        application.sendall(data)
        if end:
            application.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=send)
    thread.start()
    yield
    thread.join()


@contextlib.contextmanager
def received(application: socket.socket) -> Iterator[list[bytes]]:
    """Reads up to the FIN while the block runs; the list has it afterwards."""
    found: list[bytes] = []
    thread = threading.Thread(target=lambda: found.append(read_all(application)))
    thread.start()
    yield found
    thread.join()
