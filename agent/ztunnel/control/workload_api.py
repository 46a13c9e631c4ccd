# SPDX-License-Identifier: Apache-2.0
"""Certificates from a SPIFFE agent: the Workload API over its unix socket, FetchX509SVID.

The agent pushes each new certificate itself. It knows this process by its attributes, so its entries must give this
process the identities of all pods of the node; one that it does not give is an error of that identity alone.
"""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Callable
from typing import Final

from grpclib.const import Cardinality
from grpclib.exceptions import GRPCError, StreamTerminatedError

from agent.core.errors import ProtocolError, SluiceError
from agent.core.wire.protobuf import Message
from agent.ztunnel.control import grpc_channel
from agent.ztunnel.tls.contexts import Credentials, CredentialsError
from agent.ztunnel.tls.spiffe import SpiffeId, parse

METHOD: Final = "/SpiffeWorkloadAPI/FetchX509SVID"
_METADATA: Final = {"workload.spiffe.io": "true"}
_FIRST_SECONDS: Final = 10.0  # for the agent's first answer
_BACKOFF: Final = 1.0

log = logging.getLogger(__name__)


class WorkloadApi:
    """Follows the agent; `changed` is called with each identity that has a new certificate."""

    def __init__(self, address: str, changed: Callable[[SpiffeId], None]) -> None:
        self._address = address
        self._changed = changed
        self._held: dict[SpiffeId, Credentials] = {}
        self._first = asyncio.Event()
        self.error = "the SPIFFE agent has not answered yet"

    async def run(self) -> None:
        """Runs until cancelled."""
        while True:
            try:
                await self._follow()
            except (OSError, SluiceError, GRPCError, StreamTerminatedError) as error:
                why = grpc_channel.reason(error)
                if why != self.error:
                    log.warning("SPIFFE agent: %s", why)
                self.error = why
            await asyncio.sleep(_BACKOFF)

    async def issue(self, identity: SpiffeId) -> Credentials:
        """Returns the identity's current credentials. Raises CredentialsError."""
        try:
            async with asyncio.timeout(_FIRST_SECONDS):
                await self._first.wait()
        except TimeoutError:
            raise CredentialsError(f"no certificate of {identity}: {self.error}") from None
        held = self._held.get(identity)
        if held is None:
            raise CredentialsError(f"the SPIFFE agent gives this process no certificate of {identity}")
        return held

    async def _follow(self) -> None:
        channel = grpc_channel.channel(self._address)
        try:
            async with channel.request(METHOD, Cardinality.UNARY_STREAM, bytes, bytes, metadata=_METADATA) as stream:
                await stream.send_message(b"", end=True)
                async for data in stream:
                    self._take(bytes(data))
        finally:
            channel.close()

    def _take(self, data: bytes) -> None:
        try:
            given = [_credentials(each) for each in Message(data).messages(1)]
        except ProtocolError as error:
            raise SluiceError(f"SPIFFE agent: {error}") from None
        previous = self._held
        self._held = {one.identity: one for one in given if one is not None}
        self.error = ""
        self._first.set()
        for identity, held in self._held.items():
            if previous.get(identity) != held:
                self._changed(identity)


def _credentials(message: Message) -> Credentials | None:
    """Returns the credentials of an X509SVID; None for an identity that is not in Istio's form."""
    identity = parse(message.text(1))
    if identity is None:
        return None
    return Credentials(
        identity,
        key=_pem("PRIVATE KEY", message.raw(3)),
        chain=b"".join(_pem("CERTIFICATE", part) for part in der_parts(message.raw(2))),
        roots=b"".join(_pem("CERTIFICATE", part) for part in der_parts(message.raw(4))),
    )


def der_parts(data: bytes) -> list[bytes]:
    """Splits joined DER values (X.690, 8.1). Raises ProtocolError."""
    parts = []
    at = 0
    while at < len(data):
        try:
            first = data[at + 1]
            count = first & 0x7F if first & 0x80 else 0
            length = int.from_bytes(data[at + 2 : at + 2 + count], "big") if count else first
        except IndexError:
            raise ProtocolError("certificates are cut off") from None
        end = at + 2 + count + length
        if end > len(data):
            raise ProtocolError("certificates are cut off")
        parts.append(data[at:end])
        at = end
    return parts


def _pem(label: str, der: bytes) -> bytes:
    return b"-----BEGIN %b-----\n%b-----END %b-----\n" % (label.encode(), base64.encodebytes(der), label.encode())
