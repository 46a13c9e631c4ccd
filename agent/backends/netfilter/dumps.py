# SPDX-License-Identifier: Apache-2.0
"""Dumps of all that nf_tables holds in a namespace, taken apart once for all namespaces that hold the same. Pure.

The pods of a node have the same few sets of rules, and each is read again and again. Dumps of equal rules differ in
places that follow from their sizes: sequence, port and generation of each message, and the values of counters. With
those left out, a dump is known or unknown by one comparison of bytes.
"""

from __future__ import annotations

import re
import struct
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from agent.backends.netfilter.message_parts import comment, text
from agent.core.wire import nftables as wire
from agent.core.wire.netlink import HEADER, Message, messages, unpack_be
from agent.core.wire.nftables import NEWCHAIN, NEWTABLE

_KEPT = 64  # sizes of dumps, and bytes of one; larger ones are taken apart each time
_LARGEST = 1 << 16
# A counter as the kernel dumps it: its name, then two attributes of eight bytes.
_COUNTS = re.compile(rb"counter\0[\x1c\x00]{2}\x02[\x00\x80]\x0c\x00\x01\x00(.{8})\x0c\x00\x02\x00(.{8})", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ChainRef:
    """A chain that a backend needs. `shared`: it may hold rules of others, which stay."""

    family: int
    table: str
    chain: str
    shared: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """One table. `handle` grows with each table made in the namespace; `owner` is a netlink port, 0 for none."""

    family: int
    name: str
    flags: int
    handle: int
    owner: int
    comment: str

    @property
    def dormant(self) -> bool:
        return bool(self.flags & wire.TableFlag.DORMANT)


@dataclass(frozen=True, eq=False, slots=True)
class Content:
    """Chains and rules of all tables, counters at zero. Equal ones are mostly the same object, and hash as such."""

    chains: tuple[Message, ...]
    rules: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Ruleset:
    """The tables, chains and rules of one namespace; if not `whole`, only our own."""

    tables: tuple[Head, ...]
    content: Content
    whole: bool = True

    def lasts(self, port: int) -> bool:
        """True if nothing of it can change without a new generation.

        When an owner's socket closes, its tables go or lose their owner, and the generation stays (nft_rcv_nl_event).
        Ours close after everything that is known through them is forgotten; others close without notice.
        """
        return self.whole and all(head.owner in (0, port) for head in self.tables)


@dataclass(frozen=True, slots=True)
class _Known:
    layout: struct.Struct
    parts: tuple[bytes, ...]
    content: Content


_known: OrderedDict[tuple[int, int], tuple[_Known, ...]] = OrderedDict()


def ruleset(tables: bytes, chains: bytes, rules: bytes, *, whole: bool = True) -> Ruleset:
    """Parses the dumps of GETTABLE, GETCHAIN and GETRULE, over all families."""
    return Ruleset(tuple(_head(message.body) for message in _messages(tables)), _content(chains, rules), whole)


def uses(dump: bytes) -> int:
    """Returns how many chains and sets a dump's tables hold, or how many rules its chains: an upper bound."""
    kind = {NEWTABLE: wire.Table.USE, NEWCHAIN: wire.Chain.USE}
    return sum(unpack_be(wire.fields(one.body).get(kind.get(one.kind, 0))) for one in _messages(dump))


def _content(chains: bytes, rules: bytes) -> Content:
    sizes = (len(chains), len(rules))
    data = chains + rules
    held = _known.get(sizes, ())
    for known in held:
        if known.layout.unpack(data) == known.parts:
            if known is not held[0]:  # what is met often comes first, and stays
                _known[sizes] = (known, *(one for one in held if one is not known))
            return known.content
    spans = [*_spans(data)]
    blank = bytearray(data)
    for begin, end in spans:
        blank[begin:end] = bytes(end - begin)
    content = Content(*(_messages(bytes(part)) for part in (blank[: sizes[0]], blank[sizes[0] :])))
    if len(data) <= _LARGEST:
        layout = _layout(len(data), spans)
        _known[sizes] = (_Known(layout, layout.unpack(data), content), *_known.pop(sizes, ())[:3])
        if len(_known) > _KEPT:
            _known.popitem(last=False)
    return content


def _messages(dump: bytes) -> tuple[Message, ...]:
    return tuple(message for message in messages(dump) if len(message.body) >= 4)  # nfgenmsg


def _spans(data: bytes) -> Iterator[tuple[int, int]]:
    """Yields the spans that differ between dumps of equal rules, in order and apart."""
    at = 0
    while at + HEADER.size + 4 <= len(data):
        yield at + 8, at + 16  # sequence and port
        yield at + 18, at + 20  # of nfgenmsg: the low half of the generation
        end = min(len(data), at + max(HEADER.size + 4, HEADER.unpack_from(data, at)[0]))
        for match in _COUNTS.finditer(data, at + HEADER.size + 4, end):
            yield match.span(1)
            yield match.span(2)
        at = (end + 3) & ~3


def _layout(size: int, spans: list[tuple[int, int]]) -> struct.Struct:
    form = ["="]
    at = 0
    for begin, end in spans:
        form.append(f"{begin - at}s{end - begin}x")
        at = end
    return struct.Struct("".join((*form, f"{size - at}s")))


def _head(body: bytes) -> Head:
    parts = wire.fields(body)
    return Head(
        family=body[0],
        name=text(parts.get(wire.Table.NAME)),
        flags=unpack_be(parts.get(wire.Table.FLAGS)),
        handle=unpack_be(parts.get(wire.Table.HANDLE)),
        owner=unpack_be(parts.get(wire.Table.OWNER)),
        comment=comment(parts.get(wire.Table.USERDATA, b"")),
    )
