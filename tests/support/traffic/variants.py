# SPDX-License-Identifier: Apache-2.0
"""The variants of capture that the traffic table has rows for."""

from __future__ import annotations

from dataclasses import replace

from support.traffic.world import FIRST, LAST, OTHER

from agent.core.model.exclusions import Exclusions
from agent.core.model.redirect import Redirect

VARIANTS: dict[str, Redirect] = {
    "default": Redirect(),
    "no DNS": Redirect(dns=False),
    "no inbound": Redirect(ingress_only=True),
    "virtual": Redirect(virtual_interfaces=("k6t0",)),
    "virtual, no inbound": Redirect(virtual_interfaces=("k6t0",), ingress_only=True),
    "excluded": Redirect(
        virtual_interfaces=("k6t0",),
        exclude=Exclusions(
            outbound_ports=((6379, 6379), (FIRST, LAST)),
            inbound_ports=((FIRST, LAST), (OTHER, OTHER)),
            outbound_networks=("10.88.0.54/32", "10.88.1.0/24", "fd88::54/128", "fd88:1::/64"),
            inbound_networks=("10.88.2.0/24", "fd88:2::/64"),
            users=((1234, 1234), (2000, 2009)),
            interfaces=("eth1",),
        ),
    ),
    "IPv4 excluded": Redirect(exclude=Exclusions(outbound_networks=("0.0.0.0/0",), inbound_networks=("0.0.0.0/0",))),
    "IPv6 excluded": Redirect(exclude=Exclusions(outbound_networks=("::/0",), inbound_networks=("::/0",))),
    "IPv4 alone": Redirect(ipv6=False),
    "IPv6 alone": Redirect(ipv4=False),
    "virtual, IPv4 alone": Redirect(virtual_interfaces=("k6t0",), ingress_only=True, ipv6=False),
    "virtual, IPv6 alone": Redirect(virtual_interfaces=("k6t0",), ingress_only=True, ipv4=False),
    "no HBONE": Redirect(hbone=False),
    "own probe": Redirect(probe_ipv4="10.88.9.7", probe_ipv6="fd88:9::7"),
    "DNS to": Redirect(dns_to=("10.88.0.53", "10.88.0.54", "fd88::53", "fd88::54")),
    "DNS to IPv4": Redirect(dns_to=("10.88.0.53",)),
    "DNS to, excluded": Redirect(
        dns_to=("10.88.0.53", "10.88.0.54", "fd88::53", "fd88::54"),
        exclude=Exclusions(outbound_networks=("10.88.0.54/32", "fd88::54/128")),
    ),
    "refused": Redirect(
        refuse_non_tcp=True,
        exclude=Exclusions(
            outbound_ports=((123, 123), (FIRST, LAST)),
            inbound_ports=((FIRST, LAST),),
            outbound_networks=("10.88.1.0/24", "fd88:1::/64"),
            inbound_networks=("10.88.2.0/24", "fd88:2::/64"),
            users=((1234, 1234),),
            interfaces=("eth1",),
        ),
    ),
    "refused, no DNS": Redirect(refuse_non_tcp=True, dns=False),
    "preserve": Redirect(preserve=True),
    "abrupt": Redirect(),
}
FRESH = ("preserve", "abrupt")  # in a pod of their own, with connections that are older than its rules

_ISTIO_KNOWS = {"dns", "ingress_only", "virtual_interfaces"}


def istio_knows(want: Redirect) -> bool:
    plain = replace(want, **{name: getattr(Redirect(), name) for name in _ISTIO_KNOWS})
    return plain == Redirect()
