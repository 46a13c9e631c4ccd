# SPDX-License-Identifier: Apache-2.0
"""Tables and base chains: made by us when missing, marked as ours, dropped once empty. Pure.

iptables-restore would make them too, but then their owner would be unknown later, and removal would
leave empty tables behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from agent.backends.iptables import rendering
from agent.backends.iptables.reading import MARK, XtState
from agent.backends.netfilter import rules
from agent.backends.netfilter.message_parts import base_chain, comment_data
from agent.backends.netfilter.rules import Hook, Table
from agent.core.model.plan import Step
from agent.core.model.redirect import Redirect
from agent.core.wire import nftables as wire
from agent.core.wire.netlink import NLM_F_CREATE, attribute
from agent.core.wire.nftables import DELCHAIN, DELTABLE, NEWCHAIN, NEWTABLE, NFPROTO, Command

WORD = {4: "ip", 6: "ip6"}


@dataclass(frozen=True, slots=True)
class Restore:
    """Input of one iptables-restore --noflush."""

    family: int
    script: str


Payload = tuple[Command, ...] | Restore


def create(bases: list[tuple[int, str, str]], have: XtState) -> Step[Payload]:
    """Makes missing tables and base chains, with a comment that names Sluice as their maker."""
    lines: list[str] = []
    commands: list[Command] = []
    tables = {(family, table) for family, table, _ in bases if table not in have.families[family]}
    for family, table in sorted(tables):
        lines.append(f'add table {WORD[family]} {table} {{ comment "{MARK}" ; }}')
        body = attribute(wire.Table.NAME, table) + attribute(wire.Table.FLAGS, 0)
        body += attribute(wire.Table.USERDATA, comment_data(MARK))
        commands.append(Command(NEWTABLE, NLM_F_CREATE, NFPROTO[family], body))
    for family, table, base in bases:
        position = (Table(table), Hook[base])
        kind, priority = rules.BASE[position]
        head = f"type {kind} hook {base.lower()} priority {priority}; policy accept"
        lines.append(f'add chain {WORD[family]} {table} {base} {{ {head}; comment "{MARK}" ; }}')
        body = attribute(wire.Chain.TABLE, table) + attribute(wire.Chain.NAME, base) + base_chain(*position)
        body += attribute(wire.Chain.USERDATA, comment_data(MARK))
        commands.append(Command(NEWCHAIN, NLM_F_CREATE, NFPROTO[family], body))
    return Step("\n".join(lines), tuple(commands))


def drop(want: Redirect | None, have: XtState) -> Iterator[Step[Payload]]:
    """Yields tables and base chains that we made, that are no longer wanted and in which nothing is left."""
    lines: list[str] = []
    commands: list[Command] = []
    for family, tables in have.families.items():
        wanted = rendering.render(want, family).tables if want else {}
        for table, state in tables.items():
            if table in wanted:
                continue
            if state.marked and state.bare and have.whole:
                lines.append(f"delete table {WORD[family]} {table}")
                commands.append(Command(DELTABLE, 0, NFPROTO[family], attribute(wire.Table.NAME, table)))
                continue
            for base in state.idle:
                lines.append(f"delete chain {WORD[family]} {table} {base}")
                body = attribute(wire.Chain.TABLE, table) + attribute(wire.Chain.NAME, base)
                commands.append(Command(DELCHAIN, 0, NFPROTO[family], body))
    if commands:
        yield Step("\n".join(lines), tuple(commands))
