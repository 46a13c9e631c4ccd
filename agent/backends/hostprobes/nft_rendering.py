# SPDX-License-Identifier: Apache-2.0
"""HostProbes as nf_tables: the printed script, the batch of messages, and the state to compare with. Pure.

"Of a process on this node" is expressed by `meta skuid != 4294967295`: the kernel's nft_meta_get_eval_skugid gives up
the rule for a packet without a socket, without a file behind the socket, or with a socket of another network
namespace, and no user has that number. So it matches what iptables' --socket-exists does, for every user.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from typing import Final

from agent.backends.hostprobes import nft_sets
from agent.backends.hostprobes.want import SETS, HostProbes
from agent.backends.netfilter.message_parts import comment_data
from agent.backends.nftables.expressions import COUNTER, compare, expression, immediate, meta, payload
from agent.backends.nftables.rendering import table_command
from agent.backends.nftables.ruleset import Chain, TableState, digest
from agent.core import names
from agent.core.model.ownership import tag_chain
from agent.core.wire import nftables as wire
from agent.core.wire.netlink import NLM_F_APPEND, NLM_F_CREATE, attribute, nested
from agent.core.wire.nftables import NEWCHAIN, NEWRULE, NFPROTO, NFPROTO_INET, Command

TABLE: Final = names.NFT_TABLE_PREFIX + "nat"
CHAIN: Final = "postrouting"
_HOOK, _PRIORITY = 4, 99  # NF_INET_POST_ROUTING; before all iptables and kube-proxy, which translate at 100
_PRINTED = "srcnat - 1"
_NO_USER = 0xFFFFFFFF
_OFFSET = {4: (16, 4), 6: (24, 16)}  # of the destination in the header, and its length
_MAP_IPS = 1  # NF_NAT_RANGE_MAP_IPS: what the kernel makes of a given address, and dumps again


def commands(want: HostProbes, flags: int, members: Mapping[int, Mapping[str, str]]) -> Iterator[Command]:
    """Makes the table from nothing; `members` per family are those that its sets begin with."""
    yield table_command(TABLE, flags)
    for family in want.families:
        yield nft_sets.create(TABLE, family)
    hook = nested(wire.Chain.HOOK, attribute(wire.Hook.HOOKNUM, _HOOK), attribute(wire.Hook.PRIORITY, _PRIORITY))
    chain = attribute(wire.Chain.TABLE, TABLE) + attribute(wire.Chain.NAME, CHAIN) + hook
    chain += attribute(wire.Chain.TYPE, "nat") + attribute(wire.Chain.POLICY, wire.VerdictCode.ACCEPT)
    yield Command(NEWCHAIN, NLM_F_CREATE, NFPROTO_INET, chain)
    for (_, encoded), tag in zip(_rules(want), _tags(want), strict=True):
        body = attribute(wire.Rule.TABLE, TABLE) + attribute(wire.Rule.CHAIN, CHAIN)
        body += nested(wire.Rule.EXPRESSIONS, encoded) + attribute(wire.Rule.USERDATA, comment_data(tag))
        yield Command(NEWRULE, NLM_F_CREATE | NLM_F_APPEND, NFPROTO_INET, body)
    for family in want.families:
        yield from nft_sets.added(TABLE, SETS[family], members[family])


def script(want: HostProbes, members: Mapping[int, Mapping[str, str]]) -> str:
    """Returns the same as text for nft -f, but for the table's flags, which older ones do not know."""
    lines = [f"table inet {TABLE} {{"]
    for family in want.families:
        lines += nft_sets.declaration(family, members[family])
    lines += [f"\tchain {CHAIN} {{", f"\t\ttype nat hook {CHAIN} priority {_PRINTED}; policy accept;"]
    rules = zip(_rules(want), _tags(want), strict=True)
    lines += [f'\t\t{rule} comment "{tag}"' for (rule, _), tag in rules]
    return "\n".join([*lines, "\t}", "}"])


def state(want: HostProbes) -> TableState:
    """Returns the state that has to be read back, sets left out."""
    rules = tuple((tag, digest(encoded)) for (_, encoded), tag in zip(_rules(want), _tags(want), strict=True))
    return TableState(TABLE, (Chain(CHAIN, rules, kind="nat", hook=_HOOK, priority=_PRIORITY),))


def _rules(want: HostProbes) -> list[tuple[str, bytes]]:
    return [_rule(family, want.probe(family)) for family in want.families]


def _tags(want: HostProbes) -> tuple[str, ...]:
    return tag_chain((text for text, _ in _rules(want)), f"{TABLE} {CHAIN}")


def _rule(family: int, probe: str) -> tuple[str, bytes]:
    word = {4: "ip", 6: "ip6"}[family]
    (offset, length) = _OFFSET[family]
    text = f"meta l4proto tcp meta skuid != {_NO_USER} {word} daddr @{SETS[family]} counter snat {word} to {probe}"
    return text, b"".join(
        [
            meta(wire.MetaKey.L4PROTO) + compare(bytes([6])),
            meta(wire.MetaKey.SKUID) + compare(_NO_USER.to_bytes(4), negated=True),
            meta(wire.MetaKey.NFPROTO) + compare(bytes([NFPROTO[family]])),
            payload(wire.PayloadBase.NETWORK_HEADER, offset, length),
            expression(
                "lookup",
                attribute(wire.Lookup.SET, SETS[family]),
                attribute(wire.Lookup.SREG, wire.REG_1),
                attribute(wire.Lookup.FLAGS, 0),
            ),
            COUNTER,
            immediate(ipaddress.ip_address(probe).packed),
            expression(
                "nat",
                attribute(wire.Nat.TYPE, wire.NatType.SNAT),
                attribute(wire.Nat.FAMILY, NFPROTO[family]),
                attribute(wire.Nat.REG_ADDR_MIN, wire.REG_1),
                attribute(wire.Nat.REG_ADDR_MAX, wire.REG_1),
                attribute(wire.Nat.FLAGS, _MAP_IPS),
            ),
        ]
    )
