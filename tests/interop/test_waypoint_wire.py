# SPDX-License-Identifier: Apache-2.0
"""A waypoint on nghttp2 and GnuTLS gets the traffic of a service, and a ztunnel passes on what it does with it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hbone import Node, two_nodes
from support.istio_peer import ISTIOS, ZTUNNELS, either_ztunnel
from support.nghttp2 import Http2Peer, Stream
from support.second_stack import OwnServer, identity
from support.ztunnel import PEER4, POD4, SECONDS, abort, read_all

pytestmark = pytest.mark.root

VIP, HOSTNAME = "10.99.0.1", "shop.demo.svc.cluster.local"
CANCEL = 8
MESH = f"""
workloads:
- {{uid: web, name: web, namespace: demo, serviceAccount: web, trustDomain: cluster.local, protocol: HBONE,
   workloadIps: [{POD4}], workloadName: web, workloadType: deployment, canonicalName: web, canonicalRevision: v1,
   clusterId: c1, services: {{}}}}
- {{uid: gate, name: gate, namespace: demo, serviceAccount: shop, trustDomain: cluster.local, protocol: HBONE,
   workloadIps: [{PEER4}], services: {{}}}}
services:
- {{name: shop, namespace: demo, hostname: {HOSTNAME}, vips: [/{VIP}], ports: {{80: 8080}},
   waypoint: {{destination: /{PEER4}, hboneMtlsPort: 15008}}}}
"""


@pytest.fixture(params=ZTUNNELS)
def whose(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def waypoint(whose: str, tmp_path: Path) -> Iterator[tuple[Node, OwnServer]]:
    """(web, with a ztunnel; the waypoint)."""
    mesh = tmp_path / "mesh.yaml"
    mesh.write_text(MESH)
    with (
        two_nodes(tmp_path) as (web, shop),
        either_ztunnel(whose, web, mesh, workers=1),
        contextlib.ExitStack() as made,
    ):
        yield web, OwnServer(web, shop, tmp_path, made)


def dialled(web: Node, server: OwnServer) -> tuple[Http2Peer, Stream, socket.socket]:
    """(the session, its first stream, answered, the application's end)."""
    application = web.pod.connect(VIP, 80)
    application.settimeout(SECONDS)
    peer = server.session()
    return peer, server.answered(peer, 0), application


def test_a_waypoint_gets_the_service_and_its_client(waypoint: tuple[Node, OwnServer]) -> None:
    peer, stream, application = dialled(*waypoint)
    with application:
        fields = dict(stream.blocks[0])
        assert (fields[":method"], fields[":authority"]) == ("CONNECT", f"{VIP}:80")
        source = "{}:{}".format(*application.getsockname())
        assert fields["forwarded"].replace(" ", "") == f'for="{source}";host={HOSTNAME}'
        assert {"k8s.namespace.name=demo", "k8s.deployment.name=web"} <= set(fields["baggage"].split(","))
        assert identity(peer.tls) == "spiffe://cluster.local/ns/demo/sa/web"
        application.sendall(b"question")
        application.shutdown(socket.SHUT_WR)
        peer.pump(lambda: stream.ended)
        assert stream.data == b"question"
        peer.send(stream, b"answer", end=True)
        peer.pump(lambda: not stream.sending)
        assert read_all(application) == b"answer"


def test_a_waypoint_that_resets_a_stream_resets_its_connection_alone(waypoint: tuple[Node, OwnServer]) -> None:
    web, server = waypoint
    peer, stream, application = dialled(web, server)
    with application, web.pod.connect(VIP, 80) as other:
        kept = server.answered(peer, 1)
        peer.reset(stream, CANCEL)
        peer.idle(0.1)
        with pytest.raises(ConnectionResetError):
            application.recv(1)
        other.sendall(b"on")
        peer.pump(lambda: kept.data == b"on")


def test_a_waypoint_that_refuses_is_the_end_of_the_connection(waypoint: tuple[Node, OwnServer]) -> None:
    web, server = waypoint
    with web.pod.connect(VIP, 80) as application:
        peer = server.session()
        peer.pump(lambda: peer.streams)
        peer.respond(peer.streams[1], "503")
        peer.idle(0.1)
        with contextlib.suppress(ConnectionResetError):
            assert application.recv(1) == b""


def test_after_the_end_of_a_waypoint_another_instance_is_asked(waypoint: tuple[Node, OwnServer], whose: str) -> None:
    if whose == ISTIOS:
        pytest.skip("the connection that has no answer yet fails")
    web, server = waypoint
    peer, _, first = dialled(web, server)
    with first, web.pod.connect(VIP, 80) as waiting:
        peer.pump(lambda: len(peer.streams) == 2)
        abort(peer.tls.link)
        with pytest.raises(ConnectionResetError):
            first.recv(1)
        other = server.session()
        stream = server.answered(other, 0)
        waiting.sendall(b"again")
        other.pump(lambda: stream.data == b"again")
