# SPDX-License-Identifier: Apache-2.0
"""Who got a connection or a datagram: asked of the listeners, which also answer."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
from dataclasses import dataclass

from support.traffic.world import WAIT, World

Endpoint = tuple[str, int]


@dataclass
class Arrival:
    """`where` is "side:port", or "lost". `original` is what the proxy is told that a connection was meant for."""

    where: str
    original: Endpoint | None = None
    client: str = ""  # the address that a connection seems to come from
    connection: socket.socket | None = None  # of TCP, accepted
    mute: bool = False  # whoever got a datagram was not let to answer


def awaited(world: World, family: int, seconds: float = WAIT) -> Arrival:
    """The first arrival, taken and, if it is a datagram, answered. "lost" when nobody got anything in time."""
    known = {sock.fileno(): (side, key, sock) for side in world.sides.values() for key, sock in side.sockets.items()}
    ready, _, _ = select.select(list(known), [], [], seconds)
    assert len(ready) <= 1, f"more than one got it: {[known[fd][:2] for fd in ready]}"
    if not ready:
        return Arrival("lost")
    side, (protocol, port), sock = known[ready[0]]
    if protocol == "sctp":
        sock.recv(1000)
        return Arrival(f"{side.name}:sctp")
    if protocol == "udp":
        try:
            _echo(sock)
        except PermissionError:
            return Arrival(f"{side.name}:{port}, which may not answer", mute=True)
        return Arrival(f"{side.name}:{port}")
    connection, client = sock.accept()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # ends with a RST at once
    connection.settimeout(WAIT)
    return Arrival(f"{side.name}:{port}", original(connection, family), client[0].removeprefix("::ffff:"), connection)


def drain(world: World) -> None:
    """Forgets what a row before left, such as a repeated SYN."""
    while (late := awaited(world, 4, 0)).where != "lost":
        if late.connection:
            late.connection.close()


def _echo(sock: socket.socket) -> None:
    """Answers from the address that was asked, as a DNS server does."""
    data, ancillary, _, sender = sock.recvmsg(100, 100)
    [packet_info] = [value for level, kind, value in ancillary if (level, kind) == (41, socket.IPV6_PKTINFO)]
    from_where = packet_info[:16] + bytes(4)  # by whatever interface the answer takes
    sock.sendmsg([data], [(41, socket.IPV6_PKTINFO, from_where)], 0, sender)


def original(connection: socket.socket, family: int) -> Endpoint | None:
    level, size = (socket.SOL_IP, 16) if family == 4 else (41, 28)
    with contextlib.suppress(OSError):
        data = connection.getsockopt(level, 80, size)  # SO_ORIGINAL_DST
        where = slice(4, 8) if family == 4 else slice(8, 24)
        kind = socket.AF_INET if family == 4 else socket.AF_INET6
        return socket.inet_ntop(kind, data[where]), struct.unpack(">H", data[2:4])[0]
    return None
