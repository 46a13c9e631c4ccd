# SPDX-License-Identifier: Apache-2.0
"""Certificates that are revoked under traffic: two real ztunnels, of which one follows a list."""

from __future__ import annotations

import contextlib
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.hbone import Node, joined, refused, two_nodes
from support.revoking import Authority, root, serial, write
from support.ztunnel import PEER4, POD4

from agent.ztunnel.tls.spiffe import SpiffeId

pytestmark = pytest.mark.root

WEB, SHOP = (SpiffeId("cluster.local", "demo", account) for account in ("web", "shop"))
MESH = f"""
workloads:
- {{uid: web, name: web, namespace: demo, serviceAccount: web, trustDomain: cluster.local, protocol: HBONE,
   workloadIps: [{POD4}], services: {{}}}}
- {{uid: shop, name: shop, namespace: demo, serviceAccount: shop, trustDomain: cluster.local, protocol: HBONE,
   workloadIps: [{PEER4}], services: {{}}}}
"""


class Mesh:
    """Two nodes with certificates of an intermediate; `crl` is the file that one of them follows."""

    def __init__(self, folder: Path, nodes: tuple[Node, Node]) -> None:
        (folder / "mesh.yaml").write_text(MESH)
        self.folder, self.nodes = folder, nodes
        self.top: Authority = root()
        self.middle = self.top.below("middle")
        self.issued = {identity: self.middle.issue(identity) for identity in (WEB, SHOP)}
        for one in self.issued.values():
            write(folder / "files", one)
        self.crl = folder / "crl.pem"
        self.publish()

    def publish(self, *revoked: SpiffeId, also: tuple[int, ...] = ()) -> None:
        fresh = self.folder / "fresh"
        fresh.write_bytes(
            self.top.revoke(*also) + self.middle.revoke(*(serial(self.issued[identity]) for identity in revoked))
        )
        fresh.replace(self.crl)

    def start(self, follower: int, more: str = "") -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.page = f"127.0.0.1:{free.getsockname()[1]}"
        for number, node in enumerate(self.nodes):
            settings = f"ready_address='', admin_address='', access_log={str(node.folder / 'access')!r}, "
            if number == follower:
                settings += f"stats_address={self.page!r}, revocation_lists={str(self.crl)!r}, {more}"
            else:
                settings += "stats_address=''"
            node.start_with(self.folder / "mesh.yaml", settings, f"files:{self.folder / 'files'}")

    def metrics(self, words: str) -> list[str]:
        with urllib.request.urlopen(f"http://{self.page}/metrics", timeout=20) as answer:
            return [line for line in answer.read().decode().splitlines() if words in line]


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    with two_nodes(tmp_path) as nodes:
        yield Mesh(tmp_path, nodes)


def _wait(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def _asked(client: socket.socket, server: socket.socket) -> bool:
    """True if a question and its answer pass."""
    try:
        client.sendall(b"q")
        if server.recv(1) == b"q":
            server.sendall(b"a")
            return client.recv(1) == b"a"
    except OSError:
        pass
    return False


@pytest.mark.parametrize(("follower", "revoked"), [(1, WEB), (0, SHOP)], ids=["of the client", "of the server"])
def test_a_certificate_is_revoked_under_traffic(mesh: Mesh, follower: int, revoked: SpiffeId) -> None:
    """The list is of the node that did not issue the connection's certificate: as server, and as client."""
    mesh.start(follower)
    web, shop = mesh.nodes
    node, reporter = mesh.nodes[follower], ("source", "destination")[follower]
    with joined(web, shop) as (client, server), joined(web, shop, port=8081, served=8081) as (second, end):
        assert _asked(client, server) and _asked(second, end)
        mesh.publish(also=(7,))  # a change that concerns nobody
        _wait(lambda: "revocation lists" in _log(node) and _log(node).count("with 1 certificates") == 1)
        assert _asked(client, server)
        mesh.publish(revoked)
        _wait(lambda: not _asked(client, server) and not _asked(second, end))
    number = f"certificate {serial(mesh.issued[revoked]):x} of CN=middle is revoked by {mesh.crl}"
    direction = ("outbound", "inbound")[follower]
    record = node.ztunnel.wait_record(kind="hbone", direction=direction, error=number)
    assert (record["close"], record["sent"] > 0) == ("error", True)
    assert all('response_flags="CERT_REVOKED"' in line for line in mesh.metrics("connections_closed_total{"))
    (rejections,) = mesh.metrics("policy_rejections_total{")
    name, sessions = rejections.rsplit(" ", 1)
    # The connections had one session, or one each if two workers accepted them.
    assert name == f'istio_crl_policy_rejections_total{{reporter="{reporter}"}}' and sessions in "12"
    assert number in (node.folder / "access").read_text()
    refused(web, shop, 8082)
    record = node.ztunnel.wait_record(kind="hbone", direction=direction, error=number, sent=0)
    assert record["close"] == ("error", "refused")[follower]
    mesh.publish()
    _wait(lambda: _served(web, shop))


def _log(node: Node) -> str:
    return (node.folder / "records.err").read_text()


def _served(web: Node, shop: Node) -> bool:
    with (
        contextlib.suppress(OSError),
        shop.pod.listen(PEER4, 8083) as listener,
        web.pod.connect(PEER4, 8083) as client,
    ):
        listener.settimeout(1)
        server, _ = listener.accept()
        with server:
            return _asked(client, server)
    return False


def test_an_intermediate_is_revoked(mesh: Mesh) -> None:
    mesh.start(1)
    with joined(*mesh.nodes) as (client, server):
        assert _asked(client, server)
        mesh.publish(also=(mesh.middle.certificate.serial_number,))
        _wait(lambda: not _asked(client, server))
    error = mesh.nodes[1].ztunnel.wait_record(kind="hbone", direction="inbound")["error"]
    assert error == f"certificate {mesh.middle.certificate.serial_number:x} of CN=root is revoked by {mesh.crl}"


def test_closed_serves_nobody_before_the_lists_are_there(mesh: Mesh) -> None:
    mesh.crl.unlink()
    mesh.start(1, "revocation_failure='closed'")
    refused(*mesh.nodes)
    record = mesh.nodes[1].ztunnel.wait_record(kind="hbone", direction="inbound", close="refused")
    assert record["error"] == "no revocation list of CN=middle"
    mesh.publish()
    _wait(lambda: _served(*mesh.nodes))
