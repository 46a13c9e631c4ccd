# SPDX-License-Identifier: Apache-2.0
"""ZDS messages as protobuf bytes (package istio.workload.zds), coded here because the protobuf library costs 10 MB.

Proto3 as specified: defaults are not written, the last value of a field wins, repeated embedded messages merge
(which is the same as parsing them joined), unknown fields are skipped. Groups are refused.
Field numbers are those of docs/design/interfaces.md, "ZDS"; a message is at most MAX_MESSAGE bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from agent.core.errors import ProtocolError

MAX_MESSAGE: Final = 1024
VERSION: Final = 1
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True, slots=True)
class Hello:
    """ztunnel's first message. `version` is V1 = 1."""

    version: int = VERSION


@dataclass(frozen=True, slots=True)
class Add:
    """Asks ztunnel to take this pod; the message carries the descriptor of its network namespace."""

    uid: str
    name: str
    namespace: str
    service_account: str


@dataclass(frozen=True, slots=True)
class Keep:
    """Asks ztunnel to keep a pod as long as the agent lacks its namespace. Only before SnapshotSent."""

    uid: str


@dataclass(frozen=True, slots=True)
class Delete:
    """Says that the pod is gone or no longer enrolled."""

    uid: str


@dataclass(frozen=True, slots=True)
class SnapshotSent:
    """Says that every pod has been named: ztunnel drops all others."""


@dataclass(frozen=True, slots=True)
class Ack:
    """ztunnel's answer to one request; `error` is empty for success."""

    error: str = ""


Request = Add | Keep | Delete | SnapshotSent
Message = Hello | Request | Ack


def encode(message: Message) -> bytes:
    """Encodes the message in its outer message. Raises ProtocolError beyond MAX_MESSAGE."""
    match message:
        case Hello(version):
            data = (_key(1, _VARINT) + _varint(version)) if version else b""
        case Add(uid, name, namespace, account):
            pod = _text(1, name) + _text(2, namespace) + _text(3, account)
            data = _embedded(1, _text(1, uid) + _embedded(2, pod))
        case Delete(uid):
            data = _embedded(2, _text(2, uid))
        case SnapshotSent():
            data = _embedded(3, b"")
        case Keep(uid):
            data = _embedded(5, _text(1, uid))
        case Ack(error):
            data = _embedded(1, _text(1, error))
    if len(data) > MAX_MESSAGE:
        raise ProtocolError(f"ZDS message of {len(data)} bytes, at most {MAX_MESSAGE} are allowed")
    return data


def decode_hello(data: bytes) -> Hello:
    """Decodes a ZdsHello; the caller checks the version. Raises ProtocolError when `data` is something else."""
    version = 0
    for number, value in _fields(data):
        if number == 1:
            if not isinstance(value, int):
                raise ProtocolError("ZDS: ZdsHello.version is not a number")
            version = value & 0xFFFFFFFF
    return Hello(version)


def decode_request(data: bytes) -> Request:
    """Decodes a WorkloadRequest. Raises ProtocolError when `data` is something else or has no known payload."""
    member, body = _oneof(data, (1, 2, 3, 5), "WorkloadRequest")
    match member:
        case 1:
            fields = list(_fields(body))
            if not any(number == 2 for number, _ in fields):
                raise ProtocolError("ZDS: AddWorkload without workload_info")
            pod = b"".join(_bytes(value, "workload_info") for number, value in fields if number == 2)
            return Add(_string(body, 1), _string(pod, 1), _string(pod, 2), _string(pod, 3))
        case 2:
            return Delete(_string(body, 2))
        case 3:
            _string(body, 0)  # no field is known, but the bytes must be well formed
            return SnapshotSent()
        case _:
            return Keep(_string(body, 1))


def decode_response(data: bytes) -> Ack:
    """Decodes a WorkloadResponse. Raises ProtocolError when `data` is something else or has no ack."""
    return Ack(_string(_oneof(data, (1,), "WorkloadResponse")[1], 1))


def _oneof(data: bytes, members: tuple[int, ...], name: str) -> tuple[int, bytes]:
    """Returns (field number, joined bodies) of the member that was set last."""
    chosen = 0
    body = b""
    for number, value in _fields(data):
        if number in members:
            part = _bytes(value, f"{name} field {number}")
            body = body + part if number == chosen else part
            chosen = number
    if not chosen:
        raise ProtocolError(f"ZDS: {name} without a known payload")
    return chosen, body


def _string(data: bytes, wanted: int) -> str:
    found = b""
    for number, value in _fields(data):
        if number == wanted:
            found = _bytes(value, f"field {number}")
    try:
        return found.decode()
    except UnicodeDecodeError:
        raise ProtocolError(f"ZDS: field {wanted} is not UTF-8") from None


def _bytes(value: int | bytes, name: str) -> bytes:
    if isinstance(value, int):
        raise ProtocolError(f"ZDS: {name} has the wrong wire type")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields (number, value) of each field: an int for a varint, otherwise the raw bytes."""
    if len(data) > MAX_MESSAGE:
        raise ProtocolError(f"ZDS message of {len(data)} bytes, at most {MAX_MESSAGE} are allowed")
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        number, wire = key >> 3, key & 7
        if not 0 < number < 1 << 29:
            raise ProtocolError(f"ZDS: field number {number} is not possible")
        if wire == _VARINT:
            value, at = _read_varint(data, at)
            yield number, value
            continue
        if wire == _BYTES:
            length, at = _read_varint(data, at)
        elif wire in (_FIXED64, _FIXED32):
            length = 8 if wire == _FIXED64 else 4
        else:
            raise ProtocolError(f"ZDS: wire type {wire} in field {number}")
        if at + length > len(data):
            raise ProtocolError(f"ZDS: field {number} is cut off")
        yield number, data[at : at + length]
        at += length


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ProtocolError("ZDS: message is cut off in a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64:
                break
            return value, at
    raise ProtocolError("ZDS: number beyond 64 bits")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _key(number: int, wire: int) -> bytes:
    return _varint(number << 3 | wire)


def _embedded(number: int, body: bytes) -> bytes:
    return _key(number, _BYTES) + _varint(len(body)) + body


def _text(number: int, text: str) -> bytes:
    return _embedded(number, text.encode()) if text else b""
