# SPDX-License-Identifier: Apache-2.0
"""Protobuf's wire format, without messages generated from a schema. Pure.

Proto3: defaults are not written, the last value of a field wins, unknown fields are skipped. Groups are refused. The
protobuf library costs the daemon 10 MB.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from agent.core.errors import ProtocolError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
Value = int | bytes


def fields(data: bytes) -> Iterator[tuple[int, Value]]:
    """Yields (number, value) of each field: an int for a varint, otherwise the raw bytes. Raises ProtocolError."""
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        number, wire = key >> 3, key & 7
        if not 0 < number < 1 << 29:
            raise ProtocolError(f"field number {number} is not possible")
        if wire == VARINT:
            value, at = _read_varint(data, at)
            yield number, value
            continue
        if wire == BYTES:
            length, at = _read_varint(data, at)
        elif wire in (FIXED64, FIXED32):
            length = 8 if wire == FIXED64 else 4
        else:
            raise ProtocolError(f"wire type {wire} in field {number}")
        if at + length > len(data):
            raise ProtocolError(f"field {number} is cut off")
        yield number, data[at : at + length]
        at += length


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ProtocolError("message is cut off in a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64:
                break
            return value, at
    raise ProtocolError("number beyond 64 bits")


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def number(field: int, value: int) -> bytes:
    """Encodes a varint field; 0 is the default and is not written."""
    return varint(field << 3 | VARINT) + varint(value) if value else b""


def embedded(field: int, body: bytes) -> bytes:
    """Encodes a field with bytes or an embedded message, even if it is empty."""
    return varint(field << 3 | BYTES) + varint(len(body)) + body


def text(field: int, value: str) -> bytes:
    """Encodes a string field; "" is the default and is not written."""
    return embedded(field, value.encode()) if value else b""


def string_map(field: int, values: Mapping[str, str]) -> bytes:
    """Encodes a map<string, string> field."""
    return b"".join(embedded(field, text(1, key) + text(2, value)) for key, value in values.items())


class Message:
    """The fields of one message by number. The accessors raise ProtocolError if a field has another type."""

    __slots__ = ("_fields",)

    def __init__(self, data: bytes) -> None:
        self._fields: dict[int, list[Value]] = {}
        for field, value in fields(data):
            self._fields.setdefault(field, []).append(value)

    def __contains__(self, field: int) -> bool:
        return field in self._fields

    def number(self, field: int) -> int:
        value = self._fields.get(field, (0,))[-1]
        if isinstance(value, bytes):
            raise ProtocolError(f"field {field} is no number")
        return value

    def raw(self, field: int) -> bytes:
        """Returns bytes, or an embedded message: parts of one message are joined, which merges them."""
        return b"".join(self.every_raw(field))

    def every_raw(self, field: int) -> list[bytes]:
        values = self._fields.get(field, [])
        return [_bytes(field, value) for value in values]

    def text(self, field: int) -> str:
        values = self.every_raw(field)
        return _decoded(field, values[-1]) if values else ""

    def texts(self, field: int) -> tuple[str, ...]:
        return tuple(_decoded(field, value) for value in self.every_raw(field))

    def message(self, field: int) -> Message | None:
        return Message(self.raw(field)) if field in self._fields else None

    def messages(self, field: int) -> list[Message]:
        return [Message(value) for value in self.every_raw(field)]

    def numbers(self, field: int) -> tuple[int, ...]:
        """Returns a repeated number, packed or not."""
        return tuple(self._numbers(self._fields.get(field, ())))

    @staticmethod
    def _numbers(values: Iterable[Value]) -> Iterator[int]:
        for value in values:
            if isinstance(value, int):
                yield value
                continue
            at = 0
            while at < len(value):
                each, at = _read_varint(value, at)
                yield each


def _bytes(field: int, value: Value) -> bytes:
    if isinstance(value, int):
        raise ProtocolError(f"field {field} has the wrong wire type")
    return value


def _decoded(field: int, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise ProtocolError(f"field {field} is not UTF-8") from None
