"""Policy rules (ip rule) as the kernel dumps them, whatever they select. Pure.

Numbers are of linux/fib_rules.h: fib_rule_hdr, FRA_* and FR_ACT_*.
"""

from __future__ import annotations

import ipaddress
import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from agent.core import names
from agent.core.wire.netlink import attributes

HEADER = struct.Struct("=BBBBBBBBI")  # family, dst_len, src_len, tos, table, -, -, action, flags
TO_TABLE = 1
_FAMILIES = {2: 4, 10: 6}  # AF_INET, AF_INET6; multicast routing has rules of its own in the same dump
_INVERT = 2  # FIB_RULE_INVERT
_ACTIONS = {2: "goto", 3: "nop", 6: "blackhole", 7: "unreachable", 8: "prohibit"}
_TABLES = {0: "unspec", 253: "default", 254: "main", 255: "local"}
_EVERYTHING = b"\xff\xff\xff\xff"  # FRA_SUPPRESS_PREFIXLEN that suppresses nothing
_PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 58: "ipv6-icmp"}


@dataclass(frozen=True, slots=True)
class FibRule:
    """One rule. `iif` and `oif` are interfaces or "", `others` its further selectors and limits in words.

    `protocol`: who made it, as a number of rt_protos (FRA_PROTOCOL), 0 where nobody said.
    """

    family: int
    preference: int
    action: int
    table: int
    mark: int = 0
    mask: int = 0
    inverted: bool = False
    iif: str = ""
    oif: str = ""
    others: tuple[str, ...] = ()
    protocol: int = 0

    @property
    def plain(self) -> bool:
        """Whether it selects by its mark alone."""
        return not (self.inverted or self.iif or self.oif or self.others)

    @property
    def elsewhere(self) -> bool:
        """Whether it leads to a table that the kernel has not made, and is not ours."""
        usual = self.plain and (self.mark, self.mask) == (names.CONNECTION_MARK, names.MARK_MASK)
        return self.table not in _TABLES and not usual and self.protocol != names.ROUTING_PROTOCOL

    def __str__(self) -> str:
        """As ip rule prints it, more or less."""
        words = ["not"] * self.inverted + list(self.others)
        if self.mask:
            words.append(f"fwmark {self.mark:#x}/{self.mask:#x}")
        words += [f"iif {self.iif}"] * bool(self.iif) + [f"oif {self.oif}"] * bool(self.oif)
        if self.action == TO_TABLE:
            words.append(f"lookup {_TABLES.get(self.table, self.table)}")
        else:
            words.append(_ACTIONS.get(self.action, f"action {self.action}"))
        return " ".join(words)


@lru_cache(maxsize=256)  # a node's pods have the same few
def parse(body: bytes) -> FibRule | None:
    """One message of RTM_GETRULE; None for a rule that is not of IPv4 or IPv6."""
    if len(body) < HEADER.size:
        return None
    header, parts = HEADER.unpack_from(body), dict(attributes(body[HEADER.size :]))
    family = _FAMILIES.get(header[0])
    if family is None:
        return None
    return FibRule(
        family,
        _number(parts.get(6)),
        header[7],
        _number(parts.get(15)) or header[4],
        _number(parts.get(10)),
        _number(parts.get(16)),
        bool(header[8] & _INVERT),
        _text(parts.get(3)),
        _text(parts.get(17)),
        tuple(_others(header, parts)),
        _number(parts.get(21)),
    )


def _others(header: tuple[int, ...], parts: Mapping[int, bytes]) -> Iterator[str]:
    for word, kind, length in (("from", 2, header[2]), ("to", 1, header[1])):
        if length:
            yield f"{word} {_network(parts.get(kind, b''), length)}"
    if header[3]:
        yield f"tos {header[3]:#x}"
    for kind, word in ((19, "l3mdev"), (12, "tun_id"), (25, "dscp"), (26, "flowlabel")):
        if any(parts.get(kind, b"")):
            yield word
    for kind, word, form in ((20, "uidrange", "=II"), (23, "sport", "=HH"), (24, "dport", "=HH")):
        if len(parts.get(kind, b"")) == struct.calcsize(form):
            first, last = struct.unpack(form, parts[kind])
            yield f"{word} {first}" if first == last else f"{word} {first}-{last}"
    if any(parts.get(22, b"")):
        yield f"ipproto {_PROTOCOLS.get(parts[22][0], parts[22][0])}"
    if parts.get(14, _EVERYTHING) != _EVERYTHING:
        yield f"suppress_prefixlength {_number(parts[14])}"
    if parts.get(13, _EVERYTHING) != _EVERYTHING:
        yield f"suppress_ifgroup {_number(parts[13])}"


def _network(packed: bytes, length: int) -> str:
    if len(packed) not in (4, 16):
        return "?"
    address = ipaddress.ip_address(packed)
    return str(address) if length == address.max_prefixlen else f"{address}/{length}"


def _number(payload: bytes | None) -> int:
    return int.from_bytes(payload or b"", sys.byteorder)


def _text(payload: bytes | None) -> str:
    return (payload or b"").rstrip(b"\0").decode(errors="replace")
