# SPDX-License-Identifier: Apache-2.0
"""Traffic of services and workloads goes to their waypoint: a real ztunnel, and a stand-in that speaks HBONE."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hbone import PORTLESS, Node, two_nodes
from support.hbone_server import hbone_server
from support.istio_peer import ZTUNNELS, either_ztunnel
from support.ztunnel import PEER4, POD4, SECONDS, read_all

pytestmark = pytest.mark.root


VIP, WORKLOAD = "10.99.0.1", "10.77.0.9"
IDENTITY = "spiffe://cluster.local/ns/demo/sa/"
HOSTNAME = "shop.demo.svc.cluster.local"
MESH = f"""
workloads:
- {{uid: web, name: web, namespace: demo, serviceAccount: web, trustDomain: cluster.local, protocol: HBONE,
   workloadIps: [{POD4}], workloadName: web, workloadType: deployment, services: {{}}}}
- {{uid: shop, name: shop, namespace: demo, serviceAccount: shop, trustDomain: cluster.local, protocol: HBONE,
   workloadIps: [{PEER4}], services: {{}}, applicationTunnel: {{protocol: PROXY, port: 15088}}}}
- {{uid: one, name: one, namespace: demo, serviceAccount: one, trustDomain: cluster.local, protocol: HBONE,
   workloadIps: [{WORKLOAD}], services: {{}}, waypoint: {{destination: /{PEER4}, hboneMtlsPort: 15008}}}}
services:
- {{name: shop, namespace: demo, hostname: {HOSTNAME}, vips: [/{VIP}], ports: {{80: 8080}},
   waypoint: {{destination: /{PEER4}, hboneMtlsPort: 15008}}}}
"""


@pytest.fixture
def pods(tmp_path: Path) -> Iterator[tuple[Node, Node]]:
    (tmp_path / "mesh.yaml").write_text(MESH)
    with two_nodes(tmp_path) as both:
        yield both


@pytest.fixture
def nodes(pods: tuple[Node, Node], tmp_path: Path) -> tuple[Node, Node]:
    """Only web has its ztunnel; it gives up after 2 s."""
    pods[0].start_with(tmp_path / "mesh.yaml", f"connect_seconds=2, {PORTLESS}")
    return pods


@pytest.mark.parametrize(("host", "port", "meant"), [(VIP, 80, f";host={HOSTNAME}"), (WORKLOAD, 9000, "")])
@pytest.mark.parametrize("ztunnel", ZTUNNELS)
def test_a_waypoint_gets_the_address_that_the_client_dialled(
    pods: tuple[Node, Node], tmp_path: Path, ztunnel: str, host: str, port: int, meant: str
) -> None:
    web, shop = pods
    with (
        either_ztunnel(ztunnel, web, tmp_path / "mesh.yaml"),
        hbone_server(shop.pod, PEER4, tmp_path / "ca", "shop") as waypoint,
        web.pod.connect(host, port) as client,
    ):
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b"question"
        source = "{}:{}".format(*client.getsockname())
    (asked,) = waypoint.requests
    assert (asked[":method"], asked[":authority"]) == ("CONNECT", f"{host}:{port}")
    assert asked["forwarded"] == f'for="{source}"{meant}'
    assert asked["baggage"] == "k8s.namespace.name=demo,k8s.deployment.name=web"
    assert len(asked["traceparent"]) == 55
    assert "x-forwarded-network" not in asked
    assert waypoint.peers == [IDENTITY + "web"]


def _refused(web: Node, *words: str) -> float:
    """Returns after how many seconds a connection ends without a byte; the record has the words."""
    began = time.monotonic()
    with contextlib.suppress(ConnectionResetError), web.pod.connect(VIP, 80) as client:
        assert client.recv(1) == b""
    record = web.ztunnel.wait_record(kind="hbone", direction="outbound")
    assert all(word in record["error"] for word in words), record
    return time.monotonic() - began


def test_a_waypoint_of_another_identity_is_refused(nodes: tuple[Node, Node], tmp_path: Path) -> None:
    with hbone_server(nodes[1].pod, PEER4, tmp_path / "ca", "other") as waypoint:
        _refused(nodes[0], f"the server is {IDENTITY}other, not {IDENTITY}shop")
    assert waypoint.requests == []


def test_a_waypoint_that_is_away_is_a_refusal_in_time(nodes: tuple[Node, Node]) -> None:
    web, shop = nodes
    assert _refused(web, "Connection refused") < 2
    web.ztunnel.path.write_text("")
    with shop.pod.listen(PEER4, 15008):  # it answers nothing
        assert _refused(web, "timed out") < 5


def told(got: bytes) -> tuple[str, str, int, str, bytes]:
    """The header of the PROXY protocol, version 2 (haproxy.org, proxy-protocol.txt, 2.2), with an identity.

    Returns (source, destination, its port, identity, what follows).
    """
    assert got[:12] == b"\r\n\r\n\0\r\nQUIT\n"
    assert got[12:14] == b"\x21\x11"  # version 2, PROXY; TCP over IPv4
    length = int.from_bytes(got[14:16], "big")
    addresses, rest = got[16 : 16 + length], got[16 + length :]
    kind, size = addresses[12], int.from_bytes(addresses[13:15], "big")
    assert (kind, 15 + size) == (0xD0, len(addresses))
    port = int.from_bytes(addresses[10:12], "big")
    return socket.inet_ntoa(addresses[:4]), socket.inet_ntoa(addresses[4:8]), port, addresses[15:].decode(), rest


@pytest.mark.parametrize("ztunnel", ZTUNNELS)
def test_an_application_tunnel_learns_who_connects_and_where_to(
    nodes: tuple[Node, Node], tmp_path: Path, ztunnel: str
) -> None:
    with either_ztunnel(ztunnel, nodes[1], tmp_path / "mesh.yaml"):
        got = _through_tunnel(*nodes)
    assert told(got) == (POD4, VIP, 80, IDENTITY + "web", b"question")


def _through_tunnel(web: Node, shop: Node) -> bytes:
    """Returns what the application on loopback gets, which then answers."""
    with shop.pod.listen("127.0.0.1", 15088) as listener, web.pod.connect(VIP, 80) as client:
        listener.settimeout(SECONDS)
        server, source = listener.accept()
        server.settimeout(SECONDS)
        with server:
            assert source[0] == "127.0.0.1"
            client.sendall(b"question")
            client.shutdown(socket.SHUT_WR)
            got = read_all(server)
            server.sendall(b"answer")
            server.shutdown(socket.SHUT_WR)
            assert read_all(client) == b"answer"
    return got
