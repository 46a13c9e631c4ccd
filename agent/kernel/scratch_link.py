# SPDX-License-Identifier: Apache-2.0
"""A link in a scratch namespace, so that packets can leave and come: one end is the pod's, the other is read raw.

A veth pair with both ends inside and without neighbour discovery: what goes out at one end is there at the other
at once. VETH_INFO_PEER is of linux/veth.h.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Iterator

from agent.core.wire.netlink import NLM_F_CREATE, NLM_F_EXCL, attribute, nested, pack_u32
from agent.core.wire.rtnetlink import (
    AF,
    IFADDRMSG,
    IFINFOMSG,
    RTMSG,
    Ifa,
    Ifla,
    LinkInfo,
    RouteType,
    Rta,
    Rtm,
    Scope,
    Table,
)
from agent.kernel.netlink.route_socket import RouteSocket

# A pod of the documentation's networks (RFC 5737, 3849), and what it talks to.
LOCAL = {4: "198.51.100.2", 6: "2001:db8:1::2"}
REMOTE = {4: "192.0.2.1", 6: "2001:db8::1"}
_ETHERTYPE = {4: 0x0800, 6: 0x86DD}
_EVERYTHING = 3  # ETH_P_ALL
_POD, _WIRE = "pod0", "wire0"
_MAC = bytes([2, 0, 0, 0, 0, 1])

_UP, _NOARP, _NODAD = 0x1, 0x80, 0x2  # IFF_*, IFA_F_NODAD
_BOOT = 3  # RTPROT_BOOT
_VETH_PEER = 1  # VETH_INFO_PEER
_PREFIX, _WHOLE = {4: 24, 6: 64}, {4: 32, 6: 128}


def make(families: tuple[int, ...]) -> None:
    """Sets lo and a pair up, with an address and a default route of each family, in a namespace that has only lo."""
    with contextlib.closing(RouteSocket()) as route:
        peer = IFINFOMSG.pack(0, 0, 0, 0, 0) + attribute(Ifla.IFNAME, _WIRE)
        data = nested(LinkInfo.DATA, attribute(_VETH_PEER, peer))
        info = nested(Ifla.LINKINFO, attribute(LinkInfo.KIND, "veth"), data)
        body = IFINFOMSG.pack(0, 0, 0, 0, 0) + attribute(Ifla.IFNAME, _POD) + attribute(Ifla.ADDRESS, _MAC) + info
        route.request("make a veth pair", Rtm.NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body)
        for name in ("lo", _WIRE, _POD):
            flags = _UP if name == "lo" else _UP | _NOARP
            body = IFINFOMSG.pack(0, 0, 0, flags, flags) + attribute(Ifla.IFNAME, name)
            route.request(f"set {name} up", Rtm.NEWLINK, 0, body)
        index = socket.if_nametoindex(_POD)
        for family in families:
            _reach(route, family, index)


def _reach(route: RouteSocket, family: int, index: int) -> None:
    raw = ipaddress.ip_address(LOCAL[family]).packed
    out = pack_u32(index)
    body = IFADDRMSG.pack(AF[family], _PREFIX[family], _NODAD, 0, index)
    body += attribute(Ifa.LOCAL, raw) + attribute(Ifa.ADDRESS, raw)
    route.request("give an address", Rtm.NEWADDR, NLM_F_CREATE, body)
    # The kernel makes this route too, but for IPv6 only some time later.
    body = RTMSG.pack(AF[family], _WHOLE[family], 0, 0, Table.LOCAL, _BOOT, Scope.HOST, RouteType.LOCAL, 0)
    body += attribute(Rta.DST, raw) + attribute(Rta.OIF, out)
    route.request("make a local route", Rtm.NEWROUTE, NLM_F_CREATE, body)
    scope = Scope.LINK if family == 4 else Scope.UNIVERSE
    body = RTMSG.pack(AF[family], 0, 0, 0, Table.MAIN, _BOOT, scope, RouteType.UNICAST, 0)
    route.request("make a default route", Rtm.NEWROUTE, NLM_F_CREATE, body + attribute(Rta.OIF, out))


class Wire:
    """The other end of the link: IP packets as bytes, out of the pod and into it.

    One for all: to close a packet socket takes the kernel some 10 ms.
    """

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self.socket.bind((_WIRE, _EVERYTHING))
        self.socket.setblocking(False)

    def packets(self) -> Iterator[bytes]:
        """Returns what the pod has sent until now."""
        with contextlib.suppress(BlockingIOError):
            while True:
                data, (_, _, direction, *_) = self.socket.recvfrom(2048)
                if direction != 4:  # PACKET_OUTGOING: that was us
                    yield data

    def send(self, family: int, packet: bytes) -> None:
        self.socket.sendto(packet, (_WIRE, _ETHERTYPE[family], 0, 0, _MAC))

    def close(self) -> None:
        self.socket.close()
