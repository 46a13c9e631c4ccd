# SPDX-License-Identifier: Apache-2.0
"""Each kernel feature that a choice of backend needs, on its own: how it is tried, and what to do without it. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass

from agent.backends.netfilter.message_parts import base_chain
from agent.backends.netfilter.rules import Field, Hook, Match, Rule, RuleAction, Table
from agent.backends.nftables import expressions
from agent.backends.nftables.expressions import compare, expression, meta
from agent.backends.nftables.rendering import OWNED, table_command
from agent.core import names
from agent.core.wire import nftables as wire
from agent.core.wire.netlink import NLM_F_CREATE, attribute, nested
from agent.core.wire.nftables import NEWCHAIN, NEWRULE, NEWSET, NFPROTO_INET, Command

_TABLE = "sluice-try"
RESTORE = {
    "iptables": {4: "iptables-nft-restore", 6: "ip6tables-nft-restore"},
    "iptables-legacy": {4: "iptables-legacy-restore", 6: "ip6tables-legacy-restore"},
}


@dataclass(frozen=True, slots=True)
class HasIpv6:
    """The namespace has IPv6 at all."""


@dataclass(frozen=True, slots=True)
class PolicyRuleRequirement:
    """A policy rule by packet mark can be made."""

    family: int


@dataclass(frozen=True, slots=True)
class Transaction:
    """nf_tables takes these messages."""

    commands: tuple[Command, ...]


@dataclass(frozen=True, slots=True)
class Printed:
    """nft can read its own print of a table with these flags, once the owner has ended; or nft is not installed."""

    flags: int


@dataclass(frozen=True, slots=True)
class ProgramRequirement:
    """A program is installed."""

    name: str


@dataclass(frozen=True, slots=True)
class Restored:
    """An iptables-restore program takes this script."""

    program: str
    script: str


@dataclass(frozen=True, slots=True)
class Ebpf:
    """A feature of eBPF, by its name there."""

    name: str


Trial = HasIpv6 | PolicyRuleRequirement | Transaction | Printed | ProgramRequirement | Restored | Ebpf


@dataclass(frozen=True, slots=True)
class Need:
    """One feature. `without` is what is lost where it is optional, "" where nothing works without it.

    `behind` names the need without which this one cannot be there either and is not tried.
    """

    name: str
    trial: Trial
    _: KW_ONLY
    remedy: str
    without: str = ""
    behind: str = ""


def needs(choice: str, *, ipv6: bool = True) -> tuple[Need, ...]:
    """Returns the needs in the order of their trials. With `ipv6` False none touches IPv6."""
    if choice == "ebpf":
        return (*_common(ipv6), *_ebpf())
    every = [*_common(ipv6), *(_nftables() if choice == "nftables" else _iptables(choice, ipv6))]
    return tuple(every)


def _ebpf() -> Iterator[Need]:
    """Yields each feature with the first kernel that has it."""
    kernel = "Linux {} with CONFIG_BPF_SYSCALL and CONFIG_CGROUP_BPF; or set backend: nftables"
    for name, remedy in (
        ("eBPF objects", "make objects, before the package is built"),
        ("libbpf", "apt-get install libbpf1"),
        ("cgroup v2 hierarchy", "mount the node's cgroup2 filesystem into the agent"),
        ("bpffs", kernel.format("4.4")),
        ("cgroup/connect", kernel.format("5.8")),
        ("cgroup/sendmsg, recvmsg", kernel.format("5.8")),
        ("cgroup/bind", kernel.format("5.8")),
        ("cgroup/getpeername, getsockopt", kernel.format("5.15")),
        ("sockops", kernel.format("5.15")),
        ("sk_lookup", kernel.format("5.9")),
        ("tcx", kernel.format("6.6")),
    ):
        yield Need(name, Ebpf(name), remedy=remedy)


def modules(module: str, symbol: str) -> str:
    """Returns what to do where a module is missing; the caller, who knows the kernel, fills in `{release}`."""
    return (
        f"modprobe {module}, and write {module} to /etc/modules-load.d/sluice.conf (in the package "
        "linux-modules-extra-{release} on Ubuntu, kernel-modules-extra on Fedora and RHEL); "
        f"a kernel of one's own needs CONFIG_{symbol}"
    )


def _common(ipv6: bool) -> Iterator[Need]:
    rules = "a kernel with CONFIG_{}, which every distribution's has"
    yield Need("policy routing", PolicyRuleRequirement(4), remedy=rules.format("IP_MULTIPLE_TABLES"))
    if ipv6:
        yield Need("IPv6", HasIpv6(), remedy="boot without ipv6.disable=1", without="pods are captured for IPv4 alone")
        remedy = rules.format("IPV6_MULTIPLE_TABLES") + "; or set ipv6: false"
        yield Need("IPv6 policy routing", PolicyRuleRequirement(6), remedy=remedy, behind="IPv6")


def _nftables() -> Iterator[Need]:
    table = table_command(_TABLE, 0)
    owned = table_command(_TABLE, OWNED)
    remedy = modules("nf_tables", "NF_TABLES and CONFIG_NF_TABLES_INET")
    yield Need("nf_tables, inet", Transaction((table,)), remedy=remedy)
    tcp, udp = Match(Field.PROTOCOL, "tcp"), Match(Field.PROTOCOL, "udp")
    nat, mangle, raw = (Table.NAT, Hook.OUTPUT), (Table.MANGLE, Hook.PREROUTING), (Table.RAW, Hook.OUTPUT)
    for name, rule, module, symbol in (
        (
            "inet nat, redirect",
            Rule(*nat, (tcp,), RuleAction.REDIRECT, value=15001),
            "nft_redir",
            "NFT_NAT and CONFIG_NFT_REDIR",
        ),
        (
            "meta mark",
            Rule(*mangle, (Match(Field.MARK, names.ZTUNNEL_MARK),), RuleAction.ACCEPT),
            "nf_tables",
            "NF_TABLES",
        ),
        ("ct mark", Rule(*mangle, (), RuleAction.SET_CONNECTION_MARK), "nft_ct", "NFT_CT and CONFIG_NF_CONNTRACK_MARK"),
        (
            "tcp flags, ct status",
            Rule(
                Table.MANGLE,
                Hook.OUTPUT,
                (tcp, Match(Field.OPENING, "syn"), Match(Field.CONFIRMED, "yes")),
                RuleAction.RETURN,
            ),
            "nft_ct",
            "NFT_CT",
        ),
        (
            "ct zone",
            Rule(*raw, (udp,), RuleAction.ORIGINAL_ZONE, value=1),
            "nft_ct",
            "NFT_CT and CONFIG_NF_CONNTRACK_ZONES",
        ),
    ):
        commands = (table, *_rule(rule.table, rule.hook, expressions.rule(rule)[1]))
        yield Need(name, Transaction(commands), remedy=modules(module, symbol), behind="nf_tables, inet")
    user = meta(wire.MetaKey.SKUID) + compare(bytes(4))
    refuse = expression(
        "reject",
        attribute(wire.Reject.TYPE, wire.REJECT_ICMPX_UNREACH),
        attribute(wire.Reject.ICMP_CODE, bytes([wire.ICMPX_ADMIN_PROHIBITED])),
    )
    ranges = attribute(wire.Set.TABLE, _TABLE) + attribute(wire.Set.NAME, "s")
    ranges += attribute(wire.Set.FLAGS, wire.SetFlag.INTERVAL) + attribute(wire.Set.KEY_LEN, 4)
    ranges += attribute(wire.Set.ID, 1)
    for name, commands, advice, loss in (
        (
            "owned tables",
            (owned,),
            "Linux 6.9",
            "an `nft flush ruleset` by another process removes our tables until they are repaired",
        ),
        (
            "sets of intervals",
            (table, Command(NEWSET, NLM_F_CREATE, NFPROTO_INET, ranges)),
            modules("nf_tables", "NF_TABLES"),
            "ranges cannot be excluded from capture",
        ),
        (
            "meta skuid",
            (table, *_rule(Table.NAT, Hook.OUTPUT, user)),
            modules("nf_tables", "NF_TABLES"),
            "users cannot be excluded from capture",
        ),
        (
            "reject",
            (table, *_rule(Table.RAW, Hook.OUTPUT, refuse)),
            modules("nft_reject_inet", "NFT_REJECT_INET"),
            "non_tcp: refuse cannot be used",
        ),
    ):
        yield Need(name, Transaction(commands), remedy=advice, without=loss, behind="nf_tables, inet")
    yield Need(
        "owned tables in nft",
        Printed(OWNED),
        remedy="a newer nft (1.1.3 of Debian 13 can); until then `nft list table inet NAME` for tables of others",
        without="while no agent runs, `nft list ruleset` prints Sluice's tables so that nft cannot load them; "
        "`nft -j` breaks off",
        behind="owned tables",
    )


def _rule(table: Table, hook: Hook, expressions: bytes) -> Iterator[Command]:
    chain = attribute(wire.Chain.TABLE, _TABLE) + attribute(wire.Chain.NAME, "c") + base_chain(table, hook)
    yield Command(NEWCHAIN, NLM_F_CREATE, NFPROTO_INET, chain)
    body = attribute(wire.Rule.TABLE, _TABLE) + attribute(wire.Rule.CHAIN, "c")
    body += nested(wire.Rule.EXPRESSIONS, expressions)
    yield Command(NEWRULE, NLM_F_CREATE, NFPROTO_INET, body)


# Name, table and rule, module and symbol of the kernel, what is lost without it.
_EXTENSIONS = (
    ("match comment", "mangle", "OUTPUT -m comment --comment x -j ACCEPT", "xt_comment", "MATCH_COMMENT", ""),
    ("match tcp", "mangle", "OUTPUT -p tcp -m tcp --dport 53 -j ACCEPT", "xt_tcpudp", "XTABLES", ""),
    ("match udp", "mangle", "OUTPUT -p udp -m udp --dport 53 -j ACCEPT", "xt_tcpudp", "XTABLES", ""),
    ("match mark", "mangle", "OUTPUT -m mark --mark 0x1/0xfff -j ACCEPT", "xt_mark", "MARK", ""),
    ("match connmark", "mangle", "OUTPUT -m connmark --mark 0x1/0xfff -j ACCEPT", "xt_connmark", "CONNMARK", ""),
    (
        "match conntrack",
        "mangle",
        "OUTPUT -m conntrack ! --ctstatus CONFIRMED -j ACCEPT",
        "xt_conntrack",
        "MATCH_CONNTRACK",
        "",
    ),
    ("target CONNMARK", "mangle", "OUTPUT -j CONNMARK --set-xmark 0x1/0xfff", "xt_connmark", "CONNMARK", ""),
    ("target CT", "raw", "OUTPUT -p udp -j CT --zone 1", "xt_CT", "TARGET_CT", ""),
    ("target REDIRECT", "nat", "OUTPUT -p tcp -j REDIRECT --to-ports 15001", "xt_REDIRECT", "TARGET_REDIRECT", ""),
    (
        "match multiport",
        "mangle",
        "OUTPUT -p tcp -m multiport --dports 1,2:3 -j ACCEPT",
        "xt_multiport",
        "MATCH_MULTIPORT",
        "lists of ports cannot be excluded from capture",
    ),
    (
        "match owner",
        "mangle",
        "OUTPUT -m owner --uid-owner 0-1 -j ACCEPT",
        "xt_owner",
        "MATCH_OWNER",
        "users cannot be excluded from capture",
    ),
)


def _iptables(choice: str, ipv6: bool) -> Iterator[Need]:
    for family in (4, 6) if ipv6 else (4,):
        program = RESTORE[choice][family]
        word = f"IPv{family}"
        package = "install the package iptables, 1.8 or newer (Alpine splits off iptables-legacy)"
        behind = "IPv6" if family == 6 else ""
        yield Need(f"program {program}", ProgramRequirement(program), remedy=package, behind=behind)
        for table in ("nat", "mangle", "raw"):
            if choice == "iptables":
                remedy = modules("nft_compat", "NF_TABLES and CONFIG_NFT_COMPAT")
            else:
                six = "6" if family == 6 else ""
                remedy = modules(f"ip{six}table_{table}", f"IP{six}_NF_{table.upper()} and its _LEGACY")
            script = f"*{table}\n-A OUTPUT -j ACCEPT\nCOMMIT\n"
            yield Need(f"{word} table {table}", Restored(program, script), remedy=remedy, behind=f"program {program}")
        for name, table, rule, module, symbol, without in _EXTENSIONS:
            remedy = modules(module, f"NETFILTER_{symbol}" if symbol == "XTABLES" else f"NETFILTER_XT_{symbol}")
            script = f"*{table}\n-A {rule}\nCOMMIT\n"
            yield Need(
                f"{word} {name}",
                Restored(program, script),
                remedy=remedy,
                without=without,
                behind=f"{word} table {table}",
            )
