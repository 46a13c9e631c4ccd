# SPDX-License-Identifier: Apache-2.0
"""Where a pod's application can be probed."""

from __future__ import annotations

import pytest

from agent.core.model.port_listeners import probed
from agent.core.model.sockets import TcpSocket, TcpState

POD4, POD6 = "10.0.0.1", "fd00::1"


def listener(port: int, host: str = "0.0.0.0", mark: int | None = 0, v6_only: bool = False) -> TcpSocket:
    family, anyone = (6, "::") if ":" in host else (4, "0.0.0.0")
    return TcpSocket(family, (host, port), (anyone, 0), TcpState.LISTEN, port, mark=mark, v6_only=v6_only)


@pytest.mark.parametrize(
    ("sockets", "where"),
    [
        ([listener(8080), listener(80)], (POD4, 80)),
        ([listener(80, POD4)], (POD4, 80)),
        ([listener(80, "::")], (POD4, 80)),
        ([listener(80, "::", v6_only=True)], (POD6, 80)),
        ([listener(80, POD6)], (POD6, 80)),
        ([listener(80, POD6), listener(81)], (POD6, 80)),
        ([listener(80, "127.0.0.1"), listener(81, "::1"), listener(82, "10.0.0.9"), listener(83)], (POD4, 83)),
        ([listener(port) for port in (15001, 15006, 15008, 15053, 15080)], None),
        ([listener(80, mark=0x539)], None),
        ([], None),
    ],
)
def test_the_lowest_port_that_is_reached_from_outside(sockets: list[TcpSocket], where: tuple[str, int] | None) -> None:
    assert probed(sockets, (POD4, POD6), ipv6=True) == where


def test_the_pods_first_address_comes_first_and_ipv6_only_when_it_is_on() -> None:
    dual = [listener(80, "::")]
    assert probed(dual, (POD6, POD4), ipv6=True) == (POD6, 80)
    assert probed(dual, (POD6, POD4), ipv6=False) == (POD4, 80)
    assert probed(dual, (POD6,), ipv6=False) is None
    assert probed(dual, ("FD00:0::1",), ipv6=True) == (POD6, 80)
    assert probed(dual, (), ipv6=True) is None


def test_a_connection_is_nothing_to_probe() -> None:
    assert probed([TcpSocket(4, (POD4, 80), ("10.0.0.2", 9), TcpState.ESTABLISHED, 1)], (POD4,), ipv6=True) is None
