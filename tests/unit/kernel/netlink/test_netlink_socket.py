# SPDX-License-Identifier: Apache-2.0
"""Dumps that change while they are read, again and again."""

from __future__ import annotations

import socket
from collections.abc import Container, Iterator
from dataclasses import replace
from ipaddress import ip_network
from types import SimpleNamespace
from typing import Any

import pytest

from agent.core.errors import StaleError
from agent.core.model.topology import Route
from agent.core.wire.netlink import NLM_F_DUMP, NLM_F_DUMP_INTR, Message
from agent.kernel.netlink.netlink_socket import NetlinkSocket
from agent.kernel.netlink.route_socket import RouteSocket
from agent.kernel.pod_netns import PodNetns


@pytest.fixture(autouse=True)
def interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = NetlinkSocket._answers

    def answers(sock: NetlinkSocket, operation: str, sequence: int, fine: Container[int]) -> Iterator[Message]:
        found = list(answered(sock, operation, sequence, fine)) or [Message(0, 0, sequence, 0, b"")]
        return (replace(one, flags=one.flags | NLM_F_DUMP_INTR) for one in found)

    monkeypatch.setattr(NetlinkSocket, "_answers", answers)


def test_addresses_are_taken_as_they_were_read_last() -> None:
    route = RouteSocket()
    assert any(one.address.is_loopback for one in route.held_addresses())
    route.close()


def test_elsewhere_it_is_an_error() -> None:
    strict = NetlinkSocket(socket.NETLINK_ROUTE)
    with pytest.raises(StaleError, match="kept changing"):
        strict.request("read addresses", 22, NLM_F_DUMP, bytes(8))  # RTM_GETADDR
    strict.close()


def test_a_dump_is_received_whole_but_no_more_than_asked_for_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[int] = []

    def endless(sock: NetlinkSocket, operation: str, sequence: int, fine: Container[int]) -> Iterator[Message]:
        for number in range(10_000):
            received.append(number)
            yield Message(24, 0, sequence, 0, bytes((2, 0, 0, 0, 254, 0, 0, 0)) + bytes(4))  # RTM_NEWROUTE, main table

    monkeypatch.setattr(NetlinkSocket, "_answers", endless)
    route = RouteSocket()
    assert len(list(route.main_routes(4))) == 1024 and len(received) == 10_000
    route.close()


@pytest.mark.parametrize(("count", "unknown"), [(3, False), (1024, True)])
def test_a_pod_with_more_routes_than_are_read_may_have_others(count: int, unknown: bool) -> None:
    routes = [Route(ip_network(f"10.{n >> 8}.{n & 255}.0/24"), 2, 0) for n in range(count)]
    asked = SimpleNamespace(
        main_routes=lambda family: iter(routes if family == 4 else ()), rules=lambda ipv6: (), links=lambda: (),
        held_addresses=lambda: (),
    )  # fmt: skip
    pod: Any = SimpleNamespace(
        _wiring=None, route=asked, has_ipv6=lambda: True, facts=lambda: SimpleNamespace(loopback4=True),
        route_events=SimpleNamespace(mark=lambda: None),
    )  # fmt: skip
    found = PodNetns.wiring(pod)
    assert (len(found.routes), found.elsewhere) == (count, unknown)
