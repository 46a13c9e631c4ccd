# SPDX-License-Identifier: Apache-2.0
"""Sockets that an application has bound, in a pod that eBPF programs redirect: to an interface, an address, a port."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator

import pytest
from support.ebpf_pod import (
    APP,
    CAPTURE,
    DNS,
    KINDS,
    OTHER,
    PEER,
    POD,
    RESOLVERS,
    SO_ORIGINAL_DST,
    Stage,
    accepted,
    answer,
    both_ends,
    carries,
    family,
    original,
    plain,
    program,
    speaking,
    there,
    written,
)

from agent.backends.ebpf.abi import ExitCause
from agent.lab.links import links

pytestmark = pytest.mark.root
FORGET = "from pyroute2.netlink.nfnetlink.nfctsocket import NFCTSocket; NFCTSocket().flush()"  # conntrack does


@pytest.mark.parametrize("kind", KINDS)
def test_a_socket_bound_to_an_interface(node: Stage, kind: str) -> None:
    """ztunnel is not behind it, and says by which one the connection goes on."""
    with node.pod.make(kind) as app:
        app.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0\0")
        app.connect(there(kind))
        both_ends(node, kind, app)


@pytest.mark.parametrize("kind", KINDS)
def test_a_socket_bound_to_the_pods_interface_without_the_right_to_leave_it(node: Stage, kind: str) -> None:
    """It stays bound, and reaches ztunnel by the pod's own address."""
    with node.pod.make(kind) as app:
        app.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0\0")
        with user(65534):
            app.connect(there(kind))
        assert app.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b"\0") == b"eth0"
        both_ends(node, kind, app)


@pytest.mark.parametrize("kind", KINDS)
def test_such_a_socket_asks_a_resolver(node: Stage, kind: str) -> None:
    resolver = RESOLVERS[family(kind)][0]
    to = written(kind, resolver), DNS
    for connected in (False, True):
        with node.pod.make(kind, socket.SOCK_DGRAM) as app:
            app.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0\0")
            with user(65534):
                if connected:
                    app.connect(to)
                app.sendmsg([b"1"], [], 0, None if connected else to)
            answer(node.ztunnel.dns)
            data, sender = app.recvfrom(100)
            assert (data, plain(sender)) == (b"re: 1", (resolver, DNS))
    with node.pod.make(kind) as app:
        app.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0\0")
        with user(65534):
            app.connect(to)
        with accepted(node.ztunnel.dns_tcp) as inner:
            carries(app, inner)


@pytest.mark.parametrize("version", [4, 6])
def test_an_application_that_listens_bound_to_the_interface_is_reached(node: Stage, version: int) -> None:
    with node.pod.make(f"IPv{version}") as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0\0")
        server.bind((POD[version], 0))
        server.listen()
        with speaking(node, PEER[version], server.getsockname()[1]) as ztunnel:
            app, seen = server.accept()
            with app:
                assert plain(seen)[0] == PEER[version]
                carries(ztunnel, app)


def test_with_two_interfaces_such_a_socket_is_refused_at_once(node: Stage) -> None:
    """Which of them has the pod's address is not known where it connects."""
    with links(node.pod.name) as inside:
        inside.veth("net1", "net2")
    node.settle(CAPTURE)
    for interface in ("eth0", "net1"):
        with node.pod.make("IPv4") as app, node.counts(ExitCause.INTERFACE_FAILED, 1):
            app.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode() + b"\0")
            with user(65534), pytest.raises(PermissionError):
                app.connect(there("IPv4"))


@contextlib.contextmanager
def user(number: int) -> Iterator[None]:
    """Without capabilities for so long."""
    os.seteuid(number)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_socket_bound_to_the_pods_address(node: Stage, kind: str) -> None:
    with node.pod.make(kind) as app:
        app.bind((written(kind, POD[family(kind)]), 0))
        port = app.getsockname()[1]
        app.connect(there(kind))
        assert app.getsockname()[1] == port
        both_ends(node, kind, app)


@pytest.mark.parametrize("kind", ["IPv4", "mapped"])
def test_two_sockets_with_one_local_port(node: Stage, kind: str) -> None:
    with contextlib.ExitStack() as open_:
        ends = []
        for host in (PEER, OTHER):
            app = open_.enter_context(node.pod.make(kind))
            app.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            app.bind((written(kind, POD[4]), 5555 if kind == "IPv4" else 5556))
            app.connect(there(kind, host))
            ends.append((app, open_.enter_context(accepted(node.ztunnel.outbound)), host[4]))
        for app, inner, host_ in ends:
            assert original(inner, 4) == plain(app.getpeername()) == (host_, APP)
            carries(app, inner)


def test_two_sockets_with_one_local_port_need_two_loopback_addresses(node: Stage) -> None:
    """IPv6 has one: the second one fails, it neither passes nor gets mixed up with the first."""
    with node.pod.make("IPv6") as first, node.pod.make("IPv6") as second:
        for app in (first, second):
            app.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            app.bind((POD[6], 5555))
        first.connect(there("IPv6"))
        with pytest.raises(OSError, match="Cannot assign requested address"):
            second.connect(there("IPv6", OTHER))
        both_ends(node, "IPv6", first)


@pytest.fixture
def masquerading(node: Stage) -> Iterator[None]:
    """A rule of the pod gives every packet an address of its interface, those within the pod included."""
    node.pod.sh("nft 'table inet theirs { chain c { type nat hook postrouting priority 100; masquerade; }; }'")
    yield
    node.pod.sh("nft delete table inet theirs")


@pytest.mark.usefixtures("masquerading")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bound", [False, True], ids=["", "bound"])
def test_a_pod_that_masquerades_everything(node: Stage, kind: str, bound: bool) -> None:
    for host in (PEER, OTHER, PEER):
        with node.pod.make(kind) as app:
            if bound:
                app.bind((written(kind, POD[family(kind)]), 0))
            app.connect(there(kind, host))
            both_ends(node, kind, app, host)
    resolver = RESOLVERS[family(kind)][1]
    with node.pod.make(kind) as app:
        app.connect((written(kind, resolver), DNS))
        with accepted(node.ztunnel.dns_tcp) as inner:
            assert original(inner, family(kind)) == (resolver, DNS)
            carries(app, inner)


@pytest.mark.usefixtures("masquerading")
def test_ztunnel_is_told_whether_the_application_has_bound_the_address_that_masquerades(node: Stage) -> None:
    for bound in (False, True):
        with node.pod.make("IPv4") as app:
            if bound:
                app.bind((POD[4], 0))
            app.connect(there("IPv4"))
            with accepted(node.ztunnel.outbound) as inner:
                unused = inner.getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, 16)[8]
                assert bool(unused) is not bound


@pytest.mark.usefixtures("masquerading")
@pytest.mark.parametrize("kind", KINDS)
def test_what_another_socket_of_that_port_asked_for_is_not_answered(node: Stage, kind: str) -> None:
    """A rule of the pod makes the source of one socket equal to that of the other, which was connected before."""
    for host, bound in ((PEER, False), (OTHER, True), (PEER, True), (OTHER, False)):
        with node.pod.make(kind) as app:
            app.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            app.bind((written(kind, POD[family(kind)] if bound else {4: "0.0.0.0", 6: "::"}[family(kind)]), 5777))
            app.connect((written(kind, host[family(kind)]), DNS))
            with accepted(node.ztunnel.dns_tcp) as inner:
                for _ in range(2):
                    assert original(inner, family(kind)) == (host[family(kind)], DNS)
                app.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                app.close()
        program(node.pod.path, FORGET)  # or the rule would choose another port
