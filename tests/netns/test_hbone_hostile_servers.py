# SPDX-License-Identifier: Apache-2.0
"""Hostile servers of HBONE: a client's connection ends with the reason, and its other connections notice nothing."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from support.hbone import Node, two_nodes
from support.hostile import DATA, HEADERS, PING, PORT, SETTINGS, Peer, frame
from support.revoking import root
from support.ztunnel import PEER4, RESOLVER4, SECONDS

from agent.kernel.exec import run
from agent.ztunnel.tls.contexts import Credentials, make_contexts
from agent.ztunnel.tls.development_ca import DevelopmentCa
from agent.ztunnel.tls.spiffe import SpiffeId

pytestmark = pytest.mark.root

SHOP = SpiffeId("cluster.local", "demo", "shop")
MIB = 1 << 20
OK = frame(HEADERS, 4, 1, b"\x88")


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[Node, Node]]:
    """Only web has a ztunnel."""
    with two_nodes(tmp_path) as both:
        run(["nft", "flush", "ruleset"], netns=both[1].pod.path)
        both[0].start()
        yield both


@contextlib.contextmanager
def server(node: Node, credentials: Credentials | None, alpn: str = "h2", *frames: bytes) -> Iterator[None]:
    """Takes the sessions of one client at a time; without credentials it is silent, else it sends `frames`."""
    context = make_contexts(credentials).server if credentials else ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols([alpn])
    stop = threading.Event()

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, AssertionError):
            if credentials is None:
                stop.wait(SECONDS * 2)
                return
            connection.settimeout(SECONDS)
            with context.wrap_socket(connection, server_side=True) as tls:
                peer = Peer(tls)
                tls.recv(24)
                peer.send(frame(SETTINGS, 0, 0))
                peer.until(HEADERS)
                peer.send(*frames)
                peer.end()

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                serve(listener.accept()[0])

    with node.pod.listen(PEER4, PORT) as listener:
        listener.settimeout(None)
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield
        stop.set()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(SECONDS)


def _others_are_served(web: Node, shop: Node) -> None:
    """A connection past the mesh, through the same ztunnel."""
    with shop.pod.listen(RESOLVER4, 7000) as listener, web.pod.connect(RESOLVER4, 7000) as client:
        end, _ = listener.accept()
        with end:
            client.sendall(b"x")
            assert end.recv(1) == b"x"


def _fails(nodes: tuple[Node, Node], error: str) -> None:
    web, shop = nodes
    before = web.ztunnel.memory()
    with contextlib.suppress(ConnectionResetError), web.pod.connect(PEER4, 8080) as client:
        _others_are_served(web, shop)
        client.sendall(b"x")
        while client.recv(MIB):
            pass
    records = [record for record in web.ztunnel.records() if record["destination"] == f"{PEER4}:8080"]
    record = records[-1] if records else web.ztunnel.wait_record(destination=f"{PEER4}:8080")
    assert error in record["error"] and record["close"] in ("error", "timeout", "reset", "refused")
    assert len(record["error"]) < 120  # however much the server has said
    assert web.ztunnel.memory() - before < 40 * MIB
    _others_are_served(web, shop)


def _bad(case: str, folder: Path) -> Credentials:
    ca, other = DevelopmentCa(folder / "ca"), root()
    return {
        "expired": lambda: DevelopmentCa(folder / "ca", lifetime=timedelta(seconds=-60)).issue(SHOP),
        "self-signed": lambda: Credentials(SHOP, other.key_pem, other.pem, ca.roots),
        "issuer": lambda: replace(other.issue(SHOP), roots=ca.roots),
        "/sa/other, not spiffe": lambda: ca.issue(replace(SHOP, service_account="other")),
        "spiffe://other/": lambda: ca.issue(replace(SHOP, trust_domain="other")),
    }[case]()


@pytest.mark.parametrize("case", ["expired", "self-signed", "issuer", "/sa/other, not spiffe", "spiffe://other/"])
def test_a_server_with_a_bad_certificate_gets_nothing(nodes: tuple[Node, Node], tmp_path: Path, case: str) -> None:
    with server(nodes[1], _bad(case, tmp_path)):
        _fails(nodes, case)


def test_a_server_that_does_not_speak_http2_gets_nothing(nodes: tuple[Node, Node], tmp_path: Path) -> None:
    with server(nodes[1], DevelopmentCa(tmp_path / "ca").issue(SHOP), "http/1.1"):
        _fails(nodes, "TLS: ")


@pytest.mark.parametrize(
    ("frames", "error"),
    [
        ([frame(PING, 0, 0, bytes(8))] * 20_000, "carry no data"),
        ([frame(DATA, 0, 1, length=(1 << 24) - 1)], "DATA of 16777215 bytes"),
        ([frame(HEADERS, 4, 1, bytes(17 << 10))], "a frame of 17408 bytes"),
        ([frame(HEADERS, 5, 1, b"\x48\x03503")], "http status: 503"),
        ([frame(HEADERS, 5, 1, b"\x48\x7f\x80\x01" + 255 * b"9")], "http status: 999"),
        ([OK, frame(HEADERS, 4, 2, b"\x82")], "the server opened the stream 2"),
        ([frame(DATA, 0, 1, bytes(MIB))] * 6, "the window of stream 1 is exceeded"),
        ([frame(PING, 0, 7, bytes(8))], "PROTOCOL_ERROR"),
    ],
    ids=[
        "PING",
        "DATA of 16 MiB",
        "headers",
        "503",
        "a long status",
        "its own stream",
        "DATA before the answer",
        "PING of a stream",
    ],
)
def test_a_server_that_breaks_the_protocol_loses_its_session(
    nodes: tuple[Node, Node], tmp_path: Path, frames: list[bytes], error: str
) -> None:
    with server(nodes[1], DevelopmentCa(tmp_path / "ca").issue(SHOP), "h2", *frames):
        _fails(nodes, error)


@pytest.mark.parametrize("silent", [True, False], ids=["no handshake", "no answer"])
def test_a_server_that_is_silent_has_ten_seconds(nodes: tuple[Node, Node], tmp_path: Path, silent: bool) -> None:
    make: Callable[[], Credentials] = lambda: DevelopmentCa(tmp_path / "ca").issue(SHOP)  # noqa: E731
    with server(nodes[1], None if silent else make()):
        _fails(nodes, "timed out")
