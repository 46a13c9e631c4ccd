# SPDX-License-Identifier: Apache-2.0
"""Accounting for connections without eBPF: by sock_diag in each enrolled pod.

The kernel reports every end of a socket, with its last counts; dumps show live sockets, their owners, and facts that
the reports lack. Conntrack shows which connections rules have redirected. Three descriptors per pod.

Times are those of reading: a connection begins when a dump first saw it, else at the time of its last packets, else
when it ended; and it ends when its end is read. So `records` should be called often, `refresh` now and then.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from socket import IPPROTO_TCP
from typing import Final

from agent.core.errors import KernelError
from agent.core.model.redirect import Redirect
from agent.core.model.sockets import CARRYING, Endpoint, TcpSocket, TcpState
from agent.flows.inet_diag.pod_flows import PodFlows
from agent.flows.inet_diag.verdict import Verdicts
from agent.flows.record import Connection, Delta, Direction, Fate, Quality, Reason
from agent.kernel.netlink.ctnetlink import Conntrack
from agent.kernel.netlink.sock_diag import SockDiag
from agent.kernel.netlink.sock_events import SocketEvents
from agent.kernel.netns import NetnsId
from agent.kernel.pod_netns import PodNetns

# Requests of listeners (SYN_RECV) are no connections yet, and the kernel does not report their end.
_STATES: Final = (*CARRYING, TcpState.SYN_SENT, TcpState.LISTEN)


@dataclass(slots=True, kw_only=True)
class _Pod:
    flows: PodFlows
    events: SocketEvents
    diag: SockDiag
    conntrack: Conntrack
    records: list[Connection] = field(default_factory=list)

    def close(self) -> None:
        self.events.close()
        self.diag.close()
        self.conntrack.close()


class DiagCollector:
    """Implements agent.flows.collector.Collector. For any thread; one call at a time does work.

    Never known: process and command of a connection, the user of one that no dump saw, how a blocking connect failed,
    and which connections ss --kill ended. Undecided: connections that no dump saw and that were not redirected, for
    they may be ztunnel's own (see agent.flows.inet_diag.ztunnel_upstreams). So only those leaks are counted that live
    long enough for a dump.
    """

    name = "inet_diag"

    def __init__(
        self,
        held: Callable[[Collection[int]], Collection[int]] = lambda inodes: (),
        foreign: Callable[[Sequence[TcpSocket], NetnsId], Collection[int]] = lambda sockets, netns: (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Takes `held`, which picks the inodes of sockets that ztunnel's process holds.

        A mark alone proves nothing: with the default any socket with ztunnel's mark counts as an application that
        forges it. `foreign` picks the listeners of the pod's own processes, by cookie.
        """
        self._held = held
        self._foreign = foreign
        self._clock = clock
        self._lock = threading.Lock()
        self._pods: dict[int, _Pod] = {}
        self._left: list[Connection] = []  # records of pods that were released
        self._sums: tuple[list[Delta], list[Quality]] = ([], [])
        self._totals: Counter[tuple[Direction, Fate, Reason]] = Counter()
        self._losses = {"notifications": 0, "endings": 0}

    def enrol(
        self,
        target: PodNetns,
        want: Redirect,
        *,
        captured: bool,
        fresh: bool = False,
        besides: Callable[[], Collection[int]] | None = None,
    ) -> bool:
        """Begins, or takes over a change. Runs in the thread that owns `target`. Raises KernelError or NetnsError.

        With `besides` only existing connections are followed, until they end, except the sockets with the cookies that
        it returns. Those, and all later ones, are counted elsewhere.
        """
        cookie = target.netns.id.cookie
        wiring = target.wiring()
        with self._lock:
            pod = self._pods.get(cookie)
            if pod is None:
                self._pods[cookie] = pod = self._begin(target, Verdicts(want, wiring), captured=captured)
                if besides is not None:
                    counted = besides()
                    self._dump(pod)  # a socket in both dumps lived when `besides` read
                    pod.flows.only_preexisting(counted)
                elif not fresh:
                    pod.flows.mark_preexisting()
                self._end(cookie, pod)
            else:
                self._change(pod, Verdicts(want, wiring), captured=captured)
            return False

    def change(self, target: PodNetns, want: Redirect, *, captured: bool) -> None:
        """Takes over a change of a pod that is followed already. Raises as enrol()."""
        wiring = target.wiring()
        with self._lock:
            if pod := self._pods.get(target.netns.id.cookie):
                self._change(pod, Verdicts(want, wiring), captured=captured)

    def watch(self, target: PodNetns) -> None:
        """Does nothing: `enrol` has done all."""

    def release(self, cookie: int) -> None:
        """Drops the pod; keeps records of ended connections, not of live ones."""
        with self._lock:
            pod = self._pods.pop(cookie, None)
            if pod is None:
                return
            try:
                self._look(pod)
                pod.records += pod.flows.settle(self._clock(), all_of_it=True)
                self._gather(pod)
                self._left += pod.records
            finally:
                pod.close()

    def admit(self) -> None:
        """Does nothing: `held` is asked for the sockets of each dump."""

    def sweep(self, dead: Callable[[Collection[int]], Collection[int]]) -> None:
        """Releases dead pods that this process holds; nothing outlives it."""
        with self._lock:
            held = tuple(self._pods)
        for cookie in dead(held):
            self.release(cookie)

    def refresh(self) -> tuple[list[Delta], list[Quality]]:
        """Reads all sockets of all pods. Raises KernelError."""
        with self._lock:
            for cookie, pod in list(self._pods.items()):
                self._look(pod)
                self._gather(pod)
                self._end(cookie, pod)
            sums = self._sums
            self._sums = ([], [])
            return sums

    def totals(self) -> Mapping[tuple[Direction, Fate, Reason], int]:
        """Returns the totals since this process began: nothing outlives it."""
        with self._lock:
            return dict(self._totals)

    def live(self, pod: int | None = None) -> list[Connection]:
        with self._lock:
            chosen = [one for cookie, one in self._pods.items() if pod in (None, cookie)]
            for account in chosen:
                self._look(account)
            return [one for account in chosen for one in account.flows.live()]

    def records(self) -> list[Connection]:
        """Returns ended connections; undecided ones are held back for up to 2.5 seconds. Raises KernelError."""
        with self._lock:
            ended = self._left
            self._left = []
            for pod in self._pods.values():
                self._drain(pod)
                if pod.flows.unsettled:
                    self._dump(pod)
                ended += pod.records + pod.flows.settle(self._clock())
                pod.records = []
            return ended

    def connection(self, record: Connection) -> Connection:
        return record

    def ended_badly(self, record: Connection) -> bool:
        return record.ended_badly

    async def arrived(self, seconds: float) -> None:
        """Returns after `seconds`: the kernel keeps some fifty thousand ends for each pod."""
        await asyncio.sleep(seconds)

    def verify(self) -> Sequence[str]:
        return ()

    def crowded(self) -> Sequence[tuple[int, str]]:
        return ()

    def returned(self, cookie: int) -> Endpoint | None:
        return None

    def losses(self) -> Mapping[str, int]:
        """Returns the losses by kind.

        `notifications`: how often some were lost (the kernel does not count them). `endings`: connections that only a
        dump showed to have ended. Those that began and ended in between are not known at all.
        """
        with self._lock:
            return dict(self._losses)

    def close(self) -> None:
        with self._lock:
            for pod in self._pods.values():
                pod.close()
            self._pods.clear()

    def _end(self, cookie: int, pod: _Pod) -> None:
        if pod.flows.over:
            self._left += pod.records
            del self._pods[cookie]
            pod.close()

    def _change(self, pod: _Pod, verdicts: Verdicts, *, captured: bool) -> None:
        flows = pod.flows
        old = flows.verdicts.redirect, flows.verdicts.wiring, flows.captured
        if old != (verdicts.redirect, verdicts.wiring, captured):
            self._look(pod)
            flows.change(verdicts, captured=captured)

    def _begin(self, target: PodNetns, verdicts: Verdicts, *, captured: bool) -> _Pod:
        netns = target.netns.id
        with ExitStack() as made:
            events = made.enter_context(closing(target.netns.call(SocketEvents)))
            diag = made.enter_context(closing(target.netns.call(SockDiag)))
            conntrack = made.enter_context(closing(target.netns.call(Conntrack)))
            flows = PodFlows(
                netns.cookie,
                verdicts=verdicts,
                held=self._held,
                foreign=lambda sockets: self._foreign(sockets, netns),
                replies=partial(_replies, conntrack),
                captured=captured,
            )
            pod = _Pod(flows=flows, events=events, diag=diag, conntrack=conntrack)
            self._dump(pod)
            made.pop_all()
        return pod

    def _look(self, pod: _Pod) -> None:
        # In this order: for a socket that ends in between, the dump still shows the owner.
        self._dump(pod)
        self._drain(pod)
        if pod.flows.unsettled:
            self._dump(pod)
        pod.records += pod.flows.settle(self._clock())

    def _drain(self, pod: _Pod) -> None:
        reports, lost = pod.events.take()
        now = self._clock()
        for report in reports:
            pod.flows.ended(report, now)
        if lost:
            self._losses["notifications"] += 1
            self._dump(pod, complete=True)

    def _dump(self, pod: _Pod, *, complete: bool = False) -> None:
        states = (*_STATES, TcpState.TIME_WAIT) if pod.flows.unsettled else _STATES
        reports, timers = pod.diag.reports(states)
        self._losses["endings"] += pod.flows.dumped(reports, timers, self._clock(), complete=complete)
        if pod.flows.doubtful:
            pod.flows.dumped(pod.diag.reports(_STATES)[0], {}, self._clock())

    def _gather(self, pod: _Pod) -> None:
        pod.flows.count()
        deltas, qualities = pod.flows.sums.take()
        for one in deltas:
            self._totals[one.direction, one.fate, one.reason] += one.opened + one.failed
        self._sums[0].extend(deltas)
        self._sums[1].extend(qualities)


def _replies(conntrack: Conntrack, client: Endpoint, service: Endpoint) -> tuple[Endpoint, Endpoint] | None:
    try:
        return conntrack.replies(IPPROTO_TCP, client, service)
    except KernelError:  # a kernel without ctnetlink
        return None
