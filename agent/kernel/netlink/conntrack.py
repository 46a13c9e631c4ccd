"""Asks conntrack where a redirected flow was going (ctnetlink, linux/netfilter/nfnetlink_conntrack.h).

The kernel keeps the answer only for TCP sockets as SO_ORIGINAL_DST; for UDP the entry itself has to be read.
A flow is found by its reply direction: that is what the redirected-to socket sees, and what it will answer.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from enum import IntEnum

from agent.core.errors import KernelError
from agent.core.wire.netlink import attribute, attributes, nested
from agent.core.wire.nftables import NETLINK_NETFILTER, NFGENMSG, fields
from agent.kernel import sysctl
from agent.kernel.netlink.notifications import Notifications
from agent.kernel.netlink.socket import NetlinkSocket

CT_GET = 1 << 8 | 1  # NFNL_SUBSYS_CTNETLINK, IPCTNL_MSGCT_GET
GROUP_NEW = 1  # NFNLGRP_CONNTRACK_NEW

_EVENTS = "net/netfilter/nf_conntrack_events"


class Cta(IntEnum):
    """CTA_*: attributes of an entry."""

    TUPLE_ORIG = 1
    TUPLE_REPLY = 2


class Tuple(IntEnum):
    """CTA_TUPLE_*: attributes of one direction."""

    IP = 1
    PROTO = 2


class Ip(IntEnum):
    """CTA_IP_*: attributes nested in Tuple.IP."""

    V4_SRC = 1
    V4_DST = 2
    V6_SRC = 3
    V6_DST = 4


class Proto(IntEnum):
    """CTA_PROTO_*: attributes nested in Tuple.PROTO."""

    NUM = 1
    SRC_PORT = 2
    DST_PORT = 3


Endpoint = tuple[str, int]
_ADDRESSES = {socket.AF_INET: (Ip.V4_SRC, Ip.V4_DST), socket.AF_INET6: (Ip.V6_SRC, Ip.V6_DST)}
_PORTS = (Proto.SRC_PORT, Proto.DST_PORT)
_NOWHERE: Endpoint = ("127.0.0.1", 1)


class Conntrack:
    """Make it inside the namespace that it is to ask; usable from anywhere afterwards. One thread."""

    def __init__(self) -> None:
        self._netlink = NetlinkSocket(NETLINK_NETFILTER)

    def original_destination(self, protocol: int, local: Endpoint, client: Endpoint) -> Endpoint | None:
        """What `client` asked for, when `local` received it (both of one family, no v4-mapped addresses).

        None when conntrack's zone 0 has no such flow. Raises KernelError when it cannot be asked.
        """
        body = self._get(encode(protocol, local, client))
        return None if body is None else decode(body)

    def endpoint(self, protocol: int, client: Endpoint, service: Endpoint) -> Endpoint | None:
        """Who answers `client`, which asked for `service`: another where DNAT has chosen one.

        None when conntrack's zone 0 has no such flow. Raises KernelError when it cannot be asked.
        """
        body = self._get(encode(protocol, client, service, Cta.TUPLE_ORIG))
        return None if body is None else decode(body, Cta.TUPLE_REPLY)

    def _get(self, request: bytes) -> bytes | None:
        try:
            answers = self._netlink.request("conntrack lookup", CT_GET, 0, request)
        except KernelError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        return answers[0].body if answers else None

    def close(self) -> None:
        self._netlink.close()


def is_loaded() -> bool:
    """Whether the kernel has conntrack by now; asking loads nothing."""
    return sysctl.read(_EVENTS) is not None


class NewFlows:
    """The flows that conntrack creates from now on, in any zone, however short-lived. Make it inside the namespace."""

    def __init__(self) -> None:
        """Raises KernelError where the kernel does not notify of flows."""
        with contextlib.closing(Conntrack()) as lookup:
            # Loads the module and waits for it, which joining the group does not; an error where there is none.
            lookup.endpoint(socket.IPPROTO_TCP, _NOWHERE, _NOWHERE)
        if sysctl.read(_EVENTS) == 0:
            raise KernelError("conntrack notifications", errno.EOPNOTSUPP, f"{_EVENTS} is 0")
        self._events = Notifications(NETLINK_NETFILTER, [GROUP_NEW])

    def answering(self, service: Endpoint) -> tuple[Endpoint, Endpoint] | None:
        """Who answers the flow to `service`, and whom; None when there is none. Raises KernelError if unknown."""
        taken, lost = self._events.take()
        found = next((one.body for one in taken if decode(one.body) == service), None)
        if found is None and lost:
            raise KernelError("conntrack notifications", errno.ENOBUFS, "some were lost")
        if found is None:
            return None
        answers, asker = decode(found, Cta.TUPLE_REPLY), decode(found, Cta.TUPLE_REPLY, destination=True)
        return (answers, asker) if answers and asker else None

    def close(self) -> None:
        self._events.close()


def encode(protocol: int, source: Endpoint, destination: Endpoint, way: Cta = Cta.TUPLE_REPLY) -> bytes:
    """Body of a GET for the flow whose replies (or whose packets, by `way`) go from `source` to `destination`."""
    family = socket.AF_INET6 if ":" in source[0] else socket.AF_INET
    source_kind, destination_kind = _ADDRESSES[family]
    addresses = nested(
        Tuple.IP,
        attribute(source_kind, socket.inet_pton(family, source[0])),
        attribute(destination_kind, socket.inet_pton(family, destination[0])),
    )
    ports = nested(
        Tuple.PROTO,
        attribute(Proto.NUM, bytes((protocol,))),
        attribute(Proto.SRC_PORT, struct.pack(">H", source[1])),
        attribute(Proto.DST_PORT, struct.pack(">H", destination[1])),
    )
    return NFGENMSG.pack(family, 0, 0) + nested(way, addresses, ports)


def decode(body: bytes, way: Cta = Cta.TUPLE_ORIG, *, destination: bool = False) -> Endpoint | None:
    """The original destination of the flow in a GET's answer, or the source or destination of its replies, if any."""
    found = dict(attributes(fields(body).get(way, b"")))
    addresses = dict(attributes(found.get(Tuple.IP, b"")))
    end = int(destination or way == Cta.TUPLE_ORIG)
    port = dict(attributes(found.get(Tuple.PROTO, b""))).get(_PORTS[end], b"")
    for family, kinds in _ADDRESSES.items():
        address = addresses.get(kinds[end], b"")
        if len(address) == (4 if family == socket.AF_INET else 16) and len(port) == 2:
            return socket.inet_ntop(family, address), struct.unpack(">H", port)[0]
    return None
