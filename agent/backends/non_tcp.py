# SPDX-License-Identifier: Apache-2.0
"""Counters of a captured pod's traffic that bypasses ztunnel: neither TCP nor captured DNS.

The last rules of Sluice's mangle chains count it. To read the counters changes nothing; they are not compared.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass

from agent.backends.ebpf import counting as ebpf
from agent.backends.ebpf.pins import Pins
from agent.backends.iptables import entries
from agent.backends.iptables import rendering as xtables
from agent.backends.netfilter.message_parts import expressions, rule_comment
from agent.backends.netfilter.rules import Hook, Table
from agent.backends.nftables import rendering as nftables
from agent.core import names
from agent.core.model.redirect import Redirect
from agent.core.wire import nftables as wire
from agent.core.wire.netlink import attribute, unpack_be
from agent.core.wire.nftables import GETRULE, NFPROTO, NFPROTO_INET
from agent.kernel import xtables as sockopts
from agent.kernel.pod_netns import PodNetns

INBOUND, OUTBOUND = "inbound", "outbound"
_DIRECTION = {Hook.PREROUTING: INBOUND, Hook.OUTPUT: OUTBOUND}
_MANGLE = Table.MANGLE.value
_Rule = tuple[str, int, int]  # tag, packets, bytes


@dataclass(frozen=True, slots=True)
class Counts:
    """Counts since the rules were applied. Refused packets too, where they are refused."""

    packets: int = 0
    bytes: int = 0

    def plus(self, packets: int, size: int) -> Counts:
        return Counts(self.packets + packets, self.bytes + size)


def read(backend: str, target: PodNetns, want: Redirect, pins: Pins | None = None) -> dict[str, Counts]:
    """Returns counts by direction, from the rules of `backend` for `want`, or from eBPF's map. Raises KernelError."""
    if backend == "ebpf":
        counted = ebpf.non_tcp(pins or Pins.of(names.BPF_DIR), target.netns.id.cookie)
        return {direction: Counts(*one) for direction, one in zip((OUTBOUND, INBOUND), counted, strict=True)}
    wanted = _tags(backend, want)
    counts = {INBOUND: Counts(), OUTBOUND: Counts()}
    for tag, packets, size in _rules(backend, target, wanted):
        if tag in wanted:
            counts[wanted[tag]] = counts[wanted[tag]].plus(packets, size)
    return counts


def _tags(backend: str, want: Redirect) -> dict[str, str]:
    """Returns tag of each counting rule -> direction: the last rule of its chain, one for each family."""
    families = [family for family, on in ((4, want.ipv4), (6, want.ipv6)) if on]
    directions: dict[str, str] = {}
    for hook, direction in _DIRECTION.items():
        if backend == "nftables":
            (table,) = (t for t in nftables.render(want, False).tables if t.name == names.NFT_TABLE_PREFIX + _MANGLE)
            (chain,) = (c for c in table.chains if c.name == f"istio-{hook.value}")
            directions |= {tag: direction for tag, _ in chain.rules[-len(families) :]}
        else:
            for family in families:
                chains = dict(xtables.render(want, family).tables[_MANGLE].chains)
                directions[chains[xtables.CHAINS[hook]][-1]] = direction
    return directions


def _rules(backend: str, target: PodNetns, wanted: Container[str]) -> Iterator[_Rule]:
    """Yields at least the rules with a wanted tag."""
    if backend == "nftables":
        table = names.NFT_TABLE_PREFIX + _MANGLE
        yield from _nft_rules(target, NFPROTO_INET, table, (names.NFT_PREROUTING, names.NFT_OUTPUT), wanted)
    elif backend == "iptables":
        for protocol in NFPROTO.values():
            yield from _nft_rules(target, protocol, _MANGLE, tuple(xtables.CHAINS.values()), wanted)
    else:
        for (family, _), (_, data) in target.netns.call(lambda: sockopts.again((_MANGLE,), {})).items():
            for entry in entries.entries(family, data, tuple(entries.offsets(family, data))):
                yield entry.comment or "", *entries.counts(family, data, entry.offset)


def _nft_rules(
    target: PodNetns, protocol: int, table: str, chains: tuple[str, ...], wanted: Container[str]
) -> Iterator[_Rule]:
    for chain in chains:
        selection = attribute(wire.Rule.TABLE, table) + attribute(wire.Rule.CHAIN, chain)
        for message in target.nft.dump(GETRULE, protocol, selection):
            rule = wire.fields(message.body)
            tag = rule_comment(rule)
            for name, data in expressions(rule) if tag in wanted else ():
                if name == "counter":
                    yield tag, unpack_be(data.get(wire.Counter.PACKETS)), unpack_be(data.get(wire.Counter.BYTES))
