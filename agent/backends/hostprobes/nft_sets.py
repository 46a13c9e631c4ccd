# SPDX-License-Identifier: Apache-2.0
"""Sets of addresses in nf_tables: the commands that make and change them, and dumps of them. Pure.

A set's element keeps the comment it was first given when it is added again (seen with nft 1.0.6 on 6.18): another
owner means deletion and addition in one transaction.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice

from agent.backends.hostprobes.want import SETS
from agent.backends.netfilter.message_parts import comment, comment_data, text
from agent.core.wire import nftables as wire
from agent.core.wire.netlink import NLM_F_CREATE, Message, attribute, attributes, nested, unpack_be
from agent.core.wire.nftables import DELSETELEM, NEWSET, NEWSETELEM, NFPROTO_INET, Command

TYPE = {4: (7, 4, "ipv4_addr"), 6: (8, 16, "ipv6_addr")}  # nft's datatype number, length of a key, nft's name
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
    body = attribute(wire.Set.TABLE, table) + attribute(wire.Set.NAME, SETS[family]) + attribute(wire.Set.FLAGS, 0)
    body += attribute(wire.Set.KEY_TYPE, kind) + attribute(wire.Set.KEY_LEN, length)
    body += attribute(wire.Set.ID, family)  # the kernel wants an id that distinguishes the sets of one batch
    return Command(NEWSET, NLM_F_CREATE, NFPROTO_INET, body)


def declaration(family: int, members: Mapping[str, str]) -> Iterator[str]:
    """Yields the set as nft lists it, indented for a table; long lists are one line here."""
    yield f"\tset {SETS[family]} {{"
    yield f"\t\ttype {TYPE[family][2]}"
    if members:
        yield f"\t\telements = {{ {', '.join(element(*one) for one in members.items())} }}"
    yield "\t}"


def element(address: str, uid: str) -> str:
    return f'{address} comment "{uid}"' if uid else address


def added(table: str, name: str, members: Mapping[str, str]) -> Iterator[Command]:
    items = (
        # User data of an element is laid out as that of a rule.
        nested(wire.LIST_ELEM, _key(address), attribute(wire.SetElem.USERDATA, comment_data(uid)) if uid else b"")
        for address, uid in members.items()
    )
    return _commands(NEWSETELEM, NLM_F_CREATE, table, name, items)


def removed(table: str, name: str, addresses: Iterable[str]) -> Iterator[Command]:
    return _commands(DELSETELEM, 0, table, name, (nested(wire.LIST_ELEM, _key(address)) for address in addresses))


def _key(address: str) -> bytes:
    return nested(wire.SetElem.KEY, attribute(wire.Data.VALUE, ipaddress.ip_address(address).packed))


def _commands(kind: int, flags: int, table: str, name: str, elements: Iterable[bytes]) -> Iterator[Command]:
    head = attribute(wire.SetElemList.TABLE, table) + attribute(wire.SetElemList.SET, name)
    rest = iter(elements)
    while some := tuple(islice(rest, _PER_MESSAGE)):
        yield Command(kind, flags, NFPROTO_INET, head + nested(wire.SetElemList.ELEMENTS, *some))


def states(set_dump: Iterable[Message], element_dumps: Iterable[Message]) -> tuple[SetState, ...]:
    """Sets of one table by name, each with its members."""
    members: dict[str, dict[str, str]] = {}
    for message in element_dumps:
        parts = wire.fields(message.body)
        held = members.setdefault(text(parts.get(wire.SetElemList.SET)), {})
        held.update(_member(item) for _, item in attributes(parts.get(wire.SetElemList.ELEMENTS, b"")))
    states = []
    for message in set_dump:
        parts = wire.fields(message.body)
        name = text(parts.get(wire.Set.NAME))
        key = (unpack_be(parts.get(wire.Set.KEY_TYPE)), unpack_be(parts.get(wire.Set.KEY_LEN)))
        held = {address: uid for address, uid in members.get(name, {}).items() if address}
        states.append(SetState(name, key, unpack_be(parts.get(wire.Set.FLAGS)), held))
    return tuple(sorted(states, key=lambda state: state.name))


# The same entries are read again and again: what one says is worked out once.
@lru_cache(maxsize=4096)
def _member(item: bytes) -> tuple[str, str]:
    parts = dict(attributes(item))
    raw = dict(attributes(parts.get(wire.SetElem.KEY, b""))).get(wire.Data.VALUE, b"")
    return str(ipaddress.ip_address(raw)) if len(raw) in (4, 16) else "", comment(parts.get(wire.SetElem.USERDATA, b""))
