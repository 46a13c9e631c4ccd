"""nf_tables dumps as the state that is compared. Pure: messages in, tables out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from agent.backends.nfmessages import comment, text
from agent.backends.nftables.ruleset import Chain, TableState, digest, without_counts
from agent.core.names import TAG_PREFIX
from agent.core.netlink import Message, attributes


@dataclass(frozen=True, slots=True)
class Have:
    """What of ours is in one namespace. `port` is our socket's, to know tables that we own."""

    tables: tuple[TableState, ...]
    generation: int
    port: int


def tables(
    table_dump: Sequence[Message], chain_dump: Iterable[Message], rule_dump: Iterable[Message]
) -> tuple[TableState, ...]:
    """Tables with their chains and rules, by name; chains and rules of other tables are left out."""
    heads = [dict(attributes(message.body[4:])) for message in table_dump]
    ours = {text(head.get(1)) for head in heads}
    rules: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for message in rule_dump:
        table, chain, tag, what = _rule(without_counts(message.body))
        if table in ours:
            rules.setdefault((table, chain), []).append((tag, what))
    chains: dict[str, list[Chain]] = {}
    for message in chain_dump:
        table, bare = _chain(message.body)
        chains.setdefault(table, []).append(replace(bare, rules=tuple(rules.get((table, bare.name), ()))))
    found = []
    for head in heads:
        name = text(head.get(1))
        flags, owner = int.from_bytes(head.get(2, b"")), int.from_bytes(head.get(7, b""))
        mine = sorted(chains.get(name, ()), key=lambda chain: chain.name)
        found.append(TableState(name, tuple(mine), flags, owner))
    return tuple(sorted(found, key=lambda table: table.name))


# A node's pods have the same few dozen rules and chains, under the same handles, and each is read again and
# again: what a message says is worked out once.
@lru_cache(maxsize=1024)
def _rule(body: bytes) -> tuple[str, str, str, str]:
    """(table, chain, our tag or "", digest) of a rule message whose counters are blanked."""
    parts = dict(attributes(body[4:]))
    tag = comment(parts.get(7, b""))
    return text(parts.get(1)), text(parts.get(2)), tag if tag.startswith(TAG_PREFIX) else "", digest(parts.get(4, b""))


@lru_cache(maxsize=1024)
def _chain(body: bytes) -> tuple[str, Chain]:
    """(table, chain without its rules) of a chain message."""
    parts = dict(attributes(body[4:]))
    table, name = text(parts.get(1)), text(parts.get(3))
    if 4 not in parts:
        return table, Chain(name, ())
    hook = dict(attributes(parts[4]))
    number, priority = int.from_bytes(hook.get(1, b"")), int.from_bytes(hook.get(2, b""), signed=True)
    accepts = int.from_bytes(parts.get(5, b"")) == 1
    return table, Chain(name, (), text(parts.get(7)), number, priority, accepts)
