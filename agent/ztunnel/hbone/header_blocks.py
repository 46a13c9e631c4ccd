# SPDX-License-Identifier: Apache-2.0
"""The header blocks of HTTP/2 frames (RFC 9113, 4.3 and 6.2; HPACK, RFC 7541). Pure.

They are written without a table and without Huffman's code, so that a block depends on nothing before it and neither
end pays for the code byte by byte in Python. They are read by the library hpack, since a peer may use both.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from hpack import Decoder, HPACKError, OversizedHeaderListError

from agent.ztunnel.hbone import frames
from agent.ztunnel.hbone.frames import ErrorCode, Frame, Http2Error
from agent.ztunnel.hbone.session_events import Headers

NO_TABLE: Final = b"\x20"  # at the start of the first block: this end has no table
_STATUS_200: Final = b"\x88"
_NAMES: Final = {b":authority": 1, b":method": 2, b":status": 8}  # of the static table
_PRIORITY_SIZE: Final = 5


def encode(headers: Headers) -> bytes:
    """Returns the fields as a block: literals without indexing."""
    block = bytearray()
    for name, value in headers:
        if (index := _NAMES.get(name)) is None:
            block.append(0)
            _add_text(block, name)
        elif name == b":status" and value == b"200":
            block += _STATUS_200
            continue
        else:
            block.append(index)
        _add_text(block, value)
    return bytes(block)


def _add_text(block: bytearray, text: bytes) -> None:
    """Adds the length as an integer with a prefix of 7 bits, and the text."""
    length = len(text)
    if length < 0x7F:
        block.append(length)
    else:
        block.append(0x7F)
        length -= 0x7F
        while length > 0x7F:
            block.append(length & 0x7F | 0x80)
            length >>= 7
        block.append(length)
    block += text


class HeaderBlock(NamedTuple):
    """A whole block. `ended`: the peer sends nothing more on the stream."""

    stream: int
    headers: Headers
    ended: bool


class BlockReader:
    """Joins and decodes the blocks of one peer. FrameSplitter has checked and bounded its frames."""

    __slots__ = ("_decoder", "_ended", "_parts")

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._parts: list[bytes] = []
        self._ended = False

    def add(self, frame: Frame) -> HeaderBlock | None:
        """Takes a HEADERS or CONTINUATION frame; returns the block once it is whole. Raises Http2Error."""
        if frame.kind == frames.HEADERS:
            self._parts = [_fragment(frame)]
            self._ended = bool(frame.flags & frames.END_STREAM)
        elif self._parts:
            self._parts.append(frame.payload)
        else:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "CONTINUATION without HEADERS")
        if not frame.flags & frames.END_HEADERS:
            return None
        block = b"".join(self._parts)
        self._parts = []
        try:
            headers = self._decoder.decode(block, raw=True)
        except OversizedHeaderListError as error:
            raise Http2Error(ErrorCode.ENHANCE_YOUR_CALM, str(error)) from None
        except (HPACKError, IndexError, TypeError) as error:
            # Its text may repeat the block, and the record of each stream would have it.
            raise Http2Error(ErrorCode.COMPRESSION_ERROR, f"a malformed header block: {type(error).__name__}") from None
        return HeaderBlock(frame.stream, list(headers), self._ended)


def _fragment(frame: Frame) -> bytes:
    """Returns what a HEADERS frame has of the block: not its padding, nor its priority."""
    payload = frame.payload
    start = bool(frame.flags & frames.PADDED) + (_PRIORITY_SIZE if frame.flags & frames.PRIORITY_FLAG else 0)
    end = len(payload) - (payload[0] if frame.flags & frames.PADDED and payload else 0)
    if start > end:
        raise Http2Error(ErrorCode.PROTOCOL_ERROR, "HEADERS with more padding than bytes")
    return payload[start:end]
