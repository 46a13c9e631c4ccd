# SPDX-License-Identifier: Apache-2.0
"""ZDS messages as protobuf bytes (package istio.workload.zds).

Repeated embedded messages merge, which is the same as parsing them joined.
Field numbers are those of docs/design/interfaces.md, "ZDS"; a message is at most MAX_MESSAGE bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from agent.core.errors import ProtocolError
from agent.core.wire import protobuf
from agent.core.wire.protobuf import embedded, text

MAX_MESSAGE: Final = 1024
VERSION: Final = 1


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
            data = protobuf.number(1, version)
        case Add(uid, name, namespace, account):
            pod = text(1, name) + text(2, namespace) + text(3, account)
            data = embedded(1, text(1, uid) + embedded(2, pod))
        case Delete(uid):
            data = embedded(2, text(2, uid))
        case SnapshotSent():
            data = embedded(3, b"")
        case Keep(uid):
            data = embedded(5, text(1, uid))
        case Ack(error):
            data = embedded(1, text(1, error))
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
    payload = b""
    for number, value in _fields(data):
        if number == wanted:
            payload = _bytes(value, f"field {number}")
    try:
        return payload.decode()
    except UnicodeDecodeError:
        raise ProtocolError(f"ZDS: field {wanted} is not UTF-8") from None


def _bytes(value: int | bytes, name: str) -> bytes:
    if isinstance(value, int):
        raise ProtocolError(f"ZDS: {name} has the wrong wire type")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    if len(data) > MAX_MESSAGE:
        raise ProtocolError(f"ZDS message of {len(data)} bytes, at most {MAX_MESSAGE} are allowed")
    try:
        yield from protobuf.fields(data)
    except ProtocolError as error:
        raise ProtocolError(f"ZDS: {error}") from None
