# SPDX-License-Identifier: Apache-2.0
"""Limits how many entries one pod may have in the maps that all pods share, so that one pod cannot fill them.

The programs count the entries that a pod adds. They do not see what the agent removes, so the entries of a pod that has
used half of its share are counted again.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator

from agent.flows.ebpf import account_abi
from agent.flows.ebpf.account_abi import Share, Shared
from agent.kernel.bpf.map import Maps

_PART, _LEAST = 8, 256  # one pod may have an eighth of a map's entries, but at least 256
_QUIET = 60.0  # seconds between two messages about one pod
_MAPS = {Shared.PEERS: "tallies", Shared.HANDSHAKES: "begun"}
_WORDS = {
    Shared.PEERS: "it has more peers than one pod may have ({most}): {count} connections are counted without address",
    Shared.HANDSHAKES: "more of its connections than one pod may have ({most}) wait for ztunnel: whether {count} were"
    " captured may not be known",
}


class Shares:
    """Keeps the shares of all pods; for one thread at a time. Methods raise KernelError."""

    def __init__(self, maps: Maps, clock: Callable[[], float] = time.monotonic) -> None:
        self._maps = maps
        self._clock = clock
        # Refused at the last message, and when that was.
        self._reported: dict[tuple[int, Shared], tuple[int, float]] = {}

    def allow(self) -> None:
        """Sets the shares by the sizes that the maps have."""
        for of, name in _MAPS.items():
            most = max(_LEAST, self._maps[name].max_entries // _PART)
            self._maps["shares"].update(account_abi.share_key(0, of), Share(most).encode())

    def crowded(self) -> Iterator[tuple[int, str]]:
        """Yields (pod, message) for each pod with refused entries since its last message, at most once a minute."""
        held = {account_abi.shared(key): (key, account_abi.share(value)) for key, value in self._maps["shares"].items()}
        counted: dict[Shared, Counter[int]] = {}
        for (pod, of), (key, share) in held.items():
            most = held[0, of][1].taken if (0, of) in held else 0
            if not pod or not most:
                continue
            if share.taken > most // 2:
                if of not in counted:  # once for all pods: one system call per entry
                    counted[of] = Counter(map(account_abi.owner, self._maps[_MAPS[of]].keys()))
                self._correct(key, share, counted[of][pod])
            before, when = self._reported.get((pod, of), (0, 0.0))
            if share.refused > before and self._clock() >= when + _QUIET:
                self._reported[pod, of] = share.refused, self._clock()
                yield pod, _WORDS[of].format(most=most, count=share.refused - before)

    def _correct(self, key: bytes, share: Share, taken: int) -> None:
        if taken != share.taken:  # an entry that is added meanwhile is missed, and found the next time
            self._maps["shares"].update(key, Share(taken, share.refused).encode())

    def sweep(self, known: Collection[int]) -> None:
        """Removes the shares of pods that no longer exist."""
        for key, (pod, of) in ((key, account_abi.shared(key)) for key, _ in self._maps["shares"].items()):
            if pod and pod not in known:
                self._maps["shares"].delete(key)
                self._reported.pop((pod, of), None)
