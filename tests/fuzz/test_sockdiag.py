# SPDX-License-Identifier: Apache-2.0
"""Whatever sock_diag answers, decoding ends without an error, and what was written is read back."""

from __future__ import annotations

import ipaddress
import socket
import struct

from hypothesis import given
from hypothesis import strategies as st

from agent.core.model.sockets import TcpState
from agent.core.wire.netlink import attribute
from agent.kernel.netlink.sock_diag import decode, encode

ports = st.integers(0, 65535)
others = st.lists(st.tuples(st.sampled_from([8, 11, 16, 21, 22]), st.binary(max_size=12)), max_size=4)


@given(st.binary(max_size=200))
def test_any_bytes(body: bytes) -> None:
    """Never raises, never loops; what comes out was in there."""
    found = decode(body)
    assert (found is None) == (len(body) < 72 or body[0] not in (2, 10) or not 1 <= body[1] <= 12)
    if found is not None:
        assert found.local[1] == int.from_bytes(body[4:6]) and found.remote[1] == int.from_bytes(body[6:8])
        assert found.mark is None or struct.pack("=I", found.mark) in body


@given(st.binary(min_size=72, max_size=72), st.binary(max_size=80), st.sampled_from([2, 10]), st.integers(1, 12))
def test_any_attributes(head: bytes, tail: bytes, family: int, state: int) -> None:
    """A torn or foreign tail takes nothing away from the socket itself."""
    found, bare = (decode(bytes((family, state)) + head[2:] + rest) for rest in (tail, b""))
    assert found is not None and bare is not None
    assert (found.local, found.remote, found.cookie) == (bare.local, bare.remote, bare.cookie)


@given(
    st.ip_addresses(),
    st.ip_addresses(),
    st.tuples(ports, ports),
    st.sampled_from(TcpState),
    st.integers(0, 2**64 - 1),
    st.none() | st.integers(0, 2**32 - 1),
    others,
)
def test_a_socket_survives(
    local: ipaddress.IPv4Address,
    remote: ipaddress.IPv4Address,
    numbers: tuple[int, int],
    state: TcpState,
    cookie: int,
    mark: int | None,
    more: list[tuple[int, bytes]],
) -> None:
    """Addresses of a family 6 socket may be IPv4; attributes stand in any number before the mark."""
    six = 6 in (local.version, remote.version)
    raw = [a.packed if a.version == 6 else bytes(10) + b"\xff\xff" + a.packed for a in (local, remote)]
    raw = raw if six else [a.packed.ljust(16, b"\0") for a in (local, remote)]
    head = struct.pack("=BBBB", socket.AF_INET6 if six else socket.AF_INET, state, 0, 0)
    body = head + struct.pack(">HH16s16s", *numbers, *raw) + bytes(4) + struct.pack("=Q12xII", cookie, 5, 6)
    body += b"".join(attribute(kind, payload) for kind, payload in more)
    body += b"" if mark is None else attribute(15, struct.pack("=I", mark))
    found = decode(body)
    assert found is not None
    ends = [ipaddress.ip_address(address) for address, _ in (found.local, found.remote)]
    unmapped = [getattr(a, "ipv4_mapped", None) or a for a in (local, remote)]
    assert ends == unmapped and (found.local[1], found.remote[1]) == numbers
    assert (found.family, found.state, found.cookie) == (6 if six else 4, state, cookie)
    assert (found.uid, found.inode, found.mark) == (5, 6, mark)


@given(st.ip_addresses(v=4) | st.ip_addresses(v=6), ports, ports)
def test_any_lookup(address: ipaddress.IPv4Address, sport: int, dport: int) -> None:
    """What is asked for is what an answer for the same connection holds."""
    body = encode((str(address), sport), (str(address), dport))
    found = decode(bytes((body[0], 1, 0, 0)) + body[8:] + bytes(20))
    assert found is not None and (found.local[1], found.remote[1]) == (sport, dport)
    shown = ipaddress.ip_address(found.local[0])
    assert shown == (getattr(address, "ipv4_mapped", None) or address)
