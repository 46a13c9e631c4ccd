"""Policy rules and host routes over rtnetlink, as far as rules by interface and by destination are concerned.

Constants are of linux/fib_rules.h and rtnetlink.h.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from agent.core import names
from agent.core.errors import KernelError
from agent.core.wire.netlink import NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, Message, attribute, attributes
from agent.kernel.netlink.routes import AF, RouteSocket

OURS: Final = names.ROUTING_PROTOCOL  # FRA_PROTOCOL, since 4.17
_NEWRULE, _DELRULE, _GETRULE, _GETROUTE = 32, 33, 34, 26
_HEADER = struct.Struct("=BBBBBBBBI")  # fib_rule_hdr and rtmsg are laid out alike
_TO_TABLE, _UNICAST = 1, 1
_DST, _IIF, _PRIORITY, _TABLE, _PROTOCOL = 1, 3, 6, 15, 21
_NO_SUPPRESSOR = (14, b"\xff\xff\xff\xff")  # FRA_SUPPRESS_PREFIXLEN, always told
_NEUTRAL = frozenset({_PRIORITY, _TABLE, _PROTOCOL, 14, 18})  # select nothing; 18 is FRA_PAD
_RTA_DST, _RTA_OIF, _RTA_TABLE = 1, 4, 15
_LONGEST = {4: 32, 6: 128}


@dataclass(frozen=True, slots=True)
class PolicyRule:
    """ip rule: what comes in by `iif`, or goes to the address `to`, is looked up in `table`. One of them is ""."""

    family: int
    priority: int
    table: int
    iif: str = ""
    to: str = ""

    def __str__(self) -> str:
        """As the arguments of ip rule add."""
        selector = f"iif {self.iif}" if self.iif else f"to {self.to}"
        return f"{selector} lookup {self.table} pref {self.priority}"


@dataclass(frozen=True, slots=True)
class HeldRule:
    """A rule that is there, and whether it carries our protocol number."""

    rule: PolicyRule
    ours: bool


def rules(route: RouteSocket, family: int) -> tuple[HeldRule, ...]:
    """Rules of the form of PolicyRule; those with any other selector are left out."""
    found = []
    for answer in _dump(route, "read policy rules", _GETRULE, _HEADER.pack(AF[family], *[0] * 8)):
        header, parts = _HEADER.unpack_from(answer.body), dict(attributes(answer.body[_HEADER.size :]))
        iif = parts.get(_IIF, b"").rstrip(b"\0").decode(errors="replace")
        to = parts.get(_DST, b"")
        whole = header[1] == _LONGEST[family] and len(to) * 8 == _LONGEST[family]
        # Flags: FIB_RULE_INVERT is 2; the others say that an interface is missing.
        if header[2] or header[3] or header[7] != _TO_TABLE or header[8] & 2 or bool(iif) == bool(header[1]):
            continue
        if parts.get(_NO_SUPPRESSOR[0], _NO_SUPPRESSOR[1]) != _NO_SUPPRESSOR[1]:
            continue
        if (header[1] and not whole) or not set(parts) <= _NEUTRAL | {_IIF if iif else _DST}:
            continue
        table = int.from_bytes(parts.get(_TABLE, b""), "little") or header[4]
        priority = int.from_bytes(parts.get(_PRIORITY, b""), "little")
        rule = PolicyRule(family, priority, table, iif, "" if iif else str(ipaddress.ip_address(to)))
        found.append(HeldRule(rule, parts.get(_PROTOCOL) == bytes([OURS])))
    return tuple(found)


def host_routes(route: RouteSocket, family: int, table: int) -> Iterator[tuple[str, int]]:
    """(address, interface index) of each route in `table` to one address alone."""
    body = _HEADER.pack(AF[family], 0, 0, 0, table if table < 256 else 0, 0, 0, 0, 0)
    body += attribute(_RTA_TABLE, struct.pack("=I", table))
    for answer in _dump(route, "read routes", _GETROUTE, body):
        header, parts = _HEADER.unpack_from(answer.body), dict(attributes(answer.body[_HEADER.size :]))
        shown = int.from_bytes(parts.get(_RTA_TABLE, b""), "little") or header[4]
        if shown == table and header[1] == _LONGEST[family] and header[7] == _UNICAST and _RTA_OIF in parts:
            yield str(ipaddress.ip_address(parts[_RTA_DST])), int.from_bytes(parts[_RTA_OIF], "little")


def change(route: RouteSocket, rule: PolicyRule, *, add: bool) -> None:
    """Adds with our protocol number, or deletes one that carries it; what is already so is fine."""
    packed = ipaddress.ip_address(rule.to).packed if rule.to else b""
    header = _HEADER.pack(AF[rule.family], len(packed) * 8, 0, 0, 0, 0, 0, _TO_TABLE, 0)
    body = header + attribute(_PRIORITY, struct.pack("=I", rule.priority))
    body += attribute(_TABLE, struct.pack("=I", rule.table)) + attribute(_PROTOCOL, bytes([OURS]))
    body += attribute(_IIF, rule.iif) if rule.iif else attribute(_DST, packed)
    six = "-6 " if rule.family == 6 else ""
    operation = f"ip {six}rule {'add' if add else 'del'} {rule}"
    try:
        route.request(operation, _NEWRULE if add else _DELRULE, NLM_F_CREATE | NLM_F_EXCL if add else 0, body)
    except KernelError as error:
        if error.errno not in ((errno.EEXIST,) if add else (errno.ENOENT, errno.ESRCH)):
            raise


def _dump(route: RouteSocket, operation: str, kind: int, body: bytes) -> list[Message]:
    try:
        return route.request(operation, kind, NLM_F_DUMP, body)
    except KernelError as error:
        if error.errno in (errno.ENOENT, errno.EAFNOSUPPORT, errno.EOPNOTSUPP):
            return []  # no such table, or a kernel without this family
        raise


def index(name: str) -> int:
    """Of an interface of the calling thread's namespace, 0 when there is none."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return 0
