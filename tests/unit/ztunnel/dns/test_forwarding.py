# SPDX-License-Identifier: Apache-2.0
"""Flows of one pod to its resolvers: which of them make room, what they record, and what a failure answers."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any

import pytest

from agent.ztunnel.dns import forwarding

QUERY = b"\0\1\1\0\0\1\0\0\0\0\0\0\1a\4test\0\0\1\0\1"
ANSWER = b"\0\1\x81\x80" + QUERY[4:]


class World:
    """A pod with one resolver; `said` is what was recorded: (kind, close)."""

    def __init__(self) -> None:
        self.server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.server.bind(("127.0.0.1", 0))
        self.server.settimeout(10)
        self.listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.listener.bind(("127.0.0.1", 0))
        self.said: list[tuple[str, str]] = []
        self.handlers: dict[int, Any] = {}
        deadlines = SimpleNamespace(add=lambda flow: None, settle=lambda flow: None)
        loop = SimpleNamespace(time=lambda: 1.0, call_soon=lambda *_: None)
        poller = SimpleNamespace(loop=loop, add=self.handlers.__setitem__, remove=self.handlers.pop)
        self.pod: Any = SimpleNamespace(
            engine=SimpleNamespace(
                poller=poller, queries=deadlines, answered=deadlines, share=16384, mesh_names=None, traffic=None
            ),
            live=set(),
            upstream=SimpleNamespace(take=self.take),
            record=lambda kind, *rest: self.said.append((kind, rest[6])),
        )
        found = SimpleNamespace(original_destination=lambda *_: self.server.getsockname(), close=lambda: None)
        self.resolver = forwarding.Resolver(self.pod, found)  # type: ignore[arg-type]

    def take(self, *_: object) -> socket.socket:
        fresh = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        fresh.setblocking(False)
        return fresh

    def ask(self, *, answered: bool, query: bytes = QUERY) -> socket.socket:
        """A new client asks; returns its socket."""
        client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        client.bind(("127.0.0.1", 0))
        client.sendto(query, self.listener.getsockname())
        self.listener.setblocking(False)
        self.resolver.receive(self.listener)
        if answered:
            *_, asker = (self.server.recvfrom(100)[1] for _ in range(self.resolver.waiting))
            self.server.sendto(ANSWER, asker)
            for handler in list(self.handlers.values()):
                handler(1)  # readable
            assert client.recv(100) == ANSWER
        return client


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(forwarding, "MOST", 2)
    return World()


def test_an_idle_flow_makes_room_before_one_that_waits(world: World) -> None:
    held = [world.ask(answered=False), world.ask(answered=True)]
    assert world.said == [("dns", "fin")] and len(world.pod.live) == 1
    held.append(world.ask(answered=False))
    assert world.said == [("dns", "fin")] and len(world.resolver.flows) == 2
    held.append(world.ask(answered=False))  # now all wait: the oldest goes
    assert world.said == [("dns", "fin"), ("dns", "error")] and world.resolver.waiting == 2
    world.resolver.close()
    assert world.said[2:] == [("dns", "drained")] * 2 and (world.resolver.waiting, world.resolver.idle) == (0, {})
    for one in held:
        one.close()


def test_a_query_that_is_repeated_is_one(world: World) -> None:
    client = world.ask(answered=False)
    client.sendto(QUERY, world.listener.getsockname())
    world.resolver.receive(world.listener)
    assert (len(world.resolver.flows), world.resolver.waiting) == (1, 1)
    assert [world.server.recvfrom(100)[0] for _ in range(2)] == [QUERY, QUERY]


def test_what_is_not_dns_is_recorded_when_the_flow_ends(world: World) -> None:
    world.ask(answered=False, query=b"\1 no DNS")
    assert world.said == [] and not world.pod.live
    world.resolver.close()
    assert world.said == [("udp", "fin")]
