# SPDX-License-Identifier: Apache-2.0
"""One HTTP/2 session against the h2 library as the other end, and against frames that h2 would never send."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, RequestReceived, ResponseReceived, StreamEnded, StreamReset, WindowUpdated
from hpack import Encoder
from hyperframe import frame as rfc

from agent.ztunnel.hbone import frames, limits
from agent.ztunnel.hbone.frames import Data, ErrorCode, Http2Error
from agent.ztunnel.hbone.session_core import SessionCore
from agent.ztunnel.hbone.session_events import Answered, Ended, GoneAway, Happening, Opened, Reset

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


def data(stream: int, payload: bytes) -> bytes:
    return bytes(rfc.DataFrame(stream, payload).serialize())


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


def window_update(stream: int, increment: int) -> bytes:
    return bytes(rfc.WindowUpdateFrame(stream, window_increment=increment).serialize())


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


def headers(stream: int, fields: list[tuple[bytes, bytes]]) -> bytes:
    return bytes(rfc.HeadersFrame(stream, Encoder().encode(fields), flags=["END_HEADERS"]).serialize())


def test_a_server_opens_no_streams() -> None:
    pair = Pair(client=True)
    pair.open()
    with pytest.raises(Http2Error, match="the server opened the stream 2"):
        receive(pair.core, headers(2, OK))


def test_a_flood_of_headers_ends_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """Informational answers; headers on a stream that was reset."""
    monkeypatch.setattr(limits, "IDLE_FRAMES", 50)
    pair = Pair(client=True)
    stream = pair.core.open(CONNECT)
    with pytest.raises(Http2Error, match="carry no data"):
        for _ in range(60):
            receive(pair.core, headers(stream, [(b":status", b"103")]))
    pair = Pair(client=False)
    stream = pair.open()
    pair.core.reset(stream, ErrorCode.CANCEL)
    with pytest.raises(Http2Error, match="carry no data"):
        for _ in range(60):
            receive(pair.core, headers(stream, CONNECT))


def test_data_after_the_end_of_a_stream_is_an_error(pair: Pair) -> None:
    stream = pair.open()
    pair.peer.end_stream(stream)
    pair.swap()
    with pytest.raises(Http2Error, match="STREAM_CLOSED"):
        receive(pair.core, data(stream, b"x"))


@pytest.mark.parametrize("client", [True, False])
@pytest.mark.parametrize(
    "raw",
    [
        rfc.PingFrame(0, b"12345678").serialize(),
        rfc.SettingsFrame(0).serialize(),
        rfc.PriorityFrame(1, depends_on=3).serialize(),
        window_update(0, 1),
        data(1, b""),
        b"\0\0\1\xbb\0\0\0\0\0x",  # an unknown type
    ],
    ids=["ping", "settings", "priority", "window", "empty", "unknown"],
)
def test_a_flood_of_frames_that_carry_nothing_ends_the_session(
    monkeypatch: pytest.MonkeyPatch, client: bool, raw: bytes
) -> None:
    monkeypatch.setattr(limits, "IDLE_FRAMES", 200)
    pair = Pair(client=client)
    pair.open()
    with pytest.raises(Http2Error, match="ENHANCE_YOUR_CALM"):
        for _ in range(limits.IDLE_FRAMES + 1):
            receive(pair.core, raw)
            pair.core.output.clear()


def test_frames_that_carry_nothing_are_allowed_at_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "IDLE_FRAMES", 200)
    monkeypatch.setattr(limits, "IDLE_FRAMES_PER_SECOND", 50)
    pair = Pair(client=False)
    for second in range(20):
        for _ in range(50):
            receive(pair.core, window_update(0, 1), float(second))


def test_window_updates_for_bytes_that_were_sent_are_never_a_flood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "IDLE_FRAMES", 200)
    pair = Pair(client=True)
    stream = pair.open()
    for _ in range(400):
        pair.core.sent(stream, 4096)
        receive(pair.core, window_update(0, 4096) + window_update(stream, 4096))


@pytest.mark.parametrize("refused", [False, True])
def test_a_flood_of_streams_that_end_before_they_begin_ends_the_session(
    monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    monkeypatch.setattr(limits, "EARLY_ENDS", 50)
    pair = Pair(client=False)
    with pytest.raises(Http2Error, match="end before they begin"):
        for number in range(1, 2 * limits.EARLY_ENDS + 10, 2):
            pair.peer.send_headers(number, CONNECT)
            if not refused:
                pair.peer.reset_stream(number, 8)
            pair.swap()
            if refused:
                pair.core.answer(number, [(b":status", b"503")], end=True)
    assert number / 2 + 1 > limits.EARLY_ENDS


def test_many_short_streams_are_no_flood(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each one sends headers, a window, an end and perhaps a reset, which carry no data."""
    monkeypatch.setattr(limits, "EARLY_ENDS", 50)
    monkeypatch.setattr(limits, "IDLE_FRAMES", 50)
    pair = Pair(client=False)
    for _ in range(200):
        stream = pair.open()
        receive(pair.core, window_update(stream, 1))
        pair.peer.end_stream(stream)
        pair.swap()
        pair.core.end(stream)
        pair.swap()


def test_requests_with_many_fields_cost_as_many_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "IDLE_FRAMES", 50)
    pair = Pair(client=False)
    with pytest.raises(Http2Error, match="carry no data"):
        for number in (1, 3, 5):
            pair.peer.send_headers(number, [*CONNECT, *[(b"x", b"")] * 200])
            pair.swap()


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
