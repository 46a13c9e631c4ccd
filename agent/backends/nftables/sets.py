# SPDX-License-Identifier: Apache-2.0
"""Anonymous sets: what a rule compares a field with when any of several values may match. Pure.

They belong to their rule and are constant: the elements cannot change unless the rule is replaced, so the
rule's tag covers them too and they need not be read back.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from agent.backends.netfilter.rules import Field
from agent.core.wire import nftables as wire
from agent.core.wire.netlink import NLM_F_CREATE, attribute, nested
from agent.core.wire.nftables import NEWSET, NEWSETELEM, NFPROTO_INET, Command, SetFlag

_FLAGS = SetFlag.ANONYMOUS | SetFlag.CONSTANT | SetFlag.INTERVAL
# nft's own numbers of data types, used only for printing: ipv4_addr, ipv6_addr, inet_service, uid.
_IPV4, _IPV6, _SERVICE, _UID = 7, 8, 13, 24
_END = attribute(wire.SetElem.FLAGS, wire.SET_ELEM_INTERVAL_END)
_BIG_ENDIAN = bytes([0, 4, 2, 0, 0, 0])  # NFTNL_UDATA_SET_KEYBYTEORDER


@dataclass(frozen=True, slots=True, kw_only=True)
class AnonymousSet:
    """`intervals` are (first, last) as numbers of `length` bytes; `number` ties it to its rule in one batch."""

    number: int
    kind: int
    length: int
    intervals: tuple[tuple[int, int], ...]
    text: str
    name = "__set%d"  # the kernel fills in the number

    def commands(self, table: str) -> Iterator[Command]:
        """Creates and fills the set; to stand before its rule in the batch."""
        size = sum(1 for _ in self._edges())
        yield Command(
            NEWSET,
            NLM_F_CREATE,
            NFPROTO_INET,
            attribute(wire.Set.TABLE, table)
            + attribute(wire.Set.NAME, self.name)
            + attribute(wire.Set.FLAGS, _FLAGS)
            + attribute(wire.Set.KEY_TYPE, self.kind)
            + attribute(wire.Set.KEY_LEN, self.length)
            + nested(wire.Set.DESC, attribute(wire.SetDesc.SIZE, size))
            + attribute(wire.Set.ID, self.number)
            + attribute(wire.Set.USERDATA, _BIG_ENDIAN),
        )
        elements = [nested(wire.LIST_ELEM, *edge) for edge in self._edges()]
        body = attribute(wire.SetElemList.TABLE, table) + attribute(wire.SetElemList.SET, self.name)
        body += attribute(wire.SetElemList.SET_ID, self.number) + nested(wire.SetElemList.ELEMENTS, *elements)
        yield Command(NEWSETELEM, NLM_F_CREATE, NFPROTO_INET, body)

    def _edges(self) -> Iterator[tuple[bytes, ...]]:
        """Yields per interval its first key, and an end just behind its last one unless nothing is behind it."""
        if self.intervals[0][0] > 0:
            yield self._key(0), _END
        for first, last in self.intervals:
            yield (self._key(first),)
            if last + 1 < 1 << 8 * self.length:
                yield self._key(last + 1), _END

    def _key(self, value: int) -> bytes:
        return nested(wire.SetElem.KEY, attribute(wire.Data.VALUE, value.to_bytes(self.length)))


def anonymous(field: Field, values: tuple[Any, ...], number: int) -> AnonymousSet:
    """Makes a set of a match's values: ranges, sorted and apart, or networks of one family."""
    match field:
        case Field.SOURCE | Field.DESTINATION:
            networks: list[Any] = sorted(ipaddress.ip_network(value) for value in values)
            kind, length = (_IPV4, 4) if networks[0].version == 4 else (_IPV6, 16)
            intervals = tuple((int(n.network_address), int(n.broadcast_address)) for n in networks)
            texts = [str(n.network_address) if n.num_addresses == 1 else str(n) for n in networks]
        case Field.SOURCE_PORT | Field.DESTINATION_PORT | Field.USER:
            kind, length = (_UID, 4) if field is Field.USER else (_SERVICE, 2)
            intervals = values
            texts = [str(first) if first == last else f"{first}-{last}" for first, last in values]
        case _:
            raise ValueError(f"{field} takes one value")
    return AnonymousSet(
        number=number, kind=kind, length=length, intervals=intervals, text="{ " + ", ".join(texts) + " }"
    )
