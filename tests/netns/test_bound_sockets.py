# SPDX-License-Identifier: Apache-2.0
"""Sockets that are bound to an interface are captured by rules as any other: the embedded ztunnel, real packets."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.rules import Pod
from support.rules import pod as made
from support.ztunnel import PEER4, PEER6, POD4, POD6, RESOLVER4, RESOLVER6, SECONDS, Lab, Place, labs

from agent.backends.routing import RoutingBackend
from agent.core.model.redirect import Redirect
from agent.kernel.exec import run
from agent.kernel.netns import Netns
from agent.kernel.pod_netns import PodNetns
from agent.lab.links import links
from agent.reconciler.converge import settle, verify

pytestmark = pytest.mark.root
QUESTION = b"\0\7\1\0\0\1\0\0\0\0\0\0\1a\4test\0\0\1\0\1"
ROUTES = "ip route show table 100; ip -6 route show table 100; ip rule; ip -6 rule"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder: Path = tmp_path_factory.mktemp("bound")
    with labs(folder) as found, contextlib.closing(PodNetns(Netns.open(found.pod.path))) as target:
        settle(target, Redirect(), (RoutingBackend(),))
        found.serve()
        yield found


def bound(place: Place, host: str, kind: int = socket.SOCK_STREAM) -> socket.socket:
    one = place.make(socket.AF_INET6 if ":" in host else socket.AF_INET, kind)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0\0")
    return one


def link_local(place: Place) -> str:
    shown = run(["ip", "-6", "-o", "addr", "show", "dev", "eth0", "scope", "link"], netns=place.path).stdout
    return shown.split()[3].partition("/")[0]


@pytest.mark.parametrize("host", [PEER4, PEER6])
def test_it_connects(lab: Lab, host: str) -> None:
    with lab.peer.listen(host, 8080) as listener, bound(lab.pod, host) as client:
        client.connect((host, 8080))
        server, seen = listener.accept()
        with server:
            server.sendall(b"here")
            assert client.recv(9) == b"here"
            assert seen[1] != client.getsockname()[1], "through ztunnel"


@pytest.mark.parametrize("resolver", [RESOLVER4, RESOLVER6])
@pytest.mark.parametrize("connected", [True, False])
def test_it_asks_a_resolver(lab: Lab, resolver: str, connected: bool) -> None:
    with (
        lab.peer.listen(resolver, 53, socket.SOCK_DGRAM) as server,
        bound(lab.pod, resolver, socket.SOCK_DGRAM) as client,
    ):
        server.settimeout(SECONDS)
        if connected:
            client.connect((resolver, 53))
            client.send(QUESTION)
        else:
            client.sendto(QUESTION, (resolver, 53))
        query, source = server.recvfrom(100)
        server.sendto(query, source)
        answer, sender = client.recvfrom(100)
        assert (answer, sender[0]) == (QUESTION, resolver)
        assert source[1] != client.getsockname()[1], "through ztunnel"


@pytest.mark.parametrize("host", [POD4, POD6])
def test_it_listens(lab: Lab, host: str) -> None:
    with bound(lab.pod, host) as listener:
        listener.bind((host, 8081))
        listener.listen()
        with lab.peer.connect(host, 8081) as client:
            server, seen = listener.accept()
            with server:
                server.sendall(b"here")
                assert client.recv(9) == b"here"
                assert seen[0] == client.getsockname()[0] and seen[1] != client.getsockname()[1]


def test_a_client_of_the_link_is_one_of_an_interface(lab: Lab) -> None:
    """The kernel binds what is accepted from a link-local address to its interface."""
    index = lab.peer.call(lambda: socket.if_nametoindex("eth0"))
    with lab.pod.listen("::", 8082) as listener, lab.peer.make(socket.AF_INET6) as client:
        client.connect((link_local(lab.pod), 8082, 0, index))
        server, seen = listener.accept()
        with server:
            server.sendall(b"here")
            assert client.recv(9) == b"here"
            assert seen[0] == client.getsockname()[0] and seen[1] != client.getsockname()[1]


@pytest.fixture
def pod() -> Iterator[Pod]:
    with made("slu-bo-pod") as one:
        yield one


def test_routes_follow_the_interfaces_and_nobody_is_told(pod: Pod) -> None:
    layers = (RoutingBackend(),)
    before = pod.sh(ROUTES)
    settle(pod.target, Redirect(), layers)
    usual = pod.sh(ROUTES)
    with links(pod.name) as inside:
        inside.veth("one", "two")
        inside.add_addresses("one", "10.9.0.1/24", "fd09::1/64")
    assert verify(pod.target, Redirect(), layers) == {}
    settle(pod.target, Redirect(), layers)
    (v4,) = pod.sh("ip route show table 100 dev one").splitlines()
    (v6,) = pod.sh("ip -6 route show table 100 dev one").splitlines()
    assert v4.startswith("local default proto 83") and v6.startswith("local default proto 83")
    assert "from all to 127.0.0.0/8 lookup 100 proto 83" in pod.sh("ip rule")
    assert "from all to ::1 lookup 100 proto 83" in pod.sh("ip -6 rule")
    assert not settle(pod.target, Redirect(), layers).applied
    pod.reopen()
    assert not settle(pod.target, Redirect(), layers).applied, "a new agent knows them for its own"
    with links(pod.name) as inside:
        inside.delete("one")
    settle(pod.target, Redirect(), layers)
    assert pod.sh(ROUTES) == usual
    settle(pod.target, None, layers)
    assert pod.sh(ROUTES) == before
