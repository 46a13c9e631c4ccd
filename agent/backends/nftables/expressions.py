# SPDX-License-Identifier: Apache-2.0
"""Each word of netfilter's vocabulary as nf_tables expressions: printed text and message bytes. Pure.

Text is what `nft list` prints; bytes are NFTA_LIST_ELEMs (linux/netfilter/nf_tables.h). Registers: 1 for
data, 0 for the verdict. Marks and connection marks are in host order, packet fields in network order.
"""

from __future__ import annotations

import ipaddress
import struct

from agent.backends.netfilter.rules import Field, Match, Rule, RuleAction
from agent.backends.nftables.sets import AnonymousSet, anonymous
from agent.core import names
from agent.core.wire import nftables as wire
from agent.core.wire.netlink import attribute, nested, pack_u32
from agent.core.wire.nftables import NFPROTO, REG_1, CtKey, MetaKey, PayloadBase, VerdictCode

_META = {Field.MARK: MetaKey.MARK, Field.IN_INTERFACE: MetaKey.IIFNAME, Field.OUT_INTERFACE: MetaKey.OIFNAME}
_CT_ESTABLISHED = 2  # the bit of ct state
_CT_STATUS = {Field.CONFIRMED: 1 << 3, Field.DNAT: 1 << 5}  # IPS_CONFIRMED, IPS_DST_NAT
_ORIGINAL = b"\0"  # IP_CT_DIR_ORIGINAL
_PROTO_SPECIFIED = 2  # NF_NAT_RANGE_PROTO_SPECIFIED: the kernel sets it for given ports, and dumps it
_SYN, _OPENING_FLAGS = 0x02, 0x17  # FIN, SYN, RST and ACK
_PROTOCOL = {"icmp": 1, "tcp": 6, "udp": 17, "ipv6-icmp": 58}


def expression(name: str, *data: bytes) -> bytes:
    return nested(wire.LIST_ELEM, attribute(wire.Expr.NAME, name), *([nested(wire.Expr.DATA, *data)] if data else []))


def meta(key: MetaKey) -> bytes:
    return expression("meta", attribute(wire.Meta.KEY, key), attribute(wire.Meta.DREG, REG_1))


def payload(base: PayloadBase, offset: int, length: int) -> bytes:
    return expression(
        "payload",
        attribute(wire.Payload.DREG, REG_1),
        attribute(wire.Payload.BASE, base),
        attribute(wire.Payload.OFFSET, offset),
        attribute(wire.Payload.LEN, length),
    )


def compare(value: bytes, negated: bool = False) -> bytes:
    return expression(
        "cmp",
        attribute(wire.Cmp.SREG, REG_1),
        attribute(wire.Cmp.OP, wire.CmpOp.NEQ if negated else wire.CmpOp.EQ),
        nested(wire.Cmp.DATA, attribute(wire.Data.VALUE, value)),
    )


def _bitwise(mask: bytes, xor: bytes) -> bytes:
    length = len(mask)
    return expression(
        "bitwise",
        attribute(wire.Bitwise.SREG, REG_1),
        attribute(wire.Bitwise.DREG, REG_1),
        attribute(wire.Bitwise.LEN, length),
        attribute(wire.Bitwise.OP, 0),
        nested(wire.Bitwise.MASK, attribute(wire.Data.VALUE, mask)),
        nested(wire.Bitwise.XOR, attribute(wire.Data.VALUE, xor)),
    )


def immediate(value: bytes) -> bytes:
    return expression(
        "immediate",
        attribute(wire.Immediate.DREG, REG_1),
        nested(wire.Immediate.DATA, attribute(wire.Data.VALUE, value)),
    )


def verdict(code: VerdictCode, chain: str = "") -> bytes:
    target = [attribute(wire.Verdict.CHAIN, chain)] if chain else []
    held = nested(wire.Data.VERDICT, attribute(wire.Verdict.CODE, code.unsigned), *target)
    return expression("immediate", attribute(wire.Immediate.DREG, wire.REG_VERDICT), nested(wire.Immediate.DATA, held))


def _ct_load(key: CtKey) -> bytes:
    return expression("ct", attribute(wire.Ct.KEY, key), attribute(wire.Ct.DREG, REG_1))


def _ct_store(key: CtKey, *direction: bytes) -> bytes:
    return expression("ct", attribute(wire.Ct.KEY, key), *direction, attribute(wire.Ct.SREG, REG_1))


COUNTER = expression("counter", attribute(wire.Counter.BYTES, bytes(8)), attribute(wire.Counter.PACKETS, bytes(8)))


def rule(rule: Rule, first_set: int = 1) -> tuple[str, bytes, tuple[AnonymousSet, ...]]:
    """Returns the text and the expressions of one rule, without comment, and its sets, numbered from `first_set`."""
    texts: list[str] = []
    parts: list[bytes] = []
    sets: list[AnonymousSet] = []
    protocol = next((str(m.value) for m in rule.matches if m.field is Field.PROTOCOL), "")
    has_port = any(m.field in (Field.SOURCE_PORT, Field.DESTINATION_PORT, Field.OPENING) for m in rule.matches)
    for match in rule.matches:
        if isinstance(match.value, tuple):
            named = anonymous(match.field, match.value, first_set + len(sets))
            sets.append(named)
            word, encoded = _among(match.field, named, rule.family, protocol)
        else:
            word, encoded = _match(match, rule.family, protocol)
        parts.append(encoded)
        if not (match.field is Field.PROTOCOL and has_port):  # nft prints "tcp dport", which implies it
            texts.append(word)
    word, encoded = _action(rule)
    text = " ".join([*texts, "counter", *([word] if word else [])])
    return text, b"".join([*parts, COUNTER, encoded]), tuple(sets)


def _match(match: Match, family: int | None, protocol: str) -> tuple[str, bytes]:
    field = match.field
    value = match.value
    sign = "!= " if match.negated else ""
    match field:
        case Field.FAMILY:
            return f"meta nfproto ipv{value}", _family(int(str(value)))
        case Field.PROTOCOL:
            return f"meta l4proto {value}", meta(MetaKey.L4PROTO) + compare(bytes([_PROTOCOL[str(value)]]))
        case Field.IN_INTERFACE | Field.OUT_INTERFACE:
            padded = str(value).encode().ljust(16, b"\0")
            return f'{field.value} {sign}"{value}"', meta(_META[field]) + compare(padded, match.negated)
        case Field.SOURCE | Field.DESTINATION:
            return _address(match, family)
        case Field.SOURCE_PORT | Field.DESTINATION_PORT:
            packed = struct.pack(">H", value)
            return f"{protocol} {field.value} {sign}{value}", _port(field) + compare(packed, match.negated)
        case Field.OPENING:
            flags = payload(PayloadBase.TRANSPORT_HEADER, 13, 1) + _bitwise(bytes([_OPENING_FLAGS]), bytes(1))
            text = f"tcp flags {sign}syn / fin,syn,rst,ack"
            return text, flags + compare(bytes([_SYN]), match.negated)
        case Field.ESTABLISHED:
            state = _ct_load(CtKey.STATE) + _bitwise(pack_u32(_CT_ESTABLISHED), bytes(4))
            return "ct state established", state + compare(bytes(4), negated=True)
        case Field.CONFIRMED | Field.DNAT:
            status = _ct_load(CtKey.STATUS) + _bitwise(pack_u32(_CT_STATUS[field]), bytes(4))
            return f"ct status {'! ' if match.negated else ''}{field.value}", status + compare(
                bytes(4), negated=not match.negated
            )
        case Field.MARK | Field.CONNECTION_MARK:
            mark = int(str(value))
            text = f"& 0x{names.MARK_MASK:08x} {'!=' if match.negated else '=='} 0x{mark:08x}"
            under = _bitwise(pack_u32(names.MARK_MASK), bytes(4)) + compare(pack_u32(mark), match.negated)
            if field is Field.MARK:
                return f"meta mark {text}", meta(_META[Field.MARK]) + under
            return f"ct mark {text}", _ct_load(CtKey.MARK) + under
    raise ValueError(f"{field} takes several values")


def _among(field: Field, values: AnonymousSet, family: int | None, protocol: str) -> tuple[str, bytes]:
    """Returns a match against a set: loads the field as the set's keys are written, and looks it up."""
    lookup = expression(
        "lookup",
        attribute(wire.Lookup.SET, values.name),
        attribute(wire.Lookup.SREG, REG_1),
        attribute(wire.Lookup.SET_ID, values.number),
    )
    if field is Field.USER:  # interval sets compare bytes: the number is turned into network order
        turn = expression(
            "byteorder",
            attribute(wire.Byteorder.SREG, REG_1),
            attribute(wire.Byteorder.DREG, REG_1),
            attribute(wire.Byteorder.OP, wire.BYTEORDER_HTON),
            attribute(wire.Byteorder.LEN, 4),
            attribute(wire.Byteorder.SIZE, 4),
        )
        return f"meta skuid {values.text}", meta(MetaKey.SKUID) + turn + lookup
    if field in (Field.SOURCE_PORT, Field.DESTINATION_PORT):
        return f"{protocol} {field.value} {values.text}", _port(field) + lookup
    if family is None:
        raise ValueError(f"a set of {field.value} in a rule of no family")
    text = f"{'ip' if family == 4 else 'ip6'} {field.value} {values.text}"
    return text, _family(family) + _address_load(field, family) + lookup


def _family(family: int) -> bytes:
    return meta(MetaKey.NFPROTO) + compare(bytes([NFPROTO[family]]))


def _port(field: Field) -> bytes:
    return payload(PayloadBase.TRANSPORT_HEADER, 0 if field is Field.SOURCE_PORT else 2, 2)


def _address_load(field: Field, family: int) -> bytes:
    length = 4 if family == 4 else 16
    offset = (12 if family == 4 else 8) + (length if field is Field.DESTINATION else 0)
    return payload(PayloadBase.NETWORK_HEADER, offset, length)


def _address(match: Match, family: int | None) -> tuple[str, bytes]:
    network = ipaddress.ip_network(str(match.value))
    if network.version != family:
        raise ValueError(f"a rule of family {family} names {network}")
    whole = network.prefixlen == network.max_prefixlen
    shown = network.network_address if whole else network
    text = f"{'ip' if family == 4 else 'ip6'} {match.field.value} {'!= ' if match.negated else ''}{shown}"
    load = _address_load(match.field, family)
    if not whole:
        load += _bitwise(network.netmask.packed, bytes(network.max_prefixlen // 8))
    return text, _family(family) + load + compare(network.network_address.packed, match.negated)


def _action(rule: Rule) -> tuple[str, bytes]:
    mask = 0xFFFFFFFF ^ names.MARK_MASK
    mark = names.CONNECTION_MARK
    load_mark = _ct_load(CtKey.MARK)
    match rule.verb:
        case RuleAction.ACCEPT:
            return "accept", verdict(VerdictCode.ACCEPT)
        case RuleAction.RETURN:
            return "return", verdict(VerdictCode.RETURN)
        case RuleAction.REDIRECT:
            redirect = expression(
                "redir",
                attribute(wire.Redir.REG_PROTO_MIN, REG_1),
                attribute(wire.Redir.REG_PROTO_MAX, REG_1),
                attribute(wire.Redir.FLAGS, _PROTO_SPECIFIED),
            )
            return f"redirect to :{rule.value}", immediate(struct.pack(">H", rule.value)) + redirect
        case RuleAction.SET_CONNECTION_MARK:
            marked = load_mark + _bitwise(pack_u32(mask), pack_u32(mark)) + _ct_store(CtKey.MARK)
            return f"ct mark set ct mark & 0x{mask | mark:08x} | 0x{mark:08x}", marked
        case RuleAction.RESTORE_MARK:
            store = expression("meta", attribute(wire.Meta.KEY, MetaKey.MARK), attribute(wire.Meta.SREG, REG_1))
            return "meta mark set ct mark", load_mark + store
        case RuleAction.ZONE:
            return f"ct zone set {rule.value}", immediate(struct.pack("=H", rule.value)) + _ct_store(CtKey.ZONE)
        case RuleAction.ORIGINAL_ZONE:
            store = _ct_store(CtKey.ZONE, attribute(wire.Ct.DIRECTION, _ORIGINAL))
            return f"ct original zone set {rule.value}", immediate(struct.pack("=H", rule.value)) + store
        case RuleAction.COUNT:
            return "", b""
        case RuleAction.DROP:
            return "drop", verdict(VerdictCode.DROP)
