# SPDX-License-Identifier: Apache-2.0
"""DNS of a pod in a mesh, with resolvers that are broken, late, silent or gone."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.hbone import PORTLESS
from support.mesh_dns import SILENT_SECONDS, VIP, addresses, framed, message, query, read, resolving, serve
from support.ztunnel import RESOLVER4, Lab, labs

from agent.lab.links import links
from agent.zds.messages import Delete
from agent.ztunnel.dns.dnsmessage import failure

pytestmark = pytest.mark.root


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """One pod in a mesh; the peer is the network, and has resolvers or not."""
    with labs(tmp_path) as made:
        serve(made)
        yield made


def _refuses(lab: Lab) -> None:
    """Nothing listens."""


def _is_away(lab: Lab) -> None:
    with links(lab.peer.name) as peer, links(lab.pod.name) as pod:
        peer.rtnl.addr("del", index=peer.index("eth0"), address=f"{RESOLVER4}/24")
        eth0 = pod.index("eth0")
        pod.rtnl.neigh("replace", dst=RESOLVER4, lladdr="02:00:00:00:00:99", ifindex=eth0, state="permanent")


def _is_silent(lab: Lab) -> None:
    lab.close_later(lab.peer.listen(RESOLVER4, 53), lab.peer.listen(RESOLVER4, 53, socket.SOCK_DGRAM))


def _closes(lab: Lab) -> None:
    listener = lab.peer.listen(RESOLVER4, 53)
    lab.close_later(listener)

    def close_each() -> None:
        with contextlib.suppress(OSError):
            while True:
                with listener.accept()[0] as server:
                    message(server)

    threading.Thread(target=close_each, daemon=True).start()


@pytest.mark.parametrize("breaks", [_refuses, _is_away, _is_silent, _closes])
def test_a_broken_resolver_is_answered_for(lab: Lab, breaks: Callable[[Lab], None]) -> None:
    breaks(lab)
    with lab.pod.connect(RESOLVER4, 53) as client:
        for number in (1, 3):
            began = time.monotonic()
            client.sendall(framed(query(number), query(number + 1, "shop.demo")))
            answers = sorted((message(client) for _ in range(2)), key=lambda answer: answer[:2])
            assert answers[0] == failure(query(number)), "SERVFAIL"
            assert addresses(answers[1]) == [VIP]
            assert time.monotonic() - began < SILENT_SECONDS + 3
    assert lab.ztunnel.wait_record(kind="dns", close="mesh")
    with lab.pod.make(kind=socket.SOCK_DGRAM) as client:
        client.sendto(query(5), (RESOLVER4, 53))
        assert client.recv(2000) == failure(query(5))


def test_a_late_answer_passes_by_udp_and_is_dropped_by_tcp(lab: Lab) -> None:
    with (
        lab.peer.listen(RESOLVER4, 53, socket.SOCK_DGRAM) as resolver,
        lab.pod.make(kind=socket.SOCK_DGRAM) as client,
    ):
        client.sendto(query(1), (RESOLVER4, 53))
        _, asker = resolver.recvfrom(2000)
        assert client.recv(2000) == failure(query(1))
        time.sleep(3)  # longer than a flow is kept whose queries were all answered
        resolver.sendto(b"\0\1\x81\x80late", asker)
        assert client.recv(2000) == b"\0\1\x81\x80late"
    with resolving(lab) as (client, accept):
        client.sendall(framed(query(1)))
        server = accept()
        assert (message(server), message(client)) == (query(1), failure(query(1)))
        client.sendall(framed(query(2)))
        assert message(server) == query(2)
        server.sendall(framed(b"\0\1\x81\x80late", b"\0\2\x81\x80two"))
        assert message(client) == b"\0\2\x81\x80two"


def test_half_an_answer_is_a_failure(lab: Lab) -> None:
    with resolving(lab) as (client, accept):
        client.sendall(framed(query(1)))
        server = accept()
        server.sendall(framed(b"\0\1\x81\x80" + bytes(1000))[:500])
        read(client, 500)
        server.close()
        with pytest.raises(ConnectionResetError):
            client.recv(1)


def test_an_unused_connection_is_closed(tmp_path: Path) -> None:
    with labs(tmp_path) as lab:
        serve(lab, f"connect_seconds=0.3, {PORTLESS}")
        with lab.pod.connect(RESOLVER4, 53) as client:
            client.sendall(framed(query(1, "shop.demo")) + b"\0")
            assert addresses(message(client)) == [VIP]
            assert client.recv(1) == b""


def test_the_end_of_the_pod_ends_its_queries(lab: Lab) -> None:
    with resolving(lab) as (client, accept):
        client.sendall(framed(query(1)))
        server = accept()
        message(server)
        assert lab.agent.ask(Delete("uid-1")) == ""
        for end in (client, server):
            with pytest.raises(ConnectionResetError):
                end.recv(1)
    assert lab.ztunnel.wait_record(kind="dns", close="drained")
