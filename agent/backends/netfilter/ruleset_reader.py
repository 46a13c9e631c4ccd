# SPDX-License-Identifier: Apache-2.0
"""Reads what nf_tables holds in a pod's namespace, or knows that it is what was read last.

The generation belongs to the namespace and to all families: nftables of either family and iptables-nft. Every
transaction makes a new one, ours too, so a change that we made is read again. What may change without one is not
kept (nfdumps.Ruleset.lasts).

A pod may have any number of rules and change them all the time, and dumping n rules takes the kernel n * n steps (7 s
for 40,000). So their number is read first. If there are too many, or they change with every read, only our own chains
are read, by name. If even those keep changing, the last read is used: writing our rules again is better than not
looking.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from agent.backends.netfilter import dumps
from agent.backends.netfilter.dumps import ChainRef, Ruleset
from agent.core.errors import KernelError
from agent.core.wire import nftables as wire
from agent.core.wire.netlink import attribute
from agent.core.wire.nftables import GETCHAIN, GETRULE, GETTABLE
from agent.kernel.netlink.nf_tables import NftSocket
from agent.kernel.netlink.notifications import NotificationMark
from agent.kernel.pod_netns import PodNetns

H = TypeVar("H")
WHOLE = 2048  # rules of a namespace, and half as many chains and sets
OWN = 8192  # rules of one chain that we need
_BYTES = 1 << 22  # of one dump
_TRIES = 4
_RARELY = 60.0  # seconds until everything is read again after it could not be


@dataclass(frozen=True, slots=True)
class _Last(Generic[H]):
    have: H
    generation: int
    mark: NotificationMark
    ipv6: bool


class Reader(Generic[H]):
    """One backend's view of each namespace; forgets a namespace with its PodNetns."""

    def __init__(self, view: Callable[[Ruleset, int | None, bool], H], own: Sequence[ChainRef]) -> None:
        """Takes `view`, which makes a backend's state from (rule set, its generation, whether there is IPv6).

        The generation is None if it changed during the read. `own`: the chains that the backend needs.
        """
        self._view = view
        self._own = own
        self._last: WeakKeyDictionary[PodNetns, _Last[H]] = WeakKeyDictionary()
        self._large: WeakKeyDictionary[PodNetns, float] = WeakKeyDictionary()  # until when only our own are read

    def read(self, target: PodNetns) -> H:
        last = self._last.get(target)
        ipv6 = target.has_ipv6()
        mark = target.events.mark()
        # The notification of a transaction comes after it, a new generation within it: one read in between is undone
        # by the notification.
        if (
            last is not None
            and last.ipv6 == ipv6
            and target.events.unchanged_since(last.mark)
            and target.nft.generation() == last.generation
        ):
            return last.have
        ruleset, generation = read(target.nft, self._own, whole=self._large.get(target, 0.0) <= time.monotonic())
        have = self._view(ruleset, generation, ipv6)
        if generation is not None and ruleset.lasts(target.nft.port):
            self._last[target] = _Last(have, generation, mark, ipv6)
        else:
            self._last.pop(target, None)
        if not ruleset.whole:
            now = time.monotonic()
            if self._large.get(target, 0.0) <= now:
                self._large[target] = now + _RARELY
        return have


def read(nft: NftSocket, own: Sequence[ChainRef], *, whole: bool = True) -> tuple[Ruleset, int | None]:
    """Reads the rule set and its generation, None if that changed meanwhile. Only our chains if not all can be read."""
    for all_of_it in (True, False) if whole else (False,):
        for _ in range(_TRIES):
            before = nft.generation()
            ruleset = _whole(nft) if all_of_it else _own_chains(nft, own)
            if ruleset is None:
                break  # too large
            if nft.generation() == before:
                return ruleset, before
    assert ruleset is not None
    return ruleset, None


def _whole(nft: NftSocket) -> Ruleset | None:
    tables, _ = nft.dumped(GETTABLE, most=_BYTES)
    if dumps.uses(tables) > WHOLE // 2:
        return None
    chains, _ = nft.dumped(GETCHAIN, most=_BYTES)
    if dumps.uses(chains) > WHOLE:
        return None
    rules, complete = nft.dumped(GETRULE, most=_BYTES)
    return dumps.ruleset(tables, chains, rules) if complete else None


def _own_chains(nft: NftSocket, own: Sequence[ChainRef]) -> Ruleset:
    """Reads Sluice's chains by name. One with too many rules is read as empty, which Sluice never writes."""
    tables = dict.fromkeys((one.family, one.table) for one in own)
    heads = {(family, name): nft.get(GETTABLE, family, attribute(wire.Table.NAME, name)) for family, name in tables}
    chains, rules = [], []
    for one in own:
        table = attribute(wire.Chain.TABLE, one.table)
        if not heads[one.family, one.table]:
            continue
        if chain := nft.get(GETCHAIN, one.family, table + attribute(wire.Chain.NAME, one.chain)):
            chains.append(chain)
            if dumps.uses(chain) <= OWN:
                selection = table + attribute(wire.Rule.CHAIN, one.chain)
                rules.append(nft.dumped(GETRULE, one.family, selection, _BYTES)[0])
            elif one.shared:
                raise KernelError(f"read chain {one.table} {one.chain}", 0, f"it has more than {OWN} rules")
    return dumps.ruleset(b"".join(heads.values()), b"".join(chains), b"".join(rules), whole=False)
