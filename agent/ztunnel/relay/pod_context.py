# SPDX-License-Identifier: Apache-2.0
"""The context that all connections of one pod share."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from agent.core.errors import SluiceError
from agent.core.model.sockets import Endpoint, is_loopback, text
from agent.kernel.accepting import Seldom
from agent.kernel.bpf.asked_resolvers import Asked
from agent.kernel.netlink.sock_diag import SockDiag
from agent.zds.messages import Add
from agent.ztunnel.relay.original_dst import Address, plain
from agent.ztunnel.relay.poller import Deadlines, Poller
from agent.ztunnel.relay.upstream import Upstream, returns_elsewhere
from agent.ztunnel.telemetry.records import Began, Record, RecordSink
from agent.ztunnel.telemetry.response_flags import Reporter, ResponseFlag

if TYPE_CHECKING:  # a node without a mesh loads none of them
    from agent.ztunnel.hbone.next_hop import PlainHop
    from agent.ztunnel.mesh.mesh_model import Workload
    from agent.ztunnel.telemetry.traffic_account import CountedConnection, TrafficAccount
    from agent.ztunnel.telemetry.traffic_labels import Parties

Ends = tuple[Endpoint, Endpoint]  # local, and the destination
# Of ztunnel's own connection to ztunnel. Once may be chance: its port has met an entry of conntrack that outlived an
# application's connection.
MOST_RETURNS = 1
SMALL_PART = 16  # one in so many of a pod's connections may wait for the mesh, and one may go to a resolver in a mesh


class RefusedError(SluiceError):
    """A connection has no way to go, or is not permitted. `parties` is None if its ends are not known.

    `unresolved`: a host name for `Tunnels.resolve`, after which the connection may have a way.
    """

    def __init__(
        self, reason: str, parties: Parties | None = None, flag: ResponseFlag = ResponseFlag.CONNECT,
        unresolved: str = "",
    ) -> None:  # fmt: skip
        super().__init__(reason)
        self.parties = parties
        self.flag = flag
        self.unresolved = unresolved


class Tunnels(Protocol):
    """HBONE, on a node that has a mesh."""

    def start(self, pod: PodContext) -> None:
        """Prepares for the pod. The other methods are for pods that have been started."""

    def hold(self, pod: PodContext, resume: Callable[[], None], drop: Callable[[], None]) -> bool:
        """Returns True if the mesh does not know the pod yet: `resume` or `drop` is called later.

        See held_connections.
        """

    def resolve(self, host: str, done: Callable[[], None]) -> None:
        """Calls `done` later, when the host name has been resolved, or cannot be."""

    def outbound(
        self, pod: PodContext, client: socket.socket, source: Address, destination: Address, began: Began
    ) -> PlainHop | None:
        """Returns where a captured connection goes without a tunnel; None if it has one, which owns `client` then.

        Raises RefusedError.
        """

    def inbound_plain(self, pod: PodContext, source: Address, destination: Address) -> PlainHop:
        """Returns where a captured inbound connection without a tunnel goes. Raises RefusedError."""

    def accept(self, pod: PodContext, client: socket.socket, peer: Address) -> None:
        """Takes over a connection to the port of HBONE, `client` being non-blocking."""

    def drain(self, pod: PodContext) -> None:
        """Lets the peers open new streams with another instance."""

    def is_notifying(self, pod: PodContext) -> bool:
        """Returns True while peers are notified of the drain, a second at most."""

    def close(self, pod: PodContext) -> None:
        """Ends all sessions of the pod."""


class MeshNames(Protocol):
    """The names of the mesh in DNS."""

    def client(self, pod: Add) -> Workload | None:
        """Returns who asks; None if the mesh does not know the pod."""

    def answer(self, client: Workload, message: bytes, question: bytes, *, udp: bool) -> bytes | None:
        """Returns the answer to a query with the question; None for the resolver that the pod asked."""


class ServedPod(Protocol):
    """A pod of this process (see pod_listener)."""

    pod: PodContext

    def stop_listening(self) -> None:
        """Stops new connections."""

    def close(self) -> None:
        """Ends it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """The parts that all pods share.

    `connects` and `queries` bound how long an upstream may be silent, `answered` how long a flow of DNS is kept after
    the last answer; `aged` expires when a connection is LOOK_SECONDS old (see keepalive). `share`: how many open
    connections and flows one pod may have. `tunnels`, `mesh_names` and `traffic` are None without a mesh: then
    everything goes on in plain and is not counted, and every query goes to its resolver. `shared`: other processes
    serve the same pods. `pods` are those that this process serves. `exhausted` logs a lack of descriptors or memory.
    """

    poller: Poller
    connects: Deadlines
    queries: Deadlines
    answered: Deadlines
    aged: Deadlines
    records: RecordSink
    asked: Asked
    share: int
    tunnels: Tunnels | None = None
    mesh_names: MeshNames | None = None
    traffic: TrafficAccount | None = None
    shared: bool = False
    pods: set[ServedPod] = field(default_factory=set)
    exhausted: Seldom = field(default_factory=Seldom)


class Live(Protocol):
    """An open connection or a pending query."""

    def abort(self) -> None:
        """Ends it now, as drained."""


class LiveConnection(Live, Protocol):
    """An open connection."""

    def moved(self) -> tuple[int, int]:
        """Returns the bytes (from its source, to it) so far."""


class InboundLive(LiveConnection, Protocol):
    """An open inbound connection of a mesh."""

    def revoke(self, why: str, flag: ResponseFlag) -> None:
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
    often that has happened on behalf of one application's connection. `dns_connections` has those of a mesh to
    resolvers, `inbound` the inbound connections that a change of policies may end, `counted` the connections that
    Istio's metrics count.
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
    dns_connections: set[Live] = field(default_factory=set)
    inbound: dict[InboundLive, InboundEnds] = field(default_factory=dict)
    counted: dict[LiveConnection, CountedConnection] = field(default_factory=dict)
    warnings: Seldom = field(default_factory=Seldom)

    def connects_to(self, destination: Address, connecting: socket.socket, returns: int = 0) -> Ends:
        """Notes a connection of ztunnel's own in `connecting`; returns its ends, with which the caller removes it.

        `returns`: how often a connection came back on behalf of which this one goes on.
        """
        ends = plain(connecting.getsockname())[:2], destination[:2]
        self.connecting[ends] = returns
        return ends

    def returns(self, accepted: socket.socket, source: Address, destination: Address) -> int:
        """Returns how often a connection came back to ztunnel; 0 if the client is not a socket of ztunnel.

        Both ends are compared, because the kernel gives one local port to several sockets. A connection that rules
        redirect within the pod arrives at a loopback address. Raises OSError.
        """
        if not is_loopback(plain(accepted.getsockname())[0]):
            return 0
        before = self.connecting.get((source[:2], destination[:2]))
        if before is None and self.engine.shared:
            before = returns_elsewhere(self.diag, source, destination)
        return 0 if before is None else before + 1

    def warn_of_loop(self, what: str) -> str:
        """Logs, now and then, that a query or connection of ztunnel came back to it; returns the text."""
        text = f"ztunnel's own {what} was redirected to ztunnel: a rule in the pod overwrites its mark"
        self.warnings.log(f"pod {self.name}: {text}")
        return text

    def count(self, connection: LiveConnection, parties: Parties | None, began: Began) -> None:
        """Counts a connection once its way is decided; `end` counts its end."""
        if self.engine.traffic is not None and parties is not None:
            self.counted[connection] = self.engine.traffic.open(parties, began, connection)

    def refuse(self, reporter: Reporter, refused: RefusedError, source: Address, destination: Address) -> None:
        """Counts and records a connection by HBONE, or a stream of one, that never became one of `live`."""
        self.record("hbone", reporter.direction, now(), source, destination, 0, 0, "refused", str(refused))
        traffic = self.engine.traffic
        if traffic is None:
            return
        if refused.parties is not None:
            traffic.refuse(refused.parties, now(), str(refused), refused.flag)
        else:
            traffic.fail(reporter, text(source), text(destination), str(refused))

    def end(
        self,
        connection: LiveConnection,
        *,
        kind: str,
        reporter: Reporter,
        began: Began,
        source: Address,
        destination: Address | None,
        close: str,
        error: str,
        note: str = "",
        flag: ResponseFlag | None = None,
        via: Address | None = None,
    ) -> None:
        """Takes a connection out of the books: counts and records its end.

        Without a flag `close` decides whether it failed. `note` is for the record alone.
        """
        self.live.discard(connection)
        self.inbound.pop(connection, None)  # type: ignore[call-overload]
        counted = self.counted.pop(connection, None)
        traffic = self.engine.traffic
        if traffic is not None:
            if counted is not None:
                traffic.close(counted, close, error, flag)
            elif error:
                traffic.fail(reporter, text(source), text(destination) if destination else "", error)
        sent, received = connection.moved()
        words = "; ".join(filter(None, (error, note)))
        self.record(kind, reporter.direction, began, source, destination, sent, received, close, words, via)

    def record(
        self,
        kind: str,
        direction: str,
        began: Began,
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


def now() -> Began:
    """Returns (wall clock, monotonic clock): the first for times, the second for durations."""
    return time.time(), time.monotonic()
