# SPDX-License-Identifier: Apache-2.0
"""Hostile peers of HBONE: each loses its session at a limit, memory is bounded, and other clients notice nothing."""

from __future__ import annotations

import contextlib
import resource
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from hpack import Encoder
from support import hostile
from support.hbone import Node, two_nodes
from support.hostile import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    HEADERS,
    PING,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Peer,
    frame,
    opening,
    request,
)  # fmt: skip
from support.revoking import root
from support.ztunnel import PEER4, SECONDS

from agent.lab.links import links
from agent.ztunnel.hbone import limits
from agent.ztunnel.tls.contexts import Credentials
from agent.ztunnel.tls.development_ca import DevelopmentCa
from agent.ztunnel.tls.spiffe import SpiffeId

pytestmark = pytest.mark.root

WEB = SpiffeId("cluster.local", "demo", "web")
MIB = 1 << 20
SOURCES = [f"10.77.1.{number}" for number in range(2, 202)]
STALLED = 8090  # the port of an application that reads nothing
HOSTILE, INNOCENT = SOURCES[0], SOURCES[-1]


class Scene:
    """Two served nodes, an echo server in shop, and addresses in web's namespace from which others come."""

    def __init__(self, folder: Path, nodes: tuple[Node, Node], made: contextlib.ExitStack) -> None:
        self.web, self.shop = nodes
        for node in nodes:
            node.start(workers=1)  # each has limits of its own
        with links(self.web.pod.name) as web, links(self.shop.pod.name) as shop:
            web.add_addresses("eth0", *(f"{source}/32" for source in SOURCES))
            shop.rtnl.route("add", dst="10.77.1.0/24", oif=shop.index("eth0"))
        self.ca = DevelopmentCa(folder / "ca")
        self.good = hostile.tls_context(self.ca.issue(WEB))
        listener = made.enter_context(self.shop.pod.listen(PEER4, 8080))
        threading.Thread(target=_echo, args=(listener,), daemon=True).start()
        made.callback(listener.shutdown, socket.SHUT_RDWR)
        made.enter_context(self.shop.pod.listen(PEER4, STALLED))  # accepts nothing

    def session(self, context: ssl.SSLContext | None = None, source: str = HOSTILE):  # type: ignore[no-untyped-def]
        return hostile.session(self.web.pod, context or self.good, source=source)

    @contextlib.contextmanager
    def innocent(self) -> Iterator[list[float]]:
        """Meanwhile others ask: over the pooled session of web's ztunnel, and with a handshake of their own."""
        stop = threading.Event()
        took: list[float] = []
        failed: list[str] = []

        def ask() -> None:
            while not stop.is_set():
                began = time.monotonic()
                try:
                    self.ask_pooled()
                    self.ask_fresh()
                except (OSError, AssertionError) as error:
                    failed.append(repr(error))
                took.append(time.monotonic() - began)

        thread = threading.Thread(target=ask)
        thread.start()
        try:
            yield took
        finally:
            stop.set()
            thread.join()
        assert took and failed == []

    def ask_pooled(self) -> None:
        with self.web.pod.connect(PEER4, 8080) as client:
            client.sendall(b"question")
            assert client.recv(8, socket.MSG_WAITALL) == b"question"

    def ask_fresh(self, source: str = INNOCENT) -> None:
        with self.session(source=source) as peer:
            peer.greet()
            assert echoed(peer)

    def memory(self) -> int:
        return self.shop.ztunnel.memory()


def _echo(listener: socket.socket) -> None:
    listener.settimeout(None)
    with contextlib.suppress(OSError):
        while True:
            threading.Thread(target=_answer, args=(listener.accept()[0],), daemon=True).start()


def _answer(end: socket.socket) -> None:
    with end, contextlib.suppress(OSError):
        while part := end.recv(1 << 16):
            end.sendall(part)


def echoed(peer: Peer, stream: int = 1) -> bool:
    """True if a stream to the echo server is opened, and gives back what it gets."""
    peer.send(opening(stream), frame(DATA, 0, stream, b"question"))
    return peer.until(HEADERS)[2] == stream and peer.until(DATA)[3] == b"question"


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with two_nodes(tmp_path) as nodes, contextlib.ExitStack() as made:
        yield Scene(tmp_path, nodes, made)


def _rapid_reset(count: int) -> Iterator[bytes]:
    for stream in range(1, 2 * count, 2):
        yield opening(stream) + frame(RST_STREAM, 0, stream, bytes(4))


def _refused(count: int) -> Iterator[bytes]:
    for stream in range(1, 2 * count, 2):
        yield opening(stream, request(host="10.0.0.1"))  # another pod's address: 400


FIELDS = Encoder().encode([(b":method", b"CONNECT"), (b":authority", b"x:1"), *[(b"x", b"")] * 600])
CALM, TOO_LARGE, PROTOCOL, FLOW = 11, 6, 1, 3
FLOODS: dict[str, tuple[int, Callable[[], Iterable[bytes]]]] = {
    "a header block that is too large": (CALM, lambda: [opening(1, bytes(17 << 10))]),
    "a header list that is too large": (CALM, lambda: [opening(1, FIELDS)]),
    "CONTINUATION for ever": (
        CALM, lambda: [frame(HEADERS, 0, 1, b"\x82"), *[frame(CONTINUATION, 0, 1, b"")] * 20_000],
    ),
    "rapid reset": (CALM, lambda: _rapid_reset(20_000)),
    "requests that are refused": (CALM, lambda: _refused(20_000)),
    "SETTINGS": (CALM, lambda: [frame(SETTINGS, 0, 0)] * 20_000),
    "PING": (CALM, lambda: [frame(PING, 0, 0, bytes(8))] * 20_000),
    "WINDOW_UPDATE": (CALM, lambda: [frame(WINDOW_UPDATE, 0, 0, b"\0\0\0\1")] * 20_000),
    "empty DATA": (CALM, lambda: [opening(1), *[frame(DATA, 0, 1)] * 20_000]),
    "a DATA frame of 16 MiB": (TOO_LARGE, lambda: [opening(1), frame(DATA, 0, 1, length=(1 << 24) - 1)]),
    "a HEADERS frame of 16 MiB": (CALM, lambda: [frame(HEADERS, END_HEADERS, 1, length=(1 << 24) - 1)]),
    "a PING frame of 16 MiB": (TOO_LARGE, lambda: [frame(PING, 0, 0, length=(1 << 24) - 1)]),
    "streams over the limit": (PROTOCOL, lambda: [opening(2 * n + 1) for n in range(limits.STREAMS_PER_SESSION + 1)]),
    "more bytes than the window": (
        FLOW, lambda: [opening(1, request(STALLED)), *[frame(DATA, 0, 1, bytes(MIB))] * 40],
    ),
    "a window of more than 31 bits": (FLOW, lambda: [*[frame(WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff")] * 2]),
}  # fmt: skip


@pytest.mark.parametrize("name", FLOODS)
def test_a_peer_beyond_a_limit_loses_its_session_alone(scene: Scene, name: str) -> None:
    code, made = FLOODS[name]
    scene.ask_pooled()
    before = scene.memory()
    with scene.innocent(), scene.session() as peer:
        peer.greet()
        sending = b"".join(made())
        with contextlib.suppress(OSError):
            peer.tls.sendall(sending)
        assert peer.end() == code
    assert scene.memory() - before < 40 * MIB


NOBODY = SpiffeId("cluster.local", "demo", "nobody")


def _bad_certificates(scene: Scene, folder: Path) -> dict[str, tuple[Credentials | None, str]]:
    """Credentials and why the server refuses them."""
    ours = DevelopmentCa(folder / "ca")
    other = root()
    expired = DevelopmentCa(folder / "ca", lifetime=timedelta(seconds=-60)).issue(WEB)
    return {
        "none": (None, "peer did not return a certificate"),
        "signed by itself": (Credentials(WEB, other.key_pem, other.pem, ours.roots), "self-signed certificate"),
        "of another authority": (replace(other.issue(WEB), roots=ours.roots), "unable to get local issuer certificate"),
        "expired": (expired, "certificate has expired"),
        "of another trust domain": (ours.issue(SpiffeId("other", "demo", "web")), "is not of the trust domain"),
    }


def test_bad_certificates_and_other_protocols_are_refused(scene: Scene, tmp_path: Path) -> None:
    with scene.innocent():
        for name, (credentials, why) in _bad_certificates(scene, tmp_path).items():
            with contextlib.suppress(OSError), scene.session(hostile.tls_context(credentials)) as peer:
                peer.greet()
                peer.send(opening(1))
                assert peer.end() is None, name
            assert why in _refusal(scene, why), name
        with contextlib.suppress(OSError), scene.session(hostile.tls_context(scene.ca.issue(WEB), "http/1.1")) as peer:
            assert peer.end() is None
        _refusal(scene, "does not speak h2")
        with hostile.connect(scene.web.pod, source=HOSTILE) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert plain.recv(100) in (b"", b"\x15\x03\x01\x00\x02\x02F")  # an alert
        with scene.session() as peer:
            peer.send(b"GET / HTTP/1.1\r\n\r\n" + bytes(100))
            assert peer.end() == PROTOCOL


def _refusal(scene: Scene, why: str) -> str:
    """The error of the record of a refused session; waits for it."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        for record in scene.shop.ztunnel.records():
            if record["close"] == "refused" and why in record["error"] and record["source"].startswith(HOSTILE):
                return str(record["error"])
        time.sleep(0.05)
    raise AssertionError(f"no refusal with {why}")


def test_names_in_certificates(scene: Scene, tmp_path: Path) -> None:
    """No name, or none of this trust domain, is refused; of two names one must be of it."""
    top = root()
    authority = tmp_path / "other-ca"
    authority.mkdir()
    (authority / "development-ca.pem").write_bytes(top.key_pem + top.pem)
    scene.shop.ztunnel.close()
    scene.shop.start("second", authority=authority, workers=1)
    for uris, accepted in {
        (): False,
        ("spiffe://other/ns/demo/sa/web",): False,
        ("https://cluster.local/ns/demo/sa/web",): False,
        ("spiffe://other/ns/demo/sa/web", "spiffe://third/ns/demo/sa/web"): False,
        (str(WEB), "spiffe://other/ns/demo/sa/web"): True,
        ("spiffe://other/ns/demo/sa/web", str(WEB)): True,
    }.items():
        with scene.session(hostile.tls_context(top.issue(WEB, uris))) as peer:
            peer.greet()
            try:
                assert echoed(peer) == accepted, uris
            except AssertionError:
                assert not accepted, uris


def test_handshakes_that_never_end(scene: Scene) -> None:
    """10,000 from 100 addresses, half of them with the beginning of a ClientHello."""
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100)
    scene.ask_pooled()
    before = scene.memory()
    with contextlib.ExitStack() as opened, scene.innocent():
        held = []
        for number in range(10_000):
            source = SOURCES[number % 100]
            with contextlib.suppress(OSError):  # its backlog is full
                held.append(opened.enter_context(hostile.connect(scene.web.pod, source=source)))
                if number % 2:
                    held[-1].sendall(hello)
        during = scene.memory()
        alive = sum(not hostile.is_ended(one) for one in held)
        assert alive <= limits.HANDSHAKES_PER_POD
        _wait(lambda: all(map(hostile.is_ended, held)), limits.HANDSHAKE_SECONDS + SECONDS)
    print(f"RSS {before >> 20}, {during >> 20}, {scene.memory() >> 20} MiB; {alive} of {len(held)} were held")
    assert during - before < 60 * MIB
    assert scene.memory() - before < 60 * MIB


def _wait(condition: Callable[[], bool], seconds: float = SECONDS) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


def test_one_source_has_its_share_of_handshakes_and_sessions(scene: Scene) -> None:
    with contextlib.ExitStack() as opened, scene.innocent():
        silent = [opened.enter_context(hostile.connect(scene.web.pod, source=HOSTILE)) for _ in range(200)]
        _wait(lambda: sum(map(hostile.is_ended, silent)) >= 200 - limits.HANDSHAKES_PER_CLIENT)
        assert sum(not hostile.is_ended(one) for one in silent) == limits.HANDSHAKES_PER_CLIENT
        with pytest.raises(OSError), scene.session():
            pass
        for one in silent:
            one.close()
        sessions = 0
        with contextlib.suppress(OSError):
            for _ in range(limits.SESSIONS_PER_CLIENT + 10):
                peer = opened.enter_context(scene.session(source=SOURCES[1]))
                peer.greet()
                peer.until(SETTINGS, ACK)
                sessions += 1
        assert sessions == limits.SESSIONS_PER_CLIENT


def test_idle_streams_have_the_pods_share(scene: Scene) -> None:
    """10,000 are asked for over 100 sessions of two clients: each gets a third of what the pod may have."""
    share = min(16384, resource.getrlimit(resource.RLIMIT_NOFILE)[1] // 8)
    scene.ask_pooled()
    before = scene.memory()
    with contextlib.ExitStack() as opened, scene.innocent():
        statuses: list[bytes] = []
        for number in range(100):
            peer = opened.enter_context(scene.session(source=SOURCES[number % 2]))
            peer.greet()
            peer.send(*(opening(2 * stream + 1, request(STALLED)) for stream in range(100)))
            statuses += [peer.until(HEADERS)[3] for _ in range(100)]
        during = scene.memory()
    accepted = sum(status[:1] == b"\x88" for status in statuses)
    print(f"RSS {before >> 20}, {during >> 20} MiB; {accepted} of {len(statuses)} streams were accepted")
    assert len(statuses) == 10_000
    assert abs(accepted - share * 2 // 3) < share // 20
    assert during - before < 80 * MIB


@pytest.mark.parametrize("window", [0, 1 << 30], ids=["a window of zero", "no reading"])
def test_a_peer_that_takes_nothing_holds_little(scene: Scene, window: int) -> None:
    """100 streams ask for 1 MiB each from an application; the peer gives no window, or does not read its socket."""
    with scene.shop.pod.listen(PEER4, 8070) as listener:
        threading.Thread(target=_flood, args=(listener, 100), daemon=True).start()
        scene.ask_pooled()
        before = scene.memory()
        with scene.innocent() as took, scene.session() as peer:
            peer.greet(b"\0\4" + window.to_bytes(4, "big"))
            peer.send(*(opening(2 * stream + 1, request(8070)) for stream in range(100)))
            if not window:
                for _ in range(100):
                    assert peer.until(HEADERS)
            _wait(lambda: len(took) > 20)
            during = scene.memory()
        assert during - before < 20 * MIB


def _flood(listener: socket.socket, count: int) -> None:
    ends = []
    for _ in range(count):
        ends.append(listener.accept()[0])
        ends[-1].setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                ends[-1].send(bytes(MIB))
