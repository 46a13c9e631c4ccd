# SPDX-License-Identifier: Apache-2.0
"""Follows istiod: delta ADS of workloads, services and policies over one stream.

After a loss the stream begins again with the versions that are held, so only differences are sent. A resource that
cannot be used is refused by name (NACK), and the others of the same response are taken.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from grpclib.client import Channel
from grpclib.const import Cardinality, Status
from grpclib.exceptions import GRPCError, StreamTerminatedError

from agent.core.errors import ProtocolError, SluiceError
from agent.core.wire import protobuf
from agent.core.wire.protobuf import Message, embedded
from agent.ztunnel.control import grpc_channel
from agent.ztunnel.mesh import xds_messages
from agent.ztunnel.mesh.mesh_model import Authorization, Service, Workload
from agent.ztunnel.mesh.mesh_store import PART, MeshDelta
from agent.ztunnel.telemetry.traffic_metrics import Series

METHOD: Final = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"
ADDRESS: Final = "type.googleapis.com/istio.workload.Address"
AUTHORIZATION: Final = "type.googleapis.com/istio.security.Authorization"
FIRST_BACKOFF: Final = 0.01  # seconds; doubles up to LAST_BACKOFF
LAST_BACKOFF: Final = 15.0
_INVALID_ARGUMENT: Final = 3  # google.rpc.Code
# istiod ends streams on purpose, to spread its clients: this is no failure. With GOAWAY it comes as another exception
# ("Protocol error"), because a PING follows it, which h2 does not expect.
_BENIGN: Final = (Status.OK, Status.CANCELLED, Status.UNAVAILABLE, Status.DEADLINE_EXCEEDED)

log = logging.getLogger(__name__)


class Termination(Enum):
    """Why a stream ended, as the metric's label has it."""

    CONNECTION = "ConnectionError"
    ERROR = "Error"
    RECONNECT = "Reconnect"
    COMPLETE = "Complete"


@dataclass(frozen=True, slots=True)
class Node:
    """Sender of requests: `identity` is ztunnel~IP~POD.NAMESPACE~DOMAIN, `metadata` what istiod selects by."""

    identity: str
    metadata: Mapping[str, str]

    def encoded(self) -> bytes:
        fields = b"".join(
            embedded(1, protobuf.text(1, key) + embedded(2, protobuf.text(3, value)))
            for key, value in self.metadata.items()
        )
        return protobuf.text(1, self.identity) + embedded(3, fields)


@dataclass(slots=True)
class XdsCounts:
    """The client's own metrics; messages and bytes, which are those of resources alone, are by type URL."""

    terminations: dict[Termination, int] = field(default_factory=dict)
    messages: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)


class XdsClient:
    """Calls `apply` with each change. `synced` is set when both types have been answered once."""

    def __init__(
        self,
        connect: Callable[[], Channel],
        node: Node,
        metadata: Callable[[], Mapping[str, str]],
        apply: Callable[[MeshDelta], Awaitable[None]],
    ) -> None:
        """Takes `connect` and `metadata`, which are called for each stream: roots and token may have changed."""
        self._connect = connect
        self._node = node
        self._metadata = metadata
        self._apply = apply
        self._versions: dict[str, dict[str, str]] = {ADDRESS: {}, AUTHORIZATION: {}}
        self._answered: set[str] = set()
        self.synced = asyncio.Event()
        self.connected = False
        self.error = "not connected yet"
        self.counts = XdsCounts()

    async def run(self) -> None:
        """Runs until cancelled."""
        backoff = FIRST_BACKOFF
        while True:
            try:
                await self._stream()
                how = Termination.COMPLETE
                self.error = "istiod ended the stream"
            except (OSError, SluiceError, StreamTerminatedError, GRPCError) as error:
                how = self._termination(error)
                self._failed(error, how)
            self.counts.terminations[how] = self.counts.terminations.get(how, 0) + 1
            backoff = FIRST_BACKOFF if self.connected else min(backoff * 2, LAST_BACKOFF)
            self.connected = False
            await asyncio.sleep(backoff)

    def series(self) -> Series:
        """Returns the client's counts as Istio's metrics."""
        counts = self.counts
        return {
            **{
                ("istio_xds_connection_terminations", (("reason", how.value),)): count
                for how, count in counts.terminations.items()
            },
            **{("istio_xds_message", (("url", url),)): count for url, count in counts.messages.items()},
            **{("istio_xds_message_bytes", (("url", url),)): count for url, count in counts.bytes.items()},
        }

    def _termination(self, error: Exception) -> Termination:
        if isinstance(error, SluiceError) or (isinstance(error, GRPCError) and error.status not in _BENIGN):
            return Termination.ERROR
        if self.connected:
            return Termination.RECONNECT
        return Termination.ERROR if isinstance(error, GRPCError) else Termination.CONNECTION

    def _failed(self, error: Exception, how: Termination) -> None:
        why = grpc_channel.reason(error)
        if how is Termination.RECONNECT:
            log.info("istiod: the stream has ended: %s", why)
            self.error = "the stream has ended"
            return
        if why != self.error:
            log.warning("istiod: %s", why)
        self.error = why

    async def _stream(self) -> None:
        channel = self._connect()
        try:
            async with channel.request(
                METHOD, Cardinality.STREAM_STREAM, bytes, bytes, metadata=dict(self._metadata())
            ) as stream:
                for kind in (ADDRESS, AUTHORIZATION):
                    await stream.send_message(self._subscription(kind))
                async for data in stream:
                    if not self.connected:
                        self.connected = True
                        self.error = ""
                        log.info("istiod: connected")
                    await stream.send_message(await self._take(bytes(data)))
        finally:
            channel.close()

    def _subscription(self, kind: str) -> bytes:
        """Returns the first request of a type: all resources, less what is held in its current version."""
        return embedded(1, self._node.encoded()) + protobuf.text(2, kind) + protobuf.string_map(5, self._versions[kind])

    async def _take(self, data: bytes) -> bytes:
        """Applies a response and returns the answer. Raises ProtocolError if the bytes are no response."""
        response = Message(data)
        kind = response.text(4)
        if kind not in self._versions:
            raise ProtocolError(f"istiod sent the type {kind or '-'}, which was not asked for")
        self.counts.messages[kind] = self.counts.messages.get(kind, 0) + 1
        refused = await self._apply_response(kind, response.every_raw(2), response.texts(6))
        self._answered.add(kind)
        if len(self._answered) == len(self._versions):
            self.synced.set()
        answer = protobuf.text(2, kind) + protobuf.text(6, response.text(5))
        if refused:
            log.warning("istiod: %d resources refused: %s", len(refused), refused[0])
            answer += embedded(7, protobuf.number(1, _INVALID_ARGUMENT) + protobuf.text(2, "; ".join(refused)))
        return answer

    async def _apply_response(self, kind: str, resources: Iterable[bytes], removed: tuple[str, ...]) -> list[str]:
        """Applies what can be used; returns the names of the others, with reasons. Raises ProtocolError.

        Others get their turn between parts of the work: 20,000 workloads take a second to decode.
        """
        changed: list[Workload | Service] = []
        policies: dict[str, Authorization] = {}
        refused: list[str] = []
        versions = self._versions[kind]
        size = self.counts.bytes.get(kind, 0)
        for number, encoded in enumerate(resources, 1):
            if not number % PART:
                gc.freeze()  # see NodeMesh.mesh_changed
                await asyncio.sleep(0)
            resource = Message(encoded)
            name = resource.text(3)
            try:
                body = resource.message(2)
                value = body.raw(2) if body else b""
                size += len(value)
                if kind == ADDRESS:
                    changed.append(xds_messages.address(value))
                else:
                    policies[name] = xds_messages.authorization(value)
            except ProtocolError as error:
                refused.append(f"{name}: {error}")
                continue
            versions[name] = resource.text(1)
        self.counts.bytes[kind] = size
        for name in removed:
            versions.pop(name, None)
        if kind == ADDRESS:
            await self._apply(MeshDelta(changed=tuple(changed), removed=removed))
        else:
            await self._apply(MeshDelta(policies=policies, removed_policies=removed))
        return refused
