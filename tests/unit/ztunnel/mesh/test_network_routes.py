# SPDX-License-Identifier: Apache-2.0
"""Routes through gateways and waypoints that are given in each of the ways: specification, section 3."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agent.ztunnel.mesh import routes
from agent.ztunnel.mesh.mesh_model import (
    BalancingMode,
    BalancingScope,
    Gateway,
    LoadBalancer,
    NamespacedHostname,
    NetworkAddress,
    Service,
)
from agent.ztunnel.mesh.mesh_store import MeshStore
from agent.ztunnel.mesh.routes import RouteError, Transport
from tests.unit.ztunnel.mesh.meshes import store

GATE = NamespacedHostname("gw", "gate.gw.svc.cluster.local")
AT_GATE = Gateway(NetworkAddress("", "10.0.0.9"), 15008)


def route(mesh: MeshStore, ip: str, client: str = "shop/web", source: str = "10.0.0.1") -> routes.Route:
    return routes.outbound(mesh, mesh.workloads[f"c1//v1/Pod/{client}"], "", source, (ip, 80), lambda weights: 0)


def test_a_gateway_may_be_a_service() -> None:
    mesh = store()
    names = ("spiffe://cluster.local/ns/gw/sa/also",)
    mesh.put_service(
        Service(name="gate", namespace="gw", hostname=GATE.hostname, ports={15443: 15008}, subject_alt_names=names)
    )
    mesh.put_workload(replace(mesh.workloads["c1//v1/Pod/gw/gate"], services={str(GATE): {15443: 15008}}))
    far = mesh.workloads["c2//v1/Pod/shop/far"]
    mesh.put_workload(replace(far, network_gateway=Gateway(GATE, 15443)))
    found = route(mesh, "10.1.0.4")
    assert (found.transport, found.address) == (Transport.DOUBLE_HBONE, ("10.0.0.9", 15008))
    assert [one.service_account for one in found.identities] == ["also", "gate"]
    assert found.authority == "far.shop.svc.cluster.local:80"
    mesh.put_workload(replace(mesh.workloads["c1//v1/Pod/gw/gate"], healthy=False))
    with pytest.raises(RouteError, match="has no healthy endpoint"):
        route(mesh, "10.1.0.4")


def test_another_network_without_a_gateway_is_an_error_and_not_reached_directly() -> None:
    mesh = store()
    far = replace(mesh.workloads["c2//v1/Pod/shop/far"], network_gateway=None, addresses=("10.9.0.1",))
    mesh.put_workload(far)
    with pytest.raises(RouteError, match="network remote of far has no gateway"):
        route(mesh, "10.1.0.4")
    mesh.put_workload(replace(far, network_gateway=Gateway(GATE, 15008)))
    with pytest.raises(RouteError, match="is not known"):
        route(mesh, "10.1.0.4")


def test_a_waypoint_of_another_network_is_reached_through_its_gateway() -> None:
    mesh = store()
    mesh.put_service(replace(mesh.services["shop/guarded.shop.svc.cluster.local"], waypoint=Gateway(GATE, 15008)))
    mesh.put_service(Service(name="gate", namespace="gw", hostname=GATE.hostname, ports={15008: 15008}))
    far = mesh.workloads["c2//v1/Pod/shop/far"]
    mesh.put_workload(replace(far, services={str(GATE): {15008: 15008}}))
    found = route(mesh, "10.1.0.6")
    assert (found.transport, found.address) == (Transport.DOUBLE_HBONE, ("10.0.0.9", 15008))
    assert found.authority == "guarded.shop.svc.cluster.local:80"  # the service, not its waypoint


def test_a_workloads_waypoint_gets_only_what_was_sent_to_the_workload_itself() -> None:
    mesh = store()
    mesh.put_workload(replace(mesh.workloads["c1//v1/Pod/shop/db"], waypoint=AT_GATE))
    direct = route(mesh, "10.0.0.2")
    assert (direct.address, direct.authority) == (("10.0.0.9", 15008), "10.0.0.2:80")
    assert route(mesh, "10.1.0.2").address == ("10.0.0.2", 15008)  # by its service
    onward = route(mesh, "10.0.0.2", client="gw/gate", source="10.0.0.9")
    assert onward.address == ("10.0.0.2", 15008)  # from the waypoint
    other = route(mesh, "10.0.0.2", client="gw/gate", source="10.0.0.8")
    assert other.address == ("10.0.0.9", 15008)  # its identity alone is not enough


def test_a_gateway_prefers_what_is_near_to_itself() -> None:
    """The endpoints are those of its own network, so the load balancer of the service is the gateway's."""
    mesh = store()
    gate = replace(mesh.workloads["c1//v1/Pod/gw/gate"], node="n3")
    db = mesh.workloads["c1//v1/Pod/shop/db"]
    mesh.put_workload(replace(db, uid="near", name="near", addresses=("10.0.0.7",), node="n3"))
    service = mesh.services["shop/db.shop.svc.cluster.local"]
    balancer = LoadBalancer((BalancingScope.NODE,), BalancingMode.STRICT)
    mesh.put_service(replace(service, load_balancer=balancer))
    assert routes.forward(mesh, gate, service.hostname, 80, lambda weights: 0) == ("10.0.0.7", 15008)
