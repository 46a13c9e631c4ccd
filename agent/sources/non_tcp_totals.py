# SPDX-License-Identifier: Apache-2.0
"""Totals of pods' traffic that is neither TCP nor captured DNS, kept across changes of the rules that count it.

A replaced rule counts from zero again: totals are sums of differences, read in passes over a pod, at most once in
PERIOD seconds, and right before its rules are replaced.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from agent.backends import non_tcp
from agent.backends.ebpf.pins import Pins
from agent.backends.non_tcp import Counts
from agent.core.model.redirect import Redirect
from agent.kernel.pod_netns import PodNetns

PERIOD = 55.0  # seconds; a reading costs about as much as comparing a pod's rules


@dataclass(slots=True)
class _Pod:
    want: Redirect | None = None  # the want that the kernel's rules implement
    last: dict[str, Counts] = field(default_factory=dict)
    total: dict[str, Counts] = field(default_factory=dict)
    time: float = float("-inf")


class NonTcpCounter:
    """Counts by pod UID. `count` is for worker threads, one pod at a time each; `totals` for any thread."""

    def __init__(self, backend: str, clock: Callable[[], float] = time.monotonic, pins: Pins | None = None) -> None:
        """Takes `pins`: the paths of backend ebpf's maps."""
        self._backend = backend
        self._clock = clock
        self._pins = pins
        self._pods: dict[str, _Pod] = {}
        self._lock = threading.Lock()

    def count(self, uid: str, target: PodNetns, want: Redirect, *, now: bool = False) -> None:
        """Reads the counters before `want` is applied, if PERIOD has passed, `want` has changed, or `now`.

        Raises KernelError.
        """
        pod = self._pods.setdefault(uid, _Pod())
        if pod.want is not None and (now or pod.want != want or self._clock() - pod.time >= PERIOD):
            self._read(pod, target, pod.want)
        if pod.want != want:
            pod.want = want
            pod.last = {}

    def totals(self, uid: str) -> dict[str, Counts]:
        """Returns the totals by direction, as last read."""
        with self._lock:
            return dict(self._pods[uid].total) if uid in self._pods else {}

    def forget(self, uid: str) -> None:
        with self._lock:
            self._pods.pop(uid, None)

    def _read(self, pod: _Pod, target: PodNetns, want: Redirect) -> None:
        totals = non_tcp.read(self._backend, target, want, self._pins)
        pod.time = self._clock()
        with self._lock:
            for direction, counts in totals.items():
                last = pod.last.get(direction, Counts())
                if counts.packets < last.packets:  # replaced by a repair: the whole count is new
                    last = Counts()
                total = pod.total.get(direction, Counts())
                pod.total[direction] = total.plus(counts.packets - last.packets, counts.bytes - last.bytes)
        pod.last = totals
