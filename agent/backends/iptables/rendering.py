# SPDX-License-Identifier: Apache-2.0
"""A Redirect as iptables rules, per family and table, and the scripts that make them so. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any

from agent.backends import istio_form
from agent.backends.netfilter import rules as netfilter
from agent.backends.netfilter.rules import Field, Hook, Match, Rule, RuleAction, Table
from agent.core import names
from agent.core.model.ownership import tag_chain
from agent.core.model.redirect import Redirect

CHAINS = {Hook.PREROUTING: names.XT_PREROUTING, Hook.OUTPUT: names.XT_OUTPUT}
# iptables commits table by table: what the redirections in nat rely on goes first.
ORDER = (Table.RAW, Table.MANGLE, Table.NAT)


@dataclass(frozen=True, slots=True)
class XtTable:
    """One table of one family, wanted or read: our chains as tags in order, and the jumps into them.

    A chain is (name, tags), a jump (base chain, our chain, tag); a tag is "" for a rule without one.
    On what was read: `bases` are the base chains that are there, `idle` those of them that we made and that
    hold nothing, `marked` says that we made the table, `bare` that it holds nothing but idle chains. `taken` are
    foreign chains with our names, and stand nowhere else here: ours and istio-cni's lead to no other chain, those of a
    sidecar (istio-init) do.
    """

    chains: tuple[tuple[str, tuple[str, ...]], ...] = ()
    jumps: tuple[tuple[str, str, str], ...] = ()
    _: KW_ONLY
    bases: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
    marked: bool = False
    bare: bool = False
    taken: tuple[str, ...] = ()

    def without(self, taken: tuple[str, ...]) -> XtTable:
        """Returns a copy in which these chains are foreign."""
        chains = tuple(one for one in self.chains if one[0] not in taken)
        return replace(self, chains=chains, jumps=tuple(one for one in self.jumps if one[1] not in taken), taken=taken)


@dataclass(frozen=True, slots=True)
class Rendering:
    """One family of a variant: the tables to compare with, and each chain's lines for iptables-restore."""

    tables: dict[str, XtTable]
    lines: dict[tuple[str, str], tuple[str, ...]]


@lru_cache(maxsize=64)
def render(redirect: Redirect, family: int, plain: bool = False) -> Rendering:
    """Rules of family 4 or 6; empty when the intent leaves that family out.

    `plain`: as istio-cni writes them, without tags and without rules that only count.
    """
    tables: dict[str, XtTable] = {}
    lines: dict[tuple[str, str], tuple[str, ...]] = {}
    wanted = redirect.ipv4 if family == 4 else redirect.ipv6
    known = netfilter.rules(redirect, counting=not plain) if wanted else ()
    rules = [istio_form.iptables(rule) if plain else rule for rule in known if rule.family in (None, family)]
    for table in ORDER:
        mine = [rule for rule in rules if rule.table is table]
        if not wanted or table not in netfilter.tables(redirect):
            continue
        chains, jumps = [], []
        for hook in Hook:
            chain = CHAINS[hook]
            texts = [text for rule in mine if rule.hook is hook for text in arguments(rule)]
            marks = ("",) * len(texts) if plain else tag_chain(texts, f"{family} {table.value} {chain}")
            lines[table.value, chain] = tuple(
                f"-A {chain} {_comment(tag)}{text}" for text, tag in zip(texts, marks, strict=True)
            )
            chains.append((chain, marks))
            base = hook.name
            (jump_tag,) = ("",) if plain else tag_chain([f"-j {chain}"], f"{family} {table.value} {base}")
            jumps.append((base, chain, jump_tag))
        tables[table.value] = XtTable(tuple(sorted(chains)), tuple(sorted(jumps)))
    return Rendering(tables, lines)


def arguments(rule: Rule) -> tuple[str, ...]:
    """Matches and target of one rule, without chain and comment; several where xtables needs one for each value."""
    protocol = str(next((m.value for m in rule.matches if m.field is Field.PROTOCOL), ""))
    matches = [_alternatives(match, protocol) for match in rule.matches]
    target = _target(rule)
    return tuple(" ".join(word for word in (*combination, target) if word) for combination in product(*matches))


def _alternatives(match: Match, protocol: str) -> tuple[str, ...]:
    if not isinstance(match.value, tuple):
        return (_match(match, protocol),)
    match match.field:
        case Field.SOURCE:
            return tuple(f"-s {network}" for network in match.value)
        case Field.DESTINATION:
            return tuple(f"-d {network}" for network in match.value)
        case Field.USER:
            return tuple(f"-m owner --uid-owner {_range(one, '-')}" for one in match.value)
        case Field.SOURCE_PORT | Field.DESTINATION_PORT:
            word = "--sports" if match.field is Field.SOURCE_PORT else "--dports"
            return tuple(f"-m multiport {word} {','.join(few)}" for few in _multiports(match.value))
    raise ValueError(f"{match.field} takes one value")


def _multiports(ranges: tuple[Any, ...]) -> Iterator[list[str]]:
    """Lists that fit one multiport match: fifteen ports, of which a range takes two."""
    few: list[str] = []
    room = 15
    for one in ranges:
        size = 1 if one[0] == one[1] else 2
        if size > room:
            yield few
            few = []
            room = 15
        few.append(_range(one, ":"))
        room -= size
    if few:
        yield few


def _range(one: Any, sign: str) -> str:
    return str(one[0]) if one[0] == one[1] else f"{one[0]}{sign}{one[1]}"


def _match(match: Match, protocol: str) -> str:
    sign = "! " if match.negated else ""
    value = match.value
    mask = names.MARK_MASK
    match match.field:
        case Field.FAMILY:
            return ""  # the program's own
        case Field.PROTOCOL:
            return f"-p {value}"
        case Field.IN_INTERFACE:
            return f"{sign}-i {value}"
        case Field.OUT_INTERFACE:
            return f"{sign}-o {value}"
        case Field.SOURCE:
            return f"{sign}-s {value}"
        case Field.DESTINATION:
            return f"{sign}-d {value}"
        case Field.SOURCE_PORT:
            return f"-m {protocol} {sign}--sport {value}"
        case Field.DESTINATION_PORT:
            return f"-m {protocol} {sign}--dport {value}"
        case Field.OPENING:
            return f"-m tcp {sign}--tcp-flags FIN,SYN,RST,ACK SYN"
        case Field.ESTABLISHED:
            return "-m conntrack --ctstate ESTABLISHED"
        case Field.CONFIRMED:
            return f"-m conntrack {sign}--ctstatus CONFIRMED"
        case Field.DNAT:
            return f"-m conntrack {sign}--ctstate DNAT"
        case Field.MARK:
            return f"-m mark {sign}--mark {value:#x}/{mask:#x}"
        case Field.CONNECTION_MARK:
            return f"-m connmark {sign}--mark {value:#x}/{mask:#x}"
    raise ValueError(f"{match.field} takes several values")


def _target(rule: Rule) -> str:
    match rule.verb:
        case RuleAction.ACCEPT:
            return "-j ACCEPT"
        case RuleAction.RETURN:
            return "-j RETURN"
        case RuleAction.REDIRECT:
            return f"-j REDIRECT --to-ports {rule.value}"
        case RuleAction.SET_CONNECTION_MARK:
            return f"-j CONNMARK --set-xmark {names.CONNECTION_MARK:#x}/{names.MARK_MASK:#x}"
        case RuleAction.RESTORE_MARK:
            return "-j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff"
        case RuleAction.ZONE:
            return f"-j CT --zone {rule.value}"
        case RuleAction.ORIGINAL_ZONE:
            return f"-j CT --zone-orig {rule.value}"
        case RuleAction.COUNT:
            return ""
        case RuleAction.DROP:
            return "-j DROP"


def script(want: Rendering, have: dict[str, XtTable]) -> str:
    """Returns the input of iptables-restore --noflush that turns `have` into `want`; "" when nothing has to change.

    To remove all, redirections go first, and chains last: one that a foreign rule jumps to cannot go, and that
    must not keep the rest.
    """
    sections: list[str] = []
    ends: list[str] = []
    for table in ORDER if want.tables else reversed(ORDER):
        wanted = want.tables.get(table.value, XtTable())
        actual = have.get(table.value, XtTable())
        if (wanted.chains, wanted.jumps) == (actual.chains, actual.jumps):
            continue
        lines = [*_section(table.value, want, wanted, actual)]
        unwanted = [f"-X {chain}" for chain, _ in actual.chains if chain not in dict(wanted.chains)]
        if want.tables:
            lines += unwanted
        elif unwanted:
            ends.append(_commit(table, unwanted))
        sections.append(_commit(table, lines))
    return "".join([*sections, *ends])


def _commit(table: Table, lines: list[str]) -> str:
    return "\n".join([f"*{table.value}", *lines, "COMMIT", ""])


def _section(table: str, want: Rendering, wanted: XtTable, actual: XtTable) -> Iterator[str]:
    for chain, _ in wanted.chains:
        yield f":{chain} - [0:0]"  # creates the chain or empties it, in the same commit that fills it
    keep = set(wanted.jumps) & set(actual.jumps)
    left = sorted(keep)
    for jump in actual.jumps:
        if jump in left:
            left.remove(jump)  # one of each is kept, a second one goes
        else:
            yield _jump("-D", jump)
    for jump in wanted.jumps:
        if jump not in keep:
            yield _jump("-A", jump)
    for chain, _ in wanted.chains:
        yield from want.lines[table, chain]
    yield from (f"-F {chain}" for chain, _ in actual.chains if chain not in dict(wanted.chains))


def _jump(verb: str, jump: tuple[str, str, str]) -> str:
    base, chain, tag = jump
    return f"{verb} {base} {_comment(tag)}-j {chain}"


def _comment(tag: str) -> str:
    return f'-m comment --comment "{tag}" ' if tag else ""
