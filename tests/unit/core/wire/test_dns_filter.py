# SPDX-License-Identifier: Apache-2.0
"""The filter that picks DNS, by a real kernel: on a socket pair, where packets have neither a direction nor a mark."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment
from scapy.packet import Packet

from agent.core.wire.dns_filter import SNAPPED, dns_filter
from agent.kernel import socket_filter

LONG = b"x" * 3000
TAKEN = (UDP(sport=9, dport=53), UDP(sport=53, dport=9), UDP(sport=9, dport=15053), UDP(sport=15053, dport=9))
OTHER = (UDP(sport=9, dport=54), TCP(sport=9, dport=53, flags="A"), TCP(sport=9, dport=53, flags="S"), ICMP())


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with one, two:
        two.setblocking(False)
        socket_filter.attach(two, dns_filter(lo=True))
        yield one, two


def taken(ends: tuple[socket.socket, socket.socket], data: bytes) -> int:
    """How many bytes pass."""
    ends[0].send(data)
    try:
        return len(ends[1].recv(1 << 16))
    except BlockingIOError:
        return 0


@pytest.mark.parametrize("header", [IP(), IP(options=b"\x01" * 8), IPv6(src="fd00::1", dst="fd00::2")])
def test_dns_alone_passes(ends: tuple[socket.socket, socket.socket], header: Packet) -> None:
    for part in (*TAKEN, TCP(sport=9, dport=53, flags="PA"), TCP(sport=53, dport=9, flags="PA")):
        data = bytes(header / part / LONG)
        assert taken(ends, data) == SNAPPED, part.summary()
    for part in OTHER:
        assert not taken(ends, bytes(header / part / LONG)), part.summary()


def test_what_has_no_ports_to_look_at(ends: tuple[socket.socket, socket.socket]) -> None:
    later = IP(frag=9) / UDP(sport=9, dport=53)
    extended = IPv6(src="fd00::1", dst="fd00::2") / IPv6ExtHdrFragment() / UDP(sport=9, dport=53)
    for data in (bytes(later), bytes(extended), b"\x45", b"\x55" * 60, b"\x4f" + b"\0" * 19):
        assert not taken(ends, data)
