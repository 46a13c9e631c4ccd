# SPDX-License-Identifier: Apache-2.0
"""nf_tables dumps of the ip and ip6 tables that iptables-nft writes, as tags per chain. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from agent.backends.iptables.rendering import CHAINS, ORDER, XtTable
from agent.backends.netfilter.message_parts import comment, expressions, rule_comment, text
from agent.core.model.ownership import TAG
from agent.core.wire import nftables as wire
from agent.core.wire.netlink import Message, attributes, unpack_be

TABLES = tuple(table.value for table in ORDER)
MARK = "sluice"  # comment of tables and base chains that we made; those go again once they are empty
_OURS = tuple(CHAINS.values())
_CHAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,28}")  # names that are written into scripts again


@dataclass(frozen=True, slots=True)
class XtState:
    """Per family (4, 6) the tables that are there, and the generation they were read in (None: it changed meanwhile).

    Without `whole` there may be chains in them that were not read.
    """

    families: dict[int, dict[str, XtTable]]
    generation: int | None
    whole: bool = True


def family_tables(
    table_dump: Iterable[Message], chain_dump: Iterable[Message], rule_dump: Iterable[Message]
) -> dict[str, XtTable]:
    """Returns the tables of one family that iptables uses; others do not appear."""
    rules: dict[tuple[str, str], list[dict[int, bytes]]] = {}
    for message in rule_dump:
        parts = wire.fields(message.body)
        rules.setdefault((text(parts.get(wire.Rule.TABLE)), text(parts.get(wire.Rule.CHAIN))), []).append(parts)
    chains: dict[str, dict[str, dict[int, bytes]]] = {}
    for message in chain_dump:
        parts = wire.fields(message.body)
        chains.setdefault(text(parts.get(wire.Chain.TABLE)), {})[text(parts.get(wire.Chain.NAME))] = parts
    tables = {}
    for message in table_dump:
        parts = wire.fields(message.body)
        name = text(parts.get(wire.Table.NAME))
        if name in TABLES:
            mine = {chain: rules.get((name, chain), []) for chain in chains.get(name, {})}
            idle = tuple(
                sorted(
                    chain
                    for chain, attributes_of in chains.get(name, {}).items()
                    if comment(attributes_of.get(wire.Chain.USERDATA, b"")) == MARK and not mine[chain]
                )
            )
            bases = tuple(
                sorted(
                    chain for chain, attributes_of in chains.get(name, {}).items() if wire.Chain.HOOK in attributes_of
                )
            )
            tables[name] = replace(
                _table(mine),
                bases=bases,
                idle=idle,
                marked=comment(parts.get(wire.Table.USERDATA, b"")) == MARK,
                bare=len(idle) == len(mine),
            )
    return tables


def _table(chains: dict[str, list[dict[int, bytes]]]) -> XtTable:
    own = [(chain, tuple(_tag(rule) for rule in rules)) for chain, rules in sorted(chains.items()) if chain in _OURS]
    jumps = [
        (chain, target, _tag(rule))
        for chain, rules in chains.items()
        if chain not in _OURS and _CHAIN.fullmatch(chain)
        for rule in rules
        if (target := _jump_target(rule)) in _OURS
    ]
    taken = (name for name, held in own if not any(held) and any(_leads_on(rule) for rule in chains[name]))
    return XtTable(tuple(own), tuple(sorted(jumps))).without(tuple(taken))


def _leads_on(rule: dict[int, bytes]) -> bool:
    """True if a rule goes on in another chain."""
    verdicts = (_verdict(data) for name, data in expressions(rule) if name == "immediate")
    return any(wire.Verdict.CHAIN in verdict for verdict in verdicts)


def _verdict(immediate: dict[int, bytes]) -> dict[int, bytes]:
    held = dict(attributes(immediate.get(wire.Immediate.DATA, b"")))
    return dict(attributes(held.get(wire.Data.VERDICT, b"")))


def _tag(rule: dict[int, bytes]) -> str:
    text = rule_comment(rule)
    return text if TAG.fullmatch(text) else ""  # exactly: tags of jumps are written into scripts again


def _jump_target(rule: dict[int, bytes]) -> str:
    """Returns the target of a rule that does nothing but jump; with another match it is foreign and stays."""
    target = ""
    for name, data in expressions(rule):
        if name == "match" and text(data.get(wire.XtMatch.NAME)) == "comment":
            continue
        if name == "immediate":
            verdict = _verdict(data)
            jumps = unpack_be(verdict.get(wire.Verdict.CODE)) == wire.VerdictCode.JUMP.unsigned
            target = text(verdict.get(wire.Verdict.CHAIN)) if jumps else ""
        elif name != "counter":
            return ""
    return target
