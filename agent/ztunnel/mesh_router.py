# SPDX-License-Identifier: Apache-2.0
"""Answers HBONE's questions from the mesh: the next hop, the header fields, and whether a connection is allowed."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address

from agent.core.model.sockets import text
from agent.kernel.accepting import Seldom
from agent.ztunnel.hbone import connect_request, proxy_protocol
from agent.ztunnel.hbone.next_hop import (
    Address,
    Admission,
    Fields,
    InboundRequest,
    InnerHop,
    NoHop,
    PlainHop,
    PodIdentity,
    TunnelHop,
)
from agent.ztunnel.mesh import authorization, baggage, routes
from agent.ztunnel.mesh.authorization import PolicyConnection, Verdict
from agent.ztunnel.mesh.mesh_model import TunnelProtocol, Workload
from agent.ztunnel.mesh.mesh_store import MeshStore
from agent.ztunnel.mesh.routes import Inbound, Mismatch, Route, RouteError, Transport, UnresolvedError
from agent.ztunnel.telemetry.response_flags import Reporter, ResponseFlag
from agent.ztunnel.telemetry.traffic_labels import Parties, Party, party
from agent.ztunnel.tls.spiffe import SpiffeId

_BAD_REQUEST, _DENIED = 400, 401
_LOOPBACK = {4: "127.0.0.1", 6: "::1"}

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSettings:
    """Settings of the decisions. `response_baggage` also decides whether a peer's baggage is read."""

    network: str = ""
    trust_domain: str = "cluster.local"
    response_baggage: bool = True
    tunnel_to_loopback: bool = True
    log_policies: bool = False


class MeshRouter:
    """Implements next_hop.Router."""

    def __init__(self, store: MeshStore, settings: RouterSettings) -> None:
        self._store = store
        self._settings = settings
        self._seldom = Seldom()

    def workload(self, pod: PodIdentity) -> Workload | None:
        """Returns the pod's workload; None until the mesh knows it."""
        return self._store.workload_of_pod(pod.namespace, pod.name, pod.service_account)

    def knows(self, pod: PodIdentity) -> bool:
        return self.workload(pod) is not None

    def identity(self, pod: PodIdentity) -> SpiffeId:
        """Returns who the pod is; see Router."""
        workload = self.workload(pod)
        domain = workload.trust_domain if workload else self._settings.trust_domain
        return SpiffeId(domain, pod.namespace, pod.service_account)

    def outbound(self, pod: PodIdentity, source: Address, destination: Address) -> PlainHop | TunnelHop | NoHop:
        """Decides about a captured connection of the pod; see Router."""
        client = self.workload(pod)
        if client is None:
            return NoHop(f"the mesh does not know {pod.namespace}/{pod.name} with account {pod.service_account}")
        try:
            route = routes.outbound(
                self._store, client, self._settings.network, source[0], (destination[0], destination[1]), _weighted
            )
        except RouteError as error:
            return NoHop(str(error), unresolved=error.host if isinstance(error, UnresolvedError) else "")
        parties = _outbound_parties(client, route, source, destination)
        if route.transport is Transport.PLAIN:
            return PlainHop(_socket_address(route.address), parties)
        fields = self._fields(client, route, source)
        inner = None
        if route.transport is Transport.DOUBLE_HBONE:
            inner = InnerHop(
                authority=route.authority,
                identities=frozenset(map(str, route.inner_identities)),
                fields=(*fields, ("x-forwarded-network", self._settings.network)),
            )
        return TunnelHop(
            address=_socket_address(route.address),
            authority=route.authority,
            source=client.identity,
            identities=frozenset(map(str, route.identities)),
            fields=fields,
            inner=inner,
            parties=parties,
        )

    def _fields(self, client: Workload, route: Route, source: Address) -> Fields:
        meant = f";host={route.service.hostname}" if route.service else ""
        trace = f"00-{os.urandom(16).hex()}-{os.urandom(8).hex()}-00"
        return (
            ("baggage", baggage.header(client)),
            ("forwarded", f'for="{text(source)}"{meant}'),
            ("traceparent", trace),
        )

    def inbound(self, request: InboundRequest) -> Admission | NoHop:
        """Decides about a stream that arrived by HBONE; see Router."""
        pod = self.workload(request.pod)
        if pod is None:
            return NoHop(f"the mesh does not know {request.pod.namespace}/{request.pod.name}")
        connect = request.connect
        try:
            target = routes.inbound(
                self._store, pod, request.local[0], self._settings.network, connect.host, connect.port
            )
        except Mismatch as error:
            return NoHop(str(error), _BAD_REQUEST)
        except RouteError as error:
            return NoHop(str(error))
        parties = self._inbound_parties(request, pod, target)
        verdict = self._verdict(pod, request.peer, target.address, request.peer_identity)
        if not verdict.allowed:
            return _denied(verdict, parties)
        fields: Fields = (("baggage", baggage.header(pod)),) if self._settings.response_baggage else ()
        address, first = self._tunnelled(request, target)
        return Admission(
            address=_socket_address(address),
            fields=fields,
            first=first,
            keep_source=address[0] not in _LOOPBACK.values(),  # from elsewhere nothing reaches a loopback address
            parties=parties,
        )

    def _inbound_parties(self, request: InboundRequest, pod: Workload, target: Inbound) -> Parties:
        connect = request.connect
        headers = connect.headers
        meant = connect_request.forwarded_host(headers.get("forwarded", ""))
        return Parties(
            reporter=Reporter.DESTINATION,
            source=self._client(request),
            destination=_known(pod),
            service=routes.meant_service(target.services, self._store, pod, target.address[1], meant),
            mutual_tls=True,
            source_address=text(request.peer),
            destination_address=text(request.local),
            hbone_target=text((connect.host, connect.port)),
            asked=meant,
            target=text(target.address),
        )

    def _client(self, request: InboundRequest) -> Party | None:
        """Returns the source: the workload with its address, unless a gateway of another network stands before it."""
        headers = request.connect.headers
        own = self._settings.network
        through_gateway = headers.get("x-forwarded-network", own).lower() != own.lower()
        workload = None if through_gateway else self._store.workload_at(own, request.peer[0])
        said = baggage.parse(headers.get("baggage", "")) if self._settings.response_baggage else None
        return party(workload, said, request.peer_identity)

    def _tunnelled(self, request: InboundRequest, target: Inbound) -> tuple[routes.Socket, bytes]:
        """Returns (address, header in front of the bytes) of an application that may want a tunnel's header."""
        if target.tunnel is None or target.tunnel.protocol is not TunnelProtocol.PROXY:
            return target.address, b""
        ip, port = target.address
        if self._settings.tunnel_to_loopback:
            ip = _LOOPBACK[ip_address(ip).version]
        header = proxy_protocol.header(request.peer, target.tunnel_target or target.address, request.peer_identity)
        return (ip, port), header

    def inbound_plain(self, pod: PodIdentity, source: Address, destination: Address) -> PlainHop | NoHop:
        """Decides about a plain inbound connection; see Router."""
        workload = self.workload(pod)
        if workload is None:
            return NoHop(f"the mesh does not know {pod.namespace}/{pod.name}")
        parties = Parties(
            reporter=Reporter.DESTINATION,
            source=party(self._store.workload_at(self._settings.network, source[0]), None, None),
            destination=_known(workload),
            service=routes.meant_service(
                self._store.services_of(workload), self._store, workload, destination[1], host=""
            ),
            mutual_tls=False,
            source_address=text(source),
            destination_address=text(destination),
            target=text(destination),
        )
        verdict = self._verdict(workload, source, (destination[0], destination[1]), None)
        return PlainHop(destination, parties) if verdict.allowed else _denied(verdict, parties)

    def _verdict(self, pod: Workload, peer: Address, target: routes.Socket, identity: SpiffeId | None) -> Verdict:
        policies, unknown = self._store.policies_for(pod)
        for name in unknown:
            self._seldom.log(f"pod {pod.namespace}/{pod.name}: policy {name} is not known")
        asked = PolicyConnection(ip_address(peer[0]), ip_address(target[0]), target[1], identity)
        verdict = authorization.decide(policies, asked)
        for name in verdict.dry_run:
            self._log(f"policy {name} would refuse (dry run)", pod, peer, identity)
        if not verdict.allowed:
            self._log(verdict.reason, pod, peer, identity)
        return verdict

    def refused_now(self, pod: PodIdentity, peer: Address, target: Address, identity: SpiffeId | None) -> str:
        """Returns why an open connection is not allowed any more, after a policy has changed; "" if it is."""
        workload = self.workload(pod)
        if workload is None:
            return ""  # the pod is about to end; its connections end with it
        verdict = self._verdict(workload, peer, (target[0], target[1]), identity)
        return "" if verdict.allowed else verdict.reason

    def _log(self, what: str, pod: Workload, peer: Address, identity: SpiffeId | None) -> None:
        level = logging.INFO if self._settings.log_policies else logging.DEBUG
        log.log(level, "pod %s/%s: %s: from %s (%s)", pod.namespace, pod.name, what, peer[0], identity or "no identity")


class GatewayRouter(MeshRouter):
    """Decides for an east-west gateway: the inner tunnel of a stream goes as it is to a workload of this network.

    Policies are left to that workload's end of the tunnel, which alone knows the client's identity and port.
    """

    def inbound(self, request: InboundRequest) -> Admission | NoHop:
        """Decides about a stream of another network; see Router."""
        gateway = self.workload(request.pod)
        if gateway is None:
            return NoHop(f"the mesh does not know {request.pod.namespace}/{request.pod.name}")
        try:
            address = routes.forward(self._store, gateway, request.connect.host, request.connect.port, _weighted)
        except RouteError as error:
            self._seldom.log(f"gateway: a stream from {request.peer[0]} was refused: {error}")
            return NoHop(str(error))
        return Admission(address=_socket_address(address), keep_source=False)

    def refused_now(self, pod: PodIdentity, peer: Address, target: Address, identity: SpiffeId | None) -> str:
        """Returns "": see the class."""
        return ""


def _outbound_parties(client: Workload, route: Route, source: Address, destination: Address) -> Parties:
    tunnelled = route.transport is not Transport.PLAIN
    next_hop = text(route.address)
    return Parties(
        reporter=Reporter.SOURCE,
        source=party(client, None, client.identity if tunnelled else None),
        destination=_known(route.workload),
        service=route.service,
        mutual_tls=tunnelled,
        source_address=text(source),
        destination_address=next_hop,
        hbone_target=route.authority,
        asked=text(destination),
        target=next_hop,
    )


def _known(workload: Workload | None) -> Party | None:
    """Returns a destination; its principal is known without a proof."""
    return party(workload, None, workload.identity) if workload else None


def _denied(verdict: Verdict, parties: Parties) -> NoHop:
    return NoHop(verdict.reason, _DENIED, ResponseFlag.DENIED, parties)


def _weighted(weights: Sequence[int]) -> int:
    return random.choices(range(len(weights)), weights)[0]


def _socket_address(address: routes.Socket) -> Address:
    return (*address, 0, 0) if ":" in address[0] else address
