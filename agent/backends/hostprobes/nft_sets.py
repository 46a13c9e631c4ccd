"""Sets of addresses in nf_tables: the commands that make and change them, and dumps of them. Pure.

A set's element keeps the comment it was first given, whoever adds it again (seen with nft 1.0.6 on 6.18): another
owner means deletion and addition in one transaction.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice

from agent.backends.hostprobes.want import SETS
from agent.backends.netfilter.messages import comment, comment_data, text
from agent.core.wire.netlink import NLM_F_CREATE, Message, attribute, attributes, nested
from agent.core.wire.nftables import NFPROTO_INET, Command

_SUBSYSTEM = 10 << 8
NEWSET, GETSET, NEWSETELEM, GETSETELEM, DELSETELEM = (_SUBSYSTEM | number for number in (9, 10, 12, 13, 14))
TYPE = {4: (7, 4, "ipv4_addr"), 6: (8, 16, "ipv6_addr")}  # nft's datatype number, length of a key, nft's name
FAMILY = {name: family for family, name in SETS.items()}
_PER_MESSAGE = 200  # elements; an attribute holds 64 kB, and an element with its comment may take 200 bytes


@dataclass(frozen=True, slots=True)
class SetState:
    """One set: `key` is (datatype, length), `flags` NFT_SET_*; `members` address -> comment, "" without one."""

    name: str
    key: tuple[int, int]
    flags: int = 0
    members: Mapping[str, str] = field(default_factory=dict, compare=False)


def wanted(family: int) -> SetState:
    return SetState(SETS[family], TYPE[family][:2])


def create(table: str, family: int) -> Command:
    kind, length, _ = TYPE[family]
    body = attribute(1, table) + attribute(2, SETS[family]) + attribute(3, 0) + attribute(4, kind)
    # The kernel wants an id (10) that tells sets of one batch apart.
    return Command(NEWSET, NLM_F_CREATE, NFPROTO_INET, body + attribute(5, length) + attribute(10, family))


def declaration(family: int, members: Mapping[str, str]) -> Iterator[str]:
    """As nft lists it, indented for a table; long lists are one line here."""
    yield f"\tset {SETS[family]} {{"
    yield f"\t\ttype {TYPE[family][2]}"
    if members:
        yield f"\t\telements = {{ {', '.join(element(*one) for one in members.items())} }}"
    yield "\t}"


def element(address: str, uid: str) -> str:
    return f'{address} comment "{uid}"' if uid else address


def added(table: str, name: str, members: Mapping[str, str]) -> Iterator[Command]:
    # NFTA_SET_ELEM_KEY 1 and _USERDATA 6, which is laid out as that of a rule.
    marked = {address: attribute(6, comment_data(uid)) if uid else b"" for address, uid in members.items()}
    items = (nested(1, _key(address), mark) for address, mark in marked.items())
    return _commands(NEWSETELEM, NLM_F_CREATE, table, name, items)


def removed(table: str, name: str, addresses: Iterable[str]) -> Iterator[Command]:
    return _commands(DELSETELEM, 0, table, name, (nested(1, _key(address)) for address in addresses))


def _key(address: str) -> bytes:
    return nested(1, attribute(1, ipaddress.ip_address(address).packed))


def _commands(kind: int, flags: int, table: str, name: str, elements: Iterable[bytes]) -> Iterator[Command]:
    head = attribute(1, table) + attribute(2, name)
    rest = iter(elements)
    while some := tuple(islice(rest, _PER_MESSAGE)):
        yield Command(kind, flags, NFPROTO_INET, head + nested(3, *some))


def states(set_dump: Iterable[Message], element_dumps: Iterable[Message]) -> tuple[SetState, ...]:
    """Sets of one table by name, each with its members."""
    members: dict[str, dict[str, str]] = {}
    for message in element_dumps:
        parts = dict(attributes(message.body[4:]))
        held = members.setdefault(text(parts.get(2)), {})
        held.update(_member(item) for _, item in attributes(parts.get(3, b"")))
    found = []
    for message in set_dump:
        parts = dict(attributes(message.body[4:]))
        name = text(parts.get(2))
        key = (int.from_bytes(parts.get(4, b"")), int.from_bytes(parts.get(5, b"")))
        held = {address: uid for address, uid in members.get(name, {}).items() if address}
        found.append(SetState(name, key, int.from_bytes(parts.get(3, b"")), held))
    return tuple(sorted(found, key=lambda state: state.name))


# The same entries are read again and again: what one says is worked out once.
@lru_cache(maxsize=4096)
def _member(item: bytes) -> tuple[str, str]:
    parts = dict(attributes(item))
    raw = dict(attributes(parts.get(1, b""))).get(1, b"")
    return str(ipaddress.ip_address(raw)) if len(raw) in (4, 16) else "", comment(parts.get(6, b""))
