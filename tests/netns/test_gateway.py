# SPDX-License-Identifier: Apache-2.0
"""Two clusters on two networks: double HBONE through an east-west gateway, three real processes, real packets."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography import x509
from prometheus_client.parser import text_string_to_metric_families
from support.hbone import PORTLESS
from support.hbone_server import Answer, hbone_server
from support.istio_peer import ZTUNNELS, either_ztunnel
from support.networks import (
    GATE_OUTSIDE,
    HOSTNAME,
    IDENTITY,
    SECOND,
    SHOP,
    VIP,
    Networks,
    shop_mesh,
    two_networks,
    web_mesh,
)
from support.ztunnel import SECONDS, abort, read_all

from agent.kernel.exec import run
from agent.lab.links import links
from agent.ztunnel.tls.contexts import make_contexts
from agent.ztunnel.tls.development_ca import DevelopmentCa
from agent.ztunnel.tls.spiffe import SpiffeId

pytestmark = pytest.mark.root

MEGABYTE = bytes(1 << 20)
QUIET = "ready_address='', admin_address=''"


@pytest.fixture
def networks(tmp_path: Path) -> Iterator[Networks]:
    with two_networks(tmp_path) as made:
        made.start_shop()
        made.start_gateway()
        made.start_web()
        yield made


def test_bytes_and_half_close_pass_both_ways(networks: Networks) -> None:
    payload = bytes(range(256)) * 20_000  # 5 MB
    for _ in range(2):  # the second one finds the outer session in the pool
        with networks.joined() as (client, server):
            assert server.getpeername()[0] == "10.82.0.1"  # as with Istio's gateway: the client is unknown here
            client.sendall(b"question")
            assert server.recv(100) == b"question"
            client.shutdown(socket.SHUT_WR)
            assert read_all(server) == b""
            server.sendall(payload)
            server.shutdown(socket.SHUT_WR)
            assert read_all(client) == payload
        with networks.joined() as (client, server):
            server.shutdown(socket.SHUT_WR)
            assert read_all(client) == b""
            client.sendall(payload)
            client.shutdown(socket.SHUT_WR)
            assert read_all(server) == payload
    outer = {record["via"] for record in networks.web.ztunnel.records()}
    assert outer == {f"{GATE_OUTSIDE}:15008"}
    assert {record["error"] for record in networks.web.ztunnel.records()} == {""}


def test_the_outer_session_is_pooled_and_its_streams_end(networks: Networks) -> None:
    for _ in range(20):
        with networks.joined() as (client, server):
            client.sendall(b"x")
            assert server.recv(1) == b"x"
    until = time.monotonic() + SECONDS
    # One session of each worker.
    while not 1 <= _sockets(networks, "sport = :15008") <= 2 or _sockets(networks, "dport = :15008"):
        assert time.monotonic() < until
        time.sleep(0.1)


def _sockets(networks: Networks, which: str) -> int:
    """The number of connections in the gateway's namespace."""
    found = run(["ss", "-Htn", "state", "established", which], netns=networks.gate.path).stdout
    return len(found.splitlines())


def test_a_reset_passes_both_ways(networks: Networks) -> None:
    for one in (0, 1):
        with networks.joined() as ends:
            ends[0].sendall(b"x")
            assert ends[1].recv(1) == b"x"
            abort(ends[one])
            with pytest.raises(ConnectionResetError):
                ends[1 - one].recv(1)


def test_a_slow_reader_holds_its_sender_and_nobody_else(networks: Networks) -> None:
    with ThreadPoolExecutor(1) as pool, networks.joined() as (client, server):
        sending = pool.submit(_send, client, 1024)
        taken = _take(server, 1 << 20)
        time.sleep(2)
        with networks.joined(81, 8081) as (other, end):  # on the same outer session
            for _ in range(100):
                other.sendall(b"ping")
                assert end.recv(4) == b"ping"
        assert not sending.done()
        processes = [networks.web.ztunnel.memory(), networks.shop.ztunnel.memory(), networks.gateway.memory()]
        assert max(processes) < 120 << 20
        assert _take(server, 1 << 30) + taken == 1 << 30
        sending.result(SECONDS)


def _send(end: socket.socket, count: int) -> None:
    for _ in range(count):
        end.sendall(MEGABYTE)
    end.shutdown(socket.SHUT_WR)


def _take(end: socket.socket, most: int) -> int:
    taken = 0
    while taken < most and (part := end.recv(min(1 << 20, most - taken))):
        taken += len(part)
    return taken


def test_no_label_of_either_end_is_unknown(tmp_path: Path) -> None:
    with contextlib.ExitStack() as made:
        ports = [made.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(2)]
    with two_networks(tmp_path) as networks:
        networks.start_shop(
            settings=f"stats_address='127.0.0.1:{ports[1]}', access_log={str(tmp_path / 'shop.log')!r}, {QUIET}"
        )
        networks.start_gateway()
        networks.start_web(
            settings=f"stats_address='127.0.0.1:{ports[0]}', access_log={str(tmp_path / 'web.log')!r}, {QUIET}"
        )
        with networks.joined() as (client, server):
            client.sendall(b"x")
            assert server.recv(1) == b"x"
        networks.web.ztunnel.wait_record(direction="outbound", close="fin")
        networks.shop.ztunnel.wait_record(direction="inbound", close="fin")
        source, destination = (_labels(port) for port in ports)
    assert "unknown" not in source.values(), source
    # Istio takes the app of a workload that is known by its baggage from the workload's name.
    assert source == {
        "reporter": "source", "source_workload": "web", "source_canonical_service": "web-app",
        "source_canonical_revision": "v1", "source_workload_namespace": "demo", "source_principal": IDENTITY + "web",
        "source_app": "web-app", "source_version": "v1", "source_cluster": "c1", "destination_service": HOSTNAME,
        "destination_service_namespace": "demo", "destination_service_name": "shop", "destination_workload": "shop",
        "destination_canonical_service": "shop-app", "destination_canonical_revision": "v2",
        "destination_workload_namespace": "demo", "destination_principal": IDENTITY + "shop",
        "destination_app": "shop", "destination_version": "v2", "destination_cluster": "c2", "request_protocol": "tcp",
        "response_flags": "-", "connection_security_policy": "mutual_tls", "source_region": "eu",
        "source_zone": "eu-1", "destination_region": "us", "destination_zone": "us-1",
    }  # fmt: skip
    swapped = {**source, "reporter": "destination", "source_app": "web", "destination_app": "shop-app"}
    assert destination == swapped
    line = (tmp_path / "web.log").read_text()
    for words in (f'src.identity="{IDENTITY}web"', f'dst.identity="{IDENTITY}shop"', 'dst.workload="shop"',
                  f"dst.addr={GATE_OUTSIDE}:15008", f"dst.hbone_addr={HOSTNAME}:80", 'dst.cluster="c2"'):  # fmt: skip
        assert words in line


def _labels(port: int) -> dict[str, str]:
    """The labels of the connection that the ztunnel has counted."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=SECONDS) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    found = [
        one.labels for family in families for one in family.samples if one.name == "istio_tcp_connections_closed_total"
    ]
    assert len(found) == 1
    return found[0]


def _refused(networks: Networks, *words: str) -> float:
    """Returns after how many seconds a connection ends without a byte; the record has the words."""
    began = time.monotonic()
    with contextlib.suppress(ConnectionResetError), networks.web.pod.connect(VIP, 80) as client:
        assert client.recv(1) == b""
    seconds = time.monotonic() - began
    record = networks.web.ztunnel.wait_record(direction="outbound")
    assert all(word in record["error"] for word in words), record
    return seconds


def test_another_identity_behind_the_gateway_is_refused(tmp_path: Path) -> None:
    with two_networks(tmp_path) as networks:
        networks.start_shop()
        networks.start_gateway()
        networks.start_web(web_mesh(account="other"))
        with networks.shop.pod.listen(SHOP, 8080):
            _refused(networks, f"the server is {IDENTITY}shop, not {IDENTITY}other")
        assert networks.shop.ztunnel.records() == []


def test_another_identity_of_the_gateway_is_refused(tmp_path: Path) -> None:
    with two_networks(tmp_path) as networks:
        networks.start_shop()
        gateway = networks.start_gateway(account="other")
        networks.start_web()
        _refused(networks, "gateway: ", f"the server is {IDENTITY}other, not {IDENTITY}gate")
        assert not gateway.records.exists()


def test_a_gateway_that_is_away_is_a_refusal_in_time(tmp_path: Path) -> None:
    with two_networks(tmp_path) as networks:
        networks.start_shop()
        networks.start_web()
        assert _refused(networks, "gateway: Connection refused") < 2
        with links(networks.gate.name) as gate:
            gate.rtnl.link("set", index=gate.index("out"), state="down")
        networks.web.ztunnel.path.write_text("")
        assert _refused(networks, "gateway: ") < 12


@pytest.mark.parametrize(("silent", "words"), [("gateway", "gateway: "), ("shop", "behind the gateway")])
def test_a_process_that_does_not_answer_is_a_refusal_in_time(tmp_path: Path, silent: str, words: str) -> None:
    with two_networks(tmp_path) as networks:
        networks.start_shop()
        networks.start_gateway()
        networks.start_web(settings="stats_address='', connect_seconds=2, " + QUIET)
        shop = networks.shop.ztunnel
        stopped = {"gateway": [networks.gateway.process.pid], "shop": [shop.process.pid, *shop.workers()]}[silent]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        assert _refused(networks, "timed out") < 6
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
        with networks.joined() as (client, server):
            client.sendall(b"x")
            assert server.recv(1) == b"x"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Answer.GARBAGE, "TLS: "),
        (Answer.END, "Connection reset by peer"),
        (Answer.SILENCE, "connect timed out behind the gateway"),
        (Answer.RESET, "the peer reset the stream (INTERNAL_ERROR)"),
        (Answer.REFUSED, "http status: 404, from the gateway"),
    ],
)
def test_a_gateway_that_leads_nowhere_is_a_refusal_in_time(tmp_path: Path, answer: Answer, words: str) -> None:
    with (
        two_networks(tmp_path) as networks,
        hbone_server(networks.gate, GATE_OUTSIDE, tmp_path / "ca", "gate", answer=answer) as gateway,
    ):
        networks.start_web(settings="stats_address='', connect_seconds=2, " + QUIET)
        assert _refused(networks, words) < 5
    assert [asked[":authority"] for asked in gateway.requests] == [f"{HOSTNAME}:80"]
    assert "x-forwarded-network" not in gateway.requests[0]  # it is the inner request's


def test_a_gateway_may_listen_on_another_port(tmp_path: Path) -> None:
    with two_networks(tmp_path) as networks:
        networks.start_shop()
        networks.start_gateway("--gateway-address", "0.0.0.0:15443")
        networks.start_web(web_mesh().replace("hboneMtlsPort: 15008", "hboneMtlsPort: 15443"))
        with networks.joined() as (client, server):
            client.sendall(b"x")
            assert server.recv(1) == b"x"


def test_a_gateway_that_ends_resets_its_connections(networks: Networks) -> None:
    with networks.joined() as (client, server):
        client.sendall(b"x")
        assert server.recv(1) == b"x"
        networks.gateway.close()
        for end in (client, server):
            with pytest.raises(ConnectionResetError):
                end.recv(1)
    assert "gateway: " in networks.web.ztunnel.wait_record(direction="outbound")["error"]
    networks.start_gateway()
    with networks.joined() as (client, server):
        client.sendall(b"y")
        assert server.recv(1) == b"y"


def test_a_service_without_endpoint_in_the_network_is_refused_by_the_gateway(tmp_path: Path) -> None:
    with two_networks(tmp_path) as networks:
        networks.start_shop(
            shop_mesh().replace(
                "protocol: HBONE,\n   network: two, workloadIps: [10.82",
                "protocol: TCP,\n   network: two, workloadIps: [10.82",
            )
        )
        gateway = networks.start_gateway()
        networks.start_web()
        _refused(networks, "http status: 503, from the gateway")
        assert f"no healthy upstream for {HOSTNAME}, port 80" in gateway.log.read_text()


@pytest.mark.parametrize(("principal", "served"), [("web", True), ("gate", False)])
def test_policies_see_the_identity_of_the_client_not_of_the_gateway(
    tmp_path: Path, principal: str, served: bool
) -> None:
    only = f"""
policies:
- {{name: only, namespace: demo, scope: Namespace, action: Allow, dryRun: false,
   rules: [[[{{principals: [!Exact cluster.local/ns/demo/sa/{principal}]}}]]]}}
"""
    with two_networks(tmp_path) as networks:
        networks.start_shop(shop_mesh() + only)
        networks.start_gateway()
        networks.start_web()
        if not served:
            _refused(networks, "http status: 401")
            return
        with networks.joined() as (client, server):
            client.sendall(b"x")
            assert server.recv(1) == b"x"


@pytest.mark.parametrize("ztunnel", ZTUNNELS)
def test_a_gateway_leads_to_the_waypoint_of_the_service(tmp_path: Path, ztunnel: str) -> None:
    """The request within the tunnel is that of the specification, section 3."""
    waypoint = f"""
- {{uid: waypoint, name: waypoint, namespace: demo, serviceAccount: shop, trustDomain: cluster.local, protocol: HBONE,
   network: two, workloadIps: [{SECOND}], services: {{}}}}
"""
    (tmp_path / "shop.yaml").write_text(
        shop_mesh(waypoint, f", waypoint: {{destination: two/{SECOND}, hboneMtlsPort: 15008}}")
    )
    (tmp_path / "web.yaml").write_text(web_mesh())
    with two_networks(tmp_path) as networks:
        networks.start_gateway()
        with (
            either_ztunnel(ztunnel, networks.web, tmp_path / "web.yaml", "one"),
            hbone_server(networks.shop.pod, SECOND, tmp_path / "ca", "shop") as end,
            networks.web.pod.connect(VIP, 80) as client,
        ):
            client.sendall(b"question")
            client.shutdown(socket.SHUT_WR)
            assert read_all(client) == b"question"
            source = "{}:{}".format(*client.getsockname())
    (asked,) = end.requests
    del asked["traceparent"]
    assert asked == {
        ":method": "CONNECT", ":authority": f"{HOSTNAME}:80", "forwarded": f'for="{source}";host={HOSTNAME}',
        "x-forwarded-network": "one", "baggage": "k8s.cluster.name=c1,k8s.namespace.name=demo,"
        "k8s.deployment.name=web,service.name=web-app,service.version=v1,cloud.region=eu,cloud.availability_zone=eu-1",
    }  # fmt: skip
    assert end.peers == [IDENTITY + "web"]


def test_a_revoked_gateway_loses_its_open_connections(tmp_path: Path) -> None:
    ca = DevelopmentCa(tmp_path / "ca")
    lists = tmp_path / "revoked.pem"
    lists.write_bytes(ca.revocation_list(()))
    with two_networks(tmp_path) as networks:
        networks.start_shop()
        networks.start_gateway()
        networks.start_web(
            settings=f"{PORTLESS}, revocation_lists={str(lists)!r}, access_log={str(tmp_path / 'log')!r}"
        )
        with networks.joined() as (client, server):
            client.sendall(b"x")
            assert server.recv(1) == b"x"
            serial = _serial(networks, ca)
            lists.with_suffix(".new").write_bytes(ca.revocation_list((serial,)))
            lists.with_suffix(".new").replace(lists)
            for end in (client, server):
                with pytest.raises(ConnectionResetError):
                    end.recv(1)
        record = networks.web.ztunnel.wait_record(kind="hbone", direction="outbound")
        assert record["error"].startswith("gateway: ") and f"{serial:x}" in record["error"]


def _serial(networks: Networks, ca: DevelopmentCa) -> int:
    """The number of the gateway's certificate."""
    context = make_contexts(ca.issue(SpiffeId("cluster.local", "demo", "web"))).client
    with (
        networks.web.pod.call(lambda: socket.create_connection((GATE_OUTSIDE, 15008))) as plain,
        context.wrap_socket(plain) as secure,
    ):
        return x509.load_der_x509_certificate(secure.getpeercert(binary_form=True) or b"").serial_number


def test_a_draining_gateway_ends_its_connections_in_time_and_refuses_no_stream(networks: Networks) -> None:
    with networks.joined() as (client, server):
        client.sendall(b"x")
        assert server.recv(1) == b"x"
        networks.gateway.process.terminate()
        time.sleep(0.5)
        client.sendall(b"y")
        assert server.recv(1) == b"y"
    assert networks.gateway.process.wait(SECONDS) == 0
