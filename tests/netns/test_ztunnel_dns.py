# SPDX-License-Identifier: Apache-2.0
"""DNS through the embedded ztunnel, with real packets: over UDP and TCP, with and without an answer."""

from __future__ import annotations

import os
import socket

import pytest
from support.leaking import marking
from support.ztunnel import PEER4, PEER6, RESOLVER4, RESOLVER6, SECONDS, Lab, question

from agent.zds.messages import Delete
from agent.ztunnel.dns import dnsmessage

pytestmark = pytest.mark.root


@pytest.mark.parametrize(("resolver", "family"), [(RESOLVER4, socket.AF_INET), (RESOLVER6, socket.AF_INET6)])
def test_a_query_of_its_own_that_comes_back_fails_at_once(served: Lab, resolver: str, family: int) -> None:
    """Else one query makes thousands."""
    with (
        served.peer.listen(resolver, 53, socket.SOCK_DGRAM),
        served.pod.make(family, socket.SOCK_DGRAM) as client,
        marking(served.pod.path, "meta l4proto udp", 0x40000),
    ):
        client.sendto(question(0x1234), (resolver, 53))
        assert client.recv(2000) == dnsmessage.failure(question(0x1234))
    record = served.ztunnel.wait_record(close="refused")
    assert "overwrites its mark" in record["error"] and served.ztunnel.records() == [record]


@pytest.mark.parametrize(("resolver", "family"), [(RESOLVER4, socket.AF_INET), (RESOLVER6, socket.AF_INET6)])
@pytest.mark.parametrize("connected", [True, False])
def test_dns_over_udp_is_unchanged(served: Lab, resolver: str, family: int, connected: bool) -> None:
    query, answer = question(0x1234), b"\x12\x34\x84\0" + os.urandom(1100)
    with (
        served.peer.listen(resolver, 53, socket.SOCK_DGRAM) as server,
        served.pod.make(family, socket.SOCK_DGRAM) as client,
    ):
        server.settimeout(SECONDS)
        for _ in range(3):
            if connected:
                client.connect((resolver, 53))
                client.send(query)
            else:
                client.sendto(query, (resolver, 53))
            got, source = server.recvfrom(2000)
            assert got == query
            assert source[1] != client.getsockname()[1]  # it did go through ztunnel
            for one in (b"\xff\xff another's", answer, answer):  # what does not belong to it is the client's to judge
                server.sendto(one, source)
                received, resolver_seen = client.recvfrom(2000)
                assert received == one
                assert resolver_seen[:2] == (resolver, 53)
    record = served.ztunnel.wait_record(kind="dns", close="fin")
    assert (record["sent"], record["received"]) == (len(query), len(answer))
    assert record["destination"] == (f"[{resolver}]:53" if ":" in resolver else f"{resolver}:53")


def test_what_is_not_dns_is_one_flow(served: Lab) -> None:
    """A tunnel on port 53: the server sees one client, and may send when it likes."""
    with (
        served.peer.listen(RESOLVER4, 53, socket.SOCK_DGRAM) as server,
        served.pod.make(kind=socket.SOCK_DGRAM) as client,
    ):
        server.settimeout(SECONDS)
        client.connect((RESOLVER4, 53))
        seen = set()
        for number in range(3):
            client.send(b"\1\0\0\0 hello" + bytes((number,)))
            data, source = server.recvfrom(100)
            seen.add(source)
            for word in (b"one", b"two"):
                server.sendto(word + data, source)
                assert client.recv(100) == word + data
        assert len(seen) == 1
        assert served.agent.ask(Delete("uid-1")) == ""
        record = served.ztunnel.wait_record(kind="udp")
        assert (record["sent"], record["received"]) == (33, 6 * 14)


@pytest.mark.parametrize("host", [PEER4, PEER6])
def test_a_resolver_that_is_not_there_is_said_at_once(served: Lab, host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with served.pod.make(family, socket.SOCK_DGRAM) as client:
        client.connect((host, 53))
        client.send(question(7))
        assert client.recv(100) == b"\0\x07\x81\x82\0\1\0\0\0\0\0\0" + question(7)[12:], "SERVFAIL"
    assert served.ztunnel.wait_record(kind="dns", close="refused")["error"] == "Connection refused"


def test_dns_without_an_answer(lab: Lab) -> None:
    lab.serve(settings="dns_seconds=0.2")
    silent = lab.peer.listen(RESOLVER4, 53, socket.SOCK_DGRAM)
    lab.close_later(silent)
    with lab.pod.make(kind=socket.SOCK_DGRAM) as client:
        client.sendto(question(1), (RESOLVER4, 53))
        assert lab.ztunnel.wait_record(kind="dns", close="timeout")["destination"] == f"{RESOLVER4}:53"
        client.sendto(question(2), (PEER4, 53))  # nobody there
        assert lab.ztunnel.wait_record(kind="dns", close="refused")["destination"] == f"{PEER4}:53"
        client.sendto(question(3), ("127.0.0.1", 15053))  # was never redirected
        assert "conntrack" in lab.ztunnel.wait_record(kind="dns", close="error")["error"]


@pytest.mark.parametrize("resolver", [RESOLVER4, RESOLVER6])
def test_dns_over_tcp_is_unchanged(served: Lab, resolver: str) -> None:
    client, server = served.outbound(resolver, 53)
    client.sendall(b"\0\4quiz")
    assert server.recv(10) == b"\0\4quiz"
    server.sendall(b"\0\2ok")
    assert client.recv(10) == b"\0\2ok"
    assert client.getpeername()[:2] == (resolver, 53)
