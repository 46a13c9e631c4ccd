# SPDX-License-Identifier: Apache-2.0
"""DNS of a pod in a mesh, with real packets over UDP and TCP: names of the mesh, all else, and broken resolvers."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import struct
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from scapy.layers.dns import DNS, DNSQR, DNSRROPT
from support.hbone import PORTLESS
from support.leaking import marking
from support.mesh_dns import ENDPOINTS, NAMED, NAMELESS, VIP, addresses, framed, message, query, read, resolving, serve
from support.ztunnel import PEER4, RESOLVER4, RESOLVER6, SECONDS, Lab, labs, read_all

from agent.lab.links import links
from agent.ztunnel.dns.dns_connection import MOST_PENDING
from agent.ztunnel.dns.dnsmessage import failure
from agent.ztunnel.relay.pod_context import SMALL_PART

pytestmark = pytest.mark.root


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """One pod in a mesh; the peer is the network, and has resolvers or not."""
    with labs(tmp_path) as made:
        serve(made)
        yield made


@pytest.mark.parametrize("host", [RESOLVER4, RESOLVER6])
def test_names_of_the_mesh_need_no_resolver(lab: Lab, host: str) -> None:
    with lab.pod.connect(host, 53) as client:
        for number in (1, 2):
            client.sendall(framed(query(number, "shop.demo")))
            answer = message(client)
            assert (DNS(answer).id, addresses(answer)) == (number, [VIP])
        client.sendall(framed(query(3, "shop.demo", "AAAA")))
        nothing = DNS(message(client))
        assert (nothing.id, nothing.rcode, nothing.ancount, nothing.aa) == (3, 0, 0, 1)
    assert lab.ztunnel.wait_record(kind="dns", close="mesh")["destination"].rstrip("0123456789").endswith(":")


OTHERS = {
    "another name": query(7),
    "another type": query(7, "shop.demo", "SRV"),
    "EDNS with options": query(7, ar=[DNSRROPT(rclass=1232, rdata=b"")]),
    "another class": bytes(DNS(id=7, rd=1, qd=DNSQR(qname="version.bind", qtype="TXT", qclass=3))),
    "UPDATE": bytes(DNS(id=7, opcode=5, qd=DNSQR(qname="shop.demo", qtype="SOA"))) + bytes(40),
    "NOTIFY": bytes(DNS(id=7, opcode=4, qd=DNSQR(qname="shop.demo", qtype="SOA"))),
    "two questions": bytes(DNS(id=7, rd=1, qd=[DNSQR(qname="shop.demo"), DNSQR(qname="shop.demo")])),
    "no DNS": b"\0\1",
    "nothing": b"",
    "64 KiB": query(7) + os.urandom(65535 - len(query(7))),
}


def test_everything_else_passes_unchanged(lab: Lab) -> None:
    for host, other in itertools.product((RESOLVER4, RESOLVER6), OTHERS):
        _passes_unchanged(lab, framed(OTHERS[other]), host)


def _passes_unchanged(lab: Lab, asked: bytes, host: str) -> None:
    answer = framed(b"\0\7\x81\x80" + os.urandom(65531))
    with resolving(lab, host) as (client, accept):
        client.sendall(asked)
        server = accept()
        assert read(server, len(asked)) == asked
        server.sendall(answer)
        assert read(client, len(answer)) == answer
        client.sendall(framed(query(8, "shop.demo")))  # the connection is still that of a pod in a mesh
        assert addresses(message(client)) == [VIP]
        client.shutdown(socket.SHUT_WR)
        assert server.recv(1) == b""
        server.close()
        assert client.recv(1) == b""


def test_a_transfer_has_many_messages_and_outlives_the_clients_end(lab: Lab) -> None:
    asked = framed(query(7, "example.com", "AXFR"))
    parts = [framed(b"\0\7\x84\0" + os.urandom(size)) for size in (10, 65531, 3000)]
    with resolving(lab) as (client, accept):
        client.sendall(asked)
        client.shutdown(socket.SHUT_WR)
        server = accept()
        assert read_all(server) == asked
        for part in parts:
            server.sendall(part)
            assert read(client, len(part)) == part
        server.close()
        assert client.recv(1) == b""
    assert lab.ztunnel.wait_record(kind="dns", close="fin")["received"] == 14


def test_queries_in_one_segment_are_answered_by_whom_they_concern(lab: Lab) -> None:
    with resolving(lab) as (client, accept):
        client.sendall(framed(query(1), query(2, "shop.demo"), query(3, "example.org"), query(4, "shop.demo")))
        assert [DNS(message(client)).id for _ in range(2)] == [2, 4]
        server = accept()
        assert [message(server) for _ in range(2)] == [query(1), query(3, "example.org")]
        server.sendall(framed(b"\0\3\x81\x80three", b"\0\1\x81\x80one"))
        assert [message(client) for _ in range(2)] == [b"\0\3\x81\x80three", b"\0\1\x81\x80one"]


def test_segments_of_one_byte(lab: Lab) -> None:
    with resolving(lab) as (client, accept):
        stream = framed(query(1, "shop.demo"), query(2), query(3, "shop.demo"))
        for at in range(len(stream)):
            client.sendall(stream[at : at + 1])
            time.sleep(0.001)
        assert [addresses(message(client)) for _ in range(2)] == [[VIP], [VIP]]
        server = accept()
        assert message(server) == query(2)
        for byte in framed(b"\0\2\x81\x80two"):
            server.sendall(bytes((byte,)))
            time.sleep(0.001)
        assert message(client) == b"\0\2\x81\x80two"


def test_an_answer_of_the_mesh_never_interrupts_a_message(lab: Lab) -> None:
    long = framed(b"\0\1\x81\x80" + os.urandom(65531))
    with resolving(lab) as (client, accept):
        client.sendall(framed(query(1)))
        server = accept()
        assert message(server) == query(1)
        server.sendall(long[:40000])
        assert read(client, 40000) == long[:40000]
        client.sendall(framed(query(2, "shop.demo")))
        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.recv(1)
        client.settimeout(SECONDS)
        server.sendall(long[40000:])
        assert read(client, len(long) - 40000) == long[40000:]
        assert addresses(message(client)) == [VIP]


def test_many_queries_at_once_are_read_as_they_are_answered(lab: Lab) -> None:
    count = 5 * MOST_PENDING
    with resolving(lab) as (client, accept):
        sender = threading.Thread(target=client.sendall, args=(framed(*(query(n) for n in range(count))),))
        sender.start()
        server = accept()
        first = [message(server) for _ in range(MOST_PENDING)]
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.recv(1)
        server.settimeout(SECONDS)
        server.sendall(framed(*(one[:2] + b"\x81\x80" for one in first)))
        for _ in range(count - MOST_PENDING):
            server.sendall(framed(message(server)[:2] + b"\x81\x80"))
        sender.join()
        assert [message(client)[:2] for _ in range(count)] == [struct.pack(">H", n) for n in range(count)]


def test_an_answer_too_large_for_udp_comes_by_tcp(lab: Lab) -> None:
    def asked(edns: int) -> DNS:
        with lab.pod.make(kind=socket.SOCK_DGRAM) as client:
            client.sendto(query(7, "many.demo", ar=[DNSRROPT(rclass=edns)] if edns else []), (RESOLVER4, 53))
            answer = client.recv(9000)
            assert len(answer) <= max(512, edns)
            return DNS(answer)

    assert [(asked(edns).tc, asked(edns).ancount) for edns in (0, 1232, 4096)] == [(1, 0), (1, 0), (0, ENDPOINTS)]
    with lab.pod.connect(RESOLVER4, 53) as client:
        client.sendall(framed(query(7, "many.demo")))
        assert set(addresses(message(client))) == {f"10.98.0.{number}" for number in range(ENDPOINTS)}


def test_another_protocol_on_the_port_of_dns_passes(lab: Lab) -> None:
    with resolving(lab) as (client, accept):
        client.sendall(b"SSH-2.0-client\r\n")
        server = accept()
        assert read(server, 16) == b"SSH-2.0-client\r\n"
        server.sendall(b"SSH-2.0-server\r\n")
        assert read(client, 16) == b"SSH-2.0-server\r\n"
        data = os.urandom(1 << 20)
        sender = threading.Thread(target=client.sendall, args=(data,))
        sender.start()
        assert read(server, len(data)) == data
        sender.join()
        server.close()
        assert client.recv(1) == b""
    record = lab.ztunnel.wait_record(kind="tcp", close="fin")
    assert (record["sent"], record["received"]) == (16 + len(data), 16)


# Workloads that have only a host name


def test_a_workload_with_a_host_name_alone_is_resolved(lab: Lab) -> None:
    with links(lab.pod.name) as pod:
        pod.add_route("default", PEER4)
    with lab.peer.listen(PEER4, 8080) as listener:
        for _ in range(2):  # the second time from the store
            with lab.pod.connect(NAMED, 80) as client:
                listener.settimeout(SECONDS)
                with listener.accept()[0] as server:
                    client.sendall(b"named")
                    assert read(server, 5) == b"named"
    assert lab.ztunnel.wait_record(kind="tcp", close="fin")["destination"] == f"{PEER4}:8080"


def test_a_host_name_that_cannot_be_resolved_is_the_reason(lab: Lab) -> None:
    with links(lab.pod.name) as pod:
        pod.add_route("default", PEER4)
    with pytest.raises(ConnectionResetError), lab.pod.connect(NAMELESS, 80) as client:
        client.recv(1)
    record = lab.ztunnel.wait_record(kind="tcp", close="refused")
    assert record["error"] == "host name a..b cannot be resolved"


# Resolvers that are broken


def test_a_connection_of_its_own_that_comes_back_is_refused(lab: Lab) -> None:
    with resolving(lab) as (client, _), marking(lab.pod.path, "meta l4proto tcp", 0x40000):
        client.sendall(framed(query(1)))
        assert message(client) == failure(query(1))
    assert "overwrites its mark" in lab.ztunnel.wait_record(kind="tcp", close="refused")["error"]


def test_queries_are_counted(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with labs(tmp_path) as lab:
        serve(lab, f"stats_address='127.0.0.1:{port}', ready_address='', admin_address=''")
        with lab.pod.make(kind=socket.SOCK_DGRAM) as client, lab.pod.connect(RESOLVER4, 53) as other:
            client.sendto(query(1, "shop.demo"), (RESOLVER4, 53))
            client.recv(2000)
            other.sendall(framed(query(2, kind="MX"), query(3, kind=65000)))
            assert sorted(message(other)[:2] for _ in range(2)) == [b"\0\2", b"\0\3"]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=SECONDS) as page:
            lines = page.read().decode().splitlines()

    def value(name: str, kind: str, protocol: str, first: str = "") -> str:
        labels = (
            f'{first}request_query_type="{kind}",request_protocol="{protocol}",'
            f'source_canonical_service="web",source_canonical_revision="v1"'
        )
        start = f"{name}{{{labels}}} "
        return next((line.removeprefix(start) for line in lines if line.startswith(start)), "")

    assert value("istio_dns_requests_total", "a", "udp") == "1"
    assert value("istio_dns_upstream_requests_total", "a", "udp") == ""
    for kind in ("mx", "unknown"):
        assert [
            value(f"istio_dns_{name}_total", kind, "tcp")
            for name in ("requests", "upstream_requests", "upstream_failures")
        ] == ["1"] * 3
    duration = "istio_dns_upstream_request_duration_seconds"
    assert value(f"{duration}_bucket", "mx", "tcp", 'le="+Inf",') == value(f"{duration}_count", "mx", "tcp") == "1"


def test_a_pod_has_its_share_of_connections_to_resolvers(tmp_path: Path) -> None:
    most = 10
    with labs(tmp_path) as lab:
        serve(lab, f"share={most * SMALL_PART}, workers=1, {PORTLESS}")
        with contextlib.ExitStack() as held:
            for _ in range(most):
                held.enter_context(lab.pod.connect(RESOLVER4, 53))
            with pytest.raises(ConnectionResetError), lab.pod.connect(RESOLVER4, 53) as client:
                client.recv(1)
        assert f"more than {most} connections" in lab.ztunnel.wait_record(kind="tcp", close="refused")["error"]
        with lab.pod.connect(RESOLVER4, 53) as client:
            client.sendall(framed(query(1, "shop.demo")))
            assert addresses(message(client)) == [VIP]
