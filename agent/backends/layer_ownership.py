# SPDX-License-Identifier: Apache-2.0
"""Determines the owner of state under the names that all mesh agents share. Pure; values in, an answer out.

Ours carry tags, marks or an owner. Policy rules and routes have no room for these: alone they prove nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from agent.backends.ebpf import state
from agent.backends.hostprobes.former_reading import Held
from agent.backends.iptables.rendering import XtTable
from agent.backends.nftables.rendering import OWNED
from agent.backends.nftables.ruleset import TableState
from agent.core.model.ownership import Owner, owner_of


def layer_owner(name: str, have: Any) -> Owner:
    """Decides by what the layer of that name has read (backends.registry)."""
    held = getattr(have, "held", have)
    match name:
        case "nftables":
            return tables_owner(have.tables)
        case "iptables" | "iptables-legacy":
            return families_owner(held.families)
        case "ebpf":  # in a directory of our own, unknown to other programs
            return Owner.SLUICE if state.plan(None, have) else Owner.NONE
    return Owner.NONE


def tables_owner(tables: Iterable[TableState]) -> Owner:
    """Returns the owner of nf_tables: istio-cni writes no comments, and its tables have no owner."""
    states = tuple(tables)
    tagged = any(tag for table in states for chain in table.chains for tag, _ in chain.rules)
    if tagged or any(table.flags & OWNED for table in states):
        return Owner.SLUICE
    return Owner.FOREIGN if states else Owner.NONE


def families_owner(families: Mapping[int, Mapping[str, XtTable]]) -> Owner:
    """Determines the owner of iptables rules of either variant."""
    tables = [table for family in families.values() for table in family.values()]
    chains = [held for table in tables for _, held in table.chains]
    tags = [*(tag for held in chains for tag in held), *(tag for table in tables for _, _, tag in table.jumps)]
    return _tagged(tags, bool(chains) or any(table.idle or (table.marked and table.bare) for table in tables))


def _tagged(tags: Collection[str], left: bool) -> Owner:
    """Decides by the tags of rules and jumps. `left`: there are chains.

    Chains that hold nothing and that nothing leads to have no effect: if no other rule is there they are what was left
    of a removal, and go.
    """
    if any(tags):
        return Owner.SLUICE
    if tags:
        return Owner.FOREIGN
    return Owner.SLUICE if left else Owner.NONE


def host_layer_owner(name: str, have: Any) -> Owner:
    """Decides by what the layer of the probe exemption of that name has read (backends.hostprobes.layers).

    Policy rules are read as ours only if they carry our number.
    """
    match name:
        case "nftables":
            return tables_owner((have.table,) if have.table else ())
        case "iptables" | "iptables-legacy":
            return held_owner(have.held.values())
        case "branch-eni":
            return Owner.SLUICE if any(rule.ours for rule in have.rules) else Owner.NONE
        case "ipset":
            return Owner.SLUICE if have else Owner.NONE
    return Owner.NONE


def host_owner(parts: Mapping[str, Owner]) -> Owner:
    """Combines the answers of the exemption's layers.

    Sets of ipset belong to the rules that refer to them: they count only where there are no rules.
    """
    rules = owner_of(one for name, one in parts.items() if name != "ipset")
    return parts.get("ipset", rules) if rules is Owner.NONE else rules


def held_owner(families: Iterable[Held]) -> Owner:
    """Determines the owner of the chain in the node's nat table and of the jumps to it."""
    held = tuple(families)
    tags = [tag for one in held for tag in (*(one.chain or ()), *one.jumps)]
    return _tagged(tags, any(one.chain is not None or one.idle or one.bare for one in held))
