# SPDX-License-Identifier: Apache-2.0
"""Foreign rules before Sluice's that may take their traffic, in words. Pure. They are reported and never touched.

Netfilter calls base chains by priority, and of equal ones that registered last comes first (nf_hook_entries_grow; NAT
keeps a list of its own in the same order). An accept in one NAT chain binds no other; the first translation does
(nf_nat_inet_fn). When a chain was registered is not known: of two with one priority, that in the table made later is
taken for the later one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from agent.backends.netfilter.dumps import Content, Head, Ruleset
from agent.backends.netfilter.foreign_rule import RuleEffect, effect
from agent.backends.netfilter.message_parts import HOOK_NUMBER, ChainHead, chain_head, comment, text
from agent.backends.netfilter.rules import BASE, Hook, Table
from agent.core import names
from agent.core.model.ownership import TAG
from agent.core.model.plan import Foreign
from agent.core.wire import nftables as wire
from agent.core.wire.nftables import NFPROTO_INET, NFPROTO_IPV4, NFPROTO_IPV6
from agent.core.wire.policy_rules import FibRule
from agent.core.wire.rtnetlink import Action

_WORDS = {NFPROTO_INET: "inet", NFPROTO_IPV4: "ip", NFPROTO_IPV6: "ip6"}
_HOOKS = frozenset(HOOK_NUMBER.values())
_NAT_PRIORITY = BASE[Table.NAT, Hook.OUTPUT][1]
_OURS = frozenset(names.NFT_TABLE_PREFIX + table.value for table in Table)
_XT_CHAINS = frozenset((names.XT_PREROUTING, names.XT_OUTPUT))
_XT_BASES = frozenset((table.value, hook.name) for table in Table for hook in Hook)
_TAKES = {"nat": frozenset({"dnat", "redirect", "drop", "queue"})}
_TAKES_OTHER = frozenset({"mark", "drop", "tproxy", "queue", "notrack"})
_ENDS = frozenset({"dnat", "redirect", "tproxy", "drop", "accept", "return", "queue"})
_LEADS_AWAY = frozenset(set(Action) - {Action.NOP})
_LOCAL = 255
_NOT_READ = "the pod has more rules than can be read, or changes them all the time: what comes before ours is not known"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Suspect:
    """A base chain with rules that may take our traffic; `here` if they come before our jump in the same chain."""

    family: int
    table: str
    nat: bool
    priority: int
    here: bool
    words: str


def chains(ruleset: Ruleset, family: int, table: str, *, ipv6: bool) -> tuple[str, ...]:
    """Describes chains before ours, a line each.

    `table` holds our NAT chains: in `family`, or (0) in ip and in ip6, where our chains are called from the base chains
    of iptables.
    """
    if not ruleset.whole:
        return (_NOT_READ,)
    suspects = _suspects(ruleset.content, within=not family)
    if not suspects:
        return ()
    heads = {(head.family, head.name): head for head in ruleset.tables}
    return tuple(
        Foreign(one.words)
        for one in suspects
        if (ipv6 or one.family != NFPROTO_IPV6)
        and _before(one, heads.get((one.family, one.table)), heads.get((family or one.family, table)))
    )


def _before(one: _Suspect, head: Head | None, own: Head | None) -> bool:
    if head is None or head.dormant:
        return False
    if one.here or one.priority < _NAT_PRIORITY:
        return True
    # Our table, if it does not exist yet, will be the latest.
    return one.nat and one.priority == _NAT_PRIORITY and own is not None and head.handle > own.handle


@lru_cache(maxsize=64)
def _suspects(content: Content, within: bool) -> tuple[_Suspect, ...]:
    """Lists suspects. `within`: Sluice's jumps are in iptables' base chains; earlier rules count with any verdict."""
    bases = [one for one in (chain_head(message.body) for message in content.chains) if one.hook in _HOOKS]
    bases = [one for one in bases if one.family in _WORDS and one.priority <= _NAT_PRIORITY]
    bases = [one for one in bases if not (one.family == NFPROTO_INET and one.table in _OURS)]
    if not bases:
        return ()
    rules = _rules(content)
    return tuple(suspect for base in bases if (suspect := _suspect(base, rules, within)))


Place = tuple[int, str, str]  # family, table, chain


def _rules(content: Content) -> dict[Place, list[tuple[str, RuleEffect]]]:
    """Returns (our tag or "", effects) of each rule."""
    rules: dict[Place, list[tuple[str, RuleEffect]]] = {}
    for message in content.rules:
        parts = wire.fields(message.body)
        what = effect(parts)
        note = comment(parts.get(wire.Rule.USERDATA, b"")) or what.comment
        tag = note if TAG.fullmatch(note) else ""
        chain = message.body[0], text(parts.get(wire.Rule.TABLE)), text(parts.get(wire.Rule.CHAIN))
        rules.setdefault(chain, []).append((tag, what))
    return rules


def _suspect(base: ChainHead, rules: dict[Place, list[tuple[str, RuleEffect]]], within: bool) -> _Suspect | None:
    chain = base.family, base.table, base.name
    held = rules.get(chain, [])
    here = within and base.family != NFPROTO_INET and (base.table, base.name) in _XT_BASES
    takes = _TAKES.get(base.kind, _TAKES_OTHER)
    if here:
        takes = takes | _ENDS
        held = held[: _jump(held)]
    taking = list(_taking(base, held, rules, takes, frozenset({base.name})))
    if not base.accepts and not here:
        taking.append((frozenset({"drop"}), "policy drop"))
    if not taking:
        return None
    verbs = ", ".join(sorted(frozenset().union(*(verbs for verbs, _ in taking))))
    where = f"chain {_WORDS[base.family]} {base.table} {base.name}" + (" before our jump" if here else "")
    count = f"{len(taking)} rule{'s' * (len(taking) != 1)}"
    description = f"{where}, priority {base.priority}: {count} with {verbs} ({taking[0][1]})"
    return _Suspect(
        family=base.family,
        table=base.table,
        nat=base.kind == "nat",
        priority=base.priority,
        here=here,
        words=description,
    )


def _jump(held: list[tuple[str, RuleEffect]]) -> int:
    return next((number for number, (_, what) in enumerate(held) if what.chain in _XT_CHAINS), len(held))


def _taking(
    base: ChainHead,
    held: list[tuple[str, RuleEffect]],
    rules: dict[Place, list[tuple[str, RuleEffect]]],
    takes: frozenset[str],
    seen: frozenset[str],
) -> Iterator[tuple[frozenset[str], str]]:
    """Yields (verbs, words) of each rule that takes something away, also in chains that are jumped to."""
    for tag, what in held:
        if tag or what.elsewhere:
            continue
        verbs = frozenset(what.verbs & takes)
        if verbs:
            yield verbs, str(what)
        elif what.chain and what.chain not in seen:
            there = rules.get((base.family, base.table, what.chain), [])
            # To return from there only leads back.
            for taken, description in _taking(base, there, rules, takes - {"return"}, seen | {what.chain}):
                yield taken, f"{what}: {description}"


def rules(held: Iterable[FibRule]) -> tuple[FibRule, ...]:
    """Returns policy rules that a marked reply of the pod to ztunnel may match if they come before Sluice's.

    It is sent from within, so its incoming interface is lo; what is looked up for an outgoing interface is not routed
    by marks. A table that is empty today may be filled tomorrow.
    """
    return tuple(
        rule
        for rule in held
        if rule.action in _LEADS_AWAY
        and rule.table != _LOCAL
        and not rule.oif
        and (
            rule.inverted
            or (rule.iif in ("", "lo") and not (rule.mark ^ names.CONNECTION_MARK) & rule.mask & names.MARK_MASK)
        )
    )


def describe(rule: FibRule) -> str:
    return Foreign(f"policy rule of IPv{rule.family} with preference {rule.preference}: {rule}")
