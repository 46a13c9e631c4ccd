# SPDX-License-Identifier: Apache-2.0
"""DNS in a pod that eBPF programs redirect: ztunnel learns the resolver, and answers seem to come from it."""

from __future__ import annotations

import ctypes
import socket
import struct

import pytest
from support.ebpf_pod import (
    DNS,
    KINDS,
    OTHER,
    POD,
    RESOLVERS,
    Stage,
    Where,
    accepted,
    answer,
    carries,
    family,
    original,
    plain,
    waiting,
    written,
)

from agent.backends.ebpf import abi
from agent.backends.ebpf.abi import ExitCause
from agent.kernel.bpf import asked_resolvers
from agent.kernel.bpf.map import Map

pytestmark = pytest.mark.root


def asked_for(node: Stage, port: int, given: str = "0.0.0.0") -> Where:
    """The resolver, as the embedded ztunnel looks it up by the port of the query and the address that it was given."""
    key = asked_resolvers.encode(node.pod.cookie, port, given)
    with Map.open(node.node.pins.maps / "resolvers") as resolvers:
        found = resolvers.lookup(key)
    assert found
    return str(abi.parse(found[:16])), struct.unpack(">H", found[16:18])[0]


@pytest.mark.parametrize("kind", KINDS)
def test_dns_over_connected_udp(node: Stage, kind: str) -> None:
    version = family(kind)
    first = RESOLVERS[version][0]
    with node.pod.make(kind, socket.SOCK_DGRAM) as app, node.counts(ExitCause.CAPTURED_DNS, 1):
        app.connect((written(kind, first), DNS))
        app.send(b"1")
        assert answer(node.ztunnel.dns) == plain(app.getsockname())
        assert plain(app.getsockname())[0] == POD[version]
        data, sender = app.recvfrom(100)
        assert (data, plain(sender), plain(app.getpeername())) == (b"re: 1", (first, DNS), (first, DNS))
        assert asked_for(node, app.getsockname()[1]) == (first, DNS)
    assert not waiting(node.resolver)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bound", [False, True])
def test_dns_over_udp_to_two_resolvers(node: Stage, kind: str, bound: bool) -> None:
    version = family(kind)
    with node.pod.make(kind, socket.SOCK_DGRAM) as app:
        if bound:
            app.bind((written(kind, "0.0.0.0" if version == 4 else "::"), 0))
        for resolver in (*RESOLVERS[version], RESOLVERS[version][0]):
            app.sendto(b"1", (written(kind, resolver), DNS))
            host, port = answer(node.ztunnel.dns)
            assert port == app.getsockname()[1]
            assert asked_for(node, port, host if host.startswith("127.") else "0.0.0.0") == (resolver, DNS)
            data, _, _, sender = app.recvmsg(100, 100)
            assert (data, plain(sender)) == (b"re: 1", (resolver, DNS))
    assert not waiting(node.resolver)


def test_dns_over_udp_asked_before_the_answer_to_the_last_one(node: Stage) -> None:
    """As musl asks all its resolvers: each query goes to its own. Answers seem to come from one that was asked."""
    with node.pod.make("IPv4", socket.SOCK_DGRAM) as app:
        for resolver in RESOLVERS[4]:
            app.sendto(resolver.encode(), (resolver, DNS))
        for resolver in RESOLVERS[4]:
            host, port = answer(node.ztunnel.dns)
            assert asked_for(node, port, host if host.startswith("127.") else "0.0.0.0") == (resolver, DNS)
            assert app.recvfrom(100) == (b"re: " + resolver.encode(), (RESOLVERS[4][-1], DNS))


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("connected", [False, True])
def test_an_answer_to_a_client_at_port_53_is_no_question(node: Stage, version: int, connected: bool) -> None:
    server, client = (POD[version], DNS), (OTHER[version], DNS)
    kind = f"IPv{version}"
    with node.pod.make(kind, socket.SOCK_DGRAM) as serves, node.peer.make(kind, socket.SOCK_DGRAM) as asks:
        serves.bind(server)
        asks.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        asks.bind(client)
        for _ in range(2):
            asks.sendto(b"1", server)
            data, asker = serves.recvfrom(100)
            if connected:
                serves.connect(asker)
                serves.send(b"re: " + data)
            else:
                serves.sendto(b"re: " + data, asker)
            data, sender = asks.recvfrom(100)
            assert (data, sender[:2]) == (b"re: 1", server)
    assert not waiting(node.ztunnel.dns)


def test_dns_by_sendmmsg(node: Stage) -> None:
    """As glibc asks for A and AAAA; two resolvers in one call."""
    with node.pod.make("IPv4", socket.SOCK_DGRAM) as app:
        assert sendmmsg(app, [(b"A", (RESOLVERS[4][0], DNS)), (b"AAAA", (RESOLVERS[4][1], DNS))]) == 2
        for data in (b"re: A", b"re: AAAA"):
            assert answer(node.ztunnel.dns)[1] == app.getsockname()[1]
            assert app.recv(100) == data
    assert not waiting(node.resolver)


class _Message(ctypes.Structure):
    """struct mmsghdr."""

    _fields_ = (
        ("name", ctypes.c_void_p), ("name_length", ctypes.c_uint32), ("parts", ctypes.c_void_p),
        ("count", ctypes.c_size_t), ("control", ctypes.c_void_p), ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int), ("none", ctypes.c_int), ("sent", ctypes.c_uint32),
    )  # fmt: skip


def sendmmsg(sock: socket.socket, messages: list[tuple[bytes, Where]]) -> int:
    kept, made = [], (_Message * len(messages))()
    for each, (data, (host, port)) in zip(made, messages, strict=True):
        name = struct.pack("=H", socket.AF_INET) + struct.pack(">H", port) + socket.inet_aton(host) + bytes(8)
        parts = [ctypes.create_string_buffer(name, 16), ctypes.create_string_buffer(data, len(data))]
        part = ctypes.create_string_buffer(struct.pack("=QQ", ctypes.addressof(parts[1]), len(data)), 16)
        kept += [*parts, part]
        each.name, each.name_length = ctypes.addressof(parts[0]), 16
        each.parts, each.count = ctypes.addressof(part), 1
    sent: int = ctypes.CDLL(None, use_errno=True).sendmmsg(sock.fileno(), made, len(messages), 0)
    return sent


@pytest.mark.parametrize("kind", KINDS)
def test_dns_over_tcp(node: Stage, kind: str) -> None:
    version = family(kind)
    resolver = RESOLVERS[version][0]
    with node.pod.make(kind) as app, node.counts(ExitCause.CAPTURED_DNS, 1):
        app.connect((written(kind, resolver), DNS))
        with accepted(node.ztunnel.dns_tcp) as inner:
            assert original(inner, version) == plain(app.getpeername()) == (resolver, DNS)
            assert plain(inner.getpeername()) == (POD[family(kind)], app.getsockname()[1])
            carries(app, inner)
