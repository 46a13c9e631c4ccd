"""Reads what nf_tables holds in a pod's namespace, or knows that it is what was read last.

The generation belongs to the namespace and to all families: nftables of either family and iptables-nft. Every
transaction makes a new one, ours too, so a change that we made is read again. What may change without one is not
kept (nfdumps.Ruleset.lasts).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from agent.backends import nfdumps
from agent.backends.nfdumps import Ruleset
from agent.core.errors import KernelError
from agent.core.nftables import GETCHAIN, GETRULE, GETTABLE
from agent.kernel.nfnetlink import NftSocket
from agent.kernel.notifications import Mark
from agent.kernel.podnetns import PodNetns

H = TypeVar("H")


@dataclass(frozen=True, slots=True)
class _Last(Generic[H]):
    have: H
    generation: int
    mark: Mark
    ipv6: bool


class Reader(Generic[H]):
    """One backend's view of each namespace; forgets a namespace with its PodNetns."""

    def __init__(self, view: Callable[[Ruleset, int, PodNetns], H]) -> None:
        """`view` makes a backend's Have of (rule set, its generation, the namespace)."""
        self._view = view
        self._last: WeakKeyDictionary[PodNetns, _Last[H]] = WeakKeyDictionary()

    def read(self, target: PodNetns) -> H:
        last, ipv6, mark = self._last.get(target), target.has_ipv6(), target.events.mark()
        # The notification of a transaction comes after it, a new generation within it: one read in between is undone
        # by the notification.
        if (
            last is not None
            and last.ipv6 == ipv6
            and target.events.unchanged_since(last.mark)
            and target.nft.generation() == last.generation
        ):
            return last.have
        ruleset, generation = read(target.nft)
        have = self._view(ruleset, generation, target)
        if ruleset.lasts(target.nft.port):
            self._last[target] = _Last(have, generation, mark, ipv6)
        else:
            self._last.pop(target, None)
        return have


def read(nft: NftSocket) -> tuple[Ruleset, int]:
    """The rule set, all of it of one generation, and which."""
    generation = nft.generation()
    for _ in range(20):
        dumps = [nft.dumped(kind) for kind in (GETTABLE, GETCHAIN, GETRULE)]
        before, generation = generation, nft.generation()
        if before == generation:
            return nfdumps.ruleset(*dumps), generation
    raise KernelError("read nf_tables", 0, "somebody keeps changing the rules while they are read")
