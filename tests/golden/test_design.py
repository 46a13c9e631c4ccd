# SPDX-License-Identifier: Apache-2.0
"""Compares the table of docs/design/rules.md, written independently of the renderer, with the rendered rules."""

from __future__ import annotations

import re

import pytest

from agent.backends.iptables.rendering import render
from agent.core.model.redirect import Redirect

# (table, chain, rule), in order; {lo} and {probe} differ by family. DNS rows are marked; that of LINK is ours alone.
DESIGN = [
    ("mangle", "ISTIO_PRERT", "-m mark --mark 0x539/0xfff -j CONNMARK --set-xmark 0x111/0xfff"),
    (
        "mangle",
        "ISTIO_OUTPUT",
        "-m connmark --mark 0x111/0xfff -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff",
    ),
    ("nat", "ISTIO_PRERT", "VIRTUAL -i eth1 -p tcp -j REDIRECT --to-ports 15001"),
    ("nat", "ISTIO_PRERT", "VIRTUAL -i eth1 -p tcp -j RETURN"),
    ("nat", "ISTIO_PRERT", "INBOUND -p tcp -s {probe} -j ACCEPT"),
    (
        "nat",
        "ISTIO_PRERT",
        "INBOUND ! -d {lo} -p tcp -m tcp ! --dport 15008 -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15006",
    ),
    ("nat", "ISTIO_OUTPUT", "-p tcp -d {probe} -j ACCEPT"),
    (
        "nat",
        "ISTIO_OUTPUT",
        "DNS ! -o lo -p udp -m udp --dport 53 -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15053",
    ),
    (
        "nat",
        "ISTIO_OUTPUT",
        "DNS ! -d {lo} -p tcp -m tcp --dport 53 -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15053",
    ),
    ("nat", "ISTIO_OUTPUT", "-p tcp -m mark --mark 0x111/0xfff -j ACCEPT"),
    ("nat", "ISTIO_OUTPUT", "! -d {lo} -o lo -j ACCEPT"),
    ("nat", "ISTIO_OUTPUT", "LINK -p tcp -d fe80::/10 -j RETURN"),
    ("nat", "ISTIO_OUTPUT", "! -d {lo} -p tcp -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15001"),
    # istio-cni has two rows, by ports only: they mistake the answer to a client's port 53 for a query.
    ("raw", "ISTIO_OUTPUT", "DNS ! -o lo -p udp -m udp --dport 53 -m mark --mark 0x539/0xfff -j CT --zone-orig 1"),
]
VALUES = {
    4: {"lo": "127.0.0.1", "probe": "169.254.7.127", "icmp": "icmp"},
    6: {"lo": "::1", "probe": "fd16:9254:7127:1337:ffff:ffff:ffff:ffff", "icmp": "ipv6-icmp"},
}
# Ours alone: an application's SYN that NAT has not redirected is dropped; what is neither TCP nor captured DNS is
# counted, and nothing else is done to it.
OWN = [
    ("mangle", "ISTIO_PRERT", "-p tcp -j RETURN"),
    ("mangle", "ISTIO_PRERT", "-p {icmp} -j RETURN"),
    ("mangle", "ISTIO_PRERT", "-i lo -j RETURN"),
    ("mangle", "ISTIO_PRERT", "DNS -p udp -m udp --sport 53 -m conntrack --ctstate ESTABLISHED -j RETURN"),
    ("mangle", "ISTIO_PRERT", ""),
    ("mangle", "ISTIO_OUTPUT", "-p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN -j RETURN"),
    ("mangle", "ISTIO_OUTPUT", "-p tcp -m conntrack ! --ctstatus CONFIRMED -j RETURN"),
    ("mangle", "ISTIO_OUTPUT", "-p tcp -m conntrack --ctstate DNAT -j RETURN"),
    ("mangle", "ISTIO_OUTPUT", "-p tcp -d {probe} -j RETURN"),
    ("mangle", "ISTIO_OUTPUT", "-p tcp -m mark --mark 0x111/0xfff -j RETURN"),
    ("mangle", "ISTIO_OUTPUT", "-p tcp ! -d {lo} -o lo -j RETURN"),
    ("mangle", "ISTIO_OUTPUT", "LINK -p tcp -d fe80::/10 -j RETURN"),
    ("mangle", "ISTIO_OUTPUT", "! -d {lo} -p tcp -m mark ! --mark 0x539/0xfff -j DROP"),
    ("mangle", "ISTIO_OUTPUT", "-p tcp -j RETURN"),
    ("mangle", "ISTIO_OUTPUT", "-p {icmp} -j RETURN"),
    ("mangle", "ISTIO_OUTPUT", "-o lo -j RETURN"),
    ("mangle", "ISTIO_OUTPUT", "-m mark --mark 0x539/0xfff -j RETURN"),
    ("mangle", "ISTIO_OUTPUT", "DNS -p udp -m udp --dport 53 -j RETURN"),
    ("mangle", "ISTIO_OUTPUT", ""),
]


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("dns", [True, False])
@pytest.mark.parametrize("ingress_only", [True, False])
@pytest.mark.parametrize("virtual", [(), ("eth1",)])
def test_rows_of_the_design(family: int, dns: bool, ingress_only: bool, virtual: tuple[str, ...]) -> None:
    left_out = {"DNS": not dns, "INBOUND": ingress_only, "VIRTUAL": not virtual, "LINK": family == 4}
    wanted: dict[tuple[str, str], list[str]] = {}
    for table, chain, row in DESIGN + OWN:
        word, _, rest = row.partition(" ")
        if not left_out.get(word, False):
            text = (rest if word in left_out else row).format(**VALUES[family])
            wanted.setdefault((table, chain), []).append(text)
    rendered = render(Redirect(dns=dns, ingress_only=ingress_only, virtual_interfaces=virtual), family)
    found = {
        place: [re.sub(rf'^-A {place[1]} -m comment --comment "sluice:[0-9a-f]{{12}}" ?', "", line) for line in lines]
        for place, lines in rendered.lines.items()
        if lines
    }
    assert found == wanted
    for table, state in rendered.tables.items():
        assert [(base, chain) for base, chain, _ in state.jumps] == [
            ("OUTPUT", "ISTIO_OUTPUT"),
            ("PREROUTING", "ISTIO_PRERT"),
        ], table


def test_a_family_that_is_off_has_no_rules() -> None:
    assert render(Redirect(ipv6=False), 6).lines == {}
