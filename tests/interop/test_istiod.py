# SPDX-License-Identifier: Apache-2.0
"""Our ztunnels with Istio's istiod: its CA, its mesh, changes under traffic, its restart.

Runs where SLUICE_ISTIOD names a binary of Istio's (pilot-discovery). What two ztunnels have from it is compared where
SLUICE_REAL_ZTUNNEL is set as well.
"""

from __future__ import annotations

import base64
import contextlib
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from scapy.layers.dns import DNS, DNSQR
from support.hbone import Node, joined, refused, two_nodes
from support.istio_peer import REAL
from support.istiod import ISTIOD, VIP, FedZtunnel, Istiod, custom, istiod, pod
from support.ztunnel import PEER4, PEER6, RESOLVER4, SECONDS

pytestmark = [pytest.mark.root, pytest.mark.skipif(not ISTIOD, reason="SLUICE_ISTIOD names no istiod of Istio's")]

ONLY = {"action": "ALLOW", "rules": [{"from": [{"source": {"principals": ["cluster.local/ns/demo/sa/other"]}}]}]}
STRICT = custom("PeerAuthentication", "default", {"mtls": {"mode": "STRICT"}})
FAR = custom("ServiceEntry", "far", {
    "hosts": ["far.example"], "addresses": ["10.99.0.9"], "resolution": "STATIC", "location": "MESH_INTERNAL",
    "ports": [{"number": 80, "name": "tcp", "protocol": "TCP", "targetPort": 8080}],
    "endpoints": [{"address": "10.77.0.50"}, {"address": "10.77.0.51"}],
})  # fmt: skip


class Mesh:
    def __init__(self, istiod: Istiod, web: Node, shop: Node, ztunnels: tuple[FedZtunnel, FedZtunnel]) -> None:
        self.istiod, self.web, self.shop = istiod, web, shop
        self.ours, self.other = ztunnels

    def put(self, value: dict[str, Any]) -> None:
        self.istiod.server.put(value)

    def named(self, kind: str, name: str) -> list[dict[str, Any]]:
        """What our ztunnel has of that name."""
        return [each for each in self.ours.dump()[kind] if each["name"] == name]


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Istiod]:
    with istiod(tmp_path_factory.mktemp("istiod")) as found:
        yield found


@pytest.fixture
def mesh(control: Istiod, tmp_path: Path) -> Iterator[Mesh]:
    with two_nodes(tmp_path) as (web, shop), contextlib.ExitStack() as made:
        ztunnels = FedZtunnel(control, web), FedZtunnel(control, shop, port=15200)
        for each in ztunnels:
            made.callback(each.close)
        found = Mesh(control, web, shop, ztunnels)
        wait(lambda: len(found.named("workloads", "shop")) == 1)
        yield found
        for kind, name in (("AuthorizationPolicy", "only"), ("PeerAuthentication", "default"), ("ServiceEntry", "far")):
            with contextlib.suppress(KeyError):
                control.server.delete(kind, "demo", name)


def wait(done: Callable[[], object]) -> None:
    until = time.monotonic() + SECONDS
    while not done():
        assert time.monotonic() < until
        time.sleep(0.1)


def passes(mesh: Mesh, host: str = PEER4, port: int = 8080) -> None:
    with joined(mesh.web, mesh.shop, host, port) as (client, server):
        client.sendall(b"question")
        assert server.recv(100) == b"question"
        server.sendall(b"answer")
        assert client.recv(100) == b"answer"


@pytest.mark.parametrize(("host", "port"), [(PEER4, 8080), (PEER6, 8080), (VIP, 80)])
def test_pods_talk_by_hbone_with_certificates_of_istiod(mesh: Mesh, host: str, port: int) -> None:
    passes(mesh, host, port)
    assert mesh.shop.ztunnel.wait_record(kind="hbone", direction="inbound")["error"] == ""
    secret = mesh.istiod.server.objects("secrets")
    (root,) = (each["data"]["ca-cert.pem"] for each in secret if each["metadata"]["name"] == "istio-ca-secret")
    (issued,) = (each for each in mesh.ours.dump()["certificates"] if each["certChain"])
    assert issued["identity"] == "spiffe://cluster.local/ns/demo/sa/web"
    assert issued["rootCerts"][0]["pem"] == root
    leaf = x509.load_pem_x509_certificate(base64.b64decode(issued["certChain"][0]["pem"]))
    leaf.verify_directly_issued_by(x509.load_pem_x509_certificate(base64.b64decode(root)))


def test_workloads_services_and_policies_are_those_of_the_cluster(mesh: Mesh) -> None:
    mesh.put(STRICT)
    mesh.put(FAR)
    wait(lambda: mesh.named("services", "far") and mesh.named("policies", "istio_converted_static_strict"))
    (web,) = mesh.named("workloads", "web")
    assert web["uid"] == "Kubernetes//Pod/demo/web"
    assert (web["protocol"], web["node"], web["locality"]["region"]) == ("HBONE", "node-web", "north")
    (shop,) = mesh.named("workloads", "shop")
    assert shop["services"] == ["demo/all.demo.svc.cluster.local", "demo/shop.demo.svc.cluster.local"]
    assert shop["authorizationPolicies"] == ["istio-system/istio_converted_static_strict"]
    (service,) = mesh.named("services", "shop")
    assert service["vips"] == [f"Kubernetes/{VIP}"] or service["vips"] == [f"/{VIP}"]
    assert service["endpoints"][shop["uid"]]["port"] == {"80": 8080}
    (headless,) = mesh.named("services", "all")
    assert headless.get("vips", []) == []
    (far,) = mesh.named("services", "far")
    assert len(far["endpoints"]) == 2


def test_strict_refuses_plain_connections(mesh: Mesh) -> None:
    mesh.put(STRICT)
    wait(lambda: mesh.named("workloads", "shop")[0].get("authorizationPolicies"))
    passes(mesh)
    with contextlib.suppress(ConnectionResetError), mesh.shop.pod.listen(PEER4, 8080):
        plain = mesh.web.pod.make()
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 0x539)  # past the pod's redirection
        with plain:
            plain.connect((PEER4, 8080))
            plain.sendall(b"x")
            assert plain.recv(1) == b""


def test_a_policy_ends_open_connections_and_its_removal_lets_new_ones_pass(mesh: Mesh) -> None:
    with joined(mesh.web, mesh.shop) as (client, server):
        client.sendall(b"x")
        assert server.recv(1) == b"x"
        mesh.put(custom("AuthorizationPolicy", "only", ONLY))
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""
    refused(mesh.web, mesh.shop)
    mesh.istiod.server.delete("AuthorizationPolicy", "demo", "only")
    wait(lambda: not mesh.named("policies", "only") and "only" not in str(mesh.other.dump()["policies"]))
    passes(mesh)


def test_endpoints_follow_pods(mesh: Mesh) -> None:
    second = pod("shop-2", ["10.77.0.60"], node="node-shop", account="shop")
    second["metadata"]["labels"]["app"] = "shop"
    mesh.put(second)
    wait(lambda: len(mesh.named("services", "shop")[0]["endpoints"]) == 2)
    second["status"]["conditions"][0]["status"] = "False"
    mesh.put(second)
    wait(lambda: len(mesh.named("services", "shop")[0]["endpoints"]) == 1)
    assert mesh.named("workloads", "shop-2")[0]["status"] == "Unhealthy"
    mesh.istiod.server.delete("Pod", "demo", "shop-2")
    wait(lambda: mesh.named("workloads", "shop-2") == [])


def answer(mesh: Mesh, name: str) -> list[str]:
    with mesh.web.pod.make(kind=socket.SOCK_DGRAM) as client:
        client.sendto(bytes(DNS(id=7, rd=1, qd=DNSQR(qname=name))), (RESOLVER4, 53))
        found = DNS(client.recv(4096))
    return sorted(record.rdata for record in found.an or [])


def test_names_are_resolved(mesh: Mesh) -> None:
    mesh.put(FAR)
    wait(lambda: mesh.named("services", "far"))
    assert answer(mesh, "shop.demo.svc.cluster.local") == [VIP]
    assert answer(mesh, "all.demo.svc.cluster.local") == [PEER4]  # headless
    assert answer(mesh, "far.example") == ["10.99.0.9"]


def received(ztunnel: FedZtunnel) -> int:
    """Bytes of workloads and services from istiod."""
    found = re.search(r'istio_xds_message_bytes_total\{url="[^"]*istio.workload.Address"\} (\d+)', ztunnel.metrics())
    assert found
    return int(found[1])


def test_after_a_restart_of_istiod_only_differences_are_sent(mesh: Mesh) -> None:
    """The new one ends its streams after 5 s each, as istiod does after 30 min: this is no failure."""
    whole = received(mesh.ours)
    with joined(mesh.web, mesh.shop) as (client, server):
        mesh.istiod.end()
        mesh.istiod.server.put(custom("ServiceEntry", "far", FAR["spec"]))
        client.sendall(b"x")
        assert server.recv(1) == b"x"
        mesh.istiod.run("--keepaliveMaxServerConnectionAge", "5s")
        wait(lambda: mesh.named("services", "far"))
        server.sendall(b"y")
        assert client.recv(1) == b"y"
    assert received(mesh.ours) - whole < whole
    wait(lambda: mesh.ours.log.read_text().count("istiod: the stream has ended") == 3)
    assert "WARNING" not in mesh.ours.log.read_text().partition("the stream has ended")[2].partition("connected")[2]
    assert len(mesh.named("workloads", "shop")) == 1


@pytest.mark.skipif(not REAL, reason="SLUICE_REAL_ZTUNNEL names no ztunnel of Istio's")
@pytest.mark.parametrize("client", ["ours", "Istio's"])
def test_istios_ztunnel_has_the_same_from_it(control: Istiod, tmp_path: Path, client: str) -> None:
    with two_nodes(tmp_path) as (web, shop), contextlib.ExitStack() as made:
        control.server.put(STRICT)
        control.server.put(FAR)
        ours, theirs = (web, shop) if client == "ours" else (shop, web)
        one, other = FedZtunnel(control, ours), FedZtunnel(control, theirs, real=True)
        made.callback(one.close)
        made.callback(other.close)
        mesh = Mesh(control, web, shop, (one, other))
        wait(lambda: mesh.named("services", "far"))
        with joined(web, shop, VIP, 80) as (near, far):
            near.sendall(b"x")
            assert far.recv(1) == b"x"
            (mine, others) = (each.dump() for each in (one, other))
        assert received(one) == received(other)
    for kind in ("workloads", "services", "policies"):
        assert keyed(mine[kind]) == keyed(others[kind])


def keyed(found: list[dict[str, Any]]) -> dict[str, Any]:
    for each in found:
        each.get("services", []).sort()  # in no order in Istio's
    return {each.get("uid") or f"{each['namespace']}/{each.get('hostname', each['name'])}": each for each in found}
