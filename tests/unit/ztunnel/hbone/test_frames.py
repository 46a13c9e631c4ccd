# SPDX-License-Identifier: Apache-2.0
"""Frames are split as RFC 9113 says; the frames come from hyperframe, not from the code under test."""

from __future__ import annotations

import pytest
from hyperframe import frame as rfc

from agent.ztunnel.hbone import frames, limits
from agent.ztunnel.hbone.frames import Data, ErrorCode, Frame, FrameSplitter, Http2Error


def split(*parts: bytes, preface: bool = False) -> list[Data | Frame]:
    """The frames of `parts`, each of which arrives by itself; payloads are copied."""
    splitter = FrameSplitter(preface=preface)
    found: list[Data | Frame] = []
    for part in parts:
        for one in splitter.split(memoryview(part)):
            found.append(one._replace(payload=memoryview(bytes(one.payload))) if isinstance(one, Data) else one)
    return found


def data(stream: int, payload: bytes, *, pad: int | None = None, end: bool = False) -> bytes:
    made = rfc.DataFrame(stream, payload, pad_length=pad or 0)
    if pad is not None:
        made.flags.add("PADDED")
    if end:
        made.flags.add("END_STREAM")
    return bytes(made.serialize())


def headers(stream: int, block: bytes, *, end: bool = True) -> bytes:
    made = rfc.HeadersFrame(stream, block)
    if end:
        made.flags.add("END_HEADERS")
    return bytes(made.serialize())


def code_of(*parts: bytes, preface: bool = False) -> ErrorCode:
    with pytest.raises(Http2Error) as raised:
        split(*parts, preface=preface)
    return raised.value.code


def test_data_is_handed_on_as_it_arrives() -> None:
    raw = data(5, b"abcdef", end=True)
    assert split(raw[:11], raw[11:]) == [Data(5, memoryview(b"ab"), 2, False), Data(5, memoryview(b"cdef"), 4, True)]


def test_each_way_to_cut_the_bytes_gives_the_same_frames() -> None:
    raw = (
        data(1, b"abc")
        + headers(3, b"block")
        + data(1, b"xyz", pad=4, end=True)
        + rfc.PingFrame(0, b"12345678").serialize()
    )
    whole = _joined(split(raw))
    for at in range(1, len(raw)):
        assert _joined(split(raw[:at], raw[at:])) == whole
    assert _joined(split(*(raw[at : at + 1] for at in range(len(raw))))) == whole
    assert whole == [("data", 1, b"abc", 3, False), ("frame", headers(3, b"block")), ("data", 1, b"xyz", 8, True),
                     ("frame", rfc.PingFrame(0, b"12345678").serialize())]  # fmt: skip


def _joined(found: list[Data | Frame]) -> list[tuple[object, ...]]:
    """Neighbouring parts of one stream's DATA as one."""
    made: list[tuple[object, ...]] = []
    for one in found:
        if isinstance(one, Frame):
            made.append(("frame", one.raw))
        elif made and made[-1][:2] == ("data", one.stream) and not made[-1][4]:
            _, _, payload, charged, _ = made[-1]
            assert isinstance(payload, bytes) and isinstance(charged, int)
            made[-1] = ("data", one.stream, payload + bytes(one.payload), charged + one.charged, one.ended)
        else:
            made.append(("data", one.stream, bytes(one.payload), one.charged, one.ended))
    return made


def test_padding_is_charged_and_not_handed_on() -> None:
    found = split(data(1, b"abc", pad=200, end=True))
    assert b"".join(bytes(one.payload) for one in found if isinstance(one, Data)) == b"abc"
    assert sum(one.charged for one in found if isinstance(one, Data)) == 3 + 200 + 1
    assert [one.ended for one in found if isinstance(one, Data)][-1]


@pytest.mark.parametrize("pad", [None, 0, 1])
def test_empty_data_can_end_a_stream(pad: int | None) -> None:
    found = split(data(1, b"", pad=pad, end=True))
    assert [one.ended for one in found if isinstance(one, Data)][-1]
    assert sum(one.charged for one in found if isinstance(one, Data)) == (0 if pad is None else 1 + pad)


def test_a_client_sends_the_preface() -> None:
    ping = rfc.PingFrame(0, b"12345678").serialize()
    assert split(frames.PREFACE[:5], frames.PREFACE[5:] + ping, preface=True) == [Frame(frames.PING, 0, 0, ping)]
    assert code_of(b"GET / HTTP/1.1\r\n", preface=True) is ErrorCode.PROTOCOL_ERROR
    assert code_of(b"PRI * HTTP/2.0\r\n", b"x", preface=True) is ErrorCode.PROTOCOL_ERROR


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"\xff\xff\xff\0\0\0\0\0\1", ErrorCode.FRAME_SIZE_ERROR),
        ((limits.MAX_FRAME + 1).to_bytes(3, "big") + b"\0\0\0\0\0\1", ErrorCode.FRAME_SIZE_ERROR),
        (b"\0\0\1\0\0\0\0\0\0x", ErrorCode.PROTOCOL_ERROR),
        (b"\0\0\1\0\x08\0\0\0\1\5", ErrorCode.PROTOCOL_ERROR),  # more padding than bytes
        (b"\0\0\0\0\x08\0\0\0\1\0", ErrorCode.PROTOCOL_ERROR),  # padded, without the length of the padding
        (b"\xff\xff\xff\4\0\0\0\0\0", ErrorCode.FRAME_SIZE_ERROR),  # SETTINGS of 16 MiB
        (b"\xff\xff\xff\xbb\0\0\0\0\0", ErrorCode.FRAME_SIZE_ERROR),  # an unknown type of 16 MiB
        (b"\xff\xff\xff\1\4\0\0\0\1", ErrorCode.ENHANCE_YOUR_CALM),  # HEADERS of 16 MiB
        (headers(1, b"x", end=False) + data(1, b"x"), ErrorCode.PROTOCOL_ERROR),
        (headers(1, b"x", end=False) + headers(3, b"x"), ErrorCode.PROTOCOL_ERROR),
        (headers(1, b"x", end=False) + rfc.PingFrame(0).serialize(), ErrorCode.PROTOCOL_ERROR),
    ],
)
def test_a_malformed_frame_is_refused_by_its_header(raw: bytes, code: ErrorCode) -> None:
    assert code_of(raw) is code


def test_a_header_block_is_bounded_by_size_and_frames() -> None:
    more = rfc.ContinuationFrame(1, bytes(limits.MAX_CONTROL_FRAME)).serialize()
    assert code_of(headers(1, b"x", end=False), *[more] * 4) is ErrorCode.ENHANCE_YOUR_CALM
    empty = rfc.ContinuationFrame(1, b"").serialize()
    assert code_of(headers(1, b"x", end=False), *[empty] * limits.MAX_HEADER_FRAMES) is ErrorCode.ENHANCE_YOUR_CALM


def test_frames_are_built_as_hyperframe_builds_them() -> None:
    buffer = bytearray(9)
    frames.write_data_header(buffer, 0x012345, 7)
    assert bytes(buffer) == data(7, bytes(0x012345))[:9]
    assert frames.end_of_stream(7) == data(7, b"", end=True)
    assert frames.window_update(7, 1 << 20) == rfc.WindowUpdateFrame(7, window_increment=1 << 20).serialize()
    assert frames.goaway(9, ErrorCode.CANCEL) == rfc.GoAwayFrame(0, last_stream_id=9, error_code=8).serialize()
