# SPDX-License-Identifier: Apache-2.0
"""Policy rules (ip rule) as the kernel dumps them, with any selectors. Pure.

Names and numbers are of linux/fib_rules.h.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache

from agent.core import names
from agent.core.wire.netlink import attributes, unpack_int, unpack_text
from agent.core.wire.rtnetlink import FIB_RULE_HDR, Action, Fra, LookupRule, Table

_FAMILIES = {2: 4, 10: 6}  # AF_INET, AF_INET6; multicast routing has rules of its own in the same dump
_INVERT = 2  # FIB_RULE_INVERT
_TABLES = {table.value: table.name.lower() for table in Table}
_ACTIONS = {action.value: action.name.lower() for action in Action}
_EVERYTHING = b"\xff\xff\xff\xff"  # of the suppressors: nothing is suppressed
_FLAGS = ((Fra.L3MDEV, "l3mdev"), (Fra.TUN_ID, "tun_id"), (Fra.DSCP, "dscp"), (Fra.FLOWLABEL, "flowlabel"))
_RANGES = ((Fra.UID_RANGE, "uidrange", "=II"), (Fra.SPORT_RANGE, "sport", "=HH"), (Fra.DPORT_RANGE, "dport", "=HH"))
_PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 58: "ipv6-icmp"}


@dataclass(frozen=True, slots=True)
class FibRule:
    """One rule. `iif` and `oif` are interfaces or "", `others` its further selectors and limits in words.

    `protocol`: the program that made it, as a number of rt_protos (FRA_PROTOCOL), 0 where it is not set.
    """

    family: int
    preference: int
    _: KW_ONLY
    action: int
    table: int
    mark: int = 0
    mask: int = 0
    inverted: bool = False
    iif: str = ""
    oif: str = ""
    others: tuple[str, ...] = ()
    protocol: int = 0
    goto: int = 0  # the preference that it jumps to

    @property
    def plain(self) -> bool:
        """True if the rule selects by its mark alone."""
        return not (self.inverted or self.iif or self.oif or self.others)

    @property
    def elsewhere(self) -> bool:
        """True if the rule leads to a table that the kernel has not made, and is not Sluice's."""
        usual = self.plain and (self.mark, self.mask) == (names.CONNECTION_MARK, names.MARK_MASK)
        return self.table not in _TABLES and not usual and self.protocol != names.ROUTING_PROTOCOL

    def __str__(self) -> str:
        """Returns the rule as ip rule prints it, more or less."""
        parts = ["not"] * self.inverted + list(self.others)
        if self.mask:
            parts.append(f"fwmark {self.mark:#x}/{self.mask:#x}")
        parts += [f"iif {self.iif}"] * bool(self.iif) + [f"oif {self.oif}"] * bool(self.oif)
        if self.action == Action.TO_TBL:
            parts.append(f"lookup {_TABLES.get(self.table, self.table)}")
        elif self.action == Action.GOTO:
            parts.append(f"goto {self.goto}")
        else:
            parts.append(_ACTIONS.get(self.action, f"action {self.action}"))
        return " ".join(parts)


@lru_cache(maxsize=256)  # a node's pods have the same few
def parse(body: bytes) -> FibRule | None:
    """Parses one message of RTM_GETRULE; None for a rule that is not of IPv4 or IPv6."""
    if len(body) < FIB_RULE_HDR.size:
        return None
    header = FIB_RULE_HDR.unpack_from(body)
    parts = dict(attributes(body[FIB_RULE_HDR.size :]))
    family = _FAMILIES.get(header[0])
    if family is None:
        return None
    return FibRule(
        family=family,
        preference=unpack_int(parts.get(Fra.PRIORITY)),
        action=header[7],
        table=unpack_int(parts.get(Fra.TABLE)) or header[4],
        mark=unpack_int(parts.get(Fra.FWMARK)),
        mask=unpack_int(parts.get(Fra.FWMASK)),
        inverted=bool(header[8] & _INVERT),
        iif=unpack_text(parts.get(Fra.IIFNAME)),
        oif=unpack_text(parts.get(Fra.OIFNAME)),
        others=tuple(_others(header, parts)),
        protocol=unpack_int(parts.get(Fra.PROTOCOL)),
        goto=unpack_int(parts.get(Fra.GOTO)),
    )


def by_interface_or_destination(rule: FibRule) -> LookupRule | None:
    """Returns the rule if it selects by its incoming interface alone, or by one destination address alone."""
    if rule.action != Action.TO_TBL or rule.inverted or rule.mark or rule.mask or rule.oif:
        return None
    to = rule.others[0].removeprefix("to ") if len(rule.others) == 1 and rule.others[0].startswith("to ") else ""
    if bool(rule.iif) == bool(to) or "/" in to or len(rule.others) > bool(to):
        return None
    return LookupRule(rule.family, rule.preference, table=rule.table, protocol=rule.protocol, to=to, iif=rule.iif)


def _others(header: tuple[int, ...], parts: Mapping[int, bytes]) -> Iterator[str]:
    for word, kind, length in (("from", Fra.SRC, header[2]), ("to", Fra.DST, header[1])):
        if length:
            yield f"{word} {_network(parts.get(kind, b''), length)}"
    if header[3]:
        yield f"tos {header[3]:#x}"
    for kind, word in _FLAGS:
        if any(parts.get(kind, b"")):
            yield word
    for kind, word, form in _RANGES:
        if len(parts.get(kind, b"")) == struct.calcsize(form):
            first, last = struct.unpack(form, parts[kind])
            yield f"{word} {first}" if first == last else f"{word} {first}-{last}"
    if any(parts.get(Fra.IP_PROTO, b"")):
        yield f"ipproto {_PROTOCOLS.get(parts[Fra.IP_PROTO][0], parts[Fra.IP_PROTO][0])}"
    if parts.get(Fra.SUPPRESS_PREFIXLEN, _EVERYTHING) != _EVERYTHING:
        yield f"suppress_prefixlength {unpack_int(parts[Fra.SUPPRESS_PREFIXLEN])}"
    if parts.get(Fra.SUPPRESS_IFGROUP, _EVERYTHING) != _EVERYTHING:
        yield f"suppress_ifgroup {unpack_int(parts[Fra.SUPPRESS_IFGROUP])}"


def _network(packed: bytes, length: int) -> str:
    if len(packed) not in (4, 16):
        return "?"
    address = ipaddress.ip_address(packed)
    return str(address) if length == address.max_prefixlen else f"{address}/{length}"
