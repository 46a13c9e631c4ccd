# SPDX-License-Identifier: Apache-2.0
"""SYNs that a pod makes by hand do not leave it past the eBPF programs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.crafted import BY_HAND, by_packet_socket, by_raw_socket, sniffer, syn
from support.ebpf_pod import APP, FREE, Stage

from agent.backends.ebpf.abi import ExitCause
from agent.lab.links import links

pytestmark = pytest.mark.root
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 1, 0x1000  # linux/if_tun.h


def extended(what: str) -> Any:
    """IPv6 headers before TCP's."""
    from scapy.layers.inet6 import IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, IPv6ExtHdrHopByHop, IPv6ExtHdrRouting, PadN

    def chain(parts: list[Any]) -> Any:
        found = parts[0]
        for part in parts[1:]:
            found = found / part
        return found

    made = {
        "hop-by-hop": [IPv6ExtHdrHopByHop()],
        "routing": [IPv6ExtHdrRouting(type=4, segleft=0)],
        "fragment": [IPv6ExtHdrFragment()],
        "destination": [IPv6ExtHdrDestOpt()],
        "long": [IPv6ExtHdrDestOpt(options=[PadN(optdata=bytes(200))])],
        "all": [IPv6ExtHdrHopByHop(), IPv6ExtHdrDestOpt(), IPv6ExtHdrFragment()],
    } | {f"{n} times": [IPv6ExtHdrDestOpt() for _ in range(n)] for n in (4, 5, 9)}
    return chain(made[what])


SYNS: dict[str, Callable[[int], Any]] = {
    "IPv4": lambda sport: syn(4, sport=sport),
    "IPv4, ECN": lambda sport: syn(4, sport=sport, flags="SEC"),
    "IPv4, SYN and FIN": lambda sport: syn(4, sport=sport, flags="SF"),
    "IPv4, options": lambda sport: syn(4, sport=sport, options=_no_operation()),
    "IPv6": lambda sport: syn(6, sport=sport),
    **{
        f"IPv6, {what}": lambda sport, what=what: syn(6, sport=sport, between=extended(what))
        for what in ("hop-by-hop", "routing", "fragment", "destination", "long", "all", "4 times", "5 times", "9 times")
    },
}  # fmt: skip


def _no_operation() -> Any:
    from scapy.layers.inet import IPOption_NOP

    return [IPOption_NOP()] * 8


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("what", SYNS)
def test_a_syn_made_by_hand_does_not_leave(node: Stage, what: str, link: bool) -> None:
    """By a raw socket, or by a packet socket (`link`), which no other mechanism would notice."""
    packet = SYNS[what](BY_HAND)
    with sniffer(node) as sniffed:
        before = node.exits(ExitCause.ESCAPE_REFUSED) + node.exits(ExitCause.MALFORMED)
        (by_packet_socket if link else by_raw_socket)(node, packet)
        came = sniffed()
        refused = node.exits(ExitCause.ESCAPE_REFUSED) + node.exits(ExitCause.MALFORMED) - before
    assert came == set() and refused == 1


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("version", [4, 6])
def test_a_syn_made_by_hand_for_an_excluded_port_does_leave(node: Stage, version: int, link: bool) -> None:
    """Else the sniffer above would prove nothing."""
    packet = syn(version, sport=BY_HAND)
    packet.lastlayer().dport = FREE
    with sniffer(node) as sniffed:
        (by_packet_socket if link else by_raw_socket)(node, packet)
        assert sniffed() == {BY_HAND}


@contextlib.contextmanager
def tunnel(node: Stage) -> Iterator[int]:
    """tun0 in the pod, whose packets have no Ethernet header: a descriptor of what leaves by it."""

    def make() -> int:
        found = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(found, TUNSETIFF, struct.pack("16sH22x", b"tun0", IFF_TUN | IFF_NO_PI))
        return found

    made = node.pod.call(make)
    try:
        with links(node.pod.name) as inside:
            inside.up("tun0")
            for network in ("10.66.0.0/16", "fd66::/64"):
                inside.rtnl.route("add", dst=network, oif=inside.index("tun0"))
        node.settle()
        yield made
    finally:
        os.close(made)
        node.settle()


@pytest.mark.parametrize("version", [4, 6])
def test_an_interface_without_ethernet_headers_is_guarded_too(node: Stage, version: int) -> None:
    to = {4: "10.66.0.1", 6: "fd66::1"}
    with tunnel(node) as tun:
        for port in (APP, FREE):
            packet = syn(version, sport=BY_HAND)
            packet.dst, packet.lastlayer().dport = to[version], port
            with node.counts(ExitCause.ESCAPE_REFUSED, int(port == APP)):
                by_raw_socket(node, packet)
        left = []
        with contextlib.suppress(BlockingIOError):
            while True:
                left.append(os.read(tun, 2000))
    assert [port_of(one) for one in left if BY_HAND.to_bytes(2, "big") in one] == [FREE]


def port_of(packet: bytes) -> int:
    start_ = 20 if packet[0] >> 4 == 4 else 40
    return int.from_bytes(packet[start_ + 2 : start_ + 4], "big")
