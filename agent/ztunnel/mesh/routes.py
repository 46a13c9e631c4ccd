# SPDX-License-Identifier: Apache-2.0
"""Decides the route of a connection: outbound, inbound to a port of the pod, at a gateway to a workload. Pure.

The outbound decision has the order of Istio's ztunnel: the waypoint of the service, an endpoint of the service or the
workload with the address, the gateway of its network, the waypoint of the workload, the workload itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from enum import Enum
from ipaddress import ip_address
from typing import Final

from agent.core import names
from agent.core.errors import SluiceError
from agent.core.model.sockets import text
from agent.ztunnel.mesh.load_balancing import Purpose, WeightedChoice, choose
from agent.ztunnel.mesh.mesh_model import (
    ApplicationTunnel,
    BalancingMode,
    Gateway,
    IpFamilies,
    NetworkAddress,
    Service,
    Workload,
    WorkloadProtocol,
)
from agent.ztunnel.mesh.mesh_store import MeshStore
from agent.ztunnel.tls.spiffe import SpiffeId, parse

# The last one is that of SOCKS, which Istio's ztunnel may serve.
OWN_PORTS: Final = frozenset((names.OUTBOUND_PORT, names.INBOUND_PORT, names.HBONE_PORT, 15080))
Socket = tuple[str, int]  # address in canonical form, port


class RouteError(SluiceError):
    """There is no way to the destination; the text says why."""


class UnresolvedError(RouteError):
    """The route is known when the `host` name of a workload has been resolved."""

    def __init__(self, host: str) -> None:
        super().__init__(f"host name {host} has not been resolved yet")
        self.host = host


class Transport(Enum):
    """Transport of the bytes."""

    PLAIN = "plain"
    HBONE = "hbone"
    DOUBLE_HBONE = "double-hbone"  # HBONE to a gateway, and in it HBONE to the destination


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """The next hop of an outbound connection.

    `authority` is what CONNECT asks for; `identities` are those that the next hop may have, `inner_identities`
    those of the end of the inner tunnel. `workload` is the next hop if it is known, `service` what the client meant.
    """

    transport: Transport
    address: Socket
    authority: str = ""
    identities: tuple[SpiffeId, ...] = ()
    inner_identities: tuple[SpiffeId, ...] = ()
    workload: Workload | None = None
    service: Service | None = None


def outbound(
    store: MeshStore, client: Workload, network: str, source_ip: str, target: Socket, weighted: WeightedChoice
) -> Route:
    """Returns the route of a connection that `client` opens to `target`.

    `network` is that of this node, `source_ip` the client's address. Raises RouteError.
    """
    return _Outbound(store, client, target, weighted).route(network, source_ip)


@dataclass(frozen=True, slots=True)
class _Upstream:
    workload: Workload
    ip: str  # "" if it has none in this network
    port: int
    service: Service | None

    @property
    def identities(self) -> tuple[SpiffeId, ...]:
        return (*_service_identities(self.service), self.workload.identity)


@dataclass(frozen=True, slots=True)
class _Outbound:
    store: MeshStore
    client: Workload
    target: Socket
    weighted: WeightedChoice
    _: KW_ONLY
    forwarding: bool = False

    def forward(self, service: Service) -> Socket:
        """Returns where the client, a gateway, hands on the inner tunnel."""
        if reference := self._waypoint_of(service):
            return _reachable(self._gateway(reference, Purpose.WAYPOINT))
        upstream = self._endpoint(service, self.target, Purpose.DESTINATION)
        if upstream is None:
            raise RouteError(f"no healthy upstream for {service.hostname}, port {self.target[1]}, in this network")
        return _reachable(upstream)[0], names.HBONE_PORT

    def route(self, network: str, source_ip: str) -> Route:
        service = self.store.service_at(network, self.target[0], self.client.namespace)
        if service and (reference := self._waypoint_of(service)):
            waypoint = self._gateway(reference, Purpose.WAYPOINT)
            if waypoint.workload.network != self.client.network:
                return self._through_gateway(waypoint, service)
            return self._to_waypoint(waypoint, service)
        upstream = self._upstream(service, network)
        if upstream is None:
            if service and not _passes_through(service):
                raise RouteError(f"no healthy upstream for {service.hostname}, port {self.target[1]}")
            return Route(transport=Transport.PLAIN, address=self.target)
        if upstream.workload.network != self.client.network:
            if service is None:
                raise RouteError(f"workload {upstream.workload.name} is on another network and has no service")
            return self._through_gateway(upstream, service)
        if service is None and upstream.workload.waypoint and not self._is_waypoint(upstream.workload, source_ip):
            waypoint = self._gateway(upstream.workload.waypoint, Purpose.WAYPOINT)
            return self._to_waypoint(waypoint, None)
        return self._to_workload(upstream)

    def _waypoint_of(self, service: Service) -> Gateway | None:
        weights = [weight for _, weight in service.weighted_waypoints]
        if any(weights):
            return service.weighted_waypoints[self.weighted(weights)][0]
        return service.waypoint

    def _upstream(self, service: Service | None, network: str) -> _Upstream | None:
        if service is not None:
            return None if _passes_through(service) else self._endpoint(service, self.target, Purpose.DESTINATION)
        workload = self.store.workload_at(network, self.target[0])
        return _Upstream(workload, *self.target, None) if workload else None

    def _endpoint(self, service: Service, target: Socket, purpose: Purpose) -> _Upstream | None:
        """Returns the chosen endpoint; `target` has the service's port and the family that is preferred."""
        chosen = choose(self.store, self.client, service, target[1], purpose, self.weighted, forwarding=self.forwarding)
        if chosen is None:
            return None
        workload, port = chosen
        return _Upstream(workload, self._address(workload, target[0], service.ip_families), port, service)

    def _address(self, workload: Workload, wanted: str, families: IpFamilies | None) -> str:
        """Returns the address to connect to: the wanted one, else one of its family; "" if it has none here.

        Raises UnresolvedError, or RouteError if there is no address.
        """
        if wanted in workload.addresses:
            return wanted
        allowed = families.value if families else (4, 6)
        usable = [ip for ip in workload.addresses if ip_address(ip).version in allowed]
        if not usable and workload.hostname and workload.network_gateway is None:
            return self._resolved(workload.hostname, wanted)
        version = ip_address(wanted).version
        address = next((ip for ip in usable if ip_address(ip).version == version), usable[0] if usable else "")
        if not address and workload.network_gateway is None:
            raise RouteError(f"workload {workload.name} has no usable address")
        return address

    def _resolved(self, host: str, wanted: str) -> str:
        found = self.store.resolved.get(host)
        if found is None:
            raise UnresolvedError(host)
        version = ip_address(wanted).version
        usable = [ip for ip in found if ip_address(ip).version == version] or found
        if not usable:
            raise RouteError(f"host name {host} cannot be resolved")
        return usable[self.weighted([1] * len(usable))]

    def _gateway(self, gateway: Gateway, purpose: Purpose) -> _Upstream:
        """Returns an instance of a waypoint or gateway."""
        destination = gateway.destination
        # A gateway that is given by its address keeps that one for a client of any family.
        wanted = destination.ip if isinstance(destination, NetworkAddress) else self.target[0]
        match self.store.gateway(gateway):
            case Service() as service:
                if upstream := self._endpoint(service, (wanted, gateway.hbone_port), purpose):
                    return upstream
                raise RouteError(f"gateway {destination} has no healthy endpoint")
            case Workload() as workload:
                return _Upstream(workload, self._address(workload, wanted, None), gateway.hbone_port, None)
            case None:
                raise RouteError(f"gateway {destination} is not known")

    def _through_gateway(self, upstream: _Upstream, service: Service) -> Route:
        """Returns the route to another network; there the service is known by its host name alone."""
        if upstream.workload.network_gateway is None:
            raise RouteError(f"network {upstream.workload.network or '-'} of {upstream.workload.name} has no gateway")
        gateway = self._gateway(upstream.workload.network_gateway, Purpose.DESTINATION)
        return Route(
            transport=Transport.DOUBLE_HBONE,
            address=_reachable(gateway),
            authority=text((service.hostname, self.target[1])),
            identities=gateway.identities,
            inner_identities=_service_identities(upstream.service),
            workload=gateway.workload,
            service=service,
        )

    def _to_waypoint(self, waypoint: _Upstream, service: Service | None) -> Route:
        return Route(
            transport=Transport.HBONE,
            address=_reachable(waypoint),
            authority=text(self.target),
            identities=waypoint.identities,
            workload=waypoint.workload,
            service=service,
        )

    def _to_workload(self, upstream: _Upstream) -> Route:
        ip, port = _reachable(upstream)
        if upstream.workload.protocol is WorkloadProtocol.TCP:
            return Route(
                transport=Transport.PLAIN, address=(ip, port), workload=upstream.workload, service=upstream.service
            )
        return Route(
            transport=Transport.HBONE,
            address=(ip, names.HBONE_PORT),
            authority=text((ip, port)),
            identities=upstream.identities,
            workload=upstream.workload,
            service=upstream.service,
        )

    def _is_waypoint(self, workload: Workload, source_ip: str) -> bool:
        """Returns True if the client is the workload's waypoint, from which connections go on directly."""
        if workload.waypoint is None:
            return False
        match self.store.gateway(workload.waypoint):
            case Service() as service:
                instances = [endpoint.workload for endpoint in self.store.endpoints(service)]
            case Workload() as one:
                instances = [one]
            case None:
                instances = []
        return any(
            instance.identity == self.client.identity and source_ip in instance.addresses for instance in instances
        )


def forward(store: MeshStore, gateway: Workload, host: str, port: int, weighted: WeightedChoice) -> Socket:
    """Returns where a gateway hands on the inner tunnel of a CONNECT to `host`:`port`: where HBONE is listened for.

    Raises RouteError.
    """
    service = store.service_named(host, "")
    if service is None:
        raise RouteError(f"no service has the host name {host}")
    family = gateway.addresses[0] if gateway.addresses else "0.0.0.0"
    return _Outbound(store, gateway, (family, port), weighted, forwarding=True).forward(service)


def _passes_through(service: Service) -> bool:
    return service.load_balancer is not None and service.load_balancer.mode is BalancingMode.PASSTHROUGH


def _service_identities(service: Service | None) -> tuple[SpiffeId, ...]:
    names = map(parse, service.subject_alt_names) if service else ()
    return tuple(name for name in names if name is not None)


def _reachable(upstream: _Upstream) -> Socket:
    if not upstream.ip:
        raise RouteError(f"workload {upstream.workload.name} has no address in this network")
    return upstream.ip, upstream.port


@dataclass(frozen=True, slots=True)
class Inbound:
    """Destination of an accepted HBONE stream.

    `address` is a port of the pod. `tunnel` is set if the application wants a header, and `tunnel_target` is what it
    says. `services` are those that the client may have meant.
    """

    address: Socket
    services: tuple[Service, ...] = ()
    tunnel: ApplicationTunnel | None = None
    tunnel_target: Socket | None = None


class Mismatch(RouteError):
    """The client asks this pod for another one's address."""


def inbound(store: MeshStore, pod: Workload, local_ip: str, network: str, host: str, port: int) -> Inbound:
    """Returns where a CONNECT to `host`:`port` goes, which `pod` got at `local_ip`.

    Raises Mismatch (status 400) or RouteError (status 503).
    """
    try:
        host = str(ip_address(host))
        named = False
    except ValueError:
        named = True
    if named:
        service = store.service_named(host, pod.namespace)
        if service is None:
            raise RouteError(f"no service has the host name {host}")
        services: tuple[Service, ...] = (service,)
        endpoint = store.endpoint(service, pod)
        target_port = (endpoint.ports.get(port) if endpoint else 0) or service.ports.get(port, 0)
        if not target_port:
            raise RouteError(f"service {host} has no port {port}")
        tunnel_target = _vip(service, network, port)
    else:
        if host != local_ip and pod.application_tunnel is None and not _serves(store, pod, local_ip, network, host):
            raise Mismatch(f"CONNECT to {host} arrived at {local_ip}")
        services = tuple(store.services_of(pod))
        target_port = port
        tunnel_target = (host, port)
    if target_port in OWN_PORTS:
        raise RouteError(f"port {target_port} is one of ztunnel's own")
    tunnel = pod.application_tunnel
    if tunnel is None:
        return Inbound((local_ip, target_port), services)
    return Inbound((local_ip, tunnel.port or target_port), services, tunnel, tunnel_target)


def _serves(store: MeshStore, pod: Workload, local_ip: str, network: str, host: str) -> bool:
    """Returns True if the pod is the waypoint of the address."""
    target = store.service_at(network, host, "") or store.workload_at(network, host)
    if target is None or target.waypoint is None:
        return False
    match store.gateway(target.waypoint):
        case Service() as service:
            return store.endpoint(service, pod) is not None
        case Workload() as workload:
            return local_ip in workload.addresses
        case None:
            return False


def _vip(service: Service, network: str, port: int) -> Socket | None:
    """Returns an address of the service for a header that cannot carry a host name: this network's, IPv4 first."""
    addresses: Iterable[NetworkAddress] = sorted(
        service.addresses, key=lambda one: (one.network != network, ip_address(one.ip).version)
    )
    return next(((one.ip, port) for one in addresses), None)


def meant_service(services: Iterable[Service], store: MeshStore, pod: Workload, port: int, host: str) -> Service | None:
    """Returns the service of an inbound connection for metrics: the one that the client named, or one with the port."""
    candidates = list(services)
    for service in candidates:
        if host and service.hostname == host:
            return service
    for service in candidates:
        endpoint = store.endpoint(service, pod)
        own = endpoint.ports if endpoint else {}
        if any(target == port or own.get(front) == port for front, target in service.ports.items()):
            return service
    return None
