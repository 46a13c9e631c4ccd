"""nf_tables dumps as the state that is compared. Pure: messages in, tables out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from agent.backends.nfmessages import comment, text
from agent.backends.nftables.ruleset import Chain, TableState, digest
from agent.core.names import TAG_PREFIX
from agent.core.netlink import Message, attributes


@dataclass(frozen=True, slots=True)
class Have:
    """What of ours is in one namespace. `port` is our socket's, to know tables that we own."""

    tables: tuple[TableState, ...]
    generation: int
    port: int


def tables(
    table_dump: Iterable[Message], chain_dump: Iterable[Message], rule_dump: Iterable[Message]
) -> tuple[TableState, ...]:
    """Tables with their chains and rules, by name; chains and rules of other tables are left out."""
    rules: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for message in rule_dump:
        parts = dict(attributes(message.body[4:]))
        tag = comment(parts.get(7, b""))
        entry = (tag if tag.startswith(TAG_PREFIX) else "", digest(parts.get(4, b"")))
        rules.setdefault((text(parts.get(1)), text(parts.get(2))), []).append(entry)
    chains: dict[str, list[Chain]] = {}
    for message in chain_dump:
        parts = dict(attributes(message.body[4:]))
        table, name = text(parts.get(1)), text(parts.get(3))
        chains.setdefault(table, []).append(_chain(name, parts, tuple(rules.get((table, name), ()))))
    found = []
    for message in table_dump:
        parts = dict(attributes(message.body[4:]))
        name = text(parts.get(1))
        flags, owner = int.from_bytes(parts.get(2, b"")), int.from_bytes(parts.get(7, b""))
        mine = sorted(chains.get(name, ()), key=lambda chain: chain.name)
        found.append(TableState(name, tuple(mine), flags, owner))
    return tuple(sorted(found, key=lambda table: table.name))


def _chain(name: str, parts: dict[int, bytes], rules: tuple[tuple[str, str], ...]) -> Chain:
    if 4 not in parts:
        return Chain(name, rules)
    hook = dict(attributes(parts[4]))
    number, priority = int.from_bytes(hook.get(1, b"")), int.from_bytes(hook.get(2, b""), signed=True)
    return Chain(name, rules, text(parts.get(7)), number, priority, int.from_bytes(parts.get(5, b"")) == 1)
