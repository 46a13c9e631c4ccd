# SPDX-License-Identifier: Apache-2.0
"""gRPC over grpclib with messages as bytes: they are coded by core.wire.protobuf, without generated code."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from grpclib.client import Channel
from grpclib.config import Configuration
from grpclib.const import Cardinality
from grpclib.encoding.base import CodecBase
from grpclib.exceptions import GRPCError, StreamTerminatedError

from agent.core.errors import SettingsError, SluiceError

_KEEPALIVE_SECONDS: Final = 30.0
_KEEPALIVE_TIMEOUT: Final = 10.0
_STREAM_WINDOW: Final = 4 << 20
SYSTEM_ROOTS: Final = "SYSTEM"


class ControlPlaneError(SluiceError):
    """The control plane does not answer, or refuses."""


class _Bytes(CodecBase):
    __content_subtype__ = "proto"

    def encode(self, message: Any, message_type: Any) -> bytes:
        return bytes(message)

    def decode(self, data: bytes, message_type: Any) -> bytes:
        return data


def channel(address: str, roots: str = "", other_name: str = "") -> Channel:
    """Returns a channel to https://HOST:PORT, http://HOST:PORT or unix:///PATH; it connects at the first call.

    `roots`: a path, PEM, or SYSTEM; the file is read here, so a channel has to be made again after it has changed.
    `other_name` is the name in the server's certificate if it is not HOST. Raises SettingsError or ControlPlaneError.
    """
    parts = urlsplit(address)
    config = Configuration(
        _keepalive_time=_KEEPALIVE_SECONDS,
        _keepalive_timeout=_KEEPALIVE_TIMEOUT,
        _keepalive_permit_without_calls=True,
        http2_stream_window_size=_STREAM_WINDOW,
        http2_connection_window_size=_STREAM_WINDOW,
        ssl_target_name_override=other_name or None,
    )
    if parts.scheme == "unix" and parts.path:
        return Channel(path=parts.path, codec=_Bytes(), config=config)
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if parts.scheme not in ("http", "https") or not host or not port:
        raise SettingsError(f"{address!r} is not https://HOST:PORT, http://HOST:PORT or unix:///PATH")
    context = _context(roots) if parts.scheme == "https" else None
    return Channel(host, port, codec=_Bytes(), ssl=context, config=config)


def _context(roots: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    try:
        if roots == SYSTEM_ROOTS:
            context.load_default_certs()
        else:
            pem = roots if roots.lstrip().startswith("-----BEGIN") else Path(roots).read_text("ascii")
            context.load_verify_locations(cadata=pem)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ControlPlaneError(f"root certificates {roots.partition('-----')[0] or 'PEM'}: {error}") from None
    return context


async def call(channel_: Channel, method: str, request: bytes, metadata: Mapping[str, str], seconds: float) -> bytes:
    """Calls a method with one request and one response. Raises ControlPlaneError."""
    try:
        async with channel_.request(
            method, Cardinality.UNARY_UNARY, bytes, bytes, timeout=seconds, metadata=dict(metadata)
        ) as stream:
            await stream.send_message(request, end=True)
            response = await stream.recv_message()
    except (GRPCError, StreamTerminatedError, OSError, TimeoutError) as error:
        raise ControlPlaneError(f"{method}: {reason(error)}") from None
    if response is None:
        raise ControlPlaneError(f"{method}: no response")
    return bytes(response)


def istio_metadata(headers: Mapping[str, str], cluster_id: str, token: str) -> dict[str, str]:
    """Returns the metadata of a call to istiod or its CA; what is "" is left out."""
    metadata = {**headers}
    if cluster_id:
        metadata["clusterid"] = cluster_id
    if token := token.strip():
        metadata["authorization"] = f"Bearer {token}"
    return metadata


def reason(error: BaseException) -> str:
    """Returns why a call failed, as one line."""
    if isinstance(error, GRPCError):
        return f"{error.status.name}: {error.message or 'no message'}"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)  # asyncio puts its own text in the error
    return str(error) or type(error).__name__
