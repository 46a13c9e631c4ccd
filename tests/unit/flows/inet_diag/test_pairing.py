# SPDX-License-Identifier: Apache-2.0
"""Which sockets belong together."""

from __future__ import annotations

from agent.core.model.sockets import Endpoint, TcpSocket, TcpState
from agent.flows.inet_diag.pairing import Mirrors

POD, PEER, OTHER = ("10.0.0.2", 40000), ("10.0.0.9", 80), ("10.0.0.8", 80)


def one(cookie: int, local: Endpoint, remote: Endpoint) -> TcpSocket:
    return TcpSocket(4, local, remote, TcpState.ESTABLISHED, cookie)


def test_outbound_ztunnel_shows_the_applications_end() -> None:
    found = Mirrors((one(1, POD, PEER), one(2, ("127.0.0.1", 15001), POD), one(3, ("10.0.0.2", 40001), PEER)))
    assert found.served(POD[1]) == (2,)
    assert found.served(40001) == ()  # what ztunnel connects onwards
    assert found.pair(POD, PEER) == 0


def test_dns_counts_and_inbound_ports_do_not() -> None:
    found = Mirrors((one(2, ("127.0.0.1", 15053), POD), one(4, ("10.0.0.2", 15006), PEER)))
    assert found.served(POD[1]) == (2,) and found.served(PEER[1]) == ()


def test_inbound_both_ends_show_the_same() -> None:
    client, service = ("10.0.0.9", 2000), ("10.0.0.2", 8080)
    found = Mirrors((one(1, service, client), one(2, client, service)))
    assert (found.pair(service, client), found.pair(client, service)) == (2, 1)
    assert list(found.facing(client[0], service[1])) == [2]
    found.drop(2, client, service)
    assert list(found.facing(client[0], service[1])) == []


def test_a_port_that_is_used_again() -> None:
    found = Mirrors((one(1, POD, PEER), one(2, ("127.0.0.1", 15001), POD)))
    assert found.sharing(POD) == 1
    found.add(3, POD, OTHER)
    found.add(4, ("127.0.0.1", 15001), POD)
    assert found.served(POD[1]) == (2, 4) and found.sharing(POD) == 2
    found.drop(2, ("127.0.0.1", 15001), POD)
    found.drop(1, POD, PEER)
    assert found.served(POD[1]) == (4,) and found.sharing(POD) == 1
    found.drop(4, ("127.0.0.1", 15001), POD)
    found.drop(3, POD, OTHER)
    assert found.served(POD[1]) == () and found.sharing(POD) == 0


def test_what_took_its_place_stays() -> None:
    found = Mirrors((one(1, PEER, POD), one(2, PEER, POD)))
    found.drop(1, PEER, POD)
    assert found.pair(POD, PEER) == 2
    found.drop(2, PEER, POD)
    assert found.pair(POD, PEER) == 0
