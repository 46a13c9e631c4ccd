"""Asks conntrack where a redirected flow was going (ctnetlink, linux/netfilter/nfnetlink_conntrack.h).

The kernel keeps the answer only for TCP sockets as SO_ORIGINAL_DST; for UDP the entry itself has to be read.
A flow is found by its reply direction: that is what the redirected-to socket sees, and what it will answer.
"""

from __future__ import annotations

import errno
import socket
import struct

from agent.core.errors import KernelError
from agent.core.netlink import attribute, attributes, nested
from agent.kernel.netlink import NetlinkSocket

NETLINK_NETFILTER = 12
_CT_GET = 1 << 8 | 1  # NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET
_TUPLE_ORIG, _TUPLE_REPLY = 1, 2
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_IP_SRC = {socket.AF_INET: 1, socket.AF_INET6: 3}  # the destination's attribute is the next one
_PROTO_NUM, _PROTO_SRC_PORT, _PROTO_DST_PORT = 1, 2, 3

Endpoint = tuple[str, int]


class Conntrack:
    """Make it inside the namespace that it is to ask; usable from anywhere afterwards. One thread."""

    def __init__(self) -> None:
        self._netlink = NetlinkSocket(NETLINK_NETFILTER)

    def original_destination(self, protocol: int, local: Endpoint, client: Endpoint) -> Endpoint | None:
        """What `client` asked for, when `local` received it (both of one family, no v4-mapped addresses).

        None when conntrack's zone 0 has no such flow. Raises KernelError when it cannot be asked.
        """
        try:
            answers = self._netlink.request("conntrack lookup", _CT_GET, 0, encode(protocol, local, client))
        except KernelError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        return decode(answers[0].body) if answers else None

    def close(self) -> None:
        self._netlink.close()


def encode(protocol: int, source: Endpoint, destination: Endpoint) -> bytes:
    """Body of a GET for the flow whose replies go from `source` to `destination`."""
    family = socket.AF_INET6 if ":" in source[0] else socket.AF_INET
    addresses = nested(
        _TUPLE_IP,
        attribute(_IP_SRC[family], socket.inet_pton(family, source[0])),
        attribute(_IP_SRC[family] + 1, socket.inet_pton(family, destination[0])),
    )
    ports = nested(
        _TUPLE_PROTO,
        attribute(_PROTO_NUM, bytes((protocol,))),
        attribute(_PROTO_SRC_PORT, struct.pack(">H", source[1])),
        attribute(_PROTO_DST_PORT, struct.pack(">H", destination[1])),
    )
    return struct.pack(">BBH", family, 0, 0) + nested(_TUPLE_REPLY, addresses, ports)


def decode(body: bytes) -> Endpoint | None:
    """The original destination of the flow in a GET's answer; None when the answer does not hold one."""
    original = dict(attributes(dict(attributes(body[4:])).get(_TUPLE_ORIG, b"")))
    addresses = dict(attributes(original.get(_TUPLE_IP, b"")))
    port = dict(attributes(original.get(_TUPLE_PROTO, b""))).get(_PROTO_DST_PORT, b"")
    for family, kind in _IP_SRC.items():
        address = addresses.get(kind + 1, b"")
        if len(address) == (4 if family == socket.AF_INET else 16) and len(port) == 2:
            return socket.inet_ntop(family, address), struct.unpack(">H", port)[0]
    return None
