# SPDX-License-Identifier: Apache-2.0
"""The messages of rtnetlink that are sent and read here, and the numbers in them by name. Pure.

Names and numbers are of linux/rtnetlink.h, fib_rules.h, if_link.h and if_addr.h; a test compares them with the headers.
"""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import KW_ONLY, dataclass
from enum import IntEnum

from agent.core import names
from agent.core.wire.netlink import attribute, pack_u32

AF = {4: 2, 6: 10}  # AF_INET, AF_INET6
IFINFOMSG = struct.Struct("=BxHiII")  # family, type, index, flags, change
IFADDRMSG = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, index
RTMSG = struct.Struct("=BBBBBBBBI")  # family, dst_len, src_len, tos, table, protocol, scope, type, flags
TCMSG = struct.Struct("=Bxxxi12x")  # family, index
FIB_RULE_HDR = RTMSG  # family, dst_len, src_len, tos, table, -, -, action, flags
LOOPBACK_INDEX = 1  # lo is always the first interface of a namespace
EVERYTHING = {4: bytes(4), 6: bytes(16)}  # as RTA_DST of a default route
_ALL = {4: "0.0.0.0/0", 6: "::/0"}
_FIRST_METRIC = 2048


class Rtm(IntEnum):
    """RTM_*: message types."""

    NEWLINK = 16
    DELLINK = 17
    GETLINK = 18
    NEWADDR = 20
    DELADDR = 21
    GETADDR = 22
    NEWROUTE = 24
    DELROUTE = 25
    GETROUTE = 26
    NEWRULE = 32
    DELRULE = 33
    GETRULE = 34
    GETQDISC = 38


class Group(IntEnum):
    """RTNLGRP_*: multicast groups."""

    LINK = 1
    IPV4_IFADDR = 5
    IPV4_ROUTE = 7
    IPV4_RULE = 8
    IPV6_IFADDR = 9
    IPV6_ROUTE = 11
    IPV6_RULE = 19


class Ifla(IntEnum):
    """IFLA_*: attributes of a link; INFO_* are nested in LINKINFO."""

    ADDRESS = 1
    IFNAME = 3
    LINKINFO = 18
    EXT_MASK = 29
    XDP = 43


class LinkInfo(IntEnum):
    """IFLA_INFO_*: attributes nested in Ifla.LINKINFO."""

    KIND = 1
    DATA = 2


class LinkXdp(IntEnum):
    """IFLA_XDP_*: attributes nested in Ifla.XDP."""

    PROG_ID = 4


class Ifa(IntEnum):
    """IFA_*: attributes of an address."""

    ADDRESS = 1
    LOCAL = 2


class Rta(IntEnum):
    """RTA_*: attributes of a route."""

    DST = 1
    OIF = 4
    PRIORITY = 6
    MULTIPATH = 9
    TABLE = 15


class Fra(IntEnum):
    """FRA_*: attributes of a policy rule."""

    DST = 1
    SRC = 2
    IIFNAME = 3
    GOTO = 4
    PRIORITY = 6
    FWMARK = 10
    TUN_ID = 12
    SUPPRESS_IFGROUP = 13
    SUPPRESS_PREFIXLEN = 14
    TABLE = 15
    FWMASK = 16
    OIFNAME = 17
    L3MDEV = 19
    UID_RANGE = 20
    PROTOCOL = 21
    IP_PROTO = 22
    SPORT_RANGE = 23
    DPORT_RANGE = 24
    DSCP = 25
    FLOWLABEL = 26


class Action(IntEnum):
    """FR_ACT_*: what a policy rule does."""

    TO_TBL = 1
    GOTO = 2
    NOP = 3
    BLACKHOLE = 6
    UNREACHABLE = 7
    PROHIBIT = 8


class RouteType(IntEnum):
    """RTN_*: kinds of routes."""

    UNICAST = 1
    LOCAL = 2


class Table(IntEnum):
    """RT_TABLE_*: routing tables that the kernel makes."""

    UNSPEC = 0
    DEFAULT = 253
    MAIN = 254
    LOCAL = 255


class Scope(IntEnum):
    """RT_SCOPE_*."""

    UNIVERSE = 0
    LINK = 253
    HOST = 254


@dataclass(frozen=True, slots=True)
class LookupRule:
    """A policy rule (ip rule): packets that match are looked up in `table`.

    They match if their mark is `mark` under `mask`, if they go to the network or address `to`, or if they come in by
    the interface `iif`.

    `protocol`: who made it (rt_protos); 0: none is set.
    """

    family: int
    preference: int
    _: KW_ONLY
    mark: int = 0
    mask: int = 0
    table: int
    protocol: int = 0
    to: str = ""
    iif: str = ""

    @property
    def ours(self) -> bool:
        return self.protocol == names.ROUTING_PROTOCOL

    def __str__(self) -> str:
        """Returns the arguments of ip rule add."""
        selectors = [f"iif {self.iif}"] * bool(self.iif) + [f"to {self.to}"] * bool(self.to)
        selectors += [f"fwmark {self.mark:#x}/{self.mask:#x}"] * bool(self.mask)
        protocol = f" protocol {self.protocol}" if self.protocol else ""
        return f"{' '.join(selectors)} lookup {self.table} pref {self.preference}{protocol}"


@dataclass(frozen=True, slots=True)
class LocalRoute:
    """ip route: the whole address space is local on an interface, in `table`.

    The kernel uses the one of lo, but for a socket that is bound to an interface that interface's.
    """

    family: int
    table: int
    protocol: int = names.ROUTING_PROTOCOL
    interface: int = LOOPBACK_INDEX

    @property
    def metric(self) -> int:
        """The metric, 0 for the kernel's default (IPv6: 1024). No two routes of IPv4 may have the same."""
        return 0 if self.interface == LOOPBACK_INDEX else _FIRST_METRIC + self.interface

    def __str__(self) -> str:
        """Returns the arguments of ip route add."""
        device = "lo" if self.interface == LOOPBACK_INDEX else f"if{self.interface}"
        metric = f" metric {self.metric}" if self.metric else ""
        return f"local {_ALL[self.family]} dev {device} table {self.table} scope host proto {self.protocol}{metric}"


Item = LookupRule | LocalRoute


def command(item: Item, *, add: bool) -> str:
    """Returns the arguments of the ip command that adds or deletes it."""
    return f"{_kind(item)} {'add' if add else 'del'} {item}"


def difference(item: Item, *, add: bool) -> str:
    """Returns in words what is wrong while that command is due."""
    return f"ip {_kind(item)} {item} is {'missing' if add else 'not wanted'}"


def _kind(item: Item) -> str:
    return ("-6 " if item.family == 6 else "") + ("route" if isinstance(item, LocalRoute) else "rule")


def encode(item: Item, *, add: bool) -> tuple[Rtm, bytes]:
    """Returns (message type, body) that adds or deletes the item."""
    if isinstance(item, LocalRoute):
        return (Rtm.NEWROUTE if add else Rtm.DELROUTE), _route(item)
    return (Rtm.NEWRULE if add else Rtm.DELRULE), _rule(item)


def _rule(rule: LookupRule) -> bytes:
    to = ipaddress.ip_network(rule.to or _ALL[rule.family])
    body = FIB_RULE_HDR.pack(AF[rule.family], to.prefixlen, 0, 0, 0, 0, 0, Action.TO_TBL, 0)
    body += attribute(Fra.PRIORITY, pack_u32(rule.preference)) + attribute(Fra.TABLE, pack_u32(rule.table))
    if rule.mask:
        body += attribute(Fra.FWMARK, pack_u32(rule.mark)) + attribute(Fra.FWMASK, pack_u32(rule.mask))
    if to.prefixlen:
        body += attribute(Fra.DST, to.network_address.packed)
    if rule.iif:
        body += attribute(Fra.IIFNAME, rule.iif)
    return body + (attribute(Fra.PROTOCOL, bytes([rule.protocol])) if rule.protocol else b"")  # since 4.17


def _route(route: LocalRoute) -> bytes:
    body = RTMSG.pack(AF[route.family], 0, 0, 0, 0, route.protocol, Scope.HOST, RouteType.LOCAL, 0)
    body += attribute(Rta.DST, EVERYTHING[route.family]) + attribute(Rta.TABLE, pack_u32(route.table))
    body += attribute(Rta.OIF, pack_u32(route.interface))
    return body + (attribute(Rta.PRIORITY, pack_u32(route.metric)) if route.metric else b"")
