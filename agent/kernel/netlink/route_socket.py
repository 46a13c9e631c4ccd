# SPDX-License-Identifier: Apache-2.0
"""Policy rules, routes and addresses over rtnetlink: only what capture needs of them.

Bodies and numbers are in agent.core.wire.rtnetlink.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from agent.core.model.topology import Link, Route
from agent.core.wire import policy_rules
from agent.core.wire.netlink import NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, attribute, pack_u32, unpack_int, unpack_text
from agent.core.wire.netlink import attributes as parse
from agent.core.wire.policy_rules import FibRule
from agent.core.wire.rtnetlink import (
    AF,
    EVERYTHING,
    FIB_RULE_HDR,
    IFADDRMSG,
    IFINFOMSG,
    LOOPBACK_INDEX,
    RTMSG,
    TCMSG,
    Group,
    Ifa,
    Ifla,
    Item,
    LinkInfo,
    LinkXdp,
    LocalRoute,
    RouteType,
    Rta,
    Rtm,
    Table,
    command,
    encode,
)
from agent.kernel.netlink.netlink_socket import SOL_NETLINK, NetlinkSocket

GROUPS = tuple(Group)  # what a pod's namespace is watched for
_IFF_UP = 1
_TCA_KIND = 1  # linux/rtnetlink.h
_WITHOUT_STATS = attribute(Ifla.EXT_MASK, pack_u32(8))  # RTEXT_FILTER_SKIP_STATS
_GET_STRICT_CHK = 12  # NETLINK_GET_STRICT_CHK
# Read of one pod, which may have any number: they take memory of the agent, and room of other pods in shared maps.
MOST_ADDRESSES, MOST_ROUTES = 256, 1024
_ETHERNET = 1  # ARPHRD_ETHER
_LONGEST = {4: 32, 6: 128}
_UNREACHED = (errno.ENETDOWN, errno.ENODEV, errno.EACCES)  # an interface that is down, gone, or without IPv6


@dataclass(frozen=True, slots=True)
class Address:
    """One address without its prefix length, and the index of its interface."""

    address: ipaddress.IPv4Address | ipaddress.IPv6Address
    index: int


class RouteSocket(NetlinkSocket):
    """rtnetlink in the namespace it was opened in.

    A pod may change its routes and addresses all the time, so a dump that changes while it is read is used as it is.
    """

    torn = True

    def __init__(self) -> None:
        super().__init__(socket.NETLINK_ROUTE)
        # Dumps are then filtered by the kernel; without it (before 4.20) they are filtered here alone.
        with contextlib.suppress(OSError):
            self.socket.setsockopt(SOL_NETLINK, _GET_STRICT_CHK, 1)

    def lo_is_up(self) -> bool:
        """True if lo is there and up.

        The kernel answers under its RTNL lock. A change of addresses, links or IPv4 routes holds this lock from before
        the notification to the end: after this answer, changes that were notified before are done.
        """
        body = IFINFOMSG.pack(socket.AF_UNSPEC, 0, LOOPBACK_INDEX, 0, 0) + _WITHOUT_STATS
        answers = self.request("read lo", Rtm.GETLINK, 0, body, fine=(errno.ENODEV,))
        return any(IFINFOMSG.unpack_from(answer.body)[3] & _IFF_UP for answer in answers)

    def raise_lo(self) -> None:
        """Sets lo up; fine if it is up already. Raises KernelError."""
        body = IFINFOMSG.pack(socket.AF_UNSPEC, 0, LOOPBACK_INDEX, _IFF_UP, _IFF_UP)
        self.request("ip link set lo up", Rtm.NEWLINK, 0, body)

    def held_addresses(self) -> tuple[Address, ...]:
        """Returns the first 256 addresses of each family on lo, and as many on all other interfaces together."""
        addresses = []
        held = Counter[tuple[bool, int]]()
        for answer in self.request("read addresses", Rtm.GETADDR, NLM_F_DUMP, bytes(IFADDRMSG.size)):
            parts = dict(parse(answer.body[IFADDRMSG.size :]))
            raw = parts.get(Ifa.LOCAL) or parts.get(Ifa.ADDRESS)  # LOCAL only where the link has a peer
            if raw is not None and len(raw) in (4, 16):
                index = IFADDRMSG.unpack_from(answer.body)[4]
                held[index == LOOPBACK_INDEX, len(raw)] += 1
                if held[index == LOOPBACK_INDEX, len(raw)] > MOST_ADDRESSES:
                    continue
                addresses.append(Address(ipaddress.ip_address(raw), index))
        return tuple(addresses)

    def links(self) -> tuple[Link, ...]:
        """Returns all interfaces but lo."""
        body = IFINFOMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + _WITHOUT_STATS
        links = []
        for answer in self.request("read links", Rtm.GETLINK, NLM_F_DUMP, body):
            _, kind, index, flags, _ = IFINFOMSG.unpack_from(answer.body)
            parts = dict(parse(answer.body[IFINFOMSG.size :]))
            link_kind = unpack_text(dict(parse(parts.get(Ifla.LINKINFO, b""))).get(LinkInfo.KIND))
            xdp = unpack_int(dict(parse(parts.get(Ifla.XDP, b""))).get(LinkXdp.PROG_ID))
            if index != LOOPBACK_INDEX:
                name = unpack_text(parts.get(Ifla.IFNAME))
                links.append(
                    Link(
                        index,
                        name,
                        ethernet=kind == _ETHERNET,
                        bridge=link_kind == "bridge",
                        up=bool(flags & _IFF_UP),
                        xdp=xdp,
                    )
                )
        return tuple(links)

    def classified(self) -> frozenset[int]:
        """Indices of the interfaces that may have tc filters for what comes in or goes out (clsact, ingress)."""
        answers = self.request("read qdiscs", Rtm.GETQDISC, NLM_F_DUMP, bytes(TCMSG.size))
        kinds = {one.body: unpack_text(dict(parse(one.body[TCMSG.size :])).get(_TCA_KIND)) for one in answers}
        return frozenset(TCMSG.unpack_from(body)[1] for body, kind in kinds.items() if kind in ("clsact", "ingress"))

    def main_routes(self, family: int) -> Iterator[Route]:
        """Yields the first 1,024 of the main table; of several next hops the first."""
        for header, parts in self._routes(family, Table.MAIN):
            index = unpack_int(parts.get(Rta.OIF))
            if not index and (hops := parts.get(Rta.MULTIPATH)):
                index = unpack_int(hops[4:8])  # of struct rtnexthop
            destination = ipaddress.ip_network((parts.get(Rta.DST, EVERYTHING[family]), header[1]))
            yield Route(destination, index, unpack_int(parts.get(Rta.PRIORITY)))

    def rules(self, *, ipv6: bool) -> tuple[FibRule, ...]:
        """Returns all policy rules in order, those of IPv6 only when asked for."""
        family = socket.AF_UNSPEC if ipv6 else socket.AF_INET
        answers = self._dump("read policy rules", Rtm.GETRULE, FIB_RULE_HDR.pack(family, *[0] * 8))
        rules = (policy_rules.parse(answer) for answer in answers)
        return tuple(rule for rule in rules if rule is not None and (ipv6 or rule.family == 4))

    def table_routes(self, family: int, table: int) -> tuple[LocalRoute | None, ...]:
        """Returns the first 1,024 routes of one table (not 253 to 255), None for each that is no LocalRoute."""
        routes = list[LocalRoute | None]()
        for header, parts in self._routes(family, table):
            one = LocalRoute(family, table, header[5], unpack_int(parts.get(Rta.OIF)))
            local = header[1] == 0 and header[7] == RouteType.LOCAL
            usual = one.interface == LOOPBACK_INDEX or unpack_int(parts.get(Rta.PRIORITY)) == one.metric
            routes.append(one if local and usual else None)
        return tuple(routes)

    def host_routes(self, family: int, table: int) -> Iterator[tuple[str, int]]:
        """Yields (address, interface index) of each unicast route in `table` to one address alone."""
        for header, parts in self._routes(family, table, sys.maxsize):
            if header[1] == _LONGEST[family] and header[7] == RouteType.UNICAST and Rta.OIF in parts:
                yield str(ipaddress.ip_address(parts[Rta.DST])), unpack_int(parts[Rta.OIF])

    def _routes(
        self, family: int, table: int, most: int = MOST_ROUTES
    ) -> Iterator[tuple[tuple[int, ...], dict[int, bytes]]]:
        body = RTMSG.pack(AF[family], 0, 0, 0, 0, 0, 0, 0, 0) + attribute(Rta.TABLE, pack_u32(table))
        for answer in self._dump("read routes", Rtm.GETROUTE, body, most):
            header = RTMSG.unpack_from(answer)
            parts = dict(parse(answer[RTMSG.size :]))
            if (unpack_int(parts.get(Rta.TABLE)) or header[4]) == table:
                yield header, parts

    def change(self, item: Item, *, add: bool) -> None:
        """Adds or deletes; fine if that is done already, or if a route's interface has just gone.

        A route in the place of a new one is not replaced.
        """
        kind, body = encode(item, add=add)
        flags = NLM_F_CREATE | NLM_F_EXCL if add else 0
        fine: tuple[int, ...] = (errno.EEXIST,) if add else (errno.ENOENT, errno.ESRCH)
        if isinstance(item, LocalRoute) and item.interface != LOOPBACK_INDEX:
            fine += _UNREACHED
        self.request(f"ip {command(item, add=add)}", kind, flags, body, fine=fine)

    def _dump(self, operation: str, kind: int, body: bytes, most: int = sys.maxsize) -> list[bytes]:
        absent = (errno.ENOENT, errno.EAFNOSUPPORT, errno.EOPNOTSUPP)  # the table, or this family in the kernel
        return [one.body for one in self.request(operation, kind, NLM_F_DUMP, body, most=most, fine=absent)]
