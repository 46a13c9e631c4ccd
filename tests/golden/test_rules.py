# SPDX-License-Identifier: Apache-2.0
"""The rules of every variant as text. SLUICE_GOLDEN=write writes them anew; read the difference then."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent.cli.rules import render
from agent.core.model.exclusions import Exclusions
from agent.core.model.redirect import Redirect

DATA = Path(__file__).parent / "data"
VARIANTS = {
    "default": Redirect(),
    "no-dns": Redirect(dns=False),
    "no-ipv6": Redirect(ipv6=False),
    "ingress-only": Redirect(ingress_only=True),
    "virtual-interfaces": Redirect(virtual_interfaces=("eth1", "k6t-eth0")),
    "own-probe-addresses": Redirect(probe_ipv4="192.0.2.7", probe_ipv6="2001:db8::7"),
    "exclusions": Redirect(
        virtual_interfaces=("k6t-eth0",),
        exclude=Exclusions(
            outbound_ports=((80, 80), (8000, 9000)),
            inbound_ports=tuple((port, port) for port in range(22, 52)),
            outbound_networks=("10.0.0.0/8", "192.0.2.1/32", "fd00::/8"),
            inbound_networks=("172.16.0.0/12",),
            users=((0, 0), (1000, 2000)),
            interfaces=("eth1",),
        ),
    ),
    "dns-to-resolvers": Redirect(dns_to=("1.1.1.1", "8.8.8.8", "2001:db8::53")),
    "dns-to-ipv4-resolvers": Redirect(dns_to=("8.8.8.8",)),
    "refuse-non-tcp": Redirect(refuse_non_tcp=True, exclude=Exclusions(outbound_ports=((443, 443),))),
    "no-hbone": Redirect(hbone=False),
    "blocked": Redirect(blocked=True, exclude=Exclusions(outbound_ports=((443, 443),))),
    "preserve": Redirect(preserve=True),
    "draining": Redirect(draining=True, refuse_non_tcp=True, virtual_interfaces=("eth1",)),
}


@pytest.mark.parametrize("backend", ["nftables", "iptables"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_rendered_rules(backend: str, variant: str) -> None:
    text = "".join(f"# {program}\n{script}\n" for program, script in render(backend, VARIANTS[variant]).items())
    path = DATA / f"{backend}.{variant}.txt"
    if os.environ.get("SLUICE_GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text()
