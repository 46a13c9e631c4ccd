# SPDX-License-Identifier: Apache-2.0
"""A client and a server of HBONE on nghttp2 and GnuTLS understand a ztunnel: ours, and Istio's if there is one."""

from __future__ import annotations

import contextlib
import functools
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.hbone import MESH, Node, two_nodes
from support.istio_peer import ISTIOS, ZTUNNELS, either_ztunnel
from support.nghttp2 import Frame, Http2Peer, Setting, Stream
from support.second_stack import OwnClient, OwnServer, identity, received, sent
from support.ztunnel import PEER4, POD4, abort, read_all

pytestmark = pytest.mark.root

PAYLOAD = bytes(range(256)) * 20_000  # 5 MB
REFUSED, CANCEL = 7, 8
Own = OwnClient | OwnServer


@contextlib.contextmanager
def nodes(served: str, whose: str, folder: Path) -> Iterator[tuple[Node, Node, Path]]:
    """(web, shop, `folder`, which has the CA); the ztunnel serves web or shop."""
    mesh = folder / "mesh.yaml"
    mesh.write_text(MESH)
    with two_nodes(folder) as (web, shop):
        node = web if served == "web" else shop
        with either_ztunnel(whose, node, mesh, workers=1):  # each worker has sessions of its own
            yield web, shop, folder


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], tuple[Node, Node, Path]]]:
    """The ztunnels that are servers: each test has sessions of its own, so one process does for all."""
    with contextlib.ExitStack() as kept:
        yield functools.cache(lambda whose: kept.enter_context(nodes("shop", whose, tmp_path_factory.mktemp("shop"))))


@pytest.fixture(params=ZTUNNELS)
def whose(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def client(whose: str, servers: Callable[[str], tuple[Node, Node, Path]]) -> Iterator[OwnClient]:
    """The ztunnel is the server."""
    with contextlib.ExitStack() as made:
        yield OwnClient(*servers(whose), made)


@pytest.fixture
def server(whose: str, tmp_path: Path) -> Iterator[OwnServer]:
    """The ztunnel is the client, and begins without a session."""
    with nodes("web", whose, tmp_path) as parts, contextlib.ExitStack() as made:
        yield OwnServer(*parts, made)


@pytest.fixture(params=["client", "server"])
def own(request: pytest.FixtureRequest, whose: str) -> Own:
    """Either way round."""
    end: Own = request.getfixturevalue(request.param)
    return end


def opened(own: Own, *fields: tuple[str, str], **options: object) -> tuple[Http2Peer, Stream, socket.socket]:
    """(a session, its first stream, the application's end)."""
    if isinstance(own, OwnServer):
        return own.first(*fields, **options)
    peer = own.session(**options)
    return peer, *own.stream(peer, *fields)


def works(peer: Http2Peer, stream: Stream, application: socket.socket) -> None:
    """A question and an answer pass."""
    before = len(stream.data)
    peer.send(stream, b"question")
    peer.pump(lambda: not stream.sending)
    assert application.recv(8, socket.MSG_WAITALL) == b"question"
    application.sendall(b"answer")
    peer.pump(lambda: len(stream.data) == before + 6)
    assert stream.data.endswith(b"answer")


def test_certificates_name_both_identities(client: OwnClient) -> None:
    assert identity(client.session().tls) == "spiffe://cluster.local/ns/demo/sa/shop"


def test_the_request_is_hbones(server: OwnServer) -> None:
    peer, stream, _ = server.first()
    assert identity(peer.tls) == "spiffe://cluster.local/ns/demo/sa/web"
    (block,) = stream.blocks
    assert block[0] == (":method", "CONNECT") and stream.authority == f"{PEER4}:8080"
    fields = dict(block)
    assert ":scheme" not in fields and ":path" not in fields
    assert fields["forwarded"].replace('"', "").startswith(f"for={POD4}")
    assert "k8s.namespace.name=demo" in fields["baggage"]


@pytest.mark.parametrize("chunk", [1 << 20, 1000])
def test_payload_and_half_close(own: Own, chunk: int) -> None:
    peer, stream, application = opened(own, chunk=chunk)
    with received(application) as found:
        peer.send(stream, PAYLOAD, end=True)
        peer.pump(lambda: not stream.sending)
    assert found == [PAYLOAD]
    with sent(application, PAYLOAD, end=True):
        peer.pump(lambda: stream.ended)
    assert stream.data == PAYLOAD
    peer.pump(lambda: stream.closed == 0)


def test_the_application_may_end_first(own: Own) -> None:
    peer, stream, application = opened(own)
    application.sendall(b"all")
    application.shutdown(socket.SHUT_WR)
    peer.pump(lambda: stream.ended)
    assert stream.data == b"all"
    peer.send(stream, b"late", end=True)
    peer.pump(lambda: stream.closed == 0)
    assert read_all(application) == b"late"


def test_small_frames(own: Own) -> None:
    data = bytes(range(250)) * 40
    peer, stream, application = opened(own, chunk=1)
    with received(application) as found:
        peer.send(stream, data, end=True)
        peer.pump(lambda: not stream.sending)
    assert found == [data]


def test_a_reset_passes_both_ways_and_leaves_the_session(own: Own, whose: str) -> None:
    peer, stream, application = opened(own)
    works(peer, stream, application)
    peer.reset(stream, CANCEL)
    peer.pump(lambda: stream.closed == CANCEL)
    with contextlib.suppress(ConnectionResetError):
        assert application.recv(1) == b""
        assert whose == ISTIOS  # it makes of a reset the end of a complete transfer, both ways
    stream, application = own.stream(peer)
    works(peer, stream, application)
    abort(application)
    peer.pump(lambda: stream.closed or (stream.ended and whose == ISTIOS))
    works(peer, *own.stream(peer))


def test_many_streams(own: Own) -> None:
    peer, *first = opened(own)
    pairs = [tuple(first), *(own.stream(peer) for _ in range(99))]
    for number, (stream, application) in enumerate(pairs):
        peer.send(stream, b"%03d" % number * 1000)
        application.sendall(b"%03d" % number * 2000)
    peer.pump(lambda: all(len(stream.data) == 6000 and not stream.sending for stream, _ in pairs))
    for number, (stream, application) in enumerate(pairs):
        assert application.recv(3000, socket.MSG_WAITALL) == b"%03d" % number * 1000
        assert stream.data == b"%03d" % number * 2000


def test_windows_are_used_up_to_the_last_byte_and_no_further(own: Own) -> None:
    peer, stream, application = opened(own, manual=True)
    with sent(application, PAYLOAD):
        peer.pump(lambda: len(stream.data) == 65_535)
        peer.idle(0.3)
        assert len(stream.data) == 65_535
        peer.consume(stream, 100)
        peer.pump(lambda: len(stream.data) == 65_635)
        peer.idle(0.3)
        assert len(stream.data) == 65_635
        peer.consume(stream, len(PAYLOAD))
        peer.pump(lambda: len(stream.data) == len(PAYLOAD))
    assert stream.data == PAYLOAD


def test_large_windows_and_frames(own: Own) -> None:
    large = {Setting.INITIAL_WINDOW_SIZE: (1 << 31) - 1, Setting.MAX_FRAME_SIZE: (1 << 24) - 1}
    peer, stream, application = opened(own, settings=large)
    peer.window((1 << 31) - 1)
    with sent(application, PAYLOAD * 4, end=True):
        peer.pump(lambda: stream.ended)
    assert stream.data == PAYLOAD * 4
    works(peer, *own.stream(peer))


def test_frames_stay_below_the_size_that_is_announced(own: Own) -> None:
    peer, stream, application = opened(own)
    with sent(application, PAYLOAD, end=True):
        peer.pump(lambda: stream.ended)
    assert max(length for kind, _, _, length in peer.frames if kind == Frame.DATA) <= 1 << 14


def test_a_window_that_becomes_negative(own: Own) -> None:
    """RFC 9113, 6.9.2: a smaller INITIAL_WINDOW_SIZE changes the windows of open streams."""
    peer, stream, application = opened(own, manual=True, settings={Setting.INITIAL_WINDOW_SIZE: 50_000})
    peer.pump(lambda: peer.acknowledged == 1)
    with sent(application, PAYLOAD[:100_000]):
        peer.pump(lambda: len(stream.data) == 50_000)
        peer.set({Setting.INITIAL_WINDOW_SIZE: 10_000})
        peer.pump(lambda: peer.acknowledged == 2)  # the window is -40,000 now
        peer.consume(stream, 40_000)
        peer.idle(0.3)
        assert len(stream.data) == 50_000
        peer.consume(stream, 1)
        peer.pump(lambda: len(stream.data) == 50_001)
        peer.set({Setting.INITIAL_WINDOW_SIZE: 20_000})  # larger: so much more at once
        peer.pump(lambda: len(stream.data) == 60_001)
        peer.idle(0.3)
        assert len(stream.data) == 60_001
        peer.consume(stream, 100_000)
        peer.pump(lambda: len(stream.data) == 100_000)
    assert stream.data == PAYLOAD[:100_000]


def test_other_settings_may_change_during_a_stream(own: Own) -> None:
    peer, stream, application = opened(own, settings={Setting.MAX_FRAME_SIZE: 1 << 20, Setting.HEADER_TABLE_SIZE: 4096})
    works(peer, stream, application)
    for count, size in enumerate((0, 100, 65_536, 4096), start=2):
        peer.set({Setting.HEADER_TABLE_SIZE: size, Setting.MAX_FRAME_SIZE: 1 << 14})
        peer.pump(lambda count=count: peer.acknowledged == count)  # type: ignore[misc]
        works(peer, *own.stream(peer))  # header blocks of both sides are decoded
    at = len(peer.frames)
    with sent(application, PAYLOAD, end=True):
        peer.pump(lambda: stream.ended)
    assert max(length for kind, _, _, length in peer.frames[at:] if kind == Frame.DATA) <= 1 << 14


def test_a_ping_is_answered_during_a_transfer(own: Own) -> None:
    peer, stream, application = opened(own)
    with sent(application, PAYLOAD, end=True):
        peer.pump(lambda: len(stream.data) > 100_000)
        peer.ping()
        peer.pump(lambda: peer.pongs == 1)
        peer.pump(lambda: stream.ended)
    assert stream.data == PAYLOAD


def test_padding_counts_against_the_windows(own: Own) -> None:
    """The padding alone is more than a window: the ztunnel must open windows for it as for payload."""
    peer, stream, application = opened(own, padding=255, chunk=10)
    data = PAYLOAD[:1_000_000]
    with received(application) as found:
        peer.send(stream, data, end=True)
        peer.pump(lambda: not stream.sending)
    assert found == [data]


def test_frames_without_a_meaning_are_ignored(own: Own) -> None:
    peer, stream, application = opened(own)
    peer.raw(Frame.PRIORITY, bytes([0, 0, 0, 0, 15]), stream=stream.number)
    peer.raw(Frame.PRIORITY, bytes([0, 0, 0, 0, 15]), stream=stream.number + 200)
    peer.raw(0xBB, b"of a later version", flags=0xFF, stream=stream.number)
    peer.raw(0x10, b"\0" * 5)
    peer.set({0x4242: 7})
    peer.pump(lambda: peer.acknowledged >= 2)
    works(peer, stream, application)


def split(data: bytes) -> bytes:
    """A HEADERS frame as three: HEADERS and two CONTINUATION, the first of which is empty."""
    if data[:3] == b"PRI" or data[3] != Frame.HEADERS:
        return data
    size, flags, stream = int.from_bytes(data[:3], "big"), data[4], data[5:9]
    assert size == len(data) - 9
    block = data[9:]

    def frame(kind: int, bits: int, payload: bytes) -> bytes:
        return len(payload).to_bytes(3, "big") + bytes([kind, bits]) + stream + payload

    end = 0x4
    return (
        frame(Frame.HEADERS, flags & ~end, block[:5])
        + frame(Frame.CONTINUATION, 0, b"")
        + frame(Frame.CONTINUATION, end, block[5:])
    )


def test_a_header_block_in_several_frames(own: Own) -> None:
    peer, stream, application = opened(own, rewrite=split)
    works(peer, stream, application)
    works(peer, *own.stream(peer))


def test_a_long_header_block(client: OwnClient) -> None:
    peer = client.session(rewrite=split)
    works(peer, *client.stream(peer, ("x-long", "abc" * 5000)))  # the ztunnel announces a limit of 16 KiB


def test_goaway_of_the_client_lets_its_streams_run_on(client: OwnClient) -> None:
    peer = client.session()
    stream, application = client.stream(peer)
    peer.leave(0)
    works(peer, stream, application)
    peer.send(stream, b"last", end=True)
    peer.pump(lambda: not stream.sending)
    assert read_all(application) == b"last"
    application.shutdown(socket.SHUT_WR)
    peer.pump(lambda: stream.closed == 0)


def test_after_goaway_of_the_server_new_streams_come_on_a_new_session(server: OwnServer) -> None:
    peer, stream, application = server.first()
    peer.leave(stream.number)
    works(peer, stream, application)
    other, *pair = server.first()
    works(other, *pair)
    works(peer, stream, application)
    assert len(peer.streams) == 1


def test_a_stream_without_an_answer_survives_its_session(server: OwnServer, whose: str) -> None:
    if whose == ISTIOS:
        pytest.skip("its connection fails")
    peer, *_ = server.first()
    again = server.dial()
    peer.pump(lambda: len(peer.streams) == 2)
    abort(peer.tls.link)
    other = server.session()
    works(other, server.answered(other, 0), again)


def test_a_session_that_ends_before_its_first_answer_is_not_made_again(server: OwnServer) -> None:
    application = server.dial()
    peer = server.session()
    peer.pump(lambda: len(peer.streams) == 1)
    abort(peer.tls.link)
    with pytest.raises(ConnectionResetError):
        application.recv(1)


@pytest.mark.parametrize("way", ["GOAWAY", "REFUSED_STREAM"])
def test_a_stream_that_was_not_processed_is_opened_again(server: OwnServer, whose: str, way: str) -> None:
    if whose == ISTIOS:
        pytest.skip("its connection fails")
    peer, stream, application = server.first()
    again = server.dial()
    peer.pump(lambda: len(peer.streams) == 2)
    if way == "GOAWAY":
        peer.leave(stream.number)
        peer.idle(0.1)
        other = server.session()
        works(other, server.answered(other, 0), again)
    else:
        peer.reset(peer.streams[max(peer.streams)], REFUSED)
        works(peer, server.answered(peer, 2), again)
    works(peer, stream, application)


def test_more_connections_than_the_server_permits_streams(server: OwnServer, whose: str) -> None:
    if whose == ISTIOS:
        pytest.skip("it waits for the end of a stream")
    few = {Setting.MAX_CONCURRENT_STREAMS: 2}
    peer, *first = server.first(settings=few)
    peer.pump(lambda: peer.acknowledged == 1)
    pairs = [tuple(first), server.stream(peer)]
    other, *third = server.first(settings=few)  # on a session of its own
    works(other, *third)
    for pair in pairs:
        works(peer, *pair)
    assert len(peer.streams) == 2


def test_interim_responses_come_before_the_answer(server: OwnServer) -> None:
    application = server.dial()
    peer = server.session()
    peer.pump(lambda: peer.streams)
    (stream,) = peer.streams.values()
    for status in ("103", "100"):
        peer.inform(stream, status)
    peer.idle(0.1)
    peer.respond(stream)
    works(peer, stream, application)


@pytest.mark.parametrize("status", ["401", "503", "302"])
def test_a_refusal_resets_the_application(server: OwnServer, status: str) -> None:
    application = server.dial()
    peer = server.session()
    peer.pump(lambda: peer.streams)
    (stream,) = peer.streams.values()
    peer.respond(stream, status)
    peer.send(stream, b"", end=True)
    peer.idle(0.1)
    application.settimeout(5)
    with contextlib.suppress(ConnectionResetError):
        assert application.recv(1) == b""
    works(peer, *server.stream(peer))


def test_a_refused_policy_is_a_status(client: OwnClient) -> None:
    peer = client.session()
    stream = peer.connect(f"{PEER4}:9000")
    peer.pump(lambda: stream.ended)
    assert stream.status == "401"
    works(peer, *client.stream(peer))
