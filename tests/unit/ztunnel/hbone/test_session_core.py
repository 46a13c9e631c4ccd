# SPDX-License-Identifier: Apache-2.0
"""One HTTP/2 session against the h2 library as the other end, and against frames that h2 would never send."""

from __future__ import annotations

import pytest
from h2.events import DataReceived, RequestReceived, ResponseReceived, StreamEnded, StreamReset, WindowUpdated
from hpack import Encoder
from hyperframe import frame as rfc
from support.session_pair import CONNECT, OK, Pair, data, headers, of, receive, window_update

from agent.ztunnel.hbone import frames, limits
from agent.ztunnel.hbone.frames import Data, ErrorCode, Http2Error
from agent.ztunnel.hbone.session_events import Answered, Ended, GoneAway, Opened, Reset


@pytest.fixture(params=[True, False], ids=["client", "server"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(client=request.param)


def test_a_request_and_its_answer_pass() -> None:
    client = Pair(client=True)
    stream = client.core.open(CONNECT)
    _, told = client.swap()
    (request,) = of(RequestReceived, told)
    assert [(k, v) for k, v in request.headers] == CONNECT  # type: ignore[attr-defined]
    client.peer.send_headers(stream, OK)
    assert client.swap()[0] == [Answered(stream, OK)]
    server = Pair(client=False)
    server.peer.send_headers(1, CONNECT)
    assert server.swap()[0] == [Opened(1, CONNECT)]
    server.core.answer(1, OK)
    assert of(ResponseReceived, server.swap()[1])


def test_the_settings_are_those_of_the_limits(pair: Pair) -> None:
    settings = pair.peer.remote_settings
    assert settings.initial_window_size == limits.STREAM_WINDOW
    assert settings.max_frame_size == limits.MAX_FRAME
    assert pair.peer.outbound_flow_control_window == limits.CONNECTION_WINDOW
    assert settings.max_header_list_size == 16 << 10
    if not pair.core.client:
        assert settings.max_concurrent_streams == limits.STREAMS_PER_SESSION


def test_bytes_and_ends_pass_both_ways(pair: Pair) -> None:
    stream = pair.open()
    pair.peer.send_data(stream, b"abc", end_stream=True)
    pair.send(stream, 1000)
    pair.core.end(stream)
    heard, told = pair.swap()
    assert heard == [Data(stream, memoryview(b"abc"), 3, True), Ended(stream)]
    assert sum(len(event.data) for event in of(DataReceived, told)) == 1000  # type: ignore[attr-defined]
    assert of(StreamEnded, told)
    assert pair.core.open_streams == 1  # bytes are held
    pair.core.taken(stream, 3)
    assert pair.core.open_streams == 0


def test_the_peer_gets_credit_for_what_is_taken_alone(pair: Pair) -> None:
    stream = pair.open()
    sent = 0
    while (room := min(pair.peer.local_flow_control_window(stream), 16384)) > 0:
        pair.peer.send_data(stream, bytes(room))
        sent += room
    assert sent == limits.STREAM_WINDOW
    _, told = pair.swap()
    assert not of(WindowUpdated, told)
    pair.core.taken(stream, sent // 4)
    _, told = pair.swap()
    assert sent // 4 in [event.delta for event in of(WindowUpdated, told)]  # type: ignore[attr-defined]
    assert pair.peer.local_flow_control_window(stream) == sent // 4


def test_the_peers_windows_bound_what_is_sent(pair: Pair) -> None:
    stream = pair.open()
    assert pair.core.room(stream) == 16384  # the peer's frame size
    for _ in range(4):
        pair.send(stream, min(pair.core.room(stream), 16384))
    assert pair.core.room(stream) == 0
    _, told = pair.swap()
    assert sum(len(event.data) for event in of(DataReceived, told)) == 65535  # type: ignore[attr-defined]
    pair.peer.acknowledge_received_data(65535, stream)
    pair.core.window_opened = False
    pair.swap()
    assert pair.core.window_opened and pair.core.room(stream) > 0


def test_a_new_initial_window_moves_the_windows_of_open_streams(pair: Pair) -> None:
    stream = pair.open()
    pair.send(stream, 1000)
    pair.peer.update_settings({4: 500})
    pair.swap()
    assert pair.core.room(stream) == -500
    pair.peer.update_settings({4: 5000, 5: 1 << 20})
    pair.swap()
    assert pair.core.room(stream) == 4000


def test_resets_pass_both_ways(pair: Pair) -> None:
    stream = pair.open()
    pair.peer.reset_stream(stream, 8)
    assert pair.swap()[0] == [Reset(stream, 8)]
    stream = pair.open()
    pair.core.reset(stream, ErrorCode.CANCEL)
    (reset,) = of(StreamReset, pair.swap()[1])
    assert reset.error_code == 8  # type: ignore[attr-defined]
    assert pair.core.open_streams == 0 and pair.core.room(stream) == 0


def test_what_a_reset_stream_held_is_credited_to_the_connection(pair: Pair) -> None:
    for _ in range(8):
        stream = pair.open()
        for _ in range(128):
            pair.peer.send_data(stream, bytes(16384))
        pair.swap()
        pair.core.reset(stream, ErrorCode.CANCEL)
        pair.swap()
    assert pair.peer.outbound_flow_control_window > limits.CONNECTION_WINDOW // 2


def test_bytes_that_come_after_a_reset_are_dropped_and_credited(pair: Pair) -> None:
    stream = pair.open()
    pair.core.reset(stream, ErrorCode.CANCEL)
    pair.core.output.clear()  # the peer does not know of it yet
    late = data(stream, bytes(16384))
    for _ in range(3 * limits.CONNECTION_WINDOW // 16384):
        assert receive(pair.core, late) == []


def test_a_refusal_ends_the_stream_and_drops_what_the_client_sends() -> None:
    pair = Pair(client=False)
    pair.peer.send_headers(1, CONNECT)
    pair.swap()
    pair.core.answer(1, [(b":status", b"401")], end=True)
    _, told = pair.swap()
    assert of(ResponseReceived, told) and of(StreamEnded, told)
    assert pair.core.open_streams == 0


@pytest.mark.parametrize("status", [b"200", b"401"])
def test_a_request_that_ends_at_once_is_answered(status: bytes) -> None:
    pair = Pair(client=False)
    pair.peer.send_headers(1, CONNECT, end_stream=True)
    assert pair.swap()[0] == [Opened(1, CONNECT), Ended(1)]
    pair.core.answer(1, [(b":status", status)], end=True)
    assert of(ResponseReceived, pair.swap()[1]) and pair.core.open_streams == 0


def test_goaway_lets_open_streams_go_on(pair: Pair) -> None:
    """A client's GOAWAY names the last stream of the server, which has none: its own streams are not concerned."""
    stream = pair.open()
    last, processed = (stream, stream) if pair.core.client else (0, 2**31 - 1)
    heard = receive(pair.core, frames.goaway(last, ErrorCode.NO_ERROR))
    assert heard == [GoneAway(processed, 0)] and pair.core.gone
    assert pair.core.most_streams == 0
    assert receive(pair.core, data(stream, b"abc")) == [Data(stream, memoryview(b"abc"), 3, False)]
    pair.send(stream, 5)
    pair.core.end(stream)


def test_a_client_opens_as_many_streams_as_it_pools_and_the_peer_allows() -> None:
    pair = Pair(client=True)
    assert pair.core.most_streams == limits.POOLED_STREAMS
    pair.peer.update_settings({3: 7})
    pair.swap()
    assert pair.core.most_streams == 7


def test_ping_is_answered_and_answers_are_noticed(pair: Pair) -> None:
    pair.core.ping()
    assert not pair.core.ping_answered
    pair.swap()
    assert pair.core.ping_answered


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"\0\0\4\x08\0\0\0\0\0\0\0\0\0", ErrorCode.PROTOCOL_ERROR),  # WINDOW_UPDATE of 0
        (b"\0\0\3\x08\0\0\0\0\0\0\0\1", ErrorCode.FRAME_SIZE_ERROR),
        (window_update(0, (1 << 31) - 1), ErrorCode.FLOW_CONTROL_ERROR),
        (window_update(1, (1 << 31) - 1), ErrorCode.FLOW_CONTROL_ERROR),
        (window_update(99, 1), ErrorCode.PROTOCOL_ERROR),  # an idle stream
        (data(99, b"x"), ErrorCode.PROTOCOL_ERROR),
        (data(1, bytes(1 << 20)) * 5, ErrorCode.FLOW_CONTROL_ERROR),
        (b"\0\0\4\7\0\0\0\0\0\0\0\0\0", ErrorCode.FRAME_SIZE_ERROR),  # GOAWAY
        (b"\0\0\5\4\0\0\0\0\0abcde", ErrorCode.FRAME_SIZE_ERROR),  # SETTINGS
        (b"\0\0\0\5\4\0\0\0\1", None),  # PUSH_PROMISE
        (b"\0\0\6\4\0\0\0\0\0\0\4\xff\xff\xff\xff", ErrorCode.FLOW_CONTROL_ERROR),  # SETTINGS_INITIAL_WINDOW_SIZE
    ],
)
def test_a_peer_that_breaks_the_protocol_loses_its_session(pair: Pair, raw: bytes, code: ErrorCode | None) -> None:
    assert pair.open() == 1
    with pytest.raises(Http2Error) as raised:
        receive(pair.core, raw)
    assert code in (None, raised.value.code)
    pair.core.close(raised.value.code)
    assert pair.core.output[-1] == frames.goaway(0 if pair.core.client else 1, raised.value.code)


def test_a_server_opens_no_streams() -> None:
    pair = Pair(client=True)
    pair.open()
    with pytest.raises(Http2Error, match="the server opened the stream 2"):
        receive(pair.core, headers(2, OK))


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (headers(2, CONNECT), "the client opened the stream 2"),
        (b"\0\0\1\1\4\0\0\0\0\x82", "the client opened the stream 0"),
        (headers(1, CONNECT), "in the middle of stream 1"),
        (rfc.RstStreamFrame(3, 8).serialize(), "idle stream 3"),
        (rfc.RstStreamFrame(2, 8).serialize(), "idle stream 2"),
        (b"\0\0\3\3\0\0\0\0\1abc", "RST_STREAM of another size"),
    ],
)
def test_a_client_that_breaks_the_order_of_a_stream_loses_its_session(raw: bytes, why: str) -> None:
    pair = Pair(client=False)
    assert pair.open() == 1
    with pytest.raises(Http2Error, match=why):
        receive(pair.core, raw)


def test_trailers_end_a_stream(pair: Pair) -> None:
    stream = pair.open()
    pair.peer.send_headers(stream, [(b"x", b"y")], end_stream=True)
    assert pair.swap()[0] == [Ended(stream)]
    with pytest.raises(Http2Error, match="STREAM_CLOSED"):
        receive(pair.core, headers(stream, [(b"x", b"y")]))


def test_an_informational_answer_is_none() -> None:
    pair = Pair(client=True)
    stream = pair.core.open(CONNECT)
    pair.swap()
    pair.peer.send_headers(stream, [(b":status", b"103")])
    assert pair.swap()[0] == []
    pair.peer.send_headers(stream, OK)
    assert pair.swap()[0] == [Answered(stream, OK)]


def test_what_a_client_sends_on_a_stream_that_was_reset_is_dropped() -> None:
    """Its header blocks still count for the table of both ends."""
    pair = Pair(client=False)
    stream = pair.open()
    pair.core.reset(stream, ErrorCode.CANCEL)
    pair.core.output.clear()  # the peer does not know of it yet
    pair.peer.send_headers(stream, [(b"new", b"entry")], end_stream=True)
    pair.peer.reset_stream(stream, 8)
    again = pair.peer.get_next_available_stream_id()
    pair.peer.send_headers(again, [*CONNECT, (b"new", b"entry")])
    assert pair.swap()[0] == [Opened(again, [*CONNECT, (b"new", b"entry")])]


def test_streams_of_which_bytes_are_held_do_not_count_after_their_end() -> None:
    pair = Pair(client=False)
    for _ in range(limits.STREAMS_PER_SESSION + 1):
        stream = pair.open()
        pair.peer.send_data(stream, b"held", end_stream=True)
        pair.core.end(stream)
        pair.swap()
    assert pair.core.open_streams == limits.STREAMS_PER_SESSION + 1


def test_data_after_the_end_of_a_stream_is_an_error(pair: Pair) -> None:
    stream = pair.open()
    pair.peer.end_stream(stream)
    pair.swap()
    with pytest.raises(Http2Error, match="STREAM_CLOSED"):
        receive(pair.core, data(stream, b"x"))


def test_streams_beyond_the_limit_end_the_session() -> None:
    pair = Pair(client=False)
    for _ in range(limits.STREAMS_PER_SESSION):
        pair.peer.send_headers(pair.peer.get_next_available_stream_id(), CONNECT)
    pair.swap()
    pair.peer.remote_settings.max_concurrent_streams = 1000  # a peer that forgets what it was asked
    pair.peer.remote_settings.acknowledge()
    with pytest.raises(Http2Error):
        pair.peer.send_headers(pair.peer.get_next_available_stream_id(), CONNECT)
        pair.swap()


def header_frames(fields: list[tuple[bytes, bytes]]) -> bytes:
    """HEADERS and CONTINUATION of at most 16 KiB each."""
    block = Encoder().encode(fields, huffman=False)
    parts = [block[at : at + 16384] for at in range(0, len(block), 16384)]
    made = [rfc.HeadersFrame(1, parts[0]), *(rfc.ContinuationFrame(1, part) for part in parts[1:])]
    made[-1].flags.add("END_HEADERS")
    return b"".join(one.serialize() for one in made)


@pytest.mark.parametrize("size", [limits.MAX_HEADERS, limits.MAX_HEADER_BLOCK + 1, 1 << 20])
def test_oversized_headers_end_the_session(size: int) -> None:
    core = Pair(client=False).core
    with pytest.raises(Http2Error):
        receive(core, header_frames([*CONNECT, (b"x", bytes(size))]))


def test_a_header_block_that_decodes_to_more_than_its_limit_ends_the_session() -> None:
    """A small block that names one large field of the table again and again."""
    fields = [*CONNECT, *[(b"x", b"y" * 3000)] * 100]
    block = header_frames(fields)
    assert len(block) < 4000
    with pytest.raises(Http2Error):
        receive(Pair(client=False).core, block)
