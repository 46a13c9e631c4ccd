# SPDX-License-Identifier: Apache-2.0
"""One socket's answer decoded, and what is asked of the kernel."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from typing import Any

import pytest

from agent.core.errors import KernelError
from agent.core.model.sockets import TcpState
from agent.core.wire.netlink import HEADER, Message, attribute
from agent.kernel.netlink import sock_diag
from agent.kernel.netlink.sock_diag import SockDiag, cookies, decode, encode
from agent.kernel.netns import SO_NETNS_COOKIE

# An IPv4 connection, written down after linux/inet_diag.h on a little-endian machine. tests/netns compares with `ss`.
V4 = bytes.fromhex(
    "02010000" "1f90c350" "0a4e0002000000000000000000000000" "0a4e0001000000000000000000000000"
    "00000000" "0807060504030201" "00000000" "05000000" "07000000" "e8030000" "2a000000"
    "0500080000000000" "08000f0039050000" "0c0015000100000000000000" "0600160050000000"
)  # fmt: skip


def answer(family: int, local: str, remote: str, *more: bytes, state: int = 1, cookie: int = 9) -> bytes:
    """An inet_diag_msg with its attributes; addresses as hex, ports 1 and 2."""
    identity = struct.pack(">HH", 1, 2) + bytes.fromhex(local).ljust(16, b"\0") + bytes.fromhex(remote).ljust(16, b"\0")
    rest = bytes(4) + struct.pack("=Q", cookie) + bytes(12) + struct.pack("=II", 3, 4)
    return bytes((family, state, 0, 0)) + identity + rest + b"".join(more)


def test_every_field_has_its_place() -> None:
    one = decode(V4)
    assert one is not None
    assert (one.family, one.local, one.remote) == (4, ("10.78.0.2", 8080), ("10.78.0.1", 50000))
    assert (one.state, one.cookie, one.uid, one.inode) == (TcpState.ESTABLISHED, 0x0102030405060708, 1000, 42)
    assert one.mark == 0x539 and one.of_ztunnel and not one.v6_only


@pytest.mark.parametrize(
    ("local", "shown"),
    [
        ("00000000000000000000ffff0a4e0002", "10.78.0.2"),
        ("00000000000000000000ffff00000000", "0.0.0.0"),
        ("00000000000000000000000000000000", "::"),
        ("fd780000000000000000000000000002", "fd78::2"),
        ("0a4e0002000000000000000000000000", "a4e:2::"),
    ],
)
def test_mapped_addresses_are_shown_as_ipv4(local: str, shown: str) -> None:
    one = decode(answer(10, local, local))
    assert one is not None and (one.family, one.local, one.remote) == (6, (shown, 1), (shown, 2))


def test_mark_and_ipv6_only_are_told_or_not() -> None:
    shutdown, mark = attribute(8, b"\0"), attribute(15, struct.pack("=I", 0x12345539))
    both = decode(answer(10, "", "", shutdown, attribute(11, b"\1"), mark, state=10))
    assert both is not None and (both.mark, both.v6_only, both.state) == (0x12345539, True, TcpState.LISTEN)
    neither = decode(answer(10, "", "", shutdown, attribute(11, b"\0"), attribute(21, bytes(8))))
    assert neither is not None and (neither.mark, neither.v6_only, neither.of_ztunnel) == (None, False, False)


@pytest.mark.parametrize("body", [b"", V4[:71], b"\x01" + V4[1:], V4[:1] + b"\x0d" + V4[2:], V4[:1] + b"\0" + V4[2:]])
def test_what_is_no_tcp_socket_is_left_out(body: bytes) -> None:
    assert decode(body) is None


@pytest.mark.parametrize(("family", "host"), [(2, "10.0.0.1"), (10, "fd00::1")])
def test_a_lookup_asks_for_exactly_these_endpoints(family: int, host: str) -> None:
    body = encode((host, 0x1234), (host, 0x5678))
    assert len(body) == 56 and body[:2] == bytes((family, 6))
    assert body[8:12] == bytes.fromhex("12345678")
    assert body[-8:] == b"\xff" * 8  # INET_DIAG_NOCOOKIE


class Asked(SockDiag):
    """Remembers requests and answers each with the same body, or raises; `refused` kinds it does not know."""

    def __init__(self, reply: bytes | KernelError = b"", refused: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.reply, self.refused, self.asked = reply, refused, list[tuple[int, bytes]]()

    def request(self, operation: str, kind: int, flags: int, body: bytes, **options: Any) -> list[Message]:
        if kind in self.refused:
            raise KernelError("x", 95, "not supported")
        self.asked.append((kind, body))
        if isinstance(self.reply, KernelError):
            if self.reply.errno in options["fine"]:
                return []
            raise self.reply
        return [Message(20, 0, 0, 0, self.reply)]


def test_both_families_come_with_one_request() -> None:
    with contextlib.closing(Asked(V4)) as diag:
        assert len(diag.both(state for state in (TcpState.ESTABLISHED, TcpState.SYN_SENT))) == 1
        ((kind, body),) = diag.asked
        assert kind == 18 and body == bytes(52) + struct.pack("=II", 6, 0)


def test_a_kernel_without_the_old_request_is_asked_for_each_family() -> None:
    with contextlib.closing(Asked(V4, refused=(18,))) as diag:
        diag.both(state for state in (TcpState.ESTABLISHED, TcpState.SYN_SENT))
        assert [(kind, body[0], body[4]) for kind, body in diag.asked] == [(20, 2, 6), (20, 10, 6)]
    with contextlib.closing(Asked(refused=(18, 20))) as diag, pytest.raises(KernelError):
        diag.both()


def test_a_lookup_that_finds_another_finds_nothing() -> None:
    here, there = ("10.78.0.2", 8080), ("10.78.0.1", 50000)
    with contextlib.closing(Asked(V4)) as diag:
        found = diag.find(here, there)
        assert found is not None and found.cookie == 0x0102030405060708
        assert diag.find(here, ("10.78.0.1", 50001)) is None and diag.find(there, here) is None
    with contextlib.closing(Asked(KernelError("x", 2, "no such"))) as diag:
        assert diag.find(here, there) is None
    with contextlib.closing(Asked(KernelError("x", 1, "not permitted"))) as diag, pytest.raises(KernelError):
        diag.find(here, there)


def test_only_listeners_on_the_given_ports_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pod may have any number of listeners, and each pass asks."""
    other = V4[:4] + (81).to_bytes(2) + V4[6:]
    dump = b"".join(bytes(HEADER.size) + body for body in (other, V4, other))
    monkeypatch.setattr(SockDiag, "_runs", lambda self, extensions, states: [(HEADER.size + len(V4), dump)])
    decoded = list[bytes]()
    monkeypatch.setattr(sock_diag, "decode", lambda body: (decoded.append(body), decode(body))[1])
    with contextlib.closing(SockDiag()) as diag:
        assert [one.local[1] for one in diag.listening({8080})] == [8080]
        assert diag.listening({8081}) == [] and decoded == [V4]


def test_cookies_of_a_descriptor() -> None:
    with socket.socket() as one, socket.socket() as two:
        namespace = struct.unpack("=Q", one.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8))[0]
        mine = struct.unpack("=Q", one.getsockopt(socket.SOL_SOCKET, 57, 8))[0]
        assert cookies(one.fileno()) == (mine, namespace) != cookies(two.fileno())
        assert one.fileno() >= 0 and os.fstat(one.fileno())  # left open
    left, right = os.pipe()
    assert cookies(left) is None and os.fstat(left)
    for end in (left, right):
        os.close(end)
    assert cookies(left) is None
