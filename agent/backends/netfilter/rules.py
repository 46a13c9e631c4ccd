# SPDX-License-Identifier: Apache-2.0
"""A Redirect as netfilter rules: chains of matches and one action each, in a closed vocabulary. Pure.

Shared by the nftables and iptables backends; each of them only writes these values in its own language.
Order and effect are those of docs/design/rules.md, "In the pod".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, dataclass, replace
from enum import Enum

from agent.core import names
from agent.core.model.exclusions import NOTHING, Range
from agent.core.model.redirect import Redirect


class Table(Enum):
    MANGLE = "mangle"
    NAT = "nat"
    RAW = "raw"


class Hook(Enum):
    PREROUTING = "prerouting"
    OUTPUT = "output"


# The type and priority of the base chain that each table hangs on. Type route: a changed mark is routed again.
BASE: dict[tuple[Table, Hook], tuple[str, int]] = {
    (Table.NAT, Hook.PREROUTING): ("nat", -100),
    (Table.NAT, Hook.OUTPUT): ("nat", -100),
    (Table.MANGLE, Hook.PREROUTING): ("filter", -150),
    (Table.MANGLE, Hook.OUTPUT): ("route", -150),
    (Table.RAW, Hook.PREROUTING): ("filter", -300),
    (Table.RAW, Hook.OUTPUT): ("filter", -300),
}


class Field(Enum):
    """Fields that a match looks at; the value's type is in the comment."""

    FAMILY = "family"  # 4 or 6, for a rule that names no address
    PROTOCOL = "protocol"  # "tcp", "udp", "icmp" or "ipv6-icmp"
    IN_INTERFACE = "iifname"  # str
    OUT_INTERFACE = "oifname"  # str
    SOURCE = "saddr"  # address or network, or networks
    DESTINATION = "daddr"  # address or network, or networks
    SOURCE_PORT = "sport"  # int, or ranges
    DESTINATION_PORT = "dport"  # int, or ranges
    OPENING = "opening"  # a TCP packet that opens a connection: SYN alone of FIN, SYN, RST and ACK
    USER = "skuid"  # ranges of ids; only where the packet has a socket
    ESTABLISHED = "established"  # conntrack has seen both directions
    CONFIRMED = "confirmed"  # conntrack has the connection from an earlier packet
    DNAT = "dnat"  # NAT has changed the destination
    MARK = "mark"  # int, under names.MARK_MASK
    CONNECTION_MARK = "ct mark"  # int, under names.MARK_MASK


class RuleAction(Enum):
    ACCEPT = "accept"
    RETURN = "return"
    REDIRECT = "redirect"  # value: port
    SET_CONNECTION_MARK = "set connection mark"
    RESTORE_MARK = "restore mark"
    ZONE = "zone"  # value: conntrack zone
    ORIGINAL_ZONE = "original zone"  # value: conntrack zone of the packets that go as the first one went
    COUNT = "count"  # nothing else
    DROP = "drop"  # on output the sender gets EPERM


@dataclass(frozen=True, slots=True)
class Match:
    """`value` is one thing, or a tuple of which any may match: ranges (first, last), or networks of one family."""

    field: Field
    value: str | int | tuple[Range, ...] | tuple[str, ...]
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule of one chain. `family` is 4 or 6 where the rule names an address, None where it fits both."""

    table: Table
    hook: Hook
    matches: tuple[Match, ...]
    verb: RuleAction
    _: KW_ONLY
    value: int = 0
    family: int | None = None


_TCP, _UDP = Match(Field.PROTOCOL, "tcp"), Match(Field.PROTOCOL, "udp")
_FROM_ZTUNNEL = Match(Field.MARK, names.ZTUNNEL_MARK)
_NOT_FROM_ZTUNNEL = Match(Field.MARK, names.ZTUNNEL_MARK, negated=True)
_OFF_LO = Match(Field.OUT_INTERFACE, "lo", negated=True)
_NOT_OPENING = Match(Field.OPENING, "syn", negated=True)
_LOOPBACK = {4: "127.0.0.1", 6: "::1"}
_ICMP = {4: "icmp", 6: "ipv6-icmp"}


def rules(redirect: Redirect, *, counting: bool = True) -> tuple[Rule, ...]:
    """Returns all rules of one pod, in the order in which they must stand within each table and chain.

    Without `counting` those are left out that istio-cni has not: what is neither TCP nor captured DNS is not counted or
    refused, a SYN that NAT has not redirected is not dropped, and IPv6 link-local destinations are captured. While
    draining those are left that captured connections need: the kernel translates them by what conntrack knows, for as
    long as any chain of NAT is there (see `tables`).
    """
    if redirect.draining:
        return (*_mangle(), *(_raw(plain=not counting) if redirect.dns else ()))
    capturing = (*_nat_prerouting(redirect), *_nat_output(redirect, link_local=counting))
    chains = [
        *_mangle(),
        *(_dropped(capturing) if redirect.blocked else ()),
        *(_unredirected(redirect) if counting and not redirect.blocked else ()),
        *(_other_inbound(redirect) if counting else ()),
        *(_other_outbound(redirect) if counting else ()),
        *(capturing if not redirect.blocked else ()),
        *(_raw(plain=not counting) if redirect.dns else ()),
    ]
    if not counting or redirect.ipv4 == redirect.ipv6:
        return tuple(chains)
    return tuple(_of_family(rule, 4 if redirect.ipv4 else 6) for rule in chains)


def tables(redirect: Redirect) -> frozenset[Table]:
    """Returns those that are there, with or without rules."""
    always = frozenset((Table.MANGLE, Table.NAT))
    return always | {Table.RAW} if redirect.dns else always


def _of_family(rule: Rule, family: int) -> Rule:
    """Names the family: in a table of both, a redirection without one would take the excluded family, too."""
    if rule.family is not None or rule.verb not in (RuleAction.REDIRECT, RuleAction.DROP):
        return rule
    return replace(rule, family=family, matches=(Match(Field.FAMILY, family), *rule.matches))


def _families(redirect: Redirect) -> Iterator[tuple[int, str]]:
    if redirect.ipv4:
        yield 4, redirect.probe_ipv4
    if redirect.ipv6:
        yield 6, redirect.probe_ipv6


def _by_family(redirect: Redirect, addresses: tuple[str, ...]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yields networks or addresses of each family; a family without any makes no rule, for that would match all."""
    for family, _ in _families(redirect):
        mine = tuple(address for address in addresses if (":" in address) == (family == 6))
        if mine:
            yield family, mine


def _mangle() -> Iterator[Rule]:
    yield Rule(Table.MANGLE, Hook.PREROUTING, (_FROM_ZTUNNEL,), RuleAction.SET_CONNECTION_MARK)
    touched = Match(Field.CONNECTION_MARK, names.CONNECTION_MARK)
    yield Rule(Table.MANGLE, Hook.OUTPUT, (touched,), RuleAction.RESTORE_MARK)


def _dropped(capturing: Iterable[Rule]) -> Iterator[Rule]:
    """Drops in mangle what these rules of NAT would redirect, since iptables refuses to drop in NAT.

    NAT is asked for the first packet of a connection alone, and on the way in for none that comes by lo.
    """
    yield Rule(Table.MANGLE, Hook.PREROUTING, (Match(Field.IN_INTERFACE, "lo"),), RuleAction.RETURN)
    for hook in Hook:
        yield Rule(Table.MANGLE, hook, (_TCP, _NOT_OPENING), RuleAction.RETURN)
    for rule in capturing:
        yield _dropping(rule)


def _dropping(rule: Rule) -> Rule:
    verb = RuleAction.DROP if rule.verb is RuleAction.REDIRECT else RuleAction.RETURN
    return replace(rule, table=Table.MANGLE, verb=verb, value=0)


def _unredirected(redirect: Redirect) -> Iterator[Rule]:
    """Drops an application's SYN if NAT is not asked for it: it belongs to an entry that conntrack already has.

    Such an entry has outlived a connection of ztunnel's from the same port to the same server. The first packet of a
    new entry is not confirmed yet. A SYN that conntrack finds invalid has no entry; it is neither, and dropped too.
    """
    here = (Table.MANGLE, Hook.OUTPUT)
    yield Rule(*here, (_TCP, _NOT_OPENING), RuleAction.RETURN)
    yield Rule(*here, (_TCP, Match(Field.CONFIRMED, "yes", negated=True)), RuleAction.RETURN)
    yield Rule(*here, (_TCP, Match(Field.DNAT, "yes")), RuleAction.RETURN)
    for rule in _nat_output(replace(redirect, preserve=False, dns=False), link_local=True):
        matches = rule.matches if _TCP in rule.matches else (_TCP, *rule.matches)
        yield _dropping(replace(rule, matches=matches))


def _other_inbound(redirect: Redirect) -> Iterator[Rule]:
    """Counts or drops traffic that is neither TCP nor captured DNS. ICMP passes: it carries path MTU and neighbours."""
    here = (Table.MANGLE, Hook.PREROUTING)
    yield from _not_other(redirect, *here)
    yield Rule(*here, (Match(Field.IN_INTERFACE, "lo"),), RuleAction.RETURN)
    if redirect.dns:  # answers to ztunnel
        answers = (_UDP, Match(Field.SOURCE_PORT, 53), Match(Field.ESTABLISHED, "yes"))
        yield Rule(*here, answers, RuleAction.RETURN)
    if redirect.refuse_non_tcp:
        yield from _answers(redirect, *here)
        for interface in redirect.exclude.interfaces:
            yield Rule(*here, (Match(Field.IN_INTERFACE, interface),), RuleAction.RETURN)
        yield from _inbound_exclusions(redirect, *here, ("udp",))
    yield from _rest(redirect, *here)


def _other_outbound(redirect: Redirect) -> Iterator[Rule]:
    here = (Table.MANGLE, Hook.OUTPUT)
    yield from _not_other(redirect, *here)
    yield Rule(*here, (Match(Field.OUT_INTERFACE, "lo"),), RuleAction.RETURN)
    yield Rule(*here, (_FROM_ZTUNNEL,), RuleAction.RETURN)
    if redirect.dns:
        for family, to in _resolvers(redirect):
            yield Rule(*here, (*to, _UDP, Match(Field.DESTINATION_PORT, 53)), RuleAction.RETURN, family=family)
    if redirect.refuse_non_tcp:
        yield from _answers(redirect, *here)
        yield from _outbound_exclusions(redirect, *here, ("udp",))
    yield from _rest(redirect, *here)


def _not_other(redirect: Redirect, table: Table, hook: Hook) -> Iterator[Rule]:
    yield Rule(table, hook, (_TCP,), RuleAction.RETURN)
    for family, _ in _families(redirect):
        yield Rule(table, hook, (Match(Field.PROTOCOL, _ICMP[family]),), RuleAction.RETURN, family=family)


def _answers(redirect: Redirect, table: Table, hook: Hook) -> Iterator[Rule]:
    """Lets answers to excluded traffic through the other way, where no exclusion matches."""
    if redirect.exclude != NOTHING or redirect.dns_to:
        yield Rule(table, hook, (Match(Field.ESTABLISHED, "yes"),), RuleAction.RETURN)


def _rest(redirect: Redirect, table: Table, hook: Hook) -> Iterator[Rule]:
    for family, _ in _families(redirect):  # a family that is left out is not counted, and never dropped
        verb = RuleAction.DROP if redirect.refuse_non_tcp else RuleAction.COUNT
        yield Rule(table, hook, (Match(Field.FAMILY, family),), verb, family=family)


def _nat_prerouting(redirect: Redirect) -> Iterator[Rule]:
    nat = (Table.NAT, Hook.PREROUTING)
    if redirect.preserve:
        yield Rule(*nat, (_TCP, _NOT_OPENING), RuleAction.RETURN)
    for interface in redirect.exclude.interfaces:
        yield Rule(*nat, (Match(Field.IN_INTERFACE, interface),), RuleAction.RETURN)
    for interface in redirect.virtual_interfaces:
        arriving = Match(Field.IN_INTERFACE, interface)
        yield from _destinations(redirect, *nat, ("tcp",), arriving)
        yield Rule(*nat, (arriving, _TCP), RuleAction.REDIRECT, value=names.OUTBOUND_PORT)
        yield Rule(*nat, (arriving, _TCP), RuleAction.RETURN)
    if redirect.ingress_only:
        return
    for family, probe in _families(redirect):
        yield Rule(*nat, (_TCP, Match(Field.SOURCE, probe)), RuleAction.ACCEPT, family=family)
    yield from _inbound_exclusions(redirect, *nat, ("tcp",))
    for family, _ in _families(redirect):
        plain = (
            Match(Field.DESTINATION, _LOOPBACK[family], negated=True),
            _TCP,
            *((Match(Field.DESTINATION_PORT, names.HBONE_PORT, negated=True),) if redirect.hbone else ()),
            _NOT_FROM_ZTUNNEL,
        )
        yield Rule(*nat, plain, RuleAction.REDIRECT, value=names.INBOUND_PORT, family=family)


def _nat_output(redirect: Redirect, *, link_local: bool) -> Iterator[Rule]:
    nat = (Table.NAT, Hook.OUTPUT)
    outward = {family: Match(Field.DESTINATION, _LOOPBACK[family], negated=True) for family, _ in _families(redirect)}
    if redirect.preserve:
        yield Rule(*nat, (_TCP, _NOT_OPENING), RuleAction.RETURN)
    for family, probe in _families(redirect):
        yield Rule(*nat, (_TCP, Match(Field.DESTINATION, probe)), RuleAction.ACCEPT, family=family)
    yield from _outbound_exclusions(redirect, *nat, ("tcp", "udp") if redirect.dns else ("tcp",))
    if redirect.dns:
        yield from _dns(redirect, outward)
    yield Rule(*nat, (_TCP, Match(Field.MARK, names.CONNECTION_MARK)), RuleAction.ACCEPT)
    for family, match in outward.items():
        yield Rule(*nat, (match, Match(Field.OUT_INTERFACE, "lo")), RuleAction.ACCEPT, family=family)
    if redirect.ipv6 and link_local:
        yield Rule(*nat, (_TCP, Match(Field.DESTINATION, names.LINK_LOCAL)), RuleAction.RETURN, family=6)
    for family, match in outward.items():
        yield Rule(
            *nat, (match, _TCP, _NOT_FROM_ZTUNNEL), RuleAction.REDIRECT, value=names.OUTBOUND_PORT, family=family
        )


def _dns(redirect: Redirect, outward: dict[int, Match]) -> Iterator[Rule]:
    nat = (Table.NAT, Hook.OUTPUT)
    port = Match(Field.DESTINATION_PORT, 53)
    for family, to in _resolvers(redirect):
        udp = (*to, _OFF_LO, _UDP, port, _NOT_FROM_ZTUNNEL)
        yield Rule(*nat, udp, RuleAction.REDIRECT, value=names.DNS_PORT, family=family)
    for family, match in outward.items():
        for wanted, to in _resolvers(redirect):
            if wanted in (None, family):
                tcp = (*(to or (match,)), _TCP, port, _NOT_FROM_ZTUNNEL)
                yield Rule(*nat, tcp, RuleAction.REDIRECT, value=names.DNS_PORT, family=family)


def _resolvers(redirect: Redirect) -> Iterator[tuple[int | None, tuple[Match, ...]]]:
    """Yields the destinations that count as DNS, by family: (None, ()) for any."""
    if not redirect.dns_to:
        yield None, ()
    for family, addresses in _by_family(redirect, redirect.dns_to):
        yield family, (Match(Field.DESTINATION, addresses),)


def _inbound_exclusions(redirect: Redirect, table: Table, hook: Hook, protocols: tuple[str, ...]) -> Iterator[Rule]:
    """Yields rules that return and do not accept: what follows Sluice's jump stays as it would be without Sluice."""
    for family, sources in _by_family(redirect, redirect.exclude.inbound_networks):
        yield Rule(table, hook, (Match(Field.SOURCE, sources),), RuleAction.RETURN, family=family)
    yield from _ports(redirect.exclude.inbound_ports, table, hook, protocols)


def _outbound_exclusions(redirect: Redirect, table: Table, hook: Hook, protocols: tuple[str, ...]) -> Iterator[Rule]:
    for interface in redirect.exclude.interfaces:
        yield Rule(table, hook, (Match(Field.OUT_INTERFACE, interface),), RuleAction.RETURN)
    if redirect.exclude.users:
        yield Rule(table, hook, (Match(Field.USER, redirect.exclude.users),), RuleAction.RETURN)
    yield from _destinations(redirect, table, hook, protocols)


def _destinations(
    redirect: Redirect, table: Table, hook: Hook, protocols: tuple[str, ...], *more: Match
) -> Iterator[Rule]:
    for family, to in _by_family(redirect, redirect.exclude.outbound_networks):
        yield Rule(table, hook, (*more, Match(Field.DESTINATION, to)), RuleAction.RETURN, family=family)
    yield from _ports(redirect.exclude.outbound_ports, table, hook, protocols, *more)


def _ports(
    ranges: tuple[Range, ...], table: Table, hook: Hook, protocols: tuple[str, ...], *more: Match
) -> Iterator[Rule]:
    if ranges:
        for protocol in protocols:
            ports = Match(Field.DESTINATION_PORT, ranges)
            yield Rule(table, hook, (*more, Match(Field.PROTOCOL, protocol), ports), RuleAction.RETURN)


def _raw(*, plain: bool) -> Iterator[Rule]:
    """Puts ztunnel's queries into a conntrack zone: a client may ask the same resolver from the same port.

    Only packets that go as the query went: answers are known by their flow, not by a port. A DNS server's client
    may ask from port 53, and ztunnel answers a client at port 53, by lo. `plain`: as istio-cni, by ports.
    """
    queries = (_UDP, Match(Field.DESTINATION_PORT, 53), _FROM_ZTUNNEL)
    if not plain:
        yield Rule(Table.RAW, Hook.OUTPUT, (_OFF_LO, *queries), RuleAction.ORIGINAL_ZONE, value=names.DNS_ZONE)
        return
    yield Rule(Table.RAW, Hook.OUTPUT, queries, RuleAction.ZONE, value=names.DNS_ZONE)
    answers = (_UDP, Match(Field.SOURCE_PORT, 53), _NOT_FROM_ZTUNNEL)
    yield Rule(Table.RAW, Hook.PREROUTING, answers, RuleAction.ZONE, value=names.DNS_ZONE)
