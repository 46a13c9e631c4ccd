# SPDX-License-Identifier: Apache-2.0
"""Why a connection is exempt: the table of bpf/pod.h, one reason after the other."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from agent.core.model.exclusions import Exclusions
from agent.core.model.redirect import Redirect
from agent.core.model.topology import Link, PodTopology, Route
from agent.core.names import PROBE_IPV4, PROBE_IPV6
from agent.flows.inet_diag.verdict import Verdicts
from agent.flows.record import Reason

WIRING = PodTopology(
    links=(Link(2, "eth0"), Link(3, "net1"), Link(4, "tap0")),
    addresses=tuple(map(ip_address, ("127.0.0.1", "10.0.0.2", "fd00::2", "fe80::2", "10.9.0.2"))),
    routes=(
        Route(ip_network("0.0.0.0/0"), 2, 0),
        Route(ip_network("10.9.0.0/16"), 3, 0),
        Route(ip_network("10.9.7.0/24"), 2, 0),
        Route(ip_network("10.20.0.0/16"), 4, 0),
        Route(ip_network("::/0"), 2, 0),
    ),
)
ALL = Redirect(
    virtual_interfaces=("tap0",),
    exclude=Exclusions(
        outbound_ports=((3306, 3307),),
        inbound_ports=((9000, 9000),),
        outbound_networks=("192.0.2.0/24", "2001:db8::/32"),
        inbound_networks=("198.51.100.0/24",),
        users=((1000, 1001),),
        interfaces=("net1",),
    ),
)
LOCAL = ("10.0.0.2", 8080)


@pytest.mark.parametrize(
    ("address", "port", "user", "reason"),
    [
        ("203.0.113.1", 80, 0, None),
        ("203.0.113.1", 80, -1, None),
        ("2001:dba::1", 443, 0, None),
        ("203.0.113.1", 3306, 0, Reason.EXCLUDED_PORT),
        ("203.0.113.1", 3308, 0, None),
        ("192.0.2.9", 80, 0, Reason.EXCLUDED_NETWORK),
        ("192.0.2.9", 3306, 0, Reason.EXCLUDED_NETWORK),
        ("2001:db8::9", 80, 0, Reason.EXCLUDED_NETWORK),
        ("203.0.113.1", 80, 1001, Reason.EXCLUDED_USER),
        ("192.0.2.9", 80, 1000, Reason.EXCLUDED_USER),
        ("10.9.1.1", 80, 1000, Reason.EXCLUDED_INTERFACE),
        ("10.9.7.1", 80, 0, None),  # a longer prefix leads elsewhere
        (PROBE_IPV4, 80, 0, Reason.PROBE),
        (PROBE_IPV6, 80, 0, Reason.PROBE),
        ("127.0.0.1", 80, 0, Reason.LOOPBACK),
        ("127.9.9.9", 80, 0, Reason.LOOPBACK),
        ("::1", 80, 0, Reason.LOOPBACK),
        ("0.0.0.0", 80, 0, Reason.LOOPBACK),
        ("10.0.0.2", 80, 0, Reason.LOOPBACK),
        ("fd00::2", 80, 0, Reason.LOOPBACK),
        ("127.0.0.1", 53, 0, Reason.LOOPBACK),
        ("127.0.0.2", 53, 0, None),  # asked by TCP, captured as the rules do
        ("fe80::2", 80, 0, Reason.LOOPBACK),  # its own
        ("fe80::9", 80, 0, Reason.EXCLUDED_NETWORK),
        ("fe80::9", 53, 0, None),
        ("fec0::9", 80, 0, None),
        ("10.0.0.2", 53, 0, None),
        ("203.0.113.1", 53, 0, None),
    ],
)
def test_outbound(address: str, port: int, user: int, reason: Reason | None) -> None:
    assert Verdicts(ALL, WIRING).outbound((address, port), user) is reason


def test_dns_of_named_resolvers_alone() -> None:
    named = Verdicts(replace(ALL, dns_to=("127.0.0.1",)), WIRING)
    assert named.outbound(("127.0.0.1", 53)) is None
    assert named.outbound(("127.0.0.2", 53)) is Reason.LOOPBACK
    assert Verdicts(replace(ALL, dns=False), WIRING).outbound(("10.0.0.2", 53)) is Reason.LOOPBACK


@pytest.mark.parametrize(
    ("source", "local", "reason"),
    [
        ("203.0.113.1", LOCAL, None),
        ("203.0.113.1", ("10.0.0.2", 15008), None),
        ("2001:dba::1", ("fd00::2", 80), None),
        ("10.0.0.2", LOCAL, Reason.LOOPBACK),
        ("127.0.0.1", LOCAL, Reason.LOOPBACK),
        ("10.9.1.1", LOCAL, Reason.EXCLUDED_INTERFACE),
        (PROBE_IPV4, LOCAL, Reason.PROBE),
        ("198.51.100.7", LOCAL, Reason.EXCLUDED_NETWORK),
        ("198.51.100.7", ("10.0.0.2", 9000), Reason.EXCLUDED_NETWORK),
        ("203.0.113.1", ("10.0.0.2", 9000), Reason.EXCLUDED_PORT),
        # Of virtual interfaces the outbound exclusions count, for the destination.
        ("10.20.0.1", ("192.0.2.1", 80), Reason.EXCLUDED_NETWORK),
        ("10.20.0.1", ("203.0.113.1", 3306), Reason.EXCLUDED_PORT),
        ("10.20.0.1", ("203.0.113.1", 9000), None),
    ],
)
def test_inbound(source: str, local: tuple[str, int], reason: Reason | None) -> None:
    assert Verdicts(ALL, WIRING).inbound((source, 40000), local) is reason


def test_ingress_only_and_families() -> None:
    ingress = Verdicts(replace(ALL, ingress_only=True), WIRING)
    assert ingress.inbound(("203.0.113.1", 1), LOCAL) is Reason.INGRESS_ONLY
    assert ingress.inbound(("10.20.0.1", 1), LOCAL) is None
    assert ingress.outbound(("203.0.113.1", 80)) is None
    ipv4 = Verdicts(replace(ALL, ipv6=False), WIRING)
    assert ipv4.outbound(("2001:dba::1", 80)) is ipv4.inbound(("2001:dba::1", 1), ("fd00::2", 80)) is Reason.FAMILY
    assert Verdicts(replace(ALL, ipv4=False), WIRING).outbound(("203.0.113.1", 80)) is Reason.FAMILY
