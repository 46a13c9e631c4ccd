# SPDX-License-Identifier: Apache-2.0
"""The account of the pods' DNS queries: packet taps at their interfaces, read together when packets have come.

A pod that asks nothing costs nothing here. Reading takes at most a tenth of a processor, however much the pods ask:
what does not fit into a tap's buffer meanwhile is lost, and counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Final

from agent.core.errors import KernelError
from agent.core.model.pods import Pod
from agent.core.wire.dns_filter import SNAPPED, dns_filter
from agent.core.wire.packet import UDP
from agent.core.wire.rtnetlink import LOOPBACK_INDEX
from agent.flows.dns.queries import Client, DnsQuery, PodQueries
from agent.flows.dns.summary import DnsTotals
from agent.flows.recent import Recent
from agent.kernel.bpf.asked_resolvers import Asked
from agent.kernel.netlink.ctnetlink import Conntrack
from agent.kernel.packet_tap import PacketTap
from agent.kernel.pod_netns import PodNetns

log = logging.getLogger("sluice.dns")
KEPT: Final = 128  # queries of one pod
_PAUSE: Final = 0.1  # seconds between two readings
_SHARE: Final = 9  # times the processor time of a reading is the least pause after it
_TICK: Final = 1.0  # seconds between two looks for queries without an answer
_MOST: Final = 512  # packets of a tap in one reading
_TURN: Final = 0.02  # seconds of a processor for a pod in one reading: one TCP segment can have dozens of queries
_ON_LO, _ELSEWHERE = dns_filter(lo=True), dns_filter(lo=False)


@dataclass(slots=True, kw_only=True)
class _Pod:
    queries: PodQueries
    conntrack: Conntrack | None  # None where eBPF captures
    taps: dict[int, PacketTap] = field(default_factory=dict)  # by interface
    kept: deque[DnsQuery] = field(default_factory=lambda: deque(maxlen=KEPT))
    lost: int = 0


class DnsAccount:
    """`enrol` and `release` are for worker threads, a pod at a time; the rest is for the event loop."""

    def __init__(self, asked: Asked | None) -> None:
        """Takes the map of resolvers where eBPF captures; elsewhere conntrack knows them."""
        self.recent = Recent[DnsQuery, DnsQuery](lambda query: query)
        self.totals = DnsTotals()
        self.lost = 0  # packets that found no room, and queries that may have had their answers among them
        self._asked = asked
        self._lock = threading.Lock()
        self._pods: dict[int, _Pod] = {}  # by cookie
        self._by_descriptor: dict[int, tuple[_Pod, PacketTap]] = {}
        self._old: list[PacketTap | Conntrack] = []
        self._epoll = select.epoll()
        self._due = asyncio.Event()
        self._reading = asyncio.Lock()
        self._spent = 0.0  # seconds of a processor that the last reading took
        self._loop: asyncio.AbstractEventLoop | None = None

    def enrol(self, pod: Pod, target: PodNetns) -> None:
        """Taps the interfaces that the pod has now, and no longer those that it had. Raises OSError or SluiceError."""
        cookie = target.netns.id.cookie
        held = self._pods.get(cookie)
        if held is None:
            conntrack = None if self._asked else target.netns.call(Conntrack)
            held = _Pod(queries=PodQueries(pod, _resolver(cookie, self._asked, conntrack)), conntrack=conntrack)
            with self._lock:
                self._pods[cookie] = held
        held.queries.pod = pod
        wanted = {LOOPBACK_INDEX, *(link.index for link in target.wiring().links)}
        self._discard(held, held.taps.keys() - wanted)
        for index in wanted - held.taps.keys():
            lo = index == LOOPBACK_INDEX
            tap = PacketTap(
                target.netns, index, _ON_LO if lo else _ELSEWHERE, longest=SNAPPED, outgoing=not lo
            )  # fmt: skip
            with self._lock:
                held.taps[index] = tap
                self._by_descriptor[tap.socket.fileno()] = (held, tap)
                self._epoll.register(tap.socket, select.EPOLLIN)

    def release(self, cookie: int) -> None:
        """Ends the account of the pod. The run closes its taps: that takes long, and no pod's end waits for it."""
        with self._lock:
            held = self._pods.pop(cookie, None)
        if held:
            self._discard(held, set(held.taps), *([held.conntrack] if held.conntrack else []))

    def _discard(self, held: _Pod, indices: set[int], *others: Conntrack) -> None:
        with self._lock:
            for index in indices:
                tap = held.taps.pop(index)
                self._by_descriptor.pop(tap.socket.fileno())
                self._epoll.unregister(tap.socket)
                self._old.append(tap)
            self._old += others
        if self._loop and self._old:
            self._loop.call_soon_threadsafe(self._due.set)

    def of(self, uid: str) -> tuple[list[DnsQuery], int] | None:
        """Returns the pod's last queries, oldest first, and how many were lost; None for a pod that has no account."""
        held = next((one for one in list(self._pods.values()) if one.queries.pod.uid == uid), None)
        return (list(held.kept), held.lost) if held else None

    async def run(self) -> None:
        """Runs until cancelled."""
        self._loop = asyncio.get_running_loop()
        while True:
            await self._arrived()
            self._spent = 0.0
            try:
                await self.look()
            except Exception as error:  # noqa: BLE001 - it must not end the agent
                log.warning("account of DNS queries: %s", error)
            await asyncio.sleep(max(_PAUSE, _SHARE * self._spent))

    async def _arrived(self) -> None:
        """Waits for packets, for a tap to close, or for a tick while queries wait for their answers."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._epoll.fileno(), self._due.set)
        waiting = any(pod.queries.waiting for pod in list(self._pods.values()))
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TICK if waiting else None):
                    await self._due.wait()
        finally:
            loop.remove_reader(self._epoll.fileno())
            self._due.clear()

    async def look(self) -> None:
        """Reads the packets that have come since the last call. Raises KernelError."""
        async with self._reading:
            found, self._spent = await asyncio.to_thread(self._read)
            for held, query in found:
                held.kept.append(query)
                self.totals.add(query)
            self.recent.add([query for _, query in found])

    def _read(self) -> tuple[list[tuple[_Pod, DnsQuery]], float]:
        """Returns the queries that have ended, and the seconds of a processor that it took, without its waits."""
        began = time.thread_time()
        with self._lock:
            old = self._old
            self._old = []
            ready = dict[int, tuple[_Pod, list[PacketTap]]]()
            for fd, _ in self._epoll.poll(0):
                if one := self._by_descriptor.get(fd):
                    ready.setdefault(id(one[0]), (one[0], []))[1].append(one[1])
            pods = list(self._pods.values())
        now = time.time()  # before the packets are taken: an answer is among them if it came until then
        found = list[tuple[_Pod, DnsQuery]]()
        for held, taps in ready.values():
            taken = [tap.take(_MOST) for tap in taps]
            packets = sorted((packet for some, _ in taken for packet in some), key=itemgetter(0))  # by time
            lost = sum(count for _, count in taken)
            until = time.thread_time() + _TURN
            for number, packet in enumerate(packets):
                if time.thread_time() >= until:
                    lost += len(packets) - number  # else other pods would lose theirs in the pause that follows
                    break
                found += [(held, query) for query in held.queries.add([packet])]
            if lost:
                lost += held.queries.forget()
                held.lost += lost
                self.lost += lost
        found += [(held, query) for held in pods for query in held.queries.expire(now)]
        for closing in old:
            closing.close()
        return found, time.thread_time() - began

    def close(self) -> None:
        """Closes everything; after `run` has ended."""
        for cookie in list(self._pods):
            self.release(cookie)
        for one in self._old:
            one.close()
        self._epoll.close()


def _resolver(cookie: int, asked: Asked | None, conntrack: Conntrack | None) -> Callable[[int, Client, Client], str]:
    """Returns what finds the resolver of a captured query; of one by TCP eBPF does not know it."""

    def find(protocol: int, local: Client, client: Client) -> str:
        found = None
        with contextlib.suppress(KernelError):
            if asked is not None:
                found = asked.of(cookie, client) if protocol == UDP else None
            elif conntrack is not None:
                found = conntrack.original_destination(protocol, local, client)
        return found[0] if found and found != local else ""

    return find
