# SPDX-License-Identifier: Apache-2.0
"""Tables of legacy xtables, as the kernel hands them out, as tags per chain. Pure.

A table holds its base chains, each from its hook entry to its underflow (the policy); then every chain that
a program made: an entry with an ERROR target that names it, its rules, a RETURN; and last an entry named ERROR.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from agent.backends.iptables.entries import XtEntry, blanked, broken, entries, offsets, without_counts
from agent.backends.iptables.rendering import CHAINS, XtTable
from agent.core.model.ownership import TAG

_HOOKS = ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")  # as linux/netfilter.h numbers them
_OURS = tuple(sorted(CHAINS.values()))
# What is of another form is not ours and must not get into a script: a pod may write any comment and any name.
_NAME = re.compile("[A-Za-z0-9_.][A-Za-z0-9_.-]*")
_INFO = struct.Struct("=32s11III")  # ipt_getinfo: name; valid hooks, hook entries, underflows; entries; size


@dataclass(frozen=True, slots=True, kw_only=True)
class LegacyTable:
    """A table and, parallel to its chains, a digest of what each rule does; and the bytes that say so."""

    table: XtTable
    digests: tuple[tuple[bytes, ...], ...]
    info: bytes
    layout: struct.Struct
    parts: tuple[bytes, ...]

    def holds(self, data: bytes) -> bool:
        """True if entries are still these but for their counters.

        Equal bytes have equal sizes in them, so their counters lie where ours do; and the comefrom of each shows
        from which hooks it is reached, so their ipt_getinfo is ours too.
        """
        return len(data) == self.layout.size and self.layout.unpack(data) == self.parts


def read_table(family: int, info: bytes, data: bytes) -> LegacyTable:
    """Reads one table of family 4 or 6 from its ipt_getinfo and its entries. Raises KernelError if they are invalid."""
    if len(info) != _INFO.size or len(data) != _INFO.unpack(info)[-1]:
        raise broken("lengths")
    return _read_entries(family, info, blanked(family, data, tuple(offsets(family, data))))


@lru_cache(maxsize=512)  # a node's pods have the same few tables
def _read_entries(family: int, info: bytes, data: bytes) -> LegacyTable:
    at = tuple(offsets(family, data))
    rules = tuple(entries(family, data, at))
    bases = _bases(info, rules)
    chains = {**_user_chains(rules), **bases}
    named = {chain: chains[chain] for chain in _OURS if chain in chains}
    taken = tuple(
        chain for chain, held in named.items() if not any(map(_tag, held)) and any(rule.jump for rule in held)
    )
    own = [(chain, held) for chain, held in named.items() if chain not in taken]
    tagged = tuple((chain, tuple(_tag(rule) for rule in held)) for chain, held in own)
    digests = tuple(tuple(rule.digest for rule in held) for _, held in own)
    layout = without_counts(family, len(data), at)
    table = XtTable(tagged, tuple(sorted(_jumps(chains))), bases=tuple(sorted(bases))).without(taken)
    return LegacyTable(table=table, digests=digests, info=info, layout=layout, parts=layout.unpack(data))


def _jumps(chains: Mapping[str, list[XtEntry]]) -> Iterator[tuple[str, str, str]]:
    for chain, held in chains.items():
        if chain in _OURS or not _NAME.fullmatch(chain):
            continue
        for rule in held:
            # With a match or a foreign comment it is foreign, and not ours to take out.
            if rule.jump in _OURS and rule.plain and (rule.comment is None or _tag(rule)):
                yield chain, rule.jump, _tag(rule)


def _bases(info: bytes, rules: tuple[XtEntry, ...]) -> Mapping[str, list[XtEntry]]:
    _, valid, *offsets = _INFO.unpack(info)
    return {
        hook: [rule for rule in rules if offsets[number] <= rule.offset < offsets[number + 5]]
        for number, hook in enumerate(_HOOKS)
        if valid & 1 << number
    }


def _user_chains(rules: tuple[XtEntry, ...]) -> Mapping[str, list[XtEntry]]:
    chains: dict[str, list[XtEntry]] = {}
    held: list[XtEntry] = []
    for rule in rules:
        if rule.head is None:
            held.append(rule)
        else:
            held = chains[rule.head] = []  # also one named ERROR at the end, which stays empty
    return {chain: list(_without_foot(held)) for chain, held in chains.items()}


def _without_foot(rules: list[XtEntry]) -> Iterator[XtEntry]:
    """Leaves out the RETURN at a chain's end, which iptables does not show. Anything else there is a rule."""
    for number, rule in enumerate(rules, 1):
        if number < len(rules) or not (rule.returns and rule.plain and rule.comment is None):
            yield rule


def _tag(rule: XtEntry) -> str:
    return rule.comment if rule.comment and TAG.fullmatch(rule.comment) else ""
