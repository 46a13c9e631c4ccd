# SPDX-License-Identifier: Apache-2.0
"""CRI v1 over gRPC with grpcio alone: no generated stubs, an encoder for the few messages that are used.

Fields and numbers: k8s.io/cri-api, pkg/apis/runtime/v1/api.proto.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import grpc

# [(field number, value)]: text, bytes, a number, a message in the same form, or a mapping (map<string, string>).
Fields = Iterable[tuple[int, Any]]
Decoded = dict[int, list[Any]]  # length-delimited fields as bytes, the others as numbers


def encode(fields: Fields) -> bytes:
    out = b""
    for number, value in fields:
        if isinstance(value, Mapping):
            out += b"".join(encode([(number, [(1, key), (2, word)])]) for key, word in value.items())
        elif isinstance(value, int):
            out += _varint(number << 3) + _varint(value)
        else:
            data = value.encode() if isinstance(value, str) else value if isinstance(value, bytes) else encode(value)
            out += _varint(number << 3 | 2) + _varint(len(data)) + data
    return out


def decode(data: bytes) -> Decoded:
    """Knows varints and length-delimited fields: CRI's answers hold nothing else."""
    found: Decoded = {}
    at = 0
    while at < len(data):
        tag, at = _read(data, at)
        value: Any
        if tag & 7 == 2:
            size, at = _read(data, at)
            value, at = data[at : at + size], at + size
        else:
            value, at = _read(data, at)
        found.setdefault(tag >> 3, []).append(value)
    return found


def _varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def _read(data: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, at
        shift += 7


POD, CONTAINER, NODE = 0, 1, 2  # NamespaceMode of cri-api
SOCKET = "/run/containerd/containerd.sock"


def namespaces(*, host_network: bool = False) -> Fields:
    """NamespaceOption, as the kubelet has it by default: a PID namespace for each container."""
    return [(1, NODE if host_network else POD), (2, CONTAINER)]


def sandbox_config(
    namespace: str,
    name: str,
    uid: str,
    cgroup: str,
    *,
    attempt: int = 0,
    labels: Mapping[str, str] | None = None,
    annotations: Mapping[str, str] | None = None,
    resolver: str = "",
    host_network: bool = False,
) -> Fields:
    """PodSandboxConfig; the pod's cgroup lies below `cgroup`, under the name that the kubelet gives it."""
    linux = [(1, f"{cgroup}/pod{uid}"), (2, [(1, namespaces(host_network=host_network))])]
    return [
        (1, [(1, name), (2, uid), (3, namespace), (4, attempt)]),
        (2, "" if host_network else name),
        (4, [(1, resolver)] if resolver else []),
        (6, labels or {}),
        (7, annotations or {}),
        (8, linux),
    ]


def container_config(name: str, image: str, argv: Sequence[str], *, host_network: bool = False) -> Fields:
    """ContainerConfig: a program and its arguments, in the image as it is."""
    linux = [(2, [(3, namespaces(host_network=host_network))])]
    return [(1, [(1, name)]), (2, [(1, image)]), (3, argv[0]), *((4, word) for word in argv[1:]), (15, linux)]


class CriError(Exception):
    """What the runtime answered instead; the words are its own."""


class Cri:
    """One connection to a container runtime. Use from several threads is fine."""

    def __init__(self, socket: str) -> None:
        # The path is no valid HTTP/2 authority, and Go's server refuses one.
        self._channel = grpc.insecure_channel(f"unix://{socket}", options=[("grpc.default_authority", "localhost")])

    def call(self, method: str, fields: Fields = (), seconds: float = 60) -> Decoded:
        """Raises CriError."""
        try:
            return decode(self._method(method)(encode(fields), timeout=seconds))
        except grpc.RpcError as error:
            raise CriError(f"{method}: {error.details()}") from None

    def begin(self, method: str, fields: Fields, seconds: float = 60) -> Any:
        """As a future; its result is still to be decoded."""
        return self._method(method).future(encode(fields), timeout=seconds)

    def close(self) -> None:
        self._channel.close()

    def _method(self, name: str) -> Any:
        service = "ImageService" if "Image" in name else "RuntimeService"
        return self._channel.unary_unary(f"/runtime.v1.{service}/{name}")
