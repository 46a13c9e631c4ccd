# SPDX-License-Identifier: Apache-2.0
"""A foreign rule as far as it matters to Sluice's: its effects, its selectors, and its text. Pure.

No full printer: an expression that it does not know is shown by its name. Numbers are of linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field

from agent.backends.netfilter.message_parts import expressions, text
from agent.core import names
from agent.core.wire import nftables as wire
from agent.core.wire.netlink import attributes, unpack_be, unpack_int
from agent.core.wire.nftables import VerdictCode

_JUMPS = {code.unsigned: code.name.lower() for code in (VerdictCode.JUMP, VerdictCode.GOTO)}
_VERDICTS = {code.unsigned: code.name.lower() for code in (VerdictCode.DROP, VerdictCode.ACCEPT, VerdictCode.RETURN)}
_META = {key.value: key.name.lower() for key in wire.MetaKey}
_PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 58: "ipv6-icmp", 132: "sctp"}
# (base, offset) of the network (1) and the transport (2) header.
_FIELDS = {
    (1, 9): "l4proto", (1, 12): "saddr", (1, 16): "daddr", (1, 6): "l4proto", (1, 8): "saddr", (1, 24): "daddr",
    (2, 0): "sport", (2, 2): "dport",
}  # fmt: skip
_ADDRESSES = {(1, 12): 4, (1, 16): 4, (1, 8): 16, (1, 24): 16}  # place -> size
_TARGETS = {
    "DNAT": "dnat",
    "NETMAP": "dnat",
    "REDIRECT": "redirect",
    "TPROXY": "tproxy",
    "REJECT": "drop",
    "NOTRACK": "notrack",
}
_VERBS = {"redir": "redirect", "tproxy": "tproxy", "reject": "drop", "queue": "queue", "notrack": "notrack"}
_CT_NOTRACK = 1  # XT_CT_NOTRACK
_SILENT = frozenset({"counter", "log"})


@dataclass(slots=True, kw_only=True)
class RuleEffect:
    """Effects of one rule: `verbs` among dnat, redirect, tproxy, queue, notrack, mark, drop, accept, return.

    `chain` is the one that it goes on in, if any. `selects` are the plain comparisons: field of the packet -> value.
    `comment` is that of iptables.
    """

    verbs: set[str] = field(default_factory=set)
    chain: str = ""
    comment: str = ""
    words: list[str] = field(default_factory=list)
    selects: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join(self.words)

    @property
    def elsewhere(self) -> bool:
        """True if it is only for traffic that capture leaves alone: on loopback, or neither TCP nor DNS."""
        protocol = self.selects.get("l4proto", "tcp")
        if protocol == "udp" and self.selects.get("dport", "53") != "53":
            return True
        to = self.selects.get("daddr", "")
        inside = "lo" in (self.selects.get("iifname"), self.selects.get("oifname"))
        return inside or protocol not in ("tcp", "udp") or to == "::1" or to.startswith("127.")


@dataclass(frozen=True, slots=True)
class _Value:
    """Content of a register: a field of the packet by name, of which `mask` is kept and `xor` then turned; or bytes.

    `size`: bytes of the whole field where it is an address, of which a prefix may be all that was loaded.
    """

    name: str = ""
    _: KW_ONLY
    data: bytes = b""
    size: int = 0
    mask: int = 0xFFFFFFFF
    xor: int = 0

    @property
    def keeps_our_bits(self) -> bool:
        return self.name == "mark" and not (~self.mask | self.xor) & names.MARK_MASK


def effect(rule: Mapping[int, bytes]) -> RuleEffect:
    """Parses the attributes of a rule."""
    result = RuleEffect()
    registers = dict[int, _Value]()
    for name, data in expressions(rule):
        known = _EXPRESSIONS.get(name)
        if known is not None:
            known(result, registers, data)
        elif name in _VERBS:
            result.verbs.add(_VERBS[name])
            result.words.append(_VERBS[name])
        elif name not in _SILENT:
            result.words.append(name)
    return result


def _load(result: RuleEffect, registers: dict[int, _Value], data: Mapping[int, bytes]) -> None:
    key = unpack_be(data.get(wire.Meta.KEY))
    if wire.Meta.SREG not in data:
        registers[unpack_be(data.get(wire.Meta.DREG))] = _Value(_META.get(key, f"meta {key}"))
    elif key == wire.MetaKey.MARK:
        _set_mark(result, registers.get(unpack_be(data[wire.Meta.SREG]), _Value()), "mark")


def _track(result: RuleEffect, registers: dict[int, _Value], data: Mapping[int, bytes]) -> None:
    key = unpack_be(data.get(wire.Ct.KEY))
    if wire.Ct.SREG not in data:
        registers[unpack_be(data.get(wire.Ct.DREG))] = _Value("ct mark" if key == wire.CtKey.MARK else f"ct {key}")
    elif key == wire.CtKey.MARK:
        _set_mark(result, registers.get(unpack_be(data[wire.Ct.SREG]), _Value()), "ct mark")


def _set_mark(result: RuleEffect, value: _Value, what: str) -> None:
    shown = f"{unpack_int(value.data):#x}" if value.data else value.name or "?"
    result.words.append(f"{what} set {shown}")
    if not (value.keeps_our_bits and what == "mark"):
        result.verbs.add("mark")


def _payload(result: RuleEffect, registers: dict[int, _Value], data: Mapping[int, bytes]) -> None:
    if wire.Payload.DREG in data:
        position = unpack_be(data.get(wire.Payload.BASE)), unpack_be(data.get(wire.Payload.OFFSET))
        name = _FIELDS.get(position, f"payload {position[0]} {position[1]}")
        registers[unpack_be(data[wire.Payload.DREG])] = _Value(name, size=_ADDRESSES.get(position, 0))
    else:
        result.words.append("payload set")


def _bitwise(result: RuleEffect, registers: dict[int, _Value], data: Mapping[int, bytes]) -> None:
    mask, xor = (
        unpack_int(dict(attributes(data.get(kind, b""))).get(wire.Data.VALUE))
        for kind in (wire.Bitwise.MASK, wire.Bitwise.XOR)
    )
    source = registers.get(unpack_be(data.get(wire.Bitwise.SREG)), _Value("?"))
    registers[unpack_be(data.get(wire.Bitwise.DREG))] = _Value(
        source.name, data=b"", size=source.size, mask=mask, xor=xor
    )


def _compare(result: RuleEffect, registers: dict[int, _Value], data: Mapping[int, bytes]) -> None:
    held = registers.get(unpack_be(data.get(wire.Cmp.SREG)), _Value("?"))
    value = dict(attributes(data.get(wire.Cmp.DATA, b""))).get(wire.Data.VALUE, b"")
    shown = _shown(held, value)
    operator = unpack_be(data.get(wire.Cmp.OP))
    if operator == wire.CmpOp.EQ:
        result.selects[held.name] = shown
    if held.name != "nfproto":
        result.words.append(f"{held.name} {shown}" if operator == wire.CmpOp.EQ else f"{held.name} != {shown}")


def _shown(held: _Value, value: bytes) -> str:
    if held.name in ("iifname", "oifname"):
        return text(value.split(b"\0")[0]) or "?"
    if held.size:
        address = ipaddress.ip_address(value[: held.size].ljust(held.size, b"\0"))
        return f"{address}/{8 * len(value)}" if len(value) < held.size else str(address)
    if held.name in ("sport", "dport"):
        return str(int.from_bytes(value[:2]))  # iptables compares both ports in one
    if held.name == "l4proto":
        return _PROTOCOLS.get(value[0], str(value[0])) if value else "?"
    return f"{unpack_int(value):#x}"


def _immediate(result: RuleEffect, registers: dict[int, _Value], data: Mapping[int, bytes]) -> None:
    held = dict(attributes(data.get(wire.Immediate.DATA, b"")))
    if wire.Data.VERDICT not in held:
        registers[unpack_be(data.get(wire.Immediate.DREG))] = _Value(data=held.get(wire.Data.VALUE, b""))
        return
    verdict = dict(attributes(held[wire.Data.VERDICT]))
    code = unpack_be(verdict.get(wire.Verdict.CODE))
    if code in _JUMPS:
        result.chain = text(verdict.get(wire.Verdict.CHAIN))
        result.words.append(f"{_JUMPS[code]} {result.chain}")
    else:
        word = _VERDICTS.get(code, f"verdict {code}")
        result.verbs.add(word)
        result.words.append(word)


def _nat(result: RuleEffect, registers: dict[int, _Value], data: Mapping[int, bytes]) -> None:
    address = registers.get(unpack_be(data.get(wire.Nat.REG_ADDR_MIN)), _Value()).data
    to = f" to {ipaddress.ip_address(address)}" if len(address) in (4, 16) else ""
    verb = "dnat" if unpack_be(data.get(wire.Nat.TYPE)) == wire.NatType.DNAT else "snat"
    result.verbs.add(verb)
    result.words.append(f"{verb}{to}")


def _xt_match(result: RuleEffect, registers: dict[int, _Value], data: Mapping[int, bytes]) -> None:
    name = text(data.get(wire.XtMatch.NAME))
    if name == "comment":
        result.comment = text(data.get(wire.XtMatch.INFO, b"").split(b"\0")[0])
    else:
        result.words.append(f"match {name}")


def _xt_target(result: RuleEffect, registers: dict[int, _Value], data: Mapping[int, bytes]) -> None:
    name = text(data.get(wire.XtTarget.NAME))
    info = data.get(wire.XtTarget.INFO, b"")
    result.words.append(name)
    if name in _TARGETS:
        result.verbs.add(_TARGETS[name])
    elif name == "CT" and info[:1] and info[0] & _CT_NOTRACK:  # xt_ct_target_info begins with its flags
        result.verbs.add("notrack")
    # xt_mark_tginfo2 and xt_connmark_tginfo1: mark, mask; what is outside of both stays as it was.
    elif name in ("MARK", "CONNMARK") and any(unpack_int(info[at : at + 4]) & names.MARK_MASK for at in (0, 4)):
        result.verbs.add("mark")


_EXPRESSIONS: Mapping[str, Callable[[RuleEffect, dict[int, _Value], Mapping[int, bytes]], None]] = {
    "meta": _load,
    "ct": _track,
    "payload": _payload,
    "bitwise": _bitwise,
    "cmp": _compare,
    "immediate": _immediate,
    "nat": _nat,
    "match": _xt_match,
    "target": _xt_target,
}
