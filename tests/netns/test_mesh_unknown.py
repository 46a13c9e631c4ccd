# SPDX-License-Identifier: Apache-2.0
"""A pod that the mesh does not know yet, or that has no certificate: what is for it waits, and only so long."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from scapy.layers.dns import DNS, DNSQR
from support.hbone import PORTLESS, Node, exchange, two_nodes
from support.revoking import root, write
from support.ztunnel import PEER4, PEER6, POD4, POD6, RESOLVER4, SECONDS

from agent.zds.messages import Delete
from agent.ztunnel.relay.held_connections import HELD_SECONDS
from agent.ztunnel.tls.spiffe import SpiffeId

pytestmark = pytest.mark.root

VIP = "10.99.0.1"
WEB = f"""
- {{uid: web, name: web, namespace: demo, serviceAccount: web, trustDomain: cluster.local, protocol: HBONE,
   workloadIps: [{POD4}, "{POD6}"], services: {{}}}}"""
SHOP = f"""
- {{uid: shop, name: shop, namespace: demo, serviceAccount: shop, trustDomain: cluster.local, protocol: HBONE,
   workloadIps: [{PEER4}, "{PEER6}"], services: {{}}}}"""
SERVICES = f"""
services:
- {{name: shop, namespace: demo, hostname: shop.demo.svc.cluster.local, vips: [/{VIP}], ports: {{80: 8080}}}}
"""


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Node, Node]]:
    """Two nodes with a mesh file each, because a node may learn of a pod before the other one."""
    with two_nodes(tmp_path) as both:
        for node in both:
            tell(node, WEB, SHOP)
            # A worker gets a change some time after the line in the log, for which `tell` waits.
            node.start_with(tmp_path / f"{node.account}.yaml", f"workers=1, {PORTLESS}")
        yield both


def tell(node: Node, *workloads: str) -> None:
    """Writes the node's mesh and waits until its ztunnel has read it, if there is one."""
    path = node.folder.parent / f"{node.account}.yaml"
    path.with_suffix(".new").write_text("workloads:" + "".join(workloads or [" []"]) + SERVICES)
    path.with_suffix(".new").replace(path)
    if not hasattr(node, "ztunnel"):
        return
    log, until = Path(f"{node.ztunnel.path}.err"), time.monotonic() + SECONDS
    read = log.read_text().count(f"{path.name}: ")
    while log.read_text().count(f"{path.name}: ") == read:
        assert time.monotonic() < until
        time.sleep(0.02)


@contextlib.contextmanager
def waiting_client(web: Node, shop: Node, host: str) -> Iterator[socket.socket]:
    """A client whose connection has reached ztunnel and goes no further: the server sees nothing for half a second."""
    with shop.pod.listen(host, 8080) as listener, web.pod.connect(host, 8080) as client:
        client.sendall(b"early")
        listener.settimeout(0.5)
        with pytest.raises(TimeoutError):
            listener.accept()
        listener.settimeout(SECONDS)
        yield client
        server, _ = listener.accept()
        with server:
            assert server.recv(5) == b"early"
            server.sendall(b"late")
            assert client.recv(4) == b"late"


@pytest.mark.parametrize("host", [PEER4, PEER6])
def test_an_outbound_connection_waits_for_the_pods_workload(pair: tuple[Node, Node], host: str) -> None:
    web, shop = pair
    tell(web, SHOP)
    with waiting_client(web, shop, host):
        tell(web, WEB, SHOP)
    assert web.ztunnel.wait_record(kind="hbone", direction="outbound", close="fin")["seconds"] >= 0.5


def test_an_inbound_stream_waits_for_the_pods_workload(pair: tuple[Node, Node]) -> None:
    web, shop = pair
    tell(shop, WEB)
    with waiting_client(web, shop, PEER4):
        tell(shop, WEB, SHOP)
    assert shop.ztunnel.wait_record(kind="hbone", direction="inbound")["error"] == ""


def test_an_inbound_plain_connection_waits_for_the_pods_workload(pair: tuple[Node, Node]) -> None:
    web, shop = pair
    tell(web, WEB)  # shop's workload is unknown to web's node: plain
    tell(shop, WEB)
    with waiting_client(web, shop, PEER4):
        tell(shop, WEB, SHOP)
    assert shop.ztunnel.wait_record(kind="tcp", direction="inbound", close="fin")["seconds"] >= 0.5


def test_an_inbound_session_waits_for_the_pods_first_certificate(tmp_path: Path) -> None:
    authority, files = root(), tmp_path / "files"
    with two_nodes(tmp_path) as (web, shop):
        for node in (web, shop):
            tell(node, WEB, SHOP)
            node.start_with(tmp_path / f"{node.account}.yaml", identities=f"files:{files}")
        write(files, authority.issue(SpiffeId("cluster.local", "demo", "web")))
        with waiting_client(web, shop, PEER4):
            write(files, authority.issue(SpiffeId("cluster.local", "demo", "shop")))
        assert shop.ztunnel.wait_record(kind="hbone", direction="inbound")["error"] == ""


def test_an_inbound_session_of_a_pod_without_certificate_ends(tmp_path: Path) -> None:
    files = tmp_path / "files"
    write(files, root().issue(SpiffeId("cluster.local", "demo", "web")))
    with two_nodes(tmp_path) as (web, shop):
        for node in (web, shop):
            tell(node, WEB, SHOP)
            node.start_with(tmp_path / f"{node.account}.yaml", identities=f"files:{files}")
        with shop.pod.listen(PEER4, 8080), web.pod.connect(PEER4, 8080) as client, pytest.raises(ConnectionResetError):
            client.recv(1)
        record = web.ztunnel.wait_record(kind="hbone", direction="outbound")
        assert HELD_SECONDS - 0.5 < record["seconds"] < HELD_SECONDS + 3


def test_a_query_waits_and_fails_if_the_pod_stays_unknown(pair: tuple[Node, Node]) -> None:
    web, _ = pair
    tell(web, SHOP)
    with web.pod.make(kind=socket.SOCK_DGRAM) as client:
        client.sendto(bytes(DNS(id=7, rd=1, qd=DNSQR(qname="shop"))), (RESOLVER4, 53))
        client.settimeout(0.5)
        with pytest.raises(TimeoutError):
            client.recv(2000)
        client.settimeout(SECONDS)
        tell(web, WEB, SHOP)
        assert [record.rdata for record in DNS(client.recv(2000)).an] == [VIP]
        tell(web, SHOP)
        began = time.monotonic()
        client.sendto(bytes(DNS(id=8, rd=1, qd=DNSQR(qname="shop"))), (RESOLVER4, 53))
        failed = DNS(client.recv(2000))
        assert (failed.id, failed.rcode) == (8, 2)
        assert HELD_SECONDS - 0.5 < time.monotonic() - began < HELD_SECONDS + 3


def test_a_pod_that_stays_unknown_is_refused_with_the_reason(pair: tuple[Node, Node]) -> None:
    web, shop = pair
    tell(web, SHOP)
    with shop.pod.listen(PEER4, 8080), web.pod.connect(PEER4, 8080) as client, pytest.raises(ConnectionResetError):
        client.recv(1)
    record = web.ztunnel.wait_record(kind="tcp", direction="outbound", close="refused")
    assert "the mesh does not know demo/web with account web" in record["error"]
    assert HELD_SECONDS - 0.5 < record["seconds"] < HELD_SECONDS + 3
    tell(web, WEB, SHOP)
    exchange(web, shop, PEER4, 8080)


def test_what_waits_ends_with_its_pod(pair: tuple[Node, Node]) -> None:
    web, shop = pair
    tell(web, SHOP)
    with shop.pod.listen(PEER4, 8080), web.pod.connect(PEER4, 8080) as client:
        client.sendall(b"early")
        assert web.agent.ask(Delete("uid-web")) == ""
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    assert web.ztunnel.wait_record(kind="tcp", close="drained")["destination"] == ""
