# SPDX-License-Identifier: Apache-2.0
"""A Redirect as nf_tables: the printed script, the batch of messages, and the state to compare with. Pure.

All three come from one walk over the rules, once per variant.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count

from agent.backends import istio_form
from agent.backends.netfilter import rules as netfilter
from agent.backends.netfilter.message_parts import HOOK_NUMBER, base_chain, comment_data
from agent.backends.netfilter.rules import Hook, Table
from agent.backends.nftables import expressions
from agent.backends.nftables.ruleset import Chain, TableState, digest
from agent.backends.nftables.sets import AnonymousSet
from agent.core import names
from agent.core.model.ownership import tag_chain
from agent.core.model.redirect import Redirect
from agent.core.wire import nftables as wire
from agent.core.wire.netlink import NLM_F_APPEND, NLM_F_CREATE, attribute, nested
from agent.core.wire.nftables import (
    DELTABLE,
    NEWCHAIN,
    NEWRULE,
    NEWTABLE,
    NFPROTO_INET,
    Command,
    TableFlag,
    VerdictCode,
)

OWNED = TableFlag.OWNER | TableFlag.PERSIST
CHAINS = {Hook.PREROUTING: names.NFT_PREROUTING, Hook.OUTPUT: names.NFT_OUTPUT}
# Priorities as nft 1.0.6 lists them, where it has a name for them on that hook.
_PRINTED = {("prerouting", -100): "dstnat", ("output", -100): "-100"} | {
    (hook.value, number): word for hook in Hook for number, word in ((-150, "mangle"), (-300, "raw"))
}
TABLES = tuple(names.NFT_TABLE_PREFIX + table.value for table in Table)


@dataclass(frozen=True, slots=True)
class Rendering:
    """One variant: `text` for nft -f, `commands` for a batch, `tables` to compare with what is read."""

    text: str
    commands: tuple[Command, ...]
    tables: tuple[TableState, ...]


@dataclass(frozen=True, slots=True)
class _Line:
    chain: str
    text: str
    expressions: bytes
    sets: tuple[AnonymousSet, ...] = ()


@lru_cache(maxsize=64)
def render(redirect: Redirect, owned: bool, plain: bool = False) -> Rendering:
    """Renders all tables of a variant; `owned` gives them the flags OWNER and PERSIST.

    `plain`: as istio-cni writes them, without tags and without rules that only count.
    """
    texts: list[str] = []
    commands: list[Command] = []
    states: list[TableState] = []
    rules = netfilter.rules(redirect, counting=not plain)
    for table in Table:
        mine = [istio_form.nftables(rule) if plain else rule for rule in rules if rule.table is table]
        if table in netfilter.tables(redirect):
            text, added, state = _table(table, mine, owned, plain)
            texts.append(text)
            commands += added
            states.append(state)
    return Rendering("\n".join(texts), tuple(commands), tuple(states))


def _table(
    table: Table, rules: list[netfilter.Rule], owned: bool, plain: bool
) -> tuple[str, list[Command], TableState]:
    name = names.NFT_TABLE_PREFIX + table.value
    flags = OWNED if owned else 0
    lines, commands, chains = [f"table inet {name} {{"], [table_command(name, flags)], []
    later: list[Command] = []
    numbers = count(1)  # of sets, within the table's part of the batch
    for hook in Hook:
        kind, priority = netfilter.BASE[table, hook]
        printed = _PRINTED[hook.value, priority]
        lines.append(f"\tchain {hook.value} {{")
        lines.append(f"\t\ttype {kind} hook {hook.value} priority {printed}; policy accept;")
        commands.append(_chain_command(name, hook.value, base_chain(table, hook)))
        jump = _Line(hook.value, f"jump {CHAINS[hook]}", expressions.verdict(VerdictCode.JUMP, CHAINS[hook]))
        tagged = _write(name, [jump], lines, later, plain)
        chains.append(Chain(hook.value, tagged, kind=kind, hook=HOOK_NUMBER[hook], priority=priority))
    for hook in Hook:
        lines.append(f"\tchain {CHAINS[hook]} {{")
        commands.append(_chain_command(name, CHAINS[hook]))
        own = list(_lines(CHAINS[hook], [rule for rule in rules if rule.hook is hook], numbers))
        chains.append(Chain(CHAINS[hook], _write(name, own, lines, later, plain)))
    lines.append("}")
    by_name = tuple(sorted(chains, key=lambda chain: chain.name))
    return "\n".join(lines), commands + later, TableState(name, by_name, flags)


def _lines(chain: str, rules: list[netfilter.Rule], numbers: Iterator[int]) -> Iterator[_Line]:
    for rule in rules:
        number = next(numbers)
        text, encoded, sets = expressions.rule(rule, number)
        for _ in sets[1:]:
            next(numbers)
        yield _Line(chain, text, encoded, sets)


def _write(
    table: str, rules: list[_Line], lines: list[str], commands: list[Command], plain: bool
) -> tuple[tuple[str, str], ...]:
    """Appends the rules of one chain, and its closing brace, to the script and to the batch."""
    chain = rules[0].chain if rules else ""
    marks = ("",) * len(rules) if plain else tag_chain((rule.text for rule in rules), f"{table} {chain}")
    for rule, tag in zip(rules, marks, strict=True):
        lines.append(f'\t\t{rule.text} comment "{tag}"' if tag else f"\t\t{rule.text}")
        body = attribute(wire.Rule.TABLE, table) + attribute(wire.Rule.CHAIN, rule.chain)
        body += nested(wire.Rule.EXPRESSIONS, rule.expressions)
        body += attribute(wire.Rule.USERDATA, comment_data(tag)) if tag else b""
        for anonymous in rule.sets:
            commands += anonymous.commands(table)
        commands.append(Command(NEWRULE, NLM_F_CREATE | NLM_F_APPEND, NFPROTO_INET, body))
    lines.append("\t}")
    return tuple((tag, digest(rule.expressions)) for rule, tag in zip(rules, marks, strict=True))


def table_command(name: str, flags: int) -> Command:
    """Creates a table, or takes over an orphaned one when `flags` hold OWNER and PERSIST."""
    body = attribute(wire.Table.NAME, name) + attribute(wire.Table.FLAGS, flags)
    return Command(NEWTABLE, NLM_F_CREATE, NFPROTO_INET, body)


def delete_commands(tables: tuple[str, ...]) -> Iterator[Command]:
    return (Command(DELTABLE, 0, NFPROTO_INET, attribute(wire.Table.NAME, name)) for name in tables)


def _chain_command(table: str, chain: str, *more: bytes) -> Command:
    body = attribute(wire.Chain.TABLE, table) + attribute(wire.Chain.NAME, chain) + b"".join(more)
    return Command(NEWCHAIN, NLM_F_CREATE, NFPROTO_INET, body)
