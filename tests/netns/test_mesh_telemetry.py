# SPDX-License-Identifier: Apache-2.0
"""Two ztunnels say of real connections what Istio's would: metrics, access log, configuration, readiness."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from support.hbone import Node, exchange, joined, refused, two_nodes
from support.ztunnel import PEER4, PEER6, POD4, POD6, SECONDS

from agent.kernel.http import OPENMETRICS
from agent.zds.messages import SnapshotSent

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
        for node in both:
            start(node, tmp_path / "mesh.yaml")
        yield both


PORTS = ("stats", "ready", "admin")


def start(node: Node, mesh: Path) -> None:
    """Starts a ztunnel with an access log and pages at free ports; the node's folder keeps them for `page`."""
    with contextlib.ExitStack() as made:
        for name in PORTS:
            free = made.enter_context(socket.create_server(("127.0.0.1", 0)))
            (node.folder / name).write_text(f"127.0.0.1:{free.getsockname()[1]}")
    node.start_with(mesh, f"access_log={str(node.folder / 'access')!r}, {addresses(node)}")


def addresses(node: Node) -> str:
    return ", ".join(f"{name}_address={(node.folder / name).read_text()!r}" for name in PORTS)


def page(node: Node, port: str, path: str, *, post: bool = False, accept: str = "") -> tuple[int, str, str]:
    """Returns (status, body, content type)."""
    link = http.client.HTTPConnection((node.folder / port).read_text(), timeout=SECONDS)
    with contextlib.closing(link):
        link.request("POST" if post else "GET", path, headers={"accept": accept} if accept else {})
        answer = link.getresponse()
        return answer.status, answer.read().decode(), answer.headers["content-type"]


def value(node: Node, name: str, **labels: str) -> tuple[float, dict[str, str]] | None:
    """Returns (value, all labels) of the metric with these labels."""
    for family in text_string_to_metric_families(page(node, "stats", "/metrics", accept=OPENMETRICS)[1]):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                return sample.value, sample.labels
    return None


def wait_value(node: Node, name: str, **labels: str) -> tuple[float, dict[str, str]]:
    until = time.monotonic() + SECONDS
    while (found := value(node, name, **labels)) is None:
        assert time.monotonic() < until, page(node, "stats", "/metrics")[1]
        time.sleep(0.05)
    return found


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
    port = exchange(*nodes, VIP, 80)[1]
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
    refused(*nodes)
    for node, error in zip(nodes, ("http status: 401", "policy demo/no-9000"), strict=True):
        line = log_line(node)
        assert "\terror\taccess\tconnection complete\t" in line
        assert error in line.partition(" error=")[2]


def test_each_end_counts_a_connection_with_every_label(nodes: tuple[Node, Node]) -> None:
    exchange(*nodes, VIP, 80)
    for node, reporter in zip(nodes, ("source", "destination"), strict=True):
        _, labels = wait_value(node, "istio_tcp_connections_closed_total", reporter=reporter)
        assert labels == {
            "reporter": reporter,
            "source_workload": "web-v1", "source_canonical_service": "web", "source_canonical_revision": "v1",
            "source_workload_namespace": "demo", "source_principal": WEB, "source_app": "web",
            "source_version": "v1", "source_cluster": "c1",
            "destination_service": "shop.demo.svc.cluster.local", "destination_service_namespace": "demo",
            "destination_service_name": "shop",
            "destination_workload": "shop-v2", "destination_canonical_service": "shop",
            "destination_canonical_revision": "v2", "destination_workload_namespace": "demo",
            "destination_principal": SHOP, "destination_app": "shop", "destination_version": "v2",
            "destination_cluster": "c1",
            "request_protocol": "tcp", "response_flags": "-", "connection_security_policy": "mutual_tls",
            "source_region": "north", "source_zone": "n1", "destination_region": "south", "destination_zone": "s1",
        }  # fmt: skip
        assert value(node, "istio_tcp_received_bytes_total") == (1000, labels)
        assert value(node, "istio_tcp_sent_bytes_total") == (3000, labels)
        assert value(node, "istio_tcp_connections_opened_total") == (1, labels)


def test_bytes_of_an_open_connection_are_counted(nodes: tuple[Node, Node]) -> None:
    web, shop = nodes
    with joined(web, shop, VIP, 80) as (client, server):
        client.sendall(b"question")
        assert server.recv(100) == b"question"
        for node in nodes:
            assert wait_value(node, "istio_tcp_received_bytes_total")[0] == 8
            assert value(node, "istio_tcp_connections_closed_total") is None
            assert wait_value(node, "istio_tcp_sockets_open")[0] == 1
        state = json.loads(page(web, "admin", "/config_dump")[1])["workloadState"]["uid-web"]
        port = client.getsockname()[1]
        assert state["connections"] == {
            "inbound": [],
            "outbound": [{
                "src": f"{POD4}:{port}", "originalDst": f"{VIP}:80", "actualDst": f"{PEER4}:15008",
                "protocol": "HBONE",
            }],
        }  # fmt: skip


def test_a_refused_connection_fails_with_the_flag_of_its_reason(nodes: tuple[Node, Node]) -> None:
    refused(*nodes)
    web, shop = nodes
    for node, flag in ((web, "CONNECT"), (shop, "DENY")):
        count, labels = wait_value(node, "istio_tcp_connections_failed_total", response_flags=flag)
        assert count == 1
        assert labels["source_principal"] == WEB
        assert wait_value(node, "istio_tcp_connections_closed_total")[1] == labels


def test_config_dump_describes_the_mesh_and_the_certificates(nodes: tuple[Node, Node]) -> None:
    exchange(*nodes, VIP, 80)
    dump = json.loads(page(nodes[0], "admin", "/config_dump")[1])
    assert [workload["uid"] for workload in dump["workloads"]] == ["shop", "web"]
    assert [service["hostname"] for service in dump["services"]] == ["shop.demo.svc.cluster.local"]
    assert [policy["name"] for policy in dump["policies"]] == ["no-9000"]
    (certificate,) = dump["certificates"]
    assert (certificate["identity"], certificate["state"]) == (WEB, "Available")
    assert certificate["certChain"][0]["serialNumber"].isdecimal()
    assert certificate["rootCerts"]
    assert "PRIVATE KEY" not in json.dumps(dump)
    state = dump["workloadState"]["uid-web"]
    assert state["state"] == "Up"
    assert state["info"] == {"name": "web", "namespace": "demo", "serviceAccount": "web"}


def test_levels_of_the_log_are_set_and_reset(nodes: tuple[Node, Node]) -> None:
    node = nodes[0]
    assert page(node, "admin", "/logging")[1] == "current log level is info\n"
    assert page(node, "admin", "/logging?level=ztunnel::mesh=debug,warn", post=True)[1] == (
        "current log level is agent.ztunnel.mesh=debug,warn\n"
    )
    assert page(node, "admin", "/logging?level=loud", post=True)[0] == 400
    assert page(node, "admin", "/logging?reset", post=True)[1].endswith("info\n")


def test_a_ztunnel_is_ready_while_it_knows_the_pods_of_the_agent(nodes: tuple[Node, Node]) -> None:
    node = nodes[0]
    assert page(node, "ready", "/healthz/ready")[:2] == (200, "ready\n")
    node.agent.link.close()
    node.agent.accept()
    assert page(node, "ready", "/healthz/ready")[:2] == (500, "not ready, pending: workload proxy manager\n")
    assert node.agent.ask(SnapshotSent()) == ""
    assert page(node, "ready", "/healthz/ready")[0] == 200


def test_a_second_instance_takes_the_ports_when_the_first_quits(nodes: tuple[Node, Node]) -> None:
    node = nodes[0]
    first = node.ztunnel
    node.start_with(node.folder.parent / "mesh.yaml", addresses(node))
    log = node.folder / "records.err"

    def wait_for(words: str) -> None:
        until = time.monotonic() + SECONDS
        while log.read_text().count(words) < len(PORTS):
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.05)

    wait_for("cannot listen on")
    assert page(node, "admin", "/quitquitquit")[0] == 405
    assert page(node, "admin", "/quitquitquit", post=True)[:2] == (200, "shutdown now\n")
    assert first.process.wait(SECONDS) == 0
    wait_for(": listening on")
    assert page(node, "ready", "/healthz/ready")[0] == 200
    assert log.read_text().count("cannot listen on") == len(PORTS)


def test_metrics_are_one_and_never_fall(nodes: tuple[Node, Node]) -> None:
    web, shop = nodes

    def opened() -> float:
        found = value(web, "istio_tcp_connections_opened_total", reporter="source")
        return found[0] if found else 0

    for number in range(6):
        exchange(web, shop, PEER4, 8080)
        assert opened() == number + 1
    web.ztunnel.kill_worker()
    assert opened() == 6
    for number in range(6, 10):
        exchange(web, shop, PEER4, 8080)
        assert opened() == number + 1
    assert value(web, "sluice_worker_restarts_total") == (1, {})


def test_a_new_worker_has_the_mesh_and_the_certificates(nodes: tuple[Node, Node]) -> None:
    for node in nodes:
        for pid in node.ztunnel.workers():
            os.kill(pid, signal.SIGKILL)
    for _ in range(4):
        exchange(*nodes, PEER4, 8080)
