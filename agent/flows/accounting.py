# SPDX-License-Identifier: Apache-2.0
"""The account that an agent keeps: which pods are counted, their totals, and the last of their connections.

Joins one collector to the API and the metrics. Records are decoded on request only, since most are never read.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import Any

from agent.core.errors import KernelError, SluiceError
from agent.core.model.plan import Foreign
from agent.core.model.pods import Pod, PodTable
from agent.core.model.redirect import Redirect
from agent.core.model.sockets import text
from agent.flows.collector import Collector
from agent.flows.dns.dns_account import DnsAccount
from agent.flows.identity import Identities
from agent.flows.inet_diag.socket_counts import PodSockets, SocketCounts
from agent.flows.journal import ConnectionJournal
from agent.flows.peers_file import PeersFile
from agent.flows.recent import Recent
from agent.flows.record import Connection, Delta, Fate, Quality
from agent.flows.resolved_record import ResolvedRecord, named
from agent.flows.service_backends import Endpoints
from agent.kernel.pod_netns import PodNetns

log = logging.getLogger("sluice.accounting")
OFTEN, SELDOM = 0.1, 1.0  # seconds between two reads of ended connections, with and without a follower
REFRESH = 15.0  # seconds between two readings without a scrape, so that leaks are logged
SOCKETS = 55.0  # seconds between two counts of a pod's sockets: every other verification
PEERS = 2.0  # seconds between two checks of peers_file; one stat each
_RETURNED = (
    "ztunnel's own connections, lately one to {}, come back to it and are refused: something in the pod redirects them,"
    " or overwrites ztunnel's mark"
)
_FORMER = 1024  # namespaces of pods that are gone; their last connections still resolve to a name


Add = Callable[[list[Delta], list[Quality], Callable[[int], Pod | None], float], None]


class Accounting:
    """Keeps the account. `enrol`, `watch`, `release` and `refresh` run on workers, the rest on the event loop."""

    def __init__(
        self,
        *,
        collector: Collector,
        table: PodTable,
        identities: Identities,
        node: str,
        add: Add,
        reason: str = "",
        journal: ConnectionJournal | None = None,
        verify_seconds: float = 30.0,
        peers: PeersFile | None = None,
        dns: DnsAccount | None = None,
        leaked: Callable[[Pod, str], None] | None = None,
    ) -> None:
        """Takes `add` for the results of refresh(), as LabelTotals.add; `reason`: why this collector was chosen.

        `leaked` is called on a worker thread with a pod and what leaked.
        """
        self.dns = dns
        self.collector = collector
        self.reason = reason
        self.recent = Recent[Any, ResolvedRecord](self._named, bad=collector.ended_badly)
        self._table = table
        self._identities = identities
        self._node = node
        self._add = add
        self._journal = journal
        self._verify_seconds = verify_seconds
        self._peers = peers
        self._leaked = leaked
        self._endpoints = Endpoints()
        self._cookies: dict[str, int] = {}  # by UID
        self._pods: OrderedDict[int, str] = OrderedDict()  # cookie -> UID, of those that have gone too
        self._names: dict[str, Pod] = {}
        self._counts = SocketCounts()
        self._turn = threading.Lock()
        self._sockets: dict[str, PodSockets] = {}  # by UID
        self._looked: dict[str, float] = {}

    @property
    def name(self) -> str:
        return self.collector.name

    def enrol(self, pod: Pod, target: PodNetns, want: Redirect, *, captured: bool, fresh: bool = False) -> bool:
        """Calls Collector.enrol; never fails: capture does not depend on it."""
        cookie = target.netns.id.cookie
        with self._turn:
            old = self._cookies.get(pod.uid)
            self._cookies[pod.uid] = cookie
            self._names[pod.uid] = pod
            self._pods[cookie] = pod.uid
            self._pods.move_to_end(cookie)
        try:
            if old is not None and old != cookie:
                self._release(old)
            self._tap(pod, target)
            return self.collector.enrol(target, want, captured=captured, fresh=fresh)
        except Exception as error:  # noqa: BLE001 - the pod is captured all the same
            log.warning("pod %s: cannot account for its connections: %s", pod.key, error)
            return False

    def watch(self, pod: Pod, target: PodNetns) -> None:
        """Calls Collector.watch; never fails either."""
        try:
            self._tap(pod, target)
            self.collector.watch(target)
            self._count_sockets(pod.uid, target)
        except Exception as error:  # noqa: BLE001 - as above
            log.warning("pod %s: cannot account for all of its connections: %s", pod.key, error)

    def _tap(self, pod: Pod, target: PodNetns) -> None:
        if self.dns:
            try:
                self.dns.enrol(pod, target)
            except (OSError, SluiceError) as error:  # its connections are counted all the same
                log.warning("pod %s: cannot account for its DNS queries: %s", pod.key, error)

    def returned(self, target: PodNetns) -> tuple[str, ...]:
        """Returns a remark for Collector.returned; never fails either."""
        try:
            destination = self.collector.returned(target.netns.id.cookie)
        except KernelError:  # the next verification of the account logs why
            destination = None
        return (Foreign(_RETURNED.format(text(destination))),) if destination else ()

    def release(self, uid: str, target: PodNetns | None = None) -> None:
        """Ends the account of a pod; never fails. Its name is kept for records that are not read yet.

        `target`: its namespace, if it is known.
        """
        with self._turn:
            cookie = self._cookies.pop(uid, None)
            self._sockets.pop(uid, None)
            self._looked.pop(uid, None)
            self._forget_former()
        if target is not None:
            cookie = target.netns.id.cookie
        if cookie is not None:
            try:
                self._release(cookie)
            except Exception as error:  # noqa: BLE001 - as above
                log.warning("pod %s is gone: cannot remove its account before the next sweep: %s", uid, error)

    def _forget_former(self) -> None:
        """Forgets namespaces, the oldest first; a pod's name goes with its last one."""
        former = [one for one, uid in self._pods.items() if self._cookies.get(uid) != one]
        for one in former[: max(0, len(former) - _FORMER)]:
            uid = self._pods.pop(one)
            if uid not in self._pods.values():
                self._names.pop(uid, None)

    def _release(self, cookie: int) -> None:
        self._counts.release(cookie)
        if self.dns:
            self.dns.release(cookie)
        self.collector.release(cookie)

    def _count_sockets(self, uid: str, target: PodNetns) -> None:
        """Counts the pod's sockets, at most every SOCKETS seconds. A dump takes half a millisecond."""
        now = time.monotonic()
        if now - self._looked.get(uid, -SOCKETS) >= SOCKETS:
            self._looked[uid] = now
            self._sockets[uid] = self._counts.read(target)

    def sockets(self) -> list[tuple[Pod, PodSockets]]:
        """Returns the sockets of each pod as last counted."""
        pods = [(self._table.get(uid), sockets) for uid, sockets in list(self._sockets.items())]
        return [(pod, sockets) for pod, sockets in pods if pod is not None]

    def pod(self, cookie: int) -> Pod | None:
        """Returns the pod with that namespace cookie, also if it is gone; None if it was forgotten."""
        uid = self._pods.get(cookie, "")
        return self._table.get(uid) or self._names.get(uid)

    def live(self, pod: Pod | None) -> list[dict[str, Any]]:
        """Returns the live connections, of one pod or of all. Raises KernelError."""
        cookie = None if pod is None else self._cookies.get(pod.uid, 0)
        return [self._name(one).as_dict() for one in self.collector.live(cookie)]

    def totals(self) -> list[dict[str, Any]]:
        """Returns connections by direction, fate and reason since this account began. Raises KernelError."""
        self.refresh()
        return [
            {
                "direction": direction.word,
                "fate": fate.word,
                "reason": reason.word if reason else "",
                "connections": count,
            }
            for (direction, fate, reason), count in sorted(self.collector.totals().items())
            if count
        ]

    def losses(self) -> Mapping[str, int]:
        """Returns how much was lost, by kind. Raises KernelError."""
        return {**self.collector.losses(), **(self._journal.losses() if self._journal else {})}

    def refresh(self) -> None:
        """Adds the counts since the last call. Raises KernelError."""
        self._identities.know_pods(self._table)
        deltas, qualities = self.collector.refresh()
        self._add(deltas, qualities, self.pod, time.time())
        for one in deltas:
            if one.fate is Fate.LEAKED and (count := one.opened + one.failed):
                pod = self.pod(one.pod)
                where = f"{one.direction.word} {one.remote or 'unknown address'} port {one.port}"
                log.warning("pod %s: %d connections leaked (%s)", pod.key if pod else one.pod, count, where)
                if pod and self._leaked:
                    self._leaked(pod, f"{count} connections bypassed ztunnel: {where}")
        for cookie, message in self.collector.crowded():
            pod = self.pod(cookie)
            log.warning("pod %s: %s", pod.key if pod else cookie, message)

    async def run(self, dead: Callable[[Collection[int]], Collection[int]]) -> None:
        """Runs until cancelled. `dead` picks the cookies that belong to no pod and to no live namespace."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._drain())
            tasks.create_task(self._every(REFRESH, self.refresh))
            if self.dns:
                tasks.create_task(self.dns.run())
            if self._peers:
                await asyncio.to_thread(self._peers.load)
                tasks.create_task(self._every(PEERS, self._peers.load))
            tasks.create_task(self._every(self._verify_seconds, lambda: self._verify(dead)))

    def close(self) -> None:
        self.collector.close()
        self._counts.close()
        if self.dns:
            self.dns.close()
        self._endpoints.close()
        if self._journal:
            self._journal.close()

    def _verify(self, dead: Callable[[Collection[int]], Collection[int]]) -> None:
        self.collector.sweep(dead)
        if wrong := self.collector.verify():
            log.warning("accounting repaired: %s", "; ".join(wrong))

    async def look(self) -> None:
        """Reads the connections that have ended since the last call. Raises KernelError."""
        records = await asyncio.to_thread(self.collector.records)
        self.recent.add(records)
        if self._journal and records:
            self._journal.write([self._named(one) for one in records])

    async def _drain(self) -> None:
        while True:
            try:
                await self.look()
            except Exception as error:  # noqa: BLE001 - it must not end the agent
                log.warning("accounting: %s", error)
            await self.collector.arrived(OFTEN if self.recent.followed else SELDOM)

    async def _every(self, seconds: float, work: Callable[[], None]) -> None:
        while True:
            await asyncio.sleep(seconds)
            try:
                await asyncio.to_thread(work)
            except Exception as error:  # noqa: BLE001 - as above
                log.warning("accounting: %s", error)

    def _named(self, raw: Any) -> ResolvedRecord:
        return self._name(self.collector.connection(raw))

    def _name(self, connection: Connection) -> ResolvedRecord:
        if self._identities.service(*connection.remote):
            connection = self._endpoints.resolved(connection)
        return named(connection, self.pod(connection.pod), self._identities, self._node)
