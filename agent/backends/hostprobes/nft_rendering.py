"""HostProbes as nf_tables: the printed script, the batch of messages, and the state to compare with. Pure.

"Of a process on this node" is said by `meta skuid != 4294967295`: the kernel's nft_meta_get_eval_skugid gives up
the rule for a packet without a socket, without a file behind the socket, or whose socket is of another network
namespace, and no user has that number. So it matches what iptables' --socket-exists does, for every user.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from typing import Final

from agent.backends.hostprobes import nft_sets
from agent.backends.hostprobes.want import SETS, HostProbes
from agent.backends.netfilter.messages import comment_data
from agent.backends.nftables.ruleset import Chain, TableState, digest
from agent.core import names
from agent.core.model import tags
from agent.core.wire.netlink import NLM_F_APPEND, NLM_F_CREATE, attribute, nested
from agent.core.wire.nftables import DELTABLE, NEWCHAIN, NEWRULE, NEWTABLE, NFPROTO_INET, Command

TABLE: Final = names.NFT_TABLE_PREFIX + "nat"
CHAIN: Final = "postrouting"
OWNER, PERSIST = 2, 4  # NFT_TABLE_F_*
_HOOK, _PRIORITY = 4, 99  # NF_INET_POST_ROUTING; before all iptables and kube-proxy, which translate at 100
_PRINTED = "srcnat - 1"
_NO_USER = 0xFFFFFFFF
_META_SKUID, _META_NFPROTO, _META_L4PROTO = 10, 15, 16
_NFPROTO, _OFFSET = {4: 2, 6: 10}, {4: (16, 4), 6: (24, 16)}  # of the destination in the header, and its length
_MAP_IPS = 1  # NF_NAT_RANGE_MAP_IPS: what the kernel makes of a given address, and dumps again


def commands(want: HostProbes, flags: int, members: Mapping[int, Mapping[str, str]]) -> Iterator[Command]:
    """Makes the table from nothing; `members` per family are those that its sets begin with."""
    yield table_command(flags)
    for family in want.families:
        yield nft_sets.create(TABLE, family)
    hook = nested(4, attribute(1, _HOOK), attribute(2, _PRIORITY))
    chain = attribute(1, TABLE) + attribute(3, CHAIN) + hook + attribute(7, "nat") + attribute(5, 1)
    yield Command(NEWCHAIN, NLM_F_CREATE, NFPROTO_INET, chain)
    for (_, encoded), tag in zip(_rules(want), _tags(want), strict=True):
        body = attribute(1, TABLE) + attribute(2, CHAIN) + nested(4, encoded) + attribute(7, comment_data(tag))
        yield Command(NEWRULE, NLM_F_CREATE | NLM_F_APPEND, NFPROTO_INET, body)
    for family in want.families:
        yield from nft_sets.added(TABLE, SETS[family], members[family])


def script(want: HostProbes, members: Mapping[int, Mapping[str, str]]) -> str:
    """The same as text for nft -f, but for the table's flags, which older ones do not know."""
    lines = [f"table inet {TABLE} {{"]
    for family in want.families:
        lines += nft_sets.declaration(family, members[family])
    lines += [f"\tchain {CHAIN} {{", f"\t\ttype nat hook {CHAIN} priority {_PRINTED}; policy accept;"]
    rules = zip(_rules(want), _tags(want), strict=True)
    lines += [f'\t\t{words} comment "{tag}"' for (words, _), tag in rules]
    return "\n".join([*lines, "\t}", "}"])


def state(want: HostProbes) -> TableState:
    """What has to be read back, sets left out."""
    rules = tuple((tag, digest(encoded)) for (_, encoded), tag in zip(_rules(want), _tags(want), strict=True))
    return TableState(TABLE, (Chain(CHAIN, rules, "nat", _HOOK, _PRIORITY),))


def table_command(flags: int) -> Command:
    return Command(NEWTABLE, NLM_F_CREATE, NFPROTO_INET, attribute(1, TABLE) + attribute(2, flags))


def delete_command() -> Command:
    return Command(DELTABLE, 0, NFPROTO_INET, attribute(1, TABLE))


def _rules(want: HostProbes) -> list[tuple[str, bytes]]:
    return [_rule(family, want.probe(family)) for family in want.families]


def _tags(want: HostProbes) -> tuple[str, ...]:
    return tags.chain((words for words, _ in _rules(want)), f"{TABLE} {CHAIN}")


def _rule(family: int, probe: str) -> tuple[str, bytes]:
    word = {4: "ip", 6: "ip6"}[family]
    (offset, length) = _OFFSET[family]
    words = f"meta l4proto tcp meta skuid != {_NO_USER} {word} daddr @{SETS[family]} counter snat {word} to {probe}"
    return words, b"".join(
        [
            _meta(_META_L4PROTO) + _compare(0, bytes([6])),
            _meta(_META_SKUID) + _compare(1, _NO_USER.to_bytes(4)),
            _meta(_META_NFPROTO) + _compare(0, bytes([_NFPROTO[family]])),
            _expression("payload", attribute(1, 1), attribute(2, 1), attribute(3, offset), attribute(4, length)),
            _expression("lookup", attribute(1, SETS[family]), attribute(2, 1), attribute(5, 0)),
            _expression("counter", attribute(1, bytes(8)), attribute(2, bytes(8))),
            _expression("immediate", attribute(1, 1), nested(2, attribute(1, ipaddress.ip_address(probe).packed))),
            _expression(
                "nat",
                attribute(1, 0),  # NFT_NAT_SNAT
                attribute(2, _NFPROTO[family]),
                attribute(3, 1),
                attribute(4, 1),
                attribute(7, _MAP_IPS),
            ),
        ]
    )


def _expression(name: str, *data: bytes) -> bytes:
    return nested(1, attribute(1, name), nested(2, *data))


def _meta(key: int) -> bytes:
    return _expression("meta", attribute(2, key), attribute(1, 1))


def _compare(operator: int, value: bytes) -> bytes:
    """Operator 0 is equal, 1 is not equal."""
    return _expression("cmp", attribute(1, 1), attribute(2, operator), nested(3, attribute(1, value)))
