# SPDX-License-Identifier: Apache-2.0
"""Two ztunnels say of real connections what Istio's would: metrics, access log, configuration, readiness."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hbone import Node, two_nodes
from support.ztunnel import PEER4, PEER6, POD4, POD6, SECONDS, read_all

pytestmark = pytest.mark.root

VIP = "10.99.0.1"
MESH = f"""
workloads:
- {{uid: web, name: web, namespace: demo, serviceAccount: web, trustDomain: cluster.local, protocol: HBONE,
   workloadIps: [{POD4}, "{POD6}"], workloadName: web-v1, workloadType: deployment, canonicalName: web,
   canonicalRevision: v1, clusterId: c1, locality: {{region: north, zone: n1}}, services: {{}}}}
- {{uid: shop, name: shop, namespace: demo, serviceAccount: shop, trustDomain: cluster.local, protocol: HBONE,
   workloadIps: [{PEER4}, "{PEER6}"], workloadName: shop-v2, workloadType: deployment, canonicalName: shop,
   canonicalRevision: v2, clusterId: c1, locality: {{region: south, zone: s1}},
   services: {{demo/shop.demo.svc.cluster.local: {{80: 8080}}}}}}
services:
- {{name: shop, namespace: demo, hostname: shop.demo.svc.cluster.local, vips: [/{VIP}], ports: {{80: 8080}}}}
policies:
- {{name: no-9000, namespace: demo, scope: Namespace, action: Deny, dryRun: false,
   rules: [[[{{destinationPorts: [9000]}}]]]}}
"""
WEB, SHOP = (f"spiffe://cluster.local/ns/demo/sa/{account}" for account in ("web", "shop"))


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[Node, Node]]:
    (tmp_path / "mesh.yaml").write_text(MESH)
    with two_nodes(tmp_path) as both:
        both[0].pod.ip("route", "add", "default", "via", PEER4)
        for node in both:
            node.start_with(tmp_path / "mesh.yaml", f"access_log={str(node.folder / 'access')!r}")
        yield both


def exchange(nodes: tuple[Node, Node], host: str = VIP, port: int = 80) -> tuple[str, int]:
    """Sends 1,000 bytes from web to shop and 3,000 back; returns web's address."""
    web, shop = nodes
    with shop.pod.listen(PEER4, 8080) as listener, web.pod.connect(host, port) as client:
        listener.settimeout(SECONDS)
        server, _ = listener.accept()
        with server:
            client.sendall(bytes(1000))
            client.shutdown(1)
            assert len(read_all(server)) == 1000
            server.sendall(bytes(3000))
        assert len(read_all(client)) == 3000
        found: tuple[str, int] = client.getsockname()
        return found


def refused(nodes: tuple[Node, Node]) -> None:
    web, shop = nodes
    with (
        shop.pod.listen(PEER4, 9000),
        web.pod.connect(PEER4, 9000) as client,
        contextlib.suppress(ConnectionResetError),
    ):
        client.sendall(b"x")
        assert client.recv(1) == b""


def log_line(node: Node, words: str = "") -> str:
    """The first line of the access log with the words, without its tail; waits for it."""
    until = time.monotonic() + SECONDS
    path = node.folder / "access"
    while time.monotonic() < until:
        for line in path.read_text().splitlines() if path.exists() else ():
            if words in line:
                return line
        time.sleep(0.02)
    raise AssertionError(f"no line with {words!r} in {path.read_text() if path.exists() else 'no file'}")


def test_each_end_logs_a_connection_as_istio_does(nodes: tuple[Node, Node]) -> None:
    port = exchange(nodes)[1]
    ends = (
        rf'src.workload="web" src.namespace="demo" src.identity="{WEB}" src.cluster="c1" dst.addr={PEER4}:15008'
        rf' dst.hbone_addr={PEER4}:8080 dst.service="shop.demo.svc.cluster.local" dst.workload="shop"'
        rf' dst.namespace="demo" dst.identity="{SHOP}" dst.cluster="c1"'
    )
    time_of = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"
    outbound = (
        rf"{time_of}\tinfo\taccess\tconnection complete\tsrc.addr={POD4}:{port} {ends}"
        r' direction="outbound" bytes_sent=1000 bytes_recv=3000 duration="\d+ms"'
    )
    assert re.fullmatch(outbound, log_line(nodes[0])), log_line(nodes[0])
    inbound = (
        rf"{time_of}\tinfo\taccess\tconnection complete\tsrc.addr={POD4}:\d+ {ends}"
        r' direction="inbound" bytes_sent=3000 bytes_recv=1000 duration="\d+ms"'
    )
    assert re.fullmatch(inbound, log_line(nodes[1])), log_line(nodes[1])


def test_each_end_logs_a_refused_connection_with_the_reason(nodes: tuple[Node, Node]) -> None:
    refused(nodes)
    for node, error in zip(nodes, ("http status: 401", "policy demo/no-9000"), strict=True):
        line = log_line(node)
        assert "\terror\taccess\tconnection complete\t" in line
        assert error in line.partition(" error=")[2]
