# SPDX-License-Identifier: Apache-2.0
"""Conntrack's entries: where a redirected flow was going, and which TCP flows there are (ctnetlink).

Numbers are those of linux/netfilter/nfnetlink_conntrack.h and nf_conntrack_tcp.h. The kernel keeps the destination of
a redirected flow only for TCP sockets, as SO_ORIGINAL_DST; for UDP the entry itself has to be read. It is found by its
reply direction: that is what the redirected-to socket sees, and what it will answer.
"""

from __future__ import annotations

import contextlib
import errno
import re
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from agent.core.errors import KernelError
from agent.core.wire.netlink import ATTRIBUTE, NLA_F_NESTED, NLM_F_DUMP, attribute, attributes, nested
from agent.core.wire.nftables import NETLINK_NETFILTER, NFGENMSG, fields
from agent.kernel import sysctl
from agent.kernel.netlink.netlink_socket import NetlinkSocket
from agent.kernel.netlink.notifications import Notifications

CT_GET = 1 << 8 | 1  # NFNL_SUBSYS_CTNETLINK, IPCTNL_MSGCT_GET
CT_DELETE = 1 << 8 | 2
GROUP_NEW = 1  # NFNLGRP_CONNTRACK_NEW

_EVENTS = "net/netfilter/nf_conntrack_events"


class Cta(IntEnum):
    """CTA_*: attributes of an entry."""

    TUPLE_ORIG = 1
    TUPLE_REPLY = 2
    PROTOINFO = 4
    ID = 12
    ZONE = 18


class Tuple(IntEnum):
    """CTA_TUPLE_*: attributes of one direction."""

    IP = 1
    PROTO = 2


class ProtoInfo(IntEnum):
    """CTA_PROTOINFO_*: attributes nested in Cta.PROTOINFO."""

    TCP = 1


class ProtoInfoTcp(IntEnum):
    """CTA_PROTOINFO_TCP_*: attributes nested in ProtoInfo.TCP."""

    STATE = 1


class TcpConntrack(IntEnum):
    """TCP_CONNTRACK_*: states of a connection that has ended. They last for seconds, and a SYN replaces the entry."""

    TIME_WAIT = 7
    CLOSE = 8


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
_ENDED = re.compile(
    re.escape(struct.pack("=H", NLA_F_NESTED | ProtoInfo.TCP) + ATTRIBUTE.pack(5, ProtoInfoTcp.STATE))
    + bytes((*b"[", *TcpConntrack, *b"]"))
)
_NOWHERE: Endpoint = ("127.0.0.1", 1)


@dataclass(frozen=True, slots=True)
class TcpFlow:
    """An entry of a TCP connection: (source, destination) of the first packet and of its answer."""

    number: int
    asking: tuple[Endpoint, Endpoint]
    answering: tuple[Endpoint, Endpoint]
    body: bytes


class Conntrack:
    """Make it inside the namespace that it is to ask; usable from anywhere afterwards. One thread."""

    def __init__(self) -> None:
        self._netlink = NetlinkSocket(NETLINK_NETFILTER)

    def original_destination(self, protocol: int, local: Endpoint, client: Endpoint) -> Endpoint | None:
        """Returns what `client` asked for, when `local` received it (both of one family, no v4-mapped addresses).

        None when conntrack's zone 0 has no such flow. Raises KernelError when it cannot be asked.
        """
        body = self._get(encode(protocol, local, client))
        return None if body is None else decode(body)

    def endpoint(self, protocol: int, client: Endpoint, service: Endpoint) -> Endpoint | None:
        """Returns the end that answers `client`, which asked for `service`: another where DNAT has chosen one.

        None when conntrack's zone 0 has no such flow. Raises KernelError when it cannot be asked.
        """
        ends = self.replies(protocol, client, service)
        return ends and ends[0]

    def replies(self, protocol: int, client: Endpoint, service: Endpoint) -> tuple[Endpoint, Endpoint] | None:
        """Returns (source, destination) of the replies: both may differ where NAT has changed them; as `endpoint`."""
        body = self._get(encode(protocol, client, service, Cta.TUPLE_ORIG))
        return None if body is None else _ends(fields(body).get(Cta.TUPLE_REPLY, b""))

    def open_flows(self) -> Iterator[TcpFlow]:
        """Yields the namespace's TCP entries, except those of connections that have ended. Raises KernelError."""
        for answer in self._netlink.request("conntrack dump", CT_GET, NLM_F_DUMP, NFGENMSG.pack(0, 0, 0)):
            # Most have ended; to decode them takes seconds of a busy pod's entries.
            if _ENDED.search(answer.body) is None and (one := decode_tcp(answer.body)) is not None:
                yield one

    def delete(self, flow: TcpFlow) -> None:
        """Deletes an entry; one that is gone already is fine. Raises KernelError."""
        parts = fields(flow.body)
        zone = [attribute(Cta.ZONE, parts[Cta.ZONE])] if Cta.ZONE in parts else []
        names = nested(Cta.TUPLE_ORIG, parts[Cta.TUPLE_ORIG]) + attribute(Cta.ID, parts[Cta.ID]) + b"".join(zone)
        body = flow.body[: NFGENMSG.size] + names
        self._netlink.request("conntrack delete", CT_DELETE, 0, body, fine=(errno.ENOENT,))

    def _get(self, request: bytes) -> bytes | None:
        answers = self._netlink.request("conntrack lookup", CT_GET, 0, request, fine=(errno.ENOENT,))
        return answers[0].body if answers else None

    def close(self) -> None:
        self._netlink.close()


def is_loaded() -> bool:
    """True if the kernel has conntrack by now; asking loads nothing."""
    return sysctl.read(_EVENTS) is not None


class NewFlows:
    """The flows that conntrack creates from now on, in any zone, however short-lived. Make it inside the namespace."""

    def __init__(self) -> None:
        """Raises KernelError where the kernel does not notify of flows."""
        with contextlib.closing(Conntrack()) as lookup:
            # Loads the module and waits for it, which joining the group does not; an error where it is missing.
            lookup.endpoint(socket.IPPROTO_TCP, _NOWHERE, _NOWHERE)
        if sysctl.read(_EVENTS) == 0:
            raise KernelError("conntrack notifications", errno.EOPNOTSUPP, f"{_EVENTS} is 0")
        self._events = Notifications(NETLINK_NETFILTER, [GROUP_NEW])

    def answering(self, service: Endpoint) -> tuple[Endpoint, Endpoint] | None:
        """Returns (answering, asking) end of the flow to `service`, None without one. Raises KernelError if unknown."""
        taken, lost = self._events.take()
        entry = next((one.body for one in taken if decode(one.body) == service), None)
        if entry is None and lost:
            raise KernelError("conntrack notifications", errno.ENOBUFS, "some were lost")
        if entry is None:
            return None
        answers, asker = decode(entry, Cta.TUPLE_REPLY), decode(entry, Cta.TUPLE_REPLY, destination=True)
        return (answers, asker) if answers and asker else None

    def close(self) -> None:
        self._events.close()


def encode(protocol: int, source: Endpoint, destination: Endpoint, way: Cta = Cta.TUPLE_REPLY) -> bytes:
    """Returns the body of a GET for the flow with replies (or packets, by `way`) from `source` to `destination`."""
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
    """Returns the original destination in a GET's answer, or the source or destination of its replies, if any."""
    ends = _ends(fields(body).get(way, b""))
    return ends[int(destination or way == Cta.TUPLE_ORIG)] if ends else None


def decode_tcp(body: bytes) -> TcpFlow | None:
    """Returns None for other protocols and for a connection that has ended (TcpConntrack)."""
    parts = fields(body)
    tcp = dict(attributes(parts.get(Cta.PROTOINFO, b""))).get(ProtoInfo.TCP, b"")
    state = dict(attributes(tcp)).get(ProtoInfoTcp.STATE, b"")
    if not state or state[0] in tuple(TcpConntrack):
        return None
    asking, answering = (_ends(parts.get(way, b"")) for way in (Cta.TUPLE_ORIG, Cta.TUPLE_REPLY))
    if asking is None or answering is None or Cta.ID not in parts:
        return None
    return TcpFlow(int.from_bytes(parts[Cta.ID]), asking, answering, body)


def _ends(data: bytes) -> tuple[Endpoint, Endpoint] | None:
    """Returns source and destination of one direction."""
    parts = dict(attributes(data))
    addresses, ports = (dict(attributes(parts.get(kind, b""))) for kind in (Tuple.IP, Tuple.PROTO))
    for family, kinds in _ADDRESSES.items():
        size = 4 if family == socket.AF_INET else 16
        source, destination = (
            (socket.inet_ntop(family, addresses[kind]), int.from_bytes(ports[port]))
            if len(addresses.get(kind, b"")) == size and len(ports.get(port, b"")) == 2
            else None
            for kind, port in zip(kinds, _PORTS, strict=True)
        )
        if source and destination:
            return source, destination
    return None
