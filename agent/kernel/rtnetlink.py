"""Policy rules, routes and addresses over rtnetlink: only what capture needs of them.

Constants are of linux/rtnetlink.h and fib_rules.h.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from agent.core.errors import KernelError
from agent.core.netlink import NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, attribute
from agent.core.netlink import attributes as parse
from agent.kernel.netlink import SOL_NETLINK, NetlinkSocket

AF = {4: socket.AF_INET, 6: socket.AF_INET6}
_NEWADDR_GET, _NEWROUTE, _DELROUTE, _GETROUTE = 22, 24, 25, 26
_NEWRULE, _DELRULE, _GETRULE = 32, 33, 34
_ROUTE = struct.Struct("=BBBBBBBBI")  # rtmsg: family, dst, src, tos, table, protocol, scope, type, flags
_RULE = struct.Struct("=BBBBBBBBI")  # fib_rule_hdr: family, dst, src, tos, table, -, -, action, flags
_GET_STRICT_CHK = 12
_BOOT, _SCOPE_HOST, _TYPE_LOCAL, _TO_TABLE = 3, 254, 2, 1
_LOOPBACK_INDEX = 1  # lo is always the first interface of a namespace
_UNSPEC = {4: bytes(4), 6: bytes(16)}


@dataclass(frozen=True, slots=True)
class MarkRule:
    """ip rule: packets whose mark is `mark` under `mask` are looked up in `table`."""

    family: int
    preference: int
    mark: int
    mask: int
    table: int


@dataclass(frozen=True, slots=True)
class LocalRoute:
    """ip route: the whole address space is local on lo, in `table`."""

    family: int
    table: int


class RouteSocket(NetlinkSocket):
    """rtnetlink in the namespace it was opened in."""

    def __init__(self) -> None:
        super().__init__(socket.NETLINK_ROUTE)
        # Dumps are then filtered by the kernel; without it (before 4.20) they are filtered here alone.
        with contextlib.suppress(OSError):
            self.socket.setsockopt(SOL_NETLINK, _GET_STRICT_CHK, 1)

    def addresses(self, *, loopback: bool = False) -> tuple[str, ...]:
        """All addresses of the namespace, without link-local ones, and without loopback ones unless asked for."""
        found = []
        for answer in self.request("read addresses", _NEWADDR_GET, NLM_F_DUMP, bytes(8)):
            parts = dict(parse(answer.body[8:]))
            raw = parts.get(2) or parts.get(1)  # IFA_LOCAL where the link has a peer, else IFA_ADDRESS
            if raw is not None and len(raw) in (4, 16):
                address = ipaddress.ip_address(raw)
                if (loopback or not address.is_loopback) and not address.is_link_local:
                    found.append(str(address))
        return tuple(found)

    def mark_rules(self, family: int) -> Iterator[MarkRule]:
        """Rules of the form of MarkRule; others are left out."""
        for answer in self._dump("read policy rules", _GETRULE, _RULE.pack(AF[family], *[0] * 8)):
            header, parts = _RULE.unpack_from(answer), dict(parse(answer[_RULE.size :]))
            if header[1] or header[2] or header[7] != _TO_TABLE or 10 not in parts:
                continue
            # FRA_PRIORITY 6, FRA_FWMARK 10, FRA_TABLE 15, FRA_FWMASK 16
            numbers = [int.from_bytes(parts.get(kind, b""), "little") for kind in (6, 10, 16, 15)]
            yield MarkRule(family, *numbers)

    def local_routes(self, family: int, table: int) -> Iterator[LocalRoute]:
        """Default routes of type local on lo in one table (1 to 252)."""
        wanted, body = table, _ROUTE.pack(AF[family], 0, 0, 0, table, 0, 0, 0, 0)
        for answer in self._dump("read routes", _GETROUTE, body):
            header, parts = _ROUTE.unpack_from(answer), dict(parse(answer[_ROUTE.size :]))
            table = int.from_bytes(parts.get(15, b""), "little") or header[4]
            oif = int.from_bytes(parts.get(4, b""), "little")
            if header[1] == 0 and header[7] == _TYPE_LOCAL and oif == _LOOPBACK_INDEX and table == wanted:
                yield LocalRoute(family, table)

    def change(self, item: MarkRule | LocalRoute, *, add: bool) -> None:
        """Adds or deletes; an item that is already so is fine."""
        if isinstance(item, MarkRule):
            kind, body = (_NEWRULE if add else _DELRULE), _rule_body(item)
            flags = NLM_F_CREATE | NLM_F_EXCL if add else 0
        else:
            kind, body = (_NEWROUTE if add else _DELROUTE), _route_body(item)
            flags = NLM_F_CREATE | NLM_F_REPLACE if add else 0
        try:
            self.request(f"ip {text(item, add=add)}", kind, flags, body)
        except KernelError as error:
            if error.errno not in ((errno.EEXIST,) if add else (errno.ENOENT, errno.ESRCH)):
                raise

    def _dump(self, operation: str, kind: int, body: bytes) -> list[bytes]:
        with contextlib.suppress(KernelError):  # a kernel without this family answers EOPNOTSUPP or EAFNOSUPPORT
            return [answer.body for answer in self.request(operation, kind, NLM_F_DUMP, body)]
        return []


def text(item: MarkRule | LocalRoute, *, add: bool) -> str:
    """The arguments of the ip command that does the same."""
    six = "-6 " if item.family == 6 else ""
    if isinstance(item, MarkRule):
        what = f"fwmark {item.mark:#x}/{item.mask:#x} lookup {item.table} pref {item.preference}"
        return f"{six}rule {'add' if add else 'del'} {what}"
    everything = "0.0.0.0/0" if item.family == 4 else "::/0"
    return f"{six}route {'replace' if add else 'del'} local {everything} dev lo table {item.table} scope host"


def _rule_body(rule: MarkRule) -> bytes:
    header = _RULE.pack(AF[rule.family], 0, 0, 0, 0, 0, 0, _TO_TABLE, 0)
    numbers = {6: rule.preference, 10: rule.mark, 16: rule.mask, 15: rule.table}
    return header + b"".join(attribute(kind, struct.pack("=I", value)) for kind, value in numbers.items())


def _route_body(route: LocalRoute) -> bytes:
    header = _ROUTE.pack(AF[route.family], 0, 0, 0, 0, _BOOT, _SCOPE_HOST, _TYPE_LOCAL, 0)
    table, oif = struct.pack("=I", route.table), struct.pack("=I", _LOOPBACK_INDEX)
    return header + attribute(1, _UNSPEC[route.family]) + attribute(15, table) + attribute(4, oif)
