# SPDX-License-Identifier: Apache-2.0
"""Which older connections are ended: what would have been captured, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_network

import pytest

from agent.backends.ebpf.older import older
from agent.core.model.exclusions import Exclusions
from agent.core.model.redirect import Redirect
from agent.core.model.sockets import TcpSocket, TcpState
from agent.core.model.topology import Link, PodTopology, Route
from agent.core.names import HBONE_PORT, PROBE_IPV4, ZTUNNEL_MARK

OUT = TcpSocket(4, ("10.0.0.2", 40000), ("10.9.0.1", 5432), TcpState.ESTABLISHED, 1, uid=1000)
IN = TcpSocket(6, ("fd00::2", 8080), ("fd09::1", 40000), TcpState.ESTABLISHED, 2)
WIRING = PodTopology(
    links=(Link(2, "eth0"), Link(3, "net1")),
    routes=(Route(ip_network("0.0.0.0/0"), 2, 0), Route(ip_network("10.9.0.0/16"), 3, 0)),
)


def ended(redirect: Redirect, one: TcpSocket, *, wiring: PodTopology = WIRING) -> bool:
    return bool(older(redirect, wiring, [one], {8080, HBONE_PORT}))


def test_what_would_have_been_captured_is_ended() -> None:
    assert ended(Redirect(), OUT) and ended(Redirect(), IN)


@pytest.mark.parametrize(
    ("redirect", "one"),
    [
        (Redirect(), replace(OUT, mark=ZTUNNEL_MARK)),
        (Redirect(), replace(OUT, remote=("127.4.5.6", 15001))),
        (Redirect(), replace(IN, local=("fd00::2", HBONE_PORT))),
        (Redirect(), replace(OUT, local=("10.0.0.2", 8080), remote=(PROBE_IPV4, 40000))),
        (Redirect(ipv4=False), OUT),
        (Redirect(ipv6=False), IN),
        (Redirect(ingress_only=True), IN),
        (Redirect(exclude=Exclusions(outbound_ports=((5000, 6000),))), OUT),
        (Redirect(exclude=Exclusions(outbound_networks=("10.9.0.0/24",))), OUT),
        (Redirect(exclude=Exclusions(users=((1000, 1000),))), OUT),
        (Redirect(exclude=Exclusions(interfaces=("net1",))), OUT),
        (Redirect(exclude=Exclusions(inbound_ports=((8080, 8080),))), IN),
        (Redirect(exclude=Exclusions(inbound_networks=("fd09::/64",))), IN),
    ],
)
def test_what_is_let_alone_runs_on(redirect: Redirect, one: TcpSocket) -> None:
    assert not ended(redirect, one)


@pytest.mark.parametrize(
    "exclude",
    [
        Exclusions(inbound_ports=((5432, 5432),)),
        Exclusions(inbound_networks=("10.9.0.0/24",)),
        Exclusions(outbound_ports=((40000, 40000),)),
        Exclusions(users=((0, 999),)),
        Exclusions(interfaces=("eth0",)),
    ],
)
def test_exclusions_of_something_else_do_not_save_it(exclude: Exclusions) -> None:
    assert ended(Redirect(exclude=exclude), OUT)
