# SPDX-License-Identifier: Apache-2.0
"""Counts of all workers together, and decisions about them: which reads DNS, when one is replaced. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from agent.ztunnel.telemetry.traffic_metrics import Series, counters, merged

STEADY_SECONDS = 10.0  # a worker that lived for so long is replaced at once
FIRST_BACKOFF, LAST_BACKOFF = 0.1, 5.0  # seconds


class WorkerCounts:
    """Sums the counts of all workers; the counters of those that have ended stay."""

    def __init__(self) -> None:
        self._latest: dict[int, Series] = {}  # by process
        self._ended: Series = {}

    def update(self, process: int, changed: Series) -> None:
        self._latest.setdefault(process, {}).update(changed)

    def end(self, process: int) -> None:
        self._ended = merged((self._ended, counters(self._latest.pop(process, {}))))

    def total(self) -> Series:
        return merged((self._ended, *self._latest.values()))


def backoff(previous: float, lived: float) -> float:
    """Returns how long to wait before a worker that lived for `lived` seconds is replaced.

    `previous` is the wait before it was started.
    """
    if lived >= STEADY_SECONDS:
        return 0.0
    return min(previous * 2, LAST_BACKOFF) if previous else FIRST_BACKOFF


def dns_reader(readers: Iterable[int], workers: int) -> int:
    """Returns the worker that reads the queries of one more pod: that with the fewest. `readers`: of the other pods."""
    load = [0] * workers
    for reader in readers:
        load[reader] += 1
    return load.index(min(load))
