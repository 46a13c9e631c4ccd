# SPDX-License-Identifier: Apache-2.0
"""HTTP/2 from any peer: nothing but Http2Error comes out of the core, cuts change nothing, and memory is bounded."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from agent.ztunnel.hbone import frames, limits
from agent.ztunnel.hbone.connect_request import parse, parse_authority
from agent.ztunnel.hbone.frames import Data, FrameSplitter, Http2Error
from agent.ztunnel.hbone.session_core import SessionCore
from agent.ztunnel.hbone.session_events import Opened

KINDS = st.integers(0, 11)
FLAGS = st.sampled_from([0, 1, 4, 5, 8, 9, 0x20, 0xFF])
STREAMS = st.sampled_from([0, 1, 2, 3, 5, 0x7FFFFFFF, 0x80000001])
REQUEST = b"\x42\x07CONNECT\x41\x0b10.0.0.1:80"  # HPACK: two literals with indexed names
HEADERS = st.sampled_from([b"", b"\x82", REQUEST, b"\xff" * 20, b"\x3f\xe1\x1f", b"\x40\x01a\x7f"])


@st.composite
def _frame(draw: st.DrawFn) -> bytes:
    kind = draw(KINDS)
    payload = draw(HEADERS) if kind in (1, 9) else draw(st.binary(max_size=40))
    length = draw(st.one_of(st.just(len(payload)), st.integers(0, (1 << 24) - 1)))
    head = length.to_bytes(3, "big") + bytes((kind, draw(FLAGS))) + draw(STREAMS).to_bytes(4, "big")
    return head + payload


STREAM = st.lists(_frame(), max_size=30).map(b"".join)


def _split(parts: list[bytes]) -> tuple[list[tuple[object, ...]], str]:
    """What the splitter gives out, parts of one DATA frame joined, and its error."""
    splitter = FrameSplitter(preface=False)
    found: list[tuple[object, ...]] = []
    payload: dict[int, bytes] = {}
    try:
        for part in parts:
            for one in splitter.split(memoryview(part)):
                if isinstance(one, Data):
                    payload[one.stream] = payload.get(one.stream, b"") + bytes(one.payload)
                    if one.ended:
                        found.append(("end", one.stream))
                else:
                    found.append(one)
    except Http2Error as error:
        return [*found, payload], error.code.name
    return [*found, payload], ""


@given(STREAM, st.lists(st.integers(0, 400), max_size=8))
@settings(max_examples=400, deadline=None)
def test_cuts_change_nothing(stream: bytes, cuts: list[int]) -> None:
    places = sorted({min(cut, len(stream)) for cut in cuts})
    parts = [stream[start:end] for start, end in zip([0, *places], [*places, len(stream)], strict=True)]
    assert _split(parts) == _split([stream])


@given(st.booleans(), st.one_of(STREAM, st.binary(max_size=400)))
@settings(max_examples=600, deadline=None)
def test_any_bytes_end_the_session_or_pass(client: bool, stream: bytes) -> None:
    core = SessionCore(client=client, now=0.0)
    if client:
        core.open([(b":method", b"CONNECT"), (b":authority", b"10.0.0.1:80")])
    data = stream if client else frames.PREFACE + stream
    try:
        for happening in core.receive(memoryview(data), 0.0):
            if isinstance(happening, Opened):
                parse(happening.headers)
                core.answer(happening.stream, [(b":status", b"400")], end=True)
    except Http2Error as error:
        core.close(error.code)
    assert sum(map(len, core.output)) < 2048 + 64 * len(stream)


@given(st.lists(_frame(), max_size=60))
@settings(max_examples=200, deadline=None)
def test_a_splitter_holds_at_most_one_frame(made: list[bytes]) -> None:
    splitter = FrameSplitter(preface=False)
    try:
        for one in made:
            for _ in splitter.split(memoryview(one)):
                pass
            assert len(splitter._partial) <= limits.MAX_HEADER_BLOCK + frames.HEADER_SIZE
    except Http2Error:
        pass


@given(st.text(max_size=60))
@settings(max_examples=500, deadline=None)
def test_any_authority_is_read_or_refused(text: str) -> None:
    found = parse_authority(text)
    assert found is None or (found[0] and 0 < found[1] < 65536)


@given(st.lists(st.tuples(st.binary(max_size=20), st.binary(max_size=20)), max_size=10))
@settings(max_examples=300, deadline=None)
def test_any_header_fields_are_read_or_refused(headers: list[tuple[bytes, bytes]]) -> None:
    parse(headers)


def test_the_examples_reach_the_streams() -> None:
    """A well-formed request passes, so the examples are not all refused at the door."""
    core = SessionCore(client=False, now=0.0)
    raw = frames.PREFACE + bytes((0, 0, len(REQUEST), 1, 4, 0, 0, 0, 1)) + REQUEST
    assert [type(one) for one in core.receive(memoryview(raw), 0.0)] == [Opened]
