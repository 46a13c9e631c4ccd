# SPDX-License-Identifier: Apache-2.0
"""Header blocks against the library hpack as the other end."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hpack import Decoder, Encoder
from hyperframe import frame as rfc
from hypothesis import given
from hypothesis import strategies as st

from agent.ztunnel.hbone import frames, header_blocks
from agent.ztunnel.hbone.frames import ErrorCode, Frame, FrameSplitter, Http2Error
from agent.ztunnel.hbone.header_blocks import BlockReader, HeaderBlock
from agent.ztunnel.hbone.session_events import Headers

CONNECT = [(b":method", b"CONNECT"), (b":authority", b"10.0.0.1:80"), (b"baggage", b"a=b")]
FIELDS = st.lists(st.tuples(st.binary(min_size=1, max_size=300), st.binary(max_size=40_000)), max_size=5)


def split(data: bytes) -> list[Frame]:
    found = list(FrameSplitter(preface=False).split(memoryview(data)))
    assert all(isinstance(one, Frame) for one in found)
    return found  # type: ignore[return-value]


@given(FIELDS)
def test_every_block_is_read_by_hpack(fields: Headers) -> None:
    sent = [*CONNECT, *fields, (b":status", b"401"), (b":status", b"200")]
    decoder = Decoder(max_header_list_size=1 << 30)
    for start in (header_blocks.NO_TABLE, b""):
        assert list(decoder.decode(start + header_blocks.encode(sent), raw=True)) == sent


def test_a_block_is_read_by_a_peer_that_wants_no_table() -> None:
    decoder = Decoder()
    decoder.max_allowed_table_size = 0
    block = header_blocks.NO_TABLE + header_blocks.encode(CONNECT)
    assert list(decoder.decode(block, raw=True)) == CONNECT


@pytest.mark.parametrize("size", [0, 1, 100, 101, 1000])
def test_a_block_goes_out_in_frames_as_large_as_the_peer_takes(size: int) -> None:
    block = b"\0\1x" + bytes([size % 127]) + bytes(size)
    made = split(frames.headers(5, block, 100, end=True))
    assert b"".join(one.payload for one in made) == block
    assert all(len(one.payload) <= 100 and one.stream == 5 for one in made)
    assert made[0].kind == frames.HEADERS and made[0].flags & frames.END_STREAM
    assert all(one.kind == frames.CONTINUATION for one in made[1:])
    assert [bool(one.flags & frames.END_HEADERS) for one in made] == [one is made[-1] for one in made]


@given(FIELDS.filter(lambda fields: sum(len(name) + len(value) for name, value in fields) < 8000), st.booleans())
def test_blocks_of_a_peer_with_a_table_are_read(fields: Headers, ended: bool) -> None:
    reader = BlockReader(Decoder())
    encoder = Encoder()
    for stream in (1, 3):
        block = encoder.encode([*CONNECT, *fields])
        cuts = [0, len(block) // 3, len(block) // 2, len(block)]
        first, *more = (block[start:end] for start, end in pairwise(cuts))
        made: list[rfc.Frame] = [
            rfc.HeadersFrame(stream, first, pad_length=7, depends_on=9, flags=["PADDED", "PRIORITY"]),
            *(rfc.ContinuationFrame(stream, part) for part in more),
        ]
        if ended:
            made[0].flags.add("END_STREAM")
        made[-1].flags.add("END_HEADERS")
        found = [reader.add(one) for one in split(b"".join(one.serialize() for one in made))]
        assert found == [None, None, HeaderBlock(stream, [*CONNECT, *fields], ended)]


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (rfc.ContinuationFrame(1, b"\x88", flags=["END_HEADERS"]).serialize(), ErrorCode.PROTOCOL_ERROR),
        (b"\0\0\1\1\x0c\0\0\0\1\1", ErrorCode.PROTOCOL_ERROR),  # more padding than bytes
        (b"\0\0\4\1\x24\0\0\0\1abcd", ErrorCode.PROTOCOL_ERROR),  # a priority that is not whole
        (b"\0\0\0\1\x0c\0\0\0\1", ErrorCode.PROTOCOL_ERROR),  # padded, without the length of the padding
        (b"\0\0\1\1\4\0\0\0\1\xff", ErrorCode.COMPRESSION_ERROR),
        (b"\0\0\2\1\4\0\0\0\1\xbf\x80", ErrorCode.COMPRESSION_ERROR),  # an entry that does not exist
        (b"\0\x3a\x98\1\4\0\0\0\1\0\x7f" + b"\xff" * 14_998, ErrorCode.COMPRESSION_ERROR),  # an endless number
    ],
)
def test_a_block_that_cannot_be_read_ends_the_session(raw: bytes, code: ErrorCode) -> None:
    with pytest.raises(Http2Error) as raised:
        for one in split(raw):
            BlockReader(Decoder()).add(one)
    assert raised.value.code is code
    assert len(str(raised.value)) < 100  # the peer's bytes are not in it
