# SPDX-License-Identifier: Apache-2.0
"""Our ztunnel and Istio's, at the two ends of one connection, say the same of it.

Runs where SLUICE_REAL_ZTUNNEL names a binary of Istio's.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.dns import DNS, DNSQR
from support.hbone import Node, exchange, joined, refused, two_nodes
from support.istio_peer import WAYS, IstioZtunnel, istio_ztunnel, needs_real
from support.ztunnel import PEER4, PEER6, POD4, POD6, RESOLVER4, SECONDS

from agent.flows.wire_evidence import Carriage, Row, Wire, WireEvidence, wire_evidence
from agent.ztunnel.tls.development_ca import DevelopmentCa

pytestmark = [pytest.mark.root, needs_real]

VIP = "10.99.0.1"
MESH = f"""
workloads:
- {{uid: web, name: web, namespace: demo, serviceAccount: web, trustDomain: cluster.local, protocol: HBONE,
   workloadIps: [{POD4}, "{POD6}"], workloadName: web-v1, workloadType: deployment, canonicalName: web,
   canonicalRevision: v1, clusterId: c1, locality: {{region: north, zone: n1, subzone: ""}}, services: {{}}}}
- {{uid: shop, name: shop, namespace: demo, serviceAccount: shop, trustDomain: cluster.local, protocol: HBONE,
   workloadIps: [{PEER4}, "{PEER6}"], workloadName: shop-v2, workloadType: deployment, canonicalName: shop,
   clusterId: c1, services: {{demo/shop.demo.svc.cluster.local: {{80: 8080}}}}}}
- {{uid: gate, name: gate, namespace: other, serviceAccount: gate, trustDomain: cluster.local, protocol: HBONE,
   workloadIps: [10.98.0.1], applicationTunnel: {{protocol: PROXY}}, nativeTunnel: true, status: Unhealthy,
   networkMode: HostNetwork, capacity: 3, node: n1, authorizationPolicies: [other/strings], services: {{}}}}
- {{uid: outside, name: outside, namespace: other, protocol: TCP, workloadIps: [], hostname: example.com,
   network: far, networkGateway: {{destination: other/gate.other, hboneMtlsPort: 15008}},
   waypoint: {{destination: far/10.98.0.1, hboneMtlsPort: 15008}}, services: {{}}}}
services:
- {{name: shop, namespace: demo, hostname: shop.demo.svc.cluster.local, vips: [/{VIP}], ports: {{80: 8080}}}}
- {{name: all, namespace: other, hostname: "*.example.com", vips: [far/10.97.0.1, "/fd97::1"],
   cidrVips: [{{network: "", cidr: 10.96.0.0/16}}],
   ports: {{443: 8443}}, subjectAltNames: ["spiffe://td/ns/a/sa/b"], ipFamilies: Dual, canonical: true,
   visibility: Namespace, waypoint: {{destination: other/gate.other, hboneMtlsPort: 15008}},
   weightedWaypoints: [{{destination: {{destination: other/gate.other, hboneMtlsPort: 15008}}, weight: 3}}],
   loadBalancer: {{routingPreferences: [Region, Zone], mode: Failover, healthPolicy: AllowAll}}}}
- {{name: none, namespace: other, hostname: none.other.svc.cluster.local, vips: [], ports: {{}}}}
policies:
- {{name: strings, namespace: other, scope: WorkloadSelector, action: Allow, dryRun: true,
   rules: [[[{{namespaces: [!Prefix a, !Suffix b, !Exact c, !Presence []], notPrincipals: [!Presence []],
   serviceAccounts: [{{namespace: a, serviceAccount: b}}], sourceIps: [10.0.0.0/8], notDestinationIps: ["fd00::/8"],
   notDestinationPorts: [22]}}], []], []]}}
- {{name: no-9000, namespace: demo, scope: Namespace, action: Deny, dryRun: false,
   rules: [[[{{destinationPorts: [9000]}}]]]}}
"""
# Of metrics that ours does not have: tokio is the runtime of Istio's, and host names are not resolved on demand.
ABSENT = {"istio_on_demand_dns"}


class Ends:
    """The pods, and the pages of both ztunnels."""

    def __init__(self, web: Node, shop: Node, ours: Node, istio: IstioZtunnel, ports: dict[str, int]) -> None:
        self.web, self.shop, self.istio, self._ports, self._ours = web, shop, istio, ports, ours

    def ours(self, port: str, path: str) -> str:
        link = http.client.HTTPConnection("127.0.0.1", self._ports[port], timeout=SECONDS)
        with contextlib.closing(link):
            link.request("GET", path)
            return link.getresponse().read().decode()

    def metrics(self) -> tuple[str, str]:
        return self.ours("stats", "/stats/prometheus"), self.istio.page(15020, "/stats/prometheus")

    def evidence(self, since: float, outbound: Row, inbound: Row) -> list[tuple[WireEvidence, Row]]:
        """(what the client's ztunnel says, its connection) and the same of the server's."""
        dumps = self.ours("admin", "/config_dump"), self.istio.page(15000, "/config_dump")
        pages = [(json.loads(dump), metrics) for dump, metrics in zip(dumps, self.metrics(), strict=True)]
        both = [wire_evidence([page], since, time.time()) for page in pages]
        return list(zip(both if self._ours is self.web else reversed(both), (outbound, inbound), strict=True))

    def logs(self) -> tuple[str, str]:
        path = self._ours.folder / "access"
        return path.read_text() if path.exists() else "", self.istio.log.read_text()


@pytest.fixture(params=WAYS)
def ends(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ends]:
    mesh = tmp_path / "mesh.yaml"
    mesh.write_text(MESH)
    with contextlib.ExitStack() as free:
        listeners = {
            name: free.enter_context(socket.create_server(("127.0.0.1", 0))) for name in ("stats", "ready", "admin")
        }
        ports = {name: listener.getsockname()[1] for name, listener in listeners.items()}
    with two_nodes(tmp_path) as (web, shop):
        ours, theirs = (web, shop) if request.param == WAYS[0] else (shop, web)
        addresses = ", ".join(f"{name}_address='127.0.0.1:{port}'" for name, port in ports.items())
        ours.start_with(mesh, f"access_log={str(ours.folder / 'access')!r}, cluster_id='c1', {addresses}")
        with istio_ztunnel(theirs, mesh, DevelopmentCa(tmp_path / "ca")) as istio:
            yield Ends(web, shop, ours, istio, ports)


def series(text: str, families: str = "istio_tcp_") -> dict[str, str]:
    """Lines of the metrics, labels as they are written; each reporter's name is left out."""
    found = {}
    for line in text.splitlines():
        if line.startswith(families):
            name, _, value = line.rpartition(" ")
            found[re.sub(r'reporter="\w+"', "reporter", name)] = value
    return found


def dns_series(text: str) -> dict[str, str]:
    """Values by series, without those that depend on time or on the pod."""
    found = {}
    for line in text.splitlines():
        if line.startswith("istio_dns_"):
            name, _, value = line.rpartition(" ")
            name = re.sub(r'(source_canonical_\w+)="\w+"', r"\1", name)
            found[name] = "" if "_sum{" in name or "_bucket{" in name else value
    return found


def without_inbound_service(text: str) -> str:
    """Istio's does not know the services of a workload from a local file, so its inbound end names none."""
    pattern = r'destination_service(_namespace|_name)?="[^"]*"'
    return re.sub(pattern, r"destination_service\1", text)


def wait(ends: Ends, words: str) -> None:
    until = time.monotonic() + SECONDS
    while not all(words in text for text in ends.metrics()):
        assert time.monotonic() < until, ends.metrics()
        time.sleep(0.05)


def test_both_ends_count_a_connection_alike(ends: Ends) -> None:
    exchange(ends.web, ends.shop, VIP, 80)
    wait(ends, "istio_tcp_connections_closed_total{")
    ours, theirs = (series(without_inbound_service(text)) for text in ends.metrics())
    for found in (ours, theirs):  # a session stays open at its server
        del found["istio_tcp_sockets_open{reporter}"]
    assert ours == theirs
    assert len(ours) == 4


def test_both_ends_count_a_refused_connection(ends: Ends) -> None:
    refused(ends.web, ends.shop)
    wait(ends, "istio_tcp_connections_failed_total{")
    found = [
        {re.sub(r'response_flags="\w+"', "response_flags", name) for name in series(text)} for text in ends.metrics()
    ]
    names = [{name.partition("{")[0] for name in each} for each in found]
    assert names[0] == names[1]
    labels = [{name for name in each if "failed" in name} for each in found]
    assert labels[0] == labels[1]
    assert all('response_flags="DENY"' in text or 'response_flags="CONNECT"' in text for text in ends.metrics())


def test_queries_are_counted_alike(ends: Ends) -> None:
    """Both answer names of the mesh and are refused by the resolver for others."""
    asked = []
    for pod, resolver in ((ends.web.pod, RESOLVER4), (ends.shop.pod, POD4)):
        for name, kind in (("shop.demo", "A"), ("shop.demo", "AAAA"), ("example.com", "MX")):
            message = bytes(DNS(id=7, rd=1, qd=DNSQR(qname=name, qtype=kind)))
            with pod.make(kind=socket.SOCK_DGRAM) as client, pod.make() as other:
                client.sendto(message, (resolver, 53))
                by_udp = DNS(client.recv(2000))
                other.connect((resolver, 53))
                other.sendall(len(message).to_bytes(2) + message)
                by_tcp = DNS(other.recv(2000)[2:])
                assert (by_udp.rcode, by_udp.ancount) == (by_tcp.rcode, by_tcp.ancount)
                asked.append((by_udp.rcode, by_udp.ancount, by_udp.aa))
    assert asked[:3] == asked[3:] == [(0, 1, 1), (0, 0, 1), (2, 0, 0)]
    ours, theirs = (dns_series(text) for text in ends.metrics())
    assert ours == theirs
    assert len(ours) == 6 + 2 * 2 + 2 * 9  # requests, to the resolver and failed, buckets with sum and count


def test_every_metric_of_istio_that_the_process_counts_is_there(ends: Ends) -> None:
    exchange(ends.web, ends.shop, VIP, 80)
    wait(ends, "istio_tcp_connections_closed_total{")
    ours, theirs = (
        {words[2]: words[3] for line in text.splitlines() if (words := line.split())[:2] == ["#", "TYPE"]}
        for text in ends.metrics()
    )
    wanted = {name: kind for name, kind in theirs.items() if not name.startswith("tokio_") and name not in ABSENT}
    with_values = {
        name: kind for name, kind in wanted.items() if re.search(rf"^{name}(_total)?[{{ ]", ends.metrics()[1], re.M)
    }
    assert with_values.items() <= ours.items()


def test_both_log_the_same_fields_in_the_same_order(ends: Ends) -> None:
    exchange(ends.web, ends.shop, VIP, 80)
    until = time.monotonic() + SECONDS
    while not all("connection complete" in text for text in ends.logs()):
        assert time.monotonic() < until
        time.sleep(0.05)
    lines = [next(line for line in text.splitlines() if "connection complete" in line) for text in ends.logs()]
    assert lines[0].split("\t")[1:4] == lines[1].split("\t")[1:4]
    ours, theirs = ([pair.split("=") for pair in line.split("\t")[4].split(" ")] for line in lines)
    if ["direction", '"outbound"'] in ours:
        ours.remove(["dst.service", '"shop.demo.svc.cluster.local"'])  # see without_inbound_service
    assert [key for key, _ in ours] == [key for key, _ in theirs]
    same = [[pair for pair in pairs if pair[0][:4] in ("src.", "dst.")][1:] for pairs in (ours, theirs)]
    assert same[0] == same[1]


def test_config_dump_has_the_keys_of_istios(ends: Ends) -> None:
    exchange(ends.web, ends.shop, VIP, 80)
    ours: dict[str, Any] = json.loads(ends.ours("admin", "/config_dump"))
    theirs: dict[str, Any] = json.loads(ends.istio.page(15000, "/config_dump"))
    for key in ("workloads", "services", "policies"):
        mine = sorted(ours[key], key=lambda one: one["name"])
        others = sorted(theirs[key], key=lambda one: one["name"])
        for one, other in zip(mine, others, strict=True):
            if key == "workloads":
                one.pop("services", None)  # Istio's does not know them from a local file
            assert one == other
    issued = [next(each for each in dump["certificates"] if each["certChain"]) for dump in (ours, theirs)]
    assert issued[0].keys() == issued[1].keys()
    assert issued[0]["certChain"][0].keys() == issued[1]["certChain"][0].keys()
    (mine,) = ours["workloadState"].values()
    (other,) = theirs["workloadState"].values()
    assert mine.keys() == other.keys()
    assert mine["info"].keys() == other["info"].keys()


def test_both_tell_how_a_connection_goes_on(ends: Ends) -> None:
    """As `sluice connections --wire` reads it: from the dump while it is open, from the counts when it has ended."""
    since = time.time() - 1
    web, shop = (f"spiffe://cluster.local/ns/demo/sa/{name}" for name in ("web", "shop"))
    with joined(ends.web, ends.shop, VIP, 80) as (client, server):
        client.sendall(b"question")
        assert server.recv(8) == b"question"
        outbound, inbound = (
            {"direction": direction, "fate": "captured", "local": _text(local), "remote": _text(remote),
             "opened": since + 0.5, "closed": None, "sent_bytes": 8, "received_bytes": 8}
            for direction, local, remote in (
                ("outbound", client.getsockname(), client.getpeername()),
                ("inbound", server.getsockname(), server.getpeername()),
            )
        )  # fmt: skip
        known = ends.evidence(since, outbound, inbound)
    open_ways = [one.carriage(row) for one, row in known]
    assert {replace(one, counted={}).carriage(row) for one, row in known} == {Carriage(Wire.HBONE)}
    assert open_ways == [Carriage(Wire.HBONE, web, shop), Carriage(Wire.HBONE, shop, web)]
    for row in (outbound, inbound):
        row["closed"] = time.time()
    ended = [one.carriage(row) for one, row in ends.evidence(since, outbound, inbound)]
    assert ended == open_ways


def _text(address: tuple[str, int]) -> str:
    return f"{address[0]}:{address[1]}"
