# SPDX-License-Identifier: Apache-2.0
"""Our ztunnel and Istio's understand each other on the wire: one mesh file, one CA, each end in turn.

Runs where SLUICE_REAL_ZTUNNEL names a binary of Istio's.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hbone import MESH, VIP, Node, joined, refused, two_nodes
from support.istio_peer import WAYS, IstioZtunnel, istio_ztunnel, needs_real
from support.ztunnel import PEER4, PEER6, POD4, POD6, SECONDS, read_all

from agent.ztunnel.tls.development_ca import DevelopmentCa

pytestmark = [pytest.mark.root, needs_real]


@pytest.fixture(params=WAYS)
def nodes(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Node, Node, IstioZtunnel]]:
    """(web, shop, Istio's ztunnel), which serves shop or web."""
    mesh = tmp_path / "mesh.yaml"
    mesh.write_text(MESH)
    with two_nodes(tmp_path) as (web, shop):
        ours, theirs = (web, shop) if request.param == WAYS[0] else (shop, web)
        ours.start_with(mesh)
        with istio_ztunnel(theirs, mesh, DevelopmentCa(tmp_path / "ca")) as istio:
            yield web, shop, istio


@pytest.mark.parametrize(("host", "port"), [(PEER4, 8080), (PEER6, 8080), (VIP, 80)])
def test_bytes_and_half_close_pass_both_ways(nodes: tuple[Node, Node, IstioZtunnel], host: str, port: int) -> None:
    web, shop, _ = nodes
    payload = bytes(range(256)) * 20_000  # 5 MB
    with joined(web, shop, host, port) as (client, server):
        assert server.getpeername()[0] == (POD6 if ":" in host else POD4)
        client.sendall(b"question")
        assert server.recv(100) == b"question"
        sending = threading.Thread(target=lambda: (client.sendall(payload), client.shutdown(socket.SHUT_WR)))
        sending.start()
        assert read_all(server) == payload
        sending.join()
        server.sendall(b"answer")
        server.shutdown(socket.SHUT_WR)
        assert read_all(client) == b"answer"


def test_a_policy_refuses_with_401(nodes: tuple[Node, Node, IstioZtunnel]) -> None:
    web, shop, _ = nodes
    refused(web, shop)


def test_each_end_knows_the_identity_of_the_other(nodes: tuple[Node, Node, IstioZtunnel]) -> None:
    web, shop, istio = nodes
    with joined(web, shop, VIP, 80) as (client, server):
        assert server.getpeername()[0] == POD4
        client.sendall(b"x")
        assert server.recv(1) == b"x"
    until = time.monotonic() + SECONDS
    while "connection complete" not in (text := istio.log.read_text()):
        assert time.monotonic() < until
        time.sleep(0.1)
    line = next(line for line in text.splitlines() if "connection complete" in line)
    assert 'src.identity="spiffe://cluster.local/ns/demo/sa/web"' in line
    assert 'dst.identity="spiffe://cluster.local/ns/demo/sa/shop"' in line
