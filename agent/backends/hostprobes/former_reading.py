# SPDX-License-Identifier: Apache-2.0
"""The former exemption in the host's nat tables, from nf_tables messages and from entries of legacy xtables. Pure."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Final

from agent.backends.iptables.entries import XtEntry, entries, offsets
from agent.backends.iptables.reading import MARK
from agent.backends.netfilter.message_parts import comment, expressions, rule_comment, text
from agent.core.model.ownership import TAG
from agent.core.wire import nftables as wire
from agent.core.wire.netlink import Message, attributes, unpack_be

CHAIN: Final = "ISTIO_POSTRT"
BASE: Final = "POSTROUTING"
TABLE: Final = "nat"
_INFO = struct.Struct("=32sI5I5III")  # ipt_getinfo: name; valid hooks, hook entries, underflows; entries; size
_POSTROUTING = 4


@dataclass(frozen=True, slots=True)
class Held:
    """State of one family's nat table: `chain` has the tags of our chain's rules, None without a chain.

    `jumps` are the tags of the jumps to it. `idle`: we made POSTROUTING and nothing is in it. `bare`: we made the
    table, and nothing but an idle POSTROUTING is in it.
    """

    chain: tuple[str, ...] | None = None
    jumps: tuple[str, ...] = ()
    idle: bool = False
    bare: bool = False

    @property
    def ours(self) -> bool:
        return self.chain is not None or bool(self.jumps)


def nft_held(
    table: Mapping[int, bytes], base: Mapping[int, bytes] | None, chain: bool, rules: Iterable[Message]
) -> Held:
    """Takes `table` and `base`: the attributes of nat and its POSTROUTING. `rules` may be those of other chains too."""
    held: dict[str, list[tuple[str, str]]] = {BASE: [], CHAIN: []}
    for message in rules:
        parts = wire.fields(message.body)
        if text(parts.get(wire.Rule.TABLE)) == TABLE and text(parts.get(wire.Rule.CHAIN)) in held:
            held[text(parts.get(wire.Rule.CHAIN))].append((_nft_jump(parts), _tag(rule_comment(parts))))
    idle = base is not None and comment(base.get(wire.Chain.USERDATA, b"")) == MARK and not held[BASE]
    alone = unpack_be(table.get(wire.Table.USE)) == (base is not None)  # counts chains
    bare = comment(table.get(wire.Table.USERDATA, b"")) == MARK and alone and (base is None or idle)
    tags = tuple(tag for _, tag in held[CHAIN])
    return Held(tags if chain else None, _jumps(held[BASE]), idle, bare)


def legacy_held(family: int, info: bytes, data: bytes) -> Held:
    """Reads ipt_getinfo and the entries of nat. Raises KernelError when they do not add up."""
    rules = tuple(entries(family, data, tuple(offsets(family, data))))
    _, _, *positions = _INFO.unpack(info)
    begin, end = positions[_POSTROUTING], positions[_POSTROUTING + 5]
    base = [(rule.jump or "", _tag(rule.comment)) for rule in rules if begin <= rule.offset < end]
    return Held(_own_chain(rules), _jumps(base))


def _jumps(rules: list[tuple[str, str]]) -> tuple[str, ...]:
    return tuple(tag for target, tag in rules if target == CHAIN)


def _own_chain(rules: tuple[XtEntry, ...]) -> tuple[str, ...] | None:
    """Tags of our chain: what lies between its head and the next one, but for the RETURN at its end."""
    heads = [number for number, rule in enumerate(rules) if rule.head == CHAIN]
    if not heads:
        return None
    held = list(takewhile(lambda rule: rule.head is None, rules[heads[0] + 1 :]))
    foot = bool(held) and held[-1].returns and held[-1].plain and held[-1].comment is None
    return tuple(_tag(rule.comment) for rule in (held[:-1] if foot else held))


def _nft_jump(rule: Mapping[int, bytes]) -> str:
    for name, data in expressions(rule):
        if name == "immediate":
            for _, verdict in attributes(data.get(wire.Immediate.DATA, b"")):
                return text(dict(attributes(verdict)).get(wire.Verdict.CHAIN))
    return ""


def _tag(comment: str | None) -> str:
    """Returns the tag; "" for text of another form, which is not ours and must not get into a script."""
    return comment if comment and TAG.fullmatch(comment) else ""
