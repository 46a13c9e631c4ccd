# SPDX-License-Identifier: Apache-2.0
"""Two ztunnels with one mesh file: identities, policies, changes under traffic, and what the mesh does not know."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from scapy.layers.dns import DNS, DNSQR
from support.hbone import PORTLESS, Node, joined, refused, two_nodes
from support.istio_peer import PAIRS, any_pair
from support.ztunnel import PEER4, PEER6, POD4, POD6, RESOLVER4, SECONDS

from agent.lab.links import links

pytestmark = pytest.mark.root

VIP = "10.99.0.1"
MESH = f"""
workloads:
- {{uid: web, name: web, namespace: demo, serviceAccount: web, trustDomain: cluster.local, protocol: HBONE,
   workloadIps: [{POD4}, "{POD6}"], workloadName: web, workloadType: deployment, services: {{}}}}
- {{uid: shop, name: shop, namespace: demo, serviceAccount: shop, trustDomain: cluster.local, protocol: HBONE,
   workloadIps: [{PEER4}, "{PEER6}"], services: {{demo/shop.demo.svc.cluster.local: {{80: 8080}}}}}}
services:
- {{name: shop, namespace: demo, hostname: shop.demo.svc.cluster.local, vips: [/{VIP}], ports: {{80: 8080}}}}
"""
ONLY_OTHERS = """
policies:
- {name: others, namespace: demo, scope: Namespace, action: Allow, dryRun: false,
   rules: [[[{principals: [!Exact cluster.local/ns/demo/sa/other]}]]]}
"""


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[Node, Node]]:
    (tmp_path / "mesh.yaml").write_text(MESH)
    with two_nodes(tmp_path) as both:
        for node in both:
            node.start_with(tmp_path / "mesh.yaml")
        yield both


@contextlib.contextmanager
def connection(nodes: tuple[Node, Node], host: str, port: int) -> Iterator[tuple[socket.socket, socket.socket]]:
    with joined(*nodes, host, port) as (client, server):
        client.sendall(b"question")
        assert server.recv(100) == b"question"
        yield client, server


def _wait(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize(("host", "port"), [(PEER4, 8080), (PEER6, 8080), (VIP, 80)])
def test_workloads_and_services_are_reached_by_hbone(nodes: tuple[Node, Node], host: str, port: int) -> None:
    with connection(nodes, host, port) as (client, server):
        server.sendall(b"answer")
        assert client.recv(100) == b"answer"
    assert nodes[1].ztunnel.wait_record(kind="hbone", direction="inbound")["error"] == ""


def test_a_policy_refuses_new_connections_and_ends_open_ones(nodes: tuple[Node, Node], tmp_path: Path) -> None:
    with connection(nodes, PEER4, 8080) as (client, _):
        (tmp_path / "mesh.yaml").write_text(MESH + ONLY_OTHERS)
        client.settimeout(SECONDS)
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""
    ended = nodes[1].ztunnel.wait_record(kind="hbone", direction="inbound")
    assert "no ALLOW policy matches the connection, after a change" in ended["error"]

    def refused() -> bool:
        with contextlib.suppress(ConnectionResetError), nodes[0].pod.connect(PEER4, 8080) as client:
            client.settimeout(SECONDS)
            client.sendall(b"x")
            return client.recv(1) == b""
        return True

    with nodes[1].pod.listen(PEER4, 8080):
        _wait(refused)
    assert (
        "http status: 401" in nodes[0].ztunnel.wait_record(kind="hbone", direction="outbound", close="refused")["error"]
    )


def test_names_of_the_mesh_are_answered_and_others_are_the_resolvers(nodes: tuple[Node, Node]) -> None:
    web, _ = nodes

    def asked(name: str) -> DNS:
        with web.pod.make(kind=socket.SOCK_DGRAM) as client:
            client.sendto(bytes(DNS(id=7, rd=1, qd=DNSQR(qname=name))), (RESOLVER4, 53))
            answer, source = client.recvfrom(2000)
            assert source == (RESOLVER4, 53)
            return DNS(answer)

    assert [record.rdata for record in asked("shop").an] == [VIP]
    assert web.ztunnel.wait_record(kind="dns", close="mesh")["destination"] == f"{RESOLVER4}:53"
    with nodes[1].pod.listen(RESOLVER4, 53, socket.SOCK_DGRAM) as resolver:

        def resolve() -> None:
            query, client = resolver.recvfrom(2000)
            resolver.sendto(query[:2] + b"\x81\x83" + query[4:], client)

        thread = threading.Thread(target=resolve)
        thread.start()
        assert asked("example.com").rcode == 3
        thread.join()


def test_a_damaged_file_keeps_the_previous_mesh(nodes: tuple[Node, Node], tmp_path: Path) -> None:
    (tmp_path / "mesh.yaml").write_text(MESH.replace("protocol: HBONE", "protokoll: HBONE"))
    log = tmp_path / "web" / "records.err"
    _wait(lambda: "protokoll: is not a known key; the previous mesh is kept" in log.read_text())
    with connection(nodes, VIP, 80):
        pass


def test_the_streams_of_a_session_count_for_the_limit_of_their_pod(tmp_path: Path) -> None:
    (tmp_path / "mesh.yaml").write_text(MESH)
    with two_nodes(tmp_path) as (web, shop):
        web.start_with(tmp_path / "mesh.yaml", f"workers=1, {PORTLESS}")
        shop.start_with(tmp_path / "mesh.yaml", f"share=1, workers=1, {PORTLESS}")
        with connection((web, shop), PEER4, 8080):
            refused(web, shop)
        assert web.ztunnel.wait_record(direction="outbound")["error"] == "http status: 503"
        shop.ztunnel.wait_record(direction="inbound", close="fin")
        with connection((web, shop), PEER4, 8080):
            pass


@pytest.mark.parametrize("pair", PAIRS)
def test_an_address_outside_the_mesh_is_reached_in_plain(pair: str, tmp_path: Path) -> None:
    with any_pair(pair, tmp_path) as (web, shop):
        with links(shop.pod.name) as inside:
            inside.add_addresses("lo", "10.77.0.9/32")
        with shop.pod.listen("10.77.0.9", 8080) as listener, web.pod.connect("10.77.0.9", 8080) as client:
            listener.settimeout(SECONDS)
            server, _ = listener.accept()
            with server:
                client.sendall(b"plain")
                server.settimeout(SECONDS)
                assert server.recv(10) == b"plain"
