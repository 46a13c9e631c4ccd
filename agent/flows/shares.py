"""What one pod may take of the maps that all share, so that it takes the names and fates of its own connections alone.

The programs count what a pod has taken. What the agent takes out they do not see, so a pod that comes near its share
is counted anew.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator

from agent.flows import abi
from agent.flows.abi import Share, Shared
from agent.kernel.bpfmaps import Maps

_PART, _LEAST = 8, 256  # of a map's entries one pod may have an eighth, but so many in any case
_QUIET = 60.0  # seconds between two words on one pod
_MAPS = {Shared.PEERS: "tallies", Shared.HANDSHAKES: "begun"}
_WORDS = {
    Shared.PEERS: "it has more peers than one pod may have ({most}): {count} connections are counted without address",
    Shared.HANDSHAKES: "more of its connections than one pod may have ({most}) wait for ztunnel: whether {count} were"
    " captured may not be known",
}


class Shares:
    """One thread at a time. Methods raise KernelError."""

    def __init__(self, maps: Maps, clock: Callable[[], float] = time.monotonic) -> None:
        self._maps, self._clock = maps, clock
        self._told: dict[tuple[int, Shared], tuple[int, float]] = {}  # refused when told last, and when that was

    def allow(self) -> None:
        """Sets the shares by the sizes that the maps have."""
        for of, name in _MAPS.items():
            most = max(_LEAST, self._maps[name].max_entries // _PART)
            self._maps["shares"].update(abi.share_key(0, of), Share(most).encode())

    def crowded(self) -> Iterator[tuple[int, str]]:
        """(pod, in words) of each that was refused something since it was told last, at most once a minute."""
        held = {abi.shared(key): (key, abi.share(value)) for key, value in self._maps["shares"].items()}
        for (pod, of), (key, share) in held.items():
            most = held[0, of][1].taken if (0, of) in held else 0
            if not pod or not most:
                continue
            if share.taken > most // 2:
                self._recount(key, pod, of, share)
            before, when = self._told.get((pod, of), (0, 0.0))
            if share.refused > before and self._clock() >= when + _QUIET:
                self._told[pod, of] = share.refused, self._clock()
                yield pod, _WORDS[of].format(most=most, count=share.refused - before)

    def _recount(self, key: bytes, pod: int, of: Shared, share: Share) -> None:
        taken = Counter(map(abi.owner, self._maps[_MAPS[of]].keys()))[pod]
        if taken != share.taken:  # what is added in this moment is missed, and found the next time
            self._maps["shares"].update(key, Share(taken, share.refused).encode())

    def sweep(self, known: Collection[int]) -> None:
        """Forgets pods that are none any more."""
        for key, (pod, of) in ((key, abi.shared(key)) for key, _ in self._maps["shares"].items()):
            if pod and pod not in known:
                self._maps["shares"].delete(key)
                self._told.pop((pod, of), None)
