"""Each word of netfilter's vocabulary as nf_tables expressions: printed text and message bytes. Pure.

Text is what `nft list` prints; bytes are NFTA_LIST_ELEMs (linux/netfilter/nf_tables.h). Registers: 1 for
data, 0 for the verdict. Marks and connection marks are in host order, packet fields in network order.
"""

from __future__ import annotations

import ipaddress
import struct

from agent.backends.netfilter import Field, Match, Rule, Verb
from agent.core import names
from agent.core.netlink import attribute, nested

_EQUAL, _NOT_EQUAL = 0, 1
_NETWORK_HEADER, _TRANSPORT_HEADER = 1, 2
_META = {Field.MARK: 3, Field.IN_INTERFACE: 6, Field.OUT_INTERFACE: 7}
_META_NFPROTO, _META_L4PROTO = 15, 16
_CT_MARK, _CT_ZONE = 3, 17
_PROTOCOL = {"tcp": 6, "udp": 17}
_NFPROTO = {4: 2, 6: 10}
ACCEPT, JUMP, RETURN = 1, -3, -5


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


def _bitwise(mask: int, xor: int) -> bytes:
    return expression(
        "bitwise",
        attribute(1, 1),
        attribute(2, 1),
        attribute(3, 4),
        attribute(6, 0),
        nested(4, attribute(1, struct.pack("=I", mask))),
        nested(5, attribute(1, struct.pack("=I", xor))),
    )


def _immediate(value: bytes) -> bytes:
    return expression("immediate", attribute(1, 1), nested(2, attribute(1, value)))


def verdict(code: int, chain: str = "") -> bytes:
    target = [attribute(2, chain)] if chain else []
    return expression("immediate", attribute(1, 0), nested(2, nested(2, attribute(1, code & 0xFFFFFFFF), *target)))


COUNTER = expression("counter", attribute(1, bytes(8)), attribute(2, bytes(8)))


def rule(rule: Rule) -> tuple[str, bytes]:
    """The text and the expressions of one rule, without comment."""
    words: list[str] = []
    parts: list[bytes] = []
    protocol = next((str(m.value) for m in rule.matches if m.field is Field.PROTOCOL), "")
    has_port = any(m.field in (Field.SOURCE_PORT, Field.DESTINATION_PORT) for m in rule.matches)
    for match in rule.matches:
        word, encoded = _match(match, rule.family, protocol)
        parts.append(encoded)
        if not (match.field is Field.PROTOCOL and has_port):  # nft prints "tcp dport", which implies it
            words.append(word)
    word, encoded = _action(rule)
    return " ".join([*words, "counter", word]), b"".join([*parts, COUNTER, encoded])


def _match(match: Match, family: int | None, protocol: str) -> tuple[str, bytes]:
    field, value, sign = match.field, match.value, "!= " if match.negated else ""
    if field is Field.PROTOCOL:
        return f"meta l4proto {value}", _meta(_META_L4PROTO) + _compare(bytes([_PROTOCOL[str(value)]]))
    if field in (Field.IN_INTERFACE, Field.OUT_INTERFACE):
        padded = str(value).encode().ljust(16, b"\0")
        return f'{field.value} {sign}"{value}"', _meta(_META[field]) + _compare(padded, match.negated)
    if field in (Field.SOURCE, Field.DESTINATION):
        return _address(match, family)
    if field in (Field.SOURCE_PORT, Field.DESTINATION_PORT):
        load = _payload(_TRANSPORT_HEADER, 0 if field is Field.SOURCE_PORT else 2, 2)
        return f"{protocol} {field.value} {sign}{value}", load + _compare(struct.pack(">H", value), match.negated)
    mark = int(value)
    text = f"& 0x{names.MARK_MASK:08x} {'!=' if match.negated else '=='} 0x{mark:08x}"
    under = _bitwise(names.MARK_MASK, 0) + _compare(struct.pack("=I", mark), match.negated)
    if field is Field.MARK:
        return f"meta mark {text}", _meta(_META[Field.MARK]) + under
    return f"ct mark {text}", expression("ct", attribute(2, _CT_MARK), attribute(1, 1)) + under


def _address(match: Match, family: int | None) -> tuple[str, bytes]:
    address = ipaddress.ip_address(match.value)
    if address.version != family:
        raise ValueError(f"a rule of family {family} names {address}")
    length = 4 if family == 4 else 16
    offset = (12 if family == 4 else 8) + (length if match.field is Field.DESTINATION else 0)
    text = f"{'ip' if family == 4 else 'ip6'} {match.field.value} {'!= ' if match.negated else ''}{address}"
    return text, (
        _meta(_META_NFPROTO)
        + _compare(bytes([_NFPROTO[address.version]]))
        + _payload(_NETWORK_HEADER, offset, length)
        + _compare(address.packed, match.negated)
    )


def _action(rule: Rule) -> tuple[str, bytes]:
    mask, mark = 0xFFFFFFFF ^ names.MARK_MASK, names.CONNECTION_MARK
    load_mark = expression("ct", attribute(2, _CT_MARK), attribute(1, 1))
    match rule.verb:
        case Verb.ACCEPT:
            return "accept", verdict(ACCEPT)
        case Verb.RETURN:
            return "return", verdict(RETURN)
        case Verb.REDIRECT:
            # Flag 2 (NF_NAT_RANGE_PROTO_SPECIFIED) is what the kernel makes of given ports and dumps again.
            redirect = expression("redir", attribute(1, 1), attribute(2, 1), attribute(3, 2))
            return f"redirect to :{rule.value}", _immediate(struct.pack(">H", rule.value)) + redirect
        case Verb.SET_CONNECTION_MARK:
            store = expression("ct", attribute(2, _CT_MARK), attribute(4, 1))
            return (
                f"ct mark set ct mark & 0x{mask | mark:08x} | 0x{mark:08x}",
                load_mark + _bitwise(mask, mark) + store,
            )
        case Verb.RESTORE_MARK:
            return "meta mark set ct mark", load_mark + expression("meta", attribute(2, 3), attribute(3, 1))
        case Verb.ZONE:
            store = expression("ct", attribute(2, _CT_ZONE), attribute(4, 1))
            return f"ct zone set {rule.value}", _immediate(struct.pack("=H", rule.value)) + store
