# SPDX-License-Identifier: Apache-2.0
"""Chooses an endpoint of a service for a client, by scopes, health and weight. Pure but for the given random choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum

from agent.ztunnel.mesh.mesh_model import (
    BalancingMode,
    BalancingScope,
    LoadBalancer,
    Service,
    Workload,
    WorkloadProtocol,
)
from agent.ztunnel.mesh.mesh_store import Endpoint, MeshStore

WeightedChoice = Callable[[Sequence[int]], int]  # weights, of which one is not 0, to the index of the chosen one


class Purpose(Enum):
    """Why a service is resolved: a waypoint with an application tunnel need not have the port."""

    DESTINATION = "destination"
    WAYPOINT = "waypoint"


def choose(
    store: MeshStore, client: Workload, service: Service, port: int, purpose: Purpose, weighted: WeightedChoice,
    *, forwarding: bool = False,
) -> tuple[Workload, int] | None:  # fmt: skip
    """Returns (workload, target port); None if no endpoint can take the connection.

    `forwarding`: the client is a gateway. Its endpoints are in its own network and end the inner tunnel.
    """
    if purpose is Purpose.DESTINATION and port not in service.ports:
        return None
    endpoints = [each for each in store.endpoints(service) if _usable(each, client, service, port, purpose)]
    if forwarding:
        endpoints = [each for each in endpoints if _ends_tunnel(each.workload, client)]
    balancer = service.load_balancer
    if balancer and balancer.mode not in (BalancingMode.STANDARD, BalancingMode.PASSTHROUGH):
        endpoints = _nearest(endpoints, client, balancer)
    weights = [endpoint.workload.capacity for endpoint in endpoints]
    if not any(weights):
        return None
    chosen = endpoints[weighted(weights)]
    target = chosen.ports.get(port) or service.ports.get(port, 0)
    if not target:
        tunnel = chosen.workload.application_tunnel
        if not tunnel or not tunnel.port:
            return None
        target = port
    return chosen.workload, target


def _usable(endpoint: Endpoint, client: Workload, service: Service, port: int, purpose: Purpose) -> bool:
    workload = endpoint.workload
    remote = workload.network != client.network and workload.network_gateway is not None
    if not workload.addresses and not workload.hostname and not remote:
        return False
    if purpose is Purpose.DESTINATION:
        return bool(service.ports.get(port)) or port in endpoint.ports
    return port in service.ports or workload.application_tunnel is not None


def _ends_tunnel(workload: Workload, gateway: Workload) -> bool:
    return workload.network == gateway.network and workload.protocol is WorkloadProtocol.HBONE


def _nearest(endpoints: list[Endpoint], client: Workload, balancer: LoadBalancer) -> list[Endpoint]:
    ranked = [(_rank(endpoint.workload, client, balancer.scopes), endpoint) for endpoint in endpoints]
    if balancer.mode is BalancingMode.STRICT:
        ranked = [(rank, endpoint) for rank, endpoint in ranked if rank[0] == len(balancer.scopes)]
    most = max((sum(rank) for rank, _ in ranked), default=0)
    return [endpoint for rank, endpoint in ranked if sum(rank) == most]


def _rank(workload: Workload, client: Workload, scopes: Sequence[BalancingScope]) -> tuple[int, int]:
    """Returns (leading scopes that match, extra).

    When the network is the first scope, any endpoint of the client's network is better than all others, and the further
    scopes order the endpoints of other networks, too.
    """
    matched = 0
    extra = 0
    for scope in scopes:
        same = _shares(workload, client, scope)
        if scope is BalancingScope.NETWORK and scopes[0] is BalancingScope.NETWORK:
            if not same:
                continue
            extra = len(scopes) - 1
        if not same:
            break
        matched += 1
    return matched, extra


def _shares(workload: Workload, client: Workload, scope: BalancingScope) -> bool:
    match scope:
        case BalancingScope.REGION:
            return workload.locality.region == client.locality.region
        case BalancingScope.ZONE:
            return workload.locality.zone == client.locality.zone
        case BalancingScope.SUBZONE:
            return workload.locality.subzone == client.locality.subzone
        case BalancingScope.NODE:
            return workload.node == client.node
        case BalancingScope.CLUSTER:
            return workload.cluster_id == client.cluster_id
        case BalancingScope.NETWORK:
            return workload.network == client.network
