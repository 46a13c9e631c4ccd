# SPDX-License-Identifier: Apache-2.0
"""Istio's ztunnel at one end of double HBONE, ours at the other, and our gateway between their networks.

Runs where SLUICE_REAL_ZTUNNEL names a binary of Istio's.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.istio_peer import REAL, WAYS, IstioZtunnel, istio_ztunnel
from support.networks import GATE_OUTSIDE, HOSTNAME, IDENTITY, Networks, shop_mesh, two_networks, web_mesh
from support.ztunnel import SECONDS, abort, read_all

from agent.ztunnel.tls.development_ca import DevelopmentCa

pytestmark = [pytest.mark.root, pytest.mark.skipif(not REAL, reason="SLUICE_REAL_ZTUNNEL names no ztunnel of Istio's")]


@pytest.fixture(params=WAYS)
def ends(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Networks, IstioZtunnel]]:
    """(both networks, Istio's ztunnel), which serves shop or web."""
    (tmp_path / "shop.yaml").write_text(shop_mesh())
    (tmp_path / "web.yaml").write_text(web_mesh())
    ca = DevelopmentCa(tmp_path / "ca")
    with two_networks(tmp_path) as networks, contextlib.ExitStack() as made:
        if request.param == WAYS[0]:
            istio = made.enter_context(istio_ztunnel(networks.shop, tmp_path / "shop.yaml", ca, "two"))
            networks.start_web()
        else:
            istio = made.enter_context(istio_ztunnel(networks.web, tmp_path / "web.yaml", ca, "one"))
            networks.start_shop()
        networks.start_gateway()
        yield networks, istio


def test_bytes_half_close_and_reset_pass_both_ways(ends: tuple[Networks, IstioZtunnel]) -> None:
    networks, _ = ends
    payload = bytes(range(256)) * 40_000  # 10 MB
    with networks.joined() as (client, server):
        for one, other in ((client, server), (server, client)):
            sending = threading.Thread(target=lambda one=one: (one.sendall(payload), one.shutdown(socket.SHUT_WR)))
            sending.start()
            assert read_all(other) == payload
            sending.join()
    for one in (0, 1):
        with networks.joined() as pair:
            pair[0].sendall(b"x")
            assert pair[1].recv(1) == b"x"
            abort(pair[one])
            with contextlib.suppress(ConnectionResetError):  # Istio's ztunnel may end it in an orderly way
                assert pair[1 - one].recv(1) == b""


def test_istio_knows_identity_and_labels_of_the_other_end(ends: tuple[Networks, IstioZtunnel]) -> None:
    networks, istio = ends
    with networks.joined() as (client, server):
        client.sendall(b"x")
        assert server.recv(1) == b"x"
    until = time.monotonic() + SECONDS
    while not (lines := [line for line in istio.log.read_text().splitlines() if "connection complete" in line]):
        assert time.monotonic() < until, istio.log.read_text()
        time.sleep(0.1)
    assert f'src.identity="{IDENTITY}web"' in lines[0]
    assert f'dst.identity="{IDENTITY}shop"' in lines[0]
    labels = _labels(istio)
    assert "unknown" not in labels.values(), labels
    assert (labels["source_cluster"], labels["destination_cluster"]) == ("c1", "c2")
    assert (labels["source_principal"], labels["destination_principal"]) == (IDENTITY + "web", IDENTITY + "shop")
    if 'direction="outbound"' in lines[0]:
        assert f"dst.addr={GATE_OUTSIDE}:15008 dst.hbone_addr={HOSTNAME}:80" in lines[0]


def _labels(istio: IstioZtunnel) -> dict[str, str]:
    page = istio.page(15020, "/stats/prometheus")
    (line,) = (line for line in page.splitlines() if line.startswith("istio_tcp_connections_closed_total{"))
    return dict(re.findall(r'(\w+)="([^"]*)"', line))
