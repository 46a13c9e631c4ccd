# SPDX-License-Identifier: Apache-2.0
"""Where connections go in a small mesh: specification, section 3."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest

from agent.ztunnel.mesh import authorization, baggage, routes
from agent.ztunnel.mesh.mesh_model import Workload, WorkloadProtocol
from agent.ztunnel.mesh.routes import RouteError, Transport
from agent.ztunnel.tls.spiffe import SpiffeId, parse
from tests.unit.ztunnel.mesh.meshes import store


def client() -> Workload:
    found = store().workload_of_pod("shop", "web", "web")
    assert found is not None
    return found


def route(ip: str, port: int = 80) -> routes.Route:
    return routes.outbound(store(), client(), "", "10.0.0.1", (ip, port), lambda weights: 0)


def test_a_service_goes_by_hbone_to_its_healthy_endpoint() -> None:
    found = route("10.1.0.2")
    assert (found.transport, found.address, found.authority) == (
        Transport.HBONE, ("10.0.0.2", 15008), "10.0.0.2:8080",
    )  # fmt: skip
    assert [str(one) for one in found.identities] == [
        "spiffe://cluster.local/ns/shop/sa/also",
        "spiffe://cluster.local/ns/shop/sa/db",
    ]


def test_a_workload_without_hbone_is_spoken_to_in_plain() -> None:
    assert route("10.0.0.3", 9).transport is Transport.PLAIN
    assert route("192.0.2.1").address == ("192.0.2.1", 80)


def test_a_service_without_endpoint_is_an_error_and_not_a_way_around() -> None:
    with pytest.raises(RouteError, match="no healthy upstream"):
        route("10.1.0.5")
    with pytest.raises(RouteError, match="no healthy upstream"):
        route("10.1.0.2", 81)


def test_a_waypoint_gets_the_address_that_the_client_meant() -> None:
    found = route("10.1.0.6")
    assert (found.address, found.authority) == (("10.0.0.9", 15008), "10.1.0.6:80")
    assert [one.service_account for one in found.identities] == ["gate"]


def test_another_network_is_reached_through_its_gateway_by_host_name() -> None:
    found = route("10.1.0.4")
    assert found.transport is Transport.DOUBLE_HBONE
    assert (found.address, found.authority) == (("10.0.0.9", 15008), "far.shop.svc.cluster.local:80")
    assert [one.service_account for one in found.inner_identities] == ["far"]


@pytest.mark.parametrize(
    ("host", "port", "found"),
    [
        ("db.shop.svc.cluster.local", 80, ("10.0.0.2", 15008)),
        ("guarded.shop.svc.cluster.local", 80, ("10.0.0.9", 15008)),  # its waypoint ends the inner tunnel
        ("db.shop.svc.cluster.local", 81, "no healthy upstream"),
        ("far.shop.svc.cluster.local", 80, "no healthy upstream"),  # of another network: not on from here
        ("10.0.0.2", 80, "no service has the host name"),
        ("nothing.shop.svc.cluster.local", 80, "no service has the host name"),
    ],
)
def test_a_gateway_hands_on_to_endpoints_of_its_network(host: str, port: int, found: object) -> None:
    mesh = store()
    gate = mesh.workload_of_pod("gw", "gate", "gate")
    assert gate is not None
    if isinstance(found, str):
        with pytest.raises(RouteError, match=found):
            routes.forward(mesh, gate, host, port, lambda weights: 0)
    else:
        assert routes.forward(mesh, gate, host, port, lambda weights: 0) == found


def test_a_gateway_never_hands_on_to_an_endpoint_without_hbone_or_health() -> None:
    mesh = store()
    gate = mesh.workload_of_pod("gw", "gate", "gate")
    assert gate is not None
    changes: list[dict[str, Any]] = [{"protocol": WorkloadProtocol.TCP}, {"healthy": False}]
    for change in changes:
        mesh.put_workload(replace(store().workloads["c1//v1/Pod/shop/db"], **change))
        with pytest.raises(RouteError, match="no healthy upstream"):
            routes.forward(mesh, gate, "db.shop.svc.cluster.local", 80, lambda weights: 0)


def test_inbound_takes_its_own_address_and_its_services_and_nothing_else() -> None:
    mesh = store()
    pod = mesh.workload_of_pod("shop", "db", "db")
    assert pod is not None
    assert routes.inbound(mesh, pod, "10.0.0.2", "", "10.0.0.2", 8080).address == ("10.0.0.2", 8080)
    named = routes.inbound(mesh, pod, "10.0.0.2", "", "db.shop.svc.cluster.local", 80)
    assert named.address == ("10.0.0.2", 8080)
    with pytest.raises(routes.Mismatch):
        routes.inbound(mesh, pod, "10.0.0.2", "", "10.0.0.3", 8080)
    with pytest.raises(RouteError, match="own"):
        routes.inbound(mesh, pod, "10.0.0.2", "", "10.0.0.2", 15006)
    with pytest.raises(RouteError, match="no port 81"):
        routes.inbound(mesh, pod, "10.0.0.2", "", "db.shop.svc.cluster.local", 81)


@pytest.mark.parametrize(
    ("account", "port", "allowed"), [("web", 8080, True), ("web", 22, False), ("other", 8080, False), ("", 8080, False)]
)
def test_policies_decide_by_identity_and_port(account: str, port: int, allowed: bool) -> None:
    mesh = store()
    pod = mesh.workload_of_pod("shop", "db", "db")
    assert pod is not None
    policies, unknown = mesh.policies_for(pod)
    identity = SpiffeId("cluster.local", "shop", account) if account else None
    asked = authorization.PolicyConnection(ip_address("10.0.0.1"), ip_address("10.0.0.2"), port, identity)
    assert authorization.decide(policies, asked).allowed is allowed
    assert unknown == []


def test_baggage_in_order_and_back() -> None:
    header = baggage.header(client())
    assert header == (
        "k8s.cluster.name=c1,k8s.namespace.name=shop,k8s.deployment.name=web,service.name=web,service.version=v1,"
        "cloud.region=eu,cloud.availability_zone=eu-1"
    )
    said = baggage.parse(header)
    assert (said.workload_name, said.workload_type, said.zone) == ("web", "deployment", "eu-1")


@pytest.mark.parametrize(
    "uri", ["spiffe://td/ns/a", "http://td/ns/a/sa/b", "spiffe://td/ns/a/sa/b/c", "spiffe://td/sa/a/ns/b"]
)
def test_other_uris_are_no_identity(uri: str) -> None:
    assert parse(uri) is None


def test_a_host_name_is_resolved_before_its_workload_is_reached() -> None:
    mesh = store()
    named = replace(mesh.workloads["c1//v1/Pod/shop/old"], uid="named", addresses=(), hostname="api.example.com",
                    healthy=True, services={"shop/empty.shop.svc.cluster.local": {80: 8443}})  # fmt: skip
    mesh.put_workload(named)

    def address(chosen: int = 0) -> str:
        def weighted(weights: Sequence[int]) -> int:
            return chosen if len(weights) > 1 else 0

        return routes.outbound(mesh, client(), "", "10.0.0.1", ("10.1.0.5", 80), weighted).address[0]

    with pytest.raises(routes.UnresolvedError, match=r"api\.example\.com has not been resolved") as raised:
        address()
    assert raised.value.host == "api.example.com"
    mesh.resolved["api.example.com"] = ("fd00::9", "192.0.2.1", "192.0.2.2")
    assert [address(chosen) for chosen in (0, 1)] == ["192.0.2.1", "192.0.2.2"]
    mesh.resolved["api.example.com"] = ("fd00::9",)
    assert address() == "fd00::9"
    mesh.resolved["api.example.com"] = ()
    with pytest.raises(RouteError, match=r"api\.example\.com cannot be resolved"):
        address()
