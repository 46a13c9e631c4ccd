# SPDX-License-Identifier: Apache-2.0
"""DNS in a captured pod: source ports that the application and ztunnel share, and pods that are DNS servers."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from support.rules import CHOICES, layers
from support.traffic.arrival import awaited
from support.traffic.queries import APPLICATION, ZTUNNEL, Queries, tracked
from support.traffic.world import ADDRESSES, WAIT, World, opened, world

from agent.core.model.redirect import Redirect
from agent.core.names import DNS_PORT, DNS_ZONE, OUTBOUND_PORT
from agent.reconciler.converge import settle

pytestmark = pytest.mark.root
PORTS = range(20000, 23250)
BATCH = 250  # ports that are open at once
# Who asks, round after round: with the last one, in which both hold the ports, 10 queries by port and family.
ROUNDS = (APPLICATION, ZTUNNEL, ZTUNNEL, APPLICATION, ZTUNNEL, APPLICATION, APPLICATION, ZTUNNEL)


@pytest.fixture
def captured() -> Iterator[World]:
    with world() as made:
        yield made


def batches(ports: range) -> Iterator[range]:
    for first in range(0, len(ports), BATCH):
        yield ports[first : first + BATCH]


@pytest.mark.parametrize("mechanism", CHOICES)
def test_p47_source_port_reuse_under_65000_dns_queries(captured: World, mechanism: str) -> None:
    settle(captured.pod.target, Redirect(), layers(mechanism))
    asked = 0
    for family in (4, 6):
        queries = Queries(captured, family)
        for ports in batches(PORTS):
            for asker in ROUNDS:
                queries.ask(ports, asker)
            queries.ask_at_once(ports)
        queries.close()
        assert (dict(queries.misrouted), queries.unanswered) == ({}, 0)
        zones, unreplied = tracked(captured, family)
        assert zones == {0: len(PORTS), DNS_ZONE: len(PORTS)}, "one entry for each port and side"
        assert unreplied == 0
        asked += queries.asked
    assert asked == 65_000


def test_p47_without_the_zones_the_same_queries_are_misrouted(captured: World) -> None:
    """So that the test above can fail."""
    settle(captured.pod.target, Redirect(), layers("iptables"))
    captured.pod.sh("iptables-nft -t raw -F; ip6tables-nft -t raw -F")
    for family in (4, 6):
        queries = Queries(captured, family)
        queries.ask(PORTS[:BATCH], APPLICATION)
        assert not queries.misrouted
        queries.ask(PORTS[:BATCH], ZTUNNEL)
        queries.close()
        assert sum(queries.misrouted.values()) == BATCH, "ztunnel's queries came back to ztunnel"


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("mechanism", CHOICES)
def test_p50_a_dns_servers_own_traffic_is_left_alone(captured: World, mechanism: str, family: int) -> None:
    """A pod that serves DNS and asks an upstream that is no resolver of the cluster."""
    resolvers = ADDRESSES["resolver"][4], ADDRESSES["resolver"][6]
    settle(captured.pod.target, Redirect(dns_to=resolvers), layers(mechanism))
    upstream, resolver = (ADDRESSES["net A"][family], 53), (ADDRESSES["resolver"][family], 53)
    serving = captured.sides["pod"].sockets["udp", 53]
    serving.settimeout(WAIT)
    with _socket(captured, "peer", family) as client, _socket(captured, "pod", family) as onward:
        client.sendto(b"name?", (ADDRESSES["pod"][family], 53))
        question, asker = serving.recvfrom(100)
        onward.sendto(question, upstream)
        assert awaited(captured, family).where == "peer:53", "the upstream itself is asked, and it answers"
        answer, sender = onward.recvfrom(100)
        assert (answer, sender[:2]) == (b"name?", upstream)
        serving.sendto(answer, asker)
        assert client.recvfrom(100)[1][:2] == (ADDRESSES["pod"][family], 53)
        onward.sendto(b"name?", resolver)  # as any pod asks: captured
        assert awaited(captured, family).where == f"pod:{DNS_PORT}"
        assert onward.recvfrom(100)[1][:2] == resolver
    with _socket(captured, "pod", family, socket.SOCK_STREAM) as longer:
        longer.connect(upstream)
        arrival = awaited(captured, family)
        assert arrival.connection
        arrival.connection.close()
        assert (arrival.where, arrival.original) == (f"pod:{OUTBOUND_PORT}", upstream), "TCP as any TCP, not as DNS"


def test_p50_without_resolvers_the_servers_traffic_is_taken(captured: World) -> None:
    """So that the test above can fail."""
    settle(captured.pod.target, Redirect(), layers("nftables"))
    with _socket(captured, "pod", 4) as onward:
        onward.sendto(b"name?", (ADDRESSES["net A"][4], 53))
        assert awaited(captured, 4).where == f"pod:{DNS_PORT}"


def _socket(world: World, place: str, family: int, kind: int = socket.SOCK_DGRAM) -> socket.socket:
    made = opened(world.place(place), lambda: socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6, kind))
    made.settimeout(WAIT)
    return made


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("mechanism", CHOICES)
def test_an_answer_to_port_53_is_no_question(captured: World, mechanism: str, family: int) -> None:
    """A client that asks from port 53 (query-source), of an enrolled DNS server and in an enrolled pod."""
    settle(captured.pod.target, Redirect(), layers(mechanism))
    server, resolver = (ADDRESSES["pod"][family], 53), (ADDRESSES["resolver"][family], 53)
    for asker, asked, arrives in (("peer", server, "pod:53"), ("pod", resolver, f"pod:{DNS_PORT}")):
        with _socket(captured, asker, family) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            client.bind((ADDRESSES[asker][family], 53))
            client.sendto(b"name?", asked)
            assert awaited(captured, family).where == arrives
            assert client.recvfrom(100)[1][:2] == asked
