# SPDX-License-Identifier: Apache-2.0
"""The questions that HBONE asks the mesh for each connection, and the possible answers. Pure.

`parties` of an answer is what telemetry says of the connection; None if it is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from agent.ztunnel.hbone.connect_request import ConnectRequest
from agent.ztunnel.telemetry.response_flags import ResponseFlag
from agent.ztunnel.telemetry.traffic_labels import Parties
from agent.ztunnel.tls.spiffe import SpiffeId

Address = tuple[str, int] | tuple[str, int, int, int]  # as in original_dst
Fields = tuple[tuple[str, str], ...]  # of a header


@dataclass(frozen=True, slots=True)
class PodIdentity:
    """A pod of this node as the agent names it."""

    uid: str
    namespace: str
    name: str
    service_account: str


@dataclass(frozen=True, slots=True)
class PlainHop:
    """The connection goes on without a tunnel."""

    address: Address
    parties: Parties | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TunnelHop:
    """The connection goes through a stream to `address`.

    The peer must have one of `identities`. `inner` is set if the stream leads to a gateway (double HBONE): the CONNECT
    and the identities of the session within the stream.
    """

    address: Address
    authority: str
    source: SpiffeId
    identities: frozenset[str]
    fields: Fields = ()
    inner: InnerHop | None = None
    parties: Parties | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class InnerHop:
    """The end of a tunnel within a tunnel."""

    authority: str
    identities: frozenset[str]
    fields: Fields = ()


# By position: most have a reason alone, and some a status.
@dataclass(frozen=True, slots=True)
class NoHop:
    """There is no way, or it is not permitted. `status` is that of HTTP towards an HBONE client.

    `unresolved`: a host name; once it has been resolved, the same question has another answer.
    """

    reason: str
    status: int = 503
    flag: ResponseFlag = ResponseFlag.CONNECT
    parties: Parties | None = None
    unresolved: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class InboundRequest:
    """A CONNECT that arrived for `pod`. `local` is the address at which it arrived, `peer` the client's."""

    pod: PodIdentity
    peer: Address
    peer_identity: SpiffeId
    local: Address
    connect: ConnectRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """An inbound stream is connected to `address` in the pod; `fields` are those of the response.

    `first` is what the application gets before the stream's bytes (PROXY protocol). It sees the client's address if
    `keep_source` says so, and this host's otherwise.
    """

    address: Address
    fields: Fields = ()
    first: bytes = b""
    keep_source: bool = True
    parties: Parties | None = None


class Router(Protocol):
    """The decisions of the mesh. None of the methods waits or raises."""

    def knows(self, pod: PodIdentity) -> bool:
        """Returns False until the mesh has the pod; what it asks for can wait (see held_connections)."""

    def identity(self, pod: PodIdentity) -> SpiffeId:
        """Returns who the pod is in mutual TLS."""

    def outbound(self, pod: PodIdentity, source: Address, destination: Address) -> PlainHop | TunnelHop | NoHop:
        """Decides about a captured connection of the pod."""

    def inbound(self, request: InboundRequest) -> Admission | NoHop:
        """Decides about a stream that arrived by HBONE."""

    def inbound_plain(self, pod: PodIdentity, source: Address, destination: Address) -> PlainHop | NoHop:
        """Decides about a captured inbound connection without TLS, which goes to `destination` or nowhere."""

    def refused_now(self, pod: PodIdentity, peer: Address, target: Address, identity: SpiffeId | None) -> str:
        """Returns why an open inbound connection is not allowed any more; "" if it is."""
