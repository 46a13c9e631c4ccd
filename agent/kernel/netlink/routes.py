"""Policy rules, routes and addresses over rtnetlink: only what capture needs of them.

Constants are of linux/rtnetlink.h and fib_rules.h.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from agent.core import names
from agent.core.errors import KernelError
from agent.core.model.topology import Link, Route
from agent.core.wire import policy_rules
from agent.core.wire.netlink import NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, attribute
from agent.core.wire.netlink import attributes as parse
from agent.core.wire.policy_rules import FibRule
from agent.kernel.netlink.socket import SOL_NETLINK, NetlinkSocket

AF = {4: socket.AF_INET, 6: socket.AF_INET6}
GROUPS = (1, 5, 7, 8, 9, 11, 19)  # RTNLGRP_*: links; addresses, routes and rules of IPv4, then of IPv6
NEWLINK, DELLINK, _GETLINK = 16, 17, 18
NEWADDR, DELADDR, _GETADDR = 20, 21, 22
NEWROUTE, DELROUTE, _GETROUTE = 24, 25, 26
NEWRULE, DELRULE, _GETRULE = 32, 33, 34
_GETQDISC = 38
_LINK = struct.Struct("=BxHiII")  # ifinfomsg: family, type, index, flags, change
_IFF_UP, _SKIP_STATS = 1, 8  # RTEXT_FILTER_SKIP_STATS of IFLA_EXT_MASK (29)
_ROUTE = struct.Struct("=BBBBBBBBI")  # rtmsg: family, dst, src, tos, table, protocol, scope, type, flags
_RULE = struct.Struct("=BBBBBBBBI")  # fib_rule_hdr: family, dst, src, tos, table, -, -, action, flags
_GET_STRICT_CHK = 12
# Read of one pod, which may have any number: they take memory of the agent, and room of other pods in shared maps.
MOST_ADDRESSES, MOST_ROUTES = 256, 1024
MAIN_TABLE = 254  # RT_TABLE_MAIN
_ETHERNET = 1  # ARPHRD_ETHER
_SCOPE_HOST, _TYPE_LOCAL, _TO_TABLE = 254, 2, 1
LOOPBACK_INDEX = 1  # lo is always the first interface of a namespace
_ALL = {4: "0.0.0.0/0", 6: "::/0"}
_FIRST_METRIC = 2048
_UNREACHED = (errno.ENETDOWN, errno.ENODEV, errno.EACCES)  # an interface that is down, gone, or without IPv6
_UNSPEC = {4: bytes(4), 6: bytes(16)}


@dataclass(frozen=True, slots=True)
class LookupRule:
    """ip rule: packets whose mark is `mark` under `mask`, or those to the network `to`, are looked up in `table`.

    `protocol` 0: none is set.
    """

    family: int
    preference: int
    mark: int
    mask: int
    table: int
    protocol: int = 0
    to: str = ""


@dataclass(frozen=True, slots=True)
class LocalRoute:
    """ip route: the whole address space is local on an interface, in `table`.

    The kernel uses the one of lo, but for a socket that is bound to an interface that interface's.
    """

    family: int
    table: int
    protocol: int = names.ROUTING_PROTOCOL
    interface: int = 1  # LOOPBACK_INDEX

    @property
    def metric(self) -> int:
        """0: the kernel's default (IPv6: 1024). No two routes of IPv4 may have the same."""
        return 0 if self.interface == LOOPBACK_INDEX else _FIRST_METRIC + self.interface


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
        """Whether lo is there and up. Answered under the kernel's RTNL lock, which all who change addresses, links
        or IPv4 routes hold from before they notify to the end: after this answer, what was notified before is done."""
        body = _LINK.pack(socket.AF_UNSPEC, 0, LOOPBACK_INDEX, 0, 0) + attribute(29, struct.pack("=I", _SKIP_STATS))
        try:
            answers = self.request("read lo", _GETLINK, 0, body)
        except KernelError as error:
            if error.errno == errno.ENODEV:
                return False
            raise
        return any(_LINK.unpack_from(answer.body)[3] & _IFF_UP for answer in answers)

    def raise_lo(self) -> None:
        """ip link set lo up; fine when it is. Raises KernelError."""
        body = _LINK.pack(socket.AF_UNSPEC, 0, LOOPBACK_INDEX, _IFF_UP, _IFF_UP)
        self.request("ip link set lo up", NEWLINK, 0, body)

    def held_addresses(self) -> tuple[Address, ...]:
        """The first 256 addresses of each family on lo, and as many on all other interfaces together."""
        found = []
        held = Counter[tuple[bool, int]]()
        for answer in self.request("read addresses", _GETADDR, NLM_F_DUMP, bytes(8)):
            parts = dict(parse(answer.body[8:]))
            raw = parts.get(2) or parts.get(1)  # IFA_LOCAL where the link has a peer, else IFA_ADDRESS
            if raw is not None and len(raw) in (4, 16):
                index = int.from_bytes(answer.body[4:8], sys.byteorder)  # of ifaddrmsg
                held[index == LOOPBACK_INDEX, len(raw)] += 1
                if held[index == LOOPBACK_INDEX, len(raw)] > MOST_ADDRESSES:
                    continue
                found.append(Address(ipaddress.ip_address(raw), index))
        return tuple(found)

    def links(self) -> tuple[Link, ...]:
        """All interfaces but lo."""
        body = _LINK.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + attribute(29, struct.pack("=I", _SKIP_STATS))
        found = []
        for answer in self.request("read links", _GETLINK, NLM_F_DUMP, body):
            _, kind, index, flags, _ = _LINK.unpack_from(answer.body)
            parts = dict(parse(answer.body[_LINK.size :]))
            name = parts.get(3, b"").rstrip(b"\0").decode(errors="replace")
            made = dict(parse(parts.get(18, b""))).get(1, b"")  # IFLA_INFO_KIND of IFLA_LINKINFO
            xdp = int.from_bytes(
                dict(parse(parts.get(43, b""))).get(4, b""), sys.byteorder
            )  # IFLA_XDP_PROG_ID of IFLA_XDP
            if index != LOOPBACK_INDEX:
                found.append(Link(index, name, kind == _ETHERNET, made == b"bridge\0", bool(flags & _IFF_UP), xdp))
        return tuple(found)

    def classified(self) -> frozenset[int]:
        """Indices of the interfaces that may have tc filters for what comes in or goes out (clsact, ingress)."""
        answers = self.request("read qdiscs", _GETQDISC, NLM_F_DUMP, bytes(20))  # tcmsg
        kinds = [(dict(parse(one.body[20:])).get(1, b""), one.body[4:8]) for one in answers]  # TCA_KIND
        return frozenset(int.from_bytes(at, sys.byteorder) for kind, at in kinds if kind in (b"clsact\0", b"ingress\0"))

    def main_routes(self, family: int) -> Iterator[Route]:
        """The first 1,024 of the main table; of several next hops the first."""
        for header, parts in self._routes(family, MAIN_TABLE):
            # RTA_OIF, RTA_PRIORITY
            index, metric = (int.from_bytes(parts.get(kind, b""), sys.byteorder) for kind in (4, 6))
            if not index and (hops := parts.get(9)):  # RTA_MULTIPATH: struct rtnexthop, its interface behind 4 bytes
                index = int.from_bytes(hops[4:8], sys.byteorder)
            destination = parts.get(1, _UNSPEC[family])
            yield Route(ipaddress.ip_network((destination, header[1])), index, metric)

    def rules(self, *, ipv6: bool) -> tuple[FibRule, ...]:
        """All policy rules in order, those of IPv6 only when asked for."""
        family = socket.AF_UNSPEC if ipv6 else socket.AF_INET
        answers = self._dump("read policy rules", _GETRULE, _RULE.pack(family, *[0] * 8))
        found = (policy_rules.parse(answer) for answer in answers)
        return tuple(rule for rule in found if rule is not None and (ipv6 or rule.family == 4))

    def table_routes(self, family: int, table: int) -> tuple[LocalRoute | None, ...]:
        """The first 1,024 routes of one table (not 253 to 255), None for each that is no LocalRoute."""
        found = list[LocalRoute | None]()
        for header, parts in self._routes(family, table):
            interface, metric = (int.from_bytes(parts.get(kind, b""), sys.byteorder) for kind in (4, 6))
            one = LocalRoute(family, table, header[5], interface)
            local = header[1] == 0 and header[7] == _TYPE_LOCAL
            found.append(one if local and (interface == LOOPBACK_INDEX or metric == one.metric) else None)
        return tuple(found)

    def _routes(self, family: int, table: int) -> Iterator[tuple[tuple[int, ...], dict[int, bytes]]]:
        body = _ROUTE.pack(AF[family], 0, 0, 0, 0, 0, 0, 0, 0) + attribute(15, struct.pack("=I", table))
        for answer in self._dump("read routes", _GETROUTE, body, MOST_ROUTES):
            header, parts = _ROUTE.unpack_from(answer), dict(parse(answer[_ROUTE.size :]))
            if (int.from_bytes(parts.get(15, b""), sys.byteorder) or header[4]) == table:
                yield header, parts

    def change(self, item: LookupRule | LocalRoute, *, add: bool) -> None:
        """Adds or deletes; fine if that is done already, or if a route's interface has just gone.

        A route in the place of a new one is not replaced.
        """
        if isinstance(item, LookupRule):
            kind, body = (NEWRULE if add else DELRULE), _rule_body(item)
        else:
            kind, body = (NEWROUTE if add else DELROUTE), _route_body(item)
        flags = NLM_F_CREATE | NLM_F_EXCL if add else 0
        fine: tuple[int, ...] = (errno.EEXIST,) if add else (errno.ENOENT, errno.ESRCH)
        if isinstance(item, LocalRoute) and item.interface != LOOPBACK_INDEX:
            fine += _UNREACHED
        try:
            self.request(f"ip {text(item, add=add)}", kind, flags, body)
        except KernelError as error:
            if error.errno not in fine:
                raise

    def _dump(self, operation: str, kind: int, body: bytes, most: int = sys.maxsize) -> list[bytes]:
        try:
            return [answer.body for answer in self.request(operation, kind, NLM_F_DUMP, body, most)]
        except KernelError as error:
            # No such table; or a kernel without this family.
            if error.errno in (errno.ENOENT, errno.EAFNOSUPPORT, errno.EOPNOTSUPP):
                return []
            raise


def text(item: LookupRule | LocalRoute, *, add: bool) -> str:
    """The arguments of the ip command that does the same."""
    six = "-6 " if item.family == 6 else ""
    if isinstance(item, LookupRule):
        selector = f"to {item.to}" if item.to else f"fwmark {item.mark:#x}/{item.mask:#x}"
        what = f"{selector} lookup {item.table} pref {item.preference}"
        made = f" protocol {item.protocol}" if item.protocol else ""
        return f"{six}rule {'add' if add else 'del'} {what}{made}"
    device = "lo" if item.interface == LOOPBACK_INDEX else f"if{item.interface}"
    metric = f" metric {item.metric}" if item.metric else ""
    what = f"local {_ALL[item.family]} dev {device} table {item.table} scope host proto {item.protocol}{metric}"
    return f"{six}route {'add' if add else 'del'} {what}"


def _rule_body(rule: LookupRule) -> bytes:
    to = ipaddress.ip_network(rule.to or _ALL[rule.family])
    header = _RULE.pack(AF[rule.family], to.prefixlen, 0, 0, 0, 0, 0, _TO_TABLE, 0)
    numbers = {6: rule.preference, 15: rule.table} | ({10: rule.mark, 16: rule.mask} if rule.mask else {})
    body = header + b"".join(attribute(kind, struct.pack("=I", value)) for kind, value in numbers.items())
    body += attribute(1, to.network_address.packed) if to.prefixlen else b""  # FRA_DST
    return body + (attribute(21, bytes([rule.protocol])) if rule.protocol else b"")  # FRA_PROTOCOL, since 4.17


def _route_body(route: LocalRoute) -> bytes:
    header = _ROUTE.pack(AF[route.family], 0, 0, 0, 0, route.protocol, _SCOPE_HOST, _TYPE_LOCAL, 0)
    numbers = {15: route.table, 4: route.interface} | ({6: route.metric} if route.metric else {})
    parts = (attribute(kind, struct.pack("=I", value)) for kind, value in numbers.items())
    return header + attribute(1, _UNSPEC[route.family]) + b"".join(parts)
