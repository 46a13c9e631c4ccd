# SPDX-License-Identifier: Apache-2.0
"""Reads the growth of the totals that the programs keep. The kernel keeps them when the agent ends.

The exported part is noted in another map: a new agent's counters begin at zero, as a process's do, with the part that
its predecessor had not exported. A total that has not changed for long is removed, since peers come and go, and added
to one of its sort.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import astuple, dataclass

from agent.core.errors import KernelError
from agent.flows.collector import Sort
from agent.flows.ebpf import account_abi
from agent.flows.ebpf.account_abi import CounterValue
from agent.flows.record import Delta
from agent.kernel.bpf.map import Maps

IDLE = 600.0  # seconds
_NOTHING = CounterValue()


@dataclass(slots=True)
class _Seen:
    tally: bytes
    changed: float


class KernelTotals:
    """One thread at a time. Methods raise KernelError."""

    def __init__(self, maps: Maps, clock: Callable[[], float] = time.monotonic) -> None:
        self._maps = maps
        self._clock = clock
        self._seen: dict[bytes, _Seen] | None = None

    def added(self) -> Iterator[Delta]:
        """Yields the growth since the last call, of this agent or the previous one."""
        now = self._clock()
        if self._seen is None:
            self._seen = {key: _Seen(value, now) for key, value in self._maps["exported"].items()}
        idle = list[tuple[str, bytes]]()
        for name in ("tallies", "rest"):
            for key, value in self._maps[name].items():
                seen = self._seen.get(key)
                if seen is None or seen.tally != value:
                    yield self._export(key, value, seen, now)
                elif now - seen.changed > IDLE:
                    idle.append((name, key))
        for name, key in idle:
            if (last := self._maps[name].take(key)) is not None:
                seen = self._seen[key]
                if last != seen.tally:
                    yield _delta(key, account_abi.tally(last), account_abi.tally(seen.tally))
                self._retire(key, account_abi.tally(last))

    def totals(self) -> Mapping[Sort, int]:
        """Counts connections that were opened, or failed."""
        totals = Counter[Sort]()
        for name in ("tallies", "rest", "former"):
            for key, value in self._maps[name].items():
                _, direction, fate, reason, _, _ = account_abi.tally_key(key)
                tally = account_abi.tally(value)
                totals[direction, fate, reason] += tally.opened + tally.failed
        return totals

    def _export(self, key: bytes, value: bytes, seen: _Seen | None, now: float) -> Delta:
        assert self._seen is not None
        before = account_abi.tally(seen.tally) if seen else _NOTHING
        self._seen[key] = _Seen(value, now)
        with suppress(KernelError):  # the map is full: the next agent will export this once more
            self._maps["exported"].update(key, value)
        return _delta(key, account_abi.tally(value), before)

    def add(self, delta: Delta) -> None:
        """Adds counts that no program has made."""
        tally = CounterValue(
            opened=delta.opened,
            closed=delta.closed,
            failed=delta.failed,
            sent=delta.sent,
            received=delta.received,
            socket=delta.socket,
        )
        self._keep(account_abi.sort_key(delta.direction, delta.fate, delta.reason), tally)

    def _retire(self, key: bytes, last: CounterValue) -> None:
        assert self._seen is not None
        _, direction, fate, reason, _, _ = account_abi.tally_key(key)
        self._keep(account_abi.sort_key(direction, fate, reason), last)
        self._maps["exported"].delete(key)
        del self._seen[key]

    def _keep(self, key: bytes, more: CounterValue) -> None:
        before = self._maps["former"].lookup(key)
        sums = zip(astuple(more), astuple(account_abi.tally(before) if before else _NOTHING), strict=True)
        self._maps["former"].update(key, account_abi.TALLY.pack(*((a + b) % (1 << 64) for a, b in sums)))


def _delta(key: bytes, now: CounterValue, before: CounterValue) -> Delta:
    pod, direction, fate, reason, remote, port = account_abi.tally_key(key)
    return Delta(
        pod=pod,
        direction=direction,
        fate=fate,
        reason=reason,
        remote=remote,
        port=port,
        opened=now.opened - before.opened,
        closed=now.closed - before.closed,
        failed=now.failed - before.failed,
        sent=_signed(now.sent - before.sent),
        received=_signed(now.received - before.received),
        socket=now.socket,
    )


def _signed(number: int) -> int:
    """Returns the signed number: the kernel takes back a byte that was counted too early (a FIN) by adding 2^64 - 1."""
    return number if -(1 << 63) <= number < 1 << 63 else number - (1 << 64) * (1 if number > 0 else -1)
