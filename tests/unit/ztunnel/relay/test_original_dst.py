# SPDX-License-Identifier: Apache-2.0
"""Addresses: as the kernel gives them, as they are compared, as they are printed."""

from __future__ import annotations

import socket

import pytest

from agent.core.model import sockets
from agent.core.wire.netlink import attribute, nested
from agent.kernel.netlink import ctnetlink
from agent.ztunnel.relay import original_dst


@pytest.mark.parametrize(
    ("address", "plain", "text"),
    [
        (("10.0.0.1", 80), ("10.0.0.1", 80), "10.0.0.1:80"),
        (("::ffff:10.0.0.1", 80, 0, 0), ("10.0.0.1", 80), "10.0.0.1:80"),
        (("fd00::1", 80, 0, 0), ("fd00::1", 80, 0, 0), "[fd00::1]:80"),
        (("::ffff:0:1", 80, 0, 0), ("::ffff:0:1", 80, 0, 0), "[::ffff:0:1]:80"),
    ],
)
def test_addresses(address: original_dst.Address, plain: original_dst.Address, text: str) -> None:
    assert original_dst.plain(address) == plain
    assert sockets.text(original_dst.plain(address)) == text


def test_sockaddr() -> None:
    v4 = bytes.fromhex("0200 1f90 0a4d0001 0000000000000000")
    assert original_dst.parse_ipv4(v4) == ("10.77.0.1", 8080)
    v6 = bytes.fromhex("0a00 1f90 00000000 fe800000000000000000000000000001") + (7).to_bytes(4, "little")
    assert original_dst.parse_ipv6(v6) == ("fe80::1", 8080, 0, 7)


def test_ports_of_our_own_only_count_in_this_pod() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as end:
        assert original_dst.is_own(("127.0.0.1", 15001), end)
        assert original_dst.is_own(("::1", 15053, 0, 0), end)
        assert not original_dst.is_own(("10.0.0.9", 15001), end)
        assert not original_dst.is_own(("127.0.0.1", 8080), end)


def test_conntrack_question_is_the_reply_tuple() -> None:
    body = ctnetlink.encode(socket.IPPROTO_UDP, ("127.0.0.1", 15053), ("10.0.0.2", 4660))
    assert body == bytes.fromhex(
        "02000000 3400 0280"
        "1400 0180 0800 0100 7f000001 0800 0200 0a000002"
        "1c00 0280 0500 0100 11000000 0600 0200 3acd0000 0600 0300 12340000"
    )


@pytest.mark.parametrize(("kind", "host"), [(1, "10.0.0.53"), (3, "fd00::53")])
def test_conntrack_answer(kind: int, host: str) -> None:
    family = socket.AF_INET if kind == 1 else socket.AF_INET6
    packed = socket.inet_pton(family, host)
    addresses = nested(1, attribute(kind, bytes(len(packed))), attribute(kind + 1, packed))
    ports = nested(2, attribute(1, b"\x11"), attribute(2, b"\0\1"), attribute(3, b"\0\x35"))
    assert ctnetlink.decode(bytes(4) + nested(1, addresses, ports)) == (host, 53)
    assert ctnetlink.decode(bytes(4) + nested(1, addresses)) is None
    assert ctnetlink.decode(b"\0\0\0\0\xff\xff\1\0") is None
