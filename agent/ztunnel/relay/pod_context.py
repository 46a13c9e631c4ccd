# SPDX-License-Identifier: Apache-2.0
"""The context that all connections of one pod share."""

from __future__ import annotations

import socket
import time
from dataclasses import KW_ONLY, dataclass, field
from typing import NamedTuple, Protocol

from agent.core.errors import SluiceError
from agent.core.model.sockets import Endpoint
from agent.kernel.accepting import Seldom
from agent.kernel.netlink.sock_diag import SockDiag
from agent.zds.messages import Add
from agent.ztunnel.dns.dns_origin import Asked
from agent.ztunnel.relay.original_dst import Address
from agent.ztunnel.relay.poller import Deadlines, Poller
from agent.ztunnel.relay.upstream import Upstream
from agent.ztunnel.telemetry.records import Record, RecordWriter

Ends = tuple[Endpoint, Endpoint]  # local, and the destination


class RefusedError(SluiceError):
    """A connection has no way to go, or is not permitted."""


class Tunnels(Protocol):
    """HBONE, on a node that has a mesh."""

    def start(self, pod: PodContext) -> None:
        """Prepares for the pod. The other methods are for pods that have been started."""

    def outbound(
        self, pod: PodContext, client: socket.socket, source: Address, destination: Address, began: tuple[float, float]
    ) -> Address | None:
        """Returns where a captured connection goes without a tunnel; None if it has one, which owns `client` then.

        Raises RefusedError.
        """

    def inbound_plain(self, pod: PodContext, source: Address, destination: Address) -> None:
        """Raises RefusedError if a captured inbound connection without a tunnel may not pass."""

    def accept(self, pod: PodContext, client: socket.socket, peer: Address) -> None:
        """Takes over a connection to the port of HBONE, `client` being non-blocking."""

    def drain(self, pod: PodContext) -> None:
        """Lets the peers open new streams with another instance."""

    def close(self, pod: PodContext) -> None:
        """Ends all sessions of the pod."""


class MeshNames(Protocol):
    """The names of the mesh in DNS."""

    def answer(self, pod: Add, datagram: bytes) -> bytes | None:
        """Returns the answer to a query of the pod; None for the resolver that it asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """The parts that all pods share.

    `connects` and `queries` bound how long an upstream may be silent, `answered` how long a flow of DNS is kept after
    the last answer; `aged` expires when a connection is LOOK_SECONDS old (see keepalive). `share`: how many open
    connections and flows one pod may have. `tunnels` and `mesh_names` are None without a mesh: then everything goes on
    in plain, and every query to its resolver.
    """

    poller: Poller
    connects: Deadlines
    queries: Deadlines
    answered: Deadlines
    aged: Deadlines
    records: RecordWriter
    asked: Asked
    share: int
    tunnels: Tunnels | None = None
    mesh_names: MeshNames | None = None


class Live(Protocol):
    """An open connection or a pending query."""

    def abort(self) -> None:
        """Ends it now, as drained."""


class InboundLive(Live, Protocol):
    """An open inbound connection of a mesh."""

    def revoke(self, why: str) -> None:
        """Ends it, because it is not allowed any more."""


class InboundEnds(NamedTuple):
    """The properties of an inbound connection for policies; `identity` is that of mutual TLS, "" without."""

    peer: Address
    target: Address
    identity: str = ""


@dataclass(frozen=True, slots=True)
class PodContext:
    """One pod. `name` is namespace/name.

    `diag` reads its sockets; `add` is how the agent named it; `live` has its connections and pending queries;
    `connecting` the ends of ztunnel's own connections, by which it recognises one that is redirected to it, and how
    often that has happened on behalf of one application's connection. `inbound` has the inbound connections that a
    change of policies may end.
    """

    uid: str
    name: str
    _: KW_ONLY
    engine: Engine
    upstream: Upstream
    diag: SockDiag
    add: Add
    live: set[Live] = field(default_factory=set)
    connecting: dict[Ends, int] = field(default_factory=dict)
    inbound: dict[InboundLive, InboundEnds] = field(default_factory=dict)
    warnings: Seldom = field(default_factory=Seldom)

    def record(
        self,
        kind: str,
        direction: str,
        began: tuple[float, float],
        source: Address,
        destination: Address | None,
        sent: int,
        received: int,
        close: str,
        error: str,
        via: Address | None = None,
    ) -> None:
        """Records a connection or query; `began` is the result of `now` at its start."""
        self.engine.records.add(
            Record(
                started=began[0],
                kind=kind,
                direction=direction,
                pod=self.name,
                uid=self.uid,
                source=source,
                destination=destination,
                sent=sent,
                received=received,
                seconds=time.monotonic() - began[1],
                close=close,
                error=error,
                via=via,
            )
        )


def now() -> tuple[float, float]:
    """Returns (wall clock, monotonic clock): the first for times, the second for durations."""
    return time.time(), time.monotonic()
