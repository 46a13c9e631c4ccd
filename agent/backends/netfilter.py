"""A Redirect as netfilter rules: chains of matches and one action each, in a closed vocabulary. Pure.

Shared by the nftables and iptables backends; each of them only writes these values in its own language.
Order and effect are the table of the design's rules ("In the pod").
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from agent.core import names
from agent.core.redirect import Redirect


class Table(Enum):
    MANGLE = "mangle"
    NAT = "nat"
    RAW = "raw"


class Hook(Enum):
    PREROUTING = "prerouting"
    OUTPUT = "output"


# The type and priority of the base chain that each table hangs on. Type route: a changed mark is routed anew.
BASE: dict[tuple[Table, Hook], tuple[str, int]] = {
    (Table.NAT, Hook.PREROUTING): ("nat", -100),
    (Table.NAT, Hook.OUTPUT): ("nat", -100),
    (Table.MANGLE, Hook.PREROUTING): ("filter", -150),
    (Table.MANGLE, Hook.OUTPUT): ("route", -150),
    (Table.RAW, Hook.PREROUTING): ("filter", -300),
    (Table.RAW, Hook.OUTPUT): ("filter", -300),
}


class Field(Enum):
    """What a match looks at; the value's type is in the comment."""

    PROTOCOL = "protocol"  # "tcp" or "udp"
    IN_INTERFACE = "iifname"  # str
    OUT_INTERFACE = "oifname"  # str
    SOURCE = "saddr"  # address without prefix
    DESTINATION = "daddr"  # address without prefix
    SOURCE_PORT = "sport"  # int
    DESTINATION_PORT = "dport"  # int
    MARK = "mark"  # int, under names.MARK_MASK
    CONNECTION_MARK = "ct mark"  # int, under names.MARK_MASK


class Verb(Enum):
    ACCEPT = "accept"
    RETURN = "return"
    REDIRECT = "redirect"  # value: port
    SET_CONNECTION_MARK = "set connection mark"
    RESTORE_MARK = "restore mark"
    ZONE = "zone"  # value: conntrack zone


@dataclass(frozen=True, slots=True)
class Match:
    field: Field
    value: str | int
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule of one chain. `family` is 4 or 6 where the rule names an address, None where it fits both."""

    table: Table
    hook: Hook
    matches: tuple[Match, ...]
    verb: Verb
    value: int = 0
    family: int | None = None


_TCP, _UDP = Match(Field.PROTOCOL, "tcp"), Match(Field.PROTOCOL, "udp")
_FROM_ZTUNNEL = Match(Field.MARK, names.ZTUNNEL_MARK)
_NOT_FROM_ZTUNNEL = Match(Field.MARK, names.ZTUNNEL_MARK, negated=True)
_LOOPBACK = {4: "127.0.0.1", 6: "::1"}


def rules(redirect: Redirect) -> tuple[Rule, ...]:
    """All rules of one pod, in the order in which they must stand within each table and chain."""
    return tuple([*_mangle(), *_nat_prerouting(redirect), *_nat_output(redirect), *(_raw() if redirect.dns else ())])


def _families(redirect: Redirect) -> Iterator[tuple[int, str]]:
    if redirect.ipv4:
        yield 4, redirect.probe_ipv4
    if redirect.ipv6:
        yield 6, redirect.probe_ipv6


def _mangle() -> Iterator[Rule]:
    yield Rule(Table.MANGLE, Hook.PREROUTING, (_FROM_ZTUNNEL,), Verb.SET_CONNECTION_MARK)
    touched = Match(Field.CONNECTION_MARK, names.CONNECTION_MARK)
    yield Rule(Table.MANGLE, Hook.OUTPUT, (touched,), Verb.RESTORE_MARK)


def _nat_prerouting(redirect: Redirect) -> Iterator[Rule]:
    nat = (Table.NAT, Hook.PREROUTING)
    for interface in redirect.virtual_interfaces:
        inbound = (Match(Field.IN_INTERFACE, interface), _TCP)
        yield Rule(*nat, inbound, Verb.REDIRECT, names.OUTBOUND_PORT)
        yield Rule(*nat, inbound, Verb.RETURN)
    if redirect.ingress_only:
        return
    for family, probe in _families(redirect):
        yield Rule(*nat, (_TCP, Match(Field.SOURCE, probe)), Verb.ACCEPT, family=family)
    for family, _ in _families(redirect):
        plain = (
            Match(Field.DESTINATION, _LOOPBACK[family], negated=True),
            _TCP,
            Match(Field.DESTINATION_PORT, names.HBONE_PORT, negated=True),
            _NOT_FROM_ZTUNNEL,
        )
        yield Rule(*nat, plain, Verb.REDIRECT, names.INBOUND_PORT, family)


def _nat_output(redirect: Redirect) -> Iterator[Rule]:
    nat = (Table.NAT, Hook.OUTPUT)
    outward = {family: Match(Field.DESTINATION, _LOOPBACK[family], negated=True) for family, _ in _families(redirect)}
    for family, probe in _families(redirect):
        yield Rule(*nat, (_TCP, Match(Field.DESTINATION, probe)), Verb.ACCEPT, family=family)
    if redirect.dns:
        port = Match(Field.DESTINATION_PORT, 53)
        off_lo = Match(Field.OUT_INTERFACE, "lo", negated=True)
        yield Rule(*nat, (off_lo, _UDP, port, _NOT_FROM_ZTUNNEL), Verb.REDIRECT, names.DNS_PORT)
        for family, match in outward.items():
            dns = (match, _TCP, port, _NOT_FROM_ZTUNNEL)
            yield Rule(*nat, dns, Verb.REDIRECT, names.DNS_PORT, family)
    yield Rule(*nat, (_TCP, Match(Field.MARK, names.CONNECTION_MARK)), Verb.ACCEPT)
    for family, match in outward.items():
        yield Rule(*nat, (match, Match(Field.OUT_INTERFACE, "lo")), Verb.ACCEPT, family=family)
    for family, match in outward.items():
        yield Rule(*nat, (match, _TCP, _NOT_FROM_ZTUNNEL), Verb.REDIRECT, names.OUTBOUND_PORT, family)


def _raw() -> Iterator[Rule]:
    ours = (_UDP, Match(Field.DESTINATION_PORT, 53), _FROM_ZTUNNEL)
    yield Rule(Table.RAW, Hook.OUTPUT, ours, Verb.ZONE, names.DNS_ZONE)
    answers = (_UDP, Match(Field.SOURCE_PORT, 53), _NOT_FROM_ZTUNNEL)
    yield Rule(Table.RAW, Hook.PREROUTING, answers, Verb.ZONE, names.DNS_ZONE)
