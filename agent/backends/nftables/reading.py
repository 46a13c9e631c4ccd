# SPDX-License-Identifier: Apache-2.0
"""nf_tables dumps as the state that is compared. Pure: a rule set in, tables out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from agent.backends.netfilter.dumps import ChainRef, Content, Ruleset
from agent.backends.netfilter.message_parts import chain_head, comment, text
from agent.backends.netfilter.rules import Hook
from agent.backends.nftables.rendering import CHAINS, TABLES
from agent.backends.nftables.ruleset import Chain, TableState, digest
from agent.core.names import TAG_PREFIX
from agent.core.wire import nftables as wire
from agent.core.wire.netlink import Message
from agent.core.wire.nftables import NFPROTO_INET

PLACES = tuple(
    ChainRef(NFPROTO_INET, table, chain) for table in TABLES for hook in Hook for chain in (CHAINS[hook], hook.value)
)


@dataclass(frozen=True, slots=True)
class NftState:
    """Sluice's state in one namespace; `remarks` are on rules of others that come before it.

    `generation` None: it changed while it was read.
    """

    tables: tuple[TableState, ...]
    generation: int | None
    remarks: tuple[str, ...] = ()


def table_states(ruleset: Ruleset) -> tuple[TableState, ...]:
    """Returns Sluice's tables in a pod with their chains and rules, by name."""
    chains = _own_chains(ruleset.content)
    states = (
        TableState(head.name, chains.get(head.name, ()), head.flags, head.owner)
        for head in ruleset.tables
        if head.family == NFPROTO_INET and head.name in TABLES
    )
    return tuple(sorted(states, key=lambda table: table.name))


@lru_cache(maxsize=64)
def _own_chains(content: Content) -> dict[str, tuple[Chain, ...]]:
    inet = ([m for m in part if m.body[0] == NFPROTO_INET] for part in (content.chains, content.rules))
    return _chains(*inet)


def _chains(chain_dump: Iterable[Message], rule_dump: Iterable[Message]) -> dict[str, tuple[Chain, ...]]:
    """Returns the chains of each table by name, from messages of one family with blanked counters."""
    rules: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for message in rule_dump:
        table, chain, tag, what = _rule(message.body)
        rules.setdefault((table, chain), []).append((tag, what))
    chains: dict[str, list[Chain]] = {}
    for message in chain_dump:
        one = chain_head(message.body)
        held = tuple(rules.get((one.table, one.name), ()))
        chains.setdefault(one.table, []).append(
            Chain(one.name, held, kind=one.kind, hook=one.hook, priority=one.priority, accepts=one.accepts)
        )
    return {table: tuple(sorted(unsorted, key=lambda chain: chain.name)) for table, unsorted in chains.items()}


# Namespaces that differ in rules of others have ours in common: what a message says is worked out once.
@lru_cache(maxsize=1024)
def _rule(body: bytes) -> tuple[str, str, str, str]:
    """Returns (table, chain, our tag or "", digest) of a rule message with blanked counters."""
    parts = wire.fields(body)
    tag = comment(parts.get(wire.Rule.USERDATA, b""))
    table, chain = text(parts.get(wire.Rule.TABLE)), text(parts.get(wire.Rule.CHAIN))
    return table, chain, tag if tag.startswith(TAG_PREFIX) else "", digest(parts.get(wire.Rule.EXPRESSIONS, b""))
