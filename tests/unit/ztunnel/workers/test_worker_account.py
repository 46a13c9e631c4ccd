# SPDX-License-Identifier: Apache-2.0
"""Counts of workers that come and go, who reads DNS, and when a worker is replaced."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from agent.ztunnel.telemetry.traffic_metrics import Series
from agent.ztunnel.workers.worker_account import (
    FIRST_BACKOFF,
    LAST_BACKOFF,
    STEADY_SECONDS,
    WorkerCounts,
    backoff,
    dns_reader,
)

OPENED, OPEN = ("istio_tcp_connections_opened", ()), ("istio_tcp_sockets_open", ())


def test_counts_are_summed_and_counters_outlive_their_worker() -> None:
    counts = WorkerCounts()
    counts.update(11, {OPENED: 3, OPEN: 2})
    counts.update(12, {OPENED: 4, OPEN: 1})
    assert counts.total() == {OPENED: 7, OPEN: 3}
    counts.update(11, {OPENED: 5})
    assert counts.total() == {OPENED: 9, OPEN: 3}
    counts.end(11)
    assert counts.total() == {OPENED: 9, OPEN: 1}
    counts.update(13, {OPENED: 1})
    counts.end(14)  # it has not reported
    assert counts.total() == {OPENED: 10, OPEN: 1}


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.integers(0, 9))))
def test_a_counter_never_falls(steps: list[tuple[int, bool, int]]) -> None:
    counts, own, total = WorkerCounts(), dict.fromkeys(range(4), 0), 0
    for worker, ends, more in steps:
        own[worker] += more
        changed: Series = {OPENED: own[worker]}
        counts.update(worker, changed)
        total += more
        if ends:
            counts.end(worker)
            own[worker] = 0
        assert counts.total().get(OPENED, 0) == total


def test_a_worker_that_lived_is_replaced_at_once_and_another_with_backoff() -> None:
    assert backoff(LAST_BACKOFF, STEADY_SECONDS) == 0.0
    waits = [0.0]
    for _ in range(9):
        waits.append(backoff(waits[-1], 0.01))
    assert waits[1] == FIRST_BACKOFF and waits[-1] == LAST_BACKOFF
    assert all(later >= earlier for earlier, later in pairwise(waits))


def test_queries_of_pods_are_spread_over_the_workers() -> None:
    readers: list[int] = []
    for _ in range(6):
        readers.append(dns_reader(readers, 3))
    assert sorted(readers) == [0, 0, 1, 1, 2, 2]
    readers.remove(1)
    assert dns_reader(readers, 3) == 1
