# SPDX-License-Identifier: Apache-2.0
"""Captured by NAT, with real packets: what connections need that were captured once nothing new is to be."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
from support.node import until
from support.pair import HOST4, HOST6, POD4, POD6, Pair, await_ipv6, carries, pair, stream
from support.rules import CHOICES, layers
from support.ztunnel import SECONDS, Place

from agent.core.model.redirect import Redirect
from agent.core.policy.backend_switch import summary, translated, unknown
from agent.reconciler.converge import settle, verify
from agent.sources.preexisting_connections import PreexistingConnections

pytestmark = pytest.mark.root
WANT = Redirect()
DRAINING = replace(WANT, draining=True)
_ANY = {4: "0.0.0.0", 6: "::"}
_LEVEL = {4: (socket.SOL_IP, socket.IP_TRANSPARENT), 6: (socket.IPPROTO_IPV6, 75)}  # IPV6_TRANSPARENT


@pytest.fixture
def nodes() -> Iterator[Pair]:
    with pair() as made:
        await_ipv6(made)
        yield made


@pytest.fixture(params=CHOICES)
def choice(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[4, 6], ids=["ipv4", "ipv6"])
def family(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@dataclass(frozen=True)
class Captured:
    """Connections as (one end, other end), and a query without an answer yet.

    They are of the application with ztunnel, of a client with ztunnel, and of ztunnel with the application in the
    client's name.
    """

    outbound: tuple[socket.socket, socket.socket]
    inbound: tuple[socket.socket, socket.socket]
    onward: tuple[socket.socket, socket.socket]
    query: tuple[socket.socket, socket.socket]

    @property
    def streams(self) -> dict[str, tuple[socket.socket, socket.socket]]:
        return {"outbound": self.outbound, "inbound": self.inbound, "onward": self.onward}


def ztunnel(pod: Place, family: int, kind: int = socket.SOCK_STREAM) -> socket.socket:
    made = pod.make({4: socket.AF_INET, 6: socket.AF_INET6}[family], kind)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 0x539)
    made.settimeout(SECONDS)
    return made


@contextlib.contextmanager
def captured(nodes: Pair, family: int) -> Iterator[Captured]:
    """By the rules that are there."""
    here, there = (POD4, HOST4) if family == 4 else (POD6, HOST6)
    with contextlib.ExitStack() as kept:
        ports = {}
        for port in (15001, 15006):
            ports[port] = kept.enter_context(ztunnel(nodes.pod, family))
            ports[port].bind((_ANY[family], port))
            ports[port].listen()
        dns = kept.enter_context(ztunnel(nodes.pod, family, socket.SOCK_DGRAM))
        dns.bind(({4: "127.0.0.1", 6: "::1"}[family], 15053))
        near = kept.enter_context(nodes.pod.connect(there, 9999))
        far = kept.enter_context(ports[15001].accept()[0])
        app = kept.enter_context(nodes.pod.listen(here, 8088))
        client = kept.enter_context(nodes.host.connect(here, 8088))
        taken = kept.enter_context(ports[15006].accept()[0])
        onward = kept.enter_context(ztunnel(nodes.pod, family))
        onward.setsockopt(*_LEVEL[family], 1)
        onward.bind((there, 0))
        onward.connect((here, 8088))
        served = kept.enter_context(app.accept()[0])
        asking = kept.enter_context(ztunnel(nodes.pod, family, socket.SOCK_DGRAM))
        asking.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 0)
        asking.connect((there, 53))
        asking.send(b"who?")
        for end in (far, taken, served):
            end.settimeout(SECONDS)
        yield Captured((near, far), (client, taken), (onward, served), (asking, dns))


def test_what_was_captured_goes_on_and_nothing_new_is(nodes: Pair, choice: str, family: int) -> None:
    here, there = (POD4, HOST4) if family == 4 else (POD6, HOST6)
    used = layers(choice)
    settle(nodes.target, WANT, used)
    with captured(nodes, family) as found:
        assert {name: carries(*ends) for name, ends in found.streams.items()} == dict.fromkeys(found.streams, True)
        settle(nodes.target, DRAINING, used)
        assert verify(nodes.target, DRAINING, used) == {} and settle(nodes.target, DRAINING, used).applied == []
        assert {name: carries(*ends) for name, ends in found.streams.items()} == dict.fromkeys(found.streams, True)
        asking, dns = found.query
        words, asker = dns.recvfrom(100)
        assert words == b"who?"
        dns.sendto(b"me", asker)
        assert asking.recv(100) == b"me"
        for client, server, address, port in (
            (nodes.pod, nodes.host, there, 7002),
            (nodes.host, nodes.pod, here, 7003),
        ):
            near, far = stream(client, server, address, port)
            with near, far:
                assert carries(near, far)
        kind = socket.SOCK_DGRAM
        with nodes.host.listen(there, 53, kind) as resolver, nodes.pod.make(resolver.family, kind) as another:
            another.sendto(b"again?", (there, 53))
            assert resolver.recv(100) == b"again?"


@pytest.mark.parametrize("of", ["outbound", "inbound", "onward"])
def test_without_the_rest_of_the_rules_the_same_connections_break(
    nodes: Pair, choice: str, family: int, of: str
) -> None:
    """So that the test above can fail, and the reason for draining at all."""
    used = layers(choice)
    settle(nodes.target, WANT, used)
    with captured(nodes, family) as found:
        near, far = found.streams[of]
        assert carries(near, far)
        settle(nodes.target, None, used)
        speaker = far if of == "onward" else near
        speaker.settimeout(SECONDS)
        speaker.sendall(b"hello")
        with pytest.raises(ConnectionResetError):
            speaker.recv(1)


def test_drained_and_captured_again_or_removed(nodes: Pair, choice: str) -> None:
    used = layers(choice)
    settle(nodes.target, WANT, used)
    settle(nodes.target, DRAINING, used)
    settle(nodes.target, WANT, used)
    assert verify(nodes.target, WANT, used) == {}
    settle(nodes.target, DRAINING, used)
    settle(nodes.target, None, used)
    assert verify(nodes.target, None, used) == {} and settle(nodes.target, None, used).applied == []


def cookies(*ends: socket.socket) -> set[int]:
    return {int.from_bytes(one.getsockopt(socket.SOL_SOCKET, 57, 8), sys.byteorder) for one in ends}  # SO_COOKIE


def test_the_list_names_what_was_captured_and_ends_with_it(nodes: Pair, choice: str, family: int) -> None:
    """In the pod there are also connections that no rule touches, and that go on for long."""
    here, there = (POD4, HOST4) if family == 4 else (POD6, HOST6)
    used, listed = layers(choice), PreexistingConnections(translated)
    with contextlib.ExitStack() as kept:
        kept.callback(listed.close)
        for end in stream(nodes.pod, nodes.host, there, 7000):  # older than the rules
            kept.enter_context(end)
        settle(nodes.target, WANT, used)
        upstream = kept.enter_context(ztunnel(nodes.pod, family))
        kept.enter_context(nodes.host.listen(there, 15008))
        upstream.connect((there, 15008))
        hbone = kept.enter_context(ztunnel(nodes.pod, family))
        hbone.bind((_ANY[family], 15008))
        hbone.listen()
        kept.enter_context(nodes.host.connect(here, 15008))
        kept.enter_context(hbone.accept()[0])
        inner = stream(nodes.pod, nodes.pod, here, 7001)
        for end in inner:
            kept.enter_context(end)
        with captured(nodes, family) as found:
            listed.begin("uid", nodes.target)
            settle(nodes.target, DRAINING, used)
            left = listed.applied("uid", nodes.target)
            ends = (*found.outbound, found.inbound[1], *found.onward)
            assert {one.cookie for one in left} == cookies(*ends) == set(listed.as_note("uid"))
            line = summary(left, "ebpf")
            assert line.startswith("2 connections from before the change to ebpf are carried on as before: "), line
        until(lambda: not listed.remaining("uid", nodes.target), "all have ended")


@pytest.mark.parametrize("by", ["ztunnel", "client"])
@pytest.mark.parametrize("preserve", [True, False])
def test_what_conntrack_has_not_seen_runs_on_only_while_rules_preserve(
    nodes: Pair, choice: str, family: int, by: str, preserve: bool
) -> None:
    """As ztunnel has it where sockets were captured: no rule and no conntrack was there. Its peer speaks first."""
    here, there = (POD4, HOST4) if family == 4 else (POD6, HOST6)
    used, listed = layers(choice), PreexistingConnections(unknown)
    with contextlib.closing(listed), ztunnel(nodes.pod, family) as mine:
        if by == "ztunnel":
            with nodes.host.listen(there, 7000) as listener:
                mine.connect((there, 7000))
                peer, end = listener.accept()[0], mine
        else:
            mine.bind((_ANY[family], 7000))
            mine.listen()
            peer = nodes.host.connect(here, 7000)
            end = mine.accept()[0]
        with peer, end:
            end.settimeout(SECONDS)
            peer.settimeout(SECONDS)
            listed.begin("uid", nodes.target)
            settle(nodes.target, replace(WANT, preserve=preserve), used)
            assert {one.cookie for one in listed.applied("uid", nodes.target)} == cookies(end)
            peer.sendall(b"hello")
            if preserve:
                assert end.recv(5, socket.MSG_WAITALL) == b"hello" and carries(end, peer)
            else:
                with pytest.raises(ConnectionResetError):
                    peer.recv(1)
