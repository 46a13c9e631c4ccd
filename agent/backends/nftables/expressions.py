"""Each word of netfilter's vocabulary as nf_tables expressions: printed text and message bytes. Pure.

Text is what `nft list` prints; bytes are NFTA_LIST_ELEMs (linux/netfilter/nf_tables.h). Registers: 1 for
data, 0 for the verdict. Marks and connection marks are in host order, packet fields in network order.
"""

from __future__ import annotations

import ipaddress
import struct
import sys

from agent.backends.netfilter.rules import Field, Match, Rule, RuleAction
from agent.backends.nftables.sets import AnonymousSet, anonymous
from agent.core import names
from agent.core.wire.netlink import attribute, nested

_EQUAL, _NOT_EQUAL = 0, 1
_NETWORK_HEADER, _TRANSPORT_HEADER = 1, 2
_META = {Field.MARK: 3, Field.IN_INTERFACE: 6, Field.OUT_INTERFACE: 7}
_META_SKUID, _META_NFPROTO, _META_L4PROTO = 10, 15, 16
_CT_STATE, _CT_MARK, _CT_ZONE = 0, 3, 17
_CT_ESTABLISHED = 2  # the bit of ct state
_HTON = 1
_SYN, _OPENING_FLAGS = 0x02, 0x17  # FIN, SYN, RST and ACK
_PROTOCOL = {"icmp": 1, "tcp": 6, "udp": 17, "ipv6-icmp": 58}
_NFPROTO = {4: 2, 6: 10}
DROP = 0
ACCEPT = 1
JUMP = -3
RETURN = -5


def expression(name: str, *data: bytes) -> bytes:
    return nested(1, attribute(1, name), *([nested(2, *data)] if data else []))


def _meta(key: int) -> bytes:
    return expression("meta", attribute(2, key), attribute(1, 1))


def _payload(base: int, offset: int, length: int) -> bytes:
    return expression("payload", attribute(1, 1), attribute(2, base), attribute(3, offset), attribute(4, length))


def _compare(value: bytes, negated: bool = False) -> bytes:
    return expression(
        "cmp",
        attribute(1, 1),
        attribute(2, _NOT_EQUAL if negated else _EQUAL),
        nested(3, attribute(1, value)),
    )


def _bitwise(mask: int, xor: int, length: int = 4) -> bytes:
    return expression(
        "bitwise",
        attribute(1, 1),
        attribute(2, 1),
        attribute(3, length),
        attribute(6, 0),
        nested(4, attribute(1, mask.to_bytes(length, sys.byteorder))),
        nested(5, attribute(1, xor.to_bytes(length, sys.byteorder))),
    )


def _immediate(value: bytes) -> bytes:
    return expression("immediate", attribute(1, 1), nested(2, attribute(1, value)))


def verdict(code: int, chain: str = "") -> bytes:
    target = [attribute(2, chain)] if chain else []
    return expression("immediate", attribute(1, 0), nested(2, nested(2, attribute(1, code & 0xFFFFFFFF), *target)))


COUNTER = expression("counter", attribute(1, bytes(8)), attribute(2, bytes(8)))


def rule(rule: Rule, first_set: int = 1) -> tuple[str, bytes, tuple[AnonymousSet, ...]]:
    """The text and the expressions of one rule, without comment, and its sets, numbered from `first_set`."""
    words: list[str] = []
    parts: list[bytes] = []
    sets: list[AnonymousSet] = []
    protocol = next((str(m.value) for m in rule.matches if m.field is Field.PROTOCOL), "")
    has_port = any(m.field in (Field.SOURCE_PORT, Field.DESTINATION_PORT, Field.OPENING) for m in rule.matches)
    for match in rule.matches:
        if isinstance(match.value, tuple):
            found = anonymous(match.field, match.value, first_set + len(sets))
            sets.append(found)
            word, encoded = _among(match.field, found, rule.family, protocol)
        else:
            word, encoded = _match(match, rule.family, protocol)
        parts.append(encoded)
        if not (match.field is Field.PROTOCOL and has_port):  # nft prints "tcp dport", which implies it
            words.append(word)
    word, encoded = _action(rule)
    text = " ".join([*words, "counter", *([word] if word else [])])
    return text, b"".join([*parts, COUNTER, encoded]), tuple(sets)


def _match(match: Match, family: int | None, protocol: str) -> tuple[str, bytes]:
    field = match.field
    value = match.value
    sign = "!= " if match.negated else ""
    match field:
        case Field.FAMILY:
            return f"meta nfproto ipv{value}", _family(int(str(value)))
        case Field.PROTOCOL:
            return f"meta l4proto {value}", _meta(_META_L4PROTO) + _compare(bytes([_PROTOCOL[str(value)]]))
        case Field.IN_INTERFACE | Field.OUT_INTERFACE:
            padded = str(value).encode().ljust(16, b"\0")
            return f'{field.value} {sign}"{value}"', _meta(_META[field]) + _compare(padded, match.negated)
        case Field.SOURCE | Field.DESTINATION:
            return _address(match, family)
        case Field.SOURCE_PORT | Field.DESTINATION_PORT:
            packed = struct.pack(">H", value)
            return f"{protocol} {field.value} {sign}{value}", _port(field) + _compare(packed, match.negated)
        case Field.OPENING:
            flags = _payload(_TRANSPORT_HEADER, 13, 1) + _bitwise(_OPENING_FLAGS, 0, 1)
            text = f"tcp flags {sign}syn / fin,syn,rst,ack"
            return text, flags + _compare(bytes([_SYN]), match.negated)
        case Field.ESTABLISHED:
            state = expression("ct", attribute(2, _CT_STATE), attribute(1, 1)) + _bitwise(_CT_ESTABLISHED, 0)
            return "ct state established", state + _compare(bytes(4), negated=True)
        case Field.MARK | Field.CONNECTION_MARK:
            mark = int(str(value))
            text = f"& 0x{names.MARK_MASK:08x} {'!=' if match.negated else '=='} 0x{mark:08x}"
            under = _bitwise(names.MARK_MASK, 0) + _compare(struct.pack("=I", mark), match.negated)
            if field is Field.MARK:
                return f"meta mark {text}", _meta(_META[Field.MARK]) + under
            return f"ct mark {text}", expression("ct", attribute(2, _CT_MARK), attribute(1, 1)) + under
    raise ValueError(f"{field} takes several values")


def _among(field: Field, found: AnonymousSet, family: int | None, protocol: str) -> tuple[str, bytes]:
    """A match against a set: loads the field as the set's keys are written, and looks it up."""
    lookup = expression("lookup", attribute(1, found.name), attribute(2, 1), attribute(4, found.number))
    if field is Field.USER:  # interval sets compare bytes: the number is turned into network order
        turn = expression(
            "byteorder", *(attribute(kind, size) for kind, size in ((1, 1), (2, 1), (3, 1), (4, 4), (5, 4)))
        )
        return f"meta skuid {found.text}", _meta(_META_SKUID) + turn + lookup
    if field in (Field.SOURCE_PORT, Field.DESTINATION_PORT):
        return f"{protocol} {field.value} {found.text}", _port(field) + lookup
    if family is None:
        raise ValueError(f"a set of {field.value} in a rule of no family")
    text = f"{'ip' if family == 4 else 'ip6'} {field.value} {found.text}"
    return text, _family(family) + _address_load(field, family) + lookup


def _family(family: int) -> bytes:
    return _meta(_META_NFPROTO) + _compare(bytes([_NFPROTO[family]]))


def _port(field: Field) -> bytes:
    return _payload(_TRANSPORT_HEADER, 0 if field is Field.SOURCE_PORT else 2, 2)


def _address_load(field: Field, family: int) -> bytes:
    length = 4 if family == 4 else 16
    offset = (12 if family == 4 else 8) + (length if field is Field.DESTINATION else 0)
    return _payload(_NETWORK_HEADER, offset, length)


def _address(match: Match, family: int | None) -> tuple[str, bytes]:
    network = ipaddress.ip_network(str(match.value))
    if network.version != family:
        raise ValueError(f"a rule of family {family} names {network}")
    whole = network.prefixlen == network.max_prefixlen
    shown = network.network_address if whole else network
    text = f"{'ip' if family == 4 else 'ip6'} {match.field.value} {'!= ' if match.negated else ''}{shown}"
    load = _address_load(match.field, family)
    if not whole:
        load += _bitwise(int.from_bytes(network.netmask.packed, sys.byteorder), 0, network.max_prefixlen // 8)
    return text, _family(family) + load + _compare(network.network_address.packed, match.negated)


def _action(rule: Rule) -> tuple[str, bytes]:
    mask = 0xFFFFFFFF ^ names.MARK_MASK
    mark = names.CONNECTION_MARK
    load_mark = expression("ct", attribute(2, _CT_MARK), attribute(1, 1))
    match rule.verb:
        case RuleAction.ACCEPT:
            return "accept", verdict(ACCEPT)
        case RuleAction.RETURN:
            return "return", verdict(RETURN)
        case RuleAction.REDIRECT:
            # Flag 2 (NF_NAT_RANGE_PROTO_SPECIFIED) is what the kernel makes of given ports and dumps again.
            redirect = expression("redir", attribute(1, 1), attribute(2, 1), attribute(3, 2))
            return f"redirect to :{rule.value}", _immediate(struct.pack(">H", rule.value)) + redirect
        case RuleAction.SET_CONNECTION_MARK:
            store = expression("ct", attribute(2, _CT_MARK), attribute(4, 1))
            return (
                f"ct mark set ct mark & 0x{mask | mark:08x} | 0x{mark:08x}",
                load_mark + _bitwise(mask, mark) + store,
            )
        case RuleAction.RESTORE_MARK:
            return "meta mark set ct mark", load_mark + expression("meta", attribute(2, 3), attribute(3, 1))
        case RuleAction.ZONE:
            store = expression("ct", attribute(2, _CT_ZONE), attribute(4, 1))
            return f"ct zone set {rule.value}", _immediate(struct.pack("=H", rule.value)) + store
        case RuleAction.ORIGINAL_ZONE:  # NFTA_CT_DIRECTION 3: IP_CT_DIR_ORIGINAL
            store = expression("ct", attribute(2, _CT_ZONE), attribute(3, b"\0"), attribute(4, 1))
            return f"ct original zone set {rule.value}", _immediate(struct.pack("=H", rule.value)) + store
        case RuleAction.COUNT:
            return "", b""
        case RuleAction.DROP:
            return "drop", verdict(DROP)
